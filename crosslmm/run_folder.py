"""The folder of a run in storage: every file name in it, and reading and writing the run's own files.

The folder is the source of truth; MLflow's run is made from it and can be made again (jobs/track.py replay).

    STORAGE/NAME/                       a run
    ├── run.json                        what the MLflow run is made from; written by the run's driver alone
    ├── config.yaml                     the configuration that the run started with
    ├── history/*.jsonl                 {"step": int, "time": unix seconds, "metrics": {name: float}}, a line per step
    ├── quarantine.jsonl                samples that could not be read, a line per sample
    ├── answers/step-XXXXXXXX.json      some answers of the validation after this step
    ├── answers/row-XXXXXXXX.jpg        frames of what these are about
    ├── step-XXXXXXXX-ATTEMPT/          a checkpoint
    │   ├── rank-NNNNN.safetensors          the part of a rank: weights, moments of the optimizer
    │   ├── index.json                      where the rows of each tensor are, with the sha256 of each chunk
    │   ├── config.yaml                     the configuration that it was written with
    │   ├── base.json                       of a run that trains adapters: where the other weights are, and their sha256
    │   ├── seal.json                       written last, lists the files; without it the checkpoint does not count
    │   └── broken-seal.json                in place of seal.json once damage was detected; says which
    ├── owners/NNNNNNNN.json            who ran it, a file per owner; the last one owns the folder, see `lease/lease.py`
    ├── logs/TIME-WHO*.log              what the driver and each rank wrote, a file per start; see `log_uri`
    ├── stacks/*.txt                    stack traces of ranks that the watchdog stopped
    ├── not_finite/step-XXXXXXXX.json   sample ids of a step whose gradient was not finite
    ├── ray/                            Ray Train's own state; nothing is read from it
    ├── base/                           of a run that trains adapters: the model that it began with, in the format of
    │                                   Transformers, unless `model.init_from` is that model
    └── model/                          the exported model, in the format of Transformers, or the adapter, in PEFT's,
        ├── base.json                       with the model that it belongs to; and
        └── run.yaml                        the configuration that it was trained with

    STORAGE/SWEEP/                      a sweep
    ├── sweep.json                      settings that must not change when the sweep resumes
    ├── owners/NNNNNNNN.json            as of a run; its trials belong to the same owner
    ├── trials/NNN.json                 state of each trial
    ├── report.html                     the report
    └── TRIAL/                          the run of a trial, as above

    STORAGE/evaluations/EVALUATION/     an evaluation, see `evaluate/evaluation_folder.py`
"""

import json
import re
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, to_yaml, tracking_uri
from crosslmm.text import without_credentials

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
HISTORY_FOLDER, HISTORY_FILE = "history", re.compile(r"step-(\d{8,12})\.jsonl")
QUARANTINE_FILE = "quarantine.jsonl"
ANSWERS_FOLDER, ANSWERS_FILE = "answers", re.compile(r"step-(\d{8,12})\.json")
PICTURE_FILE = re.compile(r"row-(\d{8,12})\.jpg")
CHECKPOINT_FOLDER = re.compile(r"step-\d{8}-\w+")
SHARD_FILE, CHECKPOINT_INDEX_FILE = "rank-{:05d}.safetensors", "index.json"
SEAL_FILE, BROKEN_SEAL_FILE = "seal.json", "broken-seal.json"
OWNERS_FOLDER, OWNER_FILE = "owners", re.compile(r"(\d{8,12})\.json")
LOGS_FOLDER, LOG_FILE = "logs", re.compile(r"(\d{10})-(driver|rank-\d{5})(-\d+)?\.log")
STACKS_FOLDER = "stacks"
NON_FINITE_FOLDER = "not_finite"
RAY_FOLDER = "ray"
RAY_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of checkpoints."""
MODEL_FOLDER = "model"
MODEL_CONFIG_FILE = "run.yaml"
ADAPTER_CONFIG_FILE, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's names."""
BASE_FOLDER, BASE_FILE = "base", "base.json"
SWEEP_FILE = "sweep.json"
TRIALS_FOLDER = "trials"
REPORT_FILE = "report.html"
EVALUATIONS_FOLDER = "evaluations"

