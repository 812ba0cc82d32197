"""The laboratory: an object store behind a proxy, MLflow, a Ray cluster, and training runs in them."""

import functools
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from benchmarks.faults import ROOT
from cluster.local.cluster import LocalCluster
from crosslmm import storage
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.train.checkpoint import seals
from tests.support.common import processes
from tests.support.flaky_store import FlakyStore
from tests.support.object_store import ObjectStore

STEPS, EVERY, BATCH = 40, 5, 8
"""Steps of a run, steps between two checkpoints, samples of a step."""
FAULT_AFTER = 10
"""Step whose sealed checkpoint most faults wait for."""
DEADLINE_S = 600.0
"""How long anything is waited for [s]."""
SETTLED_S = 4.0
"""Time after the end of the workers until all their steps are in MLflow [s]; new workers take longer to start."""

SETTINGS = (
    f"--train.max_steps={STEPS}",
    "--train.epochs=99",
    f"--train.global_batch_size={BATCH}",
    "--train.micro_batch_size=4",
    f"--train.checkpoint_every={EVERY}",
    "--train.warmup_steps=2",
    "--data.validation_manifest=null",
)
ADAPTERS = ("--train.lora.rank=4", "--train.lora.targets=[decoder,vision]", "--train.lora.dropout=0.1")
"""Settings of runs that train adapters."""
HOOKS = ROOT / "tests" / "fault_hooks"
RESTART = "restarting from"
RESUMED = re.compile(r"resumed after step (\d+)|training from the start")
RANK, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"
DECODER = "ray::MapWorker(MapBatches(ReadSamples))"


class NotSurvived(Exception):
    """A run did not survive its fault; the message says why."""


