"""What nodes do together: sums over all of them, for two seconds."""

import time
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crosslmm.preflight.findings import Finding, everywhere, size

SECONDS = 2.0
STARTED_WITHIN_S, MET_WITHIN_S = 45.0, 20.0
"""So long may processes take to start, torch among them, and then to find one another [s]."""
NUMBERS = {"gloo": 2**20, "nccl": 2**24}
"""float32 numbers that are summed at once."""
ROADS = (
    "nodes must reach one another at every port, by the names that they have for themselves: security group, "
    "/etc/hosts, GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
)


@ray.remote(max_restarts=0)
class Member:
    """One of a node."""

    def address(self) -> str:
        """Where the others find it."""
        from ray._common.network_utils import find_free_port

        return f"tcp://{ray.util.get_node_ip_address()}:{find_free_port()}"

    def sum_up(self, address: str, rank: int, members: int, backend: str) -> float:
        """Sum for `SECONDS` -> bytes of each member that were summed in a second.

        Raises:
            RuntimeError: a sum is wrong.
        """
        patience = timedelta(seconds=MET_WITHIN_S)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=members, timeout=patience)
        try:
            device = torch.device("cuda" if backend == "nccl" else "cpu")
            numbers, took = torch.full((NUMBERS[backend],), rank + 1.0, device=device), torch.zeros(1, device=device)
            if float(_summed(numbers)[-1]) != members * (members + 1) / 2:
                raise RuntimeError("the sum over all nodes is wrong")
            at = time.perf_counter()
            _summed(numbers)
            took += time.perf_counter() - at
            dist.all_reduce(took, dist.ReduceOp.MAX)  # all sum equally often
            times = max(1, int(SECONDS / float(took)))
            at = time.perf_counter()
            for _ in range(times):
                _summed(numbers)
            return times * numbers.nbytes / (time.perf_counter() - at)
        finally:
            dist.destroy_process_group()


def _summed(numbers: torch.Tensor) -> torch.Tensor:
    total = numbers.clone()
    dist.all_reduce(total)
    if total.is_cuda:
        torch.cuda.synchronize()
    return total


def all_reduce(cluster: dict[str, dict[str, Any]], use_gpu: bool) -> list[Finding]:
    """Whether the nodes that can train can sum over all of them.

    Args:
        cluster: nodes, by name.
        use_gpu: NCCL between GPUs, one of each node; else gloo.
    """
    needs = "GPU" if use_gpu else "CPU"
    training = {name: node for name, node in cluster.items() if node["Resources"].get(needs)}
    if len(training) < 2:
        return []
    backend = "nccl" if use_gpu else "gloo"
    members = {
        name: Member.options(  # type: ignore[attr-defined]
            num_cpus=0,
            num_gpus=int(use_gpu),
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote()
        for name, node in training.items()
    }
    try:
        begun = {member.address.remote(): name for name, member in members.items()}
        late = ray.wait(list(begun), num_returns=len(begun), timeout=STARTED_WITHIN_S)[1]
        if late:
            why = f"no process{' with a GPU' * use_gpu} started in {STARTED_WITHIN_S:g} s"
            remedy = f"`ray status` says what is taken{'; other jobs may hold the GPUs' * use_gpu}"
            return [Finding("all-reduce", begun[task], False, why, remedy) for task in late]
        address = ray.get(next(iter(begun)))
        sums = {
            member.sum_up.remote(address, rank, len(members), backend): name
            for rank, (name, member) in enumerate(members.items())
        }
        return _judged(sums, everywhere(training), backend)
    finally:
        for member in members.values():
            ray.kill(member)


def _judged(sums: dict[Any, str], all_of_them: str, backend: str) -> list[Finding]:
    ray.wait(list(sums), num_returns=len(sums), timeout=MET_WITHIN_S * 2 + SECONDS)
    failures, rates = [], []
    for task, name in sums.items():
        try:
            rates.append(ray.get(task, timeout=0))
        except GetTimeoutError:
            failures.append(Finding("all-reduce", name, False, f"{backend} never came back", ROADS))
        except RayError as error:
            said = f"{backend}: {str(error).strip().splitlines()[-1][:300]}"
            failures.append(Finding("all-reduce", name, False, said, ROADS))
    said = f"{backend}, {size(min(rates, default=0))}/s of each node"
    return failures or [Finding("all-reduce", all_of_them, True, said)]
