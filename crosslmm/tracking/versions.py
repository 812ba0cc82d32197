"""Versions in the model registry: find one, fetch its files, record its scores, give it an alias."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric
from mlflow.exceptions import MlflowException

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import git_revision
from crosslmm.text import redacted
from crosslmm.tracking.client import RetryingClient, describe_failure, open_client, refuses
from crosslmm.tracking.registry import BASE_TAG
from crosslmm.tracking.run import MlflowRun, find_or_create

NAMED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+))")
LOGGED = re.compile(r"models:/(m-\w+)")
"""Source of a version that was logged as a model."""
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Codes of MLflow's errors about an alias or a version that does not exist."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    name: str
    number: str
    run_id: str | None
    """MLflow run that made it."""
    model_id: str | None
    """MLflow's logged model that it is a version of."""
    base: str | None = None
    """Of an adapter: the model that it belongs to, models:/NAME/VERSION or a hub name."""

    @property
    def uri(self) -> str:
        """Its address, which does not change."""
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True)
class EvaluationRecord:
    """What is recorded in MLflow about an evaluation."""

    name: str
    key: str
    """Unique key: the same evaluation is recorded once."""
    benchmark: str
    params: dict[str, Any]
    metrics: dict[str, float]
    """Metrics without a prefix, such as `accuracy`."""
    data_uri: str
    data_digest: str
    questions: int
    files: dict[str, bytes]
    """Artifacts by name."""


def find_version(uri: str, config: TrackingConfig) -> Version:
    """Return the version that a URI names now; an alias may move later.

    Args:
        uri: models:/NAME@ALIAS or models:/NAME/VERSION.
        config: MLflow server.

    Raises:
        BadConfig: there is no such version, or the server refuses.
        ConnectionError: the server does not answer.
    """
    version = _find(uri, config)
    if version is None:
        where = redacted(tracking_uri(config))
        raise BadConfig(
            f"{uri}: there is no such version in the registry at {where}; train one, or set MLFLOW_TRACKING_URI"
        )
    return version


def find_alias(name: str, alias: str, config: TrackingConfig) -> Version | None:
    """Return the version that has an alias; None if none has it. Raises like `find_version`."""
    return _find(f"models:/{name}@{alias}", config)


def _find(uri: str, config: TrackingConfig) -> Version | None:
    match = NAMED.fullmatch(uri)
    if not match:
        raise BadConfig(f"{uri}: a registered model is models:/NAME@ALIAS or models:/NAME/VERSION")
    client = open_client(tracking_uri(config))
    try:
        if match["alias"]:
            entry = client.get_model_version_by_alias(match["name"], match["alias"])
        else:
            entry = client.get_model_version(match["name"], match["version"])
    except MlflowException as error:
        if error.error_code in MISSING:
            return None
        raise _failure(config, error) from error
    # MLflow's own registry leaves the field `model_id` empty.
    source = LOGGED.fullmatch(entry.source or "")
    return Version(
        entry.name,
        str(entry.version),
        entry.run_id or None,
        source[1] if source else entry.model_id or None,
        entry.tags.get(BASE_TAG),
    )


def fetch_version(version: Version, config: TrackingConfig, folder: str) -> str:
    """Copy a version's files into a local folder; return the folder of the exported model among them.

    Raises:
        BadConfig: it is not a model of this project, or the server refuses.
        ConnectionError: the server does not answer.
    """
    mlflow.set_tracking_uri(tracking_uri(config))
    try:
        path = Path(mlflow.artifacts.download_artifacts(version.uri, dst_path=folder))
    except MlflowException as error:
        raise _failure(config, error) from error
    try:
        flavors = yaml.safe_load((path / "MLmodel").read_text())["flavors"]
        relative = flavors["python_function"]["artifacts"]["model"]["path"]
        return storage.safe_join(str(path), str(relative))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise BadConfig(f"{version.uri}: is not a model that this project has registered") from None


