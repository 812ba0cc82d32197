"""One training process: one FSDP rank, from the last checkpoint to the exported model."""

import contextlib
import functools
import itertools
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from crosslmm import scoring, storage
from crosslmm.config import ScalingConfig, to_yaml
from crosslmm.data import thumbnails
from crosslmm.data.collate import (
    Made,
    Question,
    Sample,
    collate,
    collate_for_validation,
    make_batch,
    mask_blank,
    micro_batches,
)
from crosslmm.data.dataset import BlockLayout, prefetch, unpack_block
from crosslmm.data.quarantine import ErrorBudget
from crosslmm.data.sampler import PADDING
from crosslmm.encode.recipe import require_encoder
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.adapters.base import Base, open_base
from crosslmm.model.adapters.lora import require_open_gates
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.loading import build_model, build_processor
from crosslmm.run_folder import MODEL_CONFIG_FILE, MODEL_FOLDER, NON_FINITE_FOLDER, log_uri
from crosslmm.storage.shipped_log import ShippedLog, output_files
from crosslmm.text import in_brief
from crosslmm.train import loop
from crosslmm.train.checkpoint.export import export, write_card
from crosslmm.train.checkpoint.read import read_base, read_newest
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.checkpoint.seals import Checkpoint
from crosslmm.train.checkpoint.state import load_state
from crosslmm.train.distributed.collectives import broadcast_json, gather_json
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.events import forward_logs
from crosslmm.train.job import TRAIN, VALIDATION, Job
from crosslmm.train.optim import build_optimizer
from crosslmm.train.watchdog import Watchdog, stacks_name

log = logging.getLogger(__name__)

SAMPLE_ANSWERS, SAMPLE_CHARACTERS = 16, 500
"""Answers of each validation that the record shows [answers], and what it shows of each text [characters]."""
LISTEN_INTERVAL_S = 1.0
"""Pause between two checks of whether a rank is to stop [s]."""


class Stopped(Exception):
    """The workers saved a checkpoint and ended because the job is stopped, or a node is taken away."""


def train(train_loop_config: dict[str, Any]) -> None:
    """Run one training process: one FSDP rank, from the last checkpoint to the exported model.

    Args:
        train_loop_config: {"job": `Job`}, as Ray Train passes it.

    Raises:
        Stopped: before the last step, with a checkpoint of all steps done.
    """
    job: Job = train_loop_config["job"]
    rank = dist.get_rank()
    with contextlib.ExitStack() as stack:
        # What the package logs goes to the driver; this is what anything else writes, such as NCCL or a crash.
        for number, path in enumerate(output_files()):
            stack.enter_context(ShippedLog(path, log_uri(job.folder, f"rank-{rank:05d}", number)))
        _train(job, rank)


