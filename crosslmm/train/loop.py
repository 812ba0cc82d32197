"""The step and the loop. Knows torch.distributed; knows neither Ray nor MLflow, so it runs under pytest as it is."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import BatchFeature

from crosslmm.config import RunConfig
from crosslmm.data.collate import ValidationBatch
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.train.optim import set_learning_rate

Metrics = dict[str, float]

EMPTY_STEPS = 3
"""So many steps in a row without a readable sample end the run: that is no bad video, but no storage."""


def train(
    config: RunConfig,
    model: CrossLMMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[list[BatchFeature]],
    steps: range,
    *,
    log: Callable[[int, Metrics], None],
    save: Callable[[int], None],
    validate: Callable[[], Metrics] | None = None,
) -> None:
    """Train from step `steps.start` to `steps.stop`; every rank calls it, and every rank takes every step.

    Args:
        config: intervals, clipping, rates.
        model: sharded by `parallelize`.
        optimizer: made by `build_optimizer`.
        batches: this rank's micro-batches of each step, from step `steps.start` on.
        steps: optimizer steps to take; `steps.stop` is the whole run's length.
        log: takes the number of steps done and that step's metrics.
        save: takes the number of steps done.
        validate: called every `validate_every` steps and at the end.

    Raises:
        FloatingPointError: the gradient is not finite.
        RuntimeError: the batches end before the steps, or hold nothing that could be read.
    """
    empty = 0
    for step in steps:
        set_learning_rate(optimizer, step, steps.stop, config.train)
        began = time.perf_counter()
        micro = next(batches, None)
        if micro is None:
            raise RuntimeError("the data ended before the last step")
        metrics = _step(config, model, optimizer, micro, began)
        empty = 0 if metrics["labelled_tokens"] else empty + 1
        if empty == min(EMPTY_STEPS, len(steps)):
            raise RuntimeError(
                f"{empty} steps without a single readable sample: is the storage of the videos in reach?"
            )
        for group in optimizer.param_groups:
            metrics[f"lr/{group['component']}"] = group["lr"]
        done, last = step + 1, step + 1 == steps.stop
        if validate and (last or done % config.train.validate_every == 0):
            metrics |= validate()
        log(done, metrics)
        if last or done % config.train.checkpoint_every == 0:
            save(done)


def _step(
    config: RunConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    micro: list[BatchFeature],
    began: float,
) -> Metrics:
    """One optimizer step over the micro-batches of every rank; `began` is when this one began to wait for them [s]."""
    waited = time.perf_counter() - began
    device, world = _device_of(model), dist.get_world_size()

    labelled_here = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
    everyone = torch.empty(world, 2, dtype=torch.int64, device=device)
    dist.all_gather_single(everyone, torch.tensor([[labelled_here, len(micro)]], device=device))
    # Every labelled token of the whole global batch weighs the same, wherever it lies.
    labelled, most = int(everyone[:, 0].sum()), int(everyone[:, 1].max())
    divisor = max(labelled, 1)
    # FSDP needs every rank in every pass: those with fewer micro-batches pass their smallest again, without labels.
    passed = [*micro, *[_without_labels(micro[-1])] * (most - len(micro))]
    loss = torch.zeros((), device=device)
    model.train()
    for batch in passed:
        # Gradients are reduced with every micro-batch: those that waited for the last would be whole, in float32.
        # FSDP averages gradients over ranks; the sum is wanted.
        # Divided out here: FSDP in bf16 would round the divisor on its way into the model.
        part = model(**batch.to(device), num_items_in_batch=1).loss * (world / divisor)
        part.backward()
        loss += part.detach() / world
    clipped: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
    grad_norm = float(clipped.full_tensor())
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient's norm is {grad_norm}; the weights were left as they were")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    frames, tokens = (sum(int(b[key].sum()) for b in micro) for key in ("num_frames", "attention_mask"))
    room = sum(b["attention_mask"].numel() for b in passed)
    sums = torch.stack([loss, *torch.tensor([frames, tokens, room, waited / world], device=device)])
    dist.all_reduce(sums)
    loss_sum, frames_sum, tokens_sum, room_sum, wait = sums.tolist()
    seconds = time.perf_counter() - began
    return {
        "loss": loss_sum,
        "grad_norm": grad_norm,
        "labelled_tokens": float(labelled),
        "frames_per_s": frames_sum / seconds,
        "tokens_per_s": tokens_sum / seconds,
        "padding_share": 1 - tokens_sum / room_sum,
        "samples_per_s": config.train.global_batch_size / seconds,
        "data_wait_share": wait / seconds,
    }


def _without_labels(batch: BatchFeature) -> BatchFeature:
    return BatchFeature({**batch, "labels": torch.full_like(batch["labels"], -100)})


@torch.no_grad()
def validate(
    config: RunConfig,
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    batches: Iterable[ValidationBatch],
) -> Metrics:
    """Loss over all labelled tokens, and the share of greedy answers that match exactly, in all and by kind.

    Every rank calls it with the same number of batches.
    """
    device = _device_of(model)
    sums = torch.zeros(2, device=device)
    answers: list[tuple[str | None, bool]] = []
    model.eval()
    for batch in batches:
        labelled = (batch.inputs["labels"][:, 1:] != -100).sum()
        loss = model(**batch.inputs.to(device), num_items_in_batch=1).loss
        sums += torch.stack([loss, labelled.to(device)])
        # Ranks finish their answers at different lengths; FSDP needs all of them in every forward pass.
        tokens = model.generate(
            **batch.prompts.to(device),
            max_new_tokens=config.train.max_new_tokens,
            do_sample=False,
            synced_gpus=dist.get_world_size() > 1,
        )[:, batch.prompts["input_ids"].shape[1] :]
        said = processor.batch_decode(tokens, skip_special_tokens=True)
        for text, expected, kind in zip(said, batch.expected, batch.kinds, strict=True):
            if expected is not None:
                answers.append((kind, text.strip() == expected.strip()))
    dist.all_reduce(sums)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, answers)
    by_kind: dict[str | None, list[bool]] = defaultdict(list)
    for kind, right in (answer for rank in everyone for answer in rank):
        by_kind[kind].append(right)
    right = [r for answers_of_kind in by_kind.values() for r in answers_of_kind]
    return {
        "validation/loss": float(sums[0] / sums[1].clamp(min=1)),
        "validation/accuracy": sum(right) / max(len(right), 1),
        **{f"validation/accuracy/{kind}": sum(r) / len(r) for kind, r in by_kind.items() if kind is not None},
    }


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
