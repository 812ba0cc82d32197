"""A row of which no batch can be made is quarantined with its reason, and costs no other row."""

import bisect
import functools
import json
import re

import numpy as np
import pytest

from crosslmm.data.collate import Sample, collate, collate_for_validation, make_batch
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


@pytest.mark.parametrize("kind", BAD)
def test_a_row_of_which_no_batch_can_be_made_is_quarantined_alone(processor, model, kind):
    messages, videos, reason = BAD[kind]
    samples, batch = make_batch([GOOD, sample(2, messages, videos), GOOD], training(processor))
    require_quarantined(samples, reason)
    assert ((batch["labels"] != -100).sum(1) > 0).tolist() == [True, False, True]
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("kind", BAD | BAD_IN_VALIDATION)
def test_a_row_of_validation_is_quarantined_alone(processor, model, kind):
    messages, videos, reason = (BAD | BAD_IN_VALIDATION)[kind]
    samples, batch = make_batch([GOOD, sample(2, messages, videos), GOOD], validation(processor))
    require_quarantined(samples, reason)
    (questions,) = batch.questions
    assert [question.reference for question in questions.asked] == ["red", "red"]
    assert batch.unreadable == [("kind", None)]
    assert model(**batch.inputs).loss.isfinite()
    assert len(model.generate(**questions.prompts(), max_new_tokens=NEW_TOKENS, do_sample=False)) == 2


def training(processor):
    return functools.partial(collate, processor=processor)


def validation(processor):
    require_room = functools.partial(processor.require_room, new_tokens=NEW_TOKENS)
    return functools.partial(collate_for_validation, processor=processor, require_room=require_room)


def require_quarantined(samples, reason):
    good, bad, other = samples
    assert good == other == GOOD
    (entry,) = bad.quarantined
    assert re.search(reason, entry["reason"]), entry
    assert json.dumps(entry).isprintable()
    assert (entry["line"], entry["stage"], entry["uri"]) == (2, "process", "")
    assert entry["reason"] == bad.error


def test_long_text_is_truncated_and_not_refused(processor, model):
    (long,), batch = make_batch([sample(2, conversation(LONG, "red", video=False))], training(processor))
    assert long.error is None
    assert model(**batch).loss is not None


def test_prompts_up_to_the_limit_are_generated_from(processor, model):
    """The longest prompt that is accepted leaves room for all new tokens."""

    def make(count):
        row = sample(2, conversation("up " * count, "red", video=False))
        (made,), batch = make_batch([row], validation(processor))
        return made.error, batch

    longest = bisect.bisect_left(range(3000), True, key=lambda count: make(count)[0] is not None) - 1
    prompts = make(longest)[1].questions[0].prompts()
    assert 2048 - prompts["input_ids"].shape[1] in (NEW_TOKENS - 1, NEW_TOKENS)
    assert len(model.generate(**prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)) == 1


def test_good_samples_and_known_bad_ones_are_made_into_a_batch_once():
    unreadable = Sample(0, "m", 1, "a", [], [], None, 1.0, "no such file", [{"reason": "no such file"}])
    made = []
    samples, batch = make_batch([GOOD, unreadable], lambda samples: made.append(samples) or "batch")
    assert (samples, batch, made) == ([GOOD, unreadable], "batch", [[GOOD, unreadable]])


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_of_the_machine_are_not_the_rows(error):
    def fail(samples):
        raise error

    with pytest.raises(error):
        make_batch([GOOD], fail)


def test_an_error_that_comes_from_no_row_is_raised():
    def fail(samples):
        if len(samples) > 1:
            raise RuntimeError("only together")

    with pytest.raises(RuntimeError, match="only together"):
        make_batch([GOOD, GOOD], fail)


def test_bad_rows_count_in_the_error_budget(processor):
    samples, _ = make_batch([sample(line, None) for line in range(1, 30)], training(processor))
    budget = ErrorBudget(max_share=0.1, allowed=20)
    with pytest.raises(TooManyUnreadable, match=r"rows\.jsonl: 29 .* 29 x process: "):
        budget.record([s.manifest for s in samples], [entry for s in samples for entry in s.quarantined])
