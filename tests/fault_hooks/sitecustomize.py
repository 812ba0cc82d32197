"""Faults inside a process: a NaN gradient, paused or slowed steps, a moved clock, another version of Ray.

Python imports this module at start-up where its folder is on PYTHONPATH. FAULT_HOOKS names a folder whose files are
orders to all processes of a cluster:

    nan          makes a gradient of the first rank that sees it NaN, once; that rank removes the file
    hold         number of a step: all ranks pause in the middle of it, or of any later step, until the file is gone
    slow         time added to each step [s]
    clock        offset of the clock [s]
    ray_version  version of Ray that new processes find, as if it had been upgraded under a running node
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

ORDERS = Path(os.environ.get("FAULT_HOOKS", "/nowhere"))
_real_time = time.time


def _order(name) -> float:
    try:
        return float((ORDERS / name).read_text())
    except (OSError, ValueError):
        return 0.0


def _moved_time() -> float:
    return _real_time() + _order("clock")


def _patch_steps() -> None:
    import torch

    from crosslmm.train import optim

    real_clip, real_set_learning_rate = torch.nn.utils.clip_grad_norm_, optim.set_learning_rate
    number = 0

    def set_learning_rate(optimizer, step, *arguments):
        nonlocal number
        number = step + 1
        real_set_learning_rate(optimizer, step, *arguments)

    def clip(parameters, *arguments, **options):
        parameters = list(parameters)
        time.sleep(_order("slow"))
        while 0 < _order("hold") <= number:
            time.sleep(0.05)
        try:
            (ORDERS / "nan").unlink()
        except OSError:
            pass
        else:
            next(p for p in parameters if p.grad is not None).grad.mul_(float("nan"))
        return real_clip(parameters, *arguments, **options)

    torch.nn.utils.clip_grad_norm_, optim.set_learning_rate = clip, set_learning_rate


class _LoopFinder(importlib.abc.MetaPathFinder):
    """Patches the step when the training loop is imported, so that other processes need not import torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "crosslmm.train.loop":
            sys.meta_path.remove(self)
            _patch_steps()
        return None


class _OtherRayFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Replaces the module that holds Ray's version."""

    def find_spec(self, name, path=None, target=None):
        if name == "ray._version" and (ORDERS / "ray_version").exists():
            return importlib.util.spec_from_loader(name, self)
        return None

    def exec_module(self, module):
        module.version, module.commit = (ORDERS / "ray_version").read_text(), "another"


if ORDERS.is_dir():
    time.time = _moved_time
    sys.meta_path[:0] = [_LoopFinder(), _OtherRayFinder()]
