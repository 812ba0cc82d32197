"""How ranks find one another without a port that strangers reach.

torch.distributed meets at a store, which by default listens on every interface and asks nobody for a password. On one
machine, a file in a private folder takes its place, and gloo and NCCL use loopback. Ranks on several machines meet at a
store that listens on one address only, that of rank 0's node; who may reach it is for the network to say.
"""

import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from torch.distributed import FileStore, Store, TCPStore  # type: ignore[attr-defined]

from crosslmm.ray_runtime import free_port, set_rank_variables, torch_backend

LOOPBACK = "127.0.0.1"
REMOVAL_TIMEOUT_S = 5.0
"""Deadline for rank 0 to remove the rendezvous file [s]."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of one process group find one another."""

    file: str | None
    """File in a private folder of the machine on which all of them run; None if they run on several."""
    port: int
    """Port of the store on rank 0's node; unused if there is a file."""
    addresses: tuple[str, ...]
    """Address at which each rank's node is reached, by rank."""

    def join(self, rank: int, backend: str, timeout: timedelta) -> None:
        """Initialise the default process group; all ranks call it.

        Args:
            rank: this process's.
            backend: gloo or nccl.
            timeout: deadline of this call and of every collective.

        Raises:
            RuntimeError: the ranks do not find one another in time.
        """
        # An operator may have chosen other, faster interfaces.
        if not os.environ.get("GLOO_SOCKET_IFNAME"):
            os.environ["GLOO_SOCKET_IFNAME"] = interface_of(self.addresses[rank])
        if not os.environ.get("NCCL_SOCKET_IFNAME"):
            os.environ["NCCL_SOCKET_IFNAME"] = f"={interface_of(self.addresses[rank])}"  # =: this very name, no prefix
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # as Ray Train sets it
        world_size = len(self.addresses)
        if self.file:
            store: Store = FileStore(self.file, world_size)
        else:
            host = self.addresses[0]
            listening = _listen(host, self.port) if rank == 0 else None
            store = TCPStore(
                host, self.port, world_size, rank == 0, timeout, wait_for_workers=False, master_listen_fd=listening
            )
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def interface_of(address: str) -> str:
    """Return the name of this machine's network interface that has the address.

    Raises:
        RuntimeError: none has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(of_interface.address.partition("%")[0] == address for of_interface in addresses):
            return name
    raise RuntimeError(
        f"no network interface of this machine has the address {address}, by which Ray knows its node; give "
        "`ray start` one of its own as --node-ip-address"
    )


def _listen(host: str, port: int) -> int:
    """Return the descriptor of a socket that listens on this address only; the store closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024) as server:
        return os.dup(server.fileno())


class PrivateTorchConfig(TorchConfig):
    """Ray Train's set-up of torch.distributed, with a `Rendezvous` for its rendezvous."""

    @property
    def backend_cls(self) -> Any:
        """Class whose methods Ray Train calls."""
        return _Backend


class _Backend(torch_backend()):  # type: ignore[misc]
    """Starts and ends the process group of a group of workers; its methods run in Ray Train's controller."""

    folder = ""
    """Private folder on rank 0's machine."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Initialise the process group on every worker."""
        self.folder = worker_group.execute_single(0, _make_private_folder)
        local = all(worker_group.execute(os.path.isdir, self.folder))
        addresses = tuple(worker_group.execute(ray.util.get_node_ip_address))
        if local and len(set(addresses)) == 1:
            rendezvous = Rendezvous(str(Path(self.folder) / "store"), 0, (LOOPBACK,) * len(addresses))
        else:
            rendezvous = Rendezvous(None, worker_group.execute_single(0, free_port), addresses)
        worker_group.execute(set_rank_variables)
        timeout = timedelta(seconds=backend_config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(rank, rendezvous.join, rank, str(backend_config.backend), timeout)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """End the process group."""
        super().on_shutdown(worker_group, backend_config)
        # NCCL's threads read the store until the group has ended. Rank 0 may hang.
        removed = worker_group.execute_single_async(0, shutil.rmtree, self.folder, ignore_errors=True)
        ray.wait([removed], timeout=REMOVAL_TIMEOUT_S)


def _make_private_folder() -> str:
    return tempfile.mkdtemp(prefix="crosslmm-")
