"""Checkpoints that are not what they were: a driver is killed, the newest one damaged, and the same command goes on."""

from collections.abc import Callable

from benchmarks.faults.lab import Attempt, Lab, Lost, fault
from benchmarks.faults.processes import kill_driver
from crosslmm import storage
from crosslmm.train import checkpoint_store
from crosslmm.train.checkpoint_store import Checkpoint


def _damaged(
    lab: Lab, name: str, damage: Callable[[Checkpoint], None], said: str | None
) -> tuple[list[Attempt], float]:
    """Damage the newest checkpoint; the run goes on from the one before, and says why."""
    run, at = kill_driver(lab, name)
    newest, before, *_ = checkpoint_store.list_sealed(lab.folder_of(name))
    damage(newest)
    second = lab.start(name).ended()
    missing = [words for words in (said, f"resumed after step {before.step}") if words and words not in second.text]
    if missing:
        raise Lost(f"it does not say {missing}:\n{second.text}")
    return [run, second], at


def _shard(found: Checkpoint) -> str:
    return f"{found.uri}/__0_0.distcp"


@fault("latest checkpoint truncated")
def truncated(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """By a few bytes."""

    def cut(found: Checkpoint) -> None:
        storage.write_bytes(_shard(found), storage.read_bytes(_shard(found))[:-7])

    return _damaged(lab, name, cut, "is damaged")


@fault("latest checkpoint with one bit turned")
def bit_flipped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """In the middle of the weights."""

    def flip(found: Checkpoint) -> None:
        data = bytearray(storage.read_bytes(_shard(found)))
        data[len(data) // 2] ^= 1
        storage.write_bytes(_shard(found), bytes(data))

    return _damaged(lab, name, flip, "is damaged")


@fault("latest checkpoint emptied")
def emptied(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Its files are there, without a byte."""

    def empty(found: Checkpoint) -> None:
        for file in storage.names_in(found.uri):
            storage.write_bytes(f"{found.uri}/{file}", b"")

    return _damaged(lab, name, empty, "cannot be read")


@fault("latest checkpoint's folder removed")
def removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """As if it had never been."""
    return _damaged(lab, name, lambda found: storage.remove_folder(found.uri), None)


@fault("snapshot truncated")
def snapshot(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Ray Train's list of checkpoints, wherever it could look for it."""
    run, at = kill_driver(lab, name)
    folder = lab.folder_of(name)
    places = {file.rsplit("/", 1)[0] for file in storage.names_in(folder) if file.startswith("ray/")}
    for place in (folder, *(f"{folder}/{place}" for place in places)):
        storage.write_bytes(f"{place}/checkpoint_manager_snapshot.json", b'{"checkpoint_results": [{"chec')
    return [run, lab.start(name).ended()], at
