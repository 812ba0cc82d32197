"""What a configuration costs: parameters, multiply-accumulates, memory. On the meta device: no weights, no numbers.

Letters: F frames, N patches of one frame, V pooled tokens of all frames, T text tokens, L = V + T.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from crosslmm.config import BadConfig, LearningRates, ModelConfig, RunConfig
from crosslmm.model.loading import build_config
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import COMPONENTS, component_of, freeze, fsdp_units
from crosslmm.model.vision_encoder import ChunkedEncoderLayer
from crosslmm.planning.meta_trace import Trace, trace

VIDEO, TEXT = 0, 1
"""Token ids of the sample that is traced: any two that differ."""


def empty_model(config: ModelConfig) -> CrossLMMForConditionalGeneration:
    """The model without weights.

    Raises:
        BadConfig: a model that cannot be built.
    """
    model_config = build_config(config, video_token_id=VIDEO)
    # flash-attn need not be installed here; what it holds and computes is what SDPA's flash kernels do.
    model_config._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
    try:
        with torch.device("meta"):
            return CrossLMMForConditionalGeneration(model_config)
    except ValueError as error:
        raise BadConfig(f"model: {error}") from error


def check_lengths(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int) -> None:
    """Whether the decoder takes such a sample.

    Raises:
        BadConfig: no frame, no text, or more positions than the decoder's context has.
    """
    if frames < 1 or text_tokens < 1:
        raise BadConfig(f"frames is {frames} and text_tokens is {text_tokens}; each must be at least 1")
    positions = frames * model.config.tokens_per_frame + text_tokens
    longest = model.config.text_config.max_position_embeddings
    if positions > longest:
        raise BadConfig(
            f"{frames} frames of {model.config.tokens_per_frame} tokens and {text_tokens} of text are {positions} "
            f"positions; the decoder takes {longest} (model.language.max_position_embeddings): "
            "fewer frames, or a larger model.pool_stride"
        )


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of each component; tied weights count once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def trainable(counts: dict[str, int], rates: LearningRates) -> int:
    """Parameters of the components with a learning rate above zero."""
    return sum(count for component, count in counts.items() if getattr(rates, component) > 0)


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates of one sample's prefill, with the logits of its text positions.

    The first four are the linear layers' (and the patch embedding's); their sum is what the paper's Table 6 and
    Figure 4 call FLOPs.
    """

    encoder: int
    projector: int
    decoder: int
    cross_attention: int
    attention_products: int
    """All score and value products: encoder, decoder (whole squares, nothing taken off for causality), V2V, T2V."""

    @property
    def linear(self) -> int:
        """Without the attention products."""
        return self.encoder + self.projector + self.decoder + self.cross_attention


def macs(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int) -> MACs:
    """Count over the model's own modules: each weight is used once a position that passes it.

    Pooling, norms, activations, rotary positions and softmax are left out: under 0.1 % of the linear layers.
    """
    linear, products = _counts(model, frames, text_tokens)
    return MACs(
        encoder=linear["vision"],
        projector=linear["projector"],
        decoder=linear["decoder"],
        cross_attention=linear["v2v"] + linear["t2v"],
        attention_products=products.total(),
    )


def encoder_macs(model: CrossLMMForConditionalGeneration, frames: int) -> int:
    """What of these the vision encoder takes, its attention products included."""
    linear, products = _counts(model, frames, text_tokens=1)
    return linear["vision"] + products["vision"]


