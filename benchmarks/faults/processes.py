"""Processes that die, hang, or are told to end."""

import os
import signal
import subprocess
import time
from pathlib import Path

from mlflow.tracking import MlflowClient

from benchmarks.faults.lab import CONTROLLER, DEADLINE_S, DECODER, EVERY, FAULT_AFTER, RANK, Attempt, Lab, Lost, fault
from crosslmm import storage
from crosslmm.train import checkpoint_store


@fault("rank SIGKILLed in the middle of a step")
def rank_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As the kernel does when memory runs out."""
    run = lab.begun(name)
    at = lab.kill(RANK)
    return [run.ended()], at


@fault("rank SIGSTOPped")
def rank_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """It answers nobody, and dies of nothing: the watchdog finds it."""
    run = lab.begun(name, "--watchdog.step_s=30", "--watchdog.data_s=30")
    os.kill(lab.pids(RANK)[-1], signal.SIGSTOP)
    at = lab.go_on()
    run.ended()
    stacks = [file for file in storage.names_in(lab.folder_of(name)) if file.startswith("stacks/")]
    if not any("stopped" in storage.read_bytes(f"{lab.folder_of(name)}/{file}").decode() for file in stacks):
        raise Lost(f"no stacks that name the stopped rank: {stacks}\n{run.text}")
    return [run], at


def _held(lab: Lab, name: str, file: str, after: int | None) -> tuple[list[Attempt], float]:
    """A rank is killed while the store is being given a file of a checkpoint."""
    run = lab.begun(name)
    held = lab.store.hold(lambda method, path: method == "PUT" and f"/{name}/step-" in path and file in path, after)
    lab.hold(FAULT_AFTER + EVERY + 1)
    held.wait(DEADLINE_S)
    at = lab.kill(RANK)
    held.drop()
    return [run.ended()], at


@fault("rank SIGKILLed during the upload")
def killed_in_upload(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Half of a shard is in the store."""
    return _held(lab, name, ".distcp", 100_000)


@fault("rank SIGKILLed between upload and commit")
def killed_before_the_seal(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """All shards are in the store, and no seal."""
    return _held(lab, name, checkpoint_store.SEAL, None)


@fault("decode actor SIGKILLed, as for its memory")
def decoder_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Data starts another one, and gives it the videos that this one had."""
    run = lab.decoding(name)
    at = lab.kill(f"{DECODER}.submit")  # while it reads
    return [run.ended()], at


@fault("controller SIGKILLed")
def controller_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Train's own process, which starts and polls the workers."""
    run = lab.begun(name)
    at = lab.kill(CONTROLLER)
    return [run.ended()], at


def kill_driver(lab: Lab, name: str) -> tuple[Attempt, float]:
    """SIGKILL it when its run has begun, and wait for the workers' end: they may seal one more checkpoint."""
    run = lab.begun(name)
    run.process.kill()
    at = lab.go_on()
    run.ended(status=None)
    while lab.pids(RANK):
        if time.monotonic() > at + DEADLINE_S:
            raise Lost(f"its workers outlive the driver by {DEADLINE_S:g} s")
        time.sleep(0.2)
    return run, at


@fault("driver SIGKILLed")
def driver_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """The same command goes on."""
    run, at = kill_driver(lab, name)
    return [run, lab.start(name).ended()], at


@fault("ray job stop", announced=True)
def job_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """The job is submitted as users do it, and stopped by `ray job stop`; the same command goes on."""
    ray, *submit = lab.cluster.submit()
    command = [ray, *submit[:-1], f"--submission-id={name}", "--", *lab.command(name)]
    lab.hold(FAULT_AFTER + 1)
    run = lab.attempt(name, command, lab.cluster.environment, Path("/"))
    run.wait_for(lambda: lab.sealed_step(name) >= FAULT_AFTER, "checkpoint")
    at = lab.go_on()
    stop = [ray, "job", "stop", "--address", lab.cluster.address, name]
    subprocess.run(stop, env=lab.cluster.environment, cwd="/", check=True, capture_output=True, timeout=DEADLINE_S)
    run.ended(status=None)
    status = MlflowClient(lab.tracking).get_run(lab.run_id(name)).info.status
    if status != "KILLED":
        raise Lost(f"the stopped run is {status} in the record\n{run.text}")
    return [run, lab.start(name).ended()], at


@fault("whole cluster restarted")
def cluster_restarted(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """All of Ray's processes are killed, and the driver; the same command goes on on a new cluster."""
    run = lab.begun(name)
    lab.cluster.stop()
    at = lab.go_on()
    run.process.kill()
    run.ended(status=None)
    lab.cluster = lab.new_cluster()
    return [run, lab.start(name).ended()], at


@fault("world size 2 -> 1 -> 2", announced=True, other_sums=True)
def resized(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Stopped by SIGTERM each time, and gone on with on another number of workers."""
    attempts, at = [], 0.0
    for workers, step in ((2, 10), (1, 20)):
        run = lab.begun(name, f"--scaling.num_workers={workers}", step=step)
        run.process.terminate()
        went_on = lab.go_on()
        at = at or went_on
        attempts.append(run.ended(status=130))
    return [*attempts, lab.start(name).ended()], at
