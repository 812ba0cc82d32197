"""Several videos and images in one conversation, long videos, and the options that the paper leaves open."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig, LlavaForConditionalGeneration

from crosslmm.model import modeling
from crosslmm.model.cross_attention import DualCrossAttentionLayer, _rotate
from crosslmm.model.loading import build_model
from tests.support.common import open_gates, random_frames
from tests.support.exports import save_exported

VIDEO, IMAGE = {"type": "video"}, {"type": "image", "image": "x.png"}


def text(words):
    return {"type": "text", "text": words}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def assistant(words):
    return {"role": "assistant", "content": words}


MIXED = [
    user(text("Look: "), VIDEO, text(" and "), IMAGE, text(" What is red?")),
    assistant("a circle"),
    user(text("And here? "), VIDEO, text("Which way?")),
]
MIXED_VIDEOS = [random_frames(3, 1), random_frames(1, 2), random_frames(2, 3)]
PLAIN = [user(VIDEO, text("Which shape is it?"))]
WORDS = [user(text("What is it?"))]


@pytest.fixture
def variant(config, processor):
    """A model with the given settings, and open gates."""

    def build(**settings):
        model = build_model(config.model.model_copy(update=settings), processor, seed=0).eval()
        open_gates(model)
        return model

    return build


def inputs(processor, *conversations, for_generation=True):
    talks, videos = zip(*conversations, strict=True)
    batch = processor(list(talks), list(videos), for_generation=for_generation)
    return {k: v for k, v in batch.items() if k != "labels"}


SETTINGS = [{}, {"v2v_scope": "frame"}, {"cross_attention_rotary": True}, {"attention": "eager"}]


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batch_of_mixed_conversations_equals_each_alone(variant, processor, settings):
    model = variant(**settings)
    talks = [(MIXED, MIXED_VIDEOS), (PLAIN, [random_frames(2, 4)]), (WORDS, [])]
    together = model(**inputs(processor, *talks)).logits
    for i, talk in enumerate(talks):
        alone = model(**inputs(processor, talk)).logits[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_cached_equals_uncached_token_by_token(variant, processor, settings):
    model = variant(**settings)
    prompts = inputs(processor, (MIXED, MIXED_VIDEOS), (PLAIN, [random_frames(2, 4)]), (WORDS, []))
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**prompts, **options)
    uncached = model.generate(**prompts, **options, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for with_cache, without in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(with_cache, without, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_text_attends_to_earlier_videos_only(variant, processor):
    model = variant()
    batch = inputs(processor, (MIXED, MIXED_VIDEOS))
    starts = (batch["input_ids"][0] == processor.video_token_id).int().diff().eq(1).nonzero()[:, 0] + 1
    assert len(starts) == 3
    reference = model(**batch).logits[0]
    for video, start in enumerate(starts.tolist()):
        changed = [random_frames(len(v), 9) if i == video else v for i, v in enumerate(MIXED_VIDEOS)]
        logits = model(**inputs(processor, (MIXED, changed))).logits[0]
        assert torch.equal(logits[:start], reference[:start])
        assert not torch.allclose(logits[-1], reference[-1], atol=1e-3)


def v2v_of_first_layer(model, batch, features=None):
    """What the first dual layer's V2V adds to each visual position, the originals replaced by `features`."""
    added = []
    layer = next(x for x in model.modules() if isinstance(x, DualCrossAttentionLayer))
    hook = layer.v2v.register_forward_hook(lambda m, args, out: added.append(out - args[0]))
    pooled_from = model.encode(batch["pixel_values"])
    calls = iter([pooled_from, features if features is not None else pooled_from])
    projector = model.projector.forward

    def replace(x):
        features = next(calls)
        return projector(x if x.shape[1] != features.shape[1] else features)

    model.projector.forward = replace
    try:
        model(**batch)
    finally:
        del model.projector.forward
        hook.remove()
    return added[0][batch["input_ids"] == model.config.video_token_id]


@torch.no_grad()
def test_v2v_scope_limits_attention_to_the_frame_or_the_video(variant, processor):
    talk = [user(VIDEO, VIDEO, text("What?"))]
    batch = inputs(processor, (talk, [random_frames(2, 1), random_frames(1, 2)]))
    for scope, reached in {"video": [True, True, False], "frame": [True, False, False]}.items():
        model = variant(v2v_scope=scope)
        features = model.encode(batch["pixel_values"])
        other = features.clone()
        other[0] += torch.randn_like(other[0])
        before, after = (v2v_of_first_layer(model, batch, f).view(3, -1) for f in (features, other))
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == reached


@torch.no_grad()
def test_frame_order_matters_only_with_rotary_positions(variant, processor):
    batch = inputs(processor, (PLAIN, [random_frames(3, 1)]))
    for rotary in (False, True):
        model = variant(cross_attention_rotary=rotary)
        features = model.encode(batch["pixel_values"])
        swapped = features[[1, 0, 2]]
        before, after = (v2v_of_first_layer(model, batch, f) for f in (features, swapped))
        assert torch.allclose(before, after, atol=1e-5) is not rotary


