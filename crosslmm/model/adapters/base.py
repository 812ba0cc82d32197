"""The model that the adapters of a run belong to, which does not change while they are trained.

It is `model.init_from`, if that is a model of the run's configuration. Otherwise the run's first start writes the model
that it begins with into its own folder. Checkpoints hold what learns, and the digest of the rest.
"""

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open

from crosslmm import storage
from crosslmm.config import BadConfig, ModelConfig, RunConfig, to_yaml
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.loading import build_config, build_model
from crosslmm.model.processing import CrossLMMProcessor
from crosslmm.model.weights_source import CONFIG, TOKENIZER, WEIGHTS, WeightsSource
from crosslmm.run_folder import ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASE_FILE, BASE_FOLDER, MODEL_CONFIG_FILE
from crosslmm.text import in_brief

ADAPTER = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASE_FILE, *TOKENIZER, "processor_config.json", MODEL_CONFIG_FILE)
"""Files of an adapter that are opened."""
HASHING_THREADS = 8
"""Tensors that are hashed at the same time."""
SAYS_NOTHING = {"_name_or_path", "architectures", "dtype", "encoder_chunk", "transformers_version"}
"""Fields of a configuration in which two copies of a model may differ."""


@dataclass(frozen=True)
class Base:
    """The model that adapters belong to."""

    uri: str
    """Folder in the format of Transformers: path, URI, or hub name. In a checkpoint, "base" is the run's own."""
    sha256: str
    """See `weights_digest`."""

    def to_json(self) -> bytes:
        """Return the content of base.json."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Base":
        """Return what `to_json` wrote.

        Raises:
            ValueError: it is not that.
        """
        try:
            return _BASE.validate_json(data)
        except ValidationError as error:
            raise ValueError(f"{BASE_FILE} cannot be read: {error.errors()[0]['msg']}") from None

    def located(self, run: str) -> "Base":
        """Return the base of a checkpoint in the run's folder `run` with its absolute address."""
        return replace(self, uri=storage.join(run, BASE_FOLDER)) if self.uri == BASE_FOLDER else self


_BASE = TypeAdapter(Base)


def weights_digest(folder: str | Path) -> str:
    """Return the sha256 [hex] of all tensors in a local folder's safetensors files: names, types, shapes, values."""

    def digest_of(item: tuple[str, Path]) -> bytes:
        name, file = item
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(name)
        sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
        return sha.digest()

    names: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return hashlib.sha256(b"".join(threads.map(digest_of, sorted(names.items())))).hexdigest()


@contextlib.contextmanager
def open_base(
    config: RunConfig, run: str, processor: CrossLMMProcessor, recorded: Base | None
) -> Iterator[tuple[Base, ModelConfig]]:
    """Yield the base of a run, and the model's configuration with the base, or a local copy of it, as its `init_from`.

    Args:
        config: the run, which trains adapters.
        run: its folder.
        processor: of the model.
        recorded: the base according to a checkpoint from which the run resumes; None at the start, where the run's own
            base is written, if it has one.

    Raises:
        BadConfig: the base cannot be read, or is not that of the checkpoint.
        storage.Unavailable: the store does not answer.
    """
    own = storage.join(run, BASE_FOLDER)
    is_own = recorded.uri == BASE_FOLDER if recorded else not _is_whole_model(config.model, processor)
    uri = own if is_own else str(config.model.init_from)
    with contextlib.ExitStack() as stack:
        if recorded is None and is_own:
            _write(config, own, processor)
        try:
            folder, digest = stack.enter_context(_weights_of(uri))
        except BadConfig:
            if recorded is None or not is_own:
                raise
            digest = ""
        if recorded and is_own and digest != recorded.sha256:  # lost or damaged: make it again
            _write(config, own, processor)
            folder, digest = stack.enter_context(_weights_of(uri))
        if recorded and digest != recorded.sha256:
            raise BadConfig(
                f"{'' if is_own else 'model.init_from: '}{uri} is not the model that the run's adapters belong to: its "
                f"weights have the sha256 {digest[:12]}..., and the run began with {recorded.sha256[:12]}..."
            )
        base = Base(BASE_FOLDER if is_own else absolute(uri), digest)
        # An object store is asked for the weights once. In a copy of a local folder there are links, which lead out.
        copied = storage.scheme_of(uri) == "s3"
        yield base, config.model.model_copy(update={"init_from": folder if copied else uri})


