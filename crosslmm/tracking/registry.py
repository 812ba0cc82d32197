"""The model registry: register an exported model as a pyfunc, and load it again."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import RunTag
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import BASE_FILE
from crosslmm.tracking.run import MlflowRun

UPLOAD_S = 120
"""How long a server may take to store one file of a model [s]."""

SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "video"), ColSpec("string", "question")]),
    Schema([ColSpec("string", "answer", required=False), ColSpec("string", "error", required=False)]),
    ParamSchema([ParamSpec("max_new_tokens", "long", default=None)]),
)
MODEL_CONFIG: dict[str, Any] = {"roots": [], "adapter": None}
"""What whoever loads a registered model may set; see `crosslmm.inference.pyfunc.VideoAnswers`. A version that is an
adapter also has a `base`. (MLflow makes parameters of its run of it, which must not change.)"""
WEIGHTS_TAG, BASE_TAG = "weights_sha256", "base"
"""Tags of versions: the digest of a model's weights; the version models:/NAME/VERSION that an adapter belongs to."""


def register(run: MlflowRun, model_uri: str, tags: dict[str, str]) -> str:
    """Log an exported model to a run, register it, and move the alias to it; return `models:/NAME@ALIAS`.

    The version is a pyfunc from code: `crosslmm/inference/pyfunc.py` and the package are stored beside the weights;
    nothing is pickled. Of an adapter, its base becomes a version first, unless it is one.

    Args:
        run: the MLflow run that the model is logged to.
        model_uri: folder of the exported model, path or URI.
        tags: tags of the version.
    """
    name, alias = run.tracking.registered_model, run.tracking.alias
    number = _add_version(run, model_uri, tags)
    run.client.set_registered_model_alias(name, alias, number)
    run.client.log_batch(run.run_id, tags=[RunTag("registered_model", f"{name}/{number}")])
    return f"models:/{name}@{alias}"


def _add_version(run: MlflowRun, model_uri: str, tags: dict[str, str], expected: str | None = None) -> str:
    """Log and register a model or an adapter; return the number of the version.

    Raises:
        BadConfig: the model's weights have another digest than `expected`.
    """
    from crosslmm.model.adapters.base import Base, weights_digest  # these import torch

    package = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as folder:
        storage.download(model_uri, folder)
        base_file = Path(folder) / BASE_FILE
        if base_file.exists():
            base = _version_of_base(run, Base.from_json(base_file.read_bytes()))
            config, tags = {**MODEL_CONFIG, "base": base}, {**tags, BASE_TAG: base}
        else:
            config, tags = MODEL_CONFIG, {**tags, WEIGHTS_TAG: weights_digest(folder)}
            if expected not in (None, tags[WEIGHTS_TAG]):
                raise BadConfig(f"{model_uri}: the model that the adapter belongs to is gone, or has other weights")
        timeout = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(max(timeout, UPLOAD_S))
        try:
            with mlflow.start_run(run_id=run.run_id):
                info = mlflow.pyfunc.log_model(
                    name="model",
                    python_model=str(package / "inference" / "pyfunc.py"),
                    artifacts={"model": folder},
                    code_paths=[str(package)],
                    signature=SIGNATURE,
                    model_config=config,
                    pip_requirements=_requirements(),
                    registered_model_name=run.tracking.registered_model,
                )
        finally:
            MLFLOW_HTTP_REQUEST_TIMEOUT.set(timeout)
    number = str(info.registered_model_version)
    for key, value in tags.items():
        run.client.set_model_version_tag(run.tracking.registered_model, number, key, value[:5000])
    return number


def _version_of_base(run: MlflowRun, base: Any) -> str:
    """Return the version with a base's weights, models:/NAME/VERSION; register it if there is none. A base on the hub
    keeps its name.

    Raises:
        BadConfig: the base is gone, or its weights are others.
    """
    if not base.uri.startswith("/") and "://" not in base.uri:
        return base.uri
    name = run.tracking.registered_model
    same_weights = run.client.search_model_versions(f"tags.{WEIGHTS_TAG} = '{base.sha256}'")
    numbers = [int(version.version) for version in same_weights if version.name == name]
    number = max(numbers) if numbers else _add_version(run, base.uri, {}, base.sha256)
    return f"models:/{name}/{number}"


def load_answerer(model_uri: str, config: TrackingConfig, adapter: str | None = None) -> Any:
    """Load a registered model, and return the `crosslmm.inference.answerer.Answerer` in it.

    Args:
        model_uri: the version.
        config: MLflow server.
        adapter: answer with this adapter: a folder (path or s3:// URI) or a version.

    Raises:
        ValueError: the adapter does not belong to the model, or the model is too old to take one.
    """
    mlflow.set_tracking_uri(tracking_uri(config))
    model = mlflow.pyfunc.load_model(model_uri, model_config={"adapter": adapter} if adapter else {})
    if adapter and "adapter" not in model.model_config:
        raise ValueError(f"{model_uri}: an earlier version registered it, which takes no adapter; register it again")
    return model.unwrap_python_model().answerer


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
            "peft",
        )
    ]
