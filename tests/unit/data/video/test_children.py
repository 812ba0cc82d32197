"""Child processes of decoders: they do not run the program again, and end with it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from crosslmm.data.samples.clips import encode_clip
from tests.support.common import ROOT, random_frames

SCRIPT = """
import os, sys
with open("runs.txt", "a") as file:
    file.write("once\\n")
from crosslmm.config import DataConfig
from crosslmm.data.video.decode_pool import Decoder

class OfTheScript:
    pass

decoder = Decoder(DataConfig(num_frames=2), 32)
for _ in range(2):
    print([type(result).__name__ for result in decoder(["clip.mp4"] * 2)])
"""
SPINS = """
import sys, threading
from crosslmm.config import DataConfig
from crosslmm.data.video.decode_pool import VideoPool
from tests.support import misbehave

pool = VideoPool(DataConfig(num_frames=8, decode_timeout_s=600), misbehave.spins)
threading.Thread(target=pool, args=(["bad.mp4"],), daemon=True).start()
print("started", flush=True)
sys.stdin.read()
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("how", ["a file", "piped to python"])
def test_a_script_without_a_guard_runs_once(tmp_path, how):
    """Children would run its top level again, whatever that does, and fail when it starts processes."""
    (tmp_path / "clip.mp4").write_bytes(encode_clip(random_frames(8)))
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    arguments = [str(script)] if how == "a file" else ["-"]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=script.read_text(), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("['SampledFrames', 'SampledFrames']\n" * 2, "")
    assert (tmp_path / "runs.txt").read_text() == "once\n"


def test_a_child_that_hangs_in_native_code_ends_with_its_killed_owner():
    command = [sys.executable, "-c", SPINS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), cwd=ROOT) as owner:
        assert owner.stdout.readline() == b"started\n"
        deadline = time.monotonic() + 60
        spinning = []
        while not spinning and time.monotonic() < deadline:
            time.sleep(0.2)
            family = psutil.Process(owner.pid).children(recursive=True)
            forked = [child for child in family if child.ppid() != owner.pid]  # by the fork server
            spinning = [child for child in forked if child.cpu_times().user > 1]
        assert spinning
        owner.send_signal(signal.SIGKILL)
        gone, alive = psutil.wait_procs(spinning, timeout=10)
    for child in alive:
        child.kill()
    assert not alive, json.dumps([child.cmdline() for child in alive])
    assert gone
