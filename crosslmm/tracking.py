"""The record of a run in MLflow: one run per training run, the same one after a resume, and the model registry."""

import json
import logging
import os
import subprocess
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.models import ModelSignature
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

from crosslmm import storage
from crosslmm.config import RunConfig, TrackingConfig

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


class Run:
    """One MLflow run, written to by the driver alone.

    Args:
        config: the run; its flattened values become the parameters.
        run_id: the run to go on with; None starts a new one.
    """

    def __init__(self, config: RunConfig, run_id: str | None = None) -> None:
        self.config = config
        self.uri = tracking_uri(config.tracking)
        # The registry and the models' loader read the process-wide setting.
        mlflow.set_tracking_uri(self.uri)
        self.client = MlflowClient(self.uri)
        if run_id is None:
            tags = {"mlflow.runName": str(config.name), "mlflow.source.name": "jobs/train.py", **_git()}
            run_id = self.client.create_run(self._experiment(), tags=tags).info.run_id
        self.run_id = run_id
        self.client.update_run(run_id, status="RUNNING")
        self._log_params()
        # Steps that a resume walks again are already here.
        self._last_step = max((m.step for m in self.client.get_metric_history(run_id, "loss")), default=0)
        self._system = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=self.uri)
        self._system.start()

    def _experiment(self) -> str:
        tracking = self.config.tracking
        if found := self.client.get_experiment_by_name(tracking.experiment):
            return found.experiment_id
        location = storage.absolute(tracking.artifacts) if tracking.artifacts else None
        return self.client.create_experiment(tracking.experiment, artifact_location=location)

    def _log_params(self) -> None:
        """Parameters cannot be changed in MLflow: a resumed run keeps those that it began with."""
        known = self.client.get_run(self.run_id).data.params
        values = self.config.model_dump()
        if isinstance(self.config.data.manifest, dict):  # places are no names of parameters
            values["data"]["manifest"] = json.dumps(self.config.data.manifest)
        params = {k: v for k, v in flatten(values).items() if k not in known}
        items = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for i in range(0, len(items), 100):
            self.client.log_batch(self.run_id, params=items[i : i + 100])

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

    def log_text(self, name: str, text: str) -> None:
        """Write an artifact."""
        self.client.log_text(self.run_id, text, name)

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""
        self._system.finish()
        self.client.set_terminated(self.run_id, status)

    def register(self, model_uri: str) -> str:
        """Log the exported model, register it, and move the alias to it -> `models:/NAME@ALIAS`.

        The version is a pyfunc made from code: `crosslmm/registered.py` and the package itself travel with the
        weights; nothing is pickled.
        """
        name, alias = self.config.tracking.registered_model, self.config.tracking.alias
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
        self.client.set_registered_model_alias(name, alias, info.registered_model_version)
        self.client.log_batch(self.run_id, tags=[RunTag("registered_model", f"{name}/{info.registered_model_version}")])
        return f"models:/{name}@{alias}"


def load_registered(model_uri: str, config: TrackingConfig) -> Any:
    """A registered model as a pyfunc: `.predict` takes a table with the columns `video` and `question`."""
    mlflow.set_tracking_uri(tracking_uri(config))
    return mlflow.pyfunc.load_model(model_uri)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


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
