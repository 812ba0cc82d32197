import json
import re
from dataclasses import replace

import numpy as np
import pytest

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout, ReadSamples, unpack_block
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.quarantine import ErrorBudget, QuarantineEntry, TooManyUnreadable
from crosslmm.data.sampler import PADDING, DeterministicSampler
from crosslmm.data.video.decode import VideoFailure

ROWS, BAD = 40, {3, 7, 8, 21}


def rows():
    return [
        {"manifest": "m", "line": i + 1, "id": f"row {i}", "videos": [f"/videos/{i}.mp4"], "messages": [], "kind": None}
        for i in range(ROWS)
    ]


class Rows:
    """Stands in for the manifests' rows."""

    roots = ("/videos",)

    def take(self, numbers):
        return [rows()[i] for i in numbers]


class FakeDecoder:
    """Returns frames filled with the number of the video, and remembers what it decoded."""

    def __init__(self, bad):
        self.bad, self.decoded = bad, []

    def __call__(self, uris):
        numbers = [int(re.search(r"\d+", uri)[0]) for uri in uris]
        self.decoded += numbers
        return [
            VideoFailure("no such file", "read")
            if n in self.bad
            else SampledFrames(np.full((1, 2, 2, 3), n, np.uint8), np.zeros(1))
            for n in numbers
        ]


def reader(layout, bad):
    read = ReadSamples.__new__(ReadSamples)
    read.layout, read.rows, read.decoder, read.unreadable = layout, Rows(), FakeDecoder(bad), {}
    return read


def read_all(order, ranks, first=0, steps=10, rows_in_block=4, bad=BAD):
    """Read all blocks; return the samples by position, and the reader."""
    layout = BlockLayout(order, ranks, first, steps, rows_in_block)
    read = reader(layout, bad)
    samples = {}
    for block in range(layout.num_blocks):
        unpacked = list(unpack_block(read({"block": [block]})))
        assert [sample.position for sample in unpacked] == layout.positions(block).tolist()
        samples |= {sample.position: sample for sample in unpacked}
    return samples, read


def test_videos_with_fewer_frames_than_asked_are_named():
    order = DeterministicSampler((ROWS,), 4, seed=0)
    read = reader(BlockLayout(order, 1, 0, 1, 4), ())
    frames = SampledFrames(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1), "1 of 8 frames: why")
    read.decoder = lambda uris: [replace(frames, shortfall=None) if n == 1 else frames for n in range(len(uris))]
    named = [sample.shortfalls for sample in unpack_block(read({"block": [0]}))]
    assert [bool(lines) for lines in named] == [True, False, True, True]
    assert re.fullmatch(r"/videos/\d+\.mp4: 1 of 8 frames: why", named[0][0])


def test_unreadable_row_is_replaced_and_quarantined():
    order = DeterministicSampler((ROWS,), 4, seed=0)
    samples, read = read_all(order, ranks=2)
    assert len(samples) == 40
    for position, sample in samples.items():
        (original,), _ = order.rows_at(np.array([position]))
        assert sample.error is None
        assert sample.videos[0][0, 0, 0, 0] == sample.line - 1
        assert sample.line - 1 not in BAD
        assert bool(sample.quarantined) == (original in BAD)
        if sample.quarantined:
            assert sample.quarantined[0]["line"] - 1 == original
            assert all(e["reason"] == "no such file" and e["uri"].startswith("/videos/") for e in sample.quarantined)
    assert len(read.decoder.decoded) <= 40 + 2 * len(BAD), "known unreadable rows are not tried again"


def test_substitutes_do_not_depend_on_workers_blocks_or_resumes():
    order = DeterministicSampler((ROWS,), 4, seed=5)
    reference, _ = read_all(order, ranks=1)
    for ranks, rows_in_block, first in [(2, 1, 0), (4, 7, 0), (2, 3, 4)]:
        again, _ = read_all(order, ranks, first, 10 - first, rows_in_block)
        shared = again.keys() & reference.keys()
        assert len(shared) >= (10 - first) * 4
        for position in shared:
            assert (again[position].line, again[position].quarantined) == (
                reference[position].line,
                reference[position].quarantined,
            )


