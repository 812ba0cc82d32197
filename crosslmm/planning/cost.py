"""Predict parameters, multiply-accumulates and memory of a configuration, on the meta device (without weights)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from crosslmm.config import BadConfig, LearningRates, ModelConfig, RunConfig
from crosslmm.model.adapters.lora import prepare_training
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.loading import build_config
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import COMPONENTS, component_of, fsdp_units
from crosslmm.model.recomputation import checkpoint_activations
from crosslmm.model.vision_encoder import ChunkedEncoderLayer
from crosslmm.planning.meta_trace import Trace, trace

VIDEO, TEXT = 0, 1
"""Token ids of the traced sample: video placeholder and text. Any two different ids work."""


def empty_model(config: ModelConfig) -> CrossLMMForConditionalGeneration:
    """Build the model on the meta device, without weights.

    Raises:
        BadConfig: the model cannot be built.
    """
    model_config = build_config(config, video_token_id=VIDEO)
    # flash-attn need not be installed here: SDPA's flash kernels compute and store the same.
    model_config._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
    try:
        with torch.device("meta"):
            return CrossLMMForConditionalGeneration(model_config)
    except ValueError as error:
        raise BadConfig(f"model: {error}") from error


def training_model(config: RunConfig) -> CrossLMMForConditionalGeneration:
    """Build the model on the meta device as a run trains it: with its adapters, and what does not learn frozen.

    Raises:
        BadConfig: the model cannot be built.
    """
    model = empty_model(config.model)
    prepare_training(model, config.train)
    return model


def positions_of(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0) -> int:
    """Return the length of a sample in the decoder [tokens]; `stamp_tokens` are those of a frame's time."""
    return frames * (model.config.tokens_per_frame + stamp_tokens) + text_tokens


def check_lengths(
    model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0
) -> None:
    """Raise BadConfig if a sample of `frames` and `text_tokens` is empty or exceeds the decoder's context.

    Raises:
        BadConfig: `frames` or `text_tokens` is below 1, or the sample is longer than the context.
    """
    if frames < 1 or text_tokens < 1:
        raise BadConfig(f"frames is {frames} and text_tokens is {text_tokens}; each must be at least 1")
    positions = positions_of(model, frames, text_tokens, stamp_tokens)
    longest = model.config.text_config.max_position_embeddings
    if positions > longest:
        raise BadConfig(
            f"{frames} frames of {model.config.tokens_per_frame + stamp_tokens} tokens and {text_tokens} of text are "
            f"{positions} "
            f"positions, but the decoder takes {longest} (model.language.max_position_embeddings): "
            "use fewer frames or a larger model.pool_stride"
        )


