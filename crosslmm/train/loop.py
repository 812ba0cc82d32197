"""The optimizer step, the training loop, and validation. Needs torch.distributed, but neither Ray nor MLflow."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import BatchFeature

from crosslmm import scoring
from crosslmm.config import RunConfig
from crosslmm.data.collate import Question, ValidationBatch
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.attention_plan import IGNORED
from crosslmm.model.generation import greedy_answers
from crosslmm.train.distributed.collectives import gather_json
from crosslmm.train.distributed.frame_exchange import FrameExchange, even_loads
from crosslmm.train.optim import set_learning_rate

Metrics = dict[str, float]
Phase = Literal["start-up", "data", "step", "validation", "checkpoint"]

MAX_EMPTY_STEPS = 3
"""A run ends after this many steps in a row without a sample to learn from."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of an optimizer step."""

    micro: list[BatchFeature]
    """Micro-batches."""
    ids: list[str]
    """Ids of the samples in them."""


class Callbacks:
    """Callbacks of the training loop; a run overrides what it needs. All ranks call them at the same steps."""

    def enter(self, phase: Phase) -> None:
        """Note that a phase begins: the loop now waits for data, computes, validates or saves."""

    def stop_requested(self) -> bool:
        """Return whether this rank was asked to stop. All ranks stop after the step in which one of them was."""
        return False

    def log(self, step: int, metrics: Metrics) -> None:
        """Receive the number of steps done and the metrics of the last one."""

    def save(self, step: int) -> None:
        """Save a checkpoint after `step` steps; may return before it is written."""

    def validate(self) -> Metrics:
        """Return validation metrics; called every `validate_every` steps and at the end."""
        return {}

    def not_finite(self, step: int, ids: list[str], grad_norm: float) -> None:
        """Report a non-finite gradient norm.

        Args:
            step: number of the step, from 1.
            ids: the step's samples on all ranks.
            grad_norm: infinite or NaN.
        """


def train(
    config: RunConfig,
    model: CrossLMMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[StepBatch],
    steps: range,
    callbacks: Callbacks,
) -> int:
    """Train from step `steps.start` to `steps.stop`; every rank calls it and takes every step.

    Args:
        config: intervals, clipping, learning rates.
        model: sharded by `parallelize`.
        optimizer: made by `build_optimizer`.
        batches: this rank's share of each step, from step `steps.start` on.
        steps: optimizer steps to take; `steps.stop` is the length of the whole run.
        callbacks: see `Callbacks`.

    Returns:
        Number of steps done: `steps.stop`, or fewer if a stop was requested, in which case a checkpoint was saved.

    Raises:
        FloatingPointError: the gradient is not finite, and `train.not_finite` is stop.
        RuntimeError: the batches end before the steps.
        TooManyUnreadable: `MAX_EMPTY_STEPS` steps in a row have no labelled token on any rank.
    """
    empty_steps, saving_s, began = 0, 0.0, time.perf_counter()
    for step in steps:
        set_learning_rate(optimizer, step, steps.stop, config.train)
        if step > steps.start:  # waiting for the first samples is part of the start-up
            callbacks.enter("data")
        step_began = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError("the data ended before the last step")
        waited_s = time.perf_counter() - step_began
        callbacks.enter("step")
        metrics, stop = _train_step(config, model, optimizer, batch, step, step_began, waited_s, callbacks)
        empty_steps = 0 if metrics["labelled_tokens"] else empty_steps + 1
        if empty_steps == min(MAX_EMPTY_STEPS, steps.stop):
            raise TooManyUnreadable(
                f"{empty_steps} steps without a sample to learn from; the run's quarantine.jsonl says which rows could "
                "not be used, and the others had no answer within the decoder's context"
            )
        for group in optimizer.param_groups:
            metrics[f"lr/{group['component']}"] = group["lr"]
        metrics["checkpoint_share"] = saving_s / (time.perf_counter() - began)
        done, last = step + 1, step + 1 == steps.stop
        if last or done % config.train.validate_every == 0:
            callbacks.enter("validation")
            metrics |= callbacks.validate()
        callbacks.log(done, metrics)
        if last or stop or done % config.train.checkpoint_every == 0:
            callbacks.enter("checkpoint")
            saving_began = time.perf_counter()
            callbacks.save(done)
            saving_s += time.perf_counter() - saving_began
        if stop:
            return done
    return steps.stop


