"""MLflow: runs and registered models, both made from the folders of runs; retention of old runs."""

from crosslmm.tracking.background_sync import BackgroundSync, SyncTimeouts
from crosslmm.tracking.client import quiet_mlflow, require_answer
from crosslmm.tracking.registry import load_answerer, register
from crosslmm.tracking.retention import Retention
from crosslmm.tracking.run import MlflowRun
from crosslmm.tracking.sync import Delivered, RunSync, replay

__all__ = [
    "BackgroundSync", "Delivered", "MlflowRun", "Retention", "RunSync", "SyncTimeouts", "load_answerer", "quiet_mlflow",
    "register", "replay", "require_answer",
]  # fmt: skip
