"""Kill any part of a run at any moment: does it end with the weights that an undisturbed run has?

    python -m benchmarks.faults [--only WORDS] [--json]

Every fault meets a real run of the tiny model: two FSDP workers on a Ray cluster, videos and checkpoints in a real
object store over HTTP behind a proxy that can misbehave, the record in MLflow. A fault counts as survived when the run,
or the same command given again where the fault took the driver, ends with status 0. Skipped and repeated samples are
counted from the record: every step once, with the loss, to the last bit, of the same step of the undisturbed run (each
worker has checked, too, that the samples of its steps are those that are due). About a minute a fault on two cores.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

# Ray reads them when it is imported, and clusters of several nodes are started by this very process.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from rich.table import Table

from benchmarks import report
from crosslmm import storage
from crosslmm.data.shapes import write_sample_set
from crosslmm.train import checkpoint

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "jobs"), str(ROOT / "tests")]
from conftest import processes  # noqa: E402
from flaky_store import FlakyStore  # noqa: E402
from local_cluster import LocalCluster  # noqa: E402
from object_store import object_store_in_use  # noqa: E402

STEPS, EVERY, BATCH = 40, 5, 8
POLL_S = 2.0
"""How often Ray Train's controller looks at its workers [s]; what they do until then is lost with them."""
AWAY_S = 60.0
"""How long a store or a server is out of order [s]."""
FAULT_AFTER = 10
"""Most faults come when a checkpoint of this step is sealed."""
DEADLINE_S = 240.0

SETTINGS = (
    f"--train.max_steps={STEPS}",
    "--train.epochs=99",
    f"--train.global_batch_size={BATCH}",
    "--train.micro_batch_size=4",
    f"--train.checkpoint_every={EVERY}",
    "--train.warmup_steps=2",
    "--data.validation_manifest=null",
    "--watchdog.step_s=20",
    "--watchdog.data_s=20",
)
HOOKS = Path(__file__).parent.parent / "tests" / "fault_hooks"


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
            self.lines.append((time.monotonic(), line.rstrip()))
            self.notice(line)

    @property
    def text(self) -> str:
        """All that it has printed."""
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Until the condition holds, while the command runs.

        Raises:
            Lost: it never did.
        """
        until = time.monotonic() + deadline_s
        while not condition():
            if self.process.poll() is not None:
                raise Lost(f"it ended with {self.process.returncode} before {what}:\n{self.text}")
            if time.monotonic() > until:
                raise Lost(f"after {deadline_s:g} s still no {what}:\n{self.text}")
            time.sleep(0.02)

    def ended(self, status: int | None = 0, deadline_s: float = DEADLINE_S) -> "Attempt":
        """Wait for its end; None takes any status.

        Raises:
            Lost: it ends otherwise, or never.
        """
        try:
            found = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise Lost(f"it did not end in {deadline_s:g} s:\n{self.text}") from None
        self._reader.join(5)
        if status is not None and found != status:
            raise Lost(f"it ended with {found} instead of {status}:\n{self.text}")
        return self


class Lost(Exception):
    """A fault was not survived; the message says how it went."""


@dataclass
class Outcome:
    """A row of the table."""

    fault: str
    survived: bool = False
    steps_lost: int = 0
    """Steps that were taken and recorded, and had to be taken again."""
    skipped: int = 0
    """Samples."""
    repeated: int = 0
    """Samples."""
    recovery_s: float | None = None
    """From the fault to the line that says where the run goes on; None where it never stopped."""
    weights_identical: bool | None = None
    """None where another number of workers took part, which sum in another order."""
    note: str = ""
    seconds: float = 0.0


class Lab:
    """A store behind a proxy, a record, clusters; and runs in them."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.folder, self.stack = folder, stack
        swift = ROOT / ".cache" / "swift-venv"
        store = stack.enter_context(object_store_in_use(folder / "swift", venv=swift, bucket="lab"))
        self.store = stack.enter_context(FlakyStore(int(store.endpoint.rsplit(":", 1)[1])))
        self.orders = folder / "orders"
        self.orders.mkdir()
        self.environment = store.environment() | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store.port}",
            "FAULT_HOOKS": str(self.orders),
            "PYTHONPATH": os.pathsep.join([str(HOOKS), str(ROOT)]),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        }
        write_sample_set("s3://lab/data", train=64, held_out=4)
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        self.cluster = self.new_cluster()
        self.undisturbed = "undisturbed"
        self.start(self.undisturbed).ended()
        seconds = MlflowClient(self.tracking).get_metric_history(self.run_id(self.undisturbed), "step_s")
        self.step_s = statistics.median(point.value for point in seconds)
        """Seconds of one step when nothing happens."""
        self.most_done: dict[str, int] = {}
        """Of each run: the last step that was recorded when it first went on."""

    def new_cluster(self) -> LocalCluster:
        """One node."""
        return self.stack.enter_context(LocalCluster(num_cpus=2, environment=self.environment))

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
        """Start a command, and notice how far its run had come when it first goes on."""

        def noticed(line: str) -> None:
            if RESUMED.search(line) and name not in self.most_done:
                self.most_done[name] = max((step for step, _ in self.history(name)), default=0)

        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return Attempt(process, noticed)

    def begun(self, name: str, *settings: str, step: int = FAULT_AFTER, cluster: str | None = None) -> Attempt:
        """Start a run, and wait until it has a checkpoint of this step."""
        attempt = self.start(name, *settings, cluster=cluster)
        attempt.wait_for(lambda: self.sealed_step(name) >= step, f"checkpoint of step {step}")
        return attempt

    def folder_of(self, name: str) -> str:
        """A run's folder."""
        return f"s3://lab/runs/{name}"

    def sealed_step(self, name: str) -> int:
        """Of the newest checkpoint."""
        return max((found.step for found in checkpoint.sealed(self.folder_of(name))), default=0)

    def world_size(self, name: str) -> int:
        """Ranks that wrote the newest checkpoint."""
        return checkpoint.sealed(self.folder_of(name))[0].world_size

    def pids(self, title: str, session: int | None = None) -> list[int]:
        """Processes of the cluster whose title begins so."""
        session = session or self.cluster.session
        return sorted(pid for pid, line in processes() if line.startswith(title) and _session(pid) == session)

    def kill(self, title: str, which: int = -1) -> float:
        """SIGKILL one of them -> when [monotonic s]."""
        os.kill(self.pids(title)[which], signal.SIGKILL)
        return time.monotonic()

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


