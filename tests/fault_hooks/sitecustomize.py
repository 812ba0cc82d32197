"""Faults that come from inside a process: the machine computes nonsense once, its clock is moved, its Ray exchanged.

On PYTHONPATH of a cluster, with FAULT_HOOKS naming a folder. A file there is the order: `nan` makes the next gradient
of whichever rank sees it first no number, and is taken away; `hold` has the number of a step in whose middle all ranks
stand still, or of any later one, until the file is gone, so that a fault finds them there on any machine; `slow` has
the seconds that each step takes longer; `clock` those that clocks are moved by; `ray_version` the version
of the Ray that processes find from now on, as if another one had been installed beneath a node that runs.
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


class _OtherRay(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for the module that says which version it is."""

    def find_spec(self, name, path=None, target=None):
        if name == "ray._version" and (ORDERS / "ray_version").exists():
            return importlib.util.spec_from_loader(name, self)
        return None

    def exec_module(self, module):
        module.version, module.commit = (ORDERS / "ray_version").read_text(), "another"


if ORDERS.is_dir():
    time.time = _moved_time
    sys.meta_path[:0] = [_Loop(), _OtherRay()]
