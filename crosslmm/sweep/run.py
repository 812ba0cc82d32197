"""The sweep's driver: checks, encodes once, lets Tune run the trials, reports, promotes."""

import json
import logging
import shlex
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import ray

from crosslmm import lease, run_folder, storage
from crosslmm.config import BadConfig, RunConfig, tracking_uri
from crosslmm.data.feature_format import FeatureConfig
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.encode.run import run_encoding
from crosslmm.model.loading import build_processor
from crosslmm.preflight import checks, connect, hardware, placement
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.preflight.resolve import resolve_config
from crosslmm.sweep import report, trials
from crosslmm.sweep.progress import SweepProgress
from crosslmm.sweep.promote import promote
from crosslmm.sweep.resume import begin_sweep
from crosslmm.sweep.search import Search, TrialFactory
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, changes_features, distribution, grid, is_grid
from crosslmm.sweep.trials import Trial
from crosslmm.sweep.tuner import SweepFailed, max_concurrent_trials, run_trials
from crosslmm.text import holds_credentials, redacted
from crosslmm.tracking import MlflowRun

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 32
"""Trials of a space that is not a grid."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep, as printed in the last line."""

    name: str
    run_id: str
    """Id of the sweep's own MLflow run, the parent of its trials' runs."""
    trials: int
    finished: int
    stopped_early: int
    failed: int
    out_of_budget: int
    left_out: int
    """Points that were rejected before they became trials."""
    best: dict[str, Any] | None
    knee: dict[str, Any] | None
    front: list[dict[str, Any]]
    """Finished trials that no other beats in both accuracy and compute, cheapest first."""
    report: str
    """Path or URI of the report."""
    promoted: dict[str, Any] | None
    """`model_uri`, `model_version`, the trial's number, and the model's answer to a first held-out question."""
    total_s: float
    """Wall clock of this start [s]."""


def run_sweep(config: RunConfig, sweep: SweepSettings, space_name: str, space: Space) -> SweepResult:
    """Search a space, or continue the sweep of that name.

    Args:
        config: configuration on which the points are applied.
        sweep: checked settings of the sweep.
        space_name: name of the space, for people.
        space: the search space.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        EncodingFailed: the features could not be made.
        SweepFailed: no trial finished.
        lease.LeaseLost: another start has taken over the sweep.
    """
    began = time.monotonic()
    config = config.model_copy(update={"name": config.name or datetime.now().strftime("sweep-%Y%m%d-%H%M%S")})
    config = resolve_config(config)
    manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    validation = Manifest(str(config.data.validation_manifest), config.data.roots)
    answer_limit(validation, build_processor(config.model), config.train.max_new_tokens)  # refuses before the trials do
    total_steps = _steps(config, manifests)
    max_trials = _max_trials(config, sweep, space, total_steps)
    folder = storage.join(config.storage, str(config.name))
    connect.connect()
    claim = lease.claim(folder, "sweep", "give another --name")
    checks.require_ready(config, manifests)
    # Resolved once for all trials: they are compared, and share features.
    machine = hardware.detect(config)
    config = hardware.resolve_auto(config, machine)
    hardware.require_float8(config, machine)
    log.info("sweep     %s (the same command with --name %s continues it)", config.name, config.name)
    log.info("machine   %s", hardware.describe(config, machine))
    log.info("space     %s: %s", space_name, ", ".join(space))
    request = _Request(config, sweep, space_name, space, manifests, validation, total_steps, max_trials)
    with claim.take() as fence:
        return _search(request, machine, fence, began)


@dataclass(frozen=True)
class _Request:
    """A sweep that has been checked."""

    config: RunConfig
    settings: SweepSettings
    space_name: str
    space: Space
    manifests: list[Manifest]
    validation: Manifest
    total_steps: int
    """Optimizer steps of a trial that is not stopped."""
    max_trials: int


