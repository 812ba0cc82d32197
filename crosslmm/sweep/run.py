"""What a sweep's driver does: check, encode once, let Tune run the trials, keep the record, report, promote."""

import functools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from rich.console import Console

from crosslmm import storage
from crosslmm.config import COMPARED, FREE, BadConfig, RunConfig, changes, roles_of, tracking_uri
from crosslmm.data.feature_format import FeatureConfig
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.encode.run import run_encoding
from crosslmm.inference.answerer import first_turn
from crosslmm.preflight import checks, connect, hardware, placement
from crosslmm.preflight.resolve import resolve_config
from crosslmm.run_folder import SWEEP
from crosslmm.sweep import report, trials
from crosslmm.sweep.candidates import Candidates
from crosslmm.sweep.progress import SweepProgress
from crosslmm.sweep.search import Search
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, changes_features, distribution, grid, is_grid
from crosslmm.sweep.trials import Trial
from crosslmm.sweep.tuner import SweepFailed, at_once, run_trials
from crosslmm.tracking import MlflowRun, load_registered, register, require_answer
from crosslmm.train.run import lineage

DRAWN = 32
"""Trials of a space that is no grid, unless said otherwise."""


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind."""

    name: str
    run_id: str
    """Of the sweep's own MLflow run, above those of its trials."""
    trials: int
    finished: int
    stopped_early: int
    failed: int
    out_of_budget: int
    left_out: int
    """Points that were refused before they became trials."""
    best: dict[str, Any] | None
    knee: dict[str, Any] | None
    front: list[dict[str, Any]]
    """Finished trials that none beats in accuracy and compute, cheapest first."""
    report: str
    """Of the page."""
    promoted: dict[str, Any] | None
    """`model_uri`, the trial's number, and what the registered model answers to a first held-out question."""
    total_s: float


