"""The order of samples: a pure function of seed and position, independent of the number of workers."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

PADDING = -1
"""Stands for a position where a rank has no sample, because their number does not divide the batch."""


@dataclass(frozen=True)
class DeterministicSampler:
    """Maps each position of a run to a row.

    Positions are counted over the whole run: optimizer step t takes positions [t*G, (t+1)*G) with global batch size G.
    Each source is read in passes over all its rows, each in a new permutation. An epoch is padded to a whole number
    of steps with rows of weight 0, so no split ever drops or repeats a row. A run that stopped after t steps resumes at
    position t*G: one number says which samples were consumed.

    Attributes:
        sizes: number of rows of each source. Rows are numbered consecutively over all sources, in this order.
        global_batch_size: G.
        seed: fixes the permutations; None keeps the manifests' order (validation).
        shares: how many of every sum(shares) consecutive positions belong to each source. An epoch ends when each
            source has been passed through at least once, so smaller sources repeat.
    """

    sizes: tuple[int, ...]
    global_batch_size: int
    seed: int | None
    shares: tuple[int, ...] = (1,)

    @property
    def samples_per_epoch(self) -> int:
        """Number of positions of an epoch with weight 1."""
        pattern, _ = _pattern(self.shares)
        turns = max(-(-size // share) for size, share in zip(self.sizes, np.bincount(pattern).tolist(), strict=True))
        return turns * len(pattern)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def rows_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows at some positions of the run.

        Args:
            positions: int64, any shape.

        Returns:
            (row, weight), both of the shape of `positions`: int64 row number, and float32 0.0 for padding, else 1.0.
        """
        epochs, in_epoch = np.divmod(positions, self.steps_per_epoch * self.global_batch_size)
        source, nth = self._source_and_count(epochs, in_epoch % self.samples_per_epoch)
        rows = np.empty_like(positions)
        for number, size in enumerate(self.sizes):
            passes, index = np.divmod(nth, size)
            for pass_number in np.unique(passes[source == number]):
                mask = (source == number) & (passes == pass_number)
                permutation = _permutations(size, self.seed, number)(int(pass_number))
                rows[mask] = sum(self.sizes[:number]) + permutation[index[mask]]
        return rows, (in_epoch < self.samples_per_epoch).astype(np.float32)

    def _source_and_count(self, epochs: np.ndarray, in_epoch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at positions `in_epoch` of `epochs`, and how many samples of it came before (int64)."""
        pattern, before = _pattern(self.shares)
        turns, within = np.divmod(in_epoch, len(pattern))
        source = pattern[within]
        turns += epochs * (self.samples_per_epoch // len(pattern))
        return source, turns * np.bincount(pattern)[source] + before[within]

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the source that each row belongs to, int64."""
        return np.searchsorted(np.cumsum(self.sizes), rows, side="right")

    def substitute(self, position: int, attempt: int) -> int:
        """Return the row that replaces an unreadable one, after `attempt` - 1 other substitutes were unreadable too.

        It is drawn from the same source and fixed by (seed, position, attempt): no rank misses a step, and a resumed
        run sees the same rows.

        Args:
            position: position of the run.
            attempt: from 1.
        """
        source = int(self.source_of(self.rows_at(np.array([position]))[0])[0])
        index = np.random.default_rng([self.seed or 0, position, attempt]).integers(self.sizes[source])
        return sum(self.sizes[:source]) + int(index)


@functools.cache
def _permutations(size: int, seed: int | None, source: int) -> Callable[[int], np.ndarray]:
    """Return a function that maps the number of a pass to the order of a source's rows in it, int64 (size,)."""

    # A permutation takes 8 bytes a row; two are in use only where one pass ends and the next begins.
    @functools.lru_cache(maxsize=2)
    def permutation(number: int) -> np.ndarray:
        return np.arange(size) if seed is None else np.random.default_rng([seed, number, source]).permutation(size)

    return permutation


@functools.cache
def _pattern(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Spread the sources evenly over the shortest sequence that has them in these shares.

    Returns:
        (source, before), int64: the source of each element, and how many elements before it have the same source.
    """
    reduced = [share // math.gcd(*shares) for share in shares]
    schedule = sorted(
        ((nth + 0.5) / share, source, nth) for source, share in enumerate(reduced) for nth in range(share)
    )
    return np.array([source for _, source, _ in schedule]), np.array([nth for _, _, nth in schedule])
