"""The laboratory: a store behind a proxy, a record, a cluster; runs in them, whose lines are noticed as they come."""

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
from crosslmm.train import checkpoint_store
from tests.support.common import processes
from tests.support.flaky_store import FlakyStore
from tests.support.object_store import ObjectStore

STEPS, EVERY, BATCH = 40, 5, 8
FAULT_AFTER = 10
"""Most faults come when a checkpoint of this step is sealed."""
DEADLINE_S = 600.0
SETTLED_S = 4.0
"""So long after the end of the workers everything that they did is in the record [s]; others need longer to start."""

SETTINGS = (
    f"--train.max_steps={STEPS}",
    "--train.epochs=99",
    f"--train.global_batch_size={BATCH}",
    "--train.micro_batch_size=4",
    f"--train.checkpoint_every={EVERY}",
    "--train.warmup_steps=2",
    "--data.validation_manifest=null",
)
HOOKS = ROOT / "tests" / "fault_hooks"
RESTART = "restarting from"
GOES_ON = re.compile(r"resumed after step (\d+)|training from the start")
RANK, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"
DECODER = "ray::MapWorker(MapBatches(ReadSamples))"


class Lost(Exception):
    """A fault was not survived; the message says how it went."""


@dataclass
class Attempt:
    """One start of the command, and the lines that it prints."""

    process: subprocess.Popen[str]
    notice: Callable[[str], None]
    """Is shown each line as it comes."""
    lines: list[tuple[float, str]] = field(default_factory=list)
    """(monotonic time [s], line)."""

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            came = time.monotonic()
            self.notice(line)  # first: who waits for a line may change what is to be noticed
            self.lines.append((came, line.rstrip()))

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        """Until the condition holds, while the command runs.

        Raises:
            Lost: it never did.
        """
        until = time.monotonic() + DEADLINE_S
        while not condition():
            if self.process.poll() is not None:
                raise Lost(f"it ended with {self.process.returncode} before {what}:\n{self.text}")
            if time.monotonic() > until:
                self.process.kill()
                raise Lost(f"after {DEADLINE_S:g} s still no {what}:\n{self.text}")
            time.sleep(0.5)  # most ask the store, which shares the machine with the run

    def says(self, words: str, after: int = 0) -> None:
        """Wait until it has printed them, after so many lines.

        Raises:
            Lost: it never did.
        """
        self.wait_for(lambda: any(words in line for _, line in self.lines[after:]), f"line with '{words}'")

    def ended(self, status: int | None = 0) -> "Attempt":
        """Wait for its end; None takes any status.

        Raises:
            Lost: it ends otherwise, or never.
        """
        try:
            found = self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Lost(f"it did not end in {DEADLINE_S:g} s:\n{self.text}") from None
        self._reader.join(5)
        if status is not None and found != status:
            raise Lost(f"it ended with {found} instead of {status}:\n{self.text}")
        return self


