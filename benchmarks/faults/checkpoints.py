"""Damaged checkpoints: the driver is killed, its newest checkpoint damaged, and the command repeated."""

from collections.abc import Callable

from benchmarks.faults.lab import Attempt, Lab, NotSurvived, fault
from benchmarks.faults.processes import kill_driver
from crosslmm import storage
from crosslmm.train.checkpoint import seals
from crosslmm.train.checkpoint.seals import Checkpoint


def _damaged(
    lab: Lab, name: str, damage: Callable[[Checkpoint], None], message: str | None
) -> tuple[list[Attempt], float]:
    """Damage the newest checkpoint; the run must log `message` and resume from the previous one."""
    run = lab.start_until_checkpoint(name)
    at = kill_driver(lab, run)
    newest, previous, *_ = seals.list_sealed(lab.folder_of(name))
    damage(newest)
    second = lab.start(name).wait()
    missing = [
        words for words in (message, f"resumed after step {previous.step}") if words and words not in second.text
    ]
    if missing:
        raise NotSurvived(f"the output lacks {missing}:\n{second.text}")
    return [run, second], at


def _shard(checkpoint: Checkpoint) -> str:
    """Return the URI of the first rank's shard."""
    return f"{checkpoint.uri}/rank-00000.safetensors"


@fault("latest checkpoint truncated")
def truncated(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Cut off a few bytes."""

    def cut(checkpoint: Checkpoint) -> None:
        storage.write_bytes(_shard(checkpoint), storage.read_bytes(_shard(checkpoint))[:-7])

    return _damaged(lab, name, cut, "is damaged")


@fault("latest checkpoint with one bit flipped")
def bit_flipped(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Flip a bit in the middle of the weights."""

    def flip(checkpoint: Checkpoint) -> None:
        data = bytearray(storage.read_bytes(_shard(checkpoint)))
        data[len(data) // 2] ^= 1
        storage.write_bytes(_shard(checkpoint), bytes(data))

    return _damaged(lab, name, flip, "is damaged")


@fault("latest checkpoint emptied")
def emptied(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Empty all files."""

    def empty(checkpoint: Checkpoint) -> None:
        for file in storage.names_in(checkpoint.uri):
            storage.write_bytes(f"{checkpoint.uri}/{file}", b"")

    return _damaged(lab, name, empty, "cannot be read")


@fault("latest checkpoint's folder removed")
def removed(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Remove the folder."""
    return _damaged(lab, name, lambda checkpoint: storage.remove_folder(checkpoint.uri), None)


@fault("snapshot truncated")
def snapshot(lab: Lab, name: str) -> tuple[list[Attempt], float]:
    """Truncate Ray Train's list of checkpoints, wherever Ray Train could look for it."""
    run = lab.start_until_checkpoint(name)
    at = kill_driver(lab, run)
    folder = lab.folder_of(name)
    subfolders = {file.rsplit("/", 1)[0] for file in storage.names_in(folder) if file.startswith("ray/")}
    for place in (folder, *(f"{folder}/{name}" for name in subfolders)):
        storage.write_bytes(f"{place}/checkpoint_manager_snapshot.json", b'{"checkpoint_results": [{"chec')
    return [run, lab.start(name).wait()], at
