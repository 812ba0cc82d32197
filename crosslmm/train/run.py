"""What the driver process does: check, start, follow, record, register."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import yaml
from rich.console import Console

from crosslmm import run_folder, storage, tracking
from crosslmm.config import BadConfig, RunConfig, flatten, to_yaml, validate_run
from crosslmm.data.feature_cache import FeatureCache
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.encode.recipe import open_features
from crosslmm.inference.answerer import CONFIG
from crosslmm.model.loading import build_config, build_processor
from crosslmm.preflight import checks, connect, hardware, placement
from crosslmm.preflight.resolve import resolve_config
from crosslmm.train import launcher
from crosslmm.train.events import open_channel
from crosslmm.train.job import Job
from crosslmm.train.monitor import TrainingMonitor

FREE_TO_CHANGE = (
    "name", "storage", "accept_changes", "scaling.", "tracking.", "watchdog.",
    "model.attention", "model.encoder_chunk",
    "data.manifest", "data.validation_manifest", "data.features",  # known by what is in them
    "data.decode_timeout_s", "data.decode_memory_gib", "data.max_bad_share", "data.bad_allowed", "data.roots",
    "train.checkpoint_every", "train.keep_", "train.validate_every", "train.max_new_tokens", "train.not_finite",
    "train.micro_batch_", "train.activation_checkpointing",
)  # fmt: skip


@dataclass
class TrainingResult:
    """What a finished run leaves behind."""

    name: str
    run_id: str | None
    """The MLflow run; None while its record waits for MLflow."""
    model_uri: str
    """`models:/NAME@ALIAS`; of a trial, or while the record waits, the folder of the exported model."""
    steps: int
    samples: int
    """Samples that those steps took."""
    train_s: float
    """From the first step's start to the last step's end, over all attempts of this driver [s]."""
    metrics: dict[str, float]
    """The last step's."""


@dataclass(frozen=True)
class TrialContext:
    """What makes a run the part of a sweep: it is silent, and registers nothing."""

    run_id: str
    """The MLflow run that the sweep made for it."""
    report: Callable[[int, dict[str, float]], None]
    """Takes the number of steps done and their metrics, after each validation, when both are in the record (or its
    server is away)."""
    reported: int = 0
    """The last step that an earlier start reported. It may have been killed before it reported what lies in the run's
    folder with its checkpoints, and the run goes on behind them. What the folder has of steps that are taken again is
    reported twice."""


