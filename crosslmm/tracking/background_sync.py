"""Delivery of a running job's metrics to MLflow: a thread sends them, and no training step waits for it."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import HISTORY_FOLDER, StepRecord, read_run, write_run
from crosslmm.text import redacted
from crosslmm.tracking.client import RETRY_S, describe_failure, refuses
from crosslmm.tracking.sync import RunSync

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncTimeouts:
    """How long a run waits for its MLflow server."""

    start_s: float = 10.0
    """At the start of the run [s]."""
    end_s: float = 60.0
    """At the end of a run that finished [s]."""
    stopped_end_s: float = 5.0
    """At the end of a run that failed or was stopped, when somebody may be waiting [s]."""
    retry_s: float = RETRY_S
    """Pause between two attempts to reach the server [s]."""


DEFAULT_TIMEOUTS = SyncTimeouts()


class State(Enum):
    """Where the delivery stands."""

    CONNECTING = "the MLflow run is being found or created"
    LIVE = "steps are delivered as they come"
    OFFLINE = "the last attempt failed; steps wait"
    REGISTERING = "the run has ended and its model is being registered"
    DELIVERED = "the run has ended, and MLflow has all of it"
    GIVEN_UP = "nothing more is sent; jobs/track.py replay can deliver the rest"


TRANSITIONS = {
    State.CONNECTING: {State.LIVE, State.OFFLINE, State.GIVEN_UP},
    State.LIVE: {State.OFFLINE, State.REGISTERING, State.GIVEN_UP},
    State.OFFLINE: {State.LIVE, State.GIVEN_UP},
    State.REGISTERING: {State.DELIVERED, State.OFFLINE, State.GIVEN_UP},
    State.DELIVERED: set[State](),
    State.GIVEN_UP: set[State](),
}
"""States that may follow each state. The thread moves through them. The constructor stops waiting by moving to OFFLINE
or GIVEN_UP, `finish` by moving to GIVEN_UP."""
FINAL = (State.DELIVERED, State.GIVEN_UP)


class BackgroundSync:
    """Sends the metrics of a running training job to MLflow in a thread.

    While the server does not answer, steps wait; once it does, they are delivered in order.

    Args:
        folder: the run's folder, in which the run was begun.
        tracking: the MLflow server and experiment.
        timeouts: how long to wait for the server.
        require_owner: raises an error if the run has another owner, to whom the MLflow run then belongs.

    Attributes:
        uri: the MLflow server, without credentials.
        run_id: the MLflow run; None until it exists.
        model_uri: `models:/NAME@ALIAS`, once the model is registered.
        model_version: `models:/NAME/VERSION`, once the model is registered.

    Raises:
        BadConfig: the server refuses, or the URI cannot be that of a server.
    """

    def __init__(
        self,
        folder: str,
        tracking: TrackingConfig,
        timeouts: SyncTimeouts = DEFAULT_TIMEOUTS,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.tracking, self.timeouts, self.require_owner = folder, tracking, timeouts, require_owner
        self.uri = redacted(tracking_uri(tracking))
        self.run_id: str | None = None
        self.model_uri: str | None = None
        self.model_version: str | None = None
        self._changed = threading.Condition()
        """Guards `_state`, `_waiting`, `_tagged`, `_answers_sent` and `_error`, and wakes who waits for them."""
        self._state = State.CONNECTING
        self._waiting: list[StepRecord] = []
        self._tagged = self._answers_sent = True
        self._run = read_run(folder)  # run.json; its status is set once the run has ended
        self._error: BaseException | None = None
        self._registration_failed = False
        self._file = threading.Lock()
        """Held while run.json is written."""
        self._sync: RunSync | None = None
        self._system_metrics: SystemMetricsMonitor | None = None
        self._first_attempt = threading.Event()
        threading.Thread(target=self._follow, name=f"MLflow sync of {folder}", daemon=True).start()
        self._require_start()

    @property
    def delivered(self) -> bool:
        """Whether MLflow has all of an ended run."""
        return self._state is State.DELIVERED

    @property
    def waiting(self) -> int:
        """Number of steps that are not delivered yet."""
        return len(self._waiting)

    def log(self, steps: Iterable[StepRecord]) -> None:
        """Queue the metrics of steps; MLflow ignores steps that it already has."""
        with self._changed:
            self._waiting += steps
            self._changed.notify_all()

    def tag(self, tags: dict[str, str]) -> None:
        """Set tags of the run; those of a later start replace an earlier one's."""
        with self._changed:
            self._run["tags"] = {**self._run["tags"], **tags}
            self._tagged = False
            self._changed.notify_all()

    def queue_answers(self) -> None:
        """Send the sample answers in the run's folder, which has new ones."""
        with self._changed:
            self._answers_sent = False
            self._changed.notify_all()

    def save_worker_seconds(self, worker_seconds: float) -> None:
        """Write into run.json how long the workers have run so far [s]; the budget of the next start begins with it."""
        self._run["worker_seconds"] = worker_seconds
        with suppress(OSError):  # the next checkpoint tries again
            self._write_run()

    def wait_delivered(self, timeout_s: float) -> None:
        """Wait until all queued steps are delivered, for at most `timeout_s` [s]."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_s)

    def finish(self, status: str, lineage: dict[str, str] | None = None) -> None:
        """End the run and wait for the server until the timeout. The run's folder keeps the rest for a replay.

        Args:
            status: FINISHED, FAILED or KILLED.
            lineage: tags of the model to register; None for no model.
        """
        with self._changed:
            self._run |= {"status": status, "end_time": time.time(), "lineage": lineage}
            self._changed.notify_all()
        try:
            try:
                self._wait(self.timeouts.retry_s)
            finally:
                self._save_waiting_steps()
            self._wait(self.timeouts.end_s if status == "FINISHED" else self.timeouts.stopped_end_s)
        finally:
            # Not earlier: a replay of an ended run registers its model, which this process may have been doing.
            self._write_run()
            self._move(State.GIVEN_UP)  # unless delivered
            if not self.delivered:
                self.run_id = None
                names = f"--storage {storage.parent(self.folder)} --name {self._run['name']}"
                later = " and registers the model" if lineage else ""
                log.warning(
                    "MLflow: %s; python jobs/track.py replay %s delivers the rest%s", self._failure(), names, later
                )  # fmt: skip

    def abandon(self) -> None:
        """Send nothing more: the run has another owner, which keeps its record.

        MLflow's system monitor is left running, and may add a sample until the process ends: stopping it would make it
        write what it still holds.
        """
        self._move(State.GIVEN_UP)

    def _require_start(self) -> None:
        """Wait for the first attempt; raise BadConfig if the server refuses, and go on without it if it is silent."""
        is_file = self.uri.startswith("sqlite:")  # takes seconds to create; a failure is final
        self._first_attempt.wait(None if is_file else self.timeouts.start_s)
        with self._changed:
            error = self._error
            if error and (is_file or (isinstance(error, Exception) and refuses(error))):
                self._move(State.GIVEN_UP)
                raise BadConfig(f"tracking.uri: {self._failure()}") from error
            if self._state is State.CONNECTING:
                self._move(State.OFFLINE)
            if self._state is State.OFFLINE:
                log.warning(
                    "MLflow: %s; the run goes on, and what it has for MLflow waits in %s", self._failure(), self.folder
                )  # fmt: skip

    def _move(self, state: State) -> bool:
        """Enter a state if it may follow the current one; return whether it was entered."""
        with self._changed:
            allowed = state in TRANSITIONS[self._state]
            if allowed:
                self._state = state
                self._changed.notify_all()
            return allowed

    def _failure(self) -> str:
        error = self._error
        if error is not None and not isinstance(error, Exception):
            return f"delivery to {self.uri} stopped: {type(error).__name__}: {error}"
        return describe_failure(self.uri, error)

    def _wait(self, timeout_s: float) -> None:
        """Wait for a final state; the first attempt to register a model does not count towards the timeout [s]."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._state not in FINAL and time.monotonic() < deadline:
                self._changed.wait(min(self.timeouts.retry_s, max(0.0, deadline - time.monotonic())))
                if self._state is State.REGISTERING and not self._registration_failed:
                    deadline = time.monotonic() + timeout_s

    def _save_waiting_steps(self) -> None:
        """Write the waiting steps into the run's history."""
        with self._changed:
            steps = list(self._waiting)
        if steps:
            lines = (json.dumps({"step": step, "time": when, "metrics": values}) for step, when, values in steps)
            uri = storage.join(storage.join(self.folder, HISTORY_FOLDER), f"driver-{time.time_ns()}.jsonl")
            storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())

    def _write_run(self) -> None:
        with self._file:
            write_run(self.folder, self._run)

    # Below: the thread.

    def _follow(self) -> None:
        """Deliver until a final state. After an `Exception` try again; any other `BaseException` ends the delivery."""
        try:
            while self._state not in FINAL:
                try:
                    self._deliver()
                except Exception as error:
                    self._fail(error)
                    time.sleep(self.timeouts.retry_s)
                    continue
                self._first_attempt.set()
                with self._changed:
                    self._changed.wait_for(
                        lambda: (
                            self._state in FINAL
                            or self._waiting
                            or self._run["status"]
                            or not (self._tagged and self._answers_sent)
                        )
                    )
        except BaseException as error:
            with self._changed:
                self._error = error
                self._move(State.GIVEN_UP)
            log.exception("MLflow: the thread that delivers to %s stopped", self.uri)
        finally:
            self._first_attempt.set()

    def _deliver(self) -> None:
        """Send the waiting steps, and everything else once the run has ended."""
        self.require_owner()
        sync = self._sync or self._open()
        with self._changed:
            ended, steps = self._run["status"] is not None, list(self._waiting)
            tags, tagged, answers_sent = self._run["tags"], self._tagged, self._answers_sent
            self._answers_sent = True  # what comes from here on is sent next time
        if not tagged:
            sync.log_values({}, tags)
        if not answers_sent and not ended:
            sync.log_answers()
        # At the end, read the folder too: it has steps that did not reach this process.
        sync.log_history(steps) if ended else sync.log(steps)
        with self._changed:
            was_offline = self._state is State.OFFLINE
            self._error = None
            if self._move(State.LIVE) and was_offline:
                log.info("MLflow: %s answers; run %s has the steps that waited", self.uri, self.run_id)
            del self._waiting[: len(steps)]
            self._tagged |= self._run["tags"] is tags
            self._changed.notify_all()
        if ended:
            if self._system_metrics:
                self._system_metrics.finish()
            sync.end(self._run)
            if self._move(State.REGISTERING):  # unless `finish` has stopped waiting
                self.model_uri = sync.register_once(self._run)
                self.model_version = sync.registered_version()
                self._move(State.DELIVERED)

    def _open(self) -> RunSync:
        """Find or create the MLflow run, and send what earlier starts left in the folder."""
        sync = RunSync(self.folder, self._run, self.tracking)
        if self._run["run_id"] != sync.run_id:
            self._run["run_id"] = sync.run_id
            self._write_run()
        if self._run["status"] is None:
            sync.client.update_run(sync.run_id, status="RUNNING")
        with self._changed:
            steps = list(self._waiting)
        sync.log_history(steps)
        self.run_id, self._sync = sync.run_id, sync
        self._record_system_metrics()
        return sync

    def _fail(self, error: Exception) -> None:
        """Note a failed attempt."""
        with self._changed:
            self._error = error
            self._sync = None  # a replay may run meanwhile: look up again which steps MLflow has
            refused_at_end = self._run["status"] is not None and refuses(error)
            self._registration_failed |= self._state is State.REGISTERING
            was_connected = self._state in (State.LIVE, State.REGISTERING)
            self._move(State.GIVEN_UP if refused_at_end else State.OFFLINE)
            if was_connected:
                log.warning("MLflow: %s; steps wait", self._failure())
        self._first_attempt.set()

    def _record_system_metrics(self) -> None:
        """Start MLflow's monitor of CPU, memory and GPUs, if it can start; it stops itself when the server is down."""
        with suppress(Exception):
            if self._system_metrics:
                self._system_metrics.finish()
            uri = tracking_uri(self.tracking)
            self._system_metrics = SystemMetricsMonitor(str(self.run_id), resume_logging=True, tracking_uri=uri)
            self._system_metrics.start()
