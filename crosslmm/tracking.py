"""The record of a run in MLflow: one run per training run, the same one after a resume, and the model registry."""

import json
import logging
import os
import subprocess
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from crosslmm import storage
from crosslmm.config import RunConfig, TrackingConfig, flatten, redacted

# Its own chatter would stand between our lines. It asks for type hints or examples to guess a signature from; ours is
# given whole.
logging.getLogger("mlflow").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", "(?s).*(type hint|input example).*", UserWarning, "mlflow")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "video"), ColSpec("string", "question")]), Schema([ColSpec("string")])
)


def tracking_uri(config: TrackingConfig) -> str:
    """Where the record goes: the configuration, else MLFLOW_TRACKING_URI, else sqlite in the working directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri


class Record:
    """One MLflow run and what is written of it, by one process at a time.

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
        self.client = MlflowClient(uri)

    @classmethod
    def create(cls, tracking: TrackingConfig, name: str, source: str, parent: str | None = None) -> Self:
        """A new run, below another one if that is given."""
        client = MlflowClient(tracking_uri(tracking))
        if found := client.get_experiment_by_name(tracking.experiment):
            experiment = found.experiment_id
        else:
            location = storage.absolute(tracking.artifacts) if tracking.artifacts else None
            experiment = client.create_experiment(tracking.experiment, artifact_location=location)
        tags = {"mlflow.runName": name, "mlflow.source.name": source, **_git()}
        if parent:
            tags["mlflow.parentRunId"] = parent
        return cls(tracking, client.create_run(experiment, tags=tags).info.run_id)

    def log_params(self, values: dict[str, Any]) -> None:
        """Parameters cannot be changed in MLflow: a run that goes on keeps those that it began with."""
        known = self.client.get_run(self.run_id).data.params
        items = [Param(key, str(value)[:6000]) for key, value in flatten(values).items() if key not in known]
        for i in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[i : i + 100])

    def log_config(self, config: RunConfig) -> None:
        """The flattened configuration as parameters."""
        values = config.model_dump()
        if isinstance(config.data.manifest, dict):  # places are no names of parameters
            values["data"]["manifest"] = json.dumps(config.data.manifest)
        self.log_params(values)

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
        with tempfile.TemporaryDirectory() as folder:
            storage.download(model_uri, folder)
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
        number = str(info.registered_model_version)
        for key, value in tags.items():
            self.client.set_model_version_tag(name, number, key, value[:5000])
        self.client.set_registered_model_alias(name, alias, number)
        self.client.log_batch(self.run_id, tags=[RunTag("registered_model", f"{name}/{number}")])
        return f"models:/{name}@{alias}"


class Run(Record):
    """The record of a training run, written to by its driver alone.

    Args:
        config: the run.
        run_id: the MLflow run to go on with; None starts a new one.
    """

    def __init__(self, config: RunConfig, run_id: str | None = None) -> None:
        super().__init__(
            config.tracking, run_id or Record.create(config.tracking, str(config.name), "jobs/train.py").run_id
        )
        self.client.update_run(self.run_id, status="RUNNING")
        self.log_config(config)
        # Steps that a resume walks again are already here.
        self._last_step = max((m.step for m in self.client.get_metric_history(self.run_id, "loss")), default=0)
        self._system = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=mlflow.get_tracking_uri())
        self._system.start()

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

    def log(self, steps: list[tuple[int, float, dict[str, float]]]) -> None:
        """Write metrics, (step, unix time [s], values) for each step. Steps that are already here are passed over."""
        new = [(step, when, values) for step, when, values in steps if step > self._last_step]
        metrics = [Metric(k, v, int(when * 1000), step) for step, when, values in new for k, v in values.items()]
        for i in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[i : i + 1000])
        self._last_step = max([self._last_step, *(step for step, _, _ in new)])

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._system.finish()
        super().finish(status)


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
