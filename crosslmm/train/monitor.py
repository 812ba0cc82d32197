"""The driver's view of a running job: progress, log, MLflow record, and the ledger of unreadable rows."""

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import ray

from crosslmm import storage, tracking
from crosslmm.data.quarantine import read_quarantine
from crosslmm.lease import LeaseLost
from crosslmm.planning.budget import Meter
from crosslmm.progress import Progress
from crosslmm.run_folder import QUARANTINE_FILE, write_answers, write_pictures
from crosslmm.scoring import ACCURACY, COUNT, UNREADABLE
from crosslmm.train.gauges import RunGauges
from crosslmm.train.job import Job

log = logging.getLogger(__name__)

POLL_S = 0.5
"""Pause between two reads of the event channel [s]."""
MAX_KINDS = 20
"""Kinds of questions whose accuracy a log line names at most."""
MAX_SHORT_VIDEOS = 1000
"""Most videos with too few frames that the log names; further ones are only counted [videos]."""
DELIVERY_TIMEOUT_S = 10.0
"""How long a validation's report waits for its metrics to be in the MLflow record [s]."""

StepEvent = tuple[int, float, dict[str, float]]
"""Number of steps done, unix time [s], metrics."""


class TrainingMonitor:
    """Context manager whose thread reads the workers' events while they train, and handles them.

    It shows progress, passes on the workers' log, writes the MLflow record and the ledger of unreadable rows, and
    reports validations. An error in one of these is logged, and the thread goes on.

    Args:
        job: the job that the workers run.
        record: gets the metrics of the steps.
        report: takes the number of steps done and the metrics, after each validation; Tune's raises SystemExit to stop
            the trial, which ends the thread.
        meter: what the run takes, which is kept with each checkpoint.

    Attributes:
        last_metrics: metrics of the last step.
        train_s: from the first step's start to the last step's end [s].
        stopped: whether `report` stopped the run.
    """

    def __init__(
        self,
        job: Job,
        record: tracking.BackgroundSync,
        report: Callable[[int, dict[str, float]], None] | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.job, self.record, self.report, self.meter = job, record, report, meter
        self.last_metrics: dict[str, float] = {}
        self.train_s = 0.0
        self.stopped = False
        self._began: float | None = None
        self._ledger_uri = storage.join(job.folder, QUARANTINE_FILE)
        self._ledger_outdated = False
        # A resumed run extends its ledger.
        earlier = read_quarantine(job.folder)
        self._unreadable: dict[tuple[str, str, int], dict[str, Any]] = {_key(entry): entry for entry in earlier}
        self._short: set[str] = set()
        self._progress = Progress(log, "starting workers", job.total_steps, "step")
        self._gauges = RunGauges(str(job.config.name))
        self._gauges.set(total_steps=job.total_steps, unreadable=len(self._unreadable))
        self._channel_failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="monitor", daemon=True)

    def __enter__(self) -> Self:
        self._progress.__enter__()
        log.info("starting workers")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Handle the remaining events and end the thread."""
        self._stop.set()
        self._thread.join()
        self._progress.__exit__(kind, error, tb)
        if self._unreadable:
            log.warning(
                "%s rows could not be read; %s in the run's folder lists them", len(self._unreadable), QUARANTINE_FILE
            )
        if len(self._short) > MAX_SHORT_VIDEOS:
            text = "%s videos gave fewer frames than asked; the first %s are named above"
            log.warning(text, len(self._short), MAX_SHORT_VIDEOS)

    def _follow(self) -> None:
        """Handle events until the run ends; runs in the monitor's thread."""
        while True:
            last_round = self._stop.wait(POLL_S)
            try:
                self.job.fence.require_unless_recent()
                self.handle(self._drain())
                self._gauges.repeat()
            except (SystemExit, LeaseLost):
                return
            if last_round:
                return

    def _drain(self) -> list[tuple[str, Any]]:
        try:
            events: list[tuple[str, Any]] = ray.get(self.job.events.drain.remote())
            self._channel_failed = False
            return events
        except Exception as error:
            if not self._channel_failed:
                log.warning("the workers' events cannot be read: %s; trying again", type(error).__name__)
            self._channel_failed = True
            return []

    def handle(self, events: list[tuple[str, Any]]) -> None:
        """Handle events of the workers, each kind on its own: an error in one does not lose the others.

        Raises:
            SystemExit: `report` stopped the run.
        """
        handlers: dict[str, Callable[[list[Any]], None]] = {
            "started": self._handle_started,
            "log": self._handle_log,
            "unreadable": self._handle_unreadable,
            "short": self._handle_short,
            "sealed": self._handle_sealed,
            "answers": self._handle_answers,
            "step": self._handle_steps,
        }
        for kind, handler in handlers.items():
            try:
                handler([item for event, item in events if event == kind])
            except Exception:
                log.exception("events of kind '%s' could not be handled; the run goes on", kind)

    def _handle_started(self, items: list[tuple[int, int, int, int]]) -> None:
        for step, parameters, trained, workers in items:
            self._began = self._began or time.time()
            where = f"resumed after step {step}" if step else "training from the start"
            log.info("%s, %.1f M parameters", where, parameters / 1e6, extra={"step": step})
            self.record.tag(
                {"parameters": f"{parameters:,}", "parameters_trained": f"{trained:,}", "workers": str(workers)}
            )

    def _handle_log(self, items: list[tuple[int, str, int, int | None]]) -> None:
        for level, message, rank, step in items:
            log.log(level, "%s", message, extra={"rank": rank} | ({} if step is None else {"step": step}))

    def _handle_sealed(self, items: list[tuple[int, float]]) -> None:
        for step, when in items:
            log.debug("checkpoint sealed", extra={"step": step})
            self._gauges.set(sealed_at=when)
        if items and self.meter:
            self.record.save_worker_seconds(self.meter.worker_seconds)

    def _handle_answers(self, items: list[tuple[int, list[dict[str, Any]], dict[int, bytes]]]) -> None:
        for step, answers, _ in items:
            write_answers(self.job.folder, step, answers)
        for _, _, pictures in items:
            write_pictures(self.job.folder, pictures)
        if items:
            self.record.queue_answers()

    def _handle_steps(self, steps: list[StepEvent]) -> None:
        if not steps:
            return
        self.record.log(steps)
        step, when, metrics = steps[-1]
        self.last_metrics = metrics
        self._gauges.set(step=step, waiting=self.record.waiting, **metrics)
        self.train_s = when - (self._began or when)
        status = (
            f"loss {metrics.get('loss', math.nan):.3f}  {metrics['samples_per_s']:.0f} samples/s  "
            f"{metrics['frames_per_s']:.0f} frames/s  data wait {metrics['data_wait_share']:.0%}"
        )
        if "mfu" in metrics:
            status += f"  MFU {metrics['mfu']:.0%}"
        self._progress.update(step, status, "training")
        for step, _, metrics in steps:
            if "validation/loss" in metrics:
                self._log_validation(step, metrics)
                self._report(step, metrics)

    def _log_validation(self, step: int, metrics: dict[str, float]) -> None:
        log.info(_validation_line(step, metrics), extra={"step": step})
        if ACCURACY not in metrics:
            text = "the validation after step %s has no accuracy: none of its %s questions could be asked; %s says why"
            log.error(text, step, int(metrics[UNREADABLE]), QUARANTINE_FILE, extra={"step": step})

    def _report(self, step: int, metrics: dict[str, float]) -> None:
        """Report a validation once the record has it, or after `DELIVERY_TIMEOUT_S` without it."""
        if self.report is None:
            return
        try:
            self.record.wait_delivered(DELIVERY_TIMEOUT_S)
            self.report(step, metrics)
        except SystemExit:  # Tune stops a trial with it; only this thread gets it
            self.stopped = True
            raise
        except Exception:
            log.exception("the validation after step %s could not be reported; the run goes on", step)

    def _handle_unreadable(self, items: list[dict[str, Any]]) -> None:
        for item in items:
            if _key(item) not in self._unreadable:
                self._unreadable[_key(item)] = item
                self._ledger_outdated = True
                log.warning("left out: %s line %s (%s): %s", *(item[k] for k in ("manifest", "line", "id", "reason")))
        self._gauges.set(unreadable=len(self._unreadable))
        if self._ledger_outdated:
            lines = (json.dumps(item) + "\n" for _, item in sorted(self._unreadable.items()))
            try:
                storage.write_bytes(self._ledger_uri, "".join(lines).encode())
                self._ledger_outdated = False
            except OSError as error:
                log.warning("%s cannot be written now: %s; trying again later", QUARANTINE_FILE, type(error).__name__)

    def _handle_short(self, items: list[tuple[str, int, str, list[str]]]) -> None:
        """Log videos with fewer frames than asked, each once, with the first row that shows it."""
        for manifest, line, row, shortfalls in items:
            room = max(0, MAX_SHORT_VIDEOS - len(self._short))
            new = [shortfall for shortfall in shortfalls if shortfall not in self._short]
            self._short.update(new)
            if new[:room]:
                log.warning(
                    "fewer frames than asked, kept: %s line %s (%s): %s", manifest, line, row, "; ".join(new[:room])
                )


def _key(entry: dict[str, Any]) -> tuple[str, str, int]:
    return entry["split"], entry["manifest"], entry["line"]


def _validation_line(step: int, metrics: dict[str, float]) -> str:
    """Return loss, and accuracies with the number of questions that each is a share of."""
    kinds = [name.removeprefix(ACCURACY) for name in metrics if name.startswith(f"{ACCURACY}/")]
    parts = [f"{kind[1:]} {metrics[ACCURACY + kind]:.2f} ({metrics[COUNT + kind]:.0f})" for kind in kinds[:MAX_KINDS]]
    if ACCURACY in metrics:
        parts.insert(0, f"accuracy {metrics[ACCURACY]:.3f} ({metrics[COUNT]:.0f} questions)")
    if len(kinds) > MAX_KINDS:
        parts.append(f"and {len(kinds) - MAX_KINDS} more kinds")
    if metrics[UNREADABLE]:
        parts.append(f"unreadable {metrics[UNREADABLE]:.0f}")
    return "  ".join([f"step {step}  validation loss {metrics['validation/loss']:.3f}", *parts])