@contextlib.contextmanager
def open_adapter(uri: str, pretrained_model_name_or_path: str) -> Iterator[dict[str, Any]]:
    """Yield a local folder with an adapter, as `WeightsSource.local` does.

    Args:
        uri: folder of the adapter: path, s3:// URI or hub name.
        pretrained_model_name_or_path: local folder of the model that the adapter is added to.

    Raises:
        ValueError: it cannot be read, or belongs to another model.
    """
    with contextlib.ExitStack() as stack:
        try:
            arguments = stack.enter_context(WeightsSource(absolute(uri)).local(ADAPTER))
        except storage.Unavailable:
            raise
        except (OSError, ValueError) as error:
            raise ValueError(f"{uri}: no adapter can be read there: {in_brief(error)}") from error
        file = Path(arguments["pretrained_model_name_or_path"], BASE_FILE)
        if file.exists():  # PEFT alone writes none
            wanted = Base.from_json(file.read_bytes())
            digest = weights_digest(pretrained_model_name_or_path)
            if digest != wanted.sha256:
                raise ValueError(
                    f"{uri}: this adapter belongs to another model, {ascii(wanted.uri)[1:-1]}: its weights have the "
                    f"sha256 {ascii(wanted.sha256[:12])[1:-1]}..., and those of the given model {digest[:12]}..."
                )
        yield arguments


def is_adapter(uri: str) -> bool:
    """Return whether this is the folder of an adapter, path or s3:// URI; False for a hub name."""
    is_folder = storage.scheme_of(uri) == "s3" or Path(uri).is_dir()
    return is_folder and storage.exists(storage.join(uri, ADAPTER_CONFIG_FILE))


def require_no_adapter(config: ModelConfig) -> None:
    """Raise BadConfig if `model.init_from` is the folder of an adapter, which is not a whole model."""
    if config.init_from and is_adapter(config.init_from):
        raise BadConfig(
            f"model.init_from: {config.init_from} is an adapter; make a whole model of it with "
            "python jobs/checkpoint.py export RUN FOLDER --merge"
        )


@contextlib.contextmanager
def _weights_of(uri: str) -> Iterator[tuple[str, str]]:
    """Yield a local folder with the configuration and the weights of a model, and the digest of the weights."""
    with contextlib.ExitStack() as stack:
        try:
            arguments = stack.enter_context(WeightsSource(uri).local(WEIGHTS))
            folder = arguments["pretrained_model_name_or_path"]
            digest = weights_digest(folder)
        except storage.Unavailable:  # the next start may find it
            raise
        except Exception as error:  # a broken file can make its reader raise anything
            raise BadConfig(f"model.init_from: {uri} cannot be loaded: {in_brief(error)}") from error
        yield folder, digest


def _write(config: RunConfig, uri: str, processor: CrossLMMProcessor) -> None:
    """Write the model that the run begins with."""
    model = build_model(config.model, processor, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (Path(folder) / MODEL_CONFIG_FILE).write_text(to_yaml(config))
        storage.upload(folder, uri)


def _is_whole_model(config: ModelConfig, processor: CrossLMMProcessor) -> bool:
    """Return whether the model in `init_from` computes what the run's model computes before its first step."""
    if not config.init_from:
        return False
    try:
        with WeightsSource(config.init_from).local(CONFIG) as arguments:
            theirs = CrossLMMConfig.from_pretrained(**arguments, trust_remote_code=False)
    except storage.Unavailable:
        raise
    except Exception as error:  # a broken file can make its reader raise anything
        raise BadConfig(f"model.init_from: {config.init_from} cannot be loaded: {in_brief(error)}") from error
    return _telling(theirs.to_dict()) == _telling(build_config(config, processor.video_token_id).to_dict())


def _telling(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    return {key: _telling(value) for key, value in fields.items() if key not in SAYS_NOTHING}


def absolute(uri: str) -> str:
    """Return the address of a local folder from the root; a hub name as it is."""
    return storage.absolute(uri) if Path(uri).is_dir() else uri
