"""A training run as its driver sees it: check the request, start the workers, follow them, register the model."""

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from crosslmm import lease, run_folder, storage, tracking
from crosslmm.config import RunConfig
from crosslmm.data.feature_cache import FeatureCache
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.encode.recipe import open_features
from crosslmm.model.loading import build_config, build_processor
from crosslmm.planning.budget import NO_BUDGET, Budget, Meter
from crosslmm.planning.utilisation import Utilisation
from crosslmm.preflight import checks, connect, hardware, placement
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.preflight.resolve import resolve_config
from crosslmm.preflight.resume import require_resumable
from crosslmm.progress import logging_to
from crosslmm.storage import shipped_log
from crosslmm.storage.shipped_log import ShippedLog
from crosslmm.text import in_brief, one_printable_line, redacted
from crosslmm.train import launcher
from crosslmm.train.checkpoint import seals
from crosslmm.train.events import open_channel
from crosslmm.train.job import Job
from crosslmm.train.monitor import TrainingMonitor
from crosslmm.train.optim import warmup_warning

log = logging.getLogger(__name__)

ENDED = "ended"
"""Tag of a run: why its last start ended, in one line."""
MAX_LOGS = 200
"""Logs of drivers and ranks that a start leaves in the run's folder, the newest [files]."""
TYPICAL_TIMESTAMP_S = 100.0
"""Time whose timestamp has a typical number of tokens; estimates of lengths use it for all frames [s]."""


@dataclass
class TrainingResult:
    """Result of a finished run; jobs/train.py prints it as JSON."""

    name: str
    run_id: str | None
    """MLflow run; None while its record waits for MLflow."""
    model_uri: str
    """`models:/NAME@ALIAS`; for a trial, or while the record waits, the folder of the exported model."""
    model_version: str | None
    """`models:/NAME/VERSION`, which stays this model when the alias moves on; None where `model_uri` is a folder."""
    steps: int
    samples: int
    """Samples of those steps."""
    train_s: float
    """From the first step's start to the last step's end, over all attempts of this driver [s]."""
    metrics: dict[str, float]
    """Metrics of the last step."""


@dataclass(frozen=True)
class TrialContext:
    """Makes a run a trial of a sweep: it registers no model, and leaves the preflight checks to the sweep."""

    run_id: str
    """MLflow run that the sweep made for it."""
    fence: lease.Fence
    """Of the sweep's folder, whose owner owns the trials'."""
    report: Callable[[int, dict[str, float]], None]
    """Called after each validation with the number of steps done and the metrics, once the record has them (or its
    server is unreachable)."""
    reported: int = 0
    """Last step that an earlier start reported. Later validations that are already in the run's folder (that start was
    killed before it reported them) are reported first. Validations of steps that a resume repeats are reported
    twice."""


def run_training(config: RunConfig, trial: TrialContext | None = None, budget: Budget = NO_BUDGET) -> TrainingResult:
    """Train, record and register. All checks of the request are made before a worker starts.

    Args:
        config: the run.
        trial: given by a sweep.
        budget: what the run may spend.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out, or somebody else runs it.
        launcher.OutOfBudget: the budget is spent; the same name resumes the run.
        launcher.TrainingFailed: the run broke off; the same name resumes it.
        lease.LeaseLost: another start has taken over the run.
    """
    config = resolve_config(config)
    processor = build_processor(config.model)
    manifests, validation = _open_manifests(config)
    if validation:
        limit = answer_limit(validation, processor, config.train.max_new_tokens)
        config = config.model_copy(update={"train": config.train.model_copy(update={"max_new_tokens": limit})})
    connect.connect()
    placement.check_placement(config)
    folder = storage.join(config.storage, str(config.name))
    claim = trial or lease.claim(folder, "training", "give another --name")
    if trial is None:
        checks.require_ready(config, manifests)
    detected = hardware.detect(config)
    config = hardware.resolve_checkpointing(hardware.resolve_auto(config, detected), detected)
    hardware.require_float8(config, detected)
    features = open_features(config, Rows([*manifests, *([validation] if validation else [])]))
    with contextlib.nullcontext(claim.fence) if isinstance(claim, TrialContext) else claim.take() as fence:
        job = build_job(config, manifests, validation, features, fence, Utilisation.of(config, detected.gpu))
        computes_on = hardware.describe(config, detected)
        record = _begin(job, manifests, validation, features, trial)
        record.tag({**lease.process_tags(), "computes_on": computes_on, ENDED: "not yet"})
        _log_summary(job, manifests, record, computes_on)
        meter = Meter(budget, config.scaling.most_workers, run_folder.read_run(folder).get("worker_seconds", 0.0))
        with _ship_driver_log(folder):
            monitor = _train(job, record, trial, meter)
    if record.model_uri:
        log.info("registered %s, now %s, from run %s", record.model_version, record.model_uri, record.run_id)
    return TrainingResult(
        name=str(config.name),
        run_id=record.run_id,
        model_uri=record.model_uri or storage.join(folder, run_folder.MODEL_FOLDER),
        model_version=record.model_version,
        steps=job.total_steps,
        samples=job.total_steps * config.train.global_batch_size,
        train_s=monitor.train_s,
        metrics=monitor.last_metrics,
    )