class Lab:
    """A proxy before the store, a cluster, the record; and runs in them.

    Attributes:
        store: the proxy, which misbehaves on demand.
        orders: a folder; a file in it is an order to tests/fault_hooks, in every process of the cluster.
        scratch: where the cluster's processes keep temporary files.
        lost: of each run, the steps that were recorded and taken again, for each time that it went on.
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
            # Ray would let its workers starve (15) beside anything else that runs here.
            "RAY_worker_niceness": "0",
        }
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        self.lost: dict[str, list[int]] = defaultdict(list)
        self._done: dict[str, int] = {}
        """Of each run, the last step in its record when its workers, or its driver, had ended."""
        self._attempts: list[Attempt] = []
        self.cluster = self.new_cluster()

    def new_cluster(self) -> LocalCluster:
        """One node."""
        return self.stack.enter_context(LocalCluster(num_cpus=2, environment=self.environment))

    def clear(self) -> None:
        """After a fault that was not survived: nothing of it reaches the next one."""
        for attempt in self._attempts:
            attempt.process.kill()
        self.store.heal()
        for order in self.orders.iterdir():
            order.unlink()
        self.cluster.stop()
        self.cluster = self.new_cluster()

    def command(self, name: str, *settings: str) -> list[str]:
        """What a user would type."""
        places = ["--storage=s3://lab/runs", "--data.manifest=s3://lab/data/train.jsonl"]
        places += [f"--tracking.uri={self.tracking}"]
        return ["python", "jobs/train.py", f"--name={name}", *places, *SETTINGS, *settings]

    def start(self, name: str, *settings: str, cluster: str | None = None) -> Attempt:
        """Start a run, or go on with it, on the lab's cluster or on the one at this address."""
        environment = self.cluster.environment | {"RAY_ADDRESS": self.cluster.gcs_address}
        if cluster:
            environment = os.environ | self.environment | {"RAY_ADDRESS": cluster}
        return self.attempt(name, [sys.executable, *self.command(name, *settings)[1:]], environment, ROOT)

    def attempt(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> Attempt:
        """Start a command that trains this run."""
        self._done[name] = self._recorded(name)
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._attempts.append(Attempt(process, functools.partial(self._notice, name)))
        return self._attempts[-1]

    def _notice(self, name: str, line: str) -> None:
        """Count what a run has to do again: between the end of its workers and the first step of the next ones."""
        if RESTART in line:
            time.sleep(SETTLED_S)
            self._done[name] = self._recorded(name)
        elif goes_on := GOES_ON.search(line):
            # Ray Train itself starts a group of another size, without a word; the new one is held meanwhile.
            done = self._done.pop(name) if name in self._done else self._recorded(name)
            self.lost[name].append(max(0, done - int(goes_on[1] or 0)))

    def _recorded(self, name: str) -> int:
        """The last step in the record."""
        with suppress(ValueError, FileNotFoundError):  # not there yet
            return max((step for step, _ in self.history(name)), default=0)
        return 0

    def begun(self, name: str, *settings: str, step: int = FAULT_AFTER, cluster: str | None = None) -> Attempt:
        """Start a run, and wait until it has a checkpoint of this step. It stands still after one step more, until
        `go_on`."""
        self.hold(step + 1)
        attempt = self.start(name, *settings, cluster=cluster)
        attempt.wait_for(lambda: self.sealed_step(name) >= step, f"checkpoint of step {step}")
        return attempt

    def hold(self, step: int) -> None:
        """Let ranks stand still in the middle of the step that follows this one, or of any later one."""
        written = self.orders / "hold.new"
        written.write_text(str(step + 1))
        written.replace(self.orders / "hold")  # never empty, which would be no order

    def go_on(self) -> float:
        """Nobody is held any more, for the fault has come -> when [monotonic s]."""
        (self.orders / "hold").unlink(missing_ok=True)
        return time.monotonic()

    def decoding(self, name: str, *settings: str) -> Attempt:
        """Start a run, and wait until its videos are about to be read: they are small, and soon all of them are."""
        attempt = self.start(name, *settings)
        attempt.wait_for(lambda: self.pids(DECODER), "decoder")
        return attempt

    def folder_of(self, name: str) -> str:
        """A run's folder."""
        return f"s3://lab/runs/{name}"

    def sealed_step(self, name: str) -> int:
        """Return the step of the newest checkpoint; 0 without one."""
        return checkpoint_store.latest_step(self.folder_of(name))

    def pids(self, title: str) -> list[int]:
        """Processes of the lab's cluster whose title begins so."""
        return sorted(
            pid for pid, line in processes() if line.startswith(title) and _session(pid) == self.cluster.session
        )

    def kill(self, title: str) -> float:
        """SIGKILL one of them, and the run goes on -> when [monotonic s].

        Raises:
            Lost: there is none.
        """
        until = time.monotonic() + DEADLINE_S
        while not (found := self.pids(title)):
            if time.monotonic() > until:
                raise Lost(f"there is no process {title}")
            time.sleep(0.01)
        os.kill(found[-1], signal.SIGKILL)
        return self.go_on()

    def run_id(self, name: str) -> str:
        """Of a run in MLflow, found by its key: what a replay made is written down nowhere else."""
        key = json.loads(storage.read_bytes(f"{self.folder_of(name)}/run.json"))["key"]
        (experiment,) = MlflowClient(self.tracking).search_experiments(filter_string="name = 'crosslmm'")
        (found,) = MlflowClient(self.tracking).search_runs(
            [experiment.experiment_id], f"tags.`crosslmm.key` = '{key}'", run_view_type=ViewType.ALL
        )
        return str(found.info.run_id)

    def history(self, name: str) -> list[tuple[int, float]]:
        """(step, loss), as often as the record has them."""
        points = MlflowClient(self.tracking).get_metric_history(self.run_id(name), "loss")
        return sorted((point.step, point.value) for point in points)

    def weights(self, name: str) -> str:
        """Digest of the exported model."""
        return hashlib.sha256(storage.read_bytes(f"{self.folder_of(name)}/model/model.safetensors")).hexdigest()

    def step_s(self, name: str) -> float:
        """Seconds of one step of a run, the median."""
        seconds = MlflowClient(self.tracking).get_metric_history(self.run_id(name), "step_s")
        return statistics.median(point.value for point in seconds)


def write_data() -> None:
    """What all runs are trained on."""
    write_sample_set("s3://lab/data", train=64, held_out=4)


def _session(pid: int) -> int | None:
    with suppress(OSError):
        return os.getsid(pid)
    return None


Cause = Callable[[Lab, str], tuple[list[Attempt], float]]
"""Takes the lab and the name of a new run -> the starts of its command, all ended, and when the fault came."""


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    cause: Cause
    announced: bool = False
    """It gives the run time for a checkpoint, and so may cost no step."""
    other_sums: bool = False
    """Another number of workers takes part, which sum in another order."""


FAULTS: list[Fault] = []
"""In the order of the table."""


def fault(name: str, **kind: bool) -> Callable[[Cause], Cause]:
    """Enter a function in the table."""

    def enter(cause: Cause) -> Cause:
        FAULTS.append(Fault(name, cause, **kind))
        return cause

    return enter