def record_evaluation(record: EvaluationRecord, version: Version | None, config: TrackingConfig) -> str:
    """Record an evaluation in an MLflow run of its own, and on the version; return the id of the run.

    The run is a child of the run that made the version. Its metrics belong to the version's logged model too, with the
    digest of the data; its files are also among the logged model's. Tags of the version have the score. A repetition
    writes nothing twice.

    Raises:
        BadConfig: the server refuses.
        ConnectionError: the server does not answer.
    """
    try:
        return _record(record, version, config)
    except MlflowException as error:
        raise _failure(config, error) from error


def _record(record: EvaluationRecord, version: Version | None, config: TrackingConfig) -> str:
    tags = {"mlflow.runName": record.name, "mlflow.source.name": "jobs/evaluate.py", **git_revision()}
    if version:
        tags["evaluated"] = version.uri
        tags |= {"mlflow.parentRunId": version.run_id} if version.run_id else {}
    client = RetryingClient(tracking_uri(config))
    run = MlflowRun(config, find_or_create(client, config, record.key, tags, time.time()))
    if client.get_run(run.run_id).info.status == "FINISHED":
        return run.run_id
    run.log_params(record.params | ({"model": version.uri} if version else {}))
    model_id = version.model_id if version else None
    _log_inputs(client, run.run_id, record, model_id)
    names = run.names_of(record.metrics)
    now = int(time.time() * 1000)
    run.send("metrics", [
        Metric(names[key], value, now, 0, model_id=model_id, dataset_name=record.benchmark[:500],
               dataset_digest=record.data_digest[:36])
        for key, value in record.metrics.items()
    ])  # fmt: skip
    _log_files(client, run.run_id, record, model_id)
    if version:
        _describe_version(client, version, record, run.run_id)
    run.finish("FINISHED")
    return run.run_id


def _log_inputs(client: Any, run_id: str, record: EvaluationRecord, model_id: str | None) -> None:
    dataset = Dataset(
        name=record.benchmark[:500],
        digest=record.data_digest[:36],
        source_type=storage.scheme_of(record.data_uri),
        source=json.dumps({"uri": record.data_uri}),
        profile=json.dumps({"num_rows": record.questions, "sha256": record.data_digest}),
    )
    inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])]
    models = [LoggedModelInput(model_id)] if model_id else None
    client.log_inputs(run_id, datasets=inputs, models=models)


def _log_files(client: Any, run_id: str, record: EvaluationRecord, model_id: str | None) -> None:
    """Store the files as artifacts of the run, and of the version's model."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, data in record.files.items():
            path = Path(folder, name)
            path.write_bytes(data)
            client.log_artifact(run_id, str(path))
        if model_id:
            client.log_model_artifacts(model_id, folder, f"evaluations/{record.name}")


def _describe_version(client: Any, version: Version, record: EvaluationRecord, run_id: str) -> None:
    """Set the tags of the version: its score, on which data, by which run."""
    score = f"score.{record.benchmark}"
    values = {"run": run_id, "data_sha256": record.data_digest}
    if "accuracy" in record.metrics:
        figures = [record.metrics[key] for key in ("accuracy", "accuracy_low", "accuracy_high")]
        values[""] = "{:.4f} [{:.4f}, {:.4f}]".format(*figures)
    else:
        values[""] = f"none: {record.metrics['unreadable']:.0f} of {record.questions} questions could not be asked"
    for key, value in values.items():
        client.set_model_version_tag(version.name, version.number, f"{score}{'.' if key else ''}{key}", value)


def move_alias(version: Version, alias: str, tags: dict[str, str], config: TrackingConfig) -> None:
    """Move an alias to a version, whichever has it now, and set tags that say why. Raises like `find_version`."""
    client = open_client(tracking_uri(config))
    try:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.number, key, value[:5000])
        client.set_registered_model_alias(version.name, alias, version.number)
    except MlflowException as error:
        raise _failure(config, error) from error


def _failure(config: TrackingConfig, error: MlflowException) -> Exception:
    reason = f"tracking.uri: {describe_failure(redacted(tracking_uri(config)), error)}"
    return BadConfig(reason) if refuses(error) else ConnectionError(reason)
