"""The record of a run in MLflow, and the model registry. A run's folder in storage is the truth:

    run.json            what the MLflow run is made from; while the run goes on, its driver alone writes it
    config.yaml         the configuration that the run was begun with
    history/*.jsonl     {"step": int, "time": unix seconds, "metrics": {name: float}}, a line for each step
    quarantine.jsonl    what could not be read
    model/              what was exported

`Copy` brings MLflow up to it. Doing that again changes nothing, so it is done whenever the server is there: by the
run's driver while it goes on (`Run`), and later by jobs/track.py (`replay`).
"""

import json
import logging
import os
import subprocess
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import mlflow
import yaml
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import InvalidUrlException, MlflowException
from mlflow.models import ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, TrackingConfig, flatten, redacted, to_yaml

# Its own chatter would stand between our lines. It asks for type hints or examples to guess a signature from; ours is
# given whole. Metrics of the machine are lost while the server is away, and that is all there is to say of them.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each try
warnings.filterwarnings("ignore", "(?s).*(type hint|input example).*", UserWarning, "mlflow")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# Its seven tries of two minutes each would hide for a quarter of an hour that a server is away; we ask again ourselves.
# The one that is left is for connections that went stale.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

log = logging.getLogger(__name__)

BEGUN, CONFIG, HISTORY, LEDGER, MODEL = "run.json", "config.yaml", "history", "quarantine.jsonl", "model"
"""In a run's folder."""
KEY, MADE, REGISTERED = "crosslmm.key", "crosslmm.made", "crosslmm.registered"
"""Tags: the run's unique key; when this MLflow run was made for it [ns]; which end of the run has a model."""
START_S = 10.0
"""How long the start of a run waits for the server [s]."""
RETRY_S = 2.0
"""Between two calls to a server that is away [s]."""
END_S, BROKEN_OFF_S = 60.0, 5.0
"""How long the end of a run waits for it: of one that finished, and of one that somebody may be waiting to stop [s]."""
PATIENCE_S = 600.0
"""How long a sweep waits for it in the middle [s]."""
UPLOAD_S = 120
"""How long a server may take to put away one file of a model [s]."""
AT_ONCE = 1000
"""MLflow takes so many metrics in one call."""

Step = tuple[int, float, dict[str, float]]
"""Number, unix time [s], metrics."""

SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "video"), ColSpec("string", "question")]), Schema([ColSpec("string")])
)


def tracking_uri(config: TrackingConfig) -> str:
    """Where the record goes: the configuration, else MLFLOW_TRACKING_URI, else sqlite in the working directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


def require_answer(tracking: TrackingConfig) -> None:
    """Whether there is a server that takes our word.

    Raises:
        BadConfig: it does not answer, or refuses.
    """
    uri = tracking_uri(tracking)
    try:
        MlflowClient(uri).search_experiments(max_results=1)
    except Exception as error:
        raise BadConfig(f"tracking.uri: {_why(_without_password(uri), error)}") from error


def _refuses(error: Exception) -> bool:
    """Whether asking again would not help: there is an answer and it is no, or nobody to ask at such a URI."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return isinstance(error, InvalidUrlException) or (400 <= status < 500 and status not in (408, 429))
    return isinstance(error, BadConfig)


