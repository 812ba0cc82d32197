"""A job -> its datasets. Runs in Ray Train's processes, which need no model: nothing heavy is imported here."""

from typing import Any, Self

import ray
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from crosslmm.data.pipeline import build_dataset
from crosslmm.train.job import TRAIN, Job


def later() -> Any:
    """What Ray Train asks for before it knows its workers; see `Given`."""
    return None


class Given(DataConfig):
    """Makes the datasets when the workers ask for them: only now is it known how many they are and where they go on."""

    def __init__(self, job: Job) -> None:
        super().__init__(execution_options=ExecutionOptions(preserve_order=True))
        self.job = job

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # an actor's handle cannot be copied

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **_: Any,
    ) -> list[dict[str, DataIterator]]:
        """Runs in Ray Train's data manager, when rank 0 asks for its share."""
        made = {name: _dataset(self.job, name, world_size) for name in datasets}
        return super().configure(made, world_size, worker_handles, worker_node_ids)


def _dataset(job: Job, name: str, workers: int) -> Dataset:
    """What is left of the run, or the held-out samples."""
    scaling = job.config.scaling
    first_step = ray.get(job.board.begins.remote())
    training = name == TRAIN
    rows = job.rows if training else job.validation_rows
    assert rows is not None
    return build_dataset(
        job.training(first_step, workers) if training else job.validation(workers),
        rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
        scaling.decode_on,
    )
