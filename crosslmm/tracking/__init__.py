"""MLflow: the record of a run and the model registry, both made from the run's folder."""

from crosslmm.tracking.background_sync import BackgroundSync
from crosslmm.tracking.client import quiet_mlflow, require_answer
from crosslmm.tracking.registry import load_registered, register
from crosslmm.tracking.retention import Retention
from crosslmm.tracking.run import MlflowRun
from crosslmm.tracking.sync import Delivered, RunSync, replay

__all__ = [
    "BackgroundSync", "Delivered", "MlflowRun", "Retention", "RunSync", "load_registered", "quiet_mlflow", "register",
    "replay", "require_answer",
]  # fmt: skip