StepRecord = tuple[int, float, dict[str, float]]
"""Step number, unix time [s], metrics."""


def begin_run(
    config: RunConfig,
    folder: str,
    order: dict[str, Any],
    datasets: list[dict[str, Any]],
    run_id: str | None = None,
) -> None:
    """Write run.json and config.yaml. A run that resumes keeps its key, name, tags, data sets, worker time, MLflow run,
    start time and config.yaml.

    Args:
        config: the run's configuration.
        folder: the run's folder.
        order: what determines the samples and their order; a resume compares it.
        datasets: arguments of `RunSync.log_dataset`, one dict per manifest.
        run_id: the MLflow run that a sweep created for this run.
    """
    first = {
        "key": uuid.uuid4().hex,
        "run_id": run_id,
        "name": str(config.name),
        "start_time": time.time(),
        "tags": {"mlflow.source.name": "jobs/train.py", **git_revision()},
        "datasets": datasets,
        "worker_seconds": 0.0,
    }
    run = first | (read_run(folder) if has_run(folder) else {})
    # A resume may use another MLflow server. Its password, if the URI has one, is never written.
    tracking = config.tracking.model_copy(update={"uri": without_credentials(tracking_uri(config.tracking))})
    run |= {"order": order, "tracking": tracking.model_dump(), "status": None, "end_time": None, "lineage": None}
    if not storage.exists(storage.join(folder, CONFIG_FILE)):
        storage.write_bytes(storage.join(folder, CONFIG_FILE), to_yaml(config).encode())
    write_run(folder, run)


def has_run(folder: str) -> bool:
    """Return whether a run was begun in this folder."""
    return storage.exists(storage.join(folder, RUN_FILE))


def owned_folder(folder: str) -> str:
    """Return the folder whose lease covers a run's: its own, or that of the sweep whose trial it is."""
    sweep = storage.parent(folder)
    return sweep if storage.exists(storage.join(sweep, SWEEP_FILE)) else folder


def is_unused(folder: str) -> bool:
    """Return whether a folder is empty or does not exist; a start that was refused leaves nothing but its lease."""
    return not storage.files_in(folder) and set(storage.folders_in(folder)) <= {OWNERS_FOLDER}


def read_run(folder: str) -> dict[str, Any]:
    """Read the run.json of a run's folder."""
    return json.loads(storage.read_bytes(storage.join(folder, RUN_FILE)))


def write_run(folder: str, run: dict[str, Any]) -> None:
    """Write the run.json of a run's folder."""
    storage.write_bytes(storage.join(folder, RUN_FILE), json.dumps(run).encode())


def checkpoint_folder(step: int, attempt: str) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}-{attempt}"


def log_uri(folder: str, who: str, number: int | None = None) -> str:
    """Return where the log of a process that starts now goes in a run's folder. Names sort by time.

    Args:
        folder: the run's folder.
        who: driver, or rank-NNNNN.
        number: tells several files of one process apart.
    """
    which = "" if number is None else f"-{number}"
    return storage.join(storage.join(folder, LOGS_FOLDER), f"{int(time.time()):010d}-{who}{which}.log")


class Log(NamedTuple):
    """A log in a run's folder."""

    time: int
    """Start of its process [unix time, s]."""
    who: str
    """driver, or rank-NNNNN."""
    file: str
    """Its name."""


def logs_of(folder: str) -> list[Log]:
    """Return the logs in a run's folder, oldest first."""
    names = sorted(storage.names_in(storage.join(folder, LOGS_FOLDER)))
    return [Log(int(match[1]), match[2], name) for name in names if (match := LOG_FILE.fullmatch(name))]


