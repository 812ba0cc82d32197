"""Job: all that a run's workers must agree on. Imports no model, since it is unpickled where no model is needed."""

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
from crosslmm.lease import Fence
from crosslmm.planning.utilisation import Utilisation

TRAIN, VALIDATION = "train", "validation"
"""Names under which Ray Train knows the datasets of a run."""


@dataclass(frozen=True)
class Job:
    """A run, with all that its workers must agree on already decided; a pickled copy goes to each of them."""

    config: RunConfig
    folder: str
    """The run's folder in storage."""
    total_steps: int
    """Optimizer steps of the run."""
    order: DeterministicSampler
    """Order of the training samples."""
    rows: ray.ObjectRef
    """`Rows` of the training manifests."""
    lengths: np.ndarray | None
    """Estimated tokens of each training row, float32 (rows,); None unless micro-batches are counted in tokens."""
    validation_size: int
    """Number of rows in the validation manifest; 0 without one."""
    validation_rows: ray.ObjectRef | None
    """`Rows` of the validation manifest."""
    image_size: int
    """Height and width of frames [pixels]."""
    features: ray.ObjectRef | None
    """`FeatureCache` that is read instead of videos; None to read videos."""
    recipe: FeatureRecipe | None
    """How the features were made."""
    events: Any
    """Actor handle of the `EventChannel`."""
    utilisation: Utilisation | None
    """Computes MFU and HFU from the speed; None on CPUs and unknown GPUs."""
    fence: Fence
    """Tells whether the driver still owns the run's folder; asked before a seal or the exported model is written."""

    def training_layout(self, first_step: int, workers: int) -> BlockLayout:
        """Return the blocks of the steps after the first `first_step`, for `workers` workers."""
        steps = self.total_steps - first_step
        rows = rows_per_block(self.config.data, self.image_size, self.recipe)
        return BlockLayout(self.order, workers, first_step, steps, rows, self.lengths)

    @property
    def collective_timeout_s(self) -> int:
        """Timeout of collectives [s]: longer than the watchdog's limits, so that the watchdog reports a hang first."""
        return int(2 * max(self.config.watchdog.model_dump().values()))

    def validation_layout(self, workers: int) -> BlockLayout:
        """Return the blocks of a validation, whose "steps" are rounds in which each worker takes one micro-batch."""
        rows = self.config.train.micro_batch_size
        order = DeterministicSampler((self.validation_size,), rows * workers, None)
        return BlockLayout(order, workers, 0, order.steps_per_epoch, rows)


def placeholder_dataset() -> Any:
    """Stand in for a dataset when the trainer is built; `DeferredDatasets` builds the real one."""
    return None


class DeferredDatasets(DataConfig):
    """Builds the datasets when the workers ask for them: only then are their number and their first step known."""

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
        """Build the datasets and split them over the workers; runs in Ray Train's data manager when rank 0 asks."""
        built = {name: _build(self.job, name, world_size) for name in datasets}
        return super().configure(built, world_size, worker_handles, worker_node_ids)


def _build(job: Job, name: str, workers: int) -> Dataset:
    """Build the dataset of the remaining training steps, or of a validation."""
    scaling = job.config.scaling
    first_step = ray.get(job.events.get_first_step.remote())
    training = name == TRAIN
    rows = job.rows if training else job.validation_rows
    assert rows is not None
    return build_dataset(
        job.training_layout(first_step, workers) if training else job.validation_layout(workers),
        rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
        scaling.decode_on,
    )
