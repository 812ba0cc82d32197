"""CrossLMM (arXiv 2505.17020): long-video language models with few visual tokens, trained on Ray.

`import crosslmm` makes the model known to Transformers: AutoModelForImageTextToText, AutoProcessor, pipeline. That
takes effect when a program imports Transformers' Auto classes; this package itself imports neither them nor torch.
"""

import functools
import importlib
import importlib.machinery
import sys
import threading
from types import ModuleType
from typing import Any


class _RegisterWithTransformers:
    """Import hook that imports `crosslmm.auto` once Transformers' Auto classes are there.

    It waits until the outermost import of Transformers or of this package is done: before that, some module that
    `crosslmm.auto` needs may be half imported.
    """

    def __init__(self) -> None:
        self._imports = threading.local()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Return what the standard import system finds, with a loader that reports to `_load`; None for others."""
        if name.partition(".")[0] not in ("transformers", "crosslmm"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            loader.exec_module = functools.partial(self._load, loader)
        return spec

    def _load(self, loader: Any, module: ModuleType) -> None:
        del loader.exec_module
        depth = getattr(self._imports, "depth", 0)
        self._imports.depth = depth + 1
        try:
            loader.exec_module(module)
        finally:
            self._imports.depth = depth
        if not depth:
            self.register_if_ready()

    def register_if_ready(self) -> None:
        """Register unless Transformers' Auto classes are not imported yet."""
        if "transformers.models.auto.configuration_auto" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            importlib.import_module("crosslmm.auto")


_hook = _RegisterWithTransformers()
# Right before the finder that it asks: hooks of others keep their place in front of it.
sys.meta_path.insert(sys.meta_path.index(importlib.machinery.PathFinder), _hook)
_hook.register_if_ready()