@contextlib.contextmanager
def _ship_driver_log(folder: str) -> Iterator[None]:
    """Context manager: copies the log of this process, which has the workers' lines, into the run's folder."""
    shipped_log.keep_newest(storage.join(folder, run_folder.LOGS_FOLDER), MAX_LOGS)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "driver.log"
        with ShippedLog(path, run_folder.log_uri(folder, "driver")), logging_to(path):
            yield


def _begin(
    job: Job,
    manifests: list[Manifest],
    validation: Manifest | None,
    features: FeatureCache | None,
    trial: TrialContext | None,
) -> tracking.BackgroundSync:
    """Begin or resume the run in its folder and its record.

    Raises:
        BadConfig: the folder holds a run that this one cannot resume, or MLflow refuses.
    """
    order = _order_of(job.config, manifests, features)
    require_resumable(job.config, job.folder, order)
    datasets = [_describe(manifest, "training") for manifest in manifests]
    datasets += [_describe(validation, "validation")] if validation else []
    run_folder.begin_run(job.config, job.folder, order, datasets, trial.run_id if trial else None)
    return tracking.BackgroundSync(job.folder, job.config.tracking, require_owner=job.fence.require_unless_recent)


def _train(job: Job, record: tracking.BackgroundSync, trial: TrialContext | None, meter: Meter) -> TrainingMonitor:
    """Run the workers to the end, and close the record with the final status of the run, and why it ended."""
    monitor = TrainingMonitor(job, record, trial.report if trial else None, meter)
    status, model_tags, ended = "FAILED", None, "failed"
    try:
        if trial:
            for step, metrics in run_folder.validations_after(job.folder, trial.reported):
                trial.report(step, metrics)
        with monitor:
            launcher.fit(job, meter.spent)
        if trial is None:
            model_tags = lineage(job.folder)
        status, ended = "FINISHED", f"finished: {job.total_steps} steps"
    except (SystemExit, KeyboardInterrupt):
        status, ended = "KILLED", f"stopped; {_resumes(job)}"
        raise
    except launcher.OutOfBudget as error:
        status, ended = "KILLED", f"out of budget: {error}; with more of it, {_resumes(job)}"
        raise launcher.OutOfBudget(ended) from error
    except launcher.TrainingFailed as error:
        ended = f"failed: {error}; {_resumes(job)}"
        raise launcher.TrainingFailed(ended.removeprefix("failed: ")) from error
    except Exception as error:
        ended = f"failed: the driver: {type(error).__name__}: {in_brief(error, 500)}; {_resumes(job)}"
        raise
    finally:
        _require_owner(job, record)
        if monitor.stopped:
            # When Tune stops a trial, its workers end first, which looks like a failure, but is not.
            status, ended = "FINISHED", "stopped early by the sweep"
        log.info("%s", ended)
        record.tag({ENDED: one_printable_line(redacted(ended))})
        record.save_worker_seconds(meter.worker_seconds)
        record.finish(status, model_tags)
    return monitor


def _require_owner(job: Job, record: tracking.BackgroundSync) -> None:
    """Raise LeaseLost if the run has another owner: the record belongs to it, too."""
    try:
        job.fence.require_unless_recent(0)
    except lease.LeaseLost:
        record.abandon()
        raise


def _resumes(job: Job) -> str:
    """Say where the next start of the run will begin."""
    same = f"the same --name {job.config.name}"
    try:
        step = seals.latest_step(job.folder)
    except OSError:
        return f"{same} resumes the run"
    return f"{same} resumes the run after step {step}" if step else f"{same} begins it anew: it has no checkpoint yet"


