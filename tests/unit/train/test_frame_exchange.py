import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslmm.train.distributed.frame_exchange import FrameExchange, even_loads, plan_transfers

PASSES = st.lists(st.integers(0, 512), min_size=1, max_size=16)


@given(PASSES)
def test_loads_are_even_and_hold_every_frame(frames):
    loads = even_loads(frames)
    assert sum(loads) == sum(frames)
    assert max(loads) - min(loads) <= 1


@given(PASSES)
def test_the_plan_makes_loads_even_with_the_fewest_moves(frames):
    held = list(frames)
    transfers = plan_transfers(frames)
    for source, target, moved in transfers:
        assert moved > 0
        held[source] -= moved
        held[target] += moved
    assert held == even_loads(frames)
    assert len(transfers) < len(frames)
    # Whatever the plan, what a rank has above the larger of the two loads must leave it, and what it lacks must come.
    mean, left = divmod(sum(frames), len(frames))
    above = sum(max(have - mean - bool(left), 0) for have in frames)
    below = sum(max(mean - have, 0) for have in frames)
    assert sum(moved for *_, moved in transfers) == max(above, below)


@given(st.integers(0, 512), st.integers(1, 16))
def test_nothing_moves_where_frames_are_equal(frames, ranks):
    assert plan_transfers([frames] * ranks) == []
    assert FrameExchange.of_pass([frames] * ranks, 0) is None


@given(PASSES)
def test_every_frame_is_encoded_once_and_comes_back_to_its_place(frames):
    """Carry out the exchanges of all ranks on lists, by the rule of all-to-all."""
    exchanges = [FrameExchange.of_pass(frames, rank) for rank in range(len(frames))]
    if None in exchanges:
        assert exchanges == [None] * len(frames)
        return
    own = [[(rank, i) for i in range(count)] for rank, count in enumerate(frames)]
    dealt = all_to_all(own, exchanges, "sent", "received")
    assert [len(rows) for rows in dealt] == even_loads(frames)
    assert sorted(row for rows in dealt for row in rows) == sorted(row for rows in own for row in rows)
    assert all_to_all(dealt, exchanges, "received", "sent") == own


def all_to_all(rows, exchanges, sent, received):
    """Return the rows of each rank after the first `kept` have stayed and the others have gone to the ranks in turn."""
    parcels = {}
    for source, (of_rank, exchange) in enumerate(zip(rows, exchanges, strict=True)):
        start = exchange.kept
        for target, count in enumerate(getattr(exchange, sent)):
            parcels[source, target] = of_rank[start : start + count]
            start += count
        assert start == len(of_rank)
    after = []
    for target, (of_rank, exchange) in enumerate(zip(rows, exchanges, strict=True)):
        came = [parcels[source, target] for source in range(len(rows))]
        assert [len(parcel) for parcel in came] == getattr(exchange, received)
        after.append(of_rank[: exchange.kept] + [row for parcel in came for row in parcel])
    return after


@pytest.mark.parametrize(
    ("frames", "loads"), [([512, 8, 8], [176, 176, 176]), ([1, 4], [2, 3]), ([4, 1], [3, 2]), ([0, 1, 0], [0, 1, 0])]
)
def test_ranks_with_more_frames_encode_the_frames_that_do_not_divide(frames, loads):
    assert even_loads(frames) == loads