def _why(uri: str, error: Exception | None) -> str:
    """One line: "http://... does not answer". None where a call has not come back yet."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, BadConfig):
        return said
    if error and _refuses(error):
        return f"{uri} refuses: {said}"
    silent = error is None or (isinstance(error, MlflowException) and "API request to" in said)
    return f"{uri} does not answer" + ("" if silent else f": {type(error).__name__}: {said}")


class _Patient:
    """An MLflow client that asks again while its server is away. All that we call can be done twice."""

    def __init__(self, uri: str) -> None:
        self._uri, self._client = _without_password(uri), MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def patiently(*args: Any, **options: Any) -> Any:
            deadline, told = time.monotonic() + PATIENCE_S, False
            while True:
                try:
                    return call(*args, **options)
                except Exception as error:
                    if _refuses(error) or time.monotonic() > deadline:
                        raise
                    if not told:
                        log.warning(
                            "record: %s; asking again for %.0f minutes", _why(self._uri, error), PATIENCE_S / 60
                        )
                    told = True
                time.sleep(RETRY_S)

        return patiently


class Record:
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
        self.client: Any = _Patient(uri)

    @classmethod
    def create(cls, tracking: TrackingConfig, name: str, source: str, parent: str | None = None) -> Self:
        """A new run, below another one if that is given."""
        tags = {"mlflow.runName": name, "mlflow.source.name": source, **_git()}
        if parent:
            tags["mlflow.parentRunId"] = parent
        client = _Patient(tracking_uri(tracking))
        return cls(tracking, _find_or_create(client, tracking, uuid.uuid4().hex, tags, time.time()))

    def log_params(self, values: dict[str, Any]) -> None:
        """Parameters cannot be changed in MLflow: a run that goes on keeps those that it began with."""
        known = self.client.get_run(self.run_id).data.params
        items = [Param(key, str(value)[:6000]) for key, value in flatten(values).items() if key not in known]
        for i in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[i : i + 100])

    def log_config(self, config: RunConfig) -> None:
        """The flattened configuration as parameters."""
        self.log_params(_without_places(config.model_dump()))

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

    def register(self, model_uri: str, tags: dict[str, str]) -> str:
        """Log the exported model, register it with these tags, and move the alias to it -> `models:/NAME@ALIAS`.

        The version is a pyfunc made from code: `crosslmm/registered.py` and the package itself travel with the
        weights; nothing is pickled.
        """
        name, alias = self.tracking.registered_model, self.tracking.alias
        package = Path(__file__).parent
        timeout = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        with tempfile.TemporaryDirectory() as folder:
            storage.download(model_uri, folder)
            MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(timeout, UPLOAD_S))
            try:
                with mlflow.start_run(run_id=self.run_id):
                    info = mlflow.pyfunc.log_model(
                        name="model",
                        python_model=str(package / "registered.py"),
                        artifacts={"model": folder},
                        code_paths=[str(package)],
                        signature=SIGNATURE,
                        pip_requirements=_requirements(),
                        registered_model_name=name,
                    )
            finally:
                MLFLOW_HTTP_REQUEST_TIMEOUT.set(timeout)
        number = str(info.registered_model_version)
        for key, value in tags.items():
            self.client.set_model_version_tag(name, number, key, value[:5000])
        self.client.set_registered_model_alias(name, alias, number)
        self.client.log_batch(self.run_id, tags=[RunTag("registered_model", f"{name}/{number}")])
        return f"models:/{name}@{alias}"


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
        "tags": {"mlflow.source.name": "jobs/train.py", **_git()},
        "datasets": datasets,
    }
    begun = first | (_read(folder) if storage.exists(storage.join(folder, BEGUN)) else {})
    # Where the record is, may change; but no password is written down.
    tracking = config.tracking.model_copy(update={"uri": _without_password(tracking_uri(config.tracking))})
    begun |= {"order": order, "tracking": tracking.model_dump(), "status": None, "end_time": None, "lineage": None}
    if not storage.exists(storage.join(folder, CONFIG)):
        storage.write_bytes(storage.join(folder, CONFIG), to_yaml(config).encode())
    _write(folder, begun)


class Copy(Record):
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
        run_id = _known(client, begun["run_id"])
        if run_id is None:
            tags = {"mlflow.runName": begun["name"], **begun["tags"]}
            run_id = _find_or_create(client, tracking, begun["key"], tags, begun["start_time"])
        super().__init__(tracking, run_id)
        self.client = client
        self.folder = folder
        self.log_params(_without_places(yaml.safe_load(storage.read_bytes(storage.join(folder, CONFIG)))))
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

    def log(self, steps: Iterable[Step]) -> int:
        """Write the metrics of steps that are not there yet, in order -> how many points.

        Of a step that comes twice the first one counts. Two who send the same steps at the same time do no harm: MLflow
        keeps one of two points that are equal, time included.
        """
        new: dict[int, Step] = {}
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

    def log_history(self, more: Iterable[Step] = ()) -> int:
        """Write what the folder has beyond what is there -> how many points.

        Args:
            more: later steps, and some of the same, that the folder does not have yet.
        """
        return self.log([*_history(self.folder, self.last_step), *more])

    def end(self, begun: dict[str, Any]) -> None:
        """Write how the run ended, if it has, and its ledger. `begun` is its run.json."""
        ledger = storage.join(self.folder, LEDGER)
        if storage.exists(ledger):
            self.log_text(LEDGER, storage.read_bytes(ledger).decode())
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
            registered = self.register(storage.join(self.folder, MODEL), begun["lineage"])
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
    begun = _read(folder)
    if "key" not in begun:
        raise BadConfig(f"{folder}: its {BEGUN} was written by an earlier version; resume the run once")
    tracking = TrackingConfig(**begun["tracking"])
    tracking = tracking.model_copy(update={"uri": uri or tracking.uri})
    try:
        copy = Copy(folder, begun, tracking)
        points = copy.log_history()
        copy.end(begun)
        return Delivered(copy.run_id, points, begun["status"], copy.register_once(begun))
    except MlflowException as error:
        why = f"tracking.uri: {_why(redacted(tracking_uri(tracking)), error)}"
        raise BadConfig(why) if _refuses(error) else ConnectionError(why) from error


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
        found[name] = _read(folder).get("start_time", 0.0), folder
    if not found:
        raise BadConfig(f"--storage {root}: there are no runs in it")
    return [(name, found[name][1]) for name in sorted(found, key=lambda name: found[name][0])]


def _below(root: str) -> list[str]:
    """Names of all runs, those of a sweep's trials with the sweep's in front."""
    names = storage.folders_in(root)
    trials = [f"{name}/{trial}" for name in names for trial in storage.folders_in(storage.join(root, name))]
    return [name for name in names + trials if storage.exists(storage.join(storage.join(root, name), BEGUN))]


class Run:
    """The record of a training run that goes on. What is logged is delivered by a thread, and nobody waits for it.

    While the server is away steps wait; when it comes back, they are delivered in order.

    Args:
        folder: of the run, which has begun.
        tracking: where the record is.
        say: prints a line.

    Attributes:
        uri: of MLflow.
        run_id: the MLflow run; None until there is one.
        delivered: whether MLflow has all of an ended run.
        model_uri: `models:/NAME@ALIAS`, once the model is registered.

    Raises:
        BadConfig: the server refuses, or there can be none at that URI.
    """

    def __init__(self, folder: str, tracking: TrackingConfig, say: Callable[[str], None]) -> None:
        self.folder, self.tracking, self.say = folder, tracking, say
        self.uri = redacted(tracking_uri(tracking))
        self.run_id: str | None = None
        self.delivered = False
        self.model_uri: str | None = None
        self._begun = _read(folder)
        self._waiting: list[Step] = []
        self._ended = self._away = self._given_up = self._registering = False
        self._changed = threading.Condition()
        """Of all of these."""
        self._file = threading.Lock()
        """run.json is written by one at a time."""
        self._copy: Copy | None = None
        self._system: SystemMetricsMonitor | None = None
        self._error: Exception | None = None
        self._tried = threading.Event()
        threading.Thread(target=self._deliver, daemon=True).start()
        # A file takes seconds to be made, and is never away.
        is_file = self.uri.startswith("sqlite:")
        self._tried.wait(None if is_file else START_S)
        if self._error and (is_file or _refuses(self._error)):
            self._given_up = True
            raise BadConfig(f"tracking.uri: {_why(self.uri, self._error)}") from self._error
        if self.run_id is None:
            self._away = True
            say(f"record: {_why(self.uri, self._error)}; the run goes on, and its record waits in {folder}")

    def log(self, steps: Iterable[Step]) -> None:
        """Have the metrics of steps written. Steps that are there already are passed over."""
        with self._changed:
            self._waiting += steps
            self._changed.notify_all()

    def settle(self, seconds: float) -> None:
        """Wait until all that was logged is written, but no longer than this [s]."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, seconds)

    def finish(self, status: str, lineage: dict[str, str] | None = None) -> None:
        """End the run, and wait for the server, but not for ever: what it misses then lies in the run's folder.

        Args:
            status: FINISHED, FAILED or KILLED.
            lineage: tags of the model that is to be registered; None for no model.
        """
        with self._changed:
            self._begun |= {"status": status, "end_time": time.time(), "lineage": lineage}
            self._ended = True
            self._changed.notify_all()
        try:
            try:
                self._wait(RETRY_S)
            finally:
                self._keep()
            self._wait(END_S if status == "FINISHED" else BROKEN_OFF_S)
        finally:
            # Not before: whoever replays a run that has ended registers its model, as we may have been doing.
            self._write_begun()
            self._given_up = True
            if not self.delivered:
                self.run_id = None
                storage_and_name = f"--storage {storage.parent(self.folder)} --name {self._begun['name']}"
                why = _why(self.uri, self._error)
                later = " and registers the model" if lineage else ""
                self.say(f"record: {why}; python jobs/track.py replay {storage_and_name} delivers it{later}")

    def _wait(self, seconds: float) -> None:
        """Until all is delivered, but no longer than this while nothing is being registered."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not (self.delivered or self._given_up) and time.monotonic() < deadline:
                self._changed.wait(min(RETRY_S, max(0.0, deadline - time.monotonic())))
                if self._registering:
                    deadline = time.monotonic() + seconds

    def _keep(self) -> None:
        """Write the steps that wait into the folder."""
        with self._changed:
            steps = list(self._waiting)
        if steps:
            lines = (json.dumps({"step": step, "time": when, "metrics": values}) for step, when, values in steps)
            uri = storage.join(storage.join(self.folder, HISTORY), f"driver-{time.time_ns()}.jsonl")
            storage.write_bytes(uri, "".join(f"{line}\n" for line in lines).encode())

    def _write_begun(self) -> None:
        with self._file:
            _write(self.folder, self._begun)

    def _deliver(self) -> None:
        """The thread."""
        while not (self.delivered or self._given_up):
            try:
                self._bring_up()
            except Exception as error:
                self._lost(error)
                time.sleep(RETRY_S)
                continue
            if self._away:
                self._away, self._error = False, None
                self.say(f"record: {self.uri} answers; run {self.run_id} has what waited")
            self._tried.set()
            with self._changed:
                self._changed.wait_for(lambda: self.delivered or self._waiting or self._ended)

    def _bring_up(self) -> None:
        copy = self._copy or self._open()
        with self._changed:
            ended, steps = self._ended, list(self._waiting)
        # At the end also what reached the folder and not this process.
        copy.log_history(steps) if ended else copy.log(steps)
        with self._changed:
            del self._waiting[: len(steps)]
            self._changed.notify_all()
        if ended:
            if self._system:
                self._system.finish()
            copy.end(self._begun)
            self._registering = True
            try:
                self.model_uri = copy.register_once(self._begun)
            finally:
                self._registering = False
            with self._changed:
                self.delivered = True
                self._changed.notify_all()

    def _open(self) -> Copy:
        """Find or make the MLflow run, and bring it up to what earlier starts left in the folder."""
        copy = Copy(self.folder, self._begun, self.tracking)
        if self._begun["run_id"] != copy.run_id:
            self._begun["run_id"] = copy.run_id
            self._write_begun()
        copy.client.update_run(copy.run_id, status="RUNNING")
        with self._changed:
            steps = list(self._waiting)
        copy.log_history(steps)
        self.run_id, self._copy = copy.run_id, copy
        self._watch_machine()
        return copy

    def _lost(self, error: Exception) -> None:
        if self.run_id and not self._away:
            self.say(f"record: {_why(self.uri, error)}; steps wait")
            self._away = True
        self._copy = None  # somebody may replay meanwhile: how far MLflow came is asked anew
        with self._changed:
            self._error = error
            self._given_up |= self._ended and _refuses(error)
            self._changed.notify_all()
        self._tried.set()

    def _watch_machine(self) -> None:
        """Begin to record what the machine does, if it can be. MLflow's monitor ends when the server is away."""
        with suppress(Exception):
            if self._system:
                self._system.finish()
            uri = tracking_uri(self.tracking)
            self._system = SystemMetricsMonitor(str(self.run_id), resume_logging=True, tracking_uri=uri)
            self._system.start()


