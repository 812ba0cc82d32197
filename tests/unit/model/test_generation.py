"""Every way of decoding that Transformers knows, with videos. One sample has two videos, one has one, one has none."""

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache

from crosslmm.model.loading import build_model
from tests.support.common import open_gates, random_frames

VIDEO = {"type": "video"}
TALKS = [
    [{"role": "user", "content": [VIDEO, {"type": "text", "text": "and"}, VIDEO, {"type": "text", "text": "Which?"}]}],
    [{"role": "user", "content": [VIDEO, {"type": "text", "text": "What colour is it?"}]}],
    [{"role": "user", "content": "Why?"}],
]
VIDEOS = [[random_frames(2, 1), random_frames(1, 2)], [random_frames(4, 3)], []]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def model(config, processor):
    """With large weights, so that no two tokens are nearly as likely."""
    model = build_model(config.model, processor, seed=0).eval()
    for parameter in model.language_model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.manual_seed(1))
    open_gates(model)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def prompts(processor):
    return processor(TALKS, VIDEOS, for_generation=True)


def prompt(processor, i):
    return processor(TALKS[i : i + 1], VIDEOS[i : i + 1], for_generation=True)


class OnlyThePlaceholder(LogitsProcessor):
    """A model that wants to say nothing but the placeholder: it comes before the model's own processors."""

    def __init__(self, placeholder):
        self.placeholder = placeholder

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.placeholder] = 1e4
        return scores


WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 3.0},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "without a cache": {"do_sample": False, "use_cache": False},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "in a configuration": {"generation_config": GenerationConfig(do_sample=False, num_beams=2, max_new_tokens=5)},
}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_of_decoding_says_a_placeholder(model, processor, prompts, way):
    options = {"max_new_tokens": 5} if way != "in a configuration" else {}
    tokens = model.generate(
        **prompts, **WAYS[way], **options, logits_processor=[OnlyThePlaceholder(processor.video_token_id)]
    )
    assert not (tokens[:, prompts["input_ids"].shape[1] :] == processor.video_token_id).any()


def test_a_model_that_would_say_a_placeholder_answers(model, processor):
    """The head's row of the placeholder is the largest; Qwen2.5's vocabulary has this token."""
    with torch.no_grad():
        model.get_output_embeddings().weight[processor.video_token_id] *= 1000
    tokens = model.generate(**prompt(processor, 1), max_new_tokens=8, do_sample=False)
    assert processor.video_token_id not in tokens[0, -8:]


def test_prompt_lookup_and_assistants_equal_greedy_search(config, model, processor):
    """Both propose what was in the prompt, or what a model says, and feed it back."""
    other = build_model(config.model, processor, seed=5).eval()
    open_gates(other)
    for i in range(3):
        inputs = prompt(processor, i)
        greedy = model.generate(**inputs, **GREEDY)
        for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": other}, {"assistant_model": model}):
            assisted = model.generate(**inputs, **GREEDY, **options)
            assert torch.equal(assisted.sequences, greedy.sequences)
            for ours, theirs in zip(assisted.logits, greedy.logits, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_an_assistant_that_proposes_a_placeholder_is_cut(model, processor, monkeypatch):
    """As one with another tokenizer might."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    def propose(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[20, processor.video_token_id, 21]])], dim=1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", propose)
    inputs = prompt(processor, 1)
    greedy = model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3).sequences, greedy.sequences)


def test_static_and_given_caches_equal_the_dynamic_one(model, prompts):
    dynamic = model.generate(**prompts, **GREEDY)
    config = model.config.text_config
    for options in (
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache()},
        {"past_key_values": StaticCache(config=config, max_cache_len=90)},
    ):
        other = model.generate(**prompts, **GREEDY, **options)
        assert torch.equal(other.sequences, dynamic.sequences)
        for ours, theirs in zip(other.logits, dynamic.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_beams_of_a_batch_equal_each_sample_alone(model, processor, prompts):
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    encoded = []
    model.vision_tower.post_layernorm.register_forward_hook(lambda module, args, out: encoded.append(len(args[0])))
    together = model.generate(**prompts, **options)
    assert sum(encoded) == 7  # frames; not 3 times as many
    uncached = model.generate(**prompts, **options, use_cache=False)
    assert torch.equal(together.sequences, uncached.sequences)
    for i in range(3):
        alone = model.generate(**prompt(processor, i), **options)
        assert torch.equal(alone.sequences[:, -6:], together.sequences[2 * i : 2 * i + 2, -6:])
        torch.testing.assert_close(
            alone.sequences_scores, together.sequences_scores[2 * i : 2 * i + 2], atol=1e-4, rtol=1e-4
        )


def test_several_sequences_see_the_frames_of_their_sample(model, processor, prompts):
    torch.manual_seed(0)
    out = model.generate(
        **prompts, max_new_tokens=2, do_sample=True, num_return_sequences=3, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    greedy = model.generate(**prompts, **GREEDY | {"max_new_tokens": 1})
    torch.testing.assert_close(out.logits[0], greedy.logits[0].repeat_interleave(3, dim=0), atol=1e-4, rtol=1e-4)


def test_embeddings_may_take_the_place_of_tokens(model, processor, prompts):
    greedy = model.generate(**prompts, **GREEDY)
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    rest = {name: value for name, value in prompts.items() if name != "input_ids"}
    with_ids = model.generate(prompts["input_ids"], inputs_embeds=embeds, **rest, **GREEDY)
    assert torch.equal(with_ids.sequences, greedy.sequences)
    without = model.generate(inputs_embeds=embeds, **rest, **GREEDY)
    assert torch.equal(without.sequences, greedy.sequences[:, -6:])
    # A placeholder outside the vocabulary has no embedding, but an id.
    model.config.video_token_id = 10_000
    moved = prompts["input_ids"].masked_fill(prompts["input_ids"] == processor.video_token_id, 10_000)
    again = model.generate(moved, inputs_embeds=torch.zeros_like(embeds), **rest, **GREEDY)
    assert again.sequences.shape == greedy.sequences.shape
    with pytest.raises(ValueError, match="outside the vocabulary"):
        model.generate(inputs_embeds=embeds, **rest, **GREEDY)


def test_generation_goes_on_from_a_returned_cache(model, prompts):
    at_once = model.generate(**prompts, **GREEDY)
    begun = model.generate(**prompts, **GREEDY | {"max_new_tokens": 4})
    mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 4), value=1)
    for visual in ({}, {name: prompts[name] for name in ("pixel_values", "num_frames")}):
        continued = model.generate(
            input_ids=begun.sequences, attention_mask=mask, **visual, past_key_values=begun.past_key_values,
            **GREEDY | {"max_new_tokens": 2},
        )  # fmt: skip
        assert torch.equal(continued.sequences, at_once.sequences)
        begun.past_key_values.crop(-2)


def test_answers_end_at_the_last_position(config, processor):
    language = config.model.language | {"max_position_embeddings": 40}
    short = build_model(config.model.model_copy(update={"language": language}), processor, seed=0).eval()
    short.generation_config.eos_token_id = None
    inputs = prompt(processor, 1)
    length = inputs["input_ids"].shape[1]
    out = short.generate(**inputs, max_new_tokens=50, do_sample=False)
    assert out.shape[1] == 41  # the last token is not fed back
    assert torch.equal(out, short.generate(**inputs, max_new_tokens=41 - length, do_sample=False))
    with pytest.raises(ValueError, match="the sequence has 41 positions, but the decoder takes 40"):
        short.generate(input_ids=torch.full((1, 41), 20), max_new_tokens=2)
