"""Starts that contend for one run: beside its owner, after one that is gone, and before one that comes back."""

import dataclasses
import json
import os
import signal
import sys
import time

from benchmarks.faults import ROOT
from benchmarks.faults.lab import DEADLINE_S, FAULT_AFTER, STEPS, Attempt, Lab, NotSurvived, fault
from benchmarks.faults.processes import kill_driver
from crosslmm import lease
from crosslmm.lease import owners
from crosslmm.run_folder import OWNERS_FOLDER, read_run

SLACK_S = 20.0
"""Beyond the lease, until a start that watched starts workers [s]: its last look, and the checks before a run."""
TAKEN_UP = "starting workers"
SWEEP = (
    "--scheduler=none", "--features=never", "--data.validation_manifest=s3://lab/data/held_out.jsonl",
    f"--train.validate_every={STEPS}",
)  # fmt: skip
"""Settings of a sweep whose trials train as runs do."""
SPACE = """
from ray import tune
def space(config):
    return {"train.learning_rate.decoder": tune.grid_search([config.train.learning_rate.decoder])}
"""
FROZEN = ("--train.learning_rate.vision=0",)
"""Settings of a run that can read features instead of videos."""


@fault("second start beside the owner")
def second_start(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Repeat the command while the run trains: it is refused with the owner's name, and the run does not notice."""
    run = lab.start_until_checkpoint(name)
    twin = lab.start(name).wait(status=2)
    _require_owner_named(twin, run, "training")
    at = lab.release()
    return [run.wait()], at


@fault("owner SIGKILLed on another host")
def owner_killed_elsewhere(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill the driver and make its file that of another host and cluster: only silence tells that it is dead."""
    run = lab.start_until_checkpoint(name)
    at = kill_driver(lab, run)
    folder = lab.folder_of(name)
    last = owners.newest(folder)
    if last is None or last.owner is None:
        raise NotSurvived("the owner left no file")
    owners.write(folder, last.number, dataclasses.replace(last.owner, process="", cluster="gone"))
    again = lab.start(name).wait()
    watched = [when for when, line in again.lines if "watching for" in line]
    taken = [when for when, line in again.lines if TAKEN_UP in line]
    if not watched or not taken:
        raise NotSurvived(f"the next start did not watch the owner:\n{again.text}")
    limit = lease.LEASE_S + SLACK_S
    if taken[0] - watched[0] > limit:
        raise NotSurvived(f"taken over after {taken[0] - watched[0]:.0f} s instead of {limit:.0f} s\n{again.text}")
    return [run, again], at


@fault("owner SIGSTOPped past its lease, then continued")
def owner_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Stop the driver alone until another start owns the run: then its workers seal nothing, and it records nothing."""
    run = lab.start_until_checkpoint(name)
    run.process.send_signal(signal.SIGSTOP)
    try:
        again = lab.start(name)
        _await_owner(lab, name, 2, again)
        before = read_run(lab.folder_of(name))
        at = lab.release()
    finally:
        os.kill(run.process.pid, signal.SIGCONT)
    run.wait(status=1)
    if "this start has stopped, and leaves it alone" not in run.text:
        raise NotSurvived(f"the first owner does not say that it lost the run:\n{run.text}")
    if read_run(lab.folder_of(name))["status"] != before["status"]:
        raise NotSurvived("the first owner has written the run's status")
    return [run, again.wait()], at


@fault("owner of a prepared folder SIGKILLed beside a second start")
def preparation_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill the job that prepares a manifest while another one wants to: the third finishes it, and a run trains on it
    as on the manifest itself."""
    folder = f"s3://lab/prepared/{name}"
    command = ["jobs/prepare.py", "convert", "s3://lab/data/train.jsonl", folder]
    attempts, at = _contend(lab, name, command, folder, "preparation")
    prepared = f"--data.manifest={folder}", "--data.roots=[s3://lab/data]"
    return [*attempts, lab.start(name, *prepared).wait()], at


@fault(
    "owner of a folder of features SIGKILLed beside a second start",
    settings=FROZEN,
    order_of_sums_differs=True,  # features are rounded to bf16
)
def encoding_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill the job that encodes videos while another one wants to: the third finishes it, and a run trains on the
    features as on the videos, but for their rounding."""
    features = f"s3://lab/features/{name}"
    command = [*lab.command(name, *FROZEN)[1:], f"--features.folder={features}"]
    attempts, at = _contend(lab, name, ["jobs/encode.py", *command[1:]], features, "encoding")
    (line,) = [line for _, line in attempts[-1].lines if line.startswith('{"folder"')]
    return [*attempts, lab.start(name, *FROZEN, f"--data.features={json.loads(line)['folder']}").wait()], at


@fault("owner of a sweep SIGKILLed beside a second start")
def sweep_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Kill the driver of a sweep in the middle of its only trial while another start is refused: the third one resumes
    the trial, which ends as a run with the same settings does."""
    space = lab.folder / "space.py"
    space.write_text(SPACE)
    command = ["jobs/tune.py", *lab.command(name, *SWEEP)[2:], f"--space={space}"]

    def start() -> Attempt:
        environment = lab.cluster.environment | {"RAY_ADDRESS": lab.cluster.gcs_address}
        return lab.attempt(name, [sys.executable, *command], environment, ROOT)

    lab.hold(FAULT_AFTER + 1)
    first = start()
    first.wait_for(lambda: lab.sealed_step(name) >= FAULT_AFTER, f"checkpoint of step {FAULT_AFTER}")
    twin = start().wait(status=2)
    _require_owner_named(twin, first, "sweep")
    at = time.monotonic()
    first.process.kill()
    lab.note_restart(name)
    lab.release()
    return [first.wait(status=-signal.SIGKILL), start().wait()], at


def _require_owner_named(twin: Attempt, owner: Attempt, work: str) -> None:
    """Raise NotSurvived unless a start that was refused names the owner."""
    if f"process {owner.process.pid}" not in twin.text or f"belongs to the {work} of" not in twin.text:
        raise NotSurvived(f"the second start does not name the owner:\n{twin.text}")


def _contend(lab: Lab, name: str, command: list[str], folder: str, work: str) -> tuple[list[Attempt], float]:
    """Start a command three times. The first cannot write when the second, which is refused, meets it; then it is
    killed, and the third does the work. Return the first and the third, and the time of the kill.

    Args:
        lab, name: of the fault.
        command: script and arguments.
        folder: that it writes, or the one above.
        work: what its owner calls what it does.
    """

    def start() -> Attempt:
        environment = lab.cluster.environment | {"RAY_ADDRESS": lab.cluster.gcs_address}
        return lab.attempt(name, [sys.executable, *command], environment, ROOT)

    path = folder.removeprefix("s3:/")
    held = lab.store.hold(lambda method, at: method == "PUT" and path in at and f"/{OWNERS_FOLDER}/" not in at)
    first = start()
    held.wait(DEADLINE_S)
    twin = start().wait(status=2)
    at = time.monotonic()
    first.process.kill()
    lab.store.heal()
    _require_owner_named(twin, first, work)
    return [first.wait(status=-signal.SIGKILL), start().wait()], at


def _await_owner(lab: Lab, name: str, number: int, attempt: Attempt) -> None:
    """Wait until a run has its owner of this number."""
    until = time.monotonic() + DEADLINE_S
    while owners.read(lab.folder_of(name), number) is None:
        if attempt.process.poll() is not None or time.monotonic() > until:
            raise NotSurvived(f"the run has no owner {number}:\n{attempt.text}")
        time.sleep(0.5)
