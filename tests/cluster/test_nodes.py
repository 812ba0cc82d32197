"""A cluster of several nodes, labelled as in clouds: placement, added nodes and lost nodes."""

import json
import os
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from cluster.local.cluster import LocalCluster
from cluster.local.nodes import ROLE_LABEL, NodeGroup
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.train.checkpoint import seals
from tests.support.common import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEPS, EVERY = 30, 5
# A training node has room for one worker, and a decoder would still fit next to it.
DECODE, TRAIN, WORKER_CPUS = NodeGroup("decode", 1, cpus=1), NodeGroup("train", 2, cpus=2), 1.5
WORKER, DECODER = "RayTrainWorker", "MapWorker(MapBatches(ReadSamples))"
DRIVER_ACTORS = {"EventChannel", "TrainController", "DatasetManager", "SplitCoordinator", "SynchronizationActor"}
DEADLINE_S = 500.0
SPACE = """\
from ray import tune

def space(config):
    return {"model.pool_stride": tune.grid_search([2, 3, 4, 8])}
"""


class Laboratory:
    """Starts runs on a cluster and reads what they leave; the file `slow` delays their steps [s]."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hooks = folder, folder / "hooks"
        self.hooks.mkdir()
        self.environment = {
            "FAULT_HOOKS": str(self.hooks),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "fault_hooks"), str(ROOT)]),
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # otherwise workers starve when anything else runs on the machine
        }
        self.tracking = f"sqlite:///{folder}/mlflow.db"
        write_sample_set(str(folder / "data"), train=64, held_out=8)

    def settings(self, cluster: LocalCluster, name: str) -> list[str]:
        return [
            "--config=tiny", f"--config={cluster.placement}", f"--name={name}", f"--storage={self.folder}/runs",
            f"--tracking.uri={self.tracking}", f"--data.manifest={self.folder}/data/train.jsonl",
            "--train.epochs=99", f"--train.max_steps={STEPS}", "--train.global_batch_size=8",
            "--train.micro_batch_size=4", "--train.warmup_steps=2", f"--train.checkpoint_every={EVERY}",
            f"--scaling.cpus_per_worker={WORKER_CPUS}",
        ]  # fmt: skip

    def submit(self, cluster: LocalCluster, *entrypoint: str) -> "Submitted":
        return Submitted(cluster, [*cluster.submit("python", *entrypoint)], self.folder)

    def train(self, cluster: LocalCluster, name: str, *more: str) -> "Submitted":
        return self.submit(cluster, "jobs/train.py", *self.settings(cluster, name), *more)

    def checkpoints(self, name: str) -> list[seals.Checkpoint]:
        """Return the run's sealed checkpoints, newest first."""
        return seals.list_sealed(str(self.folder / "runs" / name))

    def recorded_steps(self, run_id: str) -> list[int]:
        """Return the steps of all points of the metric `loss`, sorted."""
        return sorted(point.step for point in MlflowClient(self.tracking).get_metric_history(run_id, "loss"))


class Submitted:
    """A submitted job and what it prints."""

    def __init__(self, cluster: LocalCluster, command: list[str], folder: Path) -> None:
        self.cluster, self.log = cluster, folder / f"job-{time.monotonic_ns()}.log"
        self._before = {job["submission_id"] for job in submitted(cluster)}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=cluster.environment, cwd="/", stdout=file, stderr=subprocess.STDOUT
            )

    def wait_until(self, condition, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}:\n{self.log.read_text()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.log.read_text()}"
            time.sleep(0.2)

    def result(self) -> dict:
        """Wait for the job's success -> the JSON object of its last line."""
        assert self.process.wait(DEADLINE_S) == 0, self.log.read_text()
        return json.loads([line for line in self.log.read_text().splitlines() if line.startswith("{")][-1])

    def details(self) -> dict:
        (mine,) = [job for job in submitted(self.cluster) if job["submission_id"] not in self._before]
        return mine

    def has_driver(self) -> bool:
        """Return whether the job's driver has started."""
        mine = [job for job in submitted(self.cluster) if job["submission_id"] not in self._before]
        return bool(mine and mine[0]["driver_info"])

    def roles(self) -> dict[str, set[str]]:
        """Return the roles of the nodes that ran the job's actors and tasks, by class or name, from the state API."""
        role = {node["node_id"]: node["labels"].get(ROLE_LABEL) for node in nodes(self.cluster)}
        driver = self.details()["driver_info"]["id"]
        roles = defaultdict(set)
        for kind, name in (("actors", "class_name"), ("tasks", "name")):
            for one in state(self.cluster, kind):
                if one["job_id"] == driver and one["node_id"]:
                    roles[one[name]].add(role[one["node_id"]])
        return roles


def state(cluster: LocalCluster, what: str) -> list[dict]:
    response = cluster.get(f"/api/v0/{what}?limit=10000&detail=1")
    assert response["result"], response
    return response["data"]["result"]["result"]


def submitted(cluster: LocalCluster) -> list[dict]:
    return [job for job in cluster.get("/api/jobs/") if job["type"] == "SUBMISSION"]


def nodes(cluster: LocalCluster) -> list[dict]:
    return state(cluster, "nodes")