@dataclass
class Attempt:
    """One start of the training command, and the lines that it prints."""

    process: subprocess.Popen[str]
    on_line: Callable[[str], None]
    """Called with each line as it is printed."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(monotonic time [s], line)."""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            now = time.monotonic()
            self.on_line(line)  # first: whoever waits for the line may change what it counts
            self.lines.append((now, line.rstrip()))

    @property
    def text(self) -> str:
        """All lines so far."""
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until the condition holds, while the command runs.

        Raises:
            NotSurvived: the command ends before, or `DEADLINE_S` is over.
        """
        until = time.monotonic() + DEADLINE_S
        while not condition():
            if self.process.poll() is not None:
                raise NotSurvived(f"the command ended with {self.process.returncode} before {what}:\n{self.text}")
            if time.monotonic() > until:
                self.process.kill()
                raise NotSurvived(f"no {what} within {DEADLINE_S:g} s:\n{self.text}")
            time.sleep(0.5)  # most conditions ask the store, which shares the machine with the run

    def wait_for_line(self, words: str, after: int = 0) -> None:
        """Wait for a line with these words, after the first `after` lines.

        Raises:
            NotSurvived: the command ends before, or `DEADLINE_S` is over.
        """
        self.wait_for(lambda: any(words in line for _, line in self.lines[after:]), f"line with '{words}'")

    def wait(self, status: int | None = 0) -> "Attempt":
        """Wait for the end of the command, with this exit status; None accepts any.

        Raises:
            NotSurvived: another exit status, or `DEADLINE_S` is over.
        """
        try:
            exit_status = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise NotSurvived(f"the command did not end in {DEADLINE_S:g} s:\n{self.text}") from None
        self._reader.join(5)
        if status is not None and exit_status != status:
            raise NotSurvived(f"the command ended with {exit_status} instead of {status}:\n{self.text}")
        return self


class Lab:
    """A proxy in front of the store, a cluster, MLflow, and runs that use them.

    Attributes:
        store: the proxy, which fails on demand.
        orders: folder whose files are orders to tests/fault_hooks in every process of the cluster.
        scratch: folder for temporary files of the cluster's processes.
        repeated_steps: by run, the number of recorded steps that were taken again, for each restart.
    """

    def __init__(self, stack: ExitStack, folder: Path, store: ObjectStore) -> None:
        self.folder, self.stack = folder, stack
        self.store = stack.enter_context(FlakyStore(int(store.endpoint.rsplit(":", 1)[1])))
        self.orders, self.scratch = folder / "orders", folder / "tmp"
        self.orders.mkdir()
        self.scratch.mkdir()
        self.environment = store.environment() | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store.port}",
            "FAULT_HOOKS": str(self.orders),
            "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)]),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "TMPDIR": str(self.scratch),
            # With Ray's default (15) workers starve when anything else runs on the machine.
            "RAY_worker_niceness": "0",
        }
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        self.repeated_steps: dict[str, list[int]] = defaultdict(list)
        self._done: dict[str, int] = {}
        """By run, the last step in MLflow when its workers or its driver had ended."""
        self._attempts: list[Attempt] = []
        self.cluster = self.new_cluster()

    def new_cluster(self) -> LocalCluster:
        """Start a cluster of one node."""
        return self.stack.enter_context(LocalCluster(num_cpus=2, environment=self.environment))

    def clear(self) -> None:
        """Reset everything after a fault that was not survived, so that the next one is not affected."""
        for attempt in self._attempts:
            attempt.process.kill()
        self.store.heal()
        for order in self.orders.iterdir():
            order.unlink()
        self.cluster.stop()
        self.cluster = self.new_cluster()

    def command(self, name: str, *settings: str) -> list[str]:
        """Return the training command as a user would type it."""
        locations = ["--storage=s3://lab/runs", "--data.manifest=s3://lab/data/train.jsonl"]
        locations += [f"--tracking.uri={self.tracking}"]
        return ["python", "jobs/train.py", f"--name={name}", *locations, *SETTINGS, *settings]

    def start(self, name: str, *settings: str, cluster: str | None = None) -> Attempt:
        """Start or resume a run on the lab's cluster, or on the one at the address `cluster`."""
        environment = self.cluster.environment | {"RAY_ADDRESS": self.cluster.gcs_address}
        if cluster:
            environment = os.environ | self.environment | {"RAY_ADDRESS": cluster}
        return self.attempt(name, [sys.executable, *self.command(name, *settings)[1:]], environment, ROOT)

    def attempt(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> Attempt:
        """Start a command that trains the run `name`."""
        self._done[name] = self._recorded(name)
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._attempts.append(Attempt(process, functools.partial(self._count_repeated_steps, name)))
        return self._attempts[-1]

    def _count_repeated_steps(self, name: str, line: str) -> None:
        """At a restart, note how many recorded steps are taken again."""
        if RESTART in line:
            time.sleep(SETTLED_S)
            self._done[name] = self._recorded(name)
        elif resumed := RESUMED.search(line):
            # Ray Train starts a group of another size without a log line; `hold` pauses the new group meanwhile.
            done = self._done.pop(name) if name in self._done else self._recorded(name)
            self.repeated_steps[name].append(max(0, done - int(resumed[1] or 0)))

    def note_restart(self, name: str) -> None:
        """Note how many recorded steps will be taken again, where the command does not print where it resumes."""
        time.sleep(SETTLED_S)
        self.repeated_steps[name].append(max(0, self._recorded(name) - self.sealed_step(name)))

    def _recorded(self, name: str) -> int:
        """Return the last step in MLflow; 0 without one."""
        with suppress(ValueError, FileNotFoundError):  # no run yet
            return max((step for step, _ in self.history(name)), default=0)
        return 0

    def start_until_checkpoint(
        self, name: str, *settings: str, step: int = FAULT_AFTER, cluster: str | None = None
    ) -> Attempt:
        """Start a run and wait for its checkpoint of this step. The run pauses one step later, until `release`."""
        self.hold(step + 1)
        attempt = self.start(name, *settings, cluster=cluster)
        attempt.wait_for(lambda: self.sealed_step(name) >= step, f"checkpoint of step {step}")
        return attempt

    def hold(self, step: int) -> None:
        """Pause all ranks in the middle of the step after this one, or of any later one."""
        order = self.orders / "hold.new"
        order.write_text(str(step + 1))
        order.replace(self.orders / "hold")  # atomic: an empty file would be no order

    def release(self) -> float:
        """Let paused ranks continue, since the fault has happened; return the time [monotonic s]."""
        (self.orders / "hold").unlink(missing_ok=True)
        return time.monotonic()

    def start_until_decoding(self, name: str, *settings: str) -> Attempt:
        """Start a run and wait for its decoder. The videos are small: soon after, all have been read."""
        attempt = self.start(name, *settings)
        attempt.wait_for(lambda: self.pids(DECODER), "decoder")
        return attempt

    def folder_of(self, name: str) -> str:
        """Return the folder of a run, or of a sweep's only trial, in the store."""
        folder = f"s3://lab/runs/{name}"
        trials = [name for name in storage.folders_in(folder) if name.startswith("000-")]
        return f"{folder}/{trials[0]}" if trials else folder

    def sealed_step(self, name: str) -> int:
        """Return the step of the newest checkpoint; 0 without one."""
        return seals.latest_step(self.folder_of(name))

    def pids(self, title: str) -> list[int]:
        """Return the processes of the lab's cluster whose title starts with `title`, by age of their id."""
        return sorted(
            pid for pid, line in processes() if line.startswith(title) and _session(pid) == self.cluster.session
        )

    def kill(self, title: str) -> float:
        """SIGKILL the newest such process and release the run; return the time [monotonic s].

        Raises:
            NotSurvived: there is none.
        """
        until = time.monotonic() + DEADLINE_S
        while not (pids := self.pids(title)):
            if time.monotonic() > until:
                raise NotSurvived(f"there is no process {title}")
            time.sleep(0.01)
        os.kill(pids[-1], signal.SIGKILL)
        return self.release()

    def run_id(self, name: str) -> str:
        """Return the MLflow run id of a run: a trial's is in its folder; that of another run is looked up by its key,
        since a replay stores the id nowhere else."""
        run = json.loads(storage.read_bytes(f"{self.folder_of(name)}/run.json"))
        key = run["key"]
        if self.folder_of(name) != f"s3://lab/runs/{name}":
            return str(run["run_id"])
        (experiment,) = MlflowClient(self.tracking).search_experiments(filter_string="name = 'crosslmm'")
        (found,) = MlflowClient(self.tracking).search_runs(
            [experiment.experiment_id], f"tags.`crosslmm.key` = '{key}'", run_view_type=ViewType.ALL
        )
        return str(found.info.run_id)

    def history(self, name: str) -> list[tuple[int, float]]:
        """Return (step, loss) of all points in MLflow, sorted."""
        points = MlflowClient(self.tracking).get_metric_history(self.run_id(name), "loss")
        return sorted((point.step, point.value) for point in points)

    def weights(self, name: str) -> str:
        """Return the sha256 of the exported weights: of a model, or of an adapter."""
        files = [f"{self.folder_of(name)}/model/{file}" for file in ("model.safetensors", "adapter_model.safetensors")]
        (file,) = filter(storage.exists, files)
        return hashlib.sha256(storage.read_bytes(file)).hexdigest()

    def step_s(self, name: str) -> float:
        """Return the median duration of a step [s]."""
        seconds = MlflowClient(self.tracking).get_metric_history(self.run_id(name), "step_s")
        return statistics.median(point.value for point in seconds)


def write_data() -> None:
    """Write the data that all runs train on."""
    write_sample_set("s3://lab/data", train=64, held_out=4)


def _session(pid: int) -> int | None:
    """Return the session id of a process; None if it is gone."""
    with suppress(OSError):
        return os.getsid(pid)
    return None


Cause = Callable[[Lab, str], tuple[list[Attempt], float]]
"""Takes the lab and the name of a new run; returns the attempts, all ended, and the time of the fault [monotonic s]."""


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    cause: Cause
    announced: bool = False
    """Whether the run gets time for a checkpoint, and so may lose no step."""
    order_of_sums_differs: bool = False
    """Whether another number of workers takes part, which sums in another order."""
    settings: tuple[str, ...] = ()
    """What the run trains in place of a whole model; it has an undisturbed run of its own."""


FAULTS: list[Fault] = []
"""All faults, in the order of the table."""


def fault(name: str, **properties: Any) -> Callable[[Cause], Cause]:
    """Decorate a function to add it to `FAULTS`; `properties` are fields of `Fault`."""

    def register(cause: Cause) -> Cause:
        FAULTS.append(Fault(name, cause, **properties))
        return cause

    return register
