"""Lets torchvision, which lmms-eval imports, load beside a CPU build of torch.

Its wheels bring operators for CUDA builds only. Two of them must at least be declared before it is imported; nothing
here calls them. Python imports this module at start-up in the environment of `make harness`.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(self)  # the declarations end with the library
        return None


_kept = []
sys.meta_path.insert(0, _DeclareOperators())