def test_rotary_products_depend_only_on_the_frame_distance():
    query, key = torch.randn(2, 1, 2, 1, 8, generator=torch.manual_seed(0)).unbind()
    at = [
        [(_rotate(query, torch.tensor([[q]])) * _rotate(key, torch.tensor([[k]]))).sum() for k in range(9)]
        for q in range(9)
    ]
    assert torch.allclose(at[2][5], at[5][8], atol=1e-5)
    assert not torch.allclose(at[2][5], at[2][6], atol=1e-3)
    assert torch.allclose(at[0][0], (query * key).sum(), atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest float tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        floats = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in floats]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("frames", [(80,), (80, 47)], ids=str)
def test_no_tensor_has_queries_times_keys_elements(variant, processor, frames):
    """80 frames: 320 queries on 2,880 patches would be 921,600 scores a head; forward and backward, ragged too."""
    model = variant(encoder_chunk=4).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    talks = [[*PLAIN, assistant("red")]] * len(frames)
    batch = processor(talks, [[random_frames(n, i)] for i, n in enumerate(frames)])
    with Largest() as largest:
        model(**batch).loss.backward()
    # The largest tensors are the pixels or a hidden state of all patches.
    padded = max(frames) * len(frames) * model.config.patches_per_frame
    allowed = max(batch["pixel_values"].numel(), padded * model.config.text_config.hidden_size)
    assert largest.elements <= allowed < padded * 320


@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoder_in_chunks_equals_the_encoder_at_once(variant, processor, checkpointing):
    batch = processor([[*PLAIN, assistant("red")]], [[random_frames(7, 1)]])
    gradients = []
    for chunk in (32, 3):
        model = variant(encoder_chunk=chunk).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_encoder_without_gradients_allocates_one_chunk(variant):
    model = variant(encoder_chunk=2)
    frames = torch.from_numpy(random_frames(40)).permute(0, 3, 1, 2).contiguous()
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad_(False)
    with Largest() as largest:
        features = model.encode(frames)
    assert not features.requires_grad
    assert largest.elements == features.numel()
    reference = variant(encoder_chunk=40).encode(frames)
    torch.testing.assert_close(features, reference)


def test_loss_in_chunks_equals_the_loss_at_once_in_less_memory(variant, processor, monkeypatch):
    long_answer = [*PLAIN, assistant("red circle " * 100)]
    batch = processor([long_answer], [[random_frames(1)]])
    labelled = int((batch["labels"] != -100).sum())
    results, largest = [], []
    for chunk in (1024, 16):
        monkeypatch.setattr(modeling, "LOSS_CHUNK", chunk)
        model = variant().train()
        with Largest() as record:
            loss = model(**batch).loss
            loss.backward()
        results.append((loss.detach(), model.get_output_embeddings().weight.grad))
        largest.append(record.elements)
    assert labelled > 100
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-4)
    assert largest[1] < labelled * 512 <= largest[0]


