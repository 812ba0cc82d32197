"""Messages between the workers of a run and its driver."""

import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class EventChannel:
    """Queue of events from the workers to the driver, with a few values that the driver or rank 0 sets for the others.

    Posting costs a worker next to nothing. The actor lives on the driver's node and ends with it. If its process is
    killed, queued events are lost; the steps among them reach the run's folder with the next checkpoint.

    Kinds of events: "started" (first step, numbers of all and of trained parameters, number of workers), "step"
    (number, unix time [s], metrics), "unreadable" (a quarantined row), "short" (manifest, line and id of a row whose
    videos gave fewer frames than asked, and why), "answers" (step and sample answers of a validation, and a JPEG of
    what each row shows, the first time), "log" (level, message, rank, step), "sealed" (step and unix time [s] of a
    finished checkpoint).
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.first_step = 0
        self.started = self.stopping = False

    def post(self, kind: str, item: Any) -> None:
        """Append an event."""
        self.started |= kind in ("started", "step")  # a restarted channel has not seen the start
        self.events.append((kind, item))

    def drain(self) -> list[tuple[str, Any]]:
        """Return all events since the last call, in order."""
        events, self.events = self.events, []
        return events

    def set_first_step(self, step: int) -> None:
        """Set the number of steps done when the workers started; their data begins after these steps."""
        self.first_step = step

    def get_first_step(self) -> int:
        """Return the number of steps done when the workers started."""
        return self.first_step

    def request_stop(self) -> bool:
        """Ask the workers to save a checkpoint and end; the driver calls it. Return whether any have begun to train."""
        self.stopping = True
        return self.started

    def stop_requested(self) -> bool:
        """Return whether the driver asked the workers to end."""
        return self.stopping


def open_channel() -> Any:
    """Start an `EventChannel` on this node, the driver's, since a worker's node may go away; return its handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventChannel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class EventLogHandler(logging.Handler):
    """Posts log records of a worker to the driver, whose monitor logs them."""

    def __init__(self, events: Any, rank: int) -> None:
        super().__init__()
        self.events, self.rank = events, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Post one record."""
        try:
            item = record.levelno, self.format(record), self.rank, getattr(record, "step", None)
            self.events.post.remote("log", item)
        except Exception:
            self.handleError(record)


def forward_logs(events: Any, rank: int) -> None:
    """Send this process's log of the package to the driver; for workers only.

    Args:
        events: actor handle of the `EventChannel`.
        rank: this worker's.
    """
    log = logging.getLogger("crosslmm")
    log.handlers = [EventLogHandler(events, rank)]
    log.propagate = False
    log.setLevel(logging.INFO)
