"""Where a run's workers and its driver leave word for one another."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class EventChannel:
    """Where workers pin their news and the driver reads them, and the other way round. Posting costs a worker next to
    nothing. It lives on the driver's node, and as long as the driver. News that are lost with its process, were that
    killed, are in the run's folder with the next checkpoint."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Any]] = []
        self.first_step = 0
        self.stopping = False

    def post(self, kind: str, item: Any) -> None:
        """Pin one piece of news."""
        self.news.append((kind, item))

    def drain(self) -> list[tuple[str, Any]]:
        """All news since the last call, in order."""
        news, self.news = self.news, []
        return news

    def set_first_step(self, step: int) -> None:
        """The workers go on after this step: what they are given has to begin there."""
        self.first_step = step

    def get_first_step(self) -> int:
        """What `begin` was told last."""
        return self.first_step

    def request_stop(self) -> None:
        """The driver was told to end the run."""
        self.stopping = True

    def stop_requested(self) -> bool:
        """Whether it was."""
        return self.stopping


def open_channel() -> Any:
    """A board on this node, which is the driver's: a worker's node may go at any time."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return EventChannel.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