def steps_after(folder: str, last: int) -> Iterable[StepRecord]:
    """Yield the steps in a run's history, leaving out files that end at or before step `last`. All other files are
    yielded whole, so steps up to `last` may be among them.

    Workers' files are named after their last step. A driver's files sort before them by name, as they should: the
    steps that a driver could not deliver are older than those that a later start executed in their place.
    """
    folder = storage.join(folder, HISTORY_FOLDER)
    for name in storage.names_in(folder):
        of_workers = HISTORY_FILE.fullmatch(name)
        if of_workers and int(of_workers[1]) <= last:
            continue
        for line in storage.read_bytes(storage.safe_join(folder, name)).splitlines():
            step = json.loads(line)
            yield step["step"], step["time"], step["metrics"]


def validations_after(folder: str, last: int) -> list[tuple[int, dict[str, float]]]:
    """Return (step, metrics) of the validated steps after step `last`, ascending.

    For a step that a resume repeated, the first execution counts, as in MLflow.
    """
    validations: dict[int, dict[str, float]] = {}
    for step, _, metrics in steps_after(folder, last):
        if step > last and "validation/loss" in metrics:
            validations.setdefault(step, metrics)
    return sorted(validations.items())


def write_answers(folder: str, step: int, answers: list[dict[str, Any]]) -> None:
    """Write sample answers of the validation after step `step`; those of an earlier execution of it are replaced.

    Args:
        folder: of the run.
        step: optimizer steps done.
        answers: a dictionary each; `row` is the position of its sample in the validation manifest.
    """
    uri = storage.join(storage.join(folder, ANSWERS_FOLDER), f"step-{step:08d}.json")
    storage.write_bytes(uri, json.dumps(answers).encode())


def write_pictures(folder: str, pictures: dict[int, bytes]) -> None:
    """Write a JPEG of what each of some rows of the sample answers shows."""
    for row, jpeg in pictures.items():
        storage.write_bytes(storage.join(storage.join(folder, ANSWERS_FOLDER), f"row-{row:08d}.jpg"), jpeg)


def read_answers(folder: str, most: int) -> Iterator[dict[str, Any]]:
    """Yield the sample answers of the last `most` validations, the newest first, each with its `step`."""
    folder = storage.join(folder, ANSWERS_FOLDER)
    names = sorted(name for name in storage.names_in(folder) if ANSWERS_FILE.fullmatch(name))
    for name in reversed(names[-most:]):
        for answer in storage.read_json(storage.safe_join(folder, name)):
            yield {"step": int(name[5:-5]), **answer}


def list_pictures(folder: str) -> dict[int, str]:
    """Return the pictures beside the sample answers: row -> file name."""
    names = storage.names_in(storage.join(folder, ANSWERS_FOLDER))
    return {int(match[1]): name for name in names if (match := PICTURE_FILE.fullmatch(name))}


def list_runs(storage_folder: str, names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Return (name, folder) of runs, oldest first.

    Args:
        storage_folder: the folder of all runs.
        names: the runs to list, NAME or SWEEP/TRIAL; all when empty.

    Raises:
        BadConfig: no such run.
    """
    root = storage.absolute(storage_folder)
    start_times: dict[str, float] = {}
    for name in names or _run_names(root):
        folder = storage.join(root, name)
        if not has_run(folder):
            raise BadConfig(f"--name {name}: there is no {RUN_FILE} in {folder}, so no run was begun there")
        start_times[name] = read_run(folder).get("start_time", 0.0)
    if not start_times:
        raise BadConfig(f"--storage {root}: there are no runs in it")
    return [(name, storage.join(root, name)) for name in sorted(start_times, key=start_times.__getitem__)]


def _run_names(root: str) -> list[str]:
    """Return the names of all runs, and SWEEP/TRIAL of the trials of sweeps."""
    names = storage.folders_in(root)
    trials = [f"{name}/{trial}" for name in names for trial in storage.folders_in(storage.join(root, name))]
    return [name for name in names + trials if has_run(storage.join(root, name))]


def git_revision() -> dict[str, str]:
    """Return MLflow's tag for the commit of the code; empty where the code is not a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}
