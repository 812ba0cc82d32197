"""Accuracies with 95 % intervals, and differences of two models on the same questions. Questions about the same video
are not independent, so the intervals are clustered by video."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    low: float
    high: float
    count: int
    """Number of units that it is a mean of."""
    clusters: int
    """Number of videos that they are about."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def weights_of(strata: Sequence[str] | None, count: int) -> np.ndarray:
    """Return the weight of each unit in a mean, float64 (count,), which add up to 1.

    Args:
        strata: group of each unit; all groups get the same weight. None: all units do.
        count: number of units.
    """
    if strata is None:
        return np.full(count, 1 / count)
    sizes: dict[str, int] = defaultdict(int)
    for stratum in strata:
        sizes[stratum] += 1
    return np.array([1 / (len(sizes) * sizes[stratum]) for stratum in strata])


def accuracy(right: Sequence[bool], clusters: Sequence[str], strata: Sequence[str] | None = None) -> Estimate:
    """Return the accuracy with its interval.

    The variance is that of a mean over clusters (linearised, with G/(G-1) for G clusters). The interval is Wilson's.
    Its sample size is the number of independent questions that would give this variance, at most the number of units.
    Where all or none are right, nothing varies, and it is the number of clusters.

    Args:
        right: of each unit.
        clusters: video of each unit.
        strata: see `weights_of`.

    >>> print(accuracy([True, True, False, False], ["a", "b", "c", "d"]))
    0.500 [0.061, 0.939]
    """
    x = np.asarray(right, np.float64)
    weights = weights_of(strata, len(x))
    share = min(1.0, float(weights @ x))  # weights add up to 1 but for rounding
    variance, groups = _clustered_variance(weights * (x - _means(x, strata)), clusters)
    spread = share * (1 - share)
    effective = min(spread / variance, len(x)) if variance > 0 and spread > 0 else groups
    low, high = _wilson(share, effective, _quantile(groups))
    return Estimate(share, low, high, len(x), groups)


def difference(
    first: Sequence[bool], second: Sequence[bool], clusters: Sequence[str], strata: Sequence[str] | None = None
) -> Estimate:
    """Return the mean of `first - second`, paired by unit, with its interval."""
    x = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    weights = weights_of(strata, len(x))
    mean = float(weights @ x)
    variance, groups = _clustered_variance(weights * (x - _means(x, strata)), clusters)
    half = _quantile(groups) * math.sqrt(variance)
    return Estimate(mean, mean - half, mean + half, len(x), groups)


def _means(x: np.ndarray, strata: Sequence[str] | None) -> np.ndarray:
    """Return the mean of each unit's stratum, float64 (n,)."""
    if strata is None:
        return np.full(len(x), x.mean())
    _, numbers = np.unique(np.asarray(strata), return_inverse=True)
    return (np.bincount(numbers, x) / np.bincount(numbers))[numbers]


def _clustered_variance(influence: np.ndarray, clusters: Sequence[str]) -> tuple[float, int]:
    """Return the variance of the sum of influences that are independent between clusters only, and the number of
    clusters; without two clusters it is unknown, and infinite."""
    _, numbers = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(numbers, influence)
    groups = len(sums)
    return (float(groups / (groups - 1) * (sums**2).sum()) if groups > 1 else math.inf), groups


def _wilson(share: float, count: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` independent trials."""
    if count <= 0 or math.isinf(z):
        return 0.0, 1.0
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _quantile(clusters: int) -> float:
    """Return the 97.5 % quantile of Student's t with clusters - 1 degrees of freedom, by Hill's expansion around the
    normal distribution; infinite for a single cluster, of which nothing is known."""
    freedom = clusters - 1
    if freedom < 1:
        return math.inf
    if freedom <= 2:
        return (12.706204736432095, 4.302652729911275)[freedom - 1]
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
