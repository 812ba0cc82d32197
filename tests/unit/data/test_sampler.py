import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout, prefetch, rows_per_block
from crosslmm.data.sampler import PADDING, DeterministicSampler


def epoch(order, number):
    length = order.steps_per_epoch * order.global_batch_size
    return order.rows_at(np.arange(number * length, (number + 1) * length))


def per_rank(layout):
    """Return the positions of each rank's blocks, concatenated, up to the end of the last step."""
    return [
        np.concatenate([layout.positions(block) for block in range(rank, layout.num_blocks, layout.ranks)])[
            : layout.steps * layout.samples_per_rank
        ]
        for rank in range(layout.ranks)
    ]


@pytest.mark.parametrize(("rows", "batch"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_epoch_has_each_row_once_and_padding_of_weight_0(rows, batch):
    for number in range(3):
        index, weight = epoch(DeterministicSampler((rows,), batch, seed=1), number)
        assert len(index) % batch == 0
        assert sorted(index[weight == 1]) == list(range(rows))
        assert weight.sum() == rows
        assert set(index[weight != 1]) <= set(range(rows))


def test_order_depends_on_seed_and_epoch_only():
    rows = [epoch(DeterministicSampler((50,), 8, seed), number)[0].tolist() for seed in (0, 1) for number in (0, 1)]
    assert all(a != b for i, a in enumerate(rows) for b in rows[:i])
    sampler = DeterministicSampler((50,), 8, 0)
    scattered = np.array([[60, 3], [17, 99]])
    index, weight = sampler.rows_at(scattered)
    one_by_one = [sampler.rows_at(np.array([position])) for position in scattered.ravel()]
    assert index.ravel().tolist() == [int(row[0]) for row, _ in one_by_one]
    assert weight.ravel().tolist() == [float(w[0]) for _, w in one_by_one]


def test_validation_keeps_the_order_of_the_manifest():
    assert DeterministicSampler((5,), 2, seed=None).rows_at(np.arange(6))[0].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7, 13])
@pytest.mark.parametrize(("batch", "rows_in_block"), [(12, 3), (12, 5), (24, 128), (12, 1), (36, 7)])
@pytest.mark.parametrize(("first", "steps"), [(0, 5), (7, 4)])
def test_ranks_divide_each_step_for_any_block_size(ranks, batch, rows_in_block, first, steps):
    layout = BlockLayout(DeterministicSampler((50,), batch, 0), ranks, first, steps, rows_in_block)
    shares = [positions.reshape(steps, layout.samples_per_rank) for positions in per_rank(layout)]
    for number, step in enumerate(range(first, first + steps)):
        together = np.concatenate([share[number] for share in shares])
        assert sorted(together[together != PADDING]) == list(range(step * batch, (step + 1) * batch))
        assert all((share[number] == PADDING).sum() <= 1 for share in shares), "some ranks have one sample fewer"


def test_ranks_have_equally_many_blocks_even_without_steps():
    for steps in (0, 1, 5):
        layout = BlockLayout(DeterministicSampler((50,), 12, 0), ranks=3, first_step=2, steps=steps, rows_per_block=5)
        assert layout.num_blocks >= layout.ranks
        assert layout.num_blocks % layout.ranks == 0


def test_resume_with_other_ranks_skips_and_repeats_no_sample():
    order, consumed = DeterministicSampler((50,), 12, 0), []
    for ranks, first, steps in [(2, 0, 4), (5, 4, 2), (4, 6, 1), (1, 7, 3)]:
        consumed += per_rank(BlockLayout(order, ranks, first, steps, rows_per_block=5))
    positions = np.concatenate(consumed)
    assert sorted(positions[positions != PADDING]) == list(range(10 * 12))


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 60),
    per_rank_batch=st.integers(1, 4),
    legs=st.lists(st.tuples(st.integers(1, 13), st.integers(0, 9)), min_size=1, max_size=5),
    rows_in_block=st.integers(1, 40),
)
def test_any_sequence_of_resumes_sees_each_row_once_an_epoch(seed, rows, per_rank_batch, legs, rows_in_block):
    """Each epoch trains on each row once, however often a run is killed and with how many workers it resumes."""
    order = DeterministicSampler((rows,), 12 * per_rank_batch, seed)
    taken, step = [], 0
    for ranks, steps in legs:
        shares = per_rank(BlockLayout(order, ranks, step, steps, rows_in_block))
        assert len({len(share) for share in shares}) == 1, "every rank takes every step"
        taken += shares
        step += steps
    rest = per_rank(BlockLayout(order, 2, step, -step % order.steps_per_epoch, rows_in_block))
    positions = np.sort(np.concatenate([*taken, *rest]))
    positions = positions[positions != PADDING]
    assert positions.tolist() == list(range(len(positions)))
    index, weight = order.rows_at(positions)
    epochs = len(positions) // (order.steps_per_epoch * order.global_batch_size)
    assert np.bincount(index[weight == 1], minlength=rows).tolist() == [epochs] * rows
    assert weight.sum() == epochs * rows


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 100), position=st.integers(0, 2**40), attempt=st.integers(1, 8))
def test_substitute_depends_on_seed_position_and_attempt_only(seed, rows, position, attempt):
    row = DeterministicSampler((rows,), 4, seed).substitute(position, attempt)
    assert 0 <= row < rows
    assert row == DeterministicSampler((rows,), 8, seed).substitute(position, attempt)