def _train(job: Job, rank: int) -> None:
    config = job.config
    forward_logs(job.events, rank)
    # Each rank's own token at first: the watchdog may report a hang before rank 0 has broadcast the common one.
    attempt = [secrets.token_hex(4)]
    watchdog = Watchdog(config.watchdog, functools.partial(_report_hang, job, rank, attempt))
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=job.collective_timeout_s))
    attempt[0] = broadcast_json(attempt[0], group)
    watchdog.peers = _local_peers(group)
    processor = build_processor(config.model, config.data)
    process = functools.partial(processor, features=(job.recipe.patches, job.recipe.width) if job.recipe else None)

    shards = _count_shards(config.scaling)
    newest, state = read_newest(job.folder, group, shards) or (None, {})
    first_step = newest.step if newest else 0
    if rank == 0:
        ray.get(job.events.set_first_step.remote(first_step))
    # Data loading starts here and goes on while the model is built.
    batches = _batches(job, processor, process, first_step)

    model, base = _build_sharded(job, processor, newest, ray.train.torch.get_device(), shards)
    optimizer = build_optimizer(model, config.train)
    if newest:
        load_state(state, model, optimizer)
        state.clear()
    leave_out_closed_branches(model)
    if rank == 0:
        job.events.post.remote("started", (first_step, *_count_parameters(model), dist.get_world_size()))

    def sealed(step: int, when: float) -> None:
        job.events.post.remote("sealed", (step, when))

    saver = Saver(job.folder, config, attempt[0], group, base, sealed, job.fence.require)
    with StopListener(job.events, rank) as listener:
        callbacks = _WorkerCallbacks(
            job, model, optimizer, processor, process, saver, watchdog, listener, newest.metrics if newest else {}
        )
        done = loop.train(config, model, optimizer, batches, range(first_step, job.total_steps), callbacks)
    watchdog.enter("checkpoint")
    saver.close()
    if done < job.total_steps:
        watchdog.close()
        raise Stopped(f"after step {done}")
    watchdog.enter("checkpoint")
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), model, processor, config.train.lora, base and base.located(job.folder))
        if rank == 0:
            job.fence.require()
            (Path(folder) / MODEL_CONFIG_FILE).write_text(to_yaml(config))
            if not config.train.adapted:
                write_card(Path(folder), model, config, job.folder, done, callbacks.validation)
            storage.upload(folder, storage.join(job.folder, MODEL_FOLDER))
    dist.barrier(group)
    watchdog.close()


def _count_shards(scaling: ScalingConfig) -> int:
    """Return the number of shards of the model for the workers there are; rank 0 logs it if the setting has another."""
    workers, wanted = dist.get_world_size(), scaling.workers_per_replica
    shards = scaling.shards(workers)
    if wanted not in (None, shards) and not dist.get_rank():
        log.warning(
            "scaling.workers_per_replica is %s, and there are %s workers: %s of them hold one copy of the model",
            wanted, workers, shards,
        )  # fmt: skip
    return shards


def _count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Return the number of parameters, and of those among them that are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _build_sharded(
    job: Job, processor: CrossLMMProcessor, newest: Checkpoint | None, device: torch.device, shards: int
) -> tuple[CrossLMMForConditionalGeneration, Base | None]:
    """Return the sharded model and, on rank 0 of a run that trains adapters, the model that they belong to."""
    config, base, model_config = job.config, None, job.config.model
    with contextlib.ExitStack() as stack:
        if config.train.adapted and dist.get_rank() == 0:
            recorded = read_base(newest) if newest else None
            base, model_config = stack.enter_context(open_base(config, job.folder, processor, recorded))

        def build(weights: bool) -> CrossLMMForConditionalGeneration:
            # A checkpoint overwrites published weights, so a resume does not fetch them; those of a base it does fetch,
            # since the checkpoint has only the adapters.
            model = build_model(model_config, processor, config.seed, weights and (newest is None or base is not None))
            if weights and newest is None:
                require_open_gates(model, config.train)
                if job.recipe:
                    require_encoder(model, job.recipe, str(config.data.features))
            return model

        return parallelize(build, config.train, device, shards), base


class StopListener:
    """Context manager whose thread checks whether the job is being stopped, or a node of the workers taken away.

    The thread survives errors of the channel and of Ray Train: it logs the first of a series, and checks again.

    Args:
        events: actor handle of the `EventChannel`.
        rank: this worker's; rank 0 asks the channel.
        interval_s: pause between two checks [s].
    """

    def __init__(self, events: Any, rank: int, interval_s: float = LISTEN_INTERVAL_S) -> None:
        self.events, self.rank, self.interval_s = events, rank, interval_s
        self._requested, self._closed = threading.Event(), threading.Event()
        self._failing: set[str] = set()

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="stop listener", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closed.set()

    def stop_requested(self) -> bool:
        """Return whether this rank is to stop."""
        return self._requested.is_set()

    def _listen(self) -> None:
        while not self._closed.wait(self.interval_s):
            # A collective of all ranks: in this thread, no step waits for it.
            stop = self._check("preemption", ray.train.get_preemption_info)
            if self.rank == 0:
                stop |= self._check("stop request", lambda: ray.get(self.events.stop_requested.remote()))
            if stop:
                self._requested.set()
                return

    def _check(self, what: str, check: Callable[[], Any]) -> bool:
        try:
            result = bool(check())
            self._failing.discard(what)
            return result
        except Exception as error:
            if what not in self._failing and not self._closed.is_set():
                log.warning("cannot check for a %s: %s; trying again", what, in_brief(error, 200))
            self._failing.add(what)
            return False


