"""What the driver does while the workers train: show their progress, write the record, name what was unreadable."""

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crosslmm import storage, tracking
from crosslmm.run_folder import LEDGER
from crosslmm.train.job import Job

PLAIN_LINE_EVERY_S = 10.0
SETTLE_S = 10.0
"""How long who waits for a validation waits for the record of it [s]."""


class TrainingMonitor:
    """Reads the board while the workers train: draws the progress, writes the record, names what was unreadable.

    A person at a terminal sees one live line; a log file gets a plain line every ten seconds.
    """

    def __init__(
        self,
        job: Job,
        record: tracking.BackgroundSync,
        console: Console,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.job = job
        self.record = record
        self.console = console
        self.report = report
        self.last_metrics: dict[str, float] = {}
        self.train_s = 0.0
        self.stopped = False
        """Whether who was reported to has stopped the run."""
        self._began: float | None = None
        self._last_line = 0.0
        self._ledger_uri = storage.join(job.folder, LEDGER)
        self._ledger_is_old = False
        # A resumed run goes on with its ledger.
        written = storage.read_bytes(self._ledger_uri) if storage.exists(self._ledger_uri) else b""
        entries = [json.loads(line) for line in written.splitlines()]
        self._unreadable: dict[tuple[str, str, int], dict[str, Any]] = {_key(e): e for e in entries}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("starting workers", total=job.total_steps, news="")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        """Begin to follow, in a thread."""
        self._progress.start()
        if not self.console.is_terminal:
            self.console.print("starting workers")
        self._thread.start()

    def stop(self) -> None:
        """Read what is left and end."""
        self._stop.set()
        self._thread.join()
        self._progress.stop()
        if self._unreadable:
            self.console.print(f"{len(self._unreadable)} rows could not be read: {LEDGER} in the record and the run")

    def say(self, line: str) -> None:
        """Print what the user should know."""
        self.console.print(line, markup=False)

    def _follow(self) -> None:
        while True:
            last_round = self._stop.wait(0.5)
            try:
                news = ray.get(self.job.events.drain.remote())
            except ray.exceptions.RayError as error:
                self.say(f"the workers' news cannot be read: {type(error).__name__}")
                news = []
            self._started([item for kind, item in news if kind == "started"])
            self._take_steps([item for kind, item in news if kind == "step"])
            self._take_unreadable([item for kind, item in news if kind == "unreadable"])
            for line in (item for kind, item in news if kind == "message"):
                self.say(line)
            if last_round:
                return

    def _started(self, items: list[tuple[int, int]]) -> None:
        for step, parameters in items:
            self._began = self._began or time.time()
            where = f"resumed after step {step}" if step else "training from the start"
            self.console.print(f"{where}, {parameters / 1e6:,.1f} M parameters")
            self._progress.update(self._task, completed=step, description="training")

    def _take_steps(self, steps: list[tuple[int, float, dict[str, float]]]) -> None:
        if not steps:
            return
        self.record.log(steps)
        for step, when, metrics in steps:
            self.last_metrics = metrics
            self.train_s = when - (self._began or when)
            if "validation/loss" in metrics:
                self.console.print(_validation_line(step, metrics))
                if self.report:
                    self.record.settle(SETTLE_S)
                    try:
                        self.report(step, metrics)
                    except SystemExit:  # Tune's word for a trial that it stops; only this thread hears it
                        self.stopped = True
                        raise
        step, _, metrics = steps[-1]
        news = (
            f"loss {metrics.get('loss', math.nan):.3f}  {metrics['samples_per_s']:.0f} samples/s  "
            f"{metrics['frames_per_s']:.0f} frames/s  data wait {metrics['data_wait_share']:.0%}"
        )
        self._progress.update(self._task, completed=step, news=news)
        if not self.console.is_terminal and time.time() - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = time.time()
            self.console.print(f"step {step}/{self.job.total_steps}  {news}")

    def _take_unreadable(self, items: list[dict[str, Any]]) -> None:
        known = len(self._unreadable)
        for item in items:
            if _key(item) not in self._unreadable:
                self._unreadable[_key(item)] = item
                line = f"left out: {item['manifest']} line {item['line']} ({item['id']}): {item['reason']}"
                self.console.print(line, markup=False)
        self._ledger_is_old |= len(self._unreadable) > known
        if self._ledger_is_old:
            try:
                storage.write_bytes(self._ledger_uri, self._ledger().encode())
                self._ledger_is_old = False
            except OSError as error:
                self.console.print(f"{LEDGER} waits to be written: {type(error).__name__}")

    def _ledger(self) -> str:
        return "".join(json.dumps(item) + "\n" for _, item in sorted(self._unreadable.items()))


def _key(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["split"], entry["manifest"], entry["line"]


def _validation_line(step: int, metrics: dict[str, float]) -> str:
    prefix = "validation/accuracy/"
    kinds = "  ".join(f"{k.removeprefix(prefix)} {v:.2f}" for k, v in metrics.items() if k.startswith(prefix))
    return (
        f"step {step}  validation loss {metrics['validation/loss']:.3f}  "
        f"accuracy {metrics['validation/accuracy']:.3f}  {kinds}"
    )
