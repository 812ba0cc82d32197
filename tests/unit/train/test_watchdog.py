"""The watchdog, with real processes that hang."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from crosslmm.config import WatchdogConfig
from crosslmm.train import watchdog
from crosslmm.train.watchdog import Watchdog

LIMIT_S, GRACE_S, NATIVE_MARGIN_S = 0.5, 0.2, 1.0
LATEST_S = 10.0
"""Later than any process here ends on a busy machine, and earlier than a sleeping one [s]."""


def start_watchdog(folder: Path, peers: dict[int, int] | None = None) -> Watchdog:
    limits = WatchdogConfig(startup_s=60, data_s=60, step_s=LIMIT_S, validation_s=60, checkpoint_s=60)
    report = lambda phase, text: (folder / phase).write_text(text) and None  # noqa: E731
    return Watchdog(limits, report, peers, GRACE_S, NATIVE_MARGIN_S)


def sleep_for_ever() -> None:
    time.sleep(600)


def hang(rank: int, folder: Path, peers: dict[int, int]) -> None:
    dog = start_watchdog(folder, peers)
    dog.enter("data")
    dog.enter("step")
    (folder / "began").write_text(str(time.time()))
    sleep_for_ever()


def hold_interpreter_lock(rank: int, folder: Path) -> None:
    """Make a native call that never releases the interpreter lock."""
    stderr = os.open(folder / "stderr", os.O_CREAT | os.O_WRONLY)
    os.dup2(stderr, 2)
    start_watchdog(folder).enter("step")
    (folder / "began").write_text(str(time.time()))
    ctypes.PyDLL(None).sleep(600)


def take_steps(rank: int, folder: Path) -> None:
    """Run for three times as long as a step may take, in steps that are short enough."""
    dog = start_watchdog(folder)
    for _ in range(15):
        dog.enter("data")
        dog.enter("step")
        time.sleep(LIMIT_S / 5)
    dog.close()
    time.sleep(LIMIT_S + GRACE_S + NATIVE_MARGIN_S)
    (folder / "done").touch()


def end_of(function, *arguments) -> tuple[int, float]:
    """Run a function in a process; return its exit status, and the time from the start of the hang to its end [s]."""
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


def test_a_hanging_rank_ends_and_reports_its_stacks(tmp_path):
    status, seconds = end_of(hang, tmp_path, {})
    assert status == 1
    assert LIMIT_S + GRACE_S <= seconds < LATEST_S
    assert [path.name for path in tmp_path.iterdir() if path.name != "began"] == ["step"]
    report = (tmp_path / "step").read_text()
    assert report.startswith("step took longer than 0.5 s\n")
    assert "in sleep_for_ever" in report
    assert "in hang" in report


def test_a_rank_hanging_in_native_code_ends(tmp_path):
    status, seconds = end_of(hold_interpreter_lock, tmp_path)
    assert status == 1
    assert LIMIT_S + NATIVE_MARGIN_S <= seconds < LATEST_S
    assert not (tmp_path / "step").exists()
    assert "in hold_interpreter_lock" in (tmp_path / "stderr").read_text()


def test_stopped_and_dead_peers_are_named(tmp_path):
    peer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    try:
        os.kill(peer.pid, signal.SIGSTOP)
        end_of(hang, tmp_path, {1: peer.pid, 2: gone.pid})
    finally:
        peer.kill()
        peer.wait()
    report = (tmp_path / "step").read_text()
    assert f"rank 1, process {peer.pid}: stopped\n" in report
    assert f"rank 2, process {gone.pid}: gone\n" in report


def test_phases_within_their_limits_end_nothing(tmp_path):
    assert end_of(take_steps, tmp_path)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def hang_without_psutil(rank: int, folder: Path) -> None:
    def denied(pid):
        raise psutil.AccessDenied(pid)

    psutil.Process = denied
    hang(rank, folder, {1: 1})


def test_stacks_are_reported_when_peers_cannot_be_inspected(tmp_path):
    assert end_of(hang_without_psutil, tmp_path)[0] == 1
    assert "rank 1, process 1: unknown (AccessDenied)\n" in (tmp_path / "step").read_text()


def hang_without_report(rank: int, folder: Path) -> None:
    def fail(phase, text):
        raise OSError("the store is away")

    limits = WatchdogConfig(startup_s=60, data_s=60, step_s=LIMIT_S, validation_s=60, checkpoint_s=60)
    Watchdog(limits, fail, None, GRACE_S, NATIVE_MARGIN_S).enter("step")
    sleep_for_ever()


def test_a_hanging_rank_ends_when_its_report_fails(tmp_path):
    assert end_of(hang_without_report, tmp_path)[0] == 1


@pytest.mark.parametrize("phase", ["start-up", "data", "step", "validation", "checkpoint"])
def test_stacks_are_named_by_attempt_phase_and_rank(phase):
    assert watchdog.stacks_name("3f9c", phase, 7) == f"stacks/3f9c-{phase}-rank-7.txt"