class _WorkerCallbacks(loop.Callbacks):
    """Connects the training loop to the run's storage, the driver and the watchdog."""

    def __init__(
        self,
        job: Job,
        model: CrossLMMForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        processor: CrossLMMProcessor,
        process: Any,
        saver: Saver,
        watchdog: Watchdog,
        listener: StopListener,
        validation: loop.Metrics,
    ) -> None:
        self.job, self.model, self.optimizer, self.saver = job, model, optimizer, saver
        self.processor, self.process = processor, process
        self.rank = dist.get_rank()
        self.enter = watchdog.enter  # type: ignore[method-assign]
        self.stop_requested = listener.stop_requested  # type: ignore[method-assign]
        self.validation = validation
        self._history: list[str] = []
        self._answers: list[dict[str, Any]] = []
        self._pictures: dict[int, bytes] = {}
        self._pictured: set[int] = set()

    def log(self, step: int, metrics: loop.Metrics) -> None:
        if self.rank == 0:
            if self.job.utilisation:
                metrics |= self.job.utilisation.at(metrics["frames_per_s"], dist.get_world_size())
            if self._answers:
                self.job.events.post.remote("answers", (step, self._answers, self._pictures))
                self._answers, self._pictures = [], {}
            now = time.time()
            self.job.events.post.remote("step", (step, now, metrics))
            self._history.append(json.dumps({"step": step, "time": now, "metrics": metrics}) + "\n")

    def save(self, step: int) -> None:
        self.saver.save(step, self.model, self.optimizer, self.validation, self._history)
        self._history = []

    def validate(self) -> loop.Metrics:
        if self.job.validation_rows is None:
            return {}
        new_tokens = self.job.config.train.max_new_tokens
        assert new_tokens is not None, "run_training sets it from the longest reference"
        layout = self.job.validation_layout(dist.get_world_size())
        require_room = functools.partial(self.processor.require_room, new_tokens=new_tokens)
        make = functools.partial(collate_for_validation, processor=self.process, require_room=require_room)
        batches = _prefetched(self.job, VALIDATION, layout, make)
        self._answers = []
        self.validation = loop.validate(self.model, self.processor, batches, new_tokens, self._keep_answer)
        return self.validation

    def _keep_answer(self, question: Question, answer: str) -> None:
        """Keep the first answers. While the number of workers is the same, they are to the same questions each time."""
        if len(self._answers) < SAMPLE_ANSWERS:
            right = scoring.is_right(answer, question.reference)
            texts = {"question": question.text, "reference": question.reference, "answer": answer}
            texts = {key: text[:SAMPLE_CHARACTERS] for key, text in texts.items()}
            self._answers.append({"row": question.position, "kind": question.kind, **texts, "right": right})
            self._keep_picture(question)

    def _keep_picture(self, question: Question) -> None:
        """Keep a picture of the frames, once for each sample; features show nothing."""
        if self.rank or self.job.recipe or question.position in self._pictured or not any(map(len, question.videos)):
            return
        self._pictures[question.position] = thumbnails.square(question.videos)
        self._pictured.add(question.position)

    def not_finite(self, step: int, ids: list[str], grad_norm: float) -> None:
        if self.rank == 0:
            name = f"{NON_FINITE_FOLDER}/step-{step:08d}.json"
            report = {"step": step, "grad_norm": str(grad_norm), "ids": ids}
            storage.write_bytes(storage.join(self.job.folder, name), json.dumps(report).encode())
            log.error(
                "step %s: the gradient's norm is %s; %s in the run's folder lists its samples",
                step, grad_norm, name, extra={"step": step},
            )  # fmt: skip


