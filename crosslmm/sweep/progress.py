"""Sees what becomes of the trials: keeps their files and their record, and shows them live."""

import time
from types import TracebackType
from typing import Any, Self

from ray.tune import Callback
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from crosslmm.sweep import trials
from crosslmm.sweep.figures import quantity
from crosslmm.sweep.search import Search
from crosslmm.sweep.trials import Rung, State, Trial
from crosslmm.tracking import MlflowRun

STATUS: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED"}
"""MLflow's word for how a trial ended; KILLED for the others."""
STYLE: dict[State, str] = {
    "running": "bold", "finished": "green", "stopped early": "yellow", "failed": "red", "out of budget": "magenta",
}  # fmt: skip
SHOWN = 30
"""Rows of the live table; the newest ones where there are more."""


class SweepProgress(Callback):
    """Tune's callback. As a context it shows a live table at a terminal; a log file gets a line for each event.

    Args:
        folder: of the sweep.
        search: knows the trials.
        record: of the sweep.
        total_steps: of a trial [steps].
        workers: of a trial.
        console: to show them on.
    """

    def __init__(
        self, folder: str, search: Search, record: MlflowRun, total_steps: int, workers: int, console: Console
    ) -> None:
        self.folder, self.search, self.record = folder, search, record
        self.total_steps, self.workers, self.console = total_steps, workers, console
        self.out_of_budget = False
        self._since: dict[int, float] = {}
        """When running trials were last looked at, by number."""
        self._live = Live(console=console, get_renderable=self.table, refresh_per_second=1, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()
        for trial in self.search.by_id.values():
            # Broken off, or out of budget, of which Tune tells nobody: it goes on when the sweep does.
            if trial.state == "running":
                trial.state = "out of budget" if self.out_of_budget else "running"
                self._end(trial)
        self.console.print(self.table(everything=True))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process starts."""
        mine = self.search.by_id[trial.trial_id]
        self._since[mine.number] = time.monotonic()
        self._keep(mine)
        self._say(mine, f"starts  {_words(mine)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """It was validated, ended, or says why it failed."""
        mine = self.search.by_id[trial.trial_id]
        if "error" in result:
            mine.error = result["error"]
        elif "finished" in result:
            mine.state, mine.train_s = "finished", result["train_s"]
        elif not mine.last or result["step"] > mine.last.step:
            mine.curve.append(Rung(int(result["step"]), float(result["loss"]), float(result["accuracy"])))
            rung = mine.curve[-1]
            self._say(mine, f"step {rung.step}/{self.total_steps}  loss {rung.loss:.3f}  accuracy {rung.accuracy:.3f}")
        self._keep(mine)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its function returned, or it was stopped."""
        mine = self.search.by_id[trial.trial_id]
        if mine.state == "running":
            mine.state = "out of budget" if self.out_of_budget else "stopped early"
        self._end(mine)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It raised, or its process died."""
        mine = self.search.by_id[trial.trial_id]
        if mine.state == "finished":
            return  # what came after is Tune's own affair
        mine.state = "failed"
        if mine.error is None:
            cause = trial.get_pickled_error()
            mine.error = (
                f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}" if cause else "its process died"
            )
        self._end(mine)

    def worker_seconds(self) -> float:
        """What all trials have held workers for, this moment included [s]."""
        for number in self._since:
            self._count(self.search.trials[number])
        return sum(trial.seconds for trial in self.search.trials) * self.workers

    def table(self, everything: bool = False) -> Table:
        """The trials, a row each."""
        shown = self.search.trials if everything else self.search.trials[-SHOWN:]
        table = Table(
            title=f"{len(self.search.trials)} trials", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for heading in ("trial", "tokens", "MACs", "step", "loss", "accuracy", "s"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        table.add_column("what was searched")
        for trial in shown:
            last = trial.last
            table.add_row(
                str(trial.number),
                str(trial.tokens_per_frame),
                quantity(trial.macs),
                *((str(last.step), f"{last.loss:.3f}", f"{last.accuracy:.3f}") if last else ("", "", "")),
                f"{trial.seconds:.0f}",
                trial.state,
                _words(trial),
                style=STYLE[trial.state],
            )
        return table

    def _end(self, trial: Trial) -> None:
        self._keep(trial)
        self._since.pop(trial.number, None)
        self._say(trial, f"{trial.state}{': ' + trial.error if trial.error else ''}  after {trial.seconds:.0f} s")
        try:
            child = MlflowRun(self.record.tracking, str(trial.run_id))
            child.log_values({"cost/seconds": trial.seconds}, {"state": trial.state})
            if trial.state != "finished":  # a finished one has said so itself
                child.finish(STATUS.get(trial.state, "KILLED"))
        except Exception as error:  # a record that is away fails no trial
            self.console.print(f"trial {trial.number}  its end is not in the record: {type(error).__name__}")

    def _keep(self, trial: Trial) -> None:
        self._count(trial)
        trials.write(self.folder, trial)

    def _count(self, trial: Trial) -> None:
        now = time.monotonic()
        if trial.number in self._since:
            trial.seconds += now - self._since[trial.number]
            self._since[trial.number] = now

    def _say(self, trial: Trial, news: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"trial {trial.number}  {news}", markup=False)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it; nothing of that is read again


def _words(trial: Trial) -> str:
    """A point in few words: "pool_stride 4  v2v 0.000123"; the whole path where its end says too little."""
    ends = [path.rpartition(".")[2] for path in trial.point]
    return "  ".join(
        f"{end if ends.count(end) == 1 else path} {value:.3g}" if isinstance(value, float) else f"{end} {value}"
        for end, (path, value) in zip(ends, trial.point.items(), strict=True)
    )
