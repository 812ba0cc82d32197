"""Nodes that are removed, drained and added, on clusters of several raylets."""

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

from benchmarks.faults.lab import DEADLINE_S, EVERY, FAULT_AFTER, RANK, RESTART, Attempt, Lab, NotSurvived, fault
from crosslmm.train.checkpoint import seals

ON_NODES = ("--scaling.cpus_per_worker=1.5", "--scaling.cpus_per_decode_worker=1")
"""The head has room for the decoder but no rank; a node for one rank, without a decoder."""


@contextmanager
def _nodes(lab: Lab) -> Iterator[tuple[Cluster, list[Any]]]:
    """Start a cluster of a head, which decodes and drives, and two nodes with a rank each."""
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
    """Return the process ids of ranks on a node."""
    raylet = psutil.Process(node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid)
    pids = []
    for child in raylet.children():
        with suppress(psutil.NoSuchProcess):
            pids += [child.pid] if " ".join(child.cmdline()).startswith(RANK) else []
    return pids


def _remove(lab: Lab, cluster: Cluster, node: Any) -> float:
    """Remove a node with its rank, unannounced, and release the run; return the time [monotonic s].

    Raises:
        NotSurvived: the node has no rank.
    """
    if not _ranks_on(node):
        raise NotSurvived("there was no rank on the node")
    cluster.remove_node(node, allow_graceful=False)
    return lab.release()


@fault("node removed, another one comes")
def node_removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Remove a node unannounced, with all its processes."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.start_until_checkpoint(name, *ON_NODES, cluster=cluster.gcs_address)
        at = _remove(lab, cluster, nodes[0])
        _add(cluster)
        return [run.wait()], at


@fault("node drained, another one comes", announced=True)
def node_drained(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Announce that a spot node is reclaimed: the workers save a checkpoint and restart elsewhere before it goes."""
    with _nodes(lab) as (cluster, nodes):
        run = lab.start_until_checkpoint(name, *ON_NODES, cluster=cluster.gcs_address)
        if not _ranks_on(nodes[0]):
            raise NotSurvived("there was no rank on the node")
        drain = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.gcs_address]
        drain += ["--node-id", nodes[0].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        drain += ["--reason-message", "spot", "--deadline-remaining-seconds", "120"]
        drained = subprocess.run(drain, capture_output=True, text=True, timeout=DEADLINE_S)
        if drained.returncode:
            raise NotSurvived(f"ray drain-node: {drained.stdout}{drained.stderr}")
        # All ranks hear of it only after some seconds, and the steps must last that long.
        slow = lab.orders / "slow"
        slow.write_text("3")
        at = lab.release()
        _add(cluster)
        run.wait_for_line(RESTART)
        slow.unlink()
        run.wait_for_line("resumed after step")
        if _ranks_on(nodes[0]):
            raise NotSurvived(f"a rank is still on the drained node\n{run.text}")
        cluster.remove_node(nodes[0], allow_graceful=False)
        return [run.wait()], at


@fault("node removed, and trained on with fewer", order_of_sums_differs=True)
def node_removed_elastic(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """With `scaling.num_workers: [1, 2]` the run continues on one rank, and on two when a node is added."""

    def ranks() -> int:
        return seals.list_sealed(lab.folder_of(name))[0].world_size

    with _nodes(lab) as (cluster, nodes):
        settings = ("--scaling.num_workers=[1, 2]", "--scaling.resize_every_s=5")
        run = lab.start_until_checkpoint(name, *ON_NODES, *settings, cluster=cluster.gcs_address)
        at = _remove(lab, cluster, nodes[0])
        lab.hold(FAULT_AFTER + EVERY + 1)
        run.wait_for(lambda: ranks() == 1, "checkpoint of one rank")
        new = _add(cluster)
        run.wait_for(lambda: _ranks_on(new), "rank on the new node")
        run.wait_for_line("resumed after step", after=len(run.lines))
        lab.release()
        run.wait_for(lambda: ranks() == 2, "checkpoint of two ranks")
        return [run.wait()], at