def count(cluster: LocalCluster, role: str) -> int:
    return sum(node["labels"][ROLE_LABEL] == role for node in cluster.alive_nodes())


def nodes_of(cluster: LocalCluster, job: Submitted, class_name: str) -> set[str]:
    """Return the ids of the nodes that run, or ran, a job's actors of a class."""
    driver = job.details()["driver_info"]["id"]
    actors = [one for one in state(cluster, "actors") if one["class_name"] == class_name and one["job_id"] == driver]
    return {one["node_id"] for one in actors if one["node_id"]}


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("nodes"))


@pytest.fixture(scope="module")
def cluster(laboratory):
    with LocalCluster(environment=laboratory.environment, groups=[DECODE, TRAIN]) as cluster:
        yield cluster


@pytest.fixture
def slow_steps(laboratory):
    """Delay each training step by half a second."""
    (laboratory.hooks / "slow").write_text("0.5")
    yield
    (laboratory.hooks / "slow").unlink()


def test_each_process_of_a_run_is_on_its_nodes(laboratory, cluster):
    job = laboratory.train(cluster, "placed", "--scaling.decode_workers=3")
    result = job.result()
    (head,) = [node["node_id"] for node in nodes(cluster) if node["is_head_node"]]
    assert job.details()["driver_node_id"] == head
    roles = job.roles()
    assert roles[WORKER] == {"train"}
    assert len(nodes_of(cluster, job, WORKER)) == TRAIN.nodes
    assert roles[DECODER] == {"decode"}
    assert {name: roles[name] for name in DRIVER_ACTORS} == {name: {"head"} for name in DRIVER_ACTORS}
    assert [places for name, places in roles.items() if name.startswith("Read")] == [{"head"}]
    assert laboratory.recorded_steps(result["run_id"]) == list(range(1, STEPS + 1))
    assert "machine   CPUs, fp32, sdpa, gloo" in job.log.read_text()


@pytest.mark.parametrize("lost", [DECODE, TRAIN], ids=lambda group: group.role)
def test_a_run_survives_the_loss_of_a_node(laboratory, cluster, slow_steps, lost):
    name, at_work = f"lost-{lost.role}", DECODER if lost is DECODE else WORKER
    job = laboratory.train(cluster, name)
    if lost is DECODE:  # early: the videos are few, and soon all of them are decoded
        job.wait_until(lambda: job.has_driver() and nodes_of(cluster, job, at_work), "decoder")
    else:
        job.wait_until(lambda: laboratory.checkpoints(name), "checkpoint")
    before, nodes_before = nodes_of(cluster, job, at_work), count(cluster, lost.role)
    cluster.nodes[lost.role].pop(0).stop()
    cluster.add(lost)
    result = job.result()
    # The run continues on the added node.
    assert nodes_of(cluster, job, at_work) - before
    assert count(cluster, lost.role) == nodes_before
    assert laboratory.recorded_steps(result["run_id"]) == list(range(1, STEPS + 1))


def test_a_sweep_uses_all_training_nodes(laboratory, cluster):
    (laboratory.folder / "space.py").write_text(SPACE)
    job = laboratory.submit(
        cluster, "jobs/tune.py", *laboratory.settings(cluster, "sweep"), f"--space={laboratory.folder}/space.py",
        "--scheduler=none", "--features=never", "--scaling.num_workers=1", "--train.max_steps=4",
        "--train.validate_every=2", "--train.checkpoint_every=4",
        f"--data.validation_manifest={laboratory.folder}/data/held_out.jsonl",
    )  # fmt: skip
    result = job.result()
    assert (result["trials"], result["finished"]) == (4, 4), job.log.read_text()
    assert "trials    4, 2 at a time" in job.log.read_text()
    roles = job.roles()
    assert roles[WORKER] == {"train"}
    assert len(nodes_of(cluster, job, WORKER)) == 2
    assert roles[DECODER] == {"decode"}
    assert roles["TrainController"] == {"head"}


def test_an_autoscaler_adds_and_removes_a_training_node(laboratory, slow_steps):
    groups = [DECODE, NodeGroup("train", 2, cpus=2, min_nodes=1)]
    (laboratory.hooks / "slow").write_text("1")
    with LocalCluster(environment=laboratory.environment, groups=groups, idle_s=5.0) as cluster:
        wait_for(lambda: count(cluster, "train") == 1, "first training node")
        job = laboratory.train(cluster, "scaled", "--scaling.num_workers=[1, 2]", "--scaling.resize_every_s=5")
        job.wait_until(lambda: count(cluster, "train") == 2, "second training node")
        job.wait_until(lambda: {one.world_size for one in laboratory.checkpoints("scaled")} >= {2}, "two ranks")
        assert len(nodes_of(cluster, job, WORKER)) == 2
        (laboratory.hooks / "slow").write_text("0")
        result = job.result()
        assert laboratory.recorded_steps(result["run_id"]) == list(range(1, STEPS + 1))
        assert job.roles()[DECODER] == {"decode"}
        wait_for(lambda: (count(cluster, "train"), count(cluster, "decode")) == (1, 0), "end of idle nodes")


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.5)
