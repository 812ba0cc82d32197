"""Bring MLflow up to date with a run's folder; repeating it changes nothing.

The run's driver does so while the run goes on (`BackgroundSync`), jobs/track.py later (`replay`).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import (
    ANSWERS_FOLDER,
    CONFIG_FILE,
    MODEL_FOLDER,
    QUARANTINE_FILE,
    RUN_FILE,
    StepRecord,
    list_pictures,
    read_answers,
    read_run,
    steps_after,
)
from crosslmm.text import printable, redacted, without_credentials
from crosslmm.tracking.client import describe_failure, open_client, refuses, refuses_item
from crosslmm.tracking.registry import register
from crosslmm.tracking.run import BATCH_SIZES, MlflowRun, find_or_create, find_run, loggable

ANSWERS_TABLE, SHOWN_VALIDATIONS = "answers.json", 50
"""Artifact with the sample answers, and of how many validations it has them."""
PICTURES_FOLDER = "table_images/answers"
"""Artifacts with the pictures that the table shows, where MLflow's own `log_table` would have them."""
REGISTERED_END_TIME = "crosslmm.registered_end_time"
"""Tag: end time that the run had when its model was registered; the model of another end is registered again."""


class RunSync(MlflowRun):
    """The MLflow run of a training run, found or created, which is brought up to date with the run's folder.

    Args:
        folder: the run's folder.
        run: its run.json.
        tracking: MLflow server and experiment.

    Raises:
        BadConfig: the MLflow run was deleted.
        MlflowException: the server refuses or does not answer.
    """

    def __init__(self, folder: str, run: dict[str, Any], tracking: TrackingConfig) -> None:
        client = open_client(tracking_uri(tracking))
        run_id = find_run(client, run["run_id"])
        if run_id is None:
            tags = {"mlflow.runName": run["name"], **run["tags"]}
            run_id = find_or_create(client, tracking, run["key"], tags, run["start_time"])
        super().__init__(tracking, run_id)
        self.client = client
        self.folder = folder
        self._pictures_sent: set[int] = set()
        self.log_values({}, run["tags"])
        self.log_params(loggable(yaml.safe_load(storage.read_bytes(storage.join(folder, CONFIG_FILE)))))
        for dataset in run["datasets"]:
            self.log_dataset(**dataset)
        # MLflow already has the steps that a resume repeats.
        self.last_step = max((m.step for m in client.get_metric_history(run_id, "loss")), default=0)

    def log_dataset(self, uri: str, digest: str, rows: int, context: str) -> None:
        """Record a manifest as an input. MLflow stores 36 characters of a digest; the profile has all of them."""
        dataset = Dataset(
            name=uri.rsplit("/", 1)[-1],
            digest=digest[:36],
            source_type=storage.scheme_of(uri),
            source=json.dumps({"uri": uri}),
            profile=json.dumps({"num_rows": rows, "sha256": digest}),
        )
        try:
            self.client.log_inputs(
                self.run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])]
            )
        except MlflowException as error:
            if not refuses_item(error):
                raise
            self.leave_out(f"input {uri}", error)

    def log(self, steps: Iterable[StepRecord]) -> int:
        """Send the metrics of steps that MLflow does not have, in order; return the number of points.

        For a repeated step, the first record counts. Two processes may send the same steps at the same time: MLflow
        stores one of two points that are equal, including their time.
        """
        new: dict[int, StepRecord] = {}
        for step in steps:
            if step[0] > self.last_step:
                new.setdefault(step[0], step)
        pending = [new[number] for number in sorted(new)]
        # All metrics of a step in one call, the loss last: its history shows which steps are complete.
        steps_per_call = max(1, BATCH_SIZES["metrics"] // max((len(values) for _, _, values in pending), default=1))
        names, sent = self.names_of(dict.fromkeys(name for _, _, values in pending for name in values)), 0
        for i in range(0, len(pending), steps_per_call):
            points = [
                Metric(names[name], values[name], int(when * 1000), number)
                for number, when, values in pending[i : i + steps_per_call]
                for name in sorted(values, key="loss".__eq__)
            ]
            self.send("metrics", points)
            self.last_step = pending[i : i + steps_per_call][-1][0]
            sent += len(points)
        return sent

    def log_history(self, more: Iterable[StepRecord] = ()) -> int:
        """Send the steps in the folder that MLflow does not have; return the number of points.

        Args:
            more: later steps that the folder may not have yet; may overlap with it.
        """
        return self.log([*steps_after(self.folder, self.last_step), *more])

    def log_answers(self) -> None:
        """Send the sample answers of the last validations, as one table that MLflow shows."""
        if rows := list(read_answers(self.folder, SHOWN_VALIDATIONS)):
            pictures = self._send_pictures({row["row"] for row in rows})
            if pictures:
                rows = [{"frames": pictures.get(row["row"]), **row} for row in rows]
            table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
            self.log_text(ANSWERS_TABLE, printable(json.dumps(table)))
            self.log_values({}, {MLFLOW_LOGGED_ARTIFACTS: json.dumps([{"path": ANSWERS_TABLE, "type": "table"}])})

    def _send_pictures(self, rows: set[int]) -> dict[int, dict[str, str]]:
        """Send the pictures of these rows that were not sent yet; return the cell of each row's picture."""
        cells = {}
        for row, name in list_pictures(self.folder).items():
            if row not in rows:
                continue
            path = f"{PICTURES_FOLDER}/{name}"
            cells[row] = {"type": "image", "filepath": path, "compressed_filepath": path}
            if row not in self._pictures_sent:
                jpeg = storage.read_bytes(storage.safe_join(self.folder, f"{ANSWERS_FOLDER}/{name}"))
                self.log_bytes(path, jpeg)
                self._pictures_sent.add(row)
        return cells

    def end(self, run: dict[str, Any]) -> None:
        """Send the sample answers, the list of unreadable samples and, once the run has ended, its status."""
        self.log_answers()
        quarantine = storage.safe_join(self.folder, QUARANTINE_FILE)
        if storage.exists(quarantine):
            self.log_text(QUARANTINE_FILE, storage.read_bytes(quarantine).decode())
        if run["status"]:
            self.client.set_terminated(self.run_id, run["status"], int(run["end_time"] * 1000))

    def register_once(self, run: dict[str, Any]) -> str | None:
        """Register a finished run's model, if it has one that is not registered yet; return `models:/NAME@ALIAS`."""
        if not run["lineage"]:
            return None
        # A run that is resumed after its end gets another model at its next end.
        end = str(run["end_time"])
        if self.client.get_run(self.run_id).data.tags.get(REGISTERED_END_TIME) == end:
            return f"models:/{self.tracking.registered_model}@{self.tracking.alias}"
        try:
            registered = register(self, storage.join(self.folder, MODEL_FOLDER), run["lineage"], self.folder)
        finally:
            self.end(run)  # logging a model sets the status of its run
        self.client.log_batch(self.run_id, tags=[RunTag(REGISTERED_END_TIME, end)])
        return registered

    def registered_version(self) -> str | None:
        """Return `models:/NAME/VERSION` of the model that the run registered last; unlike an alias, it never moves."""
        version = self.client.get_run(self.run_id).data.tags.get("registered_model")
        return f"models:/{version}" if version else None


@dataclass(frozen=True)
class Delivered:
    """Result of a replay."""

    run_id: str
    points: int
    """Number of points sent, without those that MLflow had."""
    status: str | None
    """FINISHED, FAILED or KILLED; None while the run goes on or if its driver was killed."""
    model_uri: str | None
    """`models:/NAME@ALIAS`; None without a registered model."""
    model_version: str | None
    """`models:/NAME/VERSION`."""


def replay(folder: str, uri: str | None = None) -> Delivered:
    """Bring MLflow up to date with the folder of a run, which may be active.

    Args:
        folder: the run's folder.
        uri: the MLflow server; None for the one that the run was given. Its user and password, which the folder does
            not have, are those in MLFLOW_TRACKING_URI, if it names the same server.

    Raises:
        BadConfig: the server refuses, or the MLflow run was deleted.
        ConnectionError: the server does not answer.
    """
    run = read_run(folder)
    if "key" not in run:
        raise BadConfig(f"{folder}: its {RUN_FILE} was written by an earlier version; resume the run once")
    tracking = TrackingConfig(**run["tracking"])
    own = tracking_uri(TrackingConfig())
    uri = uri or (own if without_credentials(own) == tracking.uri else tracking.uri)
    tracking = tracking.model_copy(update={"uri": uri})
    try:
        sync = RunSync(folder, run, tracking)
        points = sync.log_history()
        sync.end(run)
        model_uri = sync.register_once(run)
        return Delivered(sync.run_id, points, run["status"], model_uri, sync.registered_version())
    except MlflowException as error:
        reason = f"tracking.uri: {describe_failure(redacted(tracking_uri(tracking)), error)}"
        raise BadConfig(reason) if refuses(error) else ConnectionError(reason) from error
