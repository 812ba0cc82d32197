"""A row of which no batch can be made is quarantined with its reason, and costs no other row."""

import bisect
import json
import re

import numpy as np
import pyarrow as pa
import pytest

from crosslmm.data import manifest_shards
from crosslmm.data.collate import Sample, collate, collate_for_validation, quarantine_unusable
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.quarantine import ErrorBudget, TooManyUnreadable
from tests.support.common import conversation, random_frames

LONG = "up and down " * 4000
NEW_TOKENS = 4


def sample(line, messages, videos=()):
    return Sample(line, "rows.jsonl", line, f"row {line}", messages, list(videos), "kind", 1.0, None)


def user(*parts):
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "red"}]


def text(words):
    return {"type": "text", "text": words}


GOOD = sample(1, conversation("What colour?", "red"), [random_frames(4)])
# What a manifest may hold, or a prepared one, whose rows nobody here has checked; with the reason.
BAD = {
    "more frames than the decoder's context": (
        user(*[{"type": "video"}] * 200), [random_frames(4)] * 200, r"takes \d+ positions, and the decoder has 2048"
    ),
    "a token of the chat format in two parts": (
        user({"type": "video"}, text("<|video_"), text("pad|>")), [random_frames(4)], "2 video or image parts"
    ),
    "more videos than parts": (conversation("?", "!"), [random_frames(1)] * 2, "1 video or image parts"),
    "a video without frames": (conversation("?", "!"), [random_frames(0)], "no frames"),
    "frames of another size": (conversation("?", "!"), [random_frames(2, side=40)], r"\(2, 40, 40, 3\)"),
    "features instead of frames": (conversation("?", "!"), [np.zeros((2, 64, 64), np.uint16)], "uint16"),
    "half a surrogate pair": (user(text("\ud800")), [], "."),
    "messages that are texts": (["What colour?", "red"], [], "."),
    "an answer that is a list": (
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": ["red"]}], [], "TypeError"
    ),
    "an answer of null": ([{"role": "user", "content": "?"}, {"role": "assistant", "content": None}], [], "Error"),
    "messages of null": (None, [], "."),
    "messages that are an object": ({"role": "user"}, [], "."),
}  # fmt: skip
BAD_IN_VALIDATION = {
    "a prompt that is too long": (conversation(LONG, "red", video=False), [], r"the decoder has 2048"),
    "no answer": ([{"role": "user", "content": "?"}], [], "."),
    "no role": ([{"content": "?"}], [], "."),
}


def require_usable(processor, new_tokens=None):
    return lambda messages, videos: processor.require_usable(messages, videos, new_tokens=new_tokens)


@pytest.mark.parametrize("kind", BAD)
def test_an_unusable_row_is_quarantined_alone(processor, model, kind):
    messages, videos, reason = BAD[kind]
    samples = list(quarantine_unusable([GOOD, sample(2, messages, videos), GOOD], require_usable(processor)))
    require_quarantined(samples, reason)
    batch = collate(samples, processor)
    assert ((batch["labels"] != -100).sum(1) > 0).tolist() == [True, False, True]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", BAD | BAD_IN_VALIDATION)
def test_an_unusable_row_of_validation_is_quarantined_alone(processor, model, kind):
    messages, videos, reason = (BAD | BAD_IN_VALIDATION)[kind]
    check = require_usable(processor, NEW_TOKENS)
    samples = list(quarantine_unusable([GOOD, sample(2, messages, videos), GOOD], check))
    require_quarantined(samples, reason)
    batch = collate_for_validation(samples, processor)
    assert batch.expected == ["red", None, "red"]
    assert model(**batch.inputs).loss.isfinite()
    assert len(model.generate(**batch.prompts, max_new_tokens=NEW_TOKENS, do_sample=False)) == 3


def require_quarantined(samples, reason):
    good, bad, other = samples
    assert good == other == GOOD
    (entry,) = bad.quarantined
    assert re.search(reason, entry["reason"]), entry
    assert json.dumps(entry).isprintable()
    assert (entry["line"], entry["stage"], entry["uri"]) == (2, "process", "")
    assert entry["reason"] == bad.error


def test_long_text_is_truncated_and_not_refused(processor, model):
    (long,) = quarantine_unusable([sample(2, conversation(LONG, "red", video=False))], require_usable(processor))
    assert long.error is None
    assert model(**collate([long], processor)).loss is not None


def test_prompts_up_to_the_limit_are_generated_from(processor, model):
    """The longest prompt that is accepted leaves room for all new tokens."""

    def row(count):
        return sample(2, conversation("up " * count, "red", video=False))

    def is_refused(count):
        (checked,) = quarantine_unusable([row(count)], require_usable(processor, NEW_TOKENS))
        return checked.error is not None

    longest = bisect.bisect_left(range(3000), True, key=is_refused) - 1
    batch = collate_for_validation([row(longest)], processor)
    assert 2048 - batch.prompts["input_ids"].shape[1] in (NEW_TOKENS - 1, NEW_TOKENS)
    assert len(model.generate(**batch.prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)) == 1


def test_known_unreadable_samples_are_not_checked_again(processor):
    unreadable = Sample(0, "m", 1, "a", None, [], None, 1.0, "no such file", [{"reason": "no such file"}])
    assert list(quarantine_unusable([unreadable], require_usable(processor))) == [unreadable]


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_of_the_machine_are_not_the_rows(error):
    def fail(messages, videos):
        raise error

    with pytest.raises(error):
        list(quarantine_unusable([GOOD], fail))


def test_unusable_rows_count_in_the_error_budget(processor):
    rows = [sample(line, None) for line in range(1, 30)]
    samples = list(quarantine_unusable(rows, require_usable(processor)))
    budget = ErrorBudget(max_share=0.1, allowed=20)
    with pytest.raises(TooManyUnreadable, match=r"rows\.jsonl: 29 .* 29 x process: "):
        budget.record([s.manifest for s in samples], [entry for s in samples for entry in s.quarantined])


@pytest.mark.parametrize("messages", ["not JSON", "", "[" * 100_000])
def test_messages_of_a_prepared_row_that_are_not_json_are_named(tmp_path, messages):
    row = {"id": "a", "videos": [], "messages": messages, "kind": None, "line": 7, "chars": 2, "seconds": []}
    table = pa.Table.from_pylist([row], manifest_shards.SCHEMA)
    manifest_shards.seal(str(tmp_path), [manifest_shards.write_part(str(tmp_path), 0, table)], table, {})
    with pytest.raises(BadManifest, match=r"line 7: messages: "):
        Manifest(str(tmp_path)).take([0])