def test_substitutes_are_drawn_from_all_rows():
    drawn = [DeterministicSampler((10,), 4, 0).substitute(position, 1) for position in range(1000)]
    assert np.bincount(drawn, minlength=10).min() > 60
    assert drawn != [DeterministicSampler((10,), 4, 0).substitute(position, 2) for position in range(1000)]


def test_block_holds_16_mib_of_frames():
    assert rows_per_block(DataConfig(num_frames=4), 64) == 128
    assert rows_per_block(DataConfig(num_frames=8), 384) == 4
    assert rows_per_block(DataConfig(num_frames=512), 384) == 1


def test_prefetch_keeps_the_order():
    assert list(prefetch(range(20), lambda i: i * i)) == [i * i for i in range(20)]
    assert list(prefetch([], str)) == []


def test_prefetch_raises_an_error_of_make_at_its_position():
    results = prefetch([2, 1, 0, 1], lambda i: 2 / i)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_prefetch_raises_an_error_of_its_source_at_its_position():
    def items():
        yield 1
        raise OSError("the source failed")

    results = prefetch(items(), str)
    assert next(results) == "1"
    with pytest.raises(OSError, match="the source failed"):
        next(results)


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_prepares_exactly_depth_results(depth):
    made = []
    results = prefetch(range(100), lambda i: made.append((i, threading.current_thread().name)) or i, depth)
    for used in (1, 2):
        next(results)
        deadline = time.monotonic() + 5
        while len(made) < used + depth and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == used + depth
    results.close()
    assert len(made) <= 2 + 2 * depth
    assert {name for _, name in made} != {threading.current_thread().name}
    assert all(a + 1 == b for (a, _), (b, _) in pairwise(made))


SOURCES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 5)), min_size=1, max_size=4)


@given(seed=st.integers(0, 2**32), sources=SOURCES, batch=st.integers(1, 16), epochs=st.integers(1, 4))
def test_sources_alternate_by_shares_and_repeat_completely(seed, sources, batch, epochs):
    sizes, shares = (tuple(numbers) for numbers in zip(*sources, strict=True))
    order = DeterministicSampler(sizes, batch, seed, shares)
    taken = []
    for number in range(epochs):
        index, weight = epoch(order, number)
        assert weight.sum() == order.samples_per_epoch
        taken.append(index[weight == 1])
    taken = np.concatenate(taken)
    source = order.source_of(taken)
    complete = taken[: len(taken) // sum(shares) * sum(shares)]
    turns = order.source_of(complete).reshape(-1, sum(shares)) if len(sizes) > 1 else np.zeros((1, 1), int)
    if len(sizes) > 1:
        assert all(np.bincount(turn, minlength=len(sizes)).tolist() == list(shares) for turn in turns)
    for number, size in enumerate(sizes):
        rows = taken[source == number] - sum(sizes[:number])
        assert len(rows) >= size, "an epoch has each row at least once"
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size)), "each pass has every row once"


def test_equal_shares_alternate():
    order = DeterministicSampler((100, 10), 4, 0, (1, 1))
    index, _ = order.rows_at(np.arange(200))
    assert order.source_of(index).tolist() == [0, 1] * 100
    assert order.steps_per_epoch == 50


def test_substitute_comes_from_the_same_source():
    order = DeterministicSampler((20, 5, 9), 4, 0, (2, 1, 3))
    for position in range(100):
        (row,), _ = order.rows_at(np.array([position]))
        for attempt in (1, 2):
            other = order.substitute(position, attempt)
            assert order.source_of(np.array([row, other])).tolist() == [order.source_of(np.array([row]))[0]] * 2


LENGTHS = np.random.default_rng(0).integers(1, 600, 480).astype(np.float32)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows_in_block", [3, 128])
def test_dealing_by_length_balances_the_ranks(ranks, rows_in_block):
    order = DeterministicSampler((480,), 48, 0)
    layout = BlockLayout(order, ranks, 1, 3, rows_in_block, LENGTHS)
    shares = [positions.reshape(3, layout.samples_per_rank) for positions in per_rank(layout)]
    for number, step in enumerate(range(1, 4)):
        together = np.stack([share[number] for share in shares])
        assert sorted(together[together != PADDING]) == list(range(step * 48, (step + 1) * 48))
        rows, weights = order.rows_at(np.maximum(together, 0))
        weights *= together != PADDING
        loads = (LENGTHS[rows] * weights).sum(axis=1)
        assert loads.max() <= loads.min() * 1.1
        assert len({int(n) for n in weights.sum(axis=1)}) <= 2


def test_small_source_does_not_shuffle_a_large_one_again(monkeypatch):
    order, shuffled = DeterministicSampler((50_000, 3), 8, 7, (1, 1)), []
    make = np.random.default_rng

    def counting(seed):
        shuffled.append(tuple(seed))
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", counting)
    for block in range(20):
        order.rows_at(np.arange(block * 128, (block + 1) * 128))
    assert shuffled.count((7, 0, 0)) == 1