RESUMED = re.compile(r"resumed after step (\d+)")
OTHER_SUMS = ("world size 2 -> 1 -> 2", "node removed, and trained on with fewer")
"""Faults after which another number of workers sums in another order."""
RANK, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"
DECODER = "ray::MapWorker(MapBatches(ReadSamples)).submit"

Fault = Callable[[Lab, str], tuple[list[Attempt], float]]
"""Takes the lab and the name of a new run -> the starts of its command, all ended, and when the fault came."""
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    """Enter a function in the list of faults under this name."""
    return lambda function: FAULTS.setdefault(name, function)


@fault("rank SIGKILLed in the middle of a step")
def rank_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As the kernel does when memory runs out."""
    run = lab.begun(name)
    at = lab.kill(RANK)
    return [run.ended()], at


@fault("rank SIGSTOPped")
def rank_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """It answers nobody, and dies of nothing."""
    run = lab.begun(name)
    os.kill(lab.pids(RANK)[-1], signal.SIGSTOP)
    at = time.monotonic()
    run.ended()
    stacks = [file for file in storage.names_in(lab.folder_of(name)) if file.startswith("stacks/")]
    if not any("stopped" in storage.read_bytes(f"{lab.folder_of(name)}/{file}").decode() for file in stacks):
        raise Lost(f"no stacks that name the stopped rank: {stacks}\n{run.text}")
    return [run], at


def _held(lab: Lab, name: str, file: str, after: int | None) -> tuple[list[Attempt], float]:
    """A rank is killed while the store is being given a file of a checkpoint."""
    run = lab.begun(name)
    held = lab.store.hold(lambda method, path: method == "PUT" and f"/{name}/step-" in path and file in path, after)
    held.wait(60)
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
    return _held(lab, name, checkpoint.SEAL, None)


def _decoding(lab: Lab, name: str) -> Attempt:
    """Start a run, and wait until its videos are being read: they are small, and soon all of them are."""
    run = lab.start(name)
    run.wait_for(lambda: lab.pids(DECODER), "decoder")
    return run


@fault("decode actor SIGKILLed, as for its memory")
def decoder_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Data starts another one, and gives it the videos that this one had."""
    run = _decoding(lab, name)
    at = lab.kill(DECODER)
    return [run.ended()], at


@fault("controller SIGKILLed")
def controller_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Train's own process, which starts and polls the workers."""
    run = lab.begun(name)
    at = lab.kill(CONTROLLER)
    return [run.ended()], at


