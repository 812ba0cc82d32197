"""Functions on Ray, a bounded number at a time, and the progress that people see."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crosslmm.ray_runtime import start_ray

RETRIES = 3
"""So often a task is tried again whose worker died."""
PLAIN_LINE_EVERY_S = 10.0


class NotPrepared(Exception):
    """It broke off, or rows are malformed; the message is one line. What was done is not done again."""


def on_ray(
    function: Callable[..., Any], calls: dict[int, tuple[Any, ...]], waited: Callable[[], None] = lambda: None
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of these arguments, in tasks of one CPU -> key and result, as they come.

    Two tasks for each CPU are under way, so that none stands still and an autoscaler sees what there is to do.

    Args:
        function: of a module.
        calls: arguments by key.
        waited: called every half second.

    Raises:
        NotPrepared: a task's worker died again and again.
        Exception: what a task raises.
    """
    if not calls:
        return
    start_ray()
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
    due = deque(calls.items())
    running: dict[Any, int] = {}
    try:
        while due or running:
            while due and len(running) < 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
                key, arguments = due.popleft()
                running[remote.remote(*arguments)] = key
            finished, _ = ray.wait(list(running), timeout=0.5)
            waited()
            for task in finished:
                key = running.pop(task)
                try:
                    result = ray.get(task)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    raise NotPrepared(f"a worker died {RETRIES + 1} times with piece {key}: {why}") from error
                yield key, result
    finally:
        for task in running:
            ray.cancel(task, force=True)


class IngestProgress:
    """A live line at a terminal; in a log file a plain line every ten seconds."""

    def __init__(self, console: Console, pieces: int) -> None:
        self.console, self.pieces, self.done = console, pieces, 0
        self.rows = self.rejected = self.quarantined = 0
        self._began = self._last = time.monotonic()
        self._bar = Progress(
            TextColumn("pieces"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=pieces, news="")

    def __enter__(self) -> "IngestProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def seen(self, rows: int, rejected: int, quarantined: int) -> None:
        """One more piece is done."""
        self.done += 1
        self.rows, self.rejected, self.quarantined = (
            self.rows + rows, self.rejected + rejected, self.quarantined + quarantined
        )  # fmt: skip
        self._bar.update(self._task, completed=self.done, news=self._news())

    def waited(self) -> None:
        """Time has passed."""
        if not self.console.is_terminal and time.monotonic() - self._last >= PLAIN_LINE_EVERY_S:
            self._last = time.monotonic()
            self.console.print(f"piece {self.done}/{self.pieces}  {self._news()}")

    def _news(self) -> str:
        return f"{self.rows:,} rows  {self.rejected:,} malformed  {self.quarantined:,} unreadable"