def _report_hang(job: Job, rank: int, attempt: list[str], phase: str, text: str) -> None:
    """Log a hang that the watchdog detected, and write the stacks into the run's folder."""
    name = stacks_name(attempt[0], phase, rank)
    log.error("worker %s: %s; its stacks are in %s in the run's folder", rank, text.splitlines()[0], name)
    storage.write_bytes(storage.join(job.folder, name), text.encode())


def _local_peers(group: dist.ProcessGroup) -> dict[int, int]:
    """Return the process ids of the ranks on this machine, by rank."""
    processes = gather_json((socket.gethostname(), os.getpid()), group)
    return {rank: pid for rank, (host, pid) in enumerate(processes) if host == socket.gethostname()}


def _batches(job: Job, processor: CrossLMMProcessor, process: Any, first_step: int) -> Iterator[loop.StepBatch]:
    """Yield this rank's share of each step from `first_step` on."""
    train, device = job.config.train, ray.train.torch.get_device()

    def length_of(sample: Sample) -> int:
        (messages,), (videos,), (times,), _ = mask_blank([sample])
        return processor.length(messages, [len(video) for video in videos], times=times)

    def collate_step(samples: list[Sample]) -> loop.StepBatch:
        micro = micro_batches(samples, train.micro_batch_size, train.micro_batch_tokens, length_of)
        return loop.StepBatch(
            [loop.pinned(collate(part, process), device) for part in micro],
            [sample.id for sample in samples if sample.position != PADDING],
        )

    layout = job.training_layout(first_step, dist.get_world_size())
    # Collates the next step while this one is trained on.
    return _prefetched(job, TRAIN, layout, collate_step, depth=1)


def _prefetched(
    job: Job, name: str, layout: BlockLayout, make: Callable[[list[Sample]], Made], depth: int = 2
) -> Iterator[Made]:
    """Yield what `make` makes of this rank's samples, a step at a time, and report the unreadable ones among them.

    Raises:
        TooManyUnreadable: see `ErrorBudget`.
    """
    budget = ErrorBudget(job.config.data.max_bad_share, job.config.data.bad_allowed)

    def make_step(samples: list[Sample]) -> Made:
        samples, made = make_batch(samples, make)
        unreadable = [entry for sample in samples for entry in sample.quarantined]
        for entry in unreadable:
            job.events.post.remote("unreadable", {"split": name, **entry})
        for sample in samples:
            if sample.shortfalls:
                job.events.post.remote("short", (sample.manifest, sample.line, sample.id, sample.shortfalls))
        budget.record([sample.manifest for sample in samples if sample.position != PADDING], unreadable)
        return made

    return prefetch(_samples(job, name, layout), make_step, depth)


def _samples(job: Job, name: str, layout: BlockLayout) -> Iterator[list[Sample]]:
    """Yield this rank's samples, a step at a time.

    Raises:
        RuntimeError: the data delivers other samples than the run's order expects.
    """
    rank = dist.get_rank()
    blocks = ray.train.get_dataset_shard(name).iter_batches(batch_size=1, prefetch_batches=2)
    stream = itertools.chain.from_iterable(map(unpack_block, blocks))
    for first in range(0, layout.steps * layout.samples_per_rank, layout.samples_per_rank):
        expected = layout.rank_positions(rank, first + np.arange(layout.samples_per_rank)).tolist()
        samples = list(itertools.islice(stream, layout.samples_per_rank))
        if [sample.position for sample in samples] != expected:
            raise RuntimeError(
                f"the data delivered positions {[s.position for s in samples]} of the run's order instead of {expected}"
            )
        yield samples