def run_training(config: RunConfig, trial: TrialContext | None = None) -> TrainingResult:
    """Train, record and register. Everything that can be wrong with the request is found before a worker starts.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        launcher.TrainingFailed: the run broke off; the same name resumes it.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=trial is not None)
    config = resolve_config(config)
    build_processor(config.model)
    manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    held_out = config.data.validation_manifest
    validation = Manifest(held_out, config.data.roots) if held_out else None
    connect.connect()
    placement.check_placement(config)
    if trial is None:
        checks.require_ready(config, manifests)
    computes_on = hardware.detect(config)
    config = hardware.resolve_auto(config, computes_on)
    features = open_features(config, Rows([*manifests, *([validation] if validation else [])]))
    job = build_job(config, manifests, validation, features)
    order = {
        "manifest": [manifest.digest for manifest in manifests],
        "shares": list(config.data.manifests.values()),
        "train.global_batch_size": config.train.global_batch_size,
        "seed": config.seed,
        # A resume does not see the first weights, by which features are known to be its own.
        "data.features": features.recipe.key if features else None,
    }
    _run_to_resume(config, job.folder, order)
    datasets = [_described(manifest, "training") for manifest in manifests]
    datasets += [_described(validation, "validation")] if validation else []
    run_folder.begin(config, job.folder, order, datasets, trial.run_id if trial else None)
    record = tracking.BackgroundSync(job.folder, config.tracking, functools.partial(console.print, markup=False))
    _announce(console, job, manifests, record, hardware.describe(config, computes_on))

    follower = TrainingMonitor(job, record, console, trial.report if trial else None)
    status, origin = "FAILED", None
    try:
        if trial:
            for step, metrics in run_folder.validations_after(job.folder, trial.reported):
                trial.report(step, metrics)
        follower.start()
        try:
            launcher.fit(job, follower.say)
        finally:
            follower.stop()
        if trial is None:
            origin = lineage(job.folder)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    except launcher.TrainingFailed as error:
        raise launcher.TrainingFailed(f"{error}; the same command with --name {config.name} resumes the run") from error
    finally:
        # Of a trial that is stopped the workers go first, as if they had failed.
        record.finish("KILLED" if follower.stopped else status, origin)
    if record.model_uri:
        console.print(f"registered {record.model_uri} from run {record.run_id}")
    return TrainingResult(
        name=str(config.name),
        run_id=record.run_id,
        model_uri=record.model_uri or storage.join(job.folder, run_folder.MODEL),
        steps=job.total_steps,
        samples=job.total_steps * config.train.global_batch_size,
        train_s=follower.train_s,
        metrics=follower.last_metrics,
    )


def lineage(folder: str) -> dict[str, str]:
    """Where a finished run's model comes from, as tags of its registered version.

    Args:
        folder: of the run.
    """
    order = json.loads(storage.read_bytes(storage.join(folder, run_folder.BEGUN)))["order"]
    configuration = storage.read_bytes(storage.join(storage.join(folder, run_folder.MODEL), CONFIG))
    return {"data_sha256": " ".join(order["manifest"]), "configuration": configuration.decode()}


def build_job(
    config: RunConfig, manifests: list[Manifest], validation: Manifest | None, features: FeatureCache | None
) -> Job:
    """Decide what workers must agree upon, and hand the rows to Ray."""
    train, data = config.train, config.data
    order = DeterministicSampler(
        tuple(len(manifest) for manifest in manifests),
        train.global_batch_size,
        config.seed,
        tuple(data.manifests.values()),
    )
    steps = train.epochs * order.steps_per_epoch
    model = build_config(config.model)
    sampling = FrameSampling(data.num_frames, data.sampling, data.fps)
    lengths = [
        manifest.estimate_tokens(sampling, model.tokens_per_frame)
        for manifest in manifests * bool(train.micro_batch_tokens)
    ]
    return Job(
        config=config,
        folder=storage.join(config.storage, str(config.name)),
        total_steps=min(steps, train.max_steps or steps),
        order=order,
        rows=ray.put(Rows(manifests)),
        lengths=np.concatenate(lengths) if lengths else None,
        validation_size=len(validation) if validation else 0,
        validation_rows=ray.put(Rows([validation])) if validation else None,
        image_size=model.vision_config.image_size,
        features=ray.put(features) if features else None,
        recipe=features.recipe if features else None,
        events=open_channel(),
    )


def _run_to_resume(config: RunConfig, folder: str, order: dict[str, Any]) -> None:
    """Whether this run can go on where an earlier start under the same name left it, if there was one.

    Raises:
        BadConfig: what fixes the samples or their order has changed, so that a resume would skip some, repeat others,
            or see them otherwise.
    """
    uri = storage.join(folder, run_folder.BEGUN)
    if not storage.exists(uri):
        return
    begun = json.loads(storage.read_bytes(uri))
    for key, now in order.items():
        if begun["order"].get(key) != now:
            raise BadConfig(
                f"name: run {config.name} was begun with {key} {begun['order'].get(key)}, and this is {now}; "
                "take it back, or another --name"
            )
    place = storage.join(folder, run_folder.CONFIG)
    if not storage.exists(place):
        raise BadConfig(
            f"name: run {config.name} was begun by an earlier version, whose checkpoints have no seal; finish it with "
            "that one, or take another --name"
        )
    # A key that has come since had its default.
    before = validate_run(yaml.safe_load(storage.read_bytes(place)))
    differ = changes(before.model_dump(mode="json"), config.model_dump(mode="json"))
    changed = [f"{key} {was} -> {now}" for key, (was, now) in differ.items()]
    if changed and not config.accept_changes:
        raise BadConfig(
            f"name: run {config.name} was begun with another configuration: {'; '.join(changed)}. Take that back, give "
            "another --name, or go on with --accept_changes true"
        )
    if changed:
        storage.write_bytes(place, to_yaml(config).encode())


def _described(manifest: Manifest, context: str) -> dict[str, Any]:
    return {"uri": manifest.uri, "digest": manifest.digest, "rows": len(manifest), "context": context}


def changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of two configurations that differ, with both values, but for those that only say where and how fast a
    run goes on."""
    one, two = flatten(before), flatten(now)
    keys = sorted(key for key in one.keys() | two.keys() if not key.startswith(FREE_TO_CHANGE))
    return {key: (one.get(key), two.get(key)) for key in keys if one.get(key) != two.get(key)}


def _count(config: RunConfig) -> str:
    least, most = config.scaling.least_workers, config.scaling.most_workers
    return str(most) if least == most else f"{least} to {most}"


def _announce(
    console: Console, job: Job, manifests: list[Manifest], record: tracking.BackgroundSync, computes_on: str
) -> None:
    config = job.config
    processor = "GPU" if config.scaling.use_gpu else "CPU"
    lines = {
        "run": f"{config.name} (the same command with --name {config.name} resumes it)",
        "data": ", ".join(f"{len(manifest)} rows of {manifest.uri}" for manifest in manifests)
        + (f", {' : '.join(map(str, config.data.manifests.values()))}" if len(manifests) > 1 else ""),
        **({"features": f"{config.data.features}, instead of videos"} if config.data.features else {}),
        "training": f"{job.total_steps} steps of {config.train.global_batch_size} samples, "
        f"{_count(config)} {processor} workers",
        "machine": computes_on,
        "storage": job.folder,
        "record": record.uri + (f", run {record.run_id}" if record.run_id else ", later"),
    }
    if spills := hardware.object_store_warning(config, job.image_size, job.recipe):
        lines["objects"] = spills
    for key, value in lines.items():
        console.print(f"{key:<9} {value}")
