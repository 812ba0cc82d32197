"""Processes that are killed, stopped or asked to end."""

import os
import signal
import subprocess
import time
from pathlib import Path

from mlflow.tracking import MlflowClient

from benchmarks.faults.lab import (
    ADAPTERS,
    CONTROLLER,
    DEADLINE_S,
    DECODER,
    EVERY,
    FAULT_AFTER,
    RANK,
    Attempt,
    Lab,
    NotSurvived,
    fault,
)
from crosslmm import run_folder, storage


@fault("rank SIGKILLed in the middle of a step")
def rank_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill a rank, as the kernel does when memory runs out."""
    run = lab.start_until_checkpoint(name)
    at = lab.kill(RANK)
    return [run.wait()], at


@fault("rank SIGKILLed while adapters learn, then the driver", settings=ADAPTERS)
def adapters_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill a rank of a run that trains adapters, then its driver: both starts read the base that the first one wrote,
    and dropout goes on as if nothing had happened."""
    run = lab.start_until_checkpoint(name, *ADAPTERS)
    at = lab.kill(RANK)
    lab.hold(2 * FAULT_AFTER + 1)
    run.wait_for(lambda: lab.sealed_step(name) >= 2 * FAULT_AFTER, f"checkpoint of step {2 * FAULT_AFTER}")
    kill_driver(lab, run)
    return [run, lab.start(name, *ADAPTERS).wait()], at


@fault("rank SIGSTOPped")
def rank_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Stop a rank: it neither answers nor dies, and the watchdog has to detect it."""
    run = lab.start_until_checkpoint(name, "--watchdog.step_s=30", "--watchdog.data_s=30")
    os.kill(lab.pids(RANK)[-1], signal.SIGSTOP)
    at = lab.release()
    run.wait()
    stacks = [file for file in storage.names_in(lab.folder_of(name)) if file.startswith("stacks/")]
    if not any("stopped" in storage.read_bytes(f"{lab.folder_of(name)}/{file}").decode() for file in stacks):
        raise NotSurvived(f"no stacks that name the stopped rank: {stacks}\n{run.text}")
    return [run], at


def _kill_during_upload(lab: Lab, name: str, file: str, after: int | None) -> tuple[list[Attempt], float]:
    """Kill a rank while it uploads a file of a checkpoint, after that many bytes."""
    run = lab.start_until_checkpoint(name)
    held = lab.store.hold(lambda method, path: method == "PUT" and f"/{name}/step-" in path and file in path, after)
    lab.hold(FAULT_AFTER + EVERY + 1)
    held.wait(DEADLINE_S)
    at = lab.kill(RANK)
    held.drop()
    return [run.wait()], at


@fault("rank SIGKILLed during the upload")
def killed_in_upload(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill a rank when part of a shard is in the store."""
    return _kill_during_upload(lab, name, "/rank-", 100_000)


@fault("rank SIGKILLed between upload and commit")
def killed_before_the_seal(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill a rank when all shards are in the store, but not the seal."""
    return _kill_during_upload(lab, name, run_folder.SEAL_FILE, None)


@fault("decode actor SIGKILLed, as for its memory")
def decoder_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill a decoder: Ray Data starts another one, which gets its videos."""
    run = lab.start_until_decoding(name)
    at = lab.kill(f"{DECODER}.submit")  # while it reads
    return [run.wait()], at


@fault("controller SIGKILLed")
def controller_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill Ray Train's controller, which starts and polls the workers."""
    run = lab.start_until_checkpoint(name)
    at = lab.kill(CONTROLLER)
    return [run.wait()], at


def kill_driver(lab: Lab, run: Attempt) -> float:
    """SIGKILL a run's driver, and wait for the end of the workers, which may seal one more checkpoint; return the time
    [monotonic s]."""
    run.process.kill()
    at = lab.release()
    run.wait(status=None)
    while lab.pids(RANK):
        if time.monotonic() > at + DEADLINE_S:
            raise NotSurvived(f"its workers outlive the driver by {DEADLINE_S:g} s")
        time.sleep(0.2)
    return at


@fault("driver SIGKILLed")
def driver_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill the driver, then repeat the command."""
    run = lab.start_until_checkpoint(name)
    at = kill_driver(lab, run)
    return [run, lab.start(name).wait()], at


@fault("ray job stop", announced=True)
def job_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Submit the job as users do, stop it with `ray job stop`, then repeat the command."""
    ray, *submit = lab.cluster.submit()
    command = [ray, *submit[:-1], f"--submission-id={name}", "--", *lab.command(name)]
    lab.hold(FAULT_AFTER + 1)
    run = lab.attempt(name, command, lab.cluster.environment, Path("/"))
    run.wait_for(lambda: lab.sealed_step(name) >= FAULT_AFTER, "checkpoint")
    at = lab.release()
    stop = [ray, "job", "stop", "--address", lab.cluster.address, name]
    subprocess.run(stop, env=lab.cluster.environment, cwd="/", check=True, capture_output=True, timeout=DEADLINE_S)
    run.wait(status=None)
    status = MlflowClient(lab.tracking).get_run(lab.run_id(name)).info.status
    if status != "KILLED":
        raise NotSurvived(f"the stopped run is {status} in the record\n{run.text}")
    return [run, lab.start(name).wait()], at


@fault("whole cluster restarted")
def cluster_restarted(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill all of Ray's processes and the driver, then repeat the command on a new cluster."""
    run = lab.start_until_checkpoint(name)
    lab.cluster.stop()
    at = lab.release()
    run.process.kill()
    run.wait(status=None)
    lab.cluster = lab.new_cluster()
    return [run, lab.start(name).wait()], at


@fault("world size 2 -> 1 -> 2", announced=True, order_of_sums_differs=True)
def resized(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Stop the run by SIGTERM and repeat the command with another number of workers, twice."""
    attempts, at = [], 0.0
    for workers, step in ((2, 10), (1, 20)):
        run = lab.start_until_checkpoint(name, f"--scaling.num_workers={workers}", step=step)
        run.process.terminate()
        released = lab.release()
        at = at or released
        attempts.append(run.wait(status=130))
    return [*attempts, lab.start(name).wait()], at
