"""What one training process does: one FSDP rank, from the last checkpoint to the exported model."""

import functools
import itertools
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from crosslmm import storage
from crosslmm.config import to_yaml
from crosslmm.data.collate import Sample, collate, collate_for_validation, mask_unreadable, micro_batches
from crosslmm.data.dataset import BlockLayout, prefetch, unpack_block
from crosslmm.data.quarantine import ErrorBudget
from crosslmm.encode.recipe import require_encoder
from crosslmm.inference.answerer import CONFIG
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train import checkpoint, loop
from crosslmm.train.checkpoint import Saver
from crosslmm.train.job import TRAIN, VALIDATION, Job
from crosslmm.train.optim import build_optimizer
from crosslmm.train.parallel import parallelize
from crosslmm.train.watchdog import Watchdog, stacks_name

LISTEN_EVERY_S = 1.0
"""How often a rank asks whether it is to stop [s]."""


class Stopped(Exception):
    """The workers took a checkpoint and ended, for they were told to: the job was stopped, or a node is taken away."""


def train(loop_config: dict[str, Any]) -> None:
    """One training process: one FSDP rank.

    Raises:
        Stopped: before the last step, with a checkpoint of all that was done.
    """
    job: Job = loop_config["job"]
    config = job.config
    rank = dist.get_rank()
    attempt = [secrets.token_hex(4)]
    watchdog = Watchdog(config.watchdog, functools.partial(_hand_over_stacks, job, rank, attempt))
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=job.collectives_s))
    dist.broadcast_object_list(attempt, src=0, group=group)
    watchdog.peers = _peers(group)
    processor = build_processor(config.model)
    process = functools.partial(processor, features=(job.recipe.patches, job.recipe.width) if job.recipe else None)

    def tell(line: str) -> None:
        job.events.post.remote("message", line)

    with checkpoint.newest(job.folder, group, tell) as found:
        first_step = found[0].step if found else 0
        if rank == 0:
            ray.get(job.events.set_first_step.remote(first_step))
        # The data starts while the model is built.
        batches = _batches(job, processor, process, first_step)

        def build(weights: bool) -> CrossLMMForConditionalGeneration:
            # A checkpoint overwrites published weights, so a resume does not fetch them.
            built = build_model(config.model, processor, config.seed, weights and found is None)
            if weights and found is None and job.recipe:
                require_encoder(built, job.recipe, str(config.data.features))
            return built

        model = parallelize(build, config.train, ray.train.torch.get_device())
        optimizer = build_optimizer(model, config.train)
        if found:
            checkpoint.load(found[1], found[0], model, optimizer)
    if rank == 0:
        job.events.post.remote("started", (first_step, sum(p.numel() for p in model.parameters())))

    saver = Saver(job.folder, config, attempt[0], group, tell)
    around = _WorkerCallbacks(
        job, model, optimizer, processor, process, saver, watchdog, found[0].metrics if found else {}
    )
    done = loop.train(config, model, optimizer, batches, range(first_step, job.total_steps), around)
    watchdog.enter("checkpoint")
    saver.close()
    if done < job.total_steps:
        watchdog.close()
        raise Stopped(f"after step {done}")
    watchdog.enter("checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.export(Path(folder), model, processor)
        if rank == 0:
            (Path(folder) / CONFIG).write_text(to_yaml(config))
            storage.upload(folder, storage.join(job.folder, "model"))
    dist.barrier(group)
    watchdog.close()


class _WorkerCallbacks(loop.Callbacks):
    """The loop's surroundings in a Ray Train worker."""

    def __init__(
        self,
        job: Job,
        model: CrossLMMForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        processor: CrossLMMProcessor,
        process: Any,
        saver: Saver,
        watchdog: Watchdog,
        validation: loop.Metrics,
    ) -> None:
        self.job, self.model, self.optimizer, self.saver = job, model, optimizer, saver
        self.processor, self.process = processor, process
        self.rank = dist.get_rank()
        self.enter = watchdog.enter  # type: ignore[method-assign]
        self._validation = validation
        self._history: list[str] = []
        self._told_to_stop = threading.Event()
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def _listen(self) -> None:
        """Ask whether the job is being stopped, or a node of ours taken away. Ray's question is asked of all ranks
        together, so it has a thread of its own beside the steps."""
        while not self._told_to_stop.wait(LISTEN_EVERY_S):
            if ray.train.get_preemption_info() or (self.rank == 0 and ray.get(self.job.events.stop_requested.remote())):
                self._told_to_stop.set()

    def wanted(self) -> bool:
        return self._told_to_stop.is_set()

    def log(self, step: int, metrics: loop.Metrics) -> None:
        if self.rank == 0:
            now = time.time()
            self.job.events.post.remote("step", (step, now, metrics))
            self._history.append(json.dumps({"step": step, "time": now, "metrics": metrics}) + "\n")

    def save(self, step: int) -> None:
        self.saver.save(step, self.model, self.optimizer, self._validation, self._history)
        self._history = []

    def validate(self) -> loop.Metrics:
        if self.job.validation_rows is None:
            return {}
        samples = _samples(self.job, VALIDATION, self.job.validation(dist.get_world_size()))
        batches = prefetch(samples, lambda s: collate_for_validation(s, self.process))
        self._validation = loop.validate(self.job.config, self.model, self.processor, batches)
        return self._validation

    def not_finite(self, step: int, ids: list[str], grad_norm: float) -> None:
        if self.rank == 0:
            name = f"not_finite/step-{step:08d}.json"
            said = {"step": step, "grad_norm": str(grad_norm), "ids": ids}
            storage.write_bytes(storage.join(self.job.folder, name), json.dumps(said).encode())
            line = f"step {step}: the gradient's norm is {grad_norm}; {name} in the run's folder names its samples"
            self.job.events.post.remote("message", line)


def _hand_over_stacks(job: Job, rank: int, attempt: list[str], phase: str, text: str) -> None:
    name = stacks_name(attempt[0], phase, rank)
    job.events.post.remote("message", f"worker {rank}: {text.splitlines()[0]}; its stacks are in {name} of the run")
    storage.write_bytes(storage.join(job.folder, name), text.encode())


def _peers(group: dist.ProcessGroup) -> dict[int, int]:
    """Process ids of the ranks of this machine, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), os.getpid()), group=group)
    return {rank: pid for rank, (host, pid) in enumerate(everyone) if host == socket.gethostname()}


def _batches(job: Job, processor: CrossLMMProcessor, process: Any, first_step: int) -> Iterator[loop.StepBatch]:
    """This rank's part of each step from `first_step` on."""
    train, device = job.config.train, ray.train.torch.get_device()

    def length_of(sample: Sample) -> int:
        (messages,), (videos,), _ = mask_unreadable([sample])
        return processor.length(messages, [len(video) for video in videos])

    def collate_step(samples: list[Sample]) -> loop.StepBatch:
        micro = micro_batches(samples, train.micro_batch_size, train.micro_batch_tokens, length_of)
        return loop.StepBatch(
            [loop.pinned(collate(part, process), device) for part in micro], [sample.id for sample in samples]
        )

    layout = job.training(first_step, dist.get_world_size())
    # One step's frames are held while those of the step before are trained on.
    return prefetch(_samples(job, TRAIN, layout), collate_step, depth=1)


def _samples(job: Job, name: str, layout: BlockLayout) -> Iterator[list[Sample]]:
    """This rank's samples, a step at a time, checked to be the ones that are due."""
    rank, data = dist.get_rank(), job.config.data
    tally = ErrorBudget(data.max_bad_share, data.bad_allowed)
    blocks = ray.train.get_dataset_shard(name).iter_batches(batch_size=1, prefetch_batches=2)
    stream = itertools.chain.from_iterable(map(unpack_block, blocks))
    for first in range(0, layout.steps * layout.samples_per_rank, layout.samples_per_rank):
        due = layout.rank_positions(rank, first + np.arange(layout.samples_per_rank)).tolist()
        samples = list(itertools.islice(stream, layout.samples_per_rank))
        if [sample.position for sample in samples] != due:
            raise RuntimeError(
                f"the data delivered places {[s.position for s in samples]} of the run where {due} were due"
            )
        bad = [entry for sample in samples for entry in sample.quarantined]
        for entry in bad:
            job.events.post.remote("unreadable", {"split": name, **entry})
        tally.record([sample.manifest for sample in samples], bad)
        yield samples