def run_sweep(config: RunConfig, chosen: SweepSettings, space_name: str, space: Space) -> SweepResult:
    """Search a space, or go on with the sweep of that name.

    Args:
        config: what points are laid over.
        chosen: how to search; `check` has found nothing.
        space_name: for people.
        space: what is searched.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        EncodingFailed: no features.
        SweepFailed: trials failed, and none came to its end.
    """
    began = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=True)
    config = config.model_copy(update={"name": config.name or datetime.now().strftime("sweep-%Y%m%d-%H%M%S")})
    config = resolve_config(config)
    manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    manifests_and_validation = [*manifests, Manifest(str(config.data.validation_manifest), config.data.roots)]
    total_steps = _steps(config, manifests)
    if chosen.scheduler == "asha" and config.train.validate_every >= total_steps:
        raise BadConfig(
            f"train.validate_every: trials of {total_steps} steps are judged when they are validated, and "
            f"{config.train.validate_every} is not before their end; lower it, or --scheduler none"
        )
    folder = storage.join(config.storage, str(config.name))
    whole = len(grid(space, config)) if is_grid(space) else None
    most = min(chosen.trials or whole, whole) if whole else chosen.trials or DRAWN
    if chosen.promote and chosen.promote.isdecimal() and int(chosen.promote) >= most:
        raise BadConfig(f"--promote {chosen.promote}: trials are numbered from 0 to {most - 1}")
    connect.connect()
    checks.require_ready(config, manifests)
    # Once for all trials: they are compared, and share features.
    computes_on = hardware.detect(config)
    config = hardware.resolve_auto(config, computes_on)
    console.print(f"sweep     {config.name} (the same command with --name {config.name} goes on with it)")
    console.print(f"machine   {hardware.describe(config, computes_on)}")
    console.print(f"space     {space_name}: {', '.join(space)}")
    record, begun = _record(config, folder, space_name, space, chosen, manifests_and_validation)
    console.print(f"storage   {folder}")
    console.print(f"record    {record.uri}, run {record.run_id}")
    status = "FAILED"
    try:
        if "features" not in begun:
            looks = _looks(config, chosen, most, total_steps)
            begun["features"] = _features(config, chosen, space, looks, manifests, record, console)
            storage.write_bytes(storage.join(folder, SWEEP), json.dumps(begun).encode())
        base = config.model_copy(update={"data": config.data.model_copy(update={"features": begun["features"]})})
        # Trials are runs in the sweep's folder, wherever they run.
        # One with credentials in it came from the environment, and trials take it from theirs.
        uri = tracking_uri(base.tracking)
        tracking = base.tracking.model_copy(update={"uri": uri if uri == record.uri else None})
        base = base.model_copy(update={"storage": folder, "tracking": tracking})
        placement.check_placement(base)
        _require_reach(record)
        search = Search(space, base, trials.read(folder), Candidates(base, chosen, space, record), most)
        concurrent = chosen.concurrent or at_once(base)
        console.print(f"trials    {most}, {concurrent} at a time, of {total_steps} steps at most")
        with SweepProgress(folder, search, record, total_steps, base.scaling.most_workers, console) as watch:
            run_trials(base, chosen, search, watch, concurrent)
        if search.refused:
            point, reason = search.refused[0]
            console.print(f"left out  {len(search.refused)} points before they began, such as {point}: {reason}")
        page = _report(folder, config, space_name, space, search, record, total_steps)
        console.print(f"report    {page}")
        _require_one(search, page)
        promoted = _promote(chosen.promote, folder, base, search.trials, record, console) if chosen.promote else None
        status = "FINISHED"
    except (SystemExit, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        record.finish(status)
    return _outcome(config, record, search, page, promoted, time.monotonic() - began)


def _outcome(
    config: RunConfig, record: MlflowRun, search: Search, page: str, promoted: dict[str, Any] | None, seconds: float
) -> SweepResult:
    """What the last line says."""
    done, states = trials.finished(search.trials), [trial.state for trial in search.trials]
    best, knee = trials.best(search.trials), trials.knee(search.trials)
    return SweepResult(
        name=str(config.name),
        run_id=record.run_id,
        trials=len(states),
        finished=len(done),
        stopped_early=states.count("stopped early"),
        failed=states.count("failed"),
        out_of_budget=states.count("out of budget"),
        left_out=len(search.refused),
        best=_said(best) if best else None,
        knee=_said(knee) if knee else None,
        front=[_said(trial) for trial in trials.front(search.trials)],
        report=page,
        promoted=promoted,
        total_s=round(seconds, 1),
    )


def _require_one(search: Search, page: str) -> None:
    """Whether a trial came to its end.

    Raises:
        SweepFailed: none, with the first cause.
    """
    if trials.finished(search.trials):
        return
    causes = [f"trial {trial.number}: {trial.error}" for trial in search.trials if trial.state == "failed"]
    causes += [f"trial {trial.number} is {trial.state}" for trial in search.trials]
    causes += [f"{point} was left out: {reason}" for point, reason in search.refused]
    raise SweepFailed(f"no trial finished; {causes[0]}; all of them in {page}")


def _require_reach(record: MlflowRun) -> None:
    """Whether trials can write their record, wherever they run.

    Raises:
        BadConfig: it is a file, and there are several machines.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if record.uri.startswith("sqlite:") and len(machines) > 1:
        raise BadConfig(
            f"tracking.uri: {record.uri} is a file, and trials run on {len(machines)} machines; give an MLflow server's"
        )


def _steps(config: RunConfig, manifests: list[Manifest]) -> int:
    """Optimizer steps of a trial."""
    order = DeterministicSampler(
        tuple(map(len, manifests)),
        config.train.global_batch_size,
        config.seed,
        tuple(config.data.manifests.values()),
    )
    steps = config.train.epochs * order.steps_per_epoch
    return min(steps, config.train.max_steps or steps)


def _looks(config: RunConfig, chosen: SweepSettings, most: int, total_steps: int) -> int:
    """Samples that a sweep's trials train on without fail, were all of them stopped at the first rung."""
    share = 1.0
    if chosen.scheduler == "asha":
        share = chosen.first_rung if chosen.rung == "steps" else 0.0
    return round(most * total_steps * share) * config.train.global_batch_size


def _features(
    config: RunConfig,
    chosen: SweepSettings,
    space: Space,
    looks: int,
    manifests: list[Manifest],
    record: MlflowRun,
    console: Console,
) -> str | None:
    """The folder of the trials' features, where they can share some and that pays.

    Args:
        config: of the sweep.
        chosen: whether, and in which form, features are wanted.
        space: what is searched.
        looks: samples that trials will train on.
        manifests: of training.
        record: of the sweep, which is told what encoding took.
        console: where the decision is said.

    Raises:
        BadConfig: features are asked for, and trials cannot share them.
    """
    if own := changes_features(space, config):
        if config.data.features or chosen.features in ("bf16", "int8"):
            raise BadConfig(f"--features: {own[0]} is searched, which changes what the vision encoder sees or is")
        console.print(f"features  none: {own[0]} is searched, so that no two trials could share them")
        return None
    if config.data.features or chosen.features == "never":
        return config.data.features
    if chosen.features == "auto":
        videos = len(Rows(manifests).videos())
        if config.train.learning_rate.vision:
            console.print("features  none: train.learning_rate.vision is not 0, so that they would change")
            return None
        if looks <= videos:
            console.print(
                f"features  none: trials look at {looks:,} samples, and there are {videos:,} videos to encode"
            )
            return None
        console.print(f"features  trials look at {looks:,} samples or more of {videos:,} videos: encoded once")
    encoded = run_encoding(config, FeatureConfig(dtype="int8" if chosen.features == "int8" else "bf16"))
    if encoded.videos:
        record.log_values({"cost/encoding_s": encoded.encoding_s}, {})
    return encoded.folder


def _record(
    config: RunConfig,
    folder: str,
    space_name: str,
    space: Space,
    chosen: SweepSettings,
    manifests: list[Manifest],
) -> tuple[MlflowRun, dict[str, Any]]:
    """The sweep's MLflow run, that of an earlier start or a new one, and what is settled for all starts.

    Raises:
        BadConfig: an earlier start under this name searched something else, or MLflow does not answer.
    """
    require_answer(config.tracking)
    uri = storage.join(folder, SWEEP)
    searched = {path: str(distribution(path, dimension)) for path, dimension in space.items()}
    settled = {
        "space": searched,
        "config": config.model_dump(mode="json"),
        "data": {f"digest of manifest {i}": manifest.digest for i, manifest in enumerate(manifests)},
    }
    if storage.exists(uri):
        begun = json.loads(storage.read_bytes(uri))
        if _require_same(config, begun, settled):
            storage.write_bytes(uri, json.dumps(begun | settled).encode())
        record = MlflowRun(config.tracking, begun["run_id"])
        record.client.update_run(record.run_id, status="RUNNING")
        return record, begun
    record = MlflowRun.create(config.tracking, str(config.name), "jobs/tune.py")
    record.log_config(config)
    record.log_params({"space": {"name": space_name, **searched}, "sweep": chosen.model_dump()})
    begun = {"run_id": record.run_id, **settled}
    storage.write_bytes(uri, json.dumps(begun).encode())
    return record, begun


def _require_same(config: RunConfig, begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compare a sweep's start with an earlier one under the same name -> True if an accepted change has to be recorded.

    The space and the content of the manifests never change. The configuration may, where it is free for runs and trials
    are not compared by it, or with `accept_changes`.

    Raises:
        BadConfig: naming what differs.
    """
    name = config.name
    for part in ("space", "data"):
        before = begun.get(part, now[part])  # an earlier version did not record the data
        for key in {**before, **now[part]}:
            if before.get(key) != now[part].get(key):
                raise BadConfig(
                    f"name: sweep {name} was begun with {key} {before.get(key)}, and this is {now[part].get(key)}; "
                    "take that back, or give another --name"
                )
    old = begun["config"] if "model" in begun["config"] else _nested(begun["config"])
    differing = {
        key: values
        for key, values in changes(old, now["config"], frozenset()).items()
        if FREE not in roles_of(key) or COMPARED in roles_of(key)
    }
    if differing and not config.accept_changes:
        text = "; ".join(f"{key} {was} -> {is_now}" for key, (was, is_now) in differing.items())
        raise BadConfig(
            f"name: sweep {name} was begun with another configuration: {text}. Take that back, give another --name, or "
            "continue with --accept_changes true"
        )
    return bool(differing)


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Nest the flat keys that earlier versions recorded: {"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        functools.reduce(lambda section, part: section.setdefault(part, {}), sections, nested)[name] = value
    return nested


def _report(
    folder: str, config: RunConfig, space_name: str, space: Space, search: Search, record: MlflowRun, total_steps: int
) -> str:
    """Write the page and its pictures, into the sweep's folder and its record -> where the page is."""
    encoder = "frozen" if not config.train.learning_rate.vision else "trained"
    facts = {
        "Steps of a trial": f"{total_steps}, of {config.train.global_batch_size} samples",
        "Data": f"{', '.join(config.data.manifests)}; {config.data.num_frames} frames a video",
        "Validation": str(config.data.validation_manifest),
        "Vision encoder": f"{config.model.vision_weights or 'random weights'}, {encoder}",
        "Points left out before they began": f"{len(search.refused)}",
        "MLflow run": record.run_id,
    }
    distributions = {path: distribution(path, dimension) for path, dimension in space.items()}
    page = report.Sweep(str(config.name), space_name, facts, distributions)
    with tempfile.TemporaryDirectory() as scratch:
        for path in report.write(Path(scratch), page, search.trials):
            storage.write_bytes(storage.join(folder, path.name), path.read_bytes())
            record.log_file(path)
    if search.refused:
        lines = [json.dumps({"point": point, "reason": reason}) + "\n" for point, reason in search.refused]
        record.log_text("left_out.jsonl", "".join(lines))
    return storage.join(folder, report.PAGE)


def _promote(
    which: str, folder: str, base: RunConfig, known: list[Trial], record: MlflowRun, console: Console
) -> dict[str, Any]:
    """Register a trial's model, load it back and ask it.

    Raises:
        SweepFailed: there is no such trial, or it did not finish.
    """
    named = {"best": trials.best(known), "knee": trials.knee(known)}
    trial = named[which] if which in named else next((t for t in known if t.number == int(which)), None)
    if trial is None or trial.state != "finished":
        state = f"is {trial.state}" if trial else "is none of this sweep's that finished"
        raise SweepFailed(f"--promote {which}: trial {trial.number if trial else which} {state}, so there is no model")
    run_folder = storage.join(folder, trial.name)
    tags = lineage(run_folder) | {"sweep": record.run_id, "trial": str(trial.number), "promoted_as": which}
    child = MlflowRun(record.tracking, str(trial.run_id))
    model_uri = register(child, storage.join(run_folder, "model"), tags)
    console.print(f"registered {model_uri}: trial {trial.number}, {which} of the sweep")
    held_out = Manifest(str(base.data.validation_manifest), base.data.roots)
    asked = next(row for row in held_out.rows if len(row["videos"]) == 1)
    question, expected = first_turn(asked["messages"])
    table = pd.DataFrame({"video": asked["videos"], "question": [question]})
    (answer,) = load_registered(model_uri, base.tracking).predict(table)
    return {"model_uri": model_uri, "trial": trial.number, "question": question, "answer": answer, "expected": expected}


def _said(trial: Trial) -> dict[str, Any]:
    """A trial, for the last line."""
    assert trial.last
    return {
        "trial": trial.number,
        "accuracy": round(trial.last.accuracy, 4),
        "loss": round(trial.last.loss, 4),
        "tokens_per_frame": trial.tokens_per_frame,
        "macs": trial.macs,
        "point": trial.point,
    }
