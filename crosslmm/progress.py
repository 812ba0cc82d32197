"""What a person sees while a job runs: log lines, and one progress display for all jobs.

Modules log through `logging.getLogger(__name__)` and never print. Entry points call `set_up_logging` once; a program
that only imports the package keeps its own logging configuration.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rich
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from crosslmm.config import BadConfig
from crosslmm.text import one_printable_line, printable, redacted

PLAIN_INTERVAL_S = 10.0
"""Interval between log lines about progress where the output is not a terminal [s]."""
PLAIN_WIDTH = 120
"""Width of tables that are written to a file or a pipe [characters]."""
PLAIN_FORMAT = "%(asctime)s %(levelname)s run=%(run)s %(message)s"
"""Format of log lines that go to a file or a pipe; `rank` and `step` are further fields that a format can use."""

FILE_FORMAT = "%(asctime)s %(levelname)s rank=%(rank)s step=%(step)s %(message)s"
"""Format of log lines in a run's folder."""
NOISY = ("torchao", "torch.utils._pytree")
"""Loggers whose warnings are left out: Transformers imports torchao where it is installed, which then warns at each
start of kernels that the machine cannot load, and of a deprecated call of its own."""


class SafeFormatter(logging.Formatter):
    """Formats log records without credentials and control characters. Further lines are indented, so that no text from
    elsewhere looks like a record of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return printable(redacted(super().format(record))).replace("\n", "\n    ")


class _ConsoleHandler(logging.Handler):
    """Writes log records to rich's console, so that they appear above a live progress display."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            rich.get_console().print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:
            self.handleError(record)


class _RunFields(logging.Filter):
    """Gives each record the fields `run`, `rank` and `step`; "-" where the caller passed none in `extra`."""

    def __init__(self, run: str | None) -> None:
        super().__init__()
        self.run = run

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the missing fields."""
        for name, default in {"run": self.run or "-", "rank": "-", "step": "-"}.items():
            if not hasattr(record, name):
                setattr(record, name, default)
        return True


def set_up_logging(run: str | None = None) -> None:
    """Send the log of this package to the terminal, and tracebacks without credentials; for entry points only.

    A terminal gets the bare messages, a file or pipe gets `PLAIN_FORMAT`. CROSSLMM_LOG_LEVEL (default INFO) and
    CROSSLMM_LOG_FORMAT (a `logging` format) override both.

    Args:
        run: name of the run, for the field `run` of each record.

    Raises:
        BadConfig: CROSSLMM_LOG_LEVEL is not a level.
    """
    plain = not rich.get_console().is_terminal
    rich.reconfigure(highlight=False, soft_wrap=True, **({"width": PLAIN_WIDTH} if plain else {}))
    handler = _ConsoleHandler()
    handler.setFormatter(
        SafeFormatter(os.environ.get("CROSSLMM_LOG_FORMAT") or (PLAIN_FORMAT if plain else "%(message)s"))
    )
    handler.addFilter(_RunFields(run))
    sys.excepthook = _print_traceback
    threading.excepthook = _print_traceback_of_thread
    log = logging.getLogger("crosslmm")
    log.handlers = [handler]
    log.propagate = False
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        log.setLevel(os.environ.get("CROSSLMM_LOG_LEVEL", "INFO").upper())
    except ValueError as error:
        raise BadConfig(f"CROSSLMM_LOG_LEVEL: {error}; it takes DEBUG, INFO, WARNING or ERROR") from error


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Context manager: writes the log of this package to a local file, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(SafeFormatter(FILE_FORMAT))
    handler.addFilter(_RunFields(None))
    log = logging.getLogger("crosslmm")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(printable(redacted("".join(traceback.format_exception(kind, error, trace)))))


def _print_traceback_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        _print_traceback(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def cell(text: object) -> Text:
    """Return a text for a table, exactly as it is: without markup, control characters and credentials."""
    return Text(one_printable_line(redacted(str(text))))


class Progress:
    """Shows how far along a job is: a live bar at a terminal, otherwise a log line every `PLAIN_INTERVAL_S`.

    Args:
        log: logger of the calling module; a process that did not set up logging shows nothing.
        description: what is going on, such as "training"; first part of the live line.
        total: number of units of the whole job.
        unit: what is counted, such as "step"; first word of a plain line.
    """

    def __init__(self, log: logging.Logger, description: str, total: int, unit: str) -> None:
        self._log, self._total, self._unit = log, total, unit
        self._last_line = time.monotonic()
        self._bar = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), console=rich.get_console(), disable=not rich.get_console().is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task(description, total=total, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def update(self, completed: int, status: str = "", description: str | None = None) -> None:
        """Show the number of units done, and a few words about the last ones. Cheap enough to call for each unit."""
        changed: dict[str, Any] = {"description": description} if description else {}
        self._bar.update(self._task, completed=completed, status=status, **changed)
        if self._bar.disable and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self._log.info("%s %s/%s  %s", self._unit, completed, self._total, status, extra={self._unit: completed})
