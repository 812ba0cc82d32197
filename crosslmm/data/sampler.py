"""(seed, epoch) -> the order of samples; the same whatever the number of workers."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DeterministicSampler:
    """Which row stands at each place of a run.

    Places are counted through the whole run: optimizer step t takes places [t*G, (t+1)*G), G the global batch size.
    The rows of a source are gone through in one shuffle after another, each with all of them. An epoch is filled up to
    a whole number of steps with rows that have no weight, so that no split ever drops or repeats a row. A run that
    stopped after t steps goes on at place t*G: what was consumed is one number.

    Attributes:
        sizes: rows of each source. Rows are numbered through all sources, one source behind the other.
        global_batch_size: G.
        seed: fixes the shuffles; None keeps the manifests' order (validation).
        shares: of every sum(shares) places in a row, so many belong to each source. An epoch ends when each source has
            been gone through at least once, so that the smaller ones come round again and again.
    """

    sizes: tuple[int, ...]
    global_batch_size: int
    seed: int | None
    shares: tuple[int, ...] = (1,)

    @property
    def samples_per_epoch(self) -> int:
        """Places of an epoch with weight."""
        source, _ = _pattern(self.shares)
        turns = max(-(-size // own) for size, own in zip(self.sizes, np.bincount(source).tolist(), strict=True))
        return turns * len(source)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def rows_at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows at the given places.

        Args:
            places: int64, any shape.

        Returns:
            (row, weight): int64 number of the row, and 0.0 where it only fills up an epoch, else 1.0.
        """
        epochs, positions = np.divmod(places, self.steps_per_epoch * self.global_batch_size)
        source, nth = self._turn(epochs, positions % self.samples_per_epoch)
        rows = np.empty_like(places)
        for number, size in enumerate(self.sizes):
            passes, index = np.divmod(nth, size)
            for which in np.unique(passes[source == number]):
                here = (source == number) & (passes == which)
                rows[here] = sum(self.sizes[:number]) + _shuffles(size, self.seed, number)(int(which))[index[here]]
        return rows, (positions < self.samples_per_epoch).astype(np.float32)

    def _turn(self, epochs: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whose turn it is at these positions of these epochs, and the how manieth of that source's (int64, from 0)."""
        pattern, before = _pattern(self.shares)
        turns, within = np.divmod(positions, len(pattern))
        source = pattern[within]
        turns += epochs * (self.samples_per_epoch // len(pattern))
        return source, turns * np.bincount(pattern)[source] + before[within]

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """The source that each row belongs to, int64."""
        return np.searchsorted(np.cumsum(self.sizes), rows, side="right")

    def substitute(self, place: int, attempt: int) -> int:
        """The row that stands in at a place whose own row, and all substitutes before this one, cannot be read.

        Drawn from the same source and fixed by (seed, place, attempt), so that every rank takes every step, and a
        resume sees the same rows.

        Args:
            place: of the run.
            attempt: from 1.
        """
        source = int(self.source_of(self.rows_at(np.array([place]))[0])[0])
        drawn = np.random.default_rng([self.seed or 0, place, attempt]).integers(self.sizes[source])
        return sum(self.sizes[:source]) + int(drawn)


@functools.cache
def _shuffles(size: int, seed: int | None, source: int) -> Callable[[int], np.ndarray]:
    """Number of a pass -> the rows of a source in its order, int64 (size,)."""

    @functools.lru_cache(maxsize=2)  # 8 bytes a row each; a pass's end needs two
    def shuffle(which: int) -> np.ndarray:
        return np.arange(size) if seed is None else np.random.default_rng([seed, which, source]).permutation(size)

    return shuffle


@functools.cache
def _pattern(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One turn of all sources, spread evenly: the source at each place, and how often it came before, int64 each."""
    least = [share // math.gcd(*shares) for share in shares]
    due = sorted(((nth + 0.5) / share, source, nth) for source, share in enumerate(least) for nth in range(share))
    return np.array([source for _, source, _ in due]), np.array([nth for _, _, nth in due])
