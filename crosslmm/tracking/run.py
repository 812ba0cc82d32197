"""One MLflow run: found by its key or made, and what is written of it."""

import json
import time
import uuid
from pathlib import Path
from typing import Any, Self

import mlflow
from mlflow.entities import Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.run_folder import git_revision
from crosslmm.text import redacted
from crosslmm.tracking.client import RetryingClient

KEY, MADE = "crosslmm.key", "crosslmm.made"
"""Tags: the run's unique key; when this MLflow run was made for it [ns]."""


class MlflowRun:
    """One MLflow run and what is written of it, by one process at a time. A server that is away is waited for.

    Args:
        tracking: where the record is.
        run_id: of a run that exists.

    Attributes:
        uri: where the record is, for people: without credentials, which the environment may have put in it.
    """

    def __init__(self, tracking: TrackingConfig, run_id: str) -> None:
        self.tracking, self.run_id = tracking, run_id
        uri = tracking_uri(tracking)
        self.uri = redacted(uri)
        # The registry and the models' loader read the process-wide setting.
        mlflow.set_tracking_uri(uri)
        self.client: Any = RetryingClient(uri)

    @classmethod
    def create(cls, tracking: TrackingConfig, name: str, source: str, parent: str | None = None) -> Self:
        """A new run, below another one if that is given."""
        tags = {"mlflow.runName": name, "mlflow.source.name": source, **git_revision()}
        if parent:
            tags["mlflow.parentRunId"] = parent
        client = RetryingClient(tracking_uri(tracking))
        return cls(tracking, find_or_create(client, tracking, uuid.uuid4().hex, tags, time.time()))

    def log_params(self, values: dict[str, Any]) -> None:
        """Parameters cannot be changed in MLflow: a run that goes on keeps those that it began with."""
        known = self.client.get_run(self.run_id).data.params
        items = [Param(key, str(value)[:6000]) for key, value in flatten(values).items() if key not in known]
        for i in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[i : i + 100])

    def log_config(self, config: RunConfig) -> None:
        """The flattened configuration as parameters."""
        self.log_params(without_places(config.model_dump()))

    def log_values(self, metrics: dict[str, float], tags: dict[str, str]) -> None:
        """Metrics that belong to no step, and tags."""
        now = int(time.time() * 1000)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
            tags=[RunTag(key, value[:5000]) for key, value in tags.items()],
        )

    def log_text(self, name: str, text: str) -> None:
        """Write an artifact."""
        self.client.log_text(self.run_id, text, name)

    def log_file(self, path: Path) -> None:
        """Copy a file to the artifacts."""
        self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(self.run_id, status)


def find_or_create(client: Any, tracking: TrackingConfig, key: str, tags: dict[str, str], began: float) -> str:
    """The MLflow run that has this key. It may have been made by a call whose answer never came."""
    experiment = _experiment(client, tracking)

    def found() -> list[Any]:
        runs = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", ViewType.ALL)
        return sorted(runs, key=lambda run: (run.data.tags[MADE], run.info.run_id))

    runs = found()
    if not runs:
        tags = {**tags, KEY: key, MADE: str(time.time_ns())}
        client.create_run(experiment, int(began * 1000), tags)
        # Somebody else may have done so at the same time: the first one stays, for both.
        runs = found()
        for other in runs[1:]:
            client.delete_run(other.info.run_id)
    return _kept(runs[0])


def _experiment(client: Any, tracking: TrackingConfig) -> str:
    if found := client.get_experiment_by_name(tracking.experiment):
        return str(found.experiment_id)
    location = storage.absolute(tracking.artifacts) if tracking.artifacts else None
    try:
        return str(client.create_experiment(tracking.experiment, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment(client, tracking)  # somebody was faster


def known(client: MlflowClient, run_id: str | None) -> str | None:
    """The run, if this server has it."""
    if run_id is None:
        return None
    try:
        return _kept(client.get_run(run_id))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _kept(run: Any) -> str:
    if run.info.lifecycle_stage == "deleted":
        raise BadConfig(
            f"name: MLflow run {run.info.run_id} of {run.info.run_name} was deleted; "
            "`mlflow runs restore` it, or take another --name"
        )
    return str(run.info.run_id)


def without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Places are no names of parameters."""
    manifest = config["data"]["manifest"]
    if not isinstance(manifest, dict):
        return config
    return config | {"data": config["data"] | {"manifest": json.dumps(manifest)}}
