"""Sealed checkpoints in a run's storage: list, seal, verify, prune, repair. Imports neither torch nor the model.

    runs/NAME/step-00000200-3f9c21aa/
        rank-00000.safetensors, rank-00001.safetensors, index.json    weights, optimizer (`shards`)
        config.yaml                                                   the full configuration
        base.json                                                     of adapters: the model that they belong to
        seal.json                                                     step, size and sha256 of each file above

The seal is written last. A folder without one is not a checkpoint.
"""

import errno
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from crosslmm import storage
from crosslmm.config import BadConfig, TrainConfig
from crosslmm.progress import Progress
from crosslmm.run_folder import (
    BROKEN_SEAL_FILE,
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    RAY_SNAPSHOT_FILE,
    RUN_FILE,
    SEAL_FILE,
)
from crosslmm.text import one_printable_line

log = logging.getLogger(__name__)

RUN_FILES = {RUN_FILE, CONFIG_FILE, RAY_SNAPSHOT_FILE}
"""Files that identify a run's folder before its first checkpoint."""
FORMAT = 2
"""Version of the files' format, in every seal. Seals of version 1, which was PyTorch's with its pickles, lack it."""
BAD_FILE_ERRNOS = {errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors that concern one file; all others (no space, no permission) do not mean that a checkpoint is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint in storage; only `verify` tells whether its files are intact."""

    uri: str
    step: int
    """Optimizer steps done. With the run's sample order it says which samples were consumed."""
    world_size: int
    """Number of ranks that wrote it."""
    sealed_at: float
    """Unix time [s]."""
    metrics: dict[str, float]
    """Metrics of the last validation before it."""
    files: dict[str, tuple[int, str]]
    """Size [bytes] and sha256 (hex) by file name."""

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Checkpoint":
        """Return the checkpoint that `asdict` made into plain data.

        Raises:
            ValueError: the data is not a checkpoint's.
        """
        return _CHECKPOINT.validate_python(fields)

    @property
    def size(self) -> int:
        """Size of all files [bytes]."""
        return sum(size for size, _ in self.files.values())


_CHECKPOINT = TypeAdapter(Checkpoint)


def list_sealed(run: str) -> list[Checkpoint]:
    """Return the sealed checkpoints of a run, newest first. Folders with an unreadable seal are not among them.

    Args:
        run: folder of the run, path or URI.

    Raises:
        BadConfig: a checkpoint was written by a version of this package that had another format.
    """
    checkpoints = []
    for name, files in _list_folders(run).items():
        uri = storage.join(run, name)
        if SEAL_FILE in files:
            try:
                version, checkpoint = _read_seal(uri)
            except (FileNotFoundError, ValueError):
                continue
            if version != FORMAT:
                raise BadConfig(
                    f"{uri}: its format is version {version}, and this version of crosslmm reads {FORMAT}; continue "
                    "the run with the version that began it, or start it again under another --name"
                )
            checkpoints.append(checkpoint)
    return sorted(checkpoints, key=lambda c: (c.step, c.sealed_at), reverse=True)


def _read_seal(uri: str) -> tuple[int, Checkpoint]:
    """Read the seal of a checkpoint; return the version of its format with it.

    Raises:
        FileNotFoundError: it was removed.
        ValueError: it is damaged, or names files outside of the checkpoint.
    """
    seal = _read_json(uri, SEAL_FILE)
    if not isinstance(seal, dict):
        raise ValueError(f"{SEAL_FILE} is not an object")
    checkpoint = Checkpoint.from_fields(seal | {"uri": uri})
    for name in checkpoint.files:
        storage.join(uri, name)
        if name != one_printable_line(name):
            raise ValueError(f"{name!a} is not a name of a checkpoint's file")
    version = seal.get("format", 1)
    if not isinstance(version, int):
        raise ValueError(f"{version!a} is not a version of a format")
    return version, checkpoint


def _read_json(uri: str, name: str) -> Any:
    try:
        return storage.read_json(storage.safe_join(uri, name))
    except OSError as error:
        if error.errno not in BAD_FILE_ERRNOS:
            raise
        raise ValueError(f"{name} cannot be read: {error.strerror}") from None


def list_unsealed(run: str, sealed: list[Checkpoint]) -> list[str]:
    """Return the URIs of checkpoint folders that are not in `sealed`: unfinished ones, and those with a broken seal."""
    trusted = {checkpoint.uri for checkpoint in sealed}
    return [uri for name in _list_folders(run) if (uri := storage.join(run, name)) not in trusted]


def _list_folders(run: str) -> dict[str, set[str]]:
    """Return the names of a run's checkpoint folders, and of the files in each."""
    # A checkpoint whose writer was killed before the first file is a folder too.
    folders: dict[str, set[str]] = {
        name: set() for name in storage.folders_in(run) if CHECKPOINT_FOLDER.fullmatch(name)
    }
    for name in storage.names_in(run) if folders else []:
        folder, _, file = name.partition("/")
        if folder in folders:
            folders[folder].add(file)
    return folders


def unsealed_reason(uri: str) -> str | None:
    """Return why a folder of `list_unsealed` is not trusted; None if it was never finished."""
    if storage.exists(storage.join(uri, SEAL_FILE)):
        return f"its {SEAL_FILE} cannot be read"
    try:
        return one_printable_line(str(_read_json(uri, BROKEN_SEAL_FILE)["damage"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        return f"its {BROKEN_SEAL_FILE} cannot be read"


def latest_step(run: str) -> int:
    """Return the number of steps in the newest sealed checkpoint; 0 without one."""
    return max((checkpoint.step for checkpoint in list_sealed(run)), default=0)


def best_first(checkpoints: list[Checkpoint], metric: str | None) -> list[Checkpoint]:
    """Sort checkpoints that have the metric, best first: a loss is best when lowest, anything else when highest."""
    rated = [checkpoint for checkpoint in checkpoints if metric and metric in checkpoint.metrics]
    sign = -1 if metric and metric.endswith("loss") else 1
    return sorted(rated, key=lambda c: sign * c.metrics[str(metric)], reverse=True)


def verify_file(checkpoint: Checkpoint, name: str) -> str | None:
    """Read one file of a checkpoint and compare size and sha256 with the seal.

    Args:
        checkpoint: from `list_sealed`.
        name: name of the file.

    Returns:
        What is wrong with the file; None if it is intact.

    Raises:
        storage.Unavailable: the store does not answer.
    """
    expected_size, expected_digest = checkpoint.files[name]
    try:
        with storage.open_read(storage.safe_join(checkpoint.uri, name)) as file:
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
            size = file.tell()
    except storage.BadLocation as error:
        return str(error)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if error.errno not in BAD_FILE_ERRNOS:
            raise
        return f"{name} cannot be read: {error.strerror}"
    if size != expected_size:
        return f"{name} has {size} bytes instead of {expected_size}"
    return None if digest.hexdigest() == expected_digest else f"{name} is not what was written (sha256)"


def verify(checkpoint: Checkpoint) -> list[str]:
    """Read all files of a checkpoint, with a progress display; return what is wrong with them. See `verify_file`."""
    damage = []
    with Progress(log, f"reading step {checkpoint.step}", len(checkpoint.files), "file") as progress:
        for count, name in enumerate(sorted(checkpoint.files), start=1):
            if reason := verify_file(checkpoint, name):
                damage.append(reason)
            progress.update(count)
    return damage


def write_seal(checkpoint: Checkpoint) -> None:
    """Write the seal that makes a folder a checkpoint. All its files are in storage already."""
    seal = {"format": FORMAT, **asdict(checkpoint)}
    del seal["uri"]
    storage.write_bytes(storage.join(checkpoint.uri, SEAL_FILE), json.dumps(seal).encode())


def break_seal(checkpoint: Checkpoint, reason: str) -> None:
    """Mark a damaged checkpoint as untrusted. It is removed when the next checkpoint is sealed."""
    broken = json.dumps(asdict(checkpoint) | {"damage": reason})
    storage.write_bytes(storage.join(checkpoint.uri, BROKEN_SEAL_FILE), broken.encode())
    storage.remove([storage.join(checkpoint.uri, SEAL_FILE)])


def remove(uri: str) -> None:
    """Remove a checkpoint. The seal goes first, so that a partly removed checkpoint is never trusted. Of a link in the
    folder, the link alone is removed."""
    if storage.exists(storage.join(uri, SEAL_FILE)):
        storage.remove([storage.join(uri, SEAL_FILE)])
    storage.remove_folder(uri)


def prune(run: str, train: TrainConfig) -> None:
    """Remove all unsealed checkpoints, and the sealed ones except the newest `keep_checkpoints` and the best one."""
    sealed = list_sealed(run)
    retained = sealed[: train.keep_checkpoints] + best_first(sealed, train.keep_best)[:1]
    superfluous = [checkpoint.uri for checkpoint in sealed if checkpoint not in retained]
    for uri in superfluous + list_unsealed(run, sealed):
        remove(uri)


def repair(run: str) -> Iterator[str]:
    """Break the seals of damaged checkpoints; remove unfinished checkpoints and Ray Train's snapshots.

    Only for a run that is not running: a checkpoint that is being written counts as unfinished.

    Yields:
        A line about each action, before the action; at the end, a line that says where a restart would resume.
    """
    for checkpoint in list_sealed(run):
        if damage := verify(checkpoint):
            yield f"{checkpoint.uri} is damaged: {'; '.join(damage)}; breaking its seal"
            break_seal(checkpoint, "; ".join(damage))
    intact = list_sealed(run)
    for uri in list_unsealed(run, intact):
        reason = unsealed_reason(uri)
        if reason is None:
            yield f"{uri} was never finished; it is removed"
            remove(uri)
        else:
            yield f"{uri} stays until the next checkpoint is sealed, and is not used: {reason}"
    for name in storage.names_in(run, roots=[]):
        if Path(name).name == RAY_SNAPSHOT_FILE:
            uri = storage.join(run, name)
            yield f"{uri} is removed; nothing reads it"
            storage.remove([uri])
    yield f"the run will resume from {f'step {intact[0].step}' if intact else 'the beginning'}"


def select(run: str, step: int | None = None) -> list[Checkpoint]:
    """Return a run's sealed checkpoints, newest first: all, or those of one step (two if a restart repeated the step).

    Raises:
        BadConfig: there are none.
    """
    sealed = list_sealed(run)
    if not sealed:
        raise no_checkpoint(run)
    selected = [checkpoint for checkpoint in sealed if step in (None, checkpoint.step)]
    if not selected:
        steps = ", ".join(str(number) for number in sorted({checkpoint.step for checkpoint in sealed}))
        raise BadConfig(f"--step {step}: {run} has no such checkpoint; it has {steps}")
    return selected


def no_checkpoint(run: str) -> BadConfig:
    """Return the error about a run that has no checkpoint yet."""
    return BadConfig(f"{run}: has no checkpoint; the run starts from the beginning when it is started again")


def require_run_folder(run: str) -> None:
    """Raise BadConfig unless `run` is the folder of one run; `repair` removes files in it."""
    is_run = any(storage.exists(storage.join(run, name)) for name in RUN_FILES)
    if not is_run and not any(CHECKPOINT_FOLDER.fullmatch(name) for name in storage.folders_in(run)):
        raise BadConfig(f"{run}: no such run; give a run's folder, which is --storage/--name of its training")
