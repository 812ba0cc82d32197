"""The files of the model that is evaluated: fetched once by the driver, and given to every actor through Ray."""

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import yaml

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, TrackingConfig, validate_run
from crosslmm.evaluate.questions.question import Question
from crosslmm.inference.answerer import EXPORTED, Answerer
from crosslmm.model import CrossLMMProcessor
from crosslmm.model.adapters.base import ADAPTER, Base, is_adapter
from crosslmm.model.weights_source import WeightsSource
from crosslmm.run_folder import BASE_FILE, MODEL_CONFIG_FILE
from crosslmm.scoring import MARGIN_TOKENS
from crosslmm.text import first_error
from crosslmm.tracking.versions import Version, fetch_version, find_version

ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class ModelFiles:
    """An exported model, or an adapter with the model that it belongs to.

    Attributes:
        uri: address of the version, or of the folder.
        version: the registered version; None for a folder.
        digest: SHA-256 [hex] of all its files.
        config: configuration that it was trained with.
        files: name -> content, uint8 (bytes,). Those of an adapter are in `ADAPTER_FOLDER`, beside those of its base.
    """

    uri: str
    version: Version | None
    digest: str
    config: RunConfig
    files: dict[str, np.ndarray]

    @property
    def image_size(self) -> int:
        """Side of a frame [px]."""
        return int(storage.parse_json(self.files["processor_config.json"].tobytes())["image_size"])

    def answer_limit(self, questions: Sequence[Question]) -> int:
        """Return the length limit of answers that are compared with the expected ones, as in validation [tokens]."""
        with tempfile.TemporaryDirectory() as folder:
            for name, data in self.files.items():
                if not (name.endswith(".safetensors") or "/" in name):
                    Path(folder, name).write_bytes(data.data)
            processor = CrossLMMProcessor.from_pretrained(folder, trust_remote_code=False)
        longest = max(map(processor.answer_length, {question.answer for question in questions}))
        return min(longest + MARGIN_TOKENS, processor.max_length // 2)

    @property
    def label(self) -> str:
        """A short name: crosslmm-7, or the name of the folder."""
        return f"{self.version.name}-{self.version.number}" if self.version else Path(self.uri).name or "model"


def fetch_model(uri: str, tracking: TrackingConfig) -> ModelFiles:
    """Read a model's files into memory.

    Args:
        uri: a registered model, or the folder of an exported one (path or s3:// URI).
        tracking: MLflow server.

    Raises:
        BadConfig: there is no such model.
        ConnectionError: MLflow does not answer.
        storage.Unavailable: the store does not answer.
    """
    version = find_version(uri, tracking) if uri.startswith("models:") else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = storage.absolute(uri) if version is None else fetch_version(version, tracking, scratch)
        files = _read_adapter(folder, version, tracking) if is_adapter(folder) else _read(folder, uri)
    config = _config_of(files, uri)
    sha = hashlib.sha256()
    for name, data in files.items():
        sha.update(f"{name} {len(data)} ".encode())
        sha.update(data.data)
    return ModelFiles(version.uri if version else folder, version, sha.hexdigest(), config, files)


def _read_adapter(folder: str, version: Version | None, tracking: TrackingConfig) -> dict[str, np.ndarray]:
    """Return the files of an adapter, and those of the model that it belongs to."""
    own = _read_listed(folder, ADAPTER, folder)
    base = version.base if version else None
    if base is None:
        if BASE_FILE not in own:
            raise BadConfig(f"--model {folder}: is an adapter that names no model; merge it into one")
        base = Base.from_json(own[BASE_FILE].tobytes()).uri
    with tempfile.TemporaryDirectory() as scratch:
        if base.startswith("models:/"):
            files = _read(fetch_version(find_version(base, tracking), tracking, scratch), base)
        else:
            files = _read_listed(base, EXPORTED, base)
    return files | {f"{ADAPTER_FOLDER}/{name}": data for name, data in own.items()}


def _read(folder: str, uri: str) -> dict[str, np.ndarray]:
    """Return the files of an exported model that are opened when it is loaded."""
    if not storage.exists(storage.join(folder, MODEL_CONFIG_FILE)):
        raise BadConfig(
            f"--model {uri}: there is no {MODEL_CONFIG_FILE} in {folder}; give models:/NAME@ALIAS or "
            "models:/NAME/VERSION, or the folder of an exported model, such as the folder `model` of a run"
        )
    return _read_listed(folder, EXPORTED, uri)


def _read_listed(folder: str, names: Sequence[str], uri: str) -> dict[str, np.ndarray]:
    try:
        with WeightsSource(folder).local(names) as arguments:
            paths = sorted(Path(arguments["pretrained_model_name_or_path"]).iterdir())
            return {path.name: np.fromfile(path, np.uint8) for path in paths}
    except ValueError as error:
        raise BadConfig(f"--model {uri}: {error}") from None


def _config_of(files: dict[str, np.ndarray], uri: str) -> RunConfig:
    try:
        own = f"{ADAPTER_FOLDER}/{MODEL_CONFIG_FILE}"
        return validate_run(yaml.safe_load(files[own if own in files else MODEL_CONFIG_FILE].tobytes()))
    except (yaml.YAMLError, TypeError) as error:
        raise BadConfig(f"--model {uri}: its {MODEL_CONFIG_FILE} cannot be read: {first_error(error)}") from None


def put(files: dict[str, np.ndarray]) -> dict[str, ray.ObjectRef]:
    """Put a model's files into Ray's object store."""
    return {name: ray.put(data) for name, data in files.items()}


@contextlib.contextmanager
def written(references: dict[str, ray.ObjectRef]) -> Iterator[str]:
    """Write a model's files from Ray's object store into a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        for name, reference in references.items():
            path = Path(storage.join(folder, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(ray.get(reference).data)
        yield folder


def load(references: dict[str, ray.ObjectRef], device: str) -> Answerer:
    """Load a model whose files are in Ray's object store."""
    with written(references) as folder:
        return open_model(folder, device)


def open_files(files: dict[str, np.ndarray], device: str | None) -> Answerer:
    """Load a model from its files in memory."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(storage.join(folder, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.data)
        return open_model(folder, device)


def open_model(folder: str, device: str | None) -> Answerer:
    """Load a model from a local folder with its files."""
    adapter = storage.join(folder, ADAPTER_FOLDER)
    return Answerer(folder, device, adapter if is_adapter(adapter) else None)