def _train_step(
    config: RunConfig,
    model: CrossLMMForConditionalGeneration,
    optimizer: torch.optim.Optimizer,
    batch: StepBatch,
    step: int,
    began: float,
    waited_s: float,
    callbacks: Callbacks,
) -> tuple[Metrics, bool]:
    """Take one optimizer step over the micro-batches of all ranks.

    Args:
        began: when the rank began to wait for the batch [`time.perf_counter` s].
        waited_s: how long it waited [s].

    Returns:
        Metrics, and whether any rank was asked to stop.
    """
    device = _device_of(model)
    _seed(config.seed, step)
    max_micro_batches = -(-config.train.global_batch_size // dist.get_world_size())
    labelled_tokens, frames_of_passes, stop = _exchange_counts(
        batch, callbacks.stop_requested(), max_micro_batches, device
    )
    # FSDP needs every rank in every pass: ranks with fewer micro-batches repeat their last one, without labels.
    repeated = len(frames_of_passes) - len(batch.micro)
    micro_batches = [*batch.micro, *(_without_labels(batch.micro[-1]) for _ in range(repeated))]
    exchanges = [
        FrameExchange.of_pass(frames_by_rank, dist.get_rank()) if config.train.balance_frames else None
        for frames_by_rank in frames_of_passes
    ]
    counts = _count(batch.micro, micro_batches, waited_s)
    loss = _accumulate_gradients(model, micro_batches, exchanges, labelled_tokens, device)
    norm = _clip_gradients(model, config.train.max_grad_norm)
    sums = torch.cat([loss[None], _on_device(counts, device)])
    dist.all_reduce(sums)
    # The host waits for the GPU here and in `_exchange_counts`, and nowhere else in a step.
    grad_norm, loss_sum, frames, tokens, padded_tokens, mean_wait_s = torch.stack([norm, *sums]).tolist()
    finite = math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    else:
        callbacks.not_finite(step + 1, _gather_ids(batch), grad_norm)
        if config.train.not_finite == "stop":
            raise FloatingPointError(f"the gradient's norm is {grad_norm}; the weights were left as they were")
    optimizer.zero_grad(set_to_none=True)

    seconds = time.perf_counter() - began
    # A non-finite value has no place in a curve.
    learning = {"loss": loss_sum, "grad_norm": grad_norm} if finite else {"skipped": 1.0}
    return {
        **learning,
        "labelled_tokens": float(labelled_tokens),
        "step_s": seconds - mean_wait_s,
        "frames_per_s": frames / seconds,
        "tokens_per_s": tokens / seconds,
        "padding_share": 1 - tokens / padded_tokens,
        "samples_per_s": config.train.global_batch_size / seconds,
        "data_wait_share": mean_wait_s / seconds,
        **_imbalance(frames_of_passes, config.train.balance_frames),
    }, stop


def _seed(seed: int, step: int) -> None:
    """Make all that a step draws, such as what dropout drops, depend on the run's seed, the step and the rank alone: a
    resume then repeats it without a stored random state."""
    digest = hashlib.sha256(f"{seed} {step} {dist.get_rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little"))


def _exchange_counts(
    batch: StepBatch, stop_requested: bool, max_micro_batches: int, device: torch.device
) -> tuple[int, list[tuple[int, ...]], bool]:
    """Exchange what all ranks have to know of the step; the host waits once.

    Args:
        max_micro_batches: largest number of micro-batches of a rank, to which counts are padded: ranks exchange tensors
            of one size.

    Returns:
        Labelled tokens of all ranks; for each pass, the frames that each rank has to encode (a pass is one micro-batch
        of each rank, and those with fewer repeat their last one); and whether any rank is to stop.
    """
    labelled = sum(int((micro["labels"][:, 1:] != IGNORED).sum()) for micro in batch.micro)
    frames = [len(micro["pixel_values"]) if "pixel_values" in micro else 0 for micro in batch.micro]
    frames += frames[-1:] * (max_micro_batches - len(frames))
    mine = _on_device(torch.tensor([[labelled, len(batch.micro), stop_requested, *frames]]), device)
    counts = torch.empty(dist.get_world_size(), mine.shape[1], dtype=torch.int64, device=device)
    dist.all_gather_single(counts, mine)
    labelled_by_rank, micro_batches, stops, *frames_of_passes = zip(*counts.tolist(), strict=True)
    return sum(labelled_by_rank), frames_of_passes[: max(micro_batches)], any(stops)


def _imbalance(frames_of_passes: list[tuple[int, ...]], balanced: bool) -> Metrics:
    """Return the frames that the most loaded rank encodes over the mean: all ranks wait for it in each pass. Without
    frames to encode (text, stored features), nothing."""
    loads = [even_loads(frames_by_rank) if balanced else frames_by_rank for frames_by_rank in frames_of_passes]
    total = sum(map(sum, loads))
    return {"frame_imbalance": sum(map(max, loads)) * dist.get_world_size() / total} if total else {}


