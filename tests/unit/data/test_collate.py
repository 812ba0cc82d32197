from hypothesis import given
from hypothesis import strategies as st

from crosslmm.data.collate import PLACEHOLDER_MESSAGES, Sample, mask_unreadable, micro_batches


def samples(lengths):
    return [Sample(i, "m", i, f"{i}", [], [], None, 1.0, None) for i, _ in enumerate(lengths)]


def test_counted_in_samples_they_stand_as_they_came():
    batches = micro_batches(samples([0] * 5), size=2)
    assert [[sample.line for sample in batch] for batch in batches] == [[0, 1], [2, 3], [4]]


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60), tokens=st.integers(1, 2000))
def test_counted_in_tokens_no_micro_batch_holds_more_and_none_is_lost(lengths, tokens):
    batches = micro_batches(samples(lengths), size=1, tokens=tokens, length_of=lambda sample: lengths[sample.line])
    assert sorted(sample.line for batch in batches for sample in batch) == list(range(len(lengths)))
    for batch in batches:
        held = len(batch) * max(lengths[sample.line] for sample in batch)
        assert held <= tokens or len(batch) == 1


def test_samples_of_like_length_go_together():
    lengths = [600, 10, 590, 12, 8, 580]
    batches = micro_batches(samples(lengths), 1, tokens=1800, length_of=lambda sample: lengths[sample.line])
    assert [[sample.line for sample in batch] for batch in batches] == [[0, 2, 5], [3, 1, 4]]


def test_what_could_not_be_read_is_as_long_as_what_stands_for_it():
    asked = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}]
    lost = Sample(0, "m", 1, "a", asked, [], None, 1.0, "no such file")
    assert mask_unreadable([lost]) == ([PLACEHOLDER_MESSAGES], [[]], [0.0])
