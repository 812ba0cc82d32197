"""RunConfig -> data, model and loop in Ray Train workers -> checkpoints and an exported model in storage."""

import functools
import itertools
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.data import Dataset, ExecutionOptions
from ray.train import Checkpoint, CheckpointConfig, DataConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import BatchFeature

from crosslmm import storage
from crosslmm.answer import CONFIG
from crosslmm.config import BadConfig, RunConfig, to_yaml
from crosslmm.data.collate import Sample, collate, collate_for_validation, micro_batches, readable
from crosslmm.data.features import REMEDY, DType, Features, Recipe
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.order import Order
from crosslmm.data.pipeline import Layout, ahead, block_rows, build_dataset, to_samples
from crosslmm.data.quarantine import Tally
from crosslmm.data.sampling import Sampling
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.encoder import digest
from crosslmm.model.pretrained import build_config, build_model, build_processor
from crosslmm.train import checkpoint, loop
from crosslmm.train.optim import build_optimizer
from crosslmm.train.parallel import parallelize

TRAIN, VALIDATION = "train", "validation"
# What Ray says about itself is for its own log files; a failure reaches the terminal as our one line.
QUIET = {
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of a configuration mean the same in a trial of a sweep.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


class TrainingFailed(Exception):
    """The run ended before its last step; the message is one line with the first cause."""


@dataclass(frozen=True)
class Job:
    """A run, with everything decided that its workers must agree upon. Travels to all of them."""

    config: RunConfig
    folder: str
    """The run's own folder in storage."""
    total_steps: int
    order: Order
    rows: ray.ObjectRef
    lengths: np.ndarray | None
    """About how many tokens each row is, where micro-batches are counted in tokens."""
    validation_order: Order | None
    validation_rows: ray.ObjectRef | None
    image_size: int
    features: ray.ObjectRef | None
    """`Features` that are read instead of videos."""
    recipe: Recipe | None
    """How they were made."""
    board: Any
    """Actor handle of the `Board`."""

    def training(self, first_step: int) -> Layout:
        """What is left of the run after `first_step` steps."""
        steps = self.total_steps - first_step
        rows = block_rows(self.config.data, self.image_size, self.recipe)
        return Layout(self.order, self.config.scaling.num_workers, first_step, steps, rows, self.lengths)

    def validation(self) -> Layout:
        """Validation's "steps" are rounds in which every rank takes one micro-batch."""
        assert self.validation_order is not None
        rounds = self.validation_order.steps_per_epoch
        rows = self.config.train.micro_batch_size
        return Layout(self.validation_order, self.config.scaling.num_workers, 0, rounds, rows)


@ray.remote(num_cpus=0)
class Board:
    """Where workers pin their news and the driver reads them. Posting costs a worker next to nothing."""

    def __init__(self) -> None:
        self.news: list[tuple[str, Any]] = []

    def post(self, kind: str, item: Any) -> None:
        """Pin one piece of news."""
        self.news.append((kind, item))

    def take(self) -> list[tuple[str, Any]]:
        """All news since the last call, in order."""
        news, self.news = self.news, []
        return news


def start_ray() -> None:
    """Connect to the cluster at hand (RAY_ADDRESS, or the one of this job), or start one on this machine."""
    if not ray.is_initialized():
        # Of a cluster started here: trials beside one another are more processes than its cores, which Ray remarks on.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env={"env_vars": QUIET})


def check_placement(config: RunConfig) -> None:
    """Refuse what the cluster, autoscaled to its limit, could never place: Ray would wait for ever without a word.

    Raises:
        BadConfig: naming the keys, what they ask for and what there is.
    """
    scaling = config.scaling
    need, limit = resources(config), cluster_limit()
    cpus, gpus, pools = need["CPU"], need["GPU"], _pools(config)
    if gpus > limit.get("GPU", 0):
        raise BadConfig(
            f"scaling.num_workers: {gpus} workers need {gpus} GPUs, and the cluster has {limit.get('GPU', 0):g}; "
            "lower it, or train on CPUs with scaling.use_gpu false"
        )
    if cpus > limit.get("CPU", 0) + 1e-6:
        raise BadConfig(
            f"scaling: num_workers {scaling.num_workers} x cpus_per_worker {scaling.cpus_per_worker:g} + "
            f"{pools} x decode_workers {scaling.decode_workers} x cpus_per_decode_worker "
            f"{scaling.cpus_per_decode_worker:g} = {cpus:g} CPUs, "
            f"and the cluster has {limit.get('CPU', 0):g}; lower one of them"
        )
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if not _autoscaled_limit() and scaling.cpus_per_worker > max(nodes):
        raise BadConfig(
            f"scaling.cpus_per_worker: no node has {scaling.cpus_per_worker:g} CPUs; the largest has {max(nodes):g}"
        )


def resources(config: RunConfig) -> dict[str, float]:
    """CPUs and GPUs that a run holds, its decoders included."""
    scaling = config.scaling
    cpus = scaling.num_workers * scaling.cpus_per_worker
    cpus += _pools(config) * scaling.decode_workers * scaling.cpus_per_decode_worker
    return {"CPU": cpus, "GPU": scaling.num_workers if scaling.use_gpu else 0}


def cluster_limit() -> dict[str, float]:
    """What the cluster has, scaled up to its limit."""
    return _autoscaled_limit() or ray.cluster_resources()


def _autoscaled_limit() -> Any:
    return ray._private.state.state.get_max_resources_from_cluster_config()


def _pools(config: RunConfig) -> int:
    """Validation decodes beside training's own decoders."""
    return 2 if config.data.validation_manifest else 1


def open_features(config: RunConfig, rows: Rows) -> Features | None:
    """The features that a run reads instead of videos, if it does.

    Args:
        config: the run.
        rows: of training and validation.

    Raises:
        BadConfig: they were made otherwise than the run would make them, or not of all its videos.
    """
    if config.data.features is None:
        return None
    features = Features(config.data.features)
    features.require(recipe_of(config, encoder="", dtype="bf16"), rows.videos())
    return features


def recipe_of(config: RunConfig, encoder: str, dtype: DType) -> Recipe:
    """How the features of a run's videos are made, by an encoder of this digest."""
    model = build_config(config.model)
    vision = model.vision_config
    return Recipe.of(
        config.data,
        vision.image_size,
        config.train.precision,
        model.patches_per_frame,
        vision.hidden_size,
        encoder,
        dtype,
    )


def require_encoder(model: CrossLMMForConditionalGeneration, recipe: Recipe, folder: str) -> None:
    """Whether features were made by this model's own encoder.

    Raises:
        BadConfig: by another one.
    """
    if digest(model.vision_tower) != recipe.encoder:
        raise BadConfig(f"data.features: {folder} was made by another encoder than this run's; {REMEDY}")


def prepare(
    config: RunConfig, manifests: list[Manifest], validation: Manifest | None, features: Features | None
) -> Job:
    """Decide what workers must agree upon, and hand the rows to Ray."""
    train, data = config.train, config.data
    order = Order(
        tuple(len(manifest) for manifest in manifests),
        train.global_batch_size,
        config.seed,
        tuple(data.manifests.values()),
    )
    steps = train.epochs * order.steps_per_epoch
    at_once = train.micro_batch_size * config.scaling.num_workers
    model = build_config(config.model)
    sampling = Sampling(data.num_frames, data.sampling, data.fps)
    lengths = [
        manifest.lengths(sampling, model.tokens_per_frame) for manifest in manifests * bool(train.micro_batch_tokens)
    ]
    return Job(
        config=config,
        folder=storage.join(config.storage, str(config.name)),
        total_steps=min(steps, train.max_steps or steps),
        order=order,
        rows=ray.put(Rows(manifests)),
        lengths=np.concatenate(lengths) if lengths else None,
        validation_order=Order((len(validation),), at_once, None) if validation else None,
        validation_rows=ray.put(Rows([validation])) if validation else None,
        image_size=model.vision_config.image_size,
        features=ray.put(features) if features else None,
        recipe=features.recipe if features else None,
        board=Board.remote(),  # type: ignore[attr-defined]
    )


def fit(job: Job) -> None:
    """Train in Ray Train workers, from the run's last checkpoint if it has one. Blocks until the end.

    Raises:
        TrainingFailed: with the first worker's error.
    """
    config = job.config
    filesystem, path = storage.arrow_filesystem(storage.absolute(config.storage))
    datasets: dict[str, Any] = {TRAIN: lambda: _training_data(job)}
    if job.validation_rows:
        datasets[VALIDATION] = lambda: _validation_data(job)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker}
            | ({"GPU": 1} if config.scaling.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            worker_runtime_env={"env_vars": QUIET},  # type: ignore[call-arg]
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {-1: getattr(error, "controller_failure", error)}
        rank, cause = next(iter(failures.items()))
        where = f"worker {rank}: " if rank >= 0 else ""
        raise TrainingFailed(f"{where}{type(cause).__name__}: {' '.join(str(cause).split())[:500]}") from error


def _training_data(job: Job) -> Dataset:
    """What is left of the run. Runs in Train's controller at every start of the workers."""
    scaling = job.config.scaling
    layout = job.training(_committed_step(job))
    return build_dataset(
        layout,
        job.rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
    )


def _validation_data(job: Job) -> Dataset:
    assert job.validation_rows is not None
    scaling = job.config.scaling
    return build_dataset(
        job.validation(),
        job.validation_rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
    )


def _committed_step(job: Job) -> int:
    """The step of the checkpoint that Train is about to hand to the workers: the latest in its own snapshot."""
    filesystem, path = storage.arrow_filesystem(storage.absolute(job.folder))
    snapshot = f"{path}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(snapshot).type == pyarrow.fs.FileType.NotFound:
        return 0
    with filesystem.open_input_stream(snapshot) as file:
        latest = json.loads(file.read())["latest_checkpoint_result"]
    return int(latest["metrics"]["step"]) if latest else 0


def _worker(loop_config: dict[str, Any]) -> None:
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
