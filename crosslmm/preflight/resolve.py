"""Fill in what a configuration leaves open: the run's name, absolute paths, the sample data."""

from datetime import datetime
from pathlib import Path

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, tracking_uri
from crosslmm.data.samples import shapes
from crosslmm.data.video.decode import require_backend
from crosslmm.model.adapters.base import require_no_adapter
from crosslmm.model.loading import build_config

WEIGHTS = ("vision_weights", "language_weights", "tokenizer", "init_from")
"""Keys of `model` that name a file or folder, or a model on the hub."""


def resolve_config(config: RunConfig) -> RunConfig:
    """Return the configuration with a name, absolute paths (of storage, and of weights that are local) and, for
    `data.manifest: sample`, generated data.

    Raises:
        BadConfig: the model's configuration is invalid, the decoder does not load, or storage or the tracking database
            would be deleted together with the job.
    """
    build_config(config.model)
    require_no_adapter(config.model)
    require_backend(config.data.decoder)
    require_durable("storage", config.storage)
    require_durable("tracking.uri", tracking_uri(config.tracking))
    folder = storage.absolute(config.storage)
    data = config.data
    if data.manifest == "sample":
        data = data.model_copy(update=shapes.sample_manifests(storage.join(folder, "sample")))
    # Workers have another working directory.
    weights = {key: _absolute_if_local(getattr(config.model, key)) for key in WEIGHTS}
    return config.model_copy(
        update={
            "name": config.name or datetime.now().strftime("%Y%m%d-%H%M%S"),
            "storage": folder,
            "data": data,
            "model": config.model.model_copy(update=weights),
        }
    )


def _absolute_if_local(uri: str | None) -> str | None:
    is_path = uri not in (None, "tiny") and Path(str(uri)).exists()
    return storage.absolute(str(uri)) if is_path else uri


def require_durable(key: str, uri: str) -> None:
    """Raise BadConfig if `uri` is in the job's uploaded working directory, which is deleted with the job.

    Args:
        key: configuration key of `uri`, for the message.
        uri: path, URI, or `sqlite:///` URI.
    """
    here = str(Path.cwd())
    uploaded = "/working_dir_files/" in here  # where Ray unpacks `ray job submit --working-dir`
    local = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:") else uri
    if uploaded and "://" not in local and storage.absolute(local).startswith(here):
        raise BadConfig(f"{key}: {uri} lies in this job's uploaded copy of the code; give an absolute path or a URI")