def longest_sample(config: RunConfig, text_tokens: int, stamp_tokens: int) -> tuple[int, int, int]:
    """Return frames, text tokens and tokens of a frame's time of the longest sample that the decoder takes: one of
    `data.num_frames` and `text_tokens`, or less where that is longer than its context.

    Raises:
        BadConfig: the model cannot be built.
    """
    model = empty_model(config.model)
    stamp_tokens = stamp_tokens if config.data.timestamps else 0
    room, of_frame = model.config.text_config.max_position_embeddings, model.config.tokens_per_frame + stamp_tokens
    frames = max(1, min(config.data.num_frames, (room - 1) // of_frame))
    return frames, max(1, min(text_tokens, room - frames * of_frame)), stamp_tokens


def parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each component; tied weights count once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def trainable(counts: dict[str, int], rates: LearningRates) -> int:
    """Count the parameters of the components whose learning rate is above zero."""
    return sum(count for component, count in counts.items() if getattr(rates, component) > 0)


def learning(config: RunConfig) -> int:
    """Count the parameters that a run trains.

    Raises:
        BadConfig: the model cannot be built.
    """
    return sum(parameter.numel() for parameter in training_model(config).parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates (MACs) of the prefill of one sample, with the logits of its text positions.

    The first four are of linear layers and the patch embedding; the paper's Table 6 and Figure 4 call their sum FLOPs.
    """

    encoder: int
    projector: int
    decoder: int
    cross_attention: int
    attention_products: int
    """Score and value products of the encoder, the decoder (without savings for causality), V2V and T2V."""

    @property
    def linear(self) -> int:
        """MACs without the attention products: the paper's measure."""
        return self.encoder + self.projector + self.decoder + self.cross_attention


def macs(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0) -> MACs:
    """Count the MACs of a prefill from the model's modules: each weight is used once per position that it processes.

    The times of frames (`stamp_tokens` each) are read by the decoder alone: no video is before them.
    Pooling, norms, activations, rotary positions and softmax are not counted: below 0.1 % of the linear layers.
    """
    linear, products = _counts(model, frames, text_tokens, stamp_tokens)
    return MACs(
        encoder=linear["vision"],
        projector=linear["projector"],
        decoder=linear["decoder"],
        cross_attention=linear["v2v"] + linear["t2v"],
        attention_products=products.total(),
    )


def encoder_macs(model: CrossLMMForConditionalGeneration, frames: int) -> int:
    """Count the MACs of the vision encoder, including its attention products."""
    linear, products = _counts(model, frames, text_tokens=1)
    return linear["vision"] + products["vision"]


def _counts(
    model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0
) -> tuple[Counter[str], Counter[str]]:
    """Count MACs by component: of linear layers (and the patch embedding), and of score and value products."""
    check_lengths(model, frames, text_tokens, stamp_tokens)
    patches, pooled = frames * model.config.patches_per_frame, frames * model.config.tokens_per_frame
    positions = positions_of(model, frames, text_tokens, stamp_tokens)
    v2v_keys = model.config.patches_per_frame if model.config.v2v_scope == "frame" else patches
    # By component: number of queries, number of keys, and number of keys that one query sees.
    sizes = {
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
        queries, keys, keys_per_query = sizes[component]
        times = text_tokens if layer == "lm_head" else keys if layer in ("k_proj", "v_proj") else queries
        linear[component] += module.weight.numel() * times
        if layer == "q_proj":
            products[component] += 2 * module.weight.shape[0] * queries * keys_per_query
    return linear, products


@dataclass(frozen=True)
class Memory:
    """Peak memory of one device, by part [bytes]. The parts add up to `total`."""

    weights: int
    """Parameters: the shards, and the FSDP units that are gathered at the peak."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    activations: int
    """Activations, temporaries, and the input frames."""
    logits: int
    """Peak size of the logits; activations that later reuse this memory are not counted again."""
    kv_caches: int
    """Caches of the decoder and of the cross-attentions; zero in training."""

    @property
    def total(self) -> int:
        """Peak memory [bytes]."""
        return sum(getattr(self, field.name) for field in fields(self))


def training_trace(config: RunConfig, frames: int, text_tokens: int, stamp_tokens: int = 0) -> Trace:
    """Trace forward and backward of one micro-batch on the meta device.

    The trace accounts for checkpointing, frozen components, chunks, freed tensors, and stored features, which need no
    encoder. It is independent of the number of workers.

    Args:
        config: the run; its `data.num_frames` is ignored.
        frames: frames of each sample.
        text_tokens: text tokens of each sample; all of them are labelled, the worst case for the loss.
        stamp_tokens: tokens of a frame's time; 0 without `data.timestamps`.

    Raises:
        BadConfig: the model cannot be built, or the sample does not fit its context.
    """
    model = training_model(config)
    check_lengths(model, frames, text_tokens, stamp_tokens)
    checkpoint_activations(model, config.train.checkpointing)
    if config.model.init_from is None:
        leave_out_closed_branches(model)
    model.train()
    batch = _batch(model, config.train.micro_batch_size, frames, text_tokens, stamp_tokens)
    if config.data.features:
        shape = len(batch.pop("pixel_values")), model.config.patches_per_frame, model.config.vision_config.hidden_size
        batch["features"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -text_tokens:] = TEXT
    return _trace(model, config, batch, lambda: model(**batch, num_items_in_batch=1).loss.backward())


def training_memory(config: RunConfig, traced: Trace, sharded: bool = True) -> Memory:
    """Predict the peak memory of one worker in a training step.

    It is that of the trace, plus weights, gradients and moments in float32.

    Args:
        config: the run.
        traced: the `training_trace` of the run.
        sharded: sharded with FSDP over `scaling.num_workers`; False: a single process without FSDP.
    """
    return _Layout.of(training_model(config), config, sharded).training(traced)


def answering_memory(config: RunConfig, frames: int, text_tokens: int, stamp_tokens: int = 0) -> Memory:
    """Predict the peak memory of answering one conversation: one device, unsharded, `train.precision`, with a cache.

    Raises:
        BadConfig: see `training_trace`.
    """
    model = empty_model(config.model)
    check_lengths(model, frames, text_tokens, stamp_tokens)
    model.eval()
    batch = _batch(model, 1, frames, text_tokens, stamp_tokens)
    with torch.no_grad():
        traced = _trace(model, config, batch, lambda: model(**batch, use_cache=True, logits_to_keep=1).past_key_values)
    highest = traced.peak(with_kept=True)
    return Memory(
        weights=sum(p.numel() for p in model.parameters()) * _compute_bytes(config),
        gradients=0,
        optimizer=0,
        # The caches reach full size only at the end; before that, activations may use the memory.
        activations=sum(highest) - highest.logits - traced.kept_bytes,
        logits=highest.logits,
        kv_caches=traced.kept_bytes,
    )


def _batch(
    model: CrossLMMForConditionalGeneration, samples: int, frames: int, text_tokens: int, stamp_tokens: int
) -> dict[str, Any]:
    """Return a micro-batch of equally long samples, [video; text], without padding."""
    side = model.config.vision_config.image_size
    frame = [TEXT] * stamp_tokens + [VIDEO] * model.config.tokens_per_frame
    input_ids = torch.tensor([frame * frames + [TEXT] * text_tokens] * samples)
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
        inputs=[batch["features" if "features" in batch else "pixel_values"]],
        vocabulary=model.config.text_config.vocab_size,
        fused_norm=config.scaling.use_gpu,
        identical_layers=[
            layer for layer in model.vision_tower.encoder.layers if isinstance(layer, ChunkedEncoderLayer)
        ],
    )


FLOAT32 = 4
"""Size of a float32 [bytes]."""
MOMENTS = 2
"""Moments that AdamW stores per parameter: of the gradient and of its square."""
ROOT = -1
"""Key of the parameters that belong to no FSDP unit, which FSDP gathers with the root module."""


@dataclass(frozen=True)
class _Layout:
    """Numbers of parameters per FSDP unit, from which the memory follows [elements]."""

    weights: int
    trainable: int
    root: int
    root_trainable: int
    largest_unit: int
    largest_unit_trainable: int
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
        units_trainable: Counter[int] = Counter()
        for parameter in model.parameters():
            unit = unit_of.get(parameter, ROOT)
            units[unit] += parameter.numel()
            if parameter.requires_grad:
                units_trainable[unit] += parameter.numel()
        root, root_trainable = units.pop(ROOT, 0), units_trainable.pop(ROOT, 0)
        return cls(
            weights=root + units.total(),
            trainable=root_trainable + units_trainable.total(),
            root=root,
            root_trainable=root_trainable,
            largest_unit=max(units.values()),
            largest_unit_trainable=max(units_trainable.values(), default=0),
            workers=config.scaling.most_workers if sharded else 1,
            accumulates=config.accumulation > 1,
            sharded=sharded,
            compute_bytes=_compute_bytes(config),
        )

    def training(self, traced: Trace) -> Memory:
        """Return the larger of two peaks: during the backward pass, and at its end. The optimizer's step is fused, and
        needs no memory of its own."""
        weights = FLOAT32 * self.weights // self.workers
        moments = MOMENTS * FLOAT32 * self.trainable // self.workers
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
        return replace(backward, gradients=backward.gradients + max(0, end - backward.total))

    @property
    def _gathered(self) -> int:
        """Gathered parameters [bytes].

        FSDP2 keeps the root gathered throughout, and of the other units the current one, its flat copy, and the flat
        copy of the next.
        """
        return self._gathered_root + self.compute_bytes * 3 * self.largest_unit if self.sharded else 0

    @property
    def _gathered_root(self) -> int:
        return self.compute_bytes * self.root if self.sharded else 0

    @property
    def _gradients(self) -> int:
        """Gradients during the backward pass [bytes]: all shards, and the unit that is being reduced."""
        shards = FLOAT32 * self.trainable // self.workers
        if not self.sharded:
            return shards
        in_flight = self.compute_bytes * (self.root_trainable + self.largest_unit_trainable)
        return shards + in_flight + 2 * FLOAT32 * self.largest_unit_trainable

    @property
    def _gradients_at_the_end(self) -> int:
        """Gradients at the end of the backward pass [bytes], when those of the root are reduced in one piece."""
        if not self.sharded:
            return FLOAT32 * self.trainable
        reduced = FLOAT32 * self.trainable // self.workers
        return reduced + (self.compute_bytes + FLOAT32) * self.root_trainable
