"""Which nodes a run's processes belong on, and whether the cluster has, or can add, the resources for them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import ray

from crosslmm.config import BadConfig, RunConfig

MEMORY = "memory"
"""Ray's name for the resource "memory of a node's processes" [bytes]."""


@dataclass(frozen=True)
class NodePool:
    """Equal nodes, in the cluster or to be added by its autoscaler."""

    count: int
    resources: dict[str, float]
    """Resources of one node, by Ray's names."""
    labels: dict[str, str]

    def has_labels(self, labels: dict[str, str]) -> bool:
        """Return whether the nodes carry all of these labels."""
        return labels.items() <= self.labels.items()

    def capacity(self, resources: dict[str, float]) -> int:
        """Return how many processes that reserve these resources fit on all nodes together. Node types that do not
        state their memory count as having enough."""
        known = {k: v for k, v in resources.items() if k != MEMORY or MEMORY in self.resources}
        return self.count * min(floor(self.resources.get(k, 0) / v + 1e-6) for k, v in known.items())


@dataclass(frozen=True)
class Demand:
    """Resources that a run reserves for one kind of process."""

    processes: str
    """What the processes are, in error messages."""
    count: int
    resources: dict[str, float]
    """Resources that each process reserves, by Ray's names."""
    labels: dict[str, str]
    """Labels that their nodes must carry."""
    keys: tuple[str, str, str]
    """Configuration keys under `scaling` of count, resources and labels."""


def check_placement(config: RunConfig) -> None:
    """Refuse a run that the cluster, autoscaled to its limit, could never place (Ray itself would wait forever and log
    nothing), and a driver on the wrong node.

    Raises:
        BadConfig: naming the keys, what they need and what the cluster has.
    """
    labels: Any = ray.get_runtime_context().get_node_labels()  # Ray declares the wrong type
    check_driver(config, labels)
    check_resources(config, node_pools(config))