def lineage(folder: str) -> dict[str, str]:
    """Return the tags that say where a finished run's model comes from. The configuration is not a tag, which would
    fill the version's page: `run.yaml` among the model's files has it, and the parameters of the MLflow run.

    Args:
        folder: of the run.
    """
    return {"data_sha256": " ".join(run_folder.read_run(folder)["order"]["manifest"])}


def build_job(
    config: RunConfig,
    manifests: list[Manifest],
    validation: Manifest | None,
    features: FeatureCache | None,
    fence: lease.Fence,
    utilisation: Utilisation | None = None,
) -> Job:
    """Decide all that the workers must agree on, and put the rows into Ray's object store.

    Args:
        config: resolved configuration of the run.
        manifests: training manifests.
        validation: validation manifest, if any.
        features: read instead of videos, if given.
        fence: of the run's folder.
        utilisation: of the GPUs, which the workers then report with each step.
    """
    train, data = config.train, config.data
    order = DeterministicSampler(
        tuple(len(manifest) for manifest in manifests),
        train.global_batch_size,
        config.seed,
        tuple(data.manifests.values()),
    )
    steps = train.epochs * order.steps_per_epoch
    return Job(
        config=config,
        folder=storage.join(config.storage, str(config.name)),
        total_steps=min(steps, train.max_steps or steps),
        order=order,
        rows=ray.put(Rows(manifests)),
        lengths=_estimate_lengths(config, manifests) if train.micro_batch_tokens else None,
        validation_size=len(validation) if validation else 0,
        validation_rows=ray.put(Rows([validation])) if validation else None,
        image_size=build_config(config.model).vision_config.image_size,
        features=ray.put(features) if features else None,
        recipe=features.recipe if features else None,
        events=open_channel(),
        utilisation=utilisation,
        fence=fence,
    )


def _estimate_lengths(config: RunConfig, manifests: list[Manifest]) -> np.ndarray:
    """Estimate the tokens of every row, float32 (rows of all manifests,)."""
    processor = build_processor(config.model, config.data)
    tokens_per_frame = processor.tokens_per_frame + processor.stamp_length(TYPICAL_TIMESTAMP_S)
    sampling = FrameSampling.of(config.data)
    return np.concatenate([manifest.estimate_tokens(sampling, tokens_per_frame) for manifest in manifests])


def _open_manifests(config: RunConfig) -> tuple[list[Manifest], Manifest | None]:
    """Open the training manifests and the validation manifest."""
    manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    uri = config.data.validation_manifest
    return manifests, Manifest(uri, config.data.roots) if uri else None


def _order_of(config: RunConfig, manifests: list[Manifest], features: FeatureCache | None) -> dict[str, Any]:
    """Return all that determines the samples and their order; a resume must have the same."""
    return {
        "manifest": [manifest.digest for manifest in manifests],
        "shares": list(config.data.manifests.values()),
        "train.global_batch_size": config.train.global_batch_size,
        "seed": config.seed,
        # Features are checked against the encoder's initial weights, which a resume never loads: compare their key.
        "data.features": features.recipe.key if features else None,
    }


def _describe(manifest: Manifest, context: str) -> dict[str, Any]:
    return {"uri": manifest.uri, "digest": manifest.digest, "rows": len(manifest), "context": context}


def _log_summary(job: Job, manifests: list[Manifest], record: tracking.BackgroundSync, computes_on: str) -> None:
    """Log what is about to run, on what, and where it is stored and recorded."""
    config = job.config
    scaling, device = config.scaling, "GPU" if config.scaling.use_gpu else "CPU"
    least, most = scaling.least_workers, scaling.most_workers
    workers = str(most) if least == most else f"{least} to {most}"
    data = ", ".join(f"{len(manifest)} rows of {manifest.uri}" for manifest in manifests)
    shares = f", {' : '.join(map(str, config.data.manifests.values()))}" if len(manifests) > 1 else ""
    lines = {
        "run": f"{config.name} (the same command with --name {config.name} resumes it)",
        "data": f"{data}{shares}",
        **({"features": f"{config.data.features}, instead of videos"} if config.data.features else {}),
        "training": f"{job.total_steps} steps of {config.train.global_batch_size} samples, {workers} {device} workers",
        "machine": computes_on,
        "storage": job.folder,
        "record": record.uri + (f", run {record.run_id}" if record.run_id else ", once it answers"),
    }
    if warning := warmup_warning(job.total_steps, config.train):
        lines["warm-up"] = warning
    if warning := hardware.object_store_warning(config, job.image_size, job.recipe):
        lines["objects"] = warning
    for key, value in lines.items():
        log.info("%-9s %s", key, value)
