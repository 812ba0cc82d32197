from hypothesis import given
from hypothesis import strategies as st

from crosslmm.data.collate import PLACEHOLDER_MESSAGES, Sample, mask_blank, micro_batches


def samples(lengths):
    return [Sample(i, "m", i, f"{i}", [], [], None, 1.0, None) for i, _ in enumerate(lengths)]


def test_micro_batches_by_size_keep_the_order():
    batches = micro_batches(samples([0] * 5), size=2)
    assert [[sample.line for sample in batch] for batch in batches] == [[0, 1], [2, 3], [4]]


@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=60), tokens=st.integers(1, 2000))
def test_micro_batches_by_tokens_respect_limit_and_lose_no_sample(lengths, tokens):
    batches = micro_batches(samples(lengths), size=1, tokens=tokens, length_of=lambda sample: lengths[sample.line])
    assert sorted(sample.line for batch in batches for sample in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[sample.line] for sample in batch)
        assert padded <= tokens or len(batch) == 1


def test_samples_of_similar_length_share_a_micro_batch():
    lengths = [600, 10, 590, 12, 8, 580]
    batches = micro_batches(samples(lengths), 1, tokens=1800, length_of=lambda sample: lengths[sample.line])
    assert [[sample.line for sample in batch] for batch in batches] == [[0, 2, 5], [3, 1, 4]]


def test_unreadable_sample_becomes_placeholder_of_weight_0():
    messages = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}]
    unreadable = Sample(0, "m", 1, "a", messages, [], None, 1.0, "no such file")
    assert mask_blank([unreadable]) == ([PLACEHOLDER_MESSAGES], [[]], [[]], [0.0])
