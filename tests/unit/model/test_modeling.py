"""The model: gates at zero, padding, caches, attention kernels, gradients, saving, and its error messages."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from crosslmm.config import BadConfig, ModelConfig
from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration
from crosslmm.model.cross_attention import DualCrossAttentionLayer
from crosslmm.model.loading import build_model
from crosslmm.model.pooling import pool
from tests.support.common import conversation, open_gates, random_frames

TEXTS = ["Which shape is it?", "Which way does it move, and what colour is it?", "What is red?", "Why?"]


@pytest.fixture
def samples(processor):
    """Four conversations of different lengths, with 4, 2, no and 1 frames."""
    videos = [[random_frames(4, 1)], [random_frames(2, 2)], [], [random_frames(1, 3)]]
    talks = [conversation(t, "red circle", video=bool(v)) for t, v in zip(TEXTS, videos, strict=True)]
    return talks, videos


def base_logits(model, batch):
    """Logits of the decoder without cross-attention for [pooled visual tokens; text]."""
    is_video = batch["input_ids"] == model.config.video_token_id
    embedded = model.language_model.get_input_embeddings()(batch["input_ids"].masked_fill(is_video, 0))
    pooled = model.projector(pool(model.encode(batch["pixel_values"]), model.config.pool_stride))
    embedded = embedded.masked_scatter(is_video[:, :, None], pooled)
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    keys = bare.state_dict().keys()
    bare.load_state_dict({k: v for k, v in model.language_model.state_dict().items() if k in keys})
    return bare(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits


def without_labels(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


@torch.no_grad()
def test_gates_at_zero_equal_the_base_model_on_pooled_tokens(model, processor, samples):
    batch = without_labels(processor(*samples))
    is_real = batch["attention_mask"].bool()
    base = base_logits(model, batch)[is_real]
    torch.testing.assert_close(model(**batch).logits[is_real], base, atol=1e-5, rtol=0)
    open_gates(model)
    assert not torch.allclose(model(**batch).logits[is_real], base, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_only_sample_beside_videos_equals_the_base_model(model, processor, samples, attention):
    model.set_attn_implementation(attention)
    open_gates(model)
    batch = without_labels(processor(*samples))
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.set_attn_implementation(attention)
    keys = bare.state_dict().keys()
    bare.load_state_dict({k: v for k, v in model.language_model.state_dict().items() if k in keys})
    ours = model(**batch).logits
    assert ours.isfinite().all()
    theirs = bare(input_ids=batch["input_ids"].masked_fill(batch["input_ids"] == processor.video_token_id, 0),
                  attention_mask=batch["attention_mask"]).logits  # fmt: skip
    is_real = batch["attention_mask"][2].bool()
    torch.testing.assert_close(ours[2, is_real], theirs[2, is_real], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padded_batch_equals_its_samples_alone(model, processor, samples, attention):
    model.set_attn_implementation(attention)
    open_gates(model)
    batch = processor(*samples)
    together = model(**without_labels(batch)).logits
    for i, (talk, frames) in enumerate(zip(*samples, strict=True)):
        alone = model(**without_labels(processor([talk], [frames]))).logits[0]
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_left_padding_does_not_change_generation(model, processor, samples):
    open_gates(model)
    talks, frames = samples
    prompts = [talk[:1] for talk in talks]
    together = model.generate(**processor(prompts, frames, for_generation=True), max_new_tokens=8, do_sample=False)
    for i, (prompt, video) in enumerate(zip(prompts, frames, strict=True)):
        alone = model.generate(**processor([prompt], [video], for_generation=True), max_new_tokens=8, do_sample=False)[
            0
        ]
        assert torch.equal(together[i, -8:], alone[-8:])


@torch.no_grad()
@pytest.mark.parametrize("branch", ["v2v", "t2v"])
def test_cross_attention_is_not_causal(model, processor, samples, branch):
    """The first query of a sample attends to the last patch of the last frame."""
    open_gates(model)
    batch = without_labels(processor(*[s[:1] for s in samples]))
    added = {}
    layer = next(x for x in model.modules() if isinstance(x, DualCrossAttentionLayer))

    def first_query(module, inputs, output):
        added[len(added)] = (output - inputs[0])[0, inputs[1].rows_N[0]]

    getattr(layer, branch).register_forward_hook(first_query)
    model(**batch)
    changed = batch["pixel_values"].clone()
    changed[-1, :, -8:, -8:] = 255 - changed[-1, :, -8:, -8:]
    # The hidden states of the text and the first tokens stay the same: only the keys of the last frame change.
    features = model.encode(batch["pixel_values"])
    last = model.encode(changed)
    assert not torch.equal(pool(features, 3)[-1], pool(last, 3)[-1])
    features[-1] = last[-1]
    model.encode = lambda pixels: features
    model(**batch)
    assert not torch.allclose(added[0], added[1], atol=1e-6)


@torch.no_grad()
def test_each_branch_writes_only_to_its_positions(model, processor, samples):
    open_gates(model)
    batch = without_labels(processor(*samples))
    is_video = batch["input_ids"] == processor.video_token_id
    is_text = ~is_video & batch["attention_mask"].bool()
    after_video = is_video.cumsum(dim=1) > 0
    layer = next(x for x in model.modules() if isinstance(x, DualCrossAttentionLayer))
    changed = {}

    def note(name):
        def hook(module, inputs, output):
            changed[name] = (output != inputs[0]).any(dim=-1)

        return hook

    layer.v2v.register_forward_hook(note("v2v"))
    layer.t2v.register_forward_hook(note("t2v"))
    model(**batch)
    assert torch.equal(changed["v2v"], is_video)
    assert torch.equal(changed["t2v"], is_text & after_video)


@torch.no_grad()
def test_cached_generation_equals_uncached_with_keys_computed_once(model, processor, samples):
    open_gates(model)
    talks, videos = samples
    prompts = processor([talk[:1] for talk in talks], videos, for_generation=True)
    calls = []
    model.config.encoder_chunk = 64  # one call for all frames
    for layer in model.modules():
        if isinstance(layer, DualCrossAttentionLayer):
            layer.t2v.k_proj.register_forward_hook(lambda *_: calls.append(1))
    cached = model.generate(**prompts, max_new_tokens=10, do_sample=False)
    assert len(calls) == len(model.config.dual_layers)
    uncached = model.generate(**prompts, max_new_tokens=10, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


@torch.no_grad()
def test_cached_logits_equal_uncached_logits(model, processor, samples):
    """Compares logits, since greedy tokens can agree by chance."""
    open_gates(model)
    batch = without_labels(processor(*[s[:1] for s in samples]))
    ids = batch["input_ids"]
    uncached = model(**batch).logits
    split = ids.shape[1] - 4
    videos = {"pixel_values": batch["pixel_values"], "num_frames": batch["num_frames"]}
    first = model(input_ids=ids[:, :split], **videos, use_cache=True)
    later = model(input_ids=ids[:, split:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, later], dim=1), uncached, atol=2e-5, rtol=1e-4)


def test_attention_kernels_get_neither_masks_nor_empty_sequences(model, processor, samples):
    """What flash attention cannot take, run with a reference kernel; samples of one length are attended to at once."""
    calls = []

    def kernel(module, query, key, value, mask, *, scaling, is_causal, **_):
        assert mask is None
        assert not is_causal
        assert query.shape[2]
        assert key.shape[2]
        calls.append(len(query))
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2), None

    open_gates(model)
    batch = processor(*samples)
    loss = model(**batch).loss
    ALL_ATTENTION_FUNCTIONS.register("flash_reference", kernel)
    branches = [b for x in model.modules() if isinstance(x, DualCrossAttentionLayer) for b in (x.v2v, x.t2v)]
    for branch in branches:
        branch.config = type(branch.config)(**branch.config.to_dict())
        branch.config._attn_implementation_internal = "flash_reference"
    torch.testing.assert_close(model(**batch).loss, loss)
    assert set(calls) == {1}
    model(**processor([conversation("Why?", "red", video=False)], [[]])).loss.backward()
    calls.clear()
    model(**processor(*[[s[0], s[0]] for s in samples]))
    assert set(calls) == {2}


def test_every_parameter_gets_a_gradient_even_without_frames(model, processor):
    open_gates(model, 0.5)
    model.train()
    model(**processor([conversation("What is red?", "a colour", video=False)], [[]])).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.zero_grad()
    model(**processor([conversation("What is red?", "a colour")], [[random_frames(4)]])).loss.backward()
    assert [n for n, p in model.named_parameters() if not p.grad.any() and "k_proj.bias" not in n] == []


def test_checkpointed_layers_give_the_same_gradients(model, processor, samples):
    open_gates(model)
    batch = processor(*samples)
    model.train()
    model(**batch).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_loss_is_the_mean_over_the_assistant_tokens(model, processor, samples):
    batch = processor(*samples)
    logits = model(**without_labels(batch)).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(model(**batch).loss, expected)


def test_state_dict_keys_of_the_decoder_do_not_change(model):
    bare = AutoModelForCausalLM.from_config(model.config.text_config)
    ours = model.language_model.state_dict().keys()
    assert bare.state_dict().keys() <= ours
    assert all(".v2v." in key or ".t2v." in key for key in ours - bare.state_dict().keys())


@torch.no_grad()
def test_auto_classes_save_and_load_the_same_logits(model, processor, samples, tmp_path):
    open_gates(model)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".safetensors", ".json", ".jinja", ".py"}
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is CrossLMMForConditionalGeneration
    batch = without_labels(AutoProcessor.from_pretrained(tmp_path)(*samples))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_pretrained_decoder_weights_are_loaded(config, processor, tmp_path, family):
    language = config.model.language | {"model_type": family, "head_dim": 32}
    if family != "qwen3":
        language.pop("head_dim")
    published = AutoModelForCausalLM.from_config(
        CrossLMMConfig(text_config=language, cross_attention_every=2).text_config
    )
    published.save_pretrained(tmp_path)
    ours = ModelConfig(**config.model.model_dump() | {"language": language, "language_weights": str(tmp_path)})
    built = build_model(ours, processor, seed=1).eval()
    ids = processor.tokenizer("What is red?", return_tensors="pt").input_ids
    assert torch.equal(built(input_ids=ids).logits, published.eval()(input_ids=ids).logits)


def test_bad_configuration_weights_and_inputs_are_refused(config, model, processor, tmp_path):
    with pytest.raises(BadConfig, match=r"model: .*pool_stride is 7; a 6 x 6 grid takes 1 to 6"):
        build_model(config.model.model_copy(update={"pool_stride": 7}), processor, 0)
    with pytest.raises(BadConfig, match=r"cross_attention_every is 5; a decoder of 4 layers takes 1 to 4"):
        build_model(config.model.model_copy(update={"cross_attention_every": 5}), processor, 0)
    for family, reason in {"gemma2": "only full attention", "olmo2": "fits layers with exactly"}.items():
        other = {"language": config.model.language | {"model_type": family}}
        with pytest.raises(BadConfig, match=f"model: .*{reason}"):
            build_model(config.model.model_copy(update=other), processor, 0)
    typo = config.model.model_copy(update={"vision": config.model.vision | {"hiden_size": 1}})
    with pytest.raises(BadConfig, match=r"model\.vision\.hiden_size: no such field"):
        build_model(typo, processor, 0)
    nowhere = {"language_weights": str(tmp_path / "nowhere")}
    with pytest.raises(BadConfig, match=r"model\.language_weights: .*nowhere cannot be loaded"):
        build_model(config.model.model_copy(update=nowhere), processor, 0)
    build_model(config.model, processor, 0).language_model.save_pretrained(tmp_path / "narrow")
    wide = {"language": config.model.language | {"hidden_size": 256}, "language_weights": str(tmp_path / "narrow")}
    with pytest.raises(BadConfig, match=r"narrow cannot be loaded: its \S+ is \(\d+.*the configuration asks for \(\d+"):
        build_model(config.model.model_copy(update=wide), processor, 0)
    with pytest.raises(ValueError, match=r"the encoder takes uint8 \(frames, 3, 48, 48\)"):
        model.encode(torch.zeros(1, 3, 40, 48, dtype=torch.uint8))
    batch = processor([conversation("What?", "it")], [[random_frames(2)]])
    with pytest.raises(
        ValueError, match="sample 0: the text has 8 video placeholders, but 1 frames of 4 tokens need 4"
    ):
        model(**batch | {"pixel_values": batch["pixel_values"][:1], "num_frames": torch.tensor([[1]]), "plan": None})


def test_weights_that_are_missing_or_left_over_are_refused(config, processor, tmp_path):
    trained = build_model(config.model, processor, 0)
    trained.save_pretrained(tmp_path / "trained")
    trained.language_model.save_pretrained(tmp_path / "decoder")
    start = {"init_from": str(tmp_path / "trained")}
    shallow = {"language": config.model.language | {"num_hidden_layers": 3}}
    for changes in (
        start | {"v2v": False},
        start | {"cross_attention_every": 3},
        start | shallow,
        shallow | {"cross_attention_every": 0, "language_weights": str(tmp_path / "trained")},
    ):
        with pytest.raises(BadConfig, match=r"it has \d+ weights|it lacks \d+ weights|cannot be loaded"):
            build_model(config.model.model_copy(update=changes), processor, 0)
    # A stage may add a branch that the stage before did not have.
    build_model(config.model.model_copy(update={"v2v": False}), processor, 0).save_pretrained(tmp_path / "t2v")
    build_model(config.model.model_copy(update={"init_from": str(tmp_path / "t2v")}), processor, 0)
