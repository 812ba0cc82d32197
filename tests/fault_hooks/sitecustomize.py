"""Faults that come from inside a process: the machine computes nonsense once, or its clock is moved.

On PYTHONPATH of a cluster, with FAULT_HOOKS naming a folder. A file there is the order: `nan` makes the next gradient
of whichever rank sees it first no number, and is taken away; `hold` has the number of a step in whose middle all ranks
stand still, or of any later one, until the file is gone, so that a fault finds them there on any machine; `slow` has
the seconds that each step takes longer; `clock` those that clocks are moved by.
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


def _make_steps_vulnerable() -> None:
    import torch

    from crosslmm.train import optim

    right, right_rate = torch.nn.utils.clip_grad_norm_, optim.set_learning_rate
    number = 0

    def set_learning_rate(optimizer, step, *arguments):
        nonlocal number
        number = step + 1
        right_rate(optimizer, step, *arguments)

    def clip(parameters, *arguments, **options):
        parameters = list(parameters)
        time.sleep(_ordered("slow"))
        while 0 < _ordered("hold") <= number:
            time.sleep(0.05)
        try:
            (ORDERS / "nan").unlink()
        except OSError:
            pass
        else:
            next(p for p in parameters if p.grad is not None).grad.mul_(float("nan"))
        return right(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_, optim.set_learning_rate = clip, set_learning_rate


class _Loop(importlib.abc.MetaPathFinder):
    """Waits for the loop to be imported, which is early enough, and costs no other process an import of torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "crosslmm.train.loop":
            sys.meta_path.remove(self)
            _make_steps_vulnerable()
        return None


if ORDERS.is_dir():
    time.time = _moved_time
    sys.meta_path.insert(0, _Loop())
