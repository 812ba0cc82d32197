"""What the driver process does: check, start, follow, record, register."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from crosslmm import storage, tracking
from crosslmm.answer import CONFIG
from crosslmm.config import BadConfig, RunConfig, flatten, to_yaml, validate_run
from crosslmm.data import shapes
from crosslmm.data.decode import require_backend
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.doctor import preflight
from crosslmm.model.pretrained import build_config, build_processor
from crosslmm.train import launch, machine, placement
from crosslmm.train.follow import Follower
from crosslmm.train.job import Job
from crosslmm.train.prepare import open_features, prepare

FREE_TO_CHANGE = (
    "name", "storage", "accept_changes", "scaling.", "tracking.", "watchdog.",
    "model.attention", "model.encoder_chunk",
    "data.manifest", "data.validation_manifest", "data.features",  # known by what is in them
    "data.decode_timeout_s", "data.decode_memory_gib", "data.max_bad_share", "data.bad_allowed", "data.roots",
    "train.checkpoint_every", "train.keep_", "train.validate_every", "train.max_new_tokens", "train.not_finite",
    "train.micro_batch_", "train.activation_checkpointing",
)  # fmt: skip


@dataclass
class Outcome:
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
class Part:
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


def run(config: RunConfig, part: Part | None = None) -> Outcome:
    """Train, record and register. Everything that can be wrong with the request is found before a worker starts.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        launch.TrainingFailed: the run broke off; the same name resumes it.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=part is not None)
    config = resolve(config)
    build_processor(config.model)
    manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    held_out = config.data.validation_manifest
    validation = Manifest(held_out, config.data.roots) if held_out else None
    preflight.enter()
    placement.check_placement(config)
    if part is None:
        preflight.require_ready(config, manifests)
    computes_on = machine.found(config, console.print)
    config = machine.settled(config, computes_on)
    features = open_features(config, Rows([*manifests, *([validation] if validation else [])]))
    job = prepare(config, manifests, validation, features)
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
    tracking.begin(config, job.folder, order, datasets, part.run_id if part else None)
    record = tracking.Run(job.folder, config.tracking, functools.partial(console.print, markup=False))
    _announce(console, job, manifests, record, machine.described(config, computes_on))

    follower = Follower(job, record, console, part.report if part else None)
    status, origin = "FAILED", None
    try:
        if part:
            for step, metrics in tracking.validations_after(job.folder, part.reported):
                part.report(step, metrics)
        follower.start()
        try:
            launch.fit(job, follower.say)
        finally:
            follower.stop()
        if part is None:
            origin = lineage(job.folder)
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    except launch.TrainingFailed as error:
        raise launch.TrainingFailed(f"{error}; the same command with --name {config.name} resumes the run") from error
    finally:
        # Of a trial that is stopped the workers go first, as if they had failed.
        record.finish("KILLED" if follower.stopped else status, origin)
    if record.model_uri:
        console.print(f"registered {record.model_uri} from run {record.run_id}")
    return Outcome(
        name=str(config.name),
        run_id=record.run_id,
        model_uri=record.model_uri or storage.join(job.folder, tracking.MODEL),
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
    order = json.loads(storage.read_bytes(storage.join(folder, tracking.BEGUN)))["order"]
    configuration = storage.read_bytes(storage.join(storage.join(folder, tracking.MODEL), CONFIG))
    return {"data_sha256": " ".join(order["manifest"]), "configuration": configuration.decode()}


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what the configuration leaves to the moment: name, absolute storage, sample data.

    Raises:
        BadConfig: relative storage in a job whose working directory is a copy that will be thrown away; a decoder that
            does not load.
    """
    build_config(config.model)
    require_backend(config.data.decoder)
    require_lasting("storage", config.storage)
    require_lasting("tracking.uri", tracking.tracking_uri(config.tracking))
    folder = storage.absolute(config.storage)
    data = config.data
    if data.manifest == "sample":
        data = data.model_copy(update=shapes.sample_manifests(storage.join(folder, "sample")))
    return config.model_copy(
        update={"name": config.name or datetime.now().strftime("%Y%m%d-%H%M%S"), "storage": folder, "data": data}
    )


def require_lasting(key: str, uri: str) -> None:
    """Whether what is written there outlives the job.

    Raises:
        BadConfig: relative, in a job whose working directory is a copy that will be thrown away.
    """
    here = str(Path.cwd())
    uploaded = "/working_dir_files/" in here  # where Ray unpacks `ray job submit --working-dir`
    local = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:") else uri
    if uploaded and "://" not in local and storage.absolute(local).startswith(here):
        raise BadConfig(f"{key}: {uri} lies in this job's uploaded copy of the code; give an absolute path or a URI")


def _run_to_resume(config: RunConfig, folder: str, order: dict[str, Any]) -> None:
    """Whether this run can go on where an earlier start under the same name left it, if there was one.

    Raises:
        BadConfig: what fixes the samples or their order has changed, so that a resume would skip some, repeat others,
            or see them otherwise.
    """
    uri = storage.join(folder, tracking.BEGUN)
    if not storage.exists(uri):
        return
    begun = json.loads(storage.read_bytes(uri))
    for key, now in order.items():
        if begun["order"].get(key) != now:
            raise BadConfig(
                f"name: run {config.name} was begun with {key} {begun['order'].get(key)}, and this is {now}; "
                "take it back, or another --name"
            )
    place = storage.join(folder, tracking.CONFIG)
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


def _announce(console: Console, job: Job, manifests: list[Manifest], record: tracking.Run, computes_on: str) -> None:
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
    if spills := machine.objects_warning(config, job.image_size, job.recipe):
        lines["objects"] = spills
    for key, value in lines.items():
        console.print(f"{key:<9} {value}")
