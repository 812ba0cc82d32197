"""The hooks by which the fault matrix reaches into processes take effect."""

import os
import subprocess
import sys

from tests.support.common import ROOT

PATCHED = """\
import torch
from crosslmm.train import loop
print(torch.nn.utils.clip_grad_norm_.__module__, loop.set_learning_rate.__module__)
"""


def test_a_step_can_be_paused_from_outside(tmp_path):
    """They are import hooks, and stand before others: what pauses nothing lets every fault come too late."""
    path = os.pathsep.join([str(ROOT / "tests" / "fault_hooks"), str(ROOT)])
    environment = os.environ | {"FAULT_HOOKS": str(tmp_path), "PYTHONPATH": path}
    command = [sys.executable, "-c", PATCHED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "sitecustomize sitecustomize\n"
