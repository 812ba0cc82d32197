"""Intervals: their coverage, their limits, and what clusters and strata do to them."""

import numpy as np
import pytest

from crosslmm.evaluate.scores import intervals
from crosslmm.evaluate.scores.intervals import accuracy, difference


@pytest.mark.parametrize(
    ("clusters", "per_cluster", "share"), [(40, 3, 0.6), (100, 1, 0.9), (25, 8, 0.5), (200, 3, 0.97)]
)
def test_interval_covers_the_truth_19_times_in_20(clusters, per_cluster, share):
    rng = np.random.default_rng(0)
    names = np.repeat(np.arange(clusters), per_cluster).astype(str)
    covered = 0
    for _ in range(1000):
        # Questions about a video are right together: each video has a difficulty of its own.
        difficulty = np.repeat(rng.beta(3 * share, 3 * (1 - share), clusters), per_cluster)
        estimate = accuracy(rng.random(len(names)) < difficulty, names)
        covered += estimate.low <= share <= estimate.high
    assert 0.93 <= covered / 1000 <= 0.985


def test_interval_that_ignores_clusters_would_be_too_narrow():
    right = np.repeat(np.arange(30) % 2 == 0, 10)
    clustered = accuracy(right, np.repeat(np.arange(30), 10).astype(str))
    alone = accuracy(right, np.arange(300).astype(str))
    assert clustered.high - clustered.low > 2.5 * (alone.high - alone.low)


def test_all_right_is_not_certain():
    estimate = accuracy([True] * 30, [str(i // 3) for i in range(30)])
    assert [estimate.value, estimate.high] == pytest.approx([1.0, 1.0])
    # Ten videos, as if each were one question.
    assert 0.6 < estimate.low < 0.75
    assert accuracy([False] * 30, [str(i // 3) for i in range(30)]).high == pytest.approx(1 - estimate.low)


@pytest.mark.parametrize("count", [3, 40, 160])
def test_no_accuracy_is_above_one(count):
    assert accuracy([True] * count, [str(i) for i in range(count)]).value == 1.0


def test_a_single_video_says_nothing():
    estimate = accuracy([True, False, True], ["a", "a", "a"])
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_strata_have_equal_weights():
    right, strata = [True] * 10 + [False] * 2, ["easy"] * 10 + ["hard"] * 2
    assert accuracy(right, list(map(str, range(12))), strata).value == pytest.approx(0.5)


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(1)
    first = rng.random(400) < 0.6
    second = np.where(rng.random(400) < 0.95, first, ~first)
    names = [str(i // 2) for i in range(400)]
    paired = difference(first, second, names)
    assert paired.low <= paired.value <= paired.high
    assert paired.value == pytest.approx(first.mean() - second.mean())
    assert paired.high - paired.low < 0.6 * (accuracy(first, names).high - accuracy(first, names).low)


def test_difference_of_equal_answers_is_zero():
    estimate = difference([True, False] * 5, [True, False] * 5, list(map(str, range(10))))
    assert (estimate.value, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("clusters", "quantile"),
    [(2, 12.7062), (3, 4.3027), (4, 3.1824), (6, 2.5706), (11, 2.2281), (31, 2.0423), (1001, 1.9623)],
)
def test_quantile_is_students(clusters, quantile):
    assert intervals._quantile(clusters) == pytest.approx(quantile, rel=2e-3)
