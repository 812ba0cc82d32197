"""Entry point of lmms-eval: it asks every installed package for models, so this imports nothing large."""

import importlib
from typing import Any


def manifest() -> Any:
    """Return what lmms-eval's registry of models wants to know about `crosslmm`."""
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest("crosslmm", simple_class_path="crosslmm.evaluate.lmms_eval_model.CrossLMM")