def _search(request: _Request, machine: hardware.Hardware, fence: lease.Fence, began: float) -> SweepResult:
    """Begin or continue the sweep in its folder, run its trials, report, promote."""
    config, sweep, space, folder = request.config, request.settings, request.space, fence.folder
    manifests = [*request.manifests, request.validation]
    record, begun = begin_sweep(config, folder, request.space_name, space, sweep, manifests)
    log.info("storage   %s", folder)
    log.info("record    %s, run %s", record.uri, record.run_id)
    status = "FAILED"
    try:
        if "features" not in begun:
            begun["features"] = _features(request, record)
            storage.write_bytes(storage.join(folder, run_folder.SWEEP_FILE), json.dumps(begun).encode())
        base = _trial_base(config, folder, begun["features"])
        placement.check_placement(base)
        _require_shared_record(record)
        candidates = TrialFactory(base, sweep, space, record, hardware.usable_memory(machine))
        search = Search(space, base, trials.read(folder), candidates, request.max_trials)
        concurrent = sweep.concurrent or max_concurrent_trials(base)
        text = "trials    %s, %s at a time, of %s steps at most"
        log.info(text, request.max_trials, concurrent, request.total_steps)
        workers = base.scaling.most_workers
        with SweepProgress(folder, search, record, request.total_steps, workers, fence) as progress:
            run_trials(base, sweep, search, progress, concurrent)
        fence.require()
        if search.rejected:
            point, reason = search.rejected[0]
            log.info("left out  %s points before they started, such as %s: %s", len(search.rejected), point, reason)
        page = _report(request, folder, search, record)
        log.info("report    %s", page)
        _require_a_finished_trial(search, page)
        promoted = promote(sweep.promote, folder, base, search.trials, record) if sweep.promote else None
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        fence.require_unless_recent(0)  # the record, too, belongs to the sweep's owner
        record.finish(status)
    return _result(config, record, search, page, promoted, time.monotonic() - began)


def _max_trials(config: RunConfig, sweep: SweepSettings, space: Space, total_steps: int) -> int:
    """Return how many trials the sweep has at most.

    Raises:
        BadConfig: ASHA would never judge a trial, or the trial to promote cannot exist.
    """
    if sweep.scheduler == "asha" and config.train.validate_every >= total_steps:
        raise BadConfig(
            f"train.validate_every: ASHA judges trials at validations, and {config.train.validate_every} is not before "
            f"the end of their {total_steps} steps; lower it, or give --scheduler none"
        )
    points = len(grid(space, config)) if is_grid(space) else None
    max_trials = min(sweep.trials or points, points) if points else sweep.trials or DEFAULT_TRIALS
    if sweep.promote and sweep.promote.isdecimal() and int(sweep.promote) >= max_trials:
        raise BadConfig(f"--promote {sweep.promote}: trials are numbered from 0 to {max_trials - 1}")
    return max_trials


def _steps(config: RunConfig, manifests: list[Manifest]) -> int:
    """Return the optimizer steps of a trial."""
    sampler = DeterministicSampler(
        tuple(map(len, manifests)),
        config.train.global_batch_size,
        config.seed,
        tuple(config.data.manifests.values()),
    )
    steps = config.train.epochs * sampler.steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def _certain_samples(request: _Request) -> int:
    """Return how many samples the trials train on even if all of them stop at the first rung."""
    share, sweep = 1.0, request.settings
    if sweep.scheduler == "asha":
        share = sweep.first_rung if sweep.rung == "steps" else 0.0
    return round(request.max_trials * request.total_steps * share) * request.config.train.global_batch_size


def _features(request: _Request, record: MlflowRun) -> str | None:
    """Return the folder of the features that all trials read, encoding them first; None if trials read videos.

    Args:
        request: the sweep, which says whether, and in which format, to store features.
        record: MLflow run of the sweep, which gets the cost of encoding.

    Raises:
        BadConfig: features are requested, and trials cannot share them.
    """
    config, sweep = request.config, request.settings
    if changing := changes_features(request.space, config):
        if config.data.features or sweep.features in ("bf16", "int8"):
            raise BadConfig(f"--features: {changing[0]} is searched, which changes the features; give --features never")
        log.info("features  none: %s is searched, so trials cannot share them", changing[0])
        return None
    if config.data.features or sweep.features == "never":
        return config.data.features
    if sweep.features == "auto":
        videos, certain_samples = len(Rows(request.manifests).videos()), _certain_samples(request)
        if config.train.learning_rate.vision:
            log.info("features  none: train.learning_rate.vision is not 0, so they would change")
            return None
        if certain_samples <= videos:
            log.info("features  none: trials read %s samples of %s videos", f"{certain_samples:,}", f"{videos:,}")
            return None
        text = "features  trials read at least %s samples of %s videos: encoded once"
        log.info(text, f"{certain_samples:,}", f"{videos:,}")
    encoded = run_encoding(config, FeatureConfig(dtype="int8" if sweep.features == "int8" else "bf16"))
    if encoded.videos:
        record.log_values({"cost/encoding_s": encoded.encoding_s}, {})
    return encoded.folder


def _trial_base(config: RunConfig, folder: str, features: str | None) -> RunConfig:
    """Return the configuration on which points are applied: a trial is a run in the sweep's folder, on any node."""
    data = config.data.model_copy(update={"features": features})
    # A URI with credentials came from the environment, and trials take it from theirs.
    uri = tracking_uri(config.tracking)
    tracking = config.tracking.model_copy(update={"uri": None if holds_credentials(uri) else uri})
    return config.model_copy(update={"data": data, "storage": folder, "tracking": tracking})