def _driver_killed(
    lab: Lab, name: str, then: Callable[[checkpoint.Checkpoint], None] = lambda newest: None
) -> tuple[list[Attempt], float]:
    """The same command goes on, after what `then` does to the newest checkpoint."""
    run = lab.begun(name)
    run.process.kill()
    at = time.monotonic()
    run.ended(status=None)
    until = time.monotonic() + 60
    while lab.pids(RANK) and time.monotonic() < until:  # they may seal one more
        time.sleep(0.2)
    then(checkpoint.sealed(lab.folder_of(name))[0])
    return [run, lab.start(name).ended()], at


@fault("driver SIGKILLed")
def driver_killed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """The same command goes on."""
    return _driver_killed(lab, name)


def _shard(found: checkpoint.Checkpoint) -> str:
    return f"{found.uri}/__0_0.distcp"


@fault("latest checkpoint truncated")
def truncated(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """By a few bytes."""
    return _driver_killed(
        lab, name, lambda found: storage.write_bytes(_shard(found), storage.read_bytes(_shard(found))[:-7])
    )


@fault("latest checkpoint with one bit turned")
def bit_flipped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """In the middle of the weights."""

    def flip(found: checkpoint.Checkpoint) -> None:
        data = bytearray(storage.read_bytes(_shard(found)))
        data[len(data) // 2] ^= 1
        storage.write_bytes(_shard(found), bytes(data))

    return _driver_killed(lab, name, flip)


@fault("latest checkpoint emptied")
def emptied(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Its files are there, without a byte."""

    def empty(found: checkpoint.Checkpoint) -> None:
        for file in storage.names_in(found.uri):
            storage.write_bytes(f"{found.uri}/{file}", b"")

    return _driver_killed(lab, name, empty)


@fault("latest checkpoint's folder removed")
def removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As if it had never been."""
    return _driver_killed(lab, name, lambda found: storage.remove_folder(found.uri))


@fault("snapshot truncated")
def snapshot(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Train's list of checkpoints, wherever it could look for it."""

    def truncate(found: checkpoint.Checkpoint) -> None:
        folder = lab.folder_of(name)
        places = {file.rsplit("/", 1)[0] for file in storage.names_in(folder) if file.startswith("ray/")}
        for place in (folder, *(f"{folder}/{place}" for place in places)):
            storage.write_bytes(f"{place}/checkpoint_manager_snapshot.json", b'{"checkpoint_results": [{"chec')

    return _driver_killed(lab, name, truncate)


@fault("ray job stop")
def job_stopped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """The job is submitted as users do it, and stopped by `ray job stop`; the same command goes on."""
    ray, *submit = lab.cluster.submit()
    command = [ray, *submit[:-1], f"--submission-id={name}", "--", *lab.command(name)]
    run = lab.attempt(name, command, lab.cluster.environment, Path("/"))
    run.wait_for(lambda: lab.sealed_step(name) >= FAULT_AFTER, "checkpoint")
    at = time.monotonic()
    stop = [ray, "job", "stop", "--address", lab.cluster.address, name]
    subprocess.run(stop, env=lab.cluster.environment, cwd="/", check=True, capture_output=True, timeout=90)
    run.ended(status=None)
    status = MlflowClient(lab.tracking).get_run(lab.run_id(name)).info.status
    if status != "KILLED":
        raise Lost(f"the stopped run is {status} in the record\n{run.text}")
    return [run, lab.start(name).ended()], at


@fault("whole cluster restarted")
def cluster_restarted(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """All of Ray's processes are killed; the same command goes on on a new cluster."""
    run = lab.begun(name)
    lab.cluster.stop()
    at = time.monotonic()
    run.process.kill()
    run.ended(status=None)
    lab.cluster = lab.new_cluster()
    return [run, lab.start(name).ended()], at


@fault("world size 2 -> 1 -> 2")
def resized(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Stopped by SIGTERM each time, and gone on with on another number of workers."""
    attempts, at = [], 0.0
    for workers, step in ((2, 10), (1, 20)):
        run = lab.begun(name, f"--scaling.num_workers={workers}", step=step)
        run.process.terminate()
        at = at or time.monotonic()
        attempts.append(run.ended(status=130))
    return [*attempts, lab.start(name).ended()], at


def _store_away(lab: Lab, name: str, **modes: Any) -> tuple[list[Attempt], float]:
    """Out of order for a minute."""
    run = _decoding(lab, name) if "reads" in modes else lab.begun(name)
    at = time.monotonic()
    for kind, mode in modes.items():
        setattr(lab.store, kind, mode)
    with contextlib.suppress(subprocess.TimeoutExpired):
        run.process.wait(AWAY_S)
    lab.store.reads = lab.store.writes = None
    return [run.ended()], at


AWAY: dict[str, dict[str, Any]] = {
    "store answers reads with 503 for a minute": {"reads": "503"},
    "store answers writes with 503 for a minute": {"writes": "503"},
    "store takes 2 s for each request for a minute": {"reads": 2.0, "writes": 2.0},
    "store breaks reads off for a minute": {"reads": "reset"},
    "store breaks writes off for a minute": {"writes": "reset"},
}
for said, modes in AWAY.items():
    FAULTS[said] = functools.partial(_store_away, **modes)


@fault("gradient that is no number")
def nan(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Once: the run stops and names the samples, and the same command goes on."""
    run = lab.begun(name)
    (lab.orders / "nan").touch()
    at = time.monotonic()
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


@contextmanager
def _nodes(lab: Lab) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster of a head, which decodes and drives, and two nodes with room for one rank each."""
    before = dict(os.environ)
    os.environ |= lab.environment
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"head": 1}})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        yield cluster, nodes
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ |= before


ON_NODES = ("--scaling.cpus_per_worker=1", "--scaling.cpus_per_decode_worker=0.6")
"""The head has no room for a rank beside the decoder."""


@fault("node removed, another one comes")
def node_removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Without a word, with all of its processes."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.begun(name, *ON_NODES, cluster=cluster.gcs_address)
        cluster.remove_node(nodes[0], allow_graceful=False)
        at = time.monotonic()
        cluster.add_node(num_cpus=1)
        return [run.ended()], at


@fault("node drained, another one comes")
def node_drained(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As before a spot machine is taken: the workers take a checkpoint and go on elsewhere."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.begun(name, *ON_NODES, cluster=cluster.gcs_address)
        ray = str(Path(sys.executable).parent / "ray")
        drain = [ray, "drain-node", "--address", cluster.gcs_address, "--node-id", nodes[0].node_id]
        drain += [
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "spot",
            "--deadline-remaining-seconds",
        ]
        subprocess.run([*drain, "60"], env=lab.cluster.environment, check=True, capture_output=True, timeout=60)
        at = time.monotonic()
        cluster.add_node(num_cpus=1)
        return [run.ended()], at


@fault("node removed, and trained on with fewer")
def node_removed_elastic(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """`scaling.num_workers: [1, 2]`; when a node comes, on two again."""
    with _nodes(lab) as (cluster, nodes):
        settings = ("--scaling.num_workers=[1, 2]", "--scaling.resize_every_s=5")
        run = lab.begun(name, *ON_NODES, *settings, cluster=cluster.gcs_address)
        cluster.remove_node(nodes[0], allow_graceful=False)
        at = time.monotonic()
        run.wait_for(lambda: lab.world_size(name) == 1, "checkpoint of one rank")
        cluster.add_node(num_cpus=1)
        run.wait_for(lambda: lab.world_size(name) == 2, "checkpoint of two ranks")
        return [run.ended()], at


@fault("disk full")
def disk_full(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Where the workers keep a checkpoint until it is in the store; for as long as two of them are due."""
    place = lab.folder / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", place], check=True)
    kept = lab.cluster
    try:
        with LocalCluster(num_cpus=2, environment=lab.environment | {"TMPDIR": str(place)}) as lab.cluster:
            run = lab.begun(name)
            at = time.monotonic()
            with (place / "filler").open("wb") as filler, contextlib.suppress(OSError):
                while True:
                    filler.write(bytes(2**20))
            run.wait_for(lambda: run.text.count("No space left") >= 2, "checkpoint that could not be saved")
            (place / "filler").unlink()
            return [run.ended()], at
    finally:
        lab.cluster = kept
        subprocess.run(["umount", "-l", place], check=True)


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
        until = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return self
            if time.monotonic() > until:
                raise Lost("the MLflow server did not come up")
            time.sleep(0.2)

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def replayed(self, name: str) -> None:
        """What could not be delivered is, by the command that the run names."""
        replay = [sys.executable, "jobs/track.py", "replay", "--storage=s3://lab/runs", f"--name={name}"]
        subprocess.run(replay, cwd=ROOT, env=os.environ | self.lab.environment, check=True, timeout=200)


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
    run.wait_for(lambda: lab.sealed_step(name) >= 20, "checkpoint")
    with server:
        return [run.ended()], at


@fault("MLflow away at the end")
def mlflow_away_at_the_end(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Replayed later."""
    server = Server(lab)
    with server:
        run = lab.begun(name, server.setting, step=20)
    at = time.monotonic()
    run.ended()
    with server:
        server.replayed(name)
    return [run], at


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def judge(lab: Lab, name: str, given: Outcome, attempts: list[Attempt], at: float) -> None:
    """Compare a run that has ended well with the undisturbed one, and fill in its row.

    Args:
        lab: where.
        name: of the run.
        given: what is filled in.
        attempts: the starts of the command.
        at: when the fault came [monotonic s].
    """
    given.survived = True
    points, right = lab.history(name), lab.history(lab.undisturbed)
    steps = [step for step, _ in points]
    given.skipped = BATCH * len(set(range(1, STEPS + 1)) - set(steps))
    given.repeated = BATCH * (len(steps) - len(set(steps)))
    said = [(when, line) for attempt in attempts for when, line in attempt.lines if when > at]
    going_on = [(when, int(match[1])) for when, line in said if (match := RESUMED.search(line))]
    if going_on:
        given.recovery_s = going_on[0][0] - at
        given.steps_lost = max(0, lab.most_done[name] - going_on[0][1])
    if lab.weights(name) == lab.weights(lab.undisturbed) and points == right:
        given.weights_identical = True
    elif given.fault not in OTHER_SUMS:
        given.weights_identical = False
    else:
        worst = max(abs(a - b) / b for (_, a), (_, b) in zip(points, right, strict=True))
        given.note = f"losses within {worst:.0e}"


def tabulate(outcomes: list[Outcome], limit: int) -> Table:
    """For people."""
    table = Table("fault", "survived", "steps lost", "skipped", "repeated", "recovery s", "weights identical", "note")
    yes = {True: "yes", False: "NO", None: "-"}
    for row in outcomes:
        recovery = "-" if row.recovery_s is None else f"{row.recovery_s:.0f}"
        table.add_row(
            row.fault,
            yes[row.survived],
            str(row.steps_lost),
            str(row.skipped),
            str(row.repeated),
            recovery,
            yes[row.weights_identical],
            row.note.splitlines()[0][:80] if row.note else "",
        )
    table.caption = (
        f"steps lost: at most {limit}, one checkpoint interval ({EVERY}) and what is done in {POLL_S:g} s; "
        f"skipped and repeated: samples of {STEPS * BATCH}; recovery: until it goes on, workers' start included"
    )
    return table


def main() -> int:
    """Run the faults and print the table -> 0 if all were survived without loss."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="WORDS", help="faults whose names hold one of these, separated by commas")
    parser.add_argument("--json", action="store_true", help="print one last line of JSON")
    arguments = parser.parse_args()
    words = (arguments.only or "").split(",")
    chosen = {name: function for name, function in FAULTS.items() if any(word in name for word in words)}
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        lab = Lab(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-"))))
        limit = EVERY + math.ceil(POLL_S / lab.step_s)
        for number, (name, function) in enumerate(chosen.items()):
            given, began = Outcome(name), time.monotonic()
            run = f"fault-{number}"
            try:
                judge(lab, run, given, *function(lab, run))
            except Exception as error:
                given.note = f"{type(error).__name__}: {error}"
                print(f"{name}: {given.note}", file=sys.stderr, flush=True)
            given.seconds = time.monotonic() - began
            outcomes.append(given)
            print(f"{number + 1}/{len(chosen)}  {name}: {'survived' if given.survived else 'LOST'}  "
                  f"{given.steps_lost} steps lost, {given.seconds:.0f} s", flush=True)  # fmt: skip
    figures: dict[str, float] = {
        "faults": len(outcomes),
        "survived": sum(row.survived for row in outcomes),
        "skipped": sum(row.skipped for row in outcomes),
        "repeated": sum(row.repeated for row in outcomes),
        "weights_identical": sum(row.weights_identical is not False and row.survived for row in outcomes),
        "steps_lost_max": max((row.steps_lost for row in outcomes), default=0),
        "steps_lost_limit": limit,
    }
    report("faults", tabulate(outcomes, limit), figures, [asdict(row) for row in outcomes], arguments.json)
    right = all(row.survived and row.weights_identical is not False for row in outcomes)
    return 0 if right and not figures["skipped"] + figures["repeated"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
