"""The record of a run that goes on: a thread delivers, and no step waits for it."""

import json
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import HISTORY_FOLDER, StepRecord, read_run, write_run
from crosslmm.text import redacted
from crosslmm.tracking.client import RETRY_S, refuses, why
from crosslmm.tracking.sync import RunSync

START_S = 10.0
"""How long the start of a run waits for the server [s]."""
END_S, BROKEN_OFF_S = 60.0, 5.0
"""How long the end of a run waits for it: of one that finished, and of one that somebody may be waiting to stop [s]."""


class BackgroundSync:
    """The record of a training run that goes on. What is logged is delivered by a thread, and nobody waits for it.

    While the server is away steps wait; when it comes back, they are delivered in order.

    Args:
        folder: of the run, which has begun.
        tracking: where the record is.
        say: prints a line.

    Attributes:
        uri: of MLflow.
        run_id: the MLflow run; None until there is one.
        delivered: whether MLflow has all of an ended run.
        model_uri: `models:/NAME@ALIAS`, once the model is registered.

    Raises:
        BadConfig: the server refuses, or there can be none at that URI.
    """

    def __init__(self, folder: str, tracking: TrackingConfig, say: Callable[[str], None]) -> None:
        self.folder, self.tracking, self.say = folder, tracking, say
        self.uri = redacted(tracking_uri(tracking))
        self.run_id: str | None = None
        self.delivered = False
        self.model_uri: str | None = None
        self._begun = read_run(folder)
        self._waiting: list[StepRecord] = []
        self._ended = self._away = self._given_up = self._registering = False
        self._changed = threading.Condition()
        """Of all of these."""
        self._file = threading.Lock()
        """run.json is written by one at a time."""
        self._copy: RunSync | None = None
        self._system: SystemMetricsMonitor | None = None
        self._error: Exception | None = None
        self._tried = threading.Event()
        threading.Thread(target=self._deliver, daemon=True).start()
        # A file takes seconds to be made, and is never away.
        is_file = self.uri.startswith("sqlite:")
        self._tried.wait(None if is_file else START_S)
        if self._error and (is_file or refuses(self._error)):
            self._given_up = True
            raise BadConfig(f"tracking.uri: {why(self.uri, self._error)}") from self._error
        if self.run_id is None:
            self._away = True
            say(f"record: {why(self.uri, self._error)}; the run goes on, and its record waits in {folder}")

    def log(self, steps: Iterable[StepRecord]) -> None:
        """Have the metrics of steps written. Steps that are there already are passed over."""
        with self._changed:
            self._waiting += steps
            self._changed.notify_all()

    def settle(self, seconds: float) -> None:
        """Wait until all that was logged is written, but no longer than this [s]."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)

    def finish(self, status: str, lineage: dict[str, str] | None = None) -> None:
        """End the run, and wait for the server, but not for ever: what it misses then lies in the run's folder.

        Args:
            status: FINISHED, FAILED or KILLED.
            lineage: tags of the model that is to be registered; None for no model.
        """
        with self._changed:
            self._begun |= {"status": status, "end_time": time.time(), "lineage": lineage}
            self._ended = True
            self._changed.notify_all()
        try:
            try:
                self._wait(RETRY_S)
            finally:
                self._keep()
            self._wait(END_S if status == "FINISHED" else BROKEN_OFF_S)
        finally:
            # Not before: whoever replays a run that has ended registers its model, as we may have been doing.
            self._write_begun()
            self._given_up = True
            if not self.delivered:
                self.run_id = None
                storage_and_name = f"--storage {storage.parent(self.folder)} --name {self._begun['name']}"
                reason = why(self.uri, self._error)
                later = " and registers the model" if lineage else ""
                self.say(f"record: {reason}; python jobs/track.py replay {storage_and_name} delivers it{later}")

    def _wait(self, seconds: float) -> None:
        """Until all is delivered, but no longer than this while nothing is being registered."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (self.delivered or self._given_up) and time.monotonic() < deadline:
                self._changed.wait(min(RETRY_S, max(0.0, deadline - time.monotonic())))
                if self._registering:
                    deadline = time.monotonic() + seconds

    def _keep(self) -> None:
        """Write the steps that wait into the folder."""
        with self._changed:
            steps = list(self._waiting)
        if steps:
            lines = (json.dumps({"step": step, "time": when, "metrics": values}) for step, when, values in steps)
            uri = storage.join(storage.join(self.folder, HISTORY_FOLDER), f"driver-{time.time_ns()}.jsonl")
            storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())

    def _write_begun(self) -> None:
        with self._file:
            write_run(self.folder, self._begun)

    def _deliver(self) -> None:
        """The thread."""
        while not (self.delivered or self._given_up):
            try:
                self._bring_up()
            except Exception as error:
                self._lost(error)
                time.sleep(RETRY_S)
                continue
            if self._away:
                self._away, self._error = False, None
                self.say(f"record: {self.uri} answers; run {self.run_id} has what waited")
            self._tried.set()
            with self._changed:
                self._changed.wait_for(lambda: self.delivered or self._waiting or self._ended)

    def _bring_up(self) -> None:
        copy = self._copy or self._open()
        with self._changed:
            ended, steps = self._ended, list(self._waiting)
        # At the end also what reached the folder and not this process.
        copy.log_history(steps) if ended else copy.log(steps)
        with self._changed:
            del self._waiting[: len(steps)]
            self._changed.notify_all()
        if ended:
            if self._system:
                self._system.finish()
            copy.end(self._begun)
            self._registering = True
            try:
                self.model_uri = copy.register_once(self._begun)
            finally:
                self._registering = False
            with self._changed:
                self.delivered = True
                self._changed.notify_all()

    def _open(self) -> RunSync:
        """Find or make the MLflow run, and bring it up to what earlier starts left in the folder."""
        copy = RunSync(self.folder, self._begun, self.tracking)
        if self._begun["run_id"] != copy.run_id:
            self._begun["run_id"] = copy.run_id
            self._write_begun()
        copy.client.update_run(copy.run_id, status="RUNNING")
        with self._changed:
            steps = list(self._waiting)
        copy.log_history(steps)
        self.run_id, self._copy = copy.run_id, copy
        self._watch_machine()
        return copy

    def _lost(self, error: Exception) -> None:
        if self.run_id and not self._away:
            self.say(f"record: {why(self.uri, error)}; steps wait")
            self._away = True
        self._copy = None  # somebody may replay meanwhile: how far MLflow came is asked anew
        with self._changed:
            self._error = error
            self._given_up |= self._ended and refuses(error)
            self._changed.notify_all()
        self._tried.set()

    def _watch_machine(self) -> None:
        """Begin to record what the machine does, if it can be. MLflow's monitor ends when the server is away."""
        with suppress(Exception):
            if self._system:
                self._system.finish()
            uri = tracking_uri(self.tracking)
            self._system = SystemMetricsMonitor(str(self.run_id), resume_logging=True, tracking_uri=uri)
            self._system.start()
