"""Which nodes a run's processes belong on, and whether the cluster has, or can add, what they need."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import ray

from crosslmm.config import BadConfig, RunConfig


@dataclass(frozen=True)
class Nodes:
    """So many equal nodes, there or to be added."""

    count: int
    resources: dict[str, float]
    """Of one of them."""
    labels: dict[str, str]

    def have(self, labels: dict[str, str]) -> bool:
        """Whether these are among their labels."""
        return labels.items() <= self.labels.items()

    def hold(self, each: dict[str, float]) -> int:
        """How many processes that reserve so much have room on them."""
        return self.count * min(floor(self.resources.get(k, 0) / v + 1e-6) for k, v in each.items())


@dataclass(frozen=True)
class Pool:
    """Processes of one kind."""

    what: str
    count: int
    each: dict[str, float]
    """What each of them reserves."""
    on: dict[str, str]
    """Labels that their nodes must have."""
    keys: tuple[str, str, str]
    """The settings of count, size and labels."""


def check_placement(config: RunConfig) -> None:
    """Refuse what the cluster, autoscaled to its limit, could never place: Ray would wait for ever without a word. And
    a driver on the wrong node.

    Raises:
        BadConfig: naming the keys, what they ask for and what there is.
    """
    labels: Any = ray.get_runtime_context().get_node_labels()  # its type is said wrongly
    check_driver(config, labels)
    check_room(config, cluster(config))


def cluster(config: RunConfig) -> list[Nodes]:
    """The nodes that there are, or that the autoscaler may add: of a type as many as it may, or as there are."""
    types = [Nodes(one.most, one.resources, one.labels) for one in config.scaling.node_types]
    alive = [Nodes(1, node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    # A node of a type counts among what its type may grow to.
    return types + [node for node in alive if not any(node.have(one.labels) and one.labels for one in types)]


def check_driver(config: RunConfig, labels: dict[str, str]) -> None:
    """Whether a driver on a node with these labels is where it should be.

    Raises:
        BadConfig: it is not.
    """
    wanted = config.scaling.drive_on
    if not wanted.items() <= labels.items():
        found = {key: labels.get(key, "none") for key in wanted}
        raise BadConfig(
            f"scaling.drive_on: the driver is to be on a node with {_said(wanted)}, and this one has {_said(found)}; "
            f"submit it with --entrypoint-label-selector '{json.dumps(wanted)}'"
        )


def check_room(config: RunConfig, nodes: Sequence[Nodes]) -> None:
    """Whether nodes have room for a run with its fewest workers.

    Raises:
        BadConfig: naming the keys, what they ask for and what there is.
    """
    scaling = config.scaling
    pools = pools_of(config, scaling.least_workers)
    for pool in pools:
        number, size, labels = pool.keys
        there = [node for node in nodes if node.have(pool.on)]
        if not there:
            others = sorted({_said({key: node.labels.get(key, "none") for key in pool.on}) for node in nodes})
            raise BadConfig(f"scaling.{labels}: no node has {_said(pool.on)}; there are {' and '.join(others)}")
        room = sum(node.hold(pool.each) for node in there)
        if room < pool.count:
            which = f"the nodes with {_said(pool.on)}" if pool.on else "the cluster's nodes"
            on_cpus = ", or train on CPUs with scaling.use_gpu false" if "GPU" in pool.each else ""
            raise BadConfig(
                f"scaling.{number}: {pool.count} {pool.what} need {_said(pool.each)} each, and {which} "
                f"({_sizes(there, pool)}) have room for {room}; lower it or scaling.{size}{on_cpus}"
            )
    there = [node for node in nodes if any(node.have(pool.on) for pool in pools)]
    need, total = sum(pool.count * pool.each["CPU"] for pool in pools), _cpus(there)
    if need > total + 1e-6:
        sums = " + ".join(f"{pool.count} {pool.what} x {pool.keys[1]} {pool.each['CPU']:g}" for pool in pools)
        raise BadConfig(f"scaling: {sums} = {need:g} CPUs, and there are {total:g}; lower one of them")
    train = pools[0]
    elastic = scaling.least_workers < scaling.most_workers
    if elastic and any(node.hold(train.each) for node in nodes if not node.have(train.on)):
        raise BadConfig(
            f"scaling.worker_resources: with num_workers [{scaling.least_workers}, {scaling.most_workers}] Ray Train "
            "counts the room on all nodes, whatever their labels; name a resource that only those of train_on have"
        )


def room_for(config: RunConfig, nodes: Sequence[Nodes], own_cpus: float) -> int:
    """How many such runs have room beside one another, each with all its workers and a driver that reserves so many
    CPUs of any node's; one at least."""
    pools = pools_of(config, config.scaling.most_workers)
    counts = [sum(node.hold(pool.each) for node in nodes if node.have(pool.on)) // pool.count for pool in pools]
    there = [node for node in nodes if any(node.have(pool.on) for pool in pools)]
    together = sum(pool.count * pool.each["CPU"] for pool in pools) + (0 if config.scaling.drive_on else own_cpus)
    return max(1, min(*counts, int(_cpus(there) / together + 1e-6)))


def pools_of(config: RunConfig, workers: int) -> list[Pool]:
    """What a run with so many training workers holds: these, and its decoders."""
    scaling = config.scaling
    keys = ("num_workers", "cpus_per_worker", "train_on")
    train = Pool("workers", workers, worker_resources(config), scaling.train_on, keys)
    # Validation decodes beside training's own decoders.
    decoders = scaling.decode_workers * (2 if config.data.validation_manifest else 1)
    what = "decoders, half of them for validation," if config.data.validation_manifest else "decoders"
    each = {"CPU": scaling.cpus_per_decode_worker}
    keys = ("decode_workers", "cpus_per_decode_worker", "decode_on")
    return [train, Pool(what, decoders, each, scaling.decode_on, keys)]


def worker_resources(config: RunConfig) -> dict[str, float]:
    """What a training worker reserves."""
    scaling = config.scaling
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {}) | scaling.worker_resources


def _cpus(nodes: Sequence[Nodes]) -> float:
    return sum(node.count * node.resources.get("CPU", 0) for node in nodes)


def _sizes(nodes: Sequence[Nodes], pool: Pool) -> str:
    """2 x 8 CPU, 1 GPU; 1 x 4 CPU, 0 GPU."""
    counts: dict[str, int] = {}
    for node in nodes:
        size = _said({kind: node.resources.get(kind, 0.0) for kind in pool.each})
        counts[size] = counts.get(size, 0) + node.count
    return "; ".join(f"{count} x {size}" for size, count in counts.items())


def _said(values: dict[str, Any]) -> str:
    """{"CPU": 2.0, "GPU": 1.0} -> 2 CPU, 1 GPU; {"role": "train"} -> role=train."""
    return ", ".join(f"{k}={v}" if isinstance(v, str) else f"{v:g} {k}" for k, v in values.items())