def _find_or_create(client: Any, tracking: TrackingConfig, key: str, tags: dict[str, str], began: float) -> str:
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


def _known(client: MlflowClient, run_id: str | None) -> str | None:
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


def _history(folder: str, after: int) -> Iterable[Step]:
    """Steps of a run's folder. Names of workers' files end with their last step; drivers' come before them, since what
    a driver could not deliver is older than what a later start did instead."""
    folder = storage.join(folder, HISTORY)
    for name in storage.names_in(folder):
        if name.startswith("step-") and int(Path(name).stem.split("-")[1]) <= after:
            continue
        for line in storage.read_bytes(storage.join(folder, name)).splitlines():
            step = json.loads(line)
            yield step["step"], step["time"], step["metrics"]


def _read(folder: str) -> dict[str, Any]:
    return json.loads(storage.read_bytes(storage.join(folder, BEGUN)))


def _write(folder: str, begun: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(folder, BEGUN), json.dumps(begun).encode())


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """Places are no names of parameters."""
    manifest = config["data"]["manifest"]
    if not isinstance(manifest, dict):
        return config
    return config | {"data": config["data"] | {"manifest": json.dumps(manifest)}}


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def load_registered(model_uri: str, config: TrackingConfig) -> Any:
    """A registered model as a pyfunc: `.predict` takes a table with the columns `video` and `question`."""
    mlflow.set_tracking_uri(tracking_uri(config))
    return mlflow.pyfunc.load_model(model_uri)


def _git() -> dict[str, str]:
    """The revision of the code, where it is a checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return {}
    return {"mlflow.source.git.commit": done.stdout.strip()} if done.returncode == 0 else {}


def _requirements() -> list[str]:
    """What the registered model imports, at the versions that wrote it."""
    return [
        f"{name}=={version(name)}"
        for name in (
            "torch",
            "transformers",
            "numpy",
            "pyarrow",
            "av",
            "rich",
            "mlflow",
            "pebble",
            "psutil",
            "s3fs",
            "pydantic",
            "jsonargparse",
        )
    ]