def test_ranks_that_do_not_divide_the_batch_read_each_sample_once():
    """Five workers and four samples: one of them gets padding, for which nothing is read."""
    order = DeterministicSampler((ROWS,), 4, seed=5)
    reference, _ = read_all(order, ranks=1)
    again, read = read_all(order, ranks=5)
    blank = again.pop(PADDING)
    assert (blank.weight, blank.videos, blank.quarantined, blank.is_blank) == (0.0, [], [], True)
    assert {position: again[position].line for position in reference} == {p: s.line for p, s in reference.items()}
    assert len(read.decoder.decoded) <= len(again) + 2 * len(BAD)


def test_position_stays_empty_if_all_substitutes_are_unreadable():
    samples, _ = read_all(DeterministicSampler((ROWS,), 4, seed=0), ranks=1, steps=2, bad=set(range(ROWS)))
    assert all(sample.error == "no such file" for sample in samples.values())
    assert all(len(sample.quarantined) == 9 for sample in samples.values())


def test_validation_does_not_replace_unreadable_rows():
    samples, read = read_all(DeterministicSampler((ROWS,), 4, seed=None), ranks=1)
    assert [position for position, sample in samples.items() if sample.error] == sorted(BAD)
    assert sorted(read.decoder.decoded) == list(range(ROWS))


def test_unavailable_store_ends_the_run_with_its_message():
    layout = BlockLayout(DeterministicSampler((ROWS,), 4, seed=0), ranks=1, first_step=0, steps=1, rows_per_block=4)
    read = reader(layout, BAD)

    def unavailable(uris):
        raise storage.Unavailable("s3://bucket/a.mp4: could not connect")

    read.decoder = unavailable
    with pytest.raises(storage.Unavailable, match=r"^s3://bucket/a.mp4: could not connect$"):
        list(unpack_block(read({"block": [0]})))


def test_quarantine_entry_is_complete_and_printable():
    row = {"manifest": "m.jsonl\n", "line": 3, "id": "a\x1b[31m\n"}
    entry = QuarantineEntry.from_row(row, "s3://bucket/\u202e.mp4", VideoFailure("empty", "check", "etag", 2)).to_dict()
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


def test_budget_raises_beyond_both_limits_with_reasons():
    empty, missing = (
        {"manifest": "a", "stage": "check", "reason": "empty"},
        {"manifest": "a", "stage": "read", "reason": "no such file"},
    )
    budget = ErrorBudget(max_share=0.1, allowed=3)
    budget.record(["a"] * 3, [empty, missing, missing])
    budget.record(["a"] * 97, [empty] * 7)
    message = r"a: 11 videos .* for 101 samples, .*: 9 x check: empty; 2 x read: no such file"
    with pytest.raises(TooManyUnreadable, match=message):
        budget.record(["a"], [empty])
    ErrorBudget(0.5, 0).record(["a"] * 10, [empty] * 5)
    with pytest.raises(TooManyUnreadable):
        ErrorBudget(DataConfig().max_bad_share, DataConfig().bad_allowed).record(["a"] * 30, [missing] * 21)


def test_each_source_has_its_own_budget():
    bad = [{"manifest": "small", "stage": "check", "reason": "empty"}] * 4
    budget = ErrorBudget(max_share=0.1, allowed=3)
    budget.record(["small"] * 50 + ["large"] * 500, bad)
    with pytest.raises(TooManyUnreadable, match="small: 8 videos could not be read for 60 samples"):
        budget.record(["small"] * 10 + ["large"] * 500, bad)


def test_source_with_non_ascii_name_has_its_own_budget():
    name = "/data/vid\u00e9os/train.jsonl"
    row = {"manifest": name, "line": 1, "id": "a"}
    bad = [QuarantineEntry.from_row(row, "a.mp4", VideoFailure("empty", "check")).to_dict()]
    budget = ErrorBudget(max_share=0.1, allowed=3)
    for _ in range(30):
        budget.record([name] * 100, bad)
