"""Everything that a run's workers must agree upon. Light: processes that need no model hold it."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import ray
from ray.data import DataIterator, Dataset, ExecutionOptions
from ray.train import DataConfig

from crosslmm.config import RunConfig
from crosslmm.data.dataset import BlockLayout, build_dataset, rows_per_block
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.sampler import DeterministicSampler

TRAIN, VALIDATION = "train", "validation"
"""The datasets of a run, by Ray Train's names for them."""


@dataclass(frozen=True)
class Job:
    """A run, with everything decided that its workers must agree upon. Travels to all of them."""

    config: RunConfig
    folder: str
    """The run's own folder in storage."""
    total_steps: int
    order: DeterministicSampler
    rows: ray.ObjectRef
    lengths: np.ndarray | None
    """About how many tokens each row is, where micro-batches are counted in tokens."""
    validation_size: int
    """Rows of the held-out manifest."""
    validation_rows: ray.ObjectRef | None
    image_size: int
    features: ray.ObjectRef | None
    """`Features` that are read instead of videos."""
    recipe: FeatureRecipe | None
    """How they were made."""
    events: Any
    """Actor handle of the `EventChannel`."""

    def training(self, first_step: int, workers: int) -> BlockLayout:
        """What is left of the run after `first_step` steps, for so many workers."""
        steps = self.total_steps - first_step
        rows = rows_per_block(self.config.data, self.image_size, self.recipe)
        return BlockLayout(self.order, workers, first_step, steps, rows, self.lengths)

    @property
    def collectives_s(self) -> int:
        """How long ranks wait for one another: longer than the watchdog, which knows more about what hangs [s]."""
        return int(2 * max(self.config.watchdog.model_dump().values()))

    def validation(self, workers: int) -> BlockLayout:
        """Validation's "steps" are rounds in which every worker takes one micro-batch."""
        rows = self.config.train.micro_batch_size
        order = DeterministicSampler((self.validation_size,), rows * workers, None)
        return BlockLayout(order, workers, 0, order.steps_per_epoch, rows)


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
    first_step = ray.get(job.events.get_first_step.remote())
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
