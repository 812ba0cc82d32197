"""Predict the peak memory of a training step and of an answer, from a trace on the meta device."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from crosslmm.config import RunConfig
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import fsdp_units
from crosslmm.model.recomputation import checkpoint_activations
from crosslmm.model.vision_encoder import ChunkedEncoderLayer
from crosslmm.planning.cost import TEXT, VIDEO, check_lengths, meta_model, training_model
from crosslmm.planning.meta_trace import Trace, trace

FLOAT32 = 4
"""Size of a float32 [bytes]."""
MOMENTS = 2
"""Moments that AdamW stores per parameter: of the gradient and of its square."""
ROOT = -1
"""Key of the parameters that belong to no FSDP unit, which FSDP gathers with the root module."""


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
        sharded: sharded with FSDP, as `scaling` has it; False: a single process without FSDP.
    """
    return _Layout.of(training_model(config), config, sharded).training(traced)


def answering_memory(config: RunConfig, frames: int, text_tokens: int, stamp_tokens: int = 0) -> Memory:
    """Predict the peak memory of answering one conversation: one device, unsharded, `train.precision`, with a cache.

    Raises:
        BadConfig: see `training_trace`.
    """
    model = meta_model(config.model)
    check_lengths(model, frames, text_tokens, stamp_tokens)
    model.eval()
    batch = _batch(model, 1, frames, text_tokens, stamp_tokens)
    with torch.no_grad():
        traced = _trace(model, config, batch, lambda: model(**batch, use_cache=True, logits_to_keep=1).past_key_values)
    highest = traced.peak(with_kept=True)
    return Memory(
        weights=sum(p.numel() for p in model.parameters()) * compute_bytes(config),
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


def compute_bytes(config: RunConfig) -> int:
    """Return the size of a parameter in the precision of the computation [bytes]."""
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


@dataclass(frozen=True)
class _Layout:
    """Numbers of parameters per FSDP unit, from which the memory follows [elements]."""

    weights: int
    trainable: int
    root: int
    root_trainable: int
    largest_unit: int
    largest_unit_trainable: int
    shards: int
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
            shards=config.scaling.planned_shards if sharded else 1,
            accumulates=config.accumulation > 1,
            sharded=sharded,
            compute_bytes=compute_bytes(config),
        )

    def training(self, traced: Trace) -> Memory:
        """Return the larger of two peaks: during the backward pass, and at its end. The optimizer's step is fused, and
        needs no memory of its own."""
        weights = FLOAT32 * self.weights // self.shards
        moments = MOMENTS * FLOAT32 * self.trainable // self.shards
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
        """Gradients during the backward pass [bytes]: the shard, and the unit that is being reduced."""
        shard = FLOAT32 * self.trainable // self.shards
        if not self.sharded:
            return shard
        in_flight = self.compute_bytes * (self.root_trainable + self.largest_unit_trainable)
        return shard + in_flight + 2 * FLOAT32 * self.largest_unit_trainable

    @property
    def _gradients_at_the_end(self) -> int:
        """Gradients at the end of the backward pass [bytes], when those of the root are reduced in one piece."""
        if not self.sharded:
            return FLOAT32 * self.trainable
        reduced = FLOAT32 * self.trainable // self.shards
        return reduced + (self.compute_bytes + FLOAT32) * self.root_trainable
