"""Faults of the environment: store, disk, MLflow, clock, gradients."""

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
from benchmarks.faults.lab import BATCH, DEADLINE_S, EVERY, FAULT_AFTER, RANK, Attempt, Lab, NotSurvived, fault
from crosslmm import run_folder, storage
from tests.support.flaky_store import READS, Mode

AWAY_S = 60.0
"""How long the store fails [s]."""


def _store_away(lab: Lab, name: str, kind: Literal["reads", "writes"], mode: Mode) -> tuple[list[Attempt], float]:
    """Let the store fail for a minute: reads from the first videos on, or writes from the second checkpoint on."""
    run = lab.start_until_decoding(name) if kind == "reads" else lab.start_until_checkpoint(name)
    before = len(lab.store.requests)
    setattr(lab.store, kind, mode)
    at = lab.release()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(AWAY_S)
    finally:
        setattr(lab.store, kind, None)
    affected = [path for method, path in lab.store.requests[before:] if (method in READS) == (kind == "reads")]
    if not any(f"/{name}/" in path or "/data/" in path for path in affected):
        raise NotSurvived(f"no {kind} happened in that time\n{run.text}")
    return [run.wait()], at


STORE_FAULTS: dict[str, tuple[Literal["reads", "writes"], Mode]] = {
    "store answers reads with 503 for a minute": ("reads", "503"),
    "store answers writes with 503 for a minute": ("writes", "503"),
    "store takes 2 s for each read for a minute": ("reads", 2.0),
    "store takes 2 s for each write for a minute": ("writes", 2.0),
    "store breaks reads off for a minute": ("reads", "reset"),
    "store breaks writes off for a minute": ("writes", "reset"),
}
for name, (kind, mode) in STORE_FAULTS.items():
    fault(name)(functools.partial(_store_away, kind=kind, mode=mode))


@fault("disk full")
def disk_full(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Fill the disk of temporary files, until two more checkpoints are in the store: they go there from memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", lab.scratch], check=True)
    try:
        run = lab.start_until_checkpoint(name)
        # Shrunk only now: a run refuses to start on a disk that is nearly full. Small, since the filler takes memory.
        subprocess.run(["mount", "-o", "remount,size=100m", lab.scratch], check=True)
        filler = lab.scratch / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        at = time.monotonic()
        lab.hold(FAULT_AFTER + 2 * EVERY + 1)
        last = FAULT_AFTER + 2 * EVERY
        run.wait_for(lambda: lab.sealed_step(name) >= last, f"checkpoint of step {last} on a full disk")
        filler.unlink()
        lab.release()
        return [run.wait()], at
    finally:
        subprocess.run(["umount", "-l", lab.scratch], check=True)


class Server:
    """An MLflow server over the lab's database; it runs inside the context only."""

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
                raise NotSurvived("the MLflow server did not come up")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def replay(self, name: str) -> None:
        """Deliver the record with the command that the run's log names."""
        command = [sys.executable, "jobs/track.py", "replay", "--storage=s3://lab/runs", f"--name={name}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | self.lab.environment, check=True, timeout=DEADLINE_S)


@fault("MLflow away from the start")
def mlflow_away_at_start(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """MLflow does not answer during the whole run; the record is replayed after the end."""
    server, at = Server(lab), time.monotonic()
    run = lab.start(name, server.setting).wait()
    with server:
        server.replay(name)
    return [run], at


@fault("MLflow away in the middle")
def mlflow_away_in_the_middle(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """MLflow goes away in the middle and comes back before the end."""
    server = Server(lab)
    with server:
        run = lab.start_until_checkpoint(name, server.setting, step=5)
    at = time.monotonic()
    lab.hold(21)
    run.wait_for(lambda: lab.sealed_step(name) >= 20, "checkpoint")
    with server:
        lab.release()
        return [run.wait()], at


@fault("MLflow away at the end")
def mlflow_away_at_the_end(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """MLflow goes away before the end; the record is replayed later."""
    server = Server(lab)
    with server:
        run = lab.start_until_checkpoint(name, server.setting, step=20)
    at = lab.release()
    run.wait()
    with server:
        server.replay(name)
    return [run], at


@fault("non-finite gradient")
def nan(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """One NaN gradient: the run stops and lists the samples; the command is repeated."""
    run = lab.start_until_checkpoint(name)
    (lab.orders / "nan").touch()
    at = lab.release()
    run.wait(status=1)
    (report,) = [
        file for file in storage.names_in(lab.folder_of(name)) if file.startswith(f"{run_folder.NON_FINITE_FOLDER}/")
    ]
    ids = json.loads(storage.read_bytes(f"{lab.folder_of(name)}/{report}"))["ids"]
    if len(ids) != BATCH:
        raise NotSurvived(f"{report} lists {ids}")
    return [run, lab.start(name).wait()], at


@fault("clock moved back by an hour")
def clock_moved(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Move the clock and kill a rank: files written before seem to come from the future."""
    run = lab.start_until_checkpoint(name)
    (lab.orders / "clock").write_text("-3600")
    try:
        time.sleep(1)
        at = lab.kill(RANK)
        return [run.wait()], at
    finally:
        (lab.orders / "clock").unlink()