def _counts(
    model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int
) -> tuple[Counter[str], Counter[str]]:
    """MACs by component: of linear layers (and the patch embedding), and of score and value products."""
    check_lengths(model, frames, text_tokens)
    patches, pooled = frames * model.config.patches_per_frame, frames * model.config.tokens_per_frame
    positions = pooled + text_tokens
    v2v_keys = model.config.patches_per_frame if model.config.v2v_scope == "frame" else patches
    # Of each kind of module: the positions that ask, those that are asked, and how many of these one of those sees.
    reach = {
        "vision": (patches, patches, model.config.patches_per_frame),
        "projector": (patches + pooled, 0, 0),
        "v2v": (pooled, patches, v2v_keys),
        "t2v": (text_tokens, patches, patches),
        "decoder": (positions, positions, positions),
    }
    linear: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        component, layer = component_of(name), name.rpartition(".")[2]
        asking, asked, seen = reach[component]
        times = text_tokens if layer == "lm_head" else asked if layer in ("k_proj", "v_proj") else asking
        linear[component] += module.weight.numel() * times
        if layer == "q_proj":
            products[component] += 2 * module.weight.shape[0] * asking * seen
    return linear, products


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment when most is held; the parts add up to `total`."""

    weights: int
    """Parameters: shards, and the units that are gathered at the time."""
    gradients: int
    optimizer: int
    """AdamW's two moments, and what its step needs beyond the room that activations have left."""
    activations: int
    """And temporaries, and the frames as they came."""
    logits: int
    """The most that they take; once they are gone, activations fill their room and are counted without it."""
    kv_caches: int
    """The decoder's, and the video's in the cross-attentions; none in training."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_trace(config: RunConfig, frames: int, text_tokens: int) -> Trace:
    """Run forward and backward of one micro-batch on the meta device.

    So checkpointing, frozen parts, chunks and freed tensors count as they are. The number of workers does not enter.

    Args:
        config: the run; its own `data.num_frames` is not asked.
        frames: of every sample.
        text_tokens: of every sample; all of them are labelled, the most that the loss can hold.

    Raises:
        BadConfig: a model that cannot be built, or does not take such a sample.
    """
    model = empty_model(config.model)
    check_lengths(model, frames, text_tokens)
    freeze(model, config.train.learning_rate)
    if config.train.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    batch = _batch(model, config.train.micro_batch_size, frames, text_tokens)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == VIDEO, -100)
    return _trace(model, config, batch, lambda: model(**batch, num_items_in_batch=1).loss.backward())


def training_memory(config: RunConfig, traced: Trace, sharded: bool = True) -> Memory:
    """The most that one worker holds in a training step.

    On top of the trace stand float32 weights, gradients and moments.

    Args:
        config: the run.
        traced: its `training_trace`.
        sharded: over `scaling.num_workers`, as `train.parallel` does it; False is one plain process.
    """
    model = empty_model(config.model)
    freeze(model, config.train.learning_rate)
    return _Layout.of(model, config, sharded).training(traced)


def answering_memory(config: RunConfig, frames: int, text_tokens: int) -> Memory:
    """The most that answering holds: one conversation, one device, the whole model in `train.precision`, a cache.

    Raises:
        BadConfig: as for `training_trace`.
    """
    model = empty_model(config.model)
    check_lengths(model, frames, text_tokens)
    model.eval()
    batch = _batch(model, 1, frames, text_tokens)
    with torch.no_grad():
        traced = _trace(model, config, batch, lambda: model(**batch, use_cache=True, logits_to_keep=1).past_key_values)
    highest = traced.peak(with_kept=True)
    return Memory(
        weights=sum(p.numel() for p in model.parameters()) * _compute_bytes(config),
        gradients=0,
        optimizer=0,
        # The caches are whole only at the end; at the highest moment others may hold their place.
        activations=sum(highest) - highest.logits - traced.kept_bytes,
        logits=highest.logits,
        kv_caches=traced.kept_bytes,
    )


def _batch(model: CrossLMMForConditionalGeneration, samples: int, frames: int, text_tokens: int) -> dict[str, Any]:
    """A micro-batch of equal samples, without padding: [video; text]."""
    side = model.config.vision_config.image_size
    pooled = frames * model.config.tokens_per_frame
    input_ids = torch.tensor([[VIDEO] * pooled + [TEXT] * text_tokens] * samples)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.empty(samples * frames, 3, side, side, dtype=torch.uint8, device="meta"),
        "num_frames": torch.tensor([[frames]] * samples),
    }


def _compute_bytes(config: RunConfig) -> int:
    return 2 if config.in_bf16 else 4


def _trace(
    model: CrossLMMForConditionalGeneration, config: RunConfig, batch: dict[str, Any], call: Callable[[], Any]
) -> Trace:
    if config.in_bf16:
        model.bfloat16()
    return trace(
        call,
        parameters=[*model.parameters(), *model.buffers()],
        inputs=[batch["pixel_values"]],
        vocabulary=model.config.text_config.vocab_size,
        fused_norm=config.scaling.use_gpu,
        alike=[layer for layer in model.vision_tower.encoder.layers if isinstance(layer, ChunkedEncoderLayer)],
    )


FLOAT32 = 4
"""Size of a float32 [bytes]."""
MOMENTS = 2
"""Moments that AdamW stores per parameter: of the gradient and of its square."""
ROOT = -1
"""Key of the parameters that belong to no FSDP unit, which FSDP gathers with the root module."""


@dataclass(frozen=True)
class _Layout:
    """Where parameters and what follows from them lie, in numbers of elements."""

    weights: int
    learning: int
    largest_group: int
    """Of the optimizer: its step holds one temporary for each of its elements."""
    root: int
    root_learning: int
    largest_unit: int
    largest_unit_learning: int
    workers: int
    accumulates: bool
    sharded: bool
    compute_bytes: int

    @classmethod
    def of(cls, model: CrossLMMForConditionalGeneration, config: RunConfig, sharded: bool) -> "_Layout":
        unit_of: dict[nn.Parameter, int] = {}
        for number, module in enumerate(fsdp_units(model)):
            for parameter in module.parameters():
                unit_of.setdefault(parameter, number)
        units: Counter[int] = Counter()
        units_learning: Counter[int] = Counter()
        groups: Counter[tuple[str, bool]] = Counter()
        for name, parameter in model.named_parameters():
            unit = unit_of.get(parameter, ROOT)
            units[unit] += parameter.numel()
            if parameter.requires_grad:
                units_learning[unit] += parameter.numel()
                groups[component_of(name), parameter.ndim >= 2] += parameter.numel()
        root, root_learning = units.pop(ROOT, 0), units_learning.pop(ROOT, 0)
        return cls(
            weights=root + units.total(),
            learning=root_learning + units_learning.total(),
            largest_group=max(groups.values()),
            root=root,
            root_learning=root_learning,
            largest_unit=max(units.values()),
            largest_unit_learning=max(units_learning.values(), default=0),
            workers=config.scaling.most_workers if sharded else 1,
            accumulates=config.accumulation > 1,
            sharded=sharded,
            compute_bytes=_compute_bytes(config),
        )

    def training(self, traced: Trace) -> Memory:
        """The highest of three moments: somewhere in the backward pass, at its end, in the optimizer's step."""
        weights = FLOAT32 * self.weights // self.workers
        moments = MOMENTS * FLOAT32 * self.learning // self.workers
        gradients = FLOAT32 * self.learning // self.workers
        temporaries = FLOAT32 * self.largest_group // self.workers
        highest = traced.peak(with_kept=not self.sharded and not self.accumulates)
        backward = Memory(
            weights=weights + self._gathered,
            gradients=(highest.kept if not self.sharded and not self.accumulates else self._gradients),
            optimizer=moments,
            activations=highest.other,
            logits=highest.logits,
            kv_caches=0,
        )
        end = weights + self._gathered_root + moments + self._gradients_at_the_end
        step = weights + moments + gradients + temporaries
        # What the later moments need beyond the first is given to the part that needs it.
        backward = replace(backward, gradients=backward.gradients + max(0, end - backward.total))
        return replace(backward, optimizer=backward.optimizer + max(0, step - backward.total))

    @property
    def _gathered(self) -> int:
        """FSDP2 holds the root from the first to the last moment; of the units the one at work, its flat copy, and
        the flat copy of the next."""
        return self._gathered_root + self.compute_bytes * 3 * self.largest_unit if self.sharded else 0

    @property
    def _gathered_root(self) -> int:
        return self.compute_bytes * self.root if self.sharded else 0

    @property
    def _gradients(self) -> int:
        """In the backward pass: the shards of all, and what is being reduced."""
        held = FLOAT32 * self.learning // self.workers
        if not self.sharded:
            return held
        in_flight = self.compute_bytes * (self.root_learning + self.largest_unit_learning)
        return held + in_flight + 2 * FLOAT32 * self.largest_unit_learning

    @property
    def _gradients_at_the_end(self) -> int:
        """The root's gradients are reduced last, as a whole."""
        if not self.sharded:
            return FLOAT32 * self.learning
        reduced = FLOAT32 * self.learning // self.workers
        return reduced + (self.compute_bytes + FLOAT32) * self.root_learning
