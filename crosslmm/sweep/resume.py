"""Starts and resumes of a sweep: sweep.json holds the settings that must not change between them."""

import functools
import json
from typing import Any

from crosslmm import run_folder, storage
from crosslmm.config import BadConfig, RunConfig, changes, roles_of
from crosslmm.config.schema import COMPARED, FREE
from crosslmm.data.manifest import Manifest
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, distribution
from crosslmm.tracking import MlflowRun, require_answer


def begin_sweep(
    config: RunConfig, folder: str, space_name: str, space: Space, sweep: SweepSettings, manifests: list[Manifest]
) -> tuple[MlflowRun, dict[str, Any]]:
    """Start or resume a sweep; return its MLflow run and the content of its sweep.json.

    Args:
        config: configuration on which the points are applied.
        folder: folder of the sweep.
        space_name: name of the space, for people.
        space: the search space.
        sweep: settings of the sweep, recorded in MLflow.
        manifests: training manifests, then the validation manifest; their digests must not change.

    Raises:
        BadConfig: an earlier start under this name searched another space, other data or another
            configuration, or MLflow does not answer.
    """
    require_answer(config.tracking)
    uri = storage.join(folder, run_folder.SWEEP_FILE)
    searched = {path: str(distribution(path, dimension)) for path, dimension in space.items()}
    settled = {
        "space": searched,
        "config": config.model_dump(mode="json"),
        "data": {f"digest of manifest {i}": manifest.digest for i, manifest in enumerate(manifests)},
    }
    if storage.exists(uri):
        begun = json.loads(storage.read_bytes(uri))
        if require_same(config, begun, settled):
            begun |= settled
            storage.write_bytes(uri, json.dumps(begun).encode())
        record = MlflowRun(config.tracking, begun["run_id"])
        record.client.update_run(record.run_id, status="RUNNING")
        return record, begun
    record = MlflowRun.create(config.tracking, str(config.name), "jobs/tune.py")
    record.log_config(config)
    record.log_params({"space": {"name": space_name, **searched}, "sweep": sweep.model_dump()})
    begun = {"run_id": record.run_id, **settled}
    storage.write_bytes(uri, json.dumps(begun).encode())
    return record, begun


def require_same(config: RunConfig, begun: dict[str, Any], now: dict[str, Any]) -> bool:
    """Compare a sweep's start with an earlier one under the same name; return whether a change must be recorded.

    The space and the content of the manifests must never change. A key of the configuration may change if it is free
    for runs and does not decide how trials are compared; any other key only with `accept_changes`.

    Raises:
        BadConfig: naming what differs.
    """
    name = config.name
    for part in ("space", "data"):
        before = begun.get(part, now[part])  # an earlier version did not record the data
        for key in {**before, **now[part]}:
            if before.get(key) != now[part].get(key):
                raise BadConfig(
                    f"name: sweep {name} was begun with {key} {before.get(key)}, which is {now[part].get(key)} now; "
                    "undo that, or give another --name"
                )
    old = begun["config"] if "model" in begun["config"] else nest_keys(begun["config"])
    differing = {
        key: values
        for key, values in changes(old, now["config"], frozenset()).items()
        if FREE not in roles_of(key) or COMPARED in roles_of(key)
    }
    if differing and not config.accept_changes:
        text = "; ".join(f"{key} {was} -> {is_now}" for key, (was, is_now) in differing.items())
        raise BadConfig(
            f"name: sweep {name} was begun with another configuration: {text}. Undo that, give another --name, or "
            "continue with --accept_changes true"
        )
    return bool(differing)


def nest_keys(flat: dict[str, Any]) -> dict[str, Any]:
    """Nest the flat keys that earlier versions recorded: {"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        functools.reduce(lambda section, part: section.setdefault(part, {}), sections, nested)[name] = value
    return nested
