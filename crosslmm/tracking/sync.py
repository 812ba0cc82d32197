"""MLflow brought up to a run's folder. Doing it again changes nothing, so it is done whenever the server is there: by
the run's driver while it goes on (`live.Run`), and later by jobs/track.py (`replay`)."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import CONFIG_FILE, MODEL_FOLDER, QUARANTINE_FILE, RUN_FILE, StepRecord, read_run, steps_after
from crosslmm.text import redacted
from crosslmm.tracking.client import describe_failure, refuses
from crosslmm.tracking.registry import register
from crosslmm.tracking.run import MlflowRun, find_or_create, known, without_places

REGISTERED = "crosslmm.inference.pyfunc"
"""Tag: which end of the run has a model."""
AT_ONCE = 1000
"""MLflow takes so many metrics in one call."""


class RunSync(MlflowRun):
    """What MLflow has of a training run, brought up to what the run's folder has. It finds or makes the MLflow run.

    Args:
        folder: of the run.
        begun: its run.json.
        tracking: where the record is.

    Raises:
        BadConfig: the MLflow run was deleted.
        MlflowException: the server refuses, or is away.
    """

    def __init__(self, folder: str, begun: dict[str, Any], tracking: TrackingConfig) -> None:
        client = MlflowClient(tracking_uri(tracking))
        run_id = known(client, begun["run_id"])
        if run_id is None:
            tags = {"mlflow.runName": begun["name"], **begun["tags"]}
            run_id = find_or_create(client, tracking, begun["key"], tags, begun["start_time"])
        super().__init__(tracking, run_id)
        self.client = client
        self.folder = folder
        self.log_params(without_places(yaml.safe_load(storage.read_bytes(storage.join(folder, CONFIG_FILE)))))
        for dataset in begun["datasets"]:
            self.log_dataset(**dataset)
        # Steps that a resume walks again are already there.
        self.last_step = max((m.step for m in client.get_metric_history(run_id, "loss")), default=0)

    def log_dataset(self, uri: str, digest: str, rows: int, context: str) -> None:
        """Record a manifest as an input. MLflow keeps 36 characters of a digest; the whole one is in the profile."""
        dataset = Dataset(
            name=uri.rsplit("/", 1)[-1],
            digest=digest[:36],
            source_type=storage.scheme_of(uri),
            source=json.dumps({"uri": uri}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        self.client.log_inputs(
            self.run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
        )

    def log(self, steps: Iterable[StepRecord]) -> int:
        """Write the metrics of steps that are not there yet, in order -> how many points.

        Of a step that comes twice the first one counts. Two who send the same steps at the same time do no harm: MLflow
        keeps one of two points that are equal, time included.
        """
        new: dict[int, StepRecord] = {}
        for step in steps:
            if step[0] > self.last_step:
                new.setdefault(step[0], step)
        due = [new[number] for number in sorted(new)]
        # Whole steps in one call, and the loss, which tells how far we came, as the last of a step's.
        together = max(1, AT_ONCE // max((len(values) for _, _, values in due), default=1))
        sent = 0
        for i in range(0, len(due), together):
            points = [
                Metric(name, values[name], int(when * 1000), number)
                for number, when, values in due[i : i + together]
                for name in sorted(values, key="loss".__eq__)
            ]
            for j in range(0, len(points), AT_ONCE):
                self.client.log_batch(self.run_id, metrics=points[j : j + AT_ONCE])
            self.last_step = due[i : i + together][-1][0]
            sent += len(points)
        return sent

    def log_history(self, more: Iterable[StepRecord] = ()) -> int:
        """Write what the folder has beyond what is there -> how many points.

        Args:
            more: later steps, and some of the same, that the folder does not have yet.
        """
        return self.log([*steps_after(self.folder, self.last_step), *more])

    def end(self, begun: dict[str, Any]) -> None:
        """Write how the run ended, if it has, and its ledger. `begun` is its run.json."""
        ledger = storage.join(self.folder, QUARANTINE_FILE)
        if storage.exists(ledger):
            self.log_text(QUARANTINE_FILE, storage.read_bytes(ledger).decode())
        if begun["status"]:
            self.client.set_terminated(self.run_id, begun["status"], int(begun["end_time"] * 1000))

    def register_once(self, begun: dict[str, Any]) -> str | None:
        """Register the model of a run that finished, unless it is -> `models:/NAME@ALIAS`, if it has one."""
        if not begun["lineage"]:
            return None
        # A run that goes on after its end has another model at the next one.
        end = str(begun["end_time"])
        if self.client.get_run(self.run_id).data.tags.get(REGISTERED) == end:
            return f"models:/{self.tracking.registered_model}@{self.tracking.alias}"
        try:
            registered = register(self, storage.join(self.folder, MODEL_FOLDER), begun["lineage"])
        finally:
            self.end(begun)  # MLflow starts and ends a run that a model is logged to
        self.client.log_batch(self.run_id, tags=[RunTag(REGISTERED, end)])
        return registered


@dataclass(frozen=True)
class Delivered:
    """What a replay found and did."""

    run_id: str
    points: int
    """Sent; those that were there are not counted."""
    status: str | None
    """FINISHED, FAILED or KILLED; None while the run goes on, or where its driver was killed."""
    model_uri: str | None


def replay(folder: str, uri: str | None = None) -> Delivered:
    """Bring MLflow up to what a run's folder has; it may be going on.

    Args:
        folder: of the run.
        uri: of MLflow; None for the one that the run was told.

    Raises:
        BadConfig: the server refuses, or the MLflow run was deleted.
        ConnectionError: the server is away.
    """
    begun = read_run(folder)
    if "key" not in begun:
        raise BadConfig(f"{folder}: its {RUN_FILE} was written by an earlier version; resume the run once")
    tracking = TrackingConfig(**begun["tracking"])
    tracking = tracking.model_copy(update={"uri": uri or tracking.uri})
    try:
        copy = RunSync(folder, begun, tracking)
        points = copy.log_history()
        copy.end(begun)
        return Delivered(copy.run_id, points, begun["status"], copy.register_once(begun))
    except MlflowException as error:
        reason = f"tracking.uri: {describe_failure(redacted(tracking_uri(tracking)), error)}"
        raise BadConfig(reason) if refuses(error) else ConnectionError(reason) from error