def _accumulate_gradients(
    model: Any,
    micro_batches: list[BatchFeature],
    exchanges: list[FrameExchange | None],
    labelled_tokens: int,
    device: torch.device,
) -> torch.Tensor:
    """Add the gradients of all micro-batches; return this rank's part of the loss, whose sum over ranks is the loss.

    Every labelled token of the global batch has the same weight, whichever rank and micro-batch it is in.
    """
    world_size, divisor = dist.get_world_size(), max(labelled_tokens, 1)
    loss = torch.zeros((), device=device)
    model.train()
    for i, (micro, exchange) in enumerate(zip(micro_batches, exchanges, strict=True), start=1):
        # Gradients are reduced to shards after every micro-batch: otherwise each rank would keep the whole of them.
        # With hybrid sharding, replicas add up their gradients after the last micro-batch only.
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(i == len(micro_batches))
        # FSDP averages gradients over ranks, where the sum is needed: hence world_size.
        # The division happens here because FSDP in bf16 would round a divisor that is passed to the model.
        loss_rows = _on_device(_loss_rows(micro), device)
        inputs = micro.to(device, non_blocking=True)
        out = model(**inputs, frame_exchange=exchange, loss_rows=loss_rows, num_items_in_batch=1)
        part = out.loss * (world_size / divisor)
        part.backward()
        loss += part.detach() / world_size
    return loss


def _loss_rows(batch: BatchFeature) -> torch.Tensor:
    """Return the positions in the flattened batch, still on the host, whose next token has a label."""
    has_label = torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    return has_label.flatten().nonzero()[:, 0]


def _clip_gradients(model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm`; return their norm before that, over all ranks."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _gather_ids(batch: StepBatch) -> list[str]:
    """Return the ids of the step's samples on all ranks."""
    return list(itertools.chain.from_iterable(gather_json(batch.ids)))


def _count(batches: list[BatchFeature], with_repeated: list[BatchFeature], waited_s: float) -> torch.Tensor:
    """Return this rank's frames, tokens, tokens with padding, and part of the mean wait for data [s]; on the host, as
    the batches still are."""
    frames, tokens = (sum(int(micro[key].sum()) for micro in batches) for key in ("num_frames", "attention_mask"))
    padded_tokens = sum(micro["attention_mask"].numel() for micro in with_repeated)
    return torch.tensor([frames, tokens, padded_tokens, waited_s / dist.get_world_size()])


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device; neither waits for the other."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pinned(batch: BatchFeature, device: torch.device) -> BatchFeature:
    """Return the batch in pinned memory, from which a GPU copies while it computes; on a CPU, the batch itself."""
    if device.type != "cuda":
        return batch
    with torch.cuda.device(device):  # a thread starts on GPU 0, and would allocate a context there
        return BatchFeature({name: value.pin_memory() for name, value in batch.items()})


def _without_labels(batch: BatchFeature) -> BatchFeature:
    """Return the batch with all labels masked."""
    return BatchFeature({**batch, "labels": torch.full_like(batch["labels"], IGNORED)})


@torch.no_grad()
def validate(
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    batches: Iterable[ValidationBatch],
    max_new_tokens: int,
    answered: Callable[[Question, str], object] = lambda question, answer: None,
) -> Metrics:
    """Return the loss over all labelled tokens, and the accuracy of greedy answers, overall and by kind, with counts.

    Every rank calls it with the same number of batches. `answered` gets each of this rank's questions and its answer.
    """
    device = _device_of(model)
    sums = torch.zeros(2, device=device)
    outcomes: list[scoring.Outcome] = []
    model.eval()
    for batch in batches:
        labelled = (batch.inputs["labels"][:, 1:] != IGNORED).sum()
        loss_rows = _on_device(_loss_rows(batch.inputs), device)
        loss = model(**batch.inputs.to(device), loss_rows=loss_rows, num_items_in_batch=1).loss
        sums += torch.stack([loss, labelled.to(device)])
        outcomes += batch.unreadable
        # FSDP needs every rank in every forward pass, and ranks have different numbers of questions.
        for i in range(_largest_of_ranks(len(batch.questions), device)):
            questions = batch.questions[i] if i < len(batch.questions) else batch.idle
            # Ranks also finish their answers at different lengths.
            synced = dist.get_world_size() > 1
            answers = greedy_answers(model, processor, questions.prompts(), max_new_tokens, synced_gpus=synced)
            outcomes += questions.outcomes(answers)
            for question, answer in zip(questions.asked, answers, strict=False):
                answered(question, answer)
    dist.all_reduce(sums)
    score = scoring.score(itertools.chain.from_iterable(gather_json(outcomes)))
    return {"validation/loss": float(sums[0] / sums[1].clamp(min=1)), **score.metrics()}


def _largest_of_ranks(count: int, device: torch.device) -> int:
    """Return the largest of all ranks' numbers."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _device_of(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device
