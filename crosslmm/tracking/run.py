"""An MLflow run: find it by its key or create it, and write to it."""

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import mlflow
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.run_folder import git_revision
from crosslmm.text import in_brief, printable, redacted, safe_name
from crosslmm.tracking.client import RetryingClient, refuses_item

log = logging.getLogger(__name__)

KEY, CREATED = "crosslmm.key", "crosslmm.made"
"""Tags: the run's unique key; the time at which the MLflow run was created for it [unix time, ns]."""
BATCH_SIZES = {"metrics": 1000, "params": 100, "tags": 100}
"""Most items that MLflow accepts in one call."""
ORIGINAL_NAME = "original_name/"
"""Prefix of the tags that say what a metric or parameter is called where MLflow does not accept its name."""


class MlflowRun:
    """An existing MLflow run that one process writes to. Calls are retried while the server does not answer.

    Args:
        tracking: MLflow server and experiment.
        run_id: id of the run.

    Attributes:
        uri: the MLflow server, without the credentials that the environment may have put into the URI.
    """

    def __init__(self, tracking: TrackingConfig, run_id: str) -> None:
        self.tracking, self.run_id = tracking, run_id
        uri = tracking_uri(tracking)
        self.uri = redacted(uri)
        # The registry and the models' loader read the process-wide setting.
        mlflow.set_tracking_uri(uri)
        self.client: Any = RetryingClient(uri)
        self._renamed: set[str] = set()
        self._refused: set[tuple[str, str]] = set()

    @classmethod
    def create(cls, tracking: TrackingConfig, name: str, source: str, parent: str | None = None) -> Self:
        """Create a run, as a child of `parent` if given."""
        tags = {"mlflow.runName": printable(name)[:250], "mlflow.source.name": source, **git_revision()}
        if parent:
            tags["mlflow.parentRunId"] = parent
        client = RetryingClient(tracking_uri(tracking))
        return cls(tracking, find_or_create(client, tracking, uuid.uuid4().hex, tags, time.time()))

    def log_params(self, values: dict[str, Any]) -> None:
        """Log nested values as dotted parameters. Existing ones keep their values: MLflow cannot change them."""
        known, flat = self.client.get_run(self.run_id).data.params, flatten(values)
        names = self.names_of(flat)
        items = [Param(names[key], printable(str(value))[:6000]) for key, value in flat.items()]
        self.send("params", [item for item in items if item.key not in known])

    def log_config(self, config: RunConfig) -> None:
        """Log a configuration as parameters."""
        self.log_params(loggable(config.model_dump()))

    def log_values(self, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """Log metrics that belong to no step, and tags."""
        now, names = int(time.time() * 1000), self.names_of(metrics)
        self.send("metrics", [Metric(names[key], value, now, 0) for key, value in metrics.items()])
        self.send("tags", [RunTag(key, value[:5000]) for key, value in tags.items()])

    def names_of(self, originals: Iterable[str]) -> dict[str, str]:
        """Return the name under which MLflow keeps each metric or parameter. A tag of the run keeps the original of
        those that are called otherwise."""
        names = {original: safe_name(original) for original in originals}
        new = {name: original for original, name in names.items() if name != original and name not in self._renamed}
        self.send("tags", [RunTag(f"{ORIGINAL_NAME}{name}", printable(new[name])[:5000]) for name in new])
        self._renamed |= new.keys()
        return names

    def send(self, field: str, items: Sequence[Metric | Param | RunTag]) -> None:
        """Log metrics, params or tags. One that MLflow refuses would be refused again: it is left out, which is
        logged once, and the others are sent.

        Args:
            field: metrics, params or tags.
            items: any number of them.
        """
        items = [item for item in items if (field, item.key) not in self._refused]
        for i in range(0, len(items), BATCH_SIZES[field]):
            self._send_batch(field, items[i : i + BATCH_SIZES[field]])

    def _send_batch(self, field: str, items: Sequence[Metric | Param | RunTag]) -> None:
        try:
            self.client.log_batch(self.run_id, **{field: items})
        except MlflowException as error:
            if not refuses_item(error):
                raise
            find_run(self.client, self.run_id)  # raises if the run was deleted: it would refuse everything
            if len(items) > 1:
                middle = len(items) // 2
                self._send_batch(field, items[:middle])
                self._send_batch(field, items[middle:])
            elif (field, items[0].key) not in self._refused:
                self._refused.add((field, items[0].key))
                self.leave_out(f"{field} {items[0].key}", error)

    def leave_out(self, what: str, error: MlflowException) -> None:
        """Warn that MLflow refused an item, which the run will lack."""
        log.warning("MLflow: %s refuses %s, which is left out: %s", self.uri, what, in_brief(error))

    def log_text(self, name: str, text: str) -> None:
        """Write a text as an artifact."""
        self.client.log_text(self.run_id, text, name)

    def log_bytes(self, name: str, content: bytes) -> None:
        """Write an artifact; `name` may have folders."""
        folder, _, file_name = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / file_name).write_bytes(content)
            self.client.log_artifact(self.run_id, f"{scratch}/{file_name}", folder or None)

    def log_file(self, path: Path) -> None:
        """Copy a file to the artifacts."""
        self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def find_or_create(client: Any, tracking: TrackingConfig, key: str, tags: dict[str, str], began: float) -> str:
    """Return the id of the MLflow run with this key; create it if there is none.

    A run may exist from an earlier call whose response was lost.
    """
    experiment = _experiment(client, tracking)

    def search() -> list[Any]:
        runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", ViewType.ALL)
        return sorted(runs, key=lambda run: (run.data.tags[CREATED], run.info.run_id))

    runs = search()
    if not runs:
        tags = {**tags, KEY: key, CREATED: str(time.time_ns())}
        client.create_run(experiment, int(began * 1000), tags)
        # Another process may have created one at the same time: both use the first.
        runs = search()
        for duplicate in runs[1:]:
            client.delete_run(duplicate.info.run_id)
    return _require_active(runs[0])


def _experiment(client: Any, tracking: TrackingConfig) -> str:
    if experiment := client.get_experiment_by_name(tracking.experiment):
        return str(experiment.experiment_id)
    location = storage.absolute(tracking.artifacts) if tracking.artifacts else None
    try:
        return str(client.create_experiment(tracking.experiment, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment(client, tracking)  # another process was faster


def find_run(client: MlflowClient, run_id: str | None) -> str | None:
    """Return the id of a run if this server has it, else None."""
    if run_id is None:
        return None
    try:
        return _require_active(client.get_run(run_id))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _require_active(run: Any) -> str:
    """Return the id of an MLflow run; raise BadConfig if it was deleted."""
    if run.info.lifecycle_stage == "deleted":
        raise BadConfig(
            f"name: MLflow run {run.info.run_id} of {run.info.run_name} was deleted; "
            "`mlflow runs restore` it, or take another --name"
        )
    return str(run.info.run_id)


def loggable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with a mixture of manifests turned into one value: paths cannot be parameter names."""
    manifest = config["data"]["manifest"]
    if not isinstance(manifest, dict):
        return config
    return config | {"data": config["data"] | {"manifest": json.dumps(manifest)}}
