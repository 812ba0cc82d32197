"""An all-reduce over all nodes that can train, for two seconds: can they reach one another, and how fast?"""

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crosslmm import ray_runtime
from crosslmm.preflight.findings import Finding, format_bytes, nodes_label
from crosslmm.text import in_brief
from crosslmm.train.distributed.rendezvous import Rendezvous

DURATION_S = 2.0
"""Duration of the measurement [s]."""
START_TIMEOUT_S = 45.0
"""Deadline for the ranks' processes to start, the import of torch included [s]."""
RENDEZVOUS_TIMEOUT_S = 20.0
"""Deadline for the ranks to find one another [s]."""
TENSOR_SIZE = {"gloo": 2**20, "nccl": 2**24}
"""Number of float32 values that are reduced at once, by backend."""
NETWORK_REMEDY = (
    "nodes must reach one another on every port, by their own host names: security group, /etc/hosts, "
    "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
)


@ray.remote(max_restarts=0)
class Rank:
    """One rank of the all-reduce; each node runs one."""

    def address(self) -> tuple[str, int]:
        """Return the address of this rank's node, and a port at which the others can find it."""
        return ray.util.get_node_ip_address(), ray_runtime.free_port()

    def measure(self, rendezvous: Rendezvous, rank: int, backend: str) -> float:
        """Reduce for `DURATION_S` and return the bytes of the tensor that this rank reduces per second [bytes/s].

        Raises:
            RuntimeError: a sum is wrong.
        """
        world_size = len(rendezvous.addresses)
        rendezvous.join(rank, backend, timedelta(seconds=RENDEZVOUS_TIMEOUT_S))
        try:
            device = torch.device("cuda" if backend == "nccl" else "cpu")
            values = torch.full((TENSOR_SIZE[backend],), rank + 1.0, device=device)
            if float(_reduce(values)[-1]) != world_size * (world_size + 1) / 2:
                raise RuntimeError("the sum over all nodes is wrong")
            began = time.perf_counter()
            _reduce(values)
            duration = torch.full((1,), time.perf_counter() - began, device=device)
            dist.all_reduce(duration, dist.ReduceOp.MAX)  # all ranks must reduce equally often
            count = max(1, int(DURATION_S / float(duration)))
            began = time.perf_counter()
            for _ in range(count):
                _reduce(values)
            return count * values.nbytes / (time.perf_counter() - began)
        finally:
            dist.destroy_process_group()


def _reduce(values: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks."""
    total = values.clone()
    dist.all_reduce(total)
    if total.is_cuda:
        torch.cuda.synchronize()
    return total


def check_all_reduce(nodes: Mapping[str, Mapping[str, Any]], use_gpu: bool) -> list[Finding]:
    """Check that the nodes that can train can all-reduce. No finding if there is only one.

    Args:
        nodes: nodes as `ray.nodes()` describes them, by name.
        use_gpu: reduce with NCCL on one GPU of each node; otherwise with gloo.
    """
    resource = "GPU" if use_gpu else "CPU"
    training = {name: node for name, node in nodes.items() if node["Resources"].get(resource)}
    if len(training) < 2:
        return []
    backend = "nccl" if use_gpu else "gloo"
    ranks = {
        name: Rank.options(  # type: ignore[attr-defined]
            num_cpus=0,
            num_gpus=int(use_gpu),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for name, node in training.items()
    }
    try:
        addresses = {rank.address.remote(): name for name, rank in ranks.items()}
        late = ray.wait(list(addresses), num_returns=len(addresses), timeout=START_TIMEOUT_S)[1]
        if late:
            message = f"no process{' with a GPU' * use_gpu} started within {START_TIMEOUT_S:g} s"
            remedy = f"`ray status` shows what is reserved{'; other jobs may hold the GPUs' * use_gpu}"
            return [Finding("all-reduce", addresses[task], False, message, remedy) for task in late]
        hosts, ports = zip(*ray.get(list(addresses)), strict=True)
        rendezvous = Rendezvous(None, ports[0], hosts)
        tasks = {
            rank.measure.remote(rendezvous, number, backend): name for number, (name, rank) in enumerate(ranks.items())
        }
        return _findings(tasks, nodes_label(training), backend)
    finally:
        for rank in ranks.values():
            ray.kill(rank)


def _findings(tasks: dict[Any, str], all_nodes: str, backend: str) -> list[Finding]:
    """Wait for the measurements and return the failures, or the slowest rank's throughput."""
    ray.wait(list(tasks), num_returns=len(tasks), timeout=RENDEZVOUS_TIMEOUT_S * 2 + DURATION_S)
    failures, rates = [], []
    for task, node in tasks.items():
        try:
            rates.append(ray.get(task, timeout=0))
        except GetTimeoutError:
            failures.append(Finding("all-reduce", node, False, f"{backend} did not finish", NETWORK_REMEDY))
        except RayError as error:
            message = f"{backend}: {in_brief(str(error).strip().splitlines()[-1])}"
            failures.append(Finding("all-reduce", node, False, message, NETWORK_REMEDY))
    message = f"{backend}, {format_bytes(min(rates, default=0))}/s per node"
    return failures or [Finding("all-reduce", all_nodes, True, message)]