def node_pools(config: RunConfig) -> list[NodePool]:
    """Return the nodes that are in the cluster or that the autoscaler may add: each node type with its limit, and the
    living nodes of no such type."""
    types = [NodePool(node_type.most, node_type.resources, node_type.labels) for node_type in config.scaling.node_types]
    alive = [NodePool(1, node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    # A living node of a type is part of that type's limit.
    return types + [node for node in alive if not any(node.has_labels(pool.labels) and pool.labels for pool in types)]


def check_driver(config: RunConfig, labels: dict[str, str]) -> None:
    """Check that the driver's node carries the labels of scaling.drive_on.

    Args:
        config: the run's configuration.
        labels: labels of the driver's node.

    Raises:
        BadConfig: it does not.
    """
    required = config.scaling.drive_on
    if not required.items() <= labels.items():
        actual = {key: labels.get(key, "none") for key in required}
        raise BadConfig(
            f"scaling.drive_on: the driver must run on a node with {_format(required)}, and this one has "
            f"{_format(actual)}; submit it with --entrypoint-label-selector '{json.dumps(required)}'"
        )


def check_resources(config: RunConfig, pools: Sequence[NodePool]) -> None:
    """Check that the nodes have room for a run with its minimum number of workers, and for its decoders beside as many
    workers as Ray Train will place.

    Raises:
        BadConfig: naming the keys, what they need and what the nodes have.
    """
    scaling = config.scaling
    run_demands = demands(config, scaling.least_workers)
    for demand in run_demands:
        _check_demand(demand, pools)
    elastic = scaling.least_workers < scaling.most_workers
    # Ray Train takes the room that it finds before any decoder has started, which would then wait for ever.
    room = sum(pool.capacity(run_demands[0].resources) for pool in pools if pool.has_labels(scaling.train_on))
    run_demands = demands(config, min(room, scaling.most_workers))
    usable = [pool for pool in pools if any(pool.has_labels(demand.labels) for demand in run_demands)]
    needed, available = sum(demand.count * demand.resources["CPU"] for demand in run_demands), _cpus(usable)
    if needed > available + 1e-6:
        terms = " + ".join(
            f"{demand.count} {demand.processes} x {demand.keys[1]} {demand.resources['CPU']:g}"
            for demand in run_demands
        )
        range_ = f" (num_workers [{scaling.least_workers}, {scaling.most_workers}] takes all the room)" * elastic
        raise BadConfig(f"scaling: {terms} = {needed:g} CPUs{range_}, and there are {available:g}; lower one of them")
    train = run_demands[0]
    if elastic and any(pool.capacity(train.resources) for pool in pools if not pool.has_labels(train.labels)):
        raise BadConfig(
            f"scaling.worker_resources: with num_workers [{scaling.least_workers}, {scaling.most_workers}] Ray Train "
            "counts the room on all nodes, whatever their labels; name a resource that only nodes of train_on have"
        )


def _check_demand(demand: Demand, pools: Sequence[NodePool]) -> None:
    """Check that the nodes with the demand's labels have room for its processes."""
    count_key, resources_key, labels_key = demand.keys
    labelled = [pool for pool in pools if pool.has_labels(demand.labels)]
    if not labelled:
        existing = sorted({_format({key: pool.labels.get(key, "none") for key in demand.labels}) for pool in pools})
        raise BadConfig(
            f"scaling.{labels_key}: no node has {_format(demand.labels)}; there are {' and '.join(existing)}"
        )
    capacity = sum(pool.capacity(demand.resources) for pool in labelled)
    if capacity < demand.count:
        nodes = f"the nodes with {_format(demand.labels)}" if demand.labels else "the cluster's nodes"
        remedy = f"lower it or scaling.{resources_key}"
        remedy += " or data.decode_memory_gib" if MEMORY in demand.resources else ""
        remedy += ", or train on CPUs with scaling.use_gpu false" if "GPU" in demand.resources else ""
        raise BadConfig(
            f"scaling.{count_key}: {demand.count} {demand.processes} need {_format(demand.resources)} each, and "
            f"{nodes} ({_format_pools(labelled, demand)}) have room for {capacity}; {remedy}"
        )


def max_concurrent_runs(config: RunConfig, pools: Sequence[NodePool], driver_cpus: float) -> int:
    """Return how many such runs fit on the nodes at the same time, at least one.

    Args:
        config: configuration of each run; it gets its maximum number of workers.
        pools: nodes of the cluster.
        driver_cpus: CPUs that each run's driver reserves on any node, unless scaling.drive_on places it elsewhere.
    """
    run_demands = demands(config, config.scaling.most_workers)
    counts = [
        sum(pool.capacity(demand.resources) for pool in pools if pool.has_labels(demand.labels)) // demand.count
        for demand in run_demands
    ]
    usable = [pool for pool in pools if any(pool.has_labels(demand.labels) for demand in run_demands)]
    cpus = sum(demand.count * demand.resources["CPU"] for demand in run_demands)
    cpus += 0 if config.scaling.drive_on else driver_cpus
    return max(1, min(*counts, int(_cpus(usable) / cpus + 1e-6)))


def demands(config: RunConfig, workers: int) -> list[Demand]:
    """Return the demands of a run with this number of training workers: first the workers', then the decoders'."""
    scaling = config.scaling
    keys = ("num_workers", "cpus_per_worker", "train_on")
    train = Demand("workers", workers, worker_resources(config), scaling.train_on, keys)
    # Validation has decoders of its own, which run at the same time as those of training.
    decoders = scaling.decode_workers * (2 if config.data.validation_manifest else 1)
    name = "decoders, half of them for validation," if config.data.validation_manifest else "decoders"
    resources = {"CPU": scaling.cpus_per_decode_worker}
    if config.data.features is None:
        resources[MEMORY] = config.data.decode_memory_gib * 2**30
    keys = ("decode_workers", "cpus_per_decode_worker", "decode_on")
    return [train, Demand(name, decoders, resources, scaling.decode_on, keys)]


def worker_resources(config: RunConfig) -> dict[str, float]:
    """Return the resources that one training worker reserves, by Ray's names."""
    scaling = config.scaling
    return {"CPU": scaling.cpus_per_worker} | ({"GPU": 1.0} if scaling.use_gpu else {}) | scaling.worker_resources


def _cpus(pools: Sequence[NodePool]) -> float:
    return sum(pool.count * pool.resources.get("CPU", 0) for pool in pools)


def _format_pools(pools: Sequence[NodePool], demand: Demand) -> str:
    """Return nodes by size, such as "2 x 8 CPU, 1 GPU; 1 x 4 CPU, 0 GPU"."""
    counts: dict[str, int] = {}
    for pool in pools:
        kinds = [kind for kind in demand.resources if kind != MEMORY or MEMORY in pool.resources]
        size = _format({kind: pool.resources.get(kind, 0.0) for kind in kinds})
        counts[size] = counts.get(size, 0) + pool.count
    return "; ".join(f"{count} x {size}" for size, count in counts.items())


def _format(values: dict[str, Any]) -> str:
    """Return resources as "2 CPU, 1.5 GiB memory", labels as "role=train"."""

    def format_one(key: str, value: Any) -> str:
        if isinstance(value, str):
            return f"{key}={value}"
        return f"{value / 2**30:.3g} GiB {key}" if key == MEMORY else f"{value:g} {key}"

    return ", ".join(format_one(key, value) for key, value in values.items())
