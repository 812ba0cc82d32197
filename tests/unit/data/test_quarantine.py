import json
import re

import numpy as np
import pytest

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout, ReadSamples, unpack_block
from crosslmm.data.quarantine import ErrorBudget, QuarantineEntry, TooManyUnreadable
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.video.decode_pool import Unreadable

ROWS, BAD = 40, {3, 7, 8, 21}


def rows():
    return [
        {"manifest": "m", "line": i + 1, "id": f"row {i}", "videos": [f"/videos/{i}.mp4"], "messages": [], "kind": None}
        for i in range(ROWS)
    ]


class Rows:
    """Stands where the manifests are."""

    roots = ("/videos",)

    def take(self, numbers):
        return [rows()[i] for i in numbers]


class Decodes:
    """Stands where the decoder is: says which video it is in the frames, and counts."""

    def __init__(self, bad):
        self.bad, self.asked = bad, []

    def __call__(self, uris):
        numbers = [int(re.search(r"\d+", uri)[0]) for uri in uris]
        self.asked += numbers
        return [
            Unreadable("no such file", "read") if n in self.bad else np.full((1, 2, 2, 3), n, np.uint8) for n in numbers
        ]


def reader(layout, bad):
    read = ReadSamples.__new__(ReadSamples)
    read.layout, read.rows, read.decoder, read.unreadable = layout, Rows(), Decodes(bad), {}
    return read


def read_all(order, ranks, first=0, steps=10, rows_in_block=4, bad=BAD):
    """place -> sample, of all blocks, and the reader."""
    layout = BlockLayout(order, ranks, first, steps, rows_in_block)
    read = reader(layout, bad)
    samples = {}
    for block in range(layout.num_blocks):
        found = list(unpack_block(read({"block": [block]})))
        assert [sample.position for sample in found] == layout.positions(block).tolist()
        samples |= {sample.position: sample for sample in found}
    return samples, read


def test_a_bad_row_s_place_is_taken_by_another_row_and_named():
    order = DeterministicSampler((ROWS,), 4, seed=0)
    samples, read = read_all(order, ranks=2)
    assert len(samples) == 40
    for place, sample in samples.items():
        (due,), _ = order.rows_at(np.array([place]))
        assert sample.error is None
        assert sample.videos[0][0, 0, 0, 0] == sample.line - 1
        assert sample.line - 1 not in BAD
        assert bool(sample.quarantined) == (due in BAD)
        if sample.quarantined:
            assert sample.quarantined[0]["line"] - 1 == due
            assert all(e["reason"] == "no such file" and e["uri"].startswith("/videos/") for e in sample.quarantined)
    assert len(read.decoder.asked) <= 40 + 2 * len(BAD), "what is known to be bad is not tried again"


def test_the_substitutes_are_the_same_whatever_the_workers_blocks_and_resumes():
    order = DeterministicSampler((ROWS,), 4, seed=5)
    whole, _ = read_all(order, ranks=1)
    for ranks, rows_in_block, first in [(2, 1, 0), (4, 7, 0), (2, 3, 4)]:
        again, _ = read_all(order, ranks, first, 10 - first, rows_in_block)
        shared = again.keys() & whole.keys()
        assert len(shared) >= (10 - first) * 4
        for place in shared:
            assert (again[place].line, again[place].quarantined) == (whole[place].line, whole[place].quarantined)


def test_where_nothing_can_be_read_the_place_stays_without_frames():
    samples, _ = read_all(DeterministicSampler((ROWS,), 4, seed=0), ranks=1, steps=2, bad=set(range(ROWS)))
    assert all(sample.error == "no such file" for sample in samples.values())
    assert all(len(sample.quarantined) == 9 for sample in samples.values())


def test_validation_leaves_a_bad_row_out_and_asks_no_other_twice():
    samples, read = read_all(DeterministicSampler((ROWS,), 4, seed=None), ranks=1)
    assert [place for place, sample in samples.items() if sample.error] == sorted(BAD)
    assert sorted(read.decoder.asked) == list(range(ROWS))


def test_a_store_out_of_reach_stops_the_reader_with_its_own_words():
    layout = BlockLayout(DeterministicSampler((ROWS,), 4, seed=0), ranks=1, first_step=0, steps=1, rows_per_block=4)
    read = reader(layout, BAD)

    def out_of_reach(uris):
        raise storage.Unavailable("s3://bucket/a.mp4: could not connect")

    read.decoder = out_of_reach
    with pytest.raises(storage.Unavailable, match=r"^s3://bucket/a.mp4: could not connect$"):
        list(unpack_block(read({"block": [0]})))


def test_a_line_of_the_ledger_is_harmless_and_complete():
    row = {"manifest": "m.jsonl\n", "line": 3, "id": "a\x1b[31m\n"}
    entry = QuarantineEntry.from_row(row, "s3://bucket/\u202e.mp4", Unreadable("empty", "check", "etag", 2)).to_dict()
    assert entry == {
        "manifest": r"m.jsonl\n",
        "line": 3,
        "id": r"a\x1b[31m\n",
        "uri": r"s3://bucket/\u202e.mp4",
        "version": "etag",
        "stage": "check",
        "reason": "empty",
        "attempts": 2,
    }
    assert json.dumps(entry).isprintable()


def test_the_run_stops_beyond_both_limits_and_says_why():
    empty, missing = (
        {"manifest": "a", "stage": "check", "reason": "empty"},
        {"manifest": "a", "stage": "read", "reason": "no such file"},
    )
    tally = ErrorBudget(max_share=0.1, allowed=3)
    tally.record(["a"] * 3, [empty, missing, missing])
    tally.record(["a"] * 97, [empty] * 7)
    says = r"a: 11 videos .* for 101 samples, .*: 9 x check: empty; 2 x read: no such file"
    with pytest.raises(TooManyUnreadable, match=says):
        tally.record(["a"], [empty])
    ErrorBudget(0.5, 0).record(["a"] * 10, [empty] * 5)
    with pytest.raises(TooManyUnreadable):
        ErrorBudget(DataConfig().max_bad_share, DataConfig().bad_allowed).record(["a"] * 30, [missing] * 21)


def test_each_source_is_held_to_the_limits_by_itself():
    bad = [{"manifest": "small", "stage": "check", "reason": "empty"}] * 4
    tally = ErrorBudget(max_share=0.1, allowed=3)
    tally.record(["small"] * 50 + ["large"] * 500, bad)
    with pytest.raises(TooManyUnreadable, match="small: 8 videos could not be read for 60 samples"):
        tally.record(["small"] * 10 + ["large"] * 500, bad)


def test_a_source_whose_name_is_foreign_text_is_held_to_its_own_share():
    name = "/data/vid\u00e9os/train.jsonl"
    row = {"manifest": name, "line": 1, "id": "a"}
    bad = [QuarantineEntry.from_row(row, "a.mp4", Unreadable("empty", "check")).to_dict()]
    tally = ErrorBudget(max_share=0.1, allowed=3)
    for _ in range(30):
        tally.record([name] * 100, bad)
