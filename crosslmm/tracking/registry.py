"""The model registry: register an exported model as a pyfunc, and load it again."""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, RunTag
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

from crosslmm import storage
from crosslmm.config import BadConfig, TrackingConfig, tracking_uri
from crosslmm.run_folder import BASE_FILE, MODEL_FOLDER, StepRecord, read_run, steps_after
from crosslmm.scoring import ACCURACY, COUNT
from crosslmm.tracking.run import MlflowRun

UPLOAD_S = 120
"""How long a server may take to store one file of a model, once it has the last byte [s]. Exported weights are in files
of 1 GB; to an object store, MLflow uploads those past 500 MiB in parts, which do not go through the server."""

SIGNATURE = ModelSignature(
    Schema([ColSpec("string", "video"), ColSpec("string", "question")]),
    Schema([ColSpec("string", "answer", required=False), ColSpec("string", "error", required=False)]),
    ParamSchema([ParamSpec("max_new_tokens", "long", default=None)]),
)
INPUT_EXAMPLE = [{"video": "clip.mp4", "question": "What happens?"}]
MODEL_CONFIG: dict[str, Any] = {"roots": [], "adapter": None}
"""What whoever loads a registered model may set; see `crosslmm.inference.pyfunc.VideoAnswers`. A version that is an
adapter also has a `base`. (MLflow logs these as parameters of its run, which cannot change.)"""
WEIGHTS_TAG, BASE_TAG = "weights_sha256", "base"
"""Tags of versions: the digest of a model's weights; the version models:/NAME/VERSION that an adapter belongs to."""


class _Pyfunc:
    """MLflow's pyfunc flavor, which here also takes `validate_serving_input`. MLflow's own lacks that option, so that
    `Model.log` would load the model to run its input example, which takes the memory of the weights."""

    @staticmethod
    def save_model(validate_serving_input: bool, **arguments: Any) -> None:
        assert not validate_serving_input
        mlflow.pyfunc.save_model(**arguments)


def register(run: MlflowRun, model_uri: str, tags: dict[str, str], training: str | None = None) -> str:
    """Log an exported model to a run, register it, and move the alias to it; return `models:/NAME@ALIAS`.

    The version is a pyfunc from code: `crosslmm/inference/pyfunc.py` and the package are stored beside the weights;
    nothing is pickled. An adapter's base is registered first, unless it is on the hub or a version has its weights.

    Args:
        run: the MLflow run that the model is logged to.
        model_uri: folder of the exported model, path or URI.
        tags: tags of the version.
        training: folder of the run that trained the model; the version gets the last validation of that run.
    """
    name, alias = run.tracking.registered_model, run.tracking.alias
    number, model_id = _add_version(run, model_uri, tags)
    if training:
        _add_validation(run, training, number, model_id)
    run.client.set_registered_model_alias(name, alias, number)
    run.client.log_batch(run.run_id, tags=[RunTag("registered_model", f"{name}/{number}")])
    return f"models:/{name}@{alias}"


def _add_version(run: MlflowRun, model_uri: str, tags: dict[str, str], expected: str | None = None) -> tuple[str, str]:
    """Log and register a model or an adapter; return the number of the version, and the id of the logged model.

    Raises:
        BadConfig: the model's weights have another digest than `expected`.
    """
    from crosslmm.model.adapters.base import Base, weights_digest  # these import torch

    package = Path(__file__).parent.parent
    with tempfile.TemporaryDirectory() as scratch:
        folder = storage.join(scratch, MODEL_FOLDER)  # MLflow keeps the name
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
                info = Model.log(
                    None,
                    _Pyfunc,
                    name="model",
                    flavor_name="pyfunc.ModelFromCode",
                    validate_serving_input=False,
                    input_example=INPUT_EXAMPLE,
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
    return number, str(info.model_id)


def _add_validation(run: MlflowRun, training: str, number: str, model_id: str) -> None:
    """Add a training's last validation to the version that it made: metrics with their data set, and a tag."""
    validated: dict[int, StepRecord] = {}
    for record in steps_after(training, 0):
        if "validation/loss" in record[2]:
            validated.setdefault(record[0], record)  # of a repeated step, the run has the first
    if not validated:
        return
    step, when, metrics = validated[max(validated)]
    # A run that was begun without a validation manifest, and got one later, does not have it among its inputs.
    data = next((data for data in read_run(training)["datasets"] if data["context"] == "validation"), None)
    name, digest = (data["uri"].rsplit("/", 1)[-1], data["digest"][:36]) if data else (None, None)
    scores = {key: value for key, value in metrics.items() if key.startswith("validation/")}
    names = run.names_of(scores)
    # With the time at which the run has them, so that its curves get no second point.
    run.send("metrics", [
        Metric(names[key], value, int(when * 1000), step, model_id=model_id, dataset_name=name, dataset_digest=digest)
        for key, value in scores.items()
    ])  # fmt: skip
    text = f"loss {metrics['validation/loss']:.4g}, step {step}"
    if ACCURACY in metrics:
        text = f"accuracy {metrics[ACCURACY]:.4f} ({metrics[COUNT]:.0f} questions), {text}"
    run.client.set_model_version_tag(run.tracking.registered_model, number, "validation", text)


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
    number = max(numbers) if numbers else _add_version(run, base.uri, {}, base.sha256)[0]
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
        raise ValueError(
            f"{model_uri}: it was registered by an earlier version of crosslmm, and takes no adapter; register it again"
        )
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
