"""Tune's callback: writes the trials' files and MLflow runs, and shows the trials live."""

import logging
import time
from types import TracebackType
from typing import Any, Self

import rich
from ray.tune import Callback
from rich import box
from rich.live import Live
from rich.table import Table

from crosslmm.lease import Fence
from crosslmm.progress import cell
from crosslmm.sweep import trials
from crosslmm.sweep.figures import quantity
from crosslmm.sweep.search import Search
from crosslmm.sweep.trials import State, Trial, Validation
from crosslmm.text import in_brief
from crosslmm.tracking import MlflowRun

log = logging.getLogger(__name__)

STATUS: dict[State, str] = {"finished": "FINISHED", "stopped early": "FINISHED", "failed": "FAILED"}
"""MLflow status of a trial's state; KILLED for the others. MLflow shows a killed run like a failed one, but a trial
that was stopped early has done what it was for; its tag `state` says how it ended."""
STYLE: dict[State, str] = {
    "running": "bold", "finished": "green", "stopped early": "yellow", "failed": "red", "out of budget": "magenta",
}  # fmt: skip
LIVE_ROWS = 30
"""Rows of the live table, which shows the newest trials."""


class SweepProgress(Callback):
    """Tune's callback. As a context, it shows a live table at a terminal; elsewhere it logs a line per event.

    Args:
        folder: folder of the sweep.
        search: the searcher, which has the trials.
        record: MLflow run of the sweep.
        total_steps: steps of a trial.
        workers: training workers of a trial.
        fence: of the folder.
    """

    def __init__(
        self, folder: str, search: Search, record: MlflowRun, total_steps: int, workers: int, fence: Fence
    ) -> None:
        self.folder, self.search, self.record, self.fence = folder, search, record, fence
        self.total_steps, self.workers, self._console = total_steps, workers, rich.get_console()
        self.out_of_budget = False
        self._since: dict[int, float] = {}
        """Number of each running trial -> when its time was last counted [s, monotonic]."""
        self._live = Live(console=self._console, get_renderable=self.table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._console.is_terminal:
            self._live.stop()
        for trial in self.search.by_id.values():
            # Interrupted or out of budget. Tune calls nobody about it; the trial resumes with the sweep.
            if trial.state == "running":
                if self.out_of_budget:
                    trial.state = "out of budget"
                self._end(trial)
        self._console.print(self.table(everything=True))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial's process starts."""
        sweep_trial = self.search.by_id[trial.trial_id]
        self._since[sweep_trial.number] = time.monotonic()
        self._write(sweep_trial)
        self._log(sweep_trial, f"starts  {sweep_trial.title}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a validation, the end, or the cause of a failure."""
        sweep_trial = self.search.by_id[trial.trial_id]
        if "error" in result:
            sweep_trial.error = result["error"]
        elif "finished" in result:
            sweep_trial.state, sweep_trial.train_s = "finished", result["train_s"]
        elif not sweep_trial.last or result["step"] > sweep_trial.last.step:
            validation = Validation(
                int(result["step"]), float(result["loss"]), float(result["accuracy"]), int(result.get("asked", 0))
            )
            sweep_trial.curve.append(validation)
            accuracy = f"accuracy {validation.accuracy:.3f} ({validation.asked} questions)"
            where = f"step {validation.step}/{self.total_steps}"
            self._log(sweep_trial, f"{where}  loss {validation.loss:.3f}  {accuracy}")
        self._write(sweep_trial)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended or was stopped."""
        sweep_trial = self.search.by_id[trial.trial_id]
        if sweep_trial.state == "running":
            sweep_trial.state = "out of budget" if self.out_of_budget else "stopped early"
        self._end(sweep_trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial raised or its process died."""
        sweep_trial = self.search.by_id[trial.trial_id]
        if sweep_trial.state == "finished":
            return  # errors after the end concern only Tune
        sweep_trial.state = "failed"
        if sweep_trial.error is None:
            cause = trial.get_pickled_error()
            sweep_trial.error = f"{type(cause).__name__}: {in_brief(cause, 500)}" if cause else "its process died"
        self._end(sweep_trial)

    def worker_seconds(self) -> float:
        """Return the worker time of all trials up to now [s]."""
        for number in self._since:
            self._count(self.search.trials[number])
        return sum(trial.seconds for trial in self.search.trials) * self.workers

    def table(self, everything: bool = False) -> Table:
        """Return the trials as a table, one row each."""
        rows = self.search.trials if everything else self.search.trials[-LIVE_ROWS:]
        table = Table(
            title=f"{len(self.search.trials)} trials", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in ("trial", "tokens", "MACs", "step", "loss", "accuracy", "n", "s"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("point")
        for trial in rows:
            last = trial.last
            table.add_row(
                str(trial.number),
                str(trial.tokens_per_frame),
                quantity(trial.macs),
                *((str(last.step), f"{last.loss:.3f}", f"{last.accuracy:.3f}", str(last.asked)) if last else [""] * 4),
                f"{trial.seconds:.0f}",
                trial.state,
                cell(trial.title),
                style=STYLE[trial.state],
            )
        return table

    def _end(self, trial: Trial) -> None:
        self._write(trial)
        self._since.pop(trial.number, None)
        self._log(trial, f"{trial.state}{': ' + trial.error if trial.error else ''}  after {trial.seconds:.0f} s")
        try:
            child = MlflowRun(self.record.tracking, str(trial.run_id))
            child.log_values({"cost/seconds": trial.seconds}, {"state": trial.state})
            if trial.state != "finished":  # a finished one has written its status itself
                child.finish(STATUS.get(trial.state, "KILLED"))
        except Exception as error:  # an MLflow outage fails no trial
            log.warning("trial %s  its end is not in MLflow: %s", trial.number, type(error).__name__)

    def _write(self, trial: Trial) -> None:
        self._count(trial)
        self.fence.require()
        trials.write(self.folder, trial)

    def _count(self, trial: Trial) -> None:
        now = time.monotonic()
        if trial.number in self._since:
            trial.seconds += now - self._since[trial.number]
            self._since[trial.number] = now

    def _log(self, trial: Trial, message: str) -> None:
        if not self._console.is_terminal:  # the live table shows it there
            log.info("trial %s  %s", trial.number, message)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object, and nothing reads it again
