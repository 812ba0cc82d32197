"""Real processes that hang, and what is left of them."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crosslmm.config import WatchdogConfig
from crosslmm.train import watchdog
from crosslmm.train.watchdog import Watchdog

LIMIT_S, GRACE_S, UNHEARD_S = 0.5, 0.2, 1.0
LATEST_S = 10.0
"""Later than anything here ends on a busy machine, and earlier than what hangs [s]."""


def watched(folder: Path, peers: dict[int, int] | None = None) -> Watchdog:
    watchdog.GRACE_S, watchdog.UNHEARD_S = GRACE_S, UNHEARD_S
    limits = WatchdogConfig(startup_s=60, data_s=60, step_s=LIMIT_S, validation_s=60, checkpoint_s=60)
    return Watchdog(limits, lambda phase, text: (folder / phase).write_text(text) and None, peers)


def waits_for_ever() -> None:
    time.sleep(600)


def hangs(rank: int, folder: Path, peers: dict[int, int]) -> None:
    dog = watched(folder, peers)
    dog.enter("data")
    dog.enter("step")
    (folder / "began").write_text(str(time.time()))
    waits_for_ever()


def holds_python(rank: int, folder: Path) -> None:
    """A native call that never lets another thread of Python's run."""
    complaints = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(complaints, 2)
    watched(folder).enter("step")
    (folder / "began").write_text(str(time.time()))
    ctypes.PyDLL(None).sleep(600)


def goes_on(rank: int, folder: Path) -> None:
    """Three times as long as a step may take, but no step takes as long."""
    dog = watched(folder)
    for _ in range(15):
        dog.enter("data")
        dog.enter("step")
        time.sleep(LIMIT_S / 5)
    dog.close()
    time.sleep(LIMIT_S + GRACE_S + UNHEARD_S)
    (folder / "done").touch()


def end_of(function, *arguments) -> tuple[int, float]:
    """Exit status of a process that does this, and how long after it began to hang it ended [s]."""
    folder = arguments[0]
    context = torch.multiprocessing.spawn(function, arguments, nprocs=1, join=False)
    (process,) = context.processes
    process.join(60)
    ended = time.time()
    try:
        assert not process.is_alive()
    finally:
        process.kill()
    began = folder / "began"
    return process.exitcode, ended - float(began.read_text()) if began.exists() else 0.0


def test_a_rank_that_hangs_ends_and_says_where(tmp_path):
    status, seconds = end_of(hangs, tmp_path, {})
    assert status == 1
    assert LIMIT_S + GRACE_S <= seconds < LATEST_S
    assert [path.name for path in tmp_path.iterdir() if path.name != "began"] == ["step"]
    said = (tmp_path / "step").read_text()
    assert said.startswith("step has taken more than 0.5 s\n")
    assert "in waits_for_ever" in said
    assert "in hangs" in said


def test_a_rank_whose_native_code_holds_python_ends_too(tmp_path):
    status, seconds = end_of(holds_python, tmp_path)
    assert status == 1
    assert LIMIT_S + UNHEARD_S <= seconds < LATEST_S
    assert not (tmp_path / "step").exists()
    assert "in holds_python" in (tmp_path / "stderr").read_text()


def test_a_stopped_peer_is_named_and_so_is_one_that_is_gone(tmp_path):
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    try:
        os.kill(peer.pid, signal.SIGSTOP)
        end_of(hangs, tmp_path, {1: peer.pid, 2: gone.pid})
    finally:
        peer.kill()
        peer.wait()
    said = (tmp_path / "step").read_text()
    assert f"rank 1, process {peer.pid}: stopped\n" in said
    assert f"rank 2, process {gone.pid}: gone\n" in said


def test_phases_that_are_over_in_time_end_nothing(tmp_path):
    assert end_of(goes_on, tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


@pytest.mark.parametrize("phase", ["start-up", "data", "step", "validation", "checkpoint"])
def test_the_name_of_the_stacks_says_who_and_when(phase):
    assert watchdog.stacks_name("3f9c", phase, 7) == f"stacks/3f9c-{phase}-rank-7.txt"
