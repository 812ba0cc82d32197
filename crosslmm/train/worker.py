"""What one training process does: one FSDP rank, from the last checkpoint to the exported model."""

import functools
import itertools
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from transformers import BatchFeature

from crosslmm import storage
from crosslmm.answer import CONFIG
from crosslmm.config import to_yaml
from crosslmm.data.collate import Sample, collate, collate_for_validation, micro_batches, readable
from crosslmm.data.pipeline import Layout, ahead, to_samples
from crosslmm.data.quarantine import Tally
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.pretrained import build_model, build_processor
from crosslmm.train import checkpoint, loop
from crosslmm.train.job import Job, require_encoder
from crosslmm.train.optim import build_optimizer
from crosslmm.train.parallel import parallelize

TRAIN, VALIDATION = "train", "validation"


def train(loop_config: dict[str, Any]) -> None:
    """One training process: one FSDP rank."""
    job: Job = loop_config["job"]
    config = job.config
    rank = dist.get_rank()
    torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
    processor = build_processor(config.model)
    device = ray.train.torch.get_device()
    resumed = ray.train.get_checkpoint()

    def build(weights: bool) -> CrossLMMForConditionalGeneration:
        # A checkpoint overwrites published weights, so a resume does not fetch them.
        built = build_model(config.model, processor, config.seed, weights and resumed is None)
        if weights and resumed is None and job.recipe:
            require_encoder(built, job.recipe, str(config.data.features))
        return built

    model = parallelize(build, config.train, device)
    process = functools.partial(processor, features=(job.recipe.patches, job.recipe.width) if job.recipe else None)
    optimizer = build_optimizer(model, config.train)
    first_step = 0
    if resumed:
        with resumed.as_directory() as folder:
            first_step = checkpoint.load(Path(folder), model, optimizer)
    if rank == 0:
        job.board.post.remote("started", (first_step, sum(p.numel() for p in model.parameters())))

    def log(step: int, metrics: loop.Metrics) -> None:
        if rank == 0:
            job.board.post.remote("step", (step, time.time(), metrics))

    attempt = [secrets.token_hex(2)]
    dist.broadcast_object_list(attempt, src=0)

    def save(step: int) -> None:
        folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
        checkpoint.save(folder, model, optimizer, step, config)
        # An interrupted upload leaves files behind, so another attempt gets a folder of its own.
        name = f"step-{step:08d}-{attempt[0]}"
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=name,
            delete_local_checkpoint_after_upload=True,
        )

    def validate() -> loop.Metrics:
        layout = job.validation()
        batches = ahead(_samples(job, VALIDATION, layout), lambda s: collate_for_validation(s, process))
        return loop.validate(config, model, processor, batches)

    def length_of(sample: Sample) -> int:
        (messages,), (videos,), _ = readable([sample])
        return processor.length(messages, [len(video) for video in videos])

    def collate_step(samples: list[Sample]) -> list[BatchFeature]:
        micro = micro_batches(samples, config.train.micro_batch_size, config.train.micro_batch_tokens, length_of)
        return [collate(part, process) for part in micro]

    # One step's frames are held while those of the step before are trained on.
    batches = ahead(_samples(job, TRAIN, job.training(first_step)), collate_step, depth=1)
    loop.train(
        config,
        model,
        optimizer,
        batches,
        range(first_step, job.total_steps),
        log=log,
        save=save,
        validate=validate if job.validation_rows else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.export(Path(folder), model, processor)
        if rank == 0:
            (Path(folder) / CONFIG).write_text(to_yaml(config))
            storage.upload(folder, storage.join(job.folder, "model"))
    dist.barrier()


def _samples(job: Job, name: str, layout: Layout) -> Iterator[list[Sample]]:
    """This rank's samples, a step at a time, checked to be the ones that are due."""
    rank, data = dist.get_rank(), job.config.data
    tally = Tally(data.max_bad_share, data.bad_allowed)
    blocks = ray.train.get_dataset_shard(name).iter_batches(batch_size=1, prefetch_batches=2)
    stream = itertools.chain.from_iterable(map(to_samples, blocks))
    for first in range(0, layout.steps * layout.rank_rows, layout.rank_rows):
        due = layout.places_of(rank, first + np.arange(layout.rank_rows)).tolist()
        samples = list(itertools.islice(stream, layout.rank_rows))
        if [sample.place for sample in samples] != due:
            raise RuntimeError(
                f"the data delivered places {[s.place for s in samples]} of the run where {due} were due"
            )
        bad = [entry for sample in samples for entry in sample.bad]
        for entry in bad:
            job.board.post.remote("unreadable", {"split": name, **entry})
        tally.count([sample.manifest for sample in samples], bad)
        yield samples
