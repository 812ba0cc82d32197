"""The configuration of a run: every setting with its type, unit, default and role."""

from crosslmm.config.roles import changes, roles_of, settings_of
from crosslmm.config.run import (
    CREDENTIALS_ERROR,
    BadConfig,
    RunConfig,
    require_no_credentials,
    to_yaml,
    tracking_uri,
    validate_run,
)
from crosslmm.config.schema import flatten
from crosslmm.config.sections import (
    Checkpointing,
    DataConfig,
    LearningRates,
    LoraConfig,
    ModelConfig,
    NodeType,
    Recomputed,
    ScalingConfig,
    TrackingConfig,
    TrainConfig,
    WatchdogConfig,
)

__all__ = [
    "CREDENTIALS_ERROR",
    "BadConfig",
    "Checkpointing",
    "DataConfig",
    "LearningRates",
    "LoraConfig",
    "ModelConfig",
    "NodeType",
    "Recomputed",
    "RunConfig",
    "ScalingConfig",
    "TrackingConfig",
    "TrainConfig",
    "WatchdogConfig",
    "changes",
    "flatten",
    "require_no_credentials",
    "roles_of",
    "settings_of",
    "to_yaml",
    "tracking_uri",
    "validate_run",
]
