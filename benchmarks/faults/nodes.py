"""Nodes that go and come, on clusters of several raylets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from benchmarks.faults.lab import DEADLINE_S, EVERY, FAULT_AFTER, RANK, RESTART, Attempt, Lab, Lost, fault
from crosslmm.train import checkpoint_store

ON_NODES = ("--scaling.cpus_per_worker=1.5", "--scaling.cpus_per_decode_worker=1")
"""The head has room for the decoder and for no rank, a node for one rank and no decoder beside it."""


@contextmanager
def _nodes(lab: Lab) -> Iterator[tuple[Cluster, list[Any]]]:
    """A cluster of a head, which decodes and drives, and two nodes with a rank each."""
    before = dict(os.environ)
    os.environ |= lab.environment
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [_add(cluster) for _ in range(2)]
        cluster.wait_for_nodes()
        yield cluster, nodes
    finally:
        cluster.shutdown()
        os.environ.clear()
        os.environ |= before


def _add(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=2)


def _ranks_on(node: Any) -> list[int]:
    """Processes of ranks on a node."""
    raylet = psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)
    found = []
    for child in raylet.children():
        with suppress(psutil.NoSuchProcess):
            found += [child.pid] if " ".join(child.cmdline()).startswith(RANK) else []
    return found


def _remove(lab: Lab, cluster: Cluster, node: Any) -> float:
    """A node goes without a word, and a rank with it; the run goes on -> when [monotonic s].

    Raises:
        Lost: no rank was on it.
    """
    if not _ranks_on(node):
        raise Lost("there was no rank on the node")
    cluster.remove_node(node, allow_graceful=False)
    return lab.go_on()


@fault("node removed, another one comes")
def node_removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Without a word, with all of its processes."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.begun(name, *ON_NODES, cluster=cluster.gcs_address)
        at = _remove(lab, cluster, nodes[0])
        _add(cluster)
        return [run.ended()], at


@fault("node drained, another one comes", announced=True)
def node_drained(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As before a spot machine is taken: the workers take a checkpoint and go on elsewhere, and then it goes."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.begun(name, *ON_NODES, cluster=cluster.gcs_address)
        if not _ranks_on(nodes[0]):
            raise Lost("there was no rank on the node")
        drain = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.gcs_address]
        drain += ["--node-id", nodes[0].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "spot", "--deadline-remaining-seconds", "120"]
        drained = subprocess.run(drain, capture_output=True, text=True, timeout=DEADLINE_S)
        if drained.returncode:
            raise Lost(f"ray drain-node: {drained.stdout}{drained.stderr}")
        # Some seconds pass until all ranks hear of it, and the steps must last as long.
        slower = lab.orders / "slow"
        slower.write_text("3")
        at = lab.go_on()
        _add(cluster)
        run.says(RESTART)
        slower.unlink()
        run.says("resumed after step")
        if _ranks_on(nodes[0]):
            raise Lost(f"a rank is on the node that is taken away\n{run.text}")
        cluster.remove_node(nodes[0], allow_graceful=False)
        return [run.ended()], at


@fault("node removed, and trained on with fewer", other_sums=True)
def node_removed_elastic(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """`scaling.num_workers: [1, 2]`; when a node comes, on two again."""

    def ranks() -> int:
        return checkpoint_store.list_sealed(lab.folder_of(name))[0].world_size

    with _nodes(lab) as (cluster, nodes):
        settings = ("--scaling.num_workers=[1, 2]", "--scaling.resize_every_s=5")
        run = lab.begun(name, *ON_NODES, *settings, cluster=cluster.gcs_address)
        at = _remove(lab, cluster, nodes[0])
        lab.hold(FAULT_AFTER + EVERY + 1)
        run.wait_for(lambda: ranks() == 1, "checkpoint of one rank")
        new = _add(cluster)
        run.wait_for(lambda: _ranks_on(new), "rank on the new node")
        run.says("resumed after step", after=len(run.lines))
        lab.go_on()
        run.wait_for(lambda: ranks() == 2, "checkpoint of two ranks")
        return [run.ended()], at