def _require_shared_record(record: MlflowRun) -> None:
    """Raise BadConfig if the record is a local file and trials run on several machines."""
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if record.uri.startswith("sqlite:") and len(machines) > 1:
        remedy = "give the URI of an MLflow server"
        raise BadConfig(f"tracking.uri: {record.uri} is a file, but trials run on {len(machines)} machines; {remedy}")


def _report(request: _Request, folder: str, search: Search, record: MlflowRun) -> str:
    """Write the report to the sweep's folder and its MLflow run -> path or URI of the page."""
    config, space = request.config, request.space
    encoder = _short(config.model.vision_weights) if config.model.vision_weights else "random weights"
    learns = "trained" if config.train.learning_rate.vision else "frozen"
    facts = {
        "Steps per trial": f"{request.total_steps}, of {config.train.global_batch_size} samples",
        "Data": f"{', '.join(map(_short, config.data.manifests))}; {config.data.num_frames} frames per video",
        "Validation": _short(str(config.data.validation_manifest)),
        "Vision encoder": f"{encoder}, {learns}",
        "Points rejected before they started": f"{len(search.rejected)}",
        "MLflow run": record.run_id,
    }
    distributions = {path: distribution(path, dimension) for path, dimension in space.items()}
    command = reproduce_command(str(config.name), request.space_name, request.settings)
    shown = report.Sweep(str(config.name), request.space_name, facts, distributions, command, search.rejected)
    with tempfile.TemporaryDirectory() as scratch:
        page = report.write(Path(scratch), shown, search.trials)
        storage.write_bytes(storage.join(folder, page.name), page.read_bytes())
        record.log_file(page)
    if search.rejected:
        lines = [json.dumps({"point": point, "reason": reason}) + "\n" for point, reason in search.rejected]
        record.log_text("left_out.jsonl", redacted("".join(lines)))
    return storage.join(folder, run_folder.REPORT_FILE)


def reproduce_command(name: str, space_name: str, sweep: SweepSettings) -> str:
    """Return the command line that continues a sweep, without the arguments of the trials' configuration.

    >>> reproduce_command("how-few", "joint", SweepSettings(trials=12))
    'python jobs/tune.py --space joint --trials 12 --name how-few'
    """
    changed = sweep.model_dump(exclude_defaults=True)
    arguments = [word for key, value in changed.items() for word in (f"--{key}", str(value))]
    return shlex.join(["python", "jobs/tune.py", "--space", space_name, *arguments, "--name", name])


def _short(uri: str) -> str:
    """Return the last two parts of a path: the report is read on other machines, where the folders above mean
    nothing."""
    return uri if "://" in uri else "/".join(Path(uri).parts[-2:])


def _require_a_finished_trial(search: Search, page: str) -> None:
    """Raise SweepFailed with the first cause if no trial finished."""
    if trials.finished(search.trials):
        return
    causes = [f"trial {trial.number}: {trial.error}" for trial in search.trials if trial.state == "failed"]
    causes += [f"trial {trial.number} is {trial.state}" for trial in search.trials]
    causes += [f"{point} was left out: {reason}" for point, reason in search.rejected]
    raise SweepFailed(f"no trial finished; {causes[0]}; the report lists all: {page}")


def _result(
    config: RunConfig, record: MlflowRun, search: Search, page: str, promoted: dict[str, Any] | None, seconds: float
) -> SweepResult:
    states = [trial.state for trial in search.trials]
    best, knee = trials.best(search.trials), trials.knee(search.trials)
    return SweepResult(
        name=str(config.name),
        run_id=record.run_id,
        trials=len(states),
        finished=len(trials.finished(search.trials)),
        stopped_early=states.count("stopped early"),
        failed=states.count("failed"),
        out_of_budget=states.count("out of budget"),
        left_out=len(search.rejected),
        best=_summary(best) if best else None,
        knee=_summary(knee) if knee else None,
        front=[_summary(trial) for trial in trials.front(search.trials)],
        report=page,
        promoted=promoted,
        total_s=round(seconds, 1),
    )


def _summary(trial: Trial) -> dict[str, Any]:
    """Return a trial as the result shows it."""
    assert trial.last
    return {
        "trial": trial.number,
        "accuracy": round(trial.last.accuracy, 4),
        "count": trial.last.asked,
        "loss": round(trial.last.loss, 4),
        "tokens_per_frame": trial.tokens_per_frame,
        "macs": trial.macs,
        "point": trial.point,
    }
