"""The model registry: register an exported model as a pyfunc, and load it again."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import RunTag
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

from crosslmm import storage
from crosslmm.config import TrackingConfig, tracking_uri
from crosslmm.tracking.run import MlflowRun

UPLOAD_S = 120
"""How long a server may take to store one file of a model [s]."""

SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "video"), ColSpec("string", "question")]),
    Schema([ColSpec("string", "answer", required=False), ColSpec("string", "error", required=False)]),
)
MODEL_CONFIG: dict[str, list[str]] = {"roots": []}
"""What whoever loads a registered model may set: the folders that its videos may lie in; none by default."""


def register(run: MlflowRun, model_uri: str, tags: dict[str, str]) -> str:
    """Log an exported model to a run, register it, and move the alias to it; return `models:/NAME@ALIAS`.

    The version is a pyfunc from code: `crosslmm/inference/pyfunc.py` and the package are stored beside the weights;
    nothing is pickled.

    Args:
        run: the MLflow run that the model is logged to.
        model_uri: folder of the exported model, path or URI.
        tags: tags of the version.
    """
    name, alias = run.tracking.registered_model, run.tracking.alias
    package = Path(__file__).parent.parent
    timeout = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
    with tempfile.TemporaryDirectory() as folder:
        storage.download(model_uri, folder)
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(timeout, UPLOAD_S))
        try:
            with mlflow.start_run(run_id=run.run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(package / "inference" / "pyfunc.py"),
                    artifacts={"model": folder},
                    code_paths=[str(package)],
                    signature=SIGNATURE,
                    model_config=MODEL_CONFIG,
                    pip_requirements=_requirements(),
                    registered_model_name=name,
                )
        finally:
            MLFLOW_HTTP_REQUEST_TIMEOUT.set(timeout)
    number = str(info.registered_model_version)
    for key, value in tags.items():
        run.client.set_model_version_tag(name, number, key, value[:5000])
    run.client.set_registered_model_alias(name, alias, number)
    run.client.log_batch(run.run_id, tags=[RunTag("registered_model", f"{name}/{number}")])
    return f"models:/{name}@{alias}"


def load_answerer(model_uri: str, config: TrackingConfig) -> Any:
    """Load a registered model, and return the `crosslmm.inference.answerer.Answerer` in it."""
    mlflow.set_tracking_uri(tracking_uri(config))
    return mlflow.pyfunc.load_model(model_uri).unwrap_python_model().answerer


def _requirements() -> list[str]:
    """Return the packages that the registered model imports, at the installed versions."""
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
