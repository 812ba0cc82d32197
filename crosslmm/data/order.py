"""(seed, epoch) -> the order of samples; the same whatever the number of workers."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Order:
    """Which row stands at each place of a run.

    Places are counted through the whole run: optimizer step t takes places [t*G, (t+1)*G), G the global batch size.
    Each epoch is a shuffle of its own, filled up to a whole number of steps with rows that have no weight, so that
    no split ever drops or repeats a row. A run that stopped after t steps goes on at place t*G: what was consumed is
    one number.

    Attributes:
        rows: rows of the manifest.
        global_batch_size: G.
        seed: fixes the shuffles; None keeps the manifest's order (validation).
    """

    rows: int
    global_batch_size: int
    seed: int | None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that take every row once."""
        return -(-self.rows // self.global_batch_size)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows at the given places.

        Args:
            places: int64, any shape.

        Returns:
            (row, weight): int64 index into the manifest, and 0.0 where the row only fills up an epoch, else 1.0.
        """
        per_epoch = self.steps_per_epoch * self.global_batch_size
        epochs, positions = np.divmod(places, per_epoch)
        rows = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._shuffle(int(epoch))[positions[here] % self.rows]
        return rows, (positions < self.rows).astype(np.float32)

    def substitute(self, place: int, attempt: int) -> int:
        """The row that stands in at a place whose own row, and all substitutes before this one, cannot be read.

        Drawn from the same manifest and fixed by (seed, place, attempt), so that every rank takes every step, and a
        resume sees the same rows.

        Args:
            place: of the run.
            attempt: from 1.
        """
        return int(np.random.default_rng([self.seed or 0, place, attempt]).integers(self.rows))

    def _shuffle(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows)
