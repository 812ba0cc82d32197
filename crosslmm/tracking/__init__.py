"""The record of a run in MLflow, and the model registry. Made from the run's folder, which is the truth: folder.py."""

from crosslmm.tracking.deliver import Copy, Delivered, replay
from crosslmm.tracking.folder import BEGUN, CONFIG, HISTORY, LEDGER, MODEL, SWEEP, begin, runs, validations_after
from crosslmm.tracking.live import Run
from crosslmm.tracking.prune import Retention
from crosslmm.tracking.record import Record
from crosslmm.tracking.registry import load_registered, register
from crosslmm.tracking.server import require_answer, tracking_uri, without_password

__all__ = [
    "BEGUN",
    "CONFIG",
    "HISTORY",
    "LEDGER",
    "MODEL",
    "SWEEP",
    "Copy",
    "Delivered",
    "Record",
    "Retention",
    "Run",
    "begin",
    "load_registered",
    "register",
    "replay",
    "require_answer",
    "runs",
    "tracking_uri",
    "validations_after",
    "without_password",
]
