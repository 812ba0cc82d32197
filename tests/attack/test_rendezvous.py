"""Strangers at the rendezvous of a training group: where it listens, and what a stranger who gets in can do."""

import os
import pickle
import socket
import stat
import tempfile
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from crosslmm.ray_runtime import free_port
from crosslmm.train.distributed.collectives import gather_json
from crosslmm.train.distributed.rendezvous import LOOPBACK, Rendezvous, interface_of

pytestmark = pytest.mark.attack

TIMEOUT = timedelta(seconds=30)


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def listening() -> set[str]:
    """Return the addresses on which this process listens."""
    connections = psutil.Process().net_connections("inet")
    return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}


def attend(rank: int, rendezvous: Rendezvous, folder: Path) -> None:
    """Join as an honest rank, exchange values, and write down where this process listens."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    rendezvous.join(rank, "gloo", TIMEOUT)
    dist.new_group(backend="gloo")
    values = gather_json({"rank": rank})
    (folder / f"rank-{rank}").write_text(f"{values} {sorted(listening())}")
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_on_one_machine_meet_at_a_private_file_and_listen_on_loopback(tmp_path):
    private = Path(tempfile.mkdtemp(prefix="crosslmm-"))
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    rendezvous = Rendezvous(str(private / "store"), 0, (LOOPBACK, LOOPBACK))
    torch.multiprocessing.spawn(attend, (rendezvous, tmp_path), nprocs=2)
    expected = f"{[{'rank': 0}, {'rank': 1}]} ['127.0.0.1']"
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [expected, expected]


def test_ranks_on_several_machines_listen_on_their_own_address_only(tmp_path):
    address = next((a for a in addresses_of_this_machine() if a != LOOPBACK), LOOPBACK)
    rendezvous = Rendezvous(None, free_port(), (address, address))
    torch.multiprocessing.spawn(attend, (rendezvous, tmp_path), nprocs=2)
    expected = f"{[{'rank': 0}, {'rank': 1}]} {[address]}"
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)] == [expected, expected]


def addresses_of_this_machine() -> list[str]:
    all_addresses = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    return [a.address for a in all_addresses if a.family == socket.AF_INET]


def victim(rendezvous: Rendezvous, folder: Path) -> None:
    rendezvous.join(0, "gloo", TIMEOUT)
    try:
        gather_json("plain")
        outcome = "nothing happened"
    except ValueError as error:
        outcome = type(error).__name__
    (folder / "outcome").write_text(outcome)
    os._exit(0)


def stranger(rendezvous: Rendezvous, folder: Path) -> None:
    """Take the place of rank 1, and answer the collective with a pickle."""
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(LOOPBACK)
    store = dist.TCPStore(rendezvous.addresses[0], rendezvous.port, 2, False, TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=1, world_size=2, timeout=TIMEOUT)
    payload = torch.frombuffer(bytearray(pickle.dumps(Evil(folder / "mark"))), dtype=torch.uint8)
    sizes = torch.empty(2, dtype=torch.int64)
    dist.all_gather_single(sizes, torch.tensor([len(payload)]))
    padded = torch.zeros(int(sizes.max()), dtype=torch.uint8)
    padded[: len(payload)] = payload
    dist.all_gather_single(torch.empty(2, len(padded), dtype=torch.uint8), padded[None])
    os._exit(0)


def take_part(rank: int, rendezvous: Rendezvous, folder: Path) -> None:
    (stranger if rank else victim)(rendezvous, folder)


def test_a_pickle_from_a_stranger_in_the_place_of_a_rank_is_not_unpickled(tmp_path):
    torch.multiprocessing.spawn(take_part, (Rendezvous(None, free_port(), (LOOPBACK, LOOPBACK)), tmp_path), nprocs=2)
    assert (tmp_path / "outcome").read_text() in {"JSONDecodeError", "UnicodeDecodeError"}
    assert not (tmp_path / "mark").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()  # the trap was one


def test_an_address_that_no_interface_has_is_named():
    with pytest.raises(RuntimeError, match=r"no network interface .* 203\.0\.113\.7"):
        interface_of("203.0.113.7")
    assert socket.if_nametoindex(interface_of(LOOPBACK))
