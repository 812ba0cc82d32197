"""Run a function over many arguments as Ray tasks, a bounded number at a time."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from crosslmm.ray_runtime import start_ray
from crosslmm.text import in_brief

log = logging.getLogger(__name__)

MAX_RETRIES = 3
"""How often Ray retries a task whose worker process died."""


class IngestError(Exception):
    """The preparation stopped, or rows are malformed; the message is one line. The same command resumes.

    Attributes:
        details: lines of text that say more, a table of all malformed rows for instance; may be empty.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def run_tasks(
    function: Callable[..., Any], calls: dict[int, tuple[Any, ...]], memory_gib: float = 0.0
) -> Iterator[tuple[int, Any]]:
    """Call a function with each of these arguments, in tasks of one CPU; yield (key, result) as they finish.

    Two tasks per CPU are submitted at any time: no CPU waits for the driver, and an autoscaler sees pending work.

    Args:
        function: module-level function.
        calls: arguments by key.
        memory_gib: memory that a task reserves, so that those of a node fit it together [GiB].

    Raises:
        IngestError: Ray could not run a task, for instance because its worker died `MAX_RETRIES` + 1 times.
        Exception: whatever a task raises.
    """
    if not calls:
        return
    start_ray()
    memory = int(memory_gib * 2**30)
    largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
    if memory > largest:
        log.warning(
            "data.decode_memory_gib: the processes of a task reserve %g GiB together, and no node has more than %.1f "
            "GiB; waiting for a larger node; to begin now, stop and lower it", memory_gib, largest / 2**30,
        )  # fmt: skip
    remote = ray.remote(num_cpus=1, memory=memory, max_retries=MAX_RETRIES)(function)
    pending = deque(calls.items())
    running: dict[Any, int] = {}
    try:
        while pending or running:
            while pending and len(running) < 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
                key, arguments = pending.popleft()
                running[remote.remote(*arguments)] = key
            finished, _ = ray.wait(list(running), timeout=0.5)
            for task in finished:
                key = running.pop(task)
                try:
                    result = ray.get(task)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    reason = f"{type(error).__name__}: {in_brief(error)}"
                    raise IngestError(f"Ray could not run the task of chunk {key}: {reason}") from error
                yield key, result
    finally:
        for task in running:
            ray.cancel(task, force=True)
