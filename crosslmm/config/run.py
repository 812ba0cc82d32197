"""The configuration of a run: all sections, and the checks that need several of them."""

import os
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator

from crosslmm.config.schema import FIXED, FREE, NOT_SEARCHED, Section, flatten, setting
from crosslmm.config.sections import (
    DataConfig,
    ModelConfig,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
    WatchdogConfig,
)
from crosslmm.text import holds_credentials, one_line

CREDENTIALS_ERROR = (
    "holds credentials, which belong in the environment: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (for a "
    "database, its whole URI in MLFLOW_TRACKING_URI), or AWS_*; an @ that belongs to a path is written %40"
)
"""Why a setting is refused."""


class RunConfig(Section):
    """The run."""

    model: ModelConfig
    """The model."""
    data: DataConfig = DataConfig()
    """The data."""
    train: TrainConfig = TrainConfig()
    """Training."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    scaling: ScalingConfig = ScalingConfig()
    """Hardware and placement."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Time limits of a rank's phases."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = setting(
        None, FREE, NOT_SEARCHED
    )
    """Name of the run; the same name resumes it. Null takes the date and time."""
    storage: str = setting("runs", FREE, NOT_SEARCHED)
    """Folder of all runs (path or s3:// URI); every node must reach it."""
    seed: int = setting(0, FIXED)
    """Seed of random weights and of the sample order."""
    accept_changes: bool = setting(False, FREE, NOT_SEARCHED)
    """Resume although the configuration differs from the one the run began with. Otherwise such a resume is refused,
    and the error names the keys that differ. Settings of where and how fast a run executes may always differ."""

    @property
    def accumulation(self) -> int:
        """Micro-batches per worker and optimizer step, where micro-batches are counted in samples."""
        return -(-self.train.global_batch_size // (self.train.micro_batch_size * self.scaling.most_workers))

    @property
    def in_bf16(self) -> bool:
        """True if the run computes in bf16; for `auto`, if it would on a current GPU."""
        return self.train.precision == "bf16" or (self.train.precision == "auto" and self.scaling.use_gpu)

    @model_validator(mode="after")
    def _holds_no_credentials(self) -> "RunConfig":
        values = self.model_dump()
        values["data"]["manifest"] = list(self.data.manifests)
        for key, value in flatten(values).items():
            for text in value if isinstance(value, list) else [value]:
                if holds_credentials(str(text)):
                    raise ValueError(f"{key}: {CREDENTIALS_ERROR}")
        return self

    @model_validator(mode="after")
    def _adapters_learn(self) -> "RunConfig":
        rates, adapted = self.train.learning_rate.model_dump(), self.train.adapted
        if self.train.lora.rank and not adapted:
            raise ValueError("train.lora.targets: name at least one component, or set train.lora.rank to null")
        for component in sorted(adapted):
            if not rates[component]:
                raise ValueError(
                    f"train.lora.targets: {component} is frozen; set train.learning_rate.{component}, or leave it out"
                )
        for component in ("vision", "decoder"):
            if adapted and rates[component] and component not in adapted:
                raise ValueError(
                    f"train.lora.targets: {component} would train all of its weights, which are too many to store "
                    f"with an adapter; add it, or set train.learning_rate.{component} to 0"
                )
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        # With [min, max], some workers have fewer samples than others; with a fixed number, that would be a mistake.
        workers, fixed = self.scaling.most_workers, isinstance(self.scaling.num_workers, int)
        if fixed and self.train.micro_batch_tokens and self.train.global_batch_size % workers:
            raise ValueError(
                f"train.global_batch_size is {self.train.global_batch_size}; it must be a multiple of "
                f"scaling.num_workers {workers}"
            )
        if not fixed and self.train.global_batch_size < workers:
            raise ValueError(
                f"train.global_batch_size is {self.train.global_batch_size}; with up to {workers} workers it must be "
                f"at least {workers}, or lower the maximum of scaling.num_workers"
            )
        samples = workers * self.train.micro_batch_size
        if fixed and not self.train.micro_batch_tokens and self.train.global_batch_size % samples:
            raise ValueError(
                f"train.global_batch_size is {self.train.global_batch_size}; with {workers} workers "
                f"of micro_batch_size {self.train.micro_batch_size} it must be a multiple of {samples}"
            )
        if self.name in ("sample", "features", "evaluations"):
            raise ValueError(f"name: {self.name} is a folder that all runs share; take another name")
        if self.data.features and self.train.learning_rate.vision:
            raise ValueError(
                f"data.features: features come from a frozen encoder, and train.learning_rate.vision is "
                f"{self.train.learning_rate.vision:g}; set it to 0, or train from videos without data.features"
            )
        if self.model.attention == "flash_attention_2" and not (self.scaling.use_gpu and self.in_bf16):
            raise ValueError(
                "model.attention is flash_attention_2, which needs scaling.use_gpu true and train.precision bf16"
            )
        for branch in ("v2v", "t2v"):
            listed = self.model.cross_attention_layers
            anywhere = self.model.cross_attention_every > 0 if listed is None else bool(listed)
            present = getattr(self.model, branch) and anywhere
            if getattr(self.train.learning_rate, branch) and not present:
                raise ValueError(
                    f"train.learning_rate.{branch} is given, but the model has no {branch.upper()}; set it to 0, "
                    f"or model.{branch} to true and model.cross_attention_every to at least 1"
                )
        for part in ("vision", "language"):
            if getattr(self.model, part) is None and not getattr(self.model, f"{part}_weights"):
                raise ValueError(f"model.{part}: give its fields, or model.{part}_weights to take them from")
        return self


class BadConfig(Exception):
    """A configuration that cannot be run. The message is one line: the key, and what it accepts."""


def require_no_credentials(argument: str, uri: str | None) -> None:
    """Raise BadConfig if the value of a job's own argument holds credentials."""
    if uri and holds_credentials(uri):
        raise BadConfig(f"{argument}: {CREDENTIALS_ERROR}")


def validate_run(values: dict[str, Any]) -> RunConfig:
    """Validate nested plain values.

    Raises:
        BadConfig: naming the first key that is wrong, and how many more there are.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first, *more = error.errors()
        where = ".".join(str(part) for part in first["loc"] if part != "function-after")
        message = first["msg"].removeprefix("Value error, ")
        value = "" if first["type"] in ("value_error", "missing") else f" (got {first['input']!r})"
        count = f"; and {len(more)} more" if more else ""
        raise BadConfig(one_line(f"{where}: {message}{value}{count}".removeprefix(": "))) from error


def to_yaml(config: RunConfig) -> str:
    """Return the full configuration as YAML that `--config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def tracking_uri(config: TrackingConfig) -> str:
    """Return the MLflow tracking URI: from the configuration, else MLFLOW_TRACKING_URI, else sqlite in the working
    directory."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    return uri