@torch.no_grad()
def test_stride_one_without_cross_attention_equals_llava(variant, processor):
    """Transformers' own Llava, with the same weights, on every patch."""
    model = variant(pool_stride=1, v2v=False, t2v=False)
    processor_of_all = type(processor)(processor.tokenizer, image_size=48, tokens_per_frame=36)
    config = model.config
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=config.vision_config,
            text_config=config.text_config,
            image_token_id=config.video_token_id,
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        )
    ).eval()
    llava.model.vision_tower.load_state_dict(model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(model.language_model.model.state_dict())
    llava.lm_head.load_state_dict(model.language_model.lm_head.state_dict())
    # Llava's projector has no LayerNorm, and it reads the encoder before its last one.
    llava.model.multi_modal_projector = torch.nn.Sequential(model.vision_tower.post_layernorm, model.projector)
    batch = inputs(processor_of_all, (PLAIN, [random_frames(3, 1)]))
    theirs = llava(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch["pixel_values"] / 127.5 - 1,
    ).logits
    ours = model(**batch).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_cross_attention_layers_can_be_listed(variant):
    model = variant(cross_attention_layers=[1, 2])
    dual = [i for i, x in enumerate(model.language_model.model.layers) if isinstance(x, DualCrossAttentionLayer)]
    assert dual == [1, 2]
    assert variant(cross_attention_layers=[]).config.dual_layers == []


@torch.no_grad()
def test_second_question_reuses_the_cached_video_and_talk(variant, processor, config, tmp_path, monkeypatch):
    from crosslmm.data.samples.clips import encode_clip
    from crosslmm.inference.answerer import Answerer

    model = variant()
    model.generation_config.max_length = None
    save_exported(tmp_path, model, processor, config)
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(encode_clip(np.repeat(random_frames(1, 5), 8, axis=0)))
    answerer = Answerer(tmp_path, device="cpu")
    encoded = []
    answerer.model.vision_tower.post_layernorm.register_forward_hook(lambda *_: encoded.append(1))
    conversation = answerer.start_conversation(str(clip))
    first = conversation.ask("Which shape is it?", max_new_tokens=6)
    assert first == answerer([str(clip)], ["Which shape is it?"], max_new_tokens=6)[0]
    encoded.clear()
    # The caller may edit an earlier answer; the cached part after the edit is dropped.
    conversation.messages[-1]["content"] = "a square"
    second = conversation.ask("What colour is it?", max_new_tokens=6)
    assert encoded == []
    prompt = processor([conversation.messages[:3]], [[conversation.video.images]], for_generation=True)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    uncached = answerer.model.generate(**prompt, **options)
    expected = processor.batch_decode(uncached.sequences[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert second == expected[0].strip()
    # Equal words may be chance; compare the decoder's cache of the conversation as well.
    for ours, theirs in zip(conversation._cached.cache.layers, uncached.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("branch", ["v2v", "t2v"])
def test_branch_equals_a_loop_over_positions(variant, processor, branch, rotary):
    """x + tanh(gate) * Attention, written out for each position with loops, for two videos of different lengths."""
    model = variant(cross_attention_rotary=rotary)
    open_gates(model, 0.7)
    talk = [user(VIDEO, text("What is it?"), VIDEO, text("And here?"))]
    batch = inputs(processor, (talk, [random_frames(2, 1), random_frames(3, 2)]))
    module = getattr(next(x for x in model.modules() if isinstance(x, DualCrossAttentionLayer)), branch)
    calls = []
    module.register_forward_hook(lambda m, args, out: calls.append((args[0][0], args[2], out[0])))
    model(**batch)
    ((x_LD, tokens_FPD, out_LD),) = calls
    is_video = batch["input_ids"][0] == processor.video_token_id
    heads, groups = module.config.num_attention_heads, module.num_key_value_groups
    frame, expected = -1 / 4, x_LD.clone()
    for position, x_D in enumerate(x_LD):
        frame += is_video[position].item() / 4
        if is_video[position] != (branch == "v2v") or frame < 0:
            continue
        shown = int(frame)
        video = (0, 2) if shown < 2 else (2, 5)
        first, last = video if branch == "v2v" else (0, video[1])
        time = shown - first if branch == "v2v" else last
        keys_SD = module.visual_norm(tokens_FPD[first:last]).flatten(0, 1)
        query = module.q_proj(module.query_norm(x_D)).view(1, heads, 1, -1)
        key, value = (
            p(keys_SD).view(1, len(keys_SD), heads // groups, -1).transpose(1, 2)
            for p in (module.k_proj, module.v_proj)
        )
        if rotary:
            query = _rotate(query, torch.tensor([[time]]))
            key = _rotate(key, torch.arange(len(keys_SD))[None] // 36)
        scores = (query @ key.repeat_interleave(groups, dim=1).transpose(2, 3)) * module.head_dim**-0.5
        attended = (scores.softmax(-1) @ value.repeat_interleave(groups, dim=1)).flatten()
        expected[position] = x_D + torch.tanh(module.gate) * module.o_proj(attended)
    assert not torch.equal(expected, x_LD)
    torch.testing.assert_close(out_LD, expected, atol=1e-5, rtol=1e-4)


def test_impossible_inputs_and_layers_are_refused(variant, processor):
    model = variant()
    batch = inputs(processor, (PLAIN, [random_frames(2, 1)]))
    cache = model(**batch, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="no further video can be added"):
        model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match="pixel_values are given without num_frames"):
        model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="3 frames of 4 tokens need 12"):
        model(**batch | {"num_frames": torch.tensor([[3]]), "plan": None})
    with pytest.raises(ValueError, match="num_frames adds up to 2, but 1 frames were given"):
        model(**batch | {"pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(RuntimeError, match="plan is of another batch"):
        model(**batch | {"num_frames": torch.tensor([[3]])})
    with pytest.raises(RuntimeError, match="plan is of another batch"):
        model(**batch | {"attention_mask": batch["attention_mask"] * (batch["input_ids"] != batch["input_ids"][0, -1])})
    with pytest.raises(RuntimeError, match="plan is of another batch"):
        model(**batch | {"input_ids": batch["input_ids"].flip(1)})
    too_long = {"input_ids": torch.ones(1, 2049, dtype=torch.int64)}
    with pytest.raises(
        ValueError, match=r"2049 positions, but the decoder takes 2048 .*pool_stride \(now 4 tokens/frame\)"
    ):
        model(**too_long)
    for wrong in ([3, 1], [1, 1], [4], [-1]):
        with pytest.raises(Exception, match=r"cross_attention_layers is .* ascending numbers from 0 to 3"):
            variant(cross_attention_layers=wrong)


def test_interleaved_images_take_memory_linear_in_their_number(variant, processor):
    """Each stretch of text sees all images before it; their keys are not copied for each."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *(x.numel() for x in tensors)])
            return out

    model = variant().train()
    largest = []
    for images in (16, 32, 64):
        parts = [part for i in range(images) for part in ({"type": "image"}, {"type": "text", "text": f"{i}"})]
        talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}]
        batch = processor([talk], [[random_frames(1, i) for i in range(images)]])
        with Largest() as recorded:
            model(**batch).loss.backward()
        largest.append(recorded.elements)
    assert largest[1] <= 2.01 * largest[0]
    assert largest[2] <= 2.01 * largest[1]
