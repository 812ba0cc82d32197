"""What a cache remembers of the videos, whatever its class, and whatever is done with it."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from crosslmm.model.cache import fork, recall
from crosslmm.model.loading import build_model
from tests.support.common import conversation, open_gates, random_frames

TEXTS = ["Which shape is it?", "Which way does it move, and what colour is it?", "Why?"]
VIDEOS = [[random_frames(4, 1)], [random_frames(2, 2)], []]


@pytest.fixture
def model(config, processor):
    model = build_model(config.model, processor, seed=0).eval()
    open_gates(model)
    return model


@pytest.fixture
def batch(processor):
    talks = [conversation(t, "red", video=bool(v))[:1] for t, v in zip(TEXTS, VIDEOS, strict=True)]
    return processor(talks, VIDEOS, for_generation=True)


def empty_caches(model):
    config = model.config.text_config
    return [DynamicCache(), DynamicCache(config=config), StaticCache(config=config, max_cache_len=100)]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"cross_attention_rotary": True}, {"attention": "eager"}], ids=str)
def test_a_continued_cache_needs_neither_frames_nor_their_number(config, processor, batch, settings):
    model = build_model(config.model.model_copy(update=settings), processor, seed=0).eval()
    open_gates(model)
    ids, split = batch["input_ids"], batch["input_ids"].shape[1] - 4
    whole = model(**batch).logits
    for cache in empty_caches(model):
        first = model(**batch | {"input_ids": ids[:, :split], "attention_mask": batch["attention_mask"][:, :split]},
                      past_key_values=cache)  # fmt: skip
        assert first.past_key_values is cache
        later = model(input_ids=ids[:, split:], attention_mask=batch["attention_mask"], past_key_values=cache)
        torch.testing.assert_close(later.logits, whole[:, split:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_keeps_the_form_that_transformers_gives_it(model, batch):
    for cache in empty_caches(model):
        kinds, layers = [type(layer) for layer in cache.layers], model.config.text_config.num_hidden_layers
        model(**batch, past_key_values=cache)
        assert len(cache) == len(cache.layers) == layers
        assert all(isinstance(layer, kind) for layer, kind in zip(cache.layers, kinds, strict=False))
        assert [layer.keys.shape[0] for layer in cache.layers] == [len(TEXTS)] * layers
    with pytest.raises(TypeError, match="give the decoder's cache"):
        model(**batch, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))


@torch.no_grad()
def test_what_is_done_with_a_cache_reaches_its_videos(model, batch):
    text = {"input_ids": torch.tensor([[20, 21, 22]] * len(TEXTS))}
    cache = model(**batch, use_cache=True).past_key_values
    order = torch.tensor([1, 0, 2])
    continued = model(**text, past_key_values=copy.deepcopy(cache)).logits

    for change in ("reorder_cache", "batch_select_indices"):
        reordered = copy.deepcopy(cache)
        getattr(reordered, change)(order)
        torch.testing.assert_close(model(**text, past_key_values=reordered).logits, continued[order])

    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    twice = {"input_ids": text["input_ids"].repeat_interleave(2, dim=0)}
    torch.testing.assert_close(
        model(**twice, past_key_values=repeated).logits, continued.repeat_interleave(2, dim=0), atol=2e-5, rtol=1e-4
    )

    cropped = copy.deepcopy(cache)
    model(**text, past_key_values=cropped)
    cropped.crop(-3)
    torch.testing.assert_close(model(**text, past_key_values=cropped).logits, continued)

    for emptied in (copy.deepcopy(cache), StaticCache(config=model.config.text_config, max_cache_len=100)):
        if not emptied.get_seq_length():
            model(**batch, past_key_values=emptied)
        emptied.reset()
        torch.testing.assert_close(
            model(**text, past_key_values=emptied).logits, model(**text).logits, atol=2e-5, rtol=1e-4
        )


@torch.no_grad()
def test_text_alone_leaves_no_videos_in_a_cache(model, processor):
    batch = processor([conversation("Why?", "red", video=False)[:1]], [[]], for_generation=True)
    cache = model(**batch, use_cache=True).past_key_values
    assert [recall(cache, layer) for layer in model.config.dual_layers] == [None] * len(model.config.dual_layers)


@torch.no_grad()
def test_a_fork_leaves_the_cache_as_it_is(model, batch):
    cache = model(**batch, use_cache=True).past_key_values
    before = copy.deepcopy(cache)
    length = cache.get_seq_length() - 2
    model(input_ids=torch.tensor([[20, 21, 22]] * len(TEXTS)), past_key_values=fork(cache, length))
    for layer, same in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, same.keys)
        assert torch.equal(layer.values, same.values)
    uncut = model(input_ids=torch.tensor([[20]] * len(TEXTS)), past_key_values=fork(cache, length + 2)).logits
    assert torch.equal(uncut, model(input_ids=torch.tensor([[20]] * len(TEXTS)), past_key_values=before).logits)


@torch.no_grad()
def test_cached_keys_and_values_are_contiguous_for_each_head(model, batch):
    cache = model(**batch, use_cache=True).past_key_values
    seen = [recall(cache, layer) for layer in model.config.dual_layers]
    assert seen
    assert all(videos.key_BHSC.is_contiguous() and videos.value_BHSC.is_contiguous() for videos in seen)
