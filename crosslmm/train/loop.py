"""The step and the loop. Knows torch.distributed; knows neither Ray nor MLflow, so it runs under pytest as it is."""

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import BatchFeature

from crosslmm.config import RunConfig
from crosslmm.data.collate import ValidationBatch
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.train.optim import set_learning_rate

Metrics = dict[str, float]
Phase = Literal["start-up", "data", "step", "validation", "checkpoint"]

EMPTY_STEPS = 3
"""So many steps in a row without a readable sample end the run: that is no bad video, but no storage."""


@dataclass(frozen=True)
class StepBatch:
    """What one rank trains on in one optimizer step."""

    micro: list[BatchFeature]
    """Its micro-batches."""
    ids: list[str]
    """The samples in them, by which they are found again."""


class Callbacks:
    """What goes on around the loop; a run overrides what it needs. All ranks are called at the same steps."""

    def enter(self, phase: Phase) -> None:
        """The loop begins to wait for data, to compute, to save or to validate."""

    def wanted(self) -> bool:
        """Whether this rank was told to stop. All ranks stop after the step in which one of them was."""
        return False

    def log(self, step: int, metrics: Metrics) -> None:
        """Takes the number of steps done and the last one's metrics."""

    def save(self, step: int) -> None:
        """Takes the number of steps done; may return before the checkpoint is written."""

    def validate(self) -> Metrics:
        """Called every `validate_every` steps and at the end."""
        return {}

    def not_finite(self, step: int, ids: list[str], grad_norm: float) -> None:
        """Takes the number of the step, the samples of all ranks, and the gradient's norm, which is no number."""


def train(
    config: RunConfig,
    model: CrossLMMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[StepBatch],
    steps: range,
    around: Callbacks,
) -> int:
    """Train from step `steps.start` to `steps.stop`; every rank calls it, and every rank takes every step.

    Args:
        config: intervals, clipping, rates.
        model: sharded by `parallelize`.
        optimizer: made by `build_optimizer`.
        batches: this rank's part of each step, from step `steps.start` on.
        steps: optimizer steps to take; `steps.stop` is the whole run's length.
        around: is told of what happens, and tells when to stop.

    Returns:
        The number of steps done: `steps.stop`, or fewer where it was told to stop; a checkpoint was taken then.

    Raises:
        FloatingPointError: the gradient is not finite, and `train.not_finite` is stop.
        RuntimeError: the batches end before the steps, or hold nothing that could be read.
    """
    empty, saving_s, began = 0, 0.0, time.perf_counter()
    for step in steps:
        set_learning_rate(optimizer, step, steps.stop, config.train)
        if step > steps.start:  # the first samples belong to the start-up
            around.enter("data")
        asked = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError("the data ended before the last step")
        waited = time.perf_counter() - asked
        around.enter("step")
        metrics, stop = _step(config, model, optimizer, batch, step, asked, waited, around)
        empty = 0 if metrics["labelled_tokens"] else empty + 1
        if empty == min(EMPTY_STEPS, steps.stop):
            raise RuntimeError(
                f"{empty} steps without a single readable sample: is the storage of the videos in reach?"
            )
        for group in optimizer.param_groups:
            metrics[f"lr/{group['component']}"] = group["lr"]
        metrics["checkpoint_share"] = saving_s / (time.perf_counter() - began)
        done, last = step + 1, step + 1 == steps.stop
        if last or done % config.train.validate_every == 0:
            around.enter("validation")
            metrics |= around.validate()
        around.log(done, metrics)
        if last or stop or done % config.train.checkpoint_every == 0:
            around.enter("checkpoint")
            at = time.perf_counter()
            around.save(done)
            saving_s += time.perf_counter() - at
        if stop:
            return done
    return steps.stop


def _step(
    config: RunConfig,
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    number: int,
    began: float,
    waited: float,
    around: Callbacks,
) -> tuple[Metrics, bool]:
    """One optimizer step over the micro-batches of every rank -> its metrics, and whether any rank was told to stop.
    `began` is when it began to wait for them, and `waited` how long that took [s]."""
    device, world, micro = _device_of(model), dist.get_world_size(), batch.micro

    labelled_here = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
    everyone = torch.empty(world, 3, dtype=torch.int64, device=device)
    mine = torch.tensor([[labelled_here, len(micro), around.wanted()]], device=device)
    dist.all_gather_single(everyone, mine)
    # Every labelled token of the whole global batch weighs the same, wherever it lies.
    labelled, most, stop = int(everyone[:, 0].sum()), int(everyone[:, 1].max()), bool(everyone[:, 2].any())
    divisor = max(labelled, 1)
    # FSDP needs every rank in every pass: those with fewer micro-batches pass their smallest again, without labels.
    passed = [*micro, *[_without_labels(micro[-1])] * (most - len(micro))]
    loss = torch.zeros((), device=device)
    model.train()
    for part in passed:
        # Gradients are reduced with every micro-batch: those that waited for the last would be whole, in float32.
        # FSDP averages gradients over ranks; the sum is wanted.
        # Divided out here: FSDP in bf16 would round the divisor on its way into the model.
        share = model(**part.to(device, non_blocking=True), num_items_in_batch=1).loss * (world / divisor)
        share.backward()
        loss += share.detach() / world
    clipped: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
    grad_norm = float(clipped.full_tensor())
    finite = math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    else:
        ids: list[Any] = [None] * world
        dist.all_gather_object(ids, batch.ids)
        around.not_finite(number + 1, list(itertools.chain.from_iterable(ids)), grad_norm)
        if config.train.not_finite == "stop":
            raise FloatingPointError(f"the gradient's norm is {grad_norm}; the weights were left as they were")
    optimizer.zero_grad(set_to_none=True)

    frames, tokens = (sum(int(b[key].sum()) for b in micro) for key in ("num_frames", "attention_mask"))
    room = sum(b["attention_mask"].numel() for b in passed)
    sums = torch.stack([loss, *torch.tensor([frames, tokens, room, waited / world], device=device)])
    dist.all_reduce(sums)
    loss_sum, frames_sum, tokens_sum, room_sum, wait = sums.tolist()
    seconds = time.perf_counter() - began
    # What is no number has no place in a curve.
    learnt = {"loss": loss_sum, "grad_norm": grad_norm} if finite else {"skipped": 1.0}
    return {
        **learnt,
        "labelled_tokens": float(labelled),
        "step_s": seconds - wait,
        "frames_per_s": frames_sum / seconds,
        "tokens_per_s": tokens_sum / seconds,
        "padding_share": 1 - tokens_sum / room_sum,
        "samples_per_s": config.train.global_batch_size / seconds,
        "data_wait_share": wait / seconds,
    }, stop


def pinned(batch: BatchFeature, device: torch.device) -> BatchFeature:
    """A batch in memory from which this GPU copies while it computes; without one, the batch as it is."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # a thread begins on the first GPU of the machine, and would make itself room there
        return BatchFeature({name: value.pin_memory() for name, value in batch.items()})


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
