"""What a run stands on: its store, its disk, its record, its clock, its numbers."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Literal, Self

from benchmarks.faults import ROOT
from benchmarks.faults.lab import BATCH, DEADLINE_S, EVERY, FAULT_AFTER, RANK, Attempt, Lab, Lost, fault
from crosslmm import storage
from tests.support.flaky_store import READS, Mode

AWAY_S = 60.0
"""How long a store is out of order [s]."""


def _store_away(lab: Lab, name: str, kind: Literal["reads", "writes"], mode: Mode) -> tuple[list[Attempt], float]:
    """Out of order for a minute, from the first videos or the second checkpoint on."""
    run = lab.decoding(name) if kind == "reads" else lab.begun(name)
    before = len(lab.store.requests)
    setattr(lab.store, kind, mode)
    at = lab.go_on()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(AWAY_S)
    finally:
        setattr(lab.store, kind, None)
    hit = [path for method, path in lab.store.requests[before:] if (method in READS) == (kind == "reads")]
    if not any(f"/{name}/" in path or "/data/" in path for path in hit):
        raise Lost(f"none of its {kind} fell into that time\n{run.text}")
    return [run.ended()], at


AWAY: dict[str, tuple[Literal["reads", "writes"], Mode]] = {
    "store answers reads with 503 for a minute": ("reads", "503"),
    "store answers writes with 503 for a minute": ("writes", "503"),
    "store takes 2 s for each read for a minute": ("reads", 2.0),
    "store takes 2 s for each write for a minute": ("writes", 2.0),
    "store breaks reads off for a minute": ("reads", "reset"),
    "store breaks writes off for a minute": ("writes", "reset"),
}
for said, (kind, mode) in AWAY.items():
    fault(said)(functools.partial(_store_away, kind=kind, mode=mode))


@fault("disk full")
def disk_full(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Where the workers keep a checkpoint until it is in the store; until two of them could not be saved."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", lab.scratch], check=True)
    try:
        run = lab.begun(name)
        # Not before: a run does not begin on a disk that is nearly full. Small, for what fills it is memory.
        subprocess.run(["mount", "-o", "remount,size=100m", lab.scratch], check=True)
        filler = lab.scratch / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        at = time.monotonic()
        lab.hold(FAULT_AFTER + 2 * EVERY + 1)
        run.wait_for(lambda: run.text.count("No space left") >= 2, "checkpoint that could not be saved")
        filler.unlink()
        lab.go_on()
        return [run.ended()], at
    finally:
        subprocess.run(["umount", "-l", lab.scratch], check=True)


class Server:
    """An MLflow server over the lab's record, which can be away."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.setting = f"--tracking.uri={self.uri}"

    def __enter__(self) -> Self:
        mlflow = str(Path(sys.executable).parent / "mlflow")
        self._process = subprocess.Popen(
            [mlflow, "server", "--backend-store-uri", self.lab.tracking, "--port", str(self.port), "--workers", "1"],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=self.lab.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + DEADLINE_S
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return self
            if time.monotonic() > until:
                self.__exit__()
                raise Lost("the MLflow server did not come up")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def replayed(self, name: str) -> None:
        """What could not be delivered is, by the command that the run names."""
        replay = [sys.executable, "jobs/track.py", "replay", "--storage=s3://lab/runs", f"--name={name}"]
        subprocess.run(replay, cwd=ROOT, env=os.environ | self.lab.environment, check=True, timeout=DEADLINE_S)


@fault("MLflow away from the start")
def mlflow_away_at_start(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """And all the time; replayed after the end."""
    server, at = Server(lab), time.monotonic()
    run = lab.start(name, server.setting).ended()
    with server:
        server.replayed(name)
    return [run], at


@fault("MLflow away in the middle")
def mlflow_away_in_the_middle(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """It comes back before the end."""
    server = Server(lab)
    with server:
        run = lab.begun(name, server.setting, step=5)
    at = time.monotonic()
    lab.hold(21)
    run.wait_for(lambda: lab.sealed_step(name) >= 20, "checkpoint")
    with server:
        lab.go_on()
        return [run.ended()], at


@fault("MLflow away at the end")
def mlflow_away_at_the_end(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Replayed later."""
    server = Server(lab)
    with server:
        run = lab.begun(name, server.setting, step=20)
    at = lab.go_on()
    run.ended()
    with server:
        server.replayed(name)
    return [run], at


@fault("gradient that is no number")
def nan(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Once: the run stops and names the samples, and the same command goes on."""
    run = lab.begun(name)
    (lab.orders / "nan").touch()
    at = lab.go_on()
    run.ended(status=1)
    (named,) = [file for file in storage.names_in(lab.folder_of(name)) if file.startswith("not_finite/")]
    ids = json.loads(storage.read_bytes(f"{lab.folder_of(name)}/{named}"))["ids"]
    if len(ids) != BATCH:
        raise Lost(f"{named} names {ids}")
    return [run, lab.start(name).ended()], at


@fault("clock moved back by an hour")
def clock_moved(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """And a rank killed, so that what was written before seems to come from the future."""
    run = lab.begun(name)
    (lab.orders / "clock").write_text("-3600")
    try:
        time.sleep(1)
        at = lab.kill(RANK)
        return [run.ended()], at
    finally:
        (lab.orders / "clock").unlink()
