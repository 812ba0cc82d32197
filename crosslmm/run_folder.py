"""What a run's folder in storage says of it. It is the truth, from which the MLflow run is made:

run.json            what the MLflow run is made from; while the run goes on, its driver alone writes it
config.yaml         the configuration that the run was begun with
history/*.jsonl     {"step": int, "time": unix seconds, "metrics": {name: float}}, a line for each step
quarantine.jsonl    what could not be read
model/              what was exported
sweep.json          in a sweep's folder, above those of its trials: what must not change when it goes on
"""

import json
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, to_yaml, tracking_uri
from crosslmm.text import without_password

BEGUN, CONFIG, HISTORY, LEDGER, MODEL = "run.json", "config.yaml", "history", "quarantine.jsonl", "model"
SWEEP = "sweep.json"

StepRecord = tuple[int, float, dict[str, float]]
"""Number, unix time [s], metrics."""


def begin(
    config: RunConfig,
    folder: str,
    order: dict[str, Any],
    datasets: list[dict[str, Any]],
    run_id: str | None = None,
) -> None:
    """Write down what the record of a run will be made from. A run that goes on stays the one that was begun.

    Args:
        config: the run.
        folder: of the run.
        order: what fixes the samples and their order, for those who resume.
        datasets: what `Copy.log_dataset` takes.
        run_id: of an MLflow run that was made for it.
    """
    first = {
        "key": uuid.uuid4().hex,
        "run_id": run_id,
        "name": str(config.name),
        "start_time": time.time(),
        "tags": {"mlflow.source.name": "jobs/train.py", **revision()},
        "datasets": datasets,
    }
    begun = first | (read(folder) if storage.exists(storage.join(folder, BEGUN)) else {})
    # Where the record is, may change; but no password is written down.
    tracking = config.tracking.model_copy(update={"uri": without_password(tracking_uri(config.tracking))})
    begun |= {"order": order, "tracking": tracking.model_dump(), "status": None, "end_time": None, "lineage": None}
    if not storage.exists(storage.join(folder, CONFIG)):
        storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    write(folder, begun)


def read(folder: str) -> dict[str, Any]:
    """Its run.json."""
    return json.loads(storage.read_bytes(storage.join(folder, BEGUN)))


def write(folder: str, begun: dict[str, Any]) -> None:
    """Write its run.json."""
    storage.write_bytes(storage.join(folder, BEGUN), json.dumps(begun).encode())


def steps_after(folder: str, last: int) -> Iterable[StepRecord]:
    """Steps of a run's folder. Names of workers' files end with their last step; drivers' come before them, since what
    a driver could not deliver is older than what a later start did instead."""
    folder = storage.join(folder, HISTORY)
    for name in storage.names_in(folder):
        if name.startswith("step-") and int(Path(name).stem.split("-")[1]) <= last:
            continue
        for line in storage.read_bytes(storage.join(folder, name)).splitlines():
            step = json.loads(line)
            yield step["step"], step["time"], step["metrics"]


def validations_after(folder: str, last: int) -> list[tuple[int, dict[str, float]]]:
    """Steps of a run's folder behind `last` that were validated, and their metrics, in order. Of a step that was walked
    twice the first walk counts, as in the record."""
    found: dict[int, dict[str, float]] = {}
    for step, _, metrics in steps_after(folder, last):
        if step > last and "validation/loss" in metrics:
            found.setdefault(step, metrics)
    return sorted(found.items())


def runs(storage_folder: str, names: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Name and folder of runs, in the order in which they began.

    Args:
        storage_folder: of all runs.
        names: of those that are wanted, NAME or SWEEP/TRIAL; none for all.

    Raises:
        BadConfig: there is no such run.
    """
    root = storage.absolute(storage_folder)
    found = {}
    for name in names or _below(root):
        folder = storage.join(root, name)
        if not storage.exists(storage.join(folder, BEGUN)):
            raise BadConfig(f"--name {name}: there is no {BEGUN} in {folder}, so no run was begun there")
        found[name] = read(folder).get("start_time", 0.0), folder
    if not found:
        raise BadConfig(f"--storage {root}: there are no runs in it")
    return [(name, found[name][1]) for name in sorted(found, key=lambda name: found[name][0])]


def _below(root: str) -> list[str]:
    """Names of all runs, those of a sweep's trials with the sweep's in front."""
    names = storage.folders_in(root)
    trials = [f"{name}/{trial}" for name in names for trial in storage.folders_in(storage.join(root, name))]
    return [name for name in names + trials if storage.exists(storage.join(storage.join(root, name), BEGUN))]


def revision() -> dict[str, str]:
    """The revision of the code, where it is a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}
