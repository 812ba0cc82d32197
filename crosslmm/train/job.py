"""Everything that a run's workers must agree upon. Light: processes that need no model hold it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from crosslmm.config import RunConfig
from crosslmm.data.features import Recipe
from crosslmm.data.order import Order
from crosslmm.data.pipeline import Layout, block_rows

TRAIN, VALIDATION = "train", "validation"
"""The datasets of a run, by Ray Train's names for them."""


@dataclass(frozen=True)
class Job:
    """A run, with everything decided that its workers must agree upon. Travels to all of them."""

    config: RunConfig
    folder: str
    """The run's own folder in storage."""
    total_steps: int
    order: Order
    rows: ray.ObjectRef
    lengths: np.ndarray | None
    """About how many tokens each row is, where micro-batches are counted in tokens."""
    validation_size: int
    """Rows of the held-out manifest."""
    validation_rows: ray.ObjectRef | None
    image_size: int
    features: ray.ObjectRef | None
    """`Features` that are read instead of videos."""
    recipe: Recipe | None
    """How they were made."""
    board: Any
    """Actor handle of the `Board`."""

    def training(self, first_step: int, workers: int) -> Layout:
        """What is left of the run after `first_step` steps, for so many workers."""
        steps = self.total_steps - first_step
        rows = block_rows(self.config.data, self.image_size, self.recipe)
        return Layout(self.order, workers, first_step, steps, rows, self.lengths)

    @property
    def collectives_s(self) -> int:
        """How long ranks wait for one another: longer than the watchdog, which knows more about what hangs [s]."""
        return int(2 * max(self.config.watchdog.model_dump().values()))

    def validation(self, workers: int) -> Layout:
        """Validation's "steps" are rounds in which every worker takes one micro-batch."""
        rows = self.config.train.micro_batch_size
        order = Order((self.validation_size,), rows * workers, None)
        return Layout(order, workers, 0, order.steps_per_epoch, rows)
