"""Faults that come from inside a process: the machine computes nonsense once, or its clock is moved.

On PYTHONPATH of a cluster, with FAULT_HOOKS naming a folder. A file there is the order: `nan` makes the next gradient
of whichever rank sees it first no number, and is taken away; `slow` holds the seconds that each step takes longer;
`clock` those that clocks are moved by.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

ORDERS = Path(os.environ.get("FAULT_HOOKS", "/nowhere"))
_right_time = time.time


def _ordered(name) -> float:
    try:
        return float((ORDERS / name).read_text())
    except (OSError, ValueError):
        return 0.0


def _moved_time() -> float:
    return _right_time() + _ordered("clock")


def _make_gradients_vulnerable() -> None:
    import torch

    right = torch.nn.utils.clip_grad_norm_

    def clip(parameters, *arguments, **options):
        parameters = list(parameters)
        time.sleep(_ordered("slow"))
        try:
            (ORDERS / "nan").unlink()
        except OSError:
            pass
        else:
            next(p for p in parameters if p.grad is not None).grad.mul_(float("nan"))
        return right(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_ = clip


class _Loop(importlib.abc.MetaPathFinder):
    """Waits for the loop to be imported, which is early enough, and costs no other process an import of torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "crosslmm.train.loop":
            sys.meta_path.remove(self)
            _make_gradients_vulnerable()
        return None


if ORDERS.is_dir():
    time.time = _moved_time
    sys.meta_path.insert(0, _Loop())
