"""Checkpoints: copied out of memory while training waits, written while it goes on, sealed last, trusted only if whole.

    runs/NAME/step-00000200-3f9c/
        __0_0.distcp, __1_0.distcp, .metadata    torch.distributed.checkpoint: weights, optimizer, random states
        config.yaml                              the full configuration
        seal.json                                step, size and sha256 of each file above; none without it is trusted

DCP itself loads a file with turned bits without a word, and its `.metadata` is a pickle: it is read from the run's own
folder alone, and only behind a seal.
"""

import errno
import hashlib
import itertools
import json
import re
import shutil
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig, to_yaml, validate_run
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model, build_processor

SEAL, BROKEN_SEAL, CONFIG = "seal.json", "broken-seal.json", "config.yaml"
NAME = re.compile(r"step-\d{8}-\w+")
BAD_FILE = {errno.EIO, errno.EISDIR, errno.ENOTDIR}
"""What a disk says of one file that it cannot read; all else (no space, no permission) is no fault of a checkpoint."""

Tell = Callable[[str], None]
"""Takes one line for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """A sealed checkpoint in storage; whether it is whole, only its bytes tell."""

    uri: str
    step: int
    """Optimizer steps that were done; with the run's order this says which samples were consumed."""
    world_size: int
    """Ranks that wrote it."""
    sealed_at: float
    """Unix time [s]."""
    metrics: dict[str, float]
    """Of the last validation before it."""
    files: dict[str, tuple[int, str]]
    """Size [bytes] and sha256 (hex) of each."""

    @property
    def size(self) -> int:
        """Of all files [bytes]."""
        return sum(size for size, _ in self.files.values())


def sealed(run: str) -> list[Checkpoint]:
    """The sealed checkpoints in a run's folder, newest first. A seal that cannot be read seals nothing."""
    found = []
    for name, files in _folders(run).items():
        uri = storage.join(run, name)
        if SEAL in files:
            try:
                said = json.loads(storage.read_bytes(storage.join(uri, SEAL)))
                said["files"] = {file: (int(size), str(digest)) for file, (size, digest) in said["files"].items()}
                found.append(Checkpoint(uri=uri, **said))
            except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
                continue
    return sorted(found, key=lambda c: (c.step, c.sealed_at), reverse=True)


def unsealed(run: str, found: list[Checkpoint]) -> list[str]:
    """Folders of checkpoints that were never finished, or whose seal was broken: all but those of `found`."""
    good = {checkpoint.uri for checkpoint in found}
    return [uri for name in _folders(run) if (uri := storage.join(run, name)) not in good]


def _folders(run: str) -> dict[str, set[str]]:
    """Names of a run's checkpoint folders, and of the files in each."""
    # One that was killed before its first file is a folder too.
    folders: dict[str, set[str]] = {name: set() for name in storage.folders_in(run) if NAME.fullmatch(name)}
    for name in storage.names_in(run) if folders else []:
        folder, _, file = name.partition("/")
        if folder in folders:
            folders[folder].add(file)
    return folders


def why_unsealed(uri: str) -> str | None:
    """Why one of `unsealed` counts as none; None if it was never finished."""
    if storage.exists(storage.join(uri, SEAL)):
        return f"its {SEAL} cannot be read"
    try:
        return str(json.loads(storage.read_bytes(storage.join(uri, BROKEN_SEAL)))["damage"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        return f"its {BROKEN_SEAL} cannot be read"


def damage(checkpoint: Checkpoint, name: str, copy_to: Path | None = None) -> str | None:
    """What is wrong with one file of a checkpoint, read whole and copied on the way; None if it is as it was sealed.

    Raises:
        storage.Unavailable: the whole store is.
    """
    size, digest = checkpoint.files[name]
    uri = storage.join(checkpoint.uri, name)
    try:
        if copy_to is None:
            with storage.open_read(uri) as file:
                found = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
                length = file.tell()
        else:
            storage.download_file(uri, str(copy_to / name))
            with (copy_to / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256")
                length = file.tell()
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if error.errno not in BAD_FILE:
            raise
        return f"{name} cannot be read: {error.strerror}"
    if length != size:
        return f"{name} has {length} bytes instead of {size}"
    return None if found.hexdigest() == digest else f"{name} is not what was written (sha256)"


def break_seal(checkpoint: Checkpoint, reason: str) -> None:
    """Let a damaged checkpoint count as none; it stays until the next good one is sealed."""
    said = json.dumps(asdict(checkpoint) | {"damage": reason})
    storage.write_bytes(storage.join(checkpoint.uri, BROKEN_SEAL), said.encode())
    storage.remove([storage.join(checkpoint.uri, SEAL)])


def remove(uri: str) -> None:
    """Remove a checkpoint, the seal first: half of it is none."""
    names = storage.names_in(uri)
    storage.remove([storage.join(uri, name) for name in sorted(names, key=lambda name: name != SEAL)])
    storage.remove_folder(uri)


@contextmanager
def newest(run: str, group: dist.ProcessGroup, tell: Tell) -> Iterator[tuple[Checkpoint, Path] | None]:
    """The newest checkpoint that is whole, and a local folder with its files while the context lasts; None without one.

    All ranks call it and get the same. Of a remote checkpoint each node makes one copy, to which its ranks contribute.
    A damaged one is told, and the one before it is taken.

    Args:
        run: the run's folder.
        group: a gloo group of all ranks.
        tell: takes what is wrong with a damaged one; on rank 0.
    """
    rank = dist.get_rank()
    everybody: list[Any] = [None]
    if rank == 0:
        everybody = [sealed(run)]
        for uri in unsealed(run, everybody[0]):
            tell(f"checkpoint {uri} is left out: {why_unsealed(uri) or 'it was never finished'}")
    dist.broadcast_object_list(everybody, src=0, group=group)
    hosts = _gather(socket.gethostname(), group)
    peers = [peer for peer, host in enumerate(hosts) if host == hosts[rank]]
    if rank == peers[0]:  # what a killed worker left
        shutil.rmtree(_scratch(run), ignore_errors=True)
    dist.barrier(group)
    for checkpoint in everybody[0]:
        remote = storage.scheme_of(checkpoint.uri) == "s3"
        folder = _scratch(run) / Path(checkpoint.uri).name if remote else Path(storage.local_path(checkpoint.uri))
        if remote:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            mine = sorted(checkpoint.files)[peers.index(rank) :: len(peers)]
            found = [damage(checkpoint, name, folder if remote else None) for name in mine]
            wrong = [reason for reasons in _gather(found, group) for reason in reasons if reason]
            if not wrong:
                yield checkpoint, folder
                dist.barrier(group)  # a peer may still read
                return
        finally:
            if remote and rank == peers[0]:
                shutil.rmtree(folder, ignore_errors=True)
        if rank == 0:
            reason = "; ".join(dict.fromkeys(wrong))
            tell(f"checkpoint {checkpoint.uri} is damaged: {reason}; the one before it is taken")
            break_seal(checkpoint, reason)
    yield None


def load(
    folder: Path, checkpoint: Checkpoint, model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer
) -> None:
    """Read a checkpoint of any number of ranks into the model and optimizer; random states where the ranks are as many.

    Args:
        folder: local copy of its files.
        checkpoint: its seal.
        model, optimizer: as they were saved, sharded over any number of ranks.
    """
    state = _state(model, optimizer)
    if checkpoint.world_size != dist.get_world_size():
        del state["random"]
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for device, numbers in state.get("random", {}).get(str(dist.get_rank()), {}).items():
        torch.set_rng_state(numbers) if device == "cpu" else torch.cuda.set_rng_state(numbers)


def _state(model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds. The schedule is a function of the step, and so are the samples."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    numbers = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).device.type == "cuda":
        numbers["cuda"] = torch.cuda.get_rng_state()
    return {"model": model_state, "optimizer": optimizer_state, "random": {str(dist.get_rank()): numbers}}


class Saver:
    """Takes the checkpoints of one start of the workers. Training waits for the copy out of its memory alone, and for
    the checkpoint before, should that still be on its way.

    All ranks save at the same steps. What goes wrong in writing is told and costs that checkpoint, not the run: the
    next one is tried again.

    Args:
        run: the run's folder.
        config: goes into each checkpoint, and says how many are kept.
        attempt: differs for each start, so that nothing is ever written over what an earlier one left.
        group: a gloo group of all ranks, that nobody else uses.
        tell: takes news; on rank 0.
    """

    def __init__(self, run: str, config: RunConfig, attempt: str, group: dist.ProcessGroup, tell: Tell) -> None:
        self.run, self.config, self.attempt, self.group, self.tell = run, config, attempt, group, tell
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._unsealed: list[str] = []

    def save(
        self,
        step: int,
        model: CrossLMMForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, float],
        history: list[str],
    ) -> None:
        """Begin a checkpoint.

        Args:
            step: optimizer steps done.
            model, optimizer: what is copied.
            metrics: of the last validation.
            history: on rank 0, the lines of the steps since the last call, which are in storage before the seal is.
        """
        self.wait()
        state: Any = self._stager.stage(_state(model, optimizer))
        self._unsealed += history
        self._pending = self._thread.submit(self._write, step, state, dict(metrics))

    def wait(self) -> None:
        """Return when no checkpoint is on its way."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait, and let go of the copy."""
        self.wait()
        self._thread.shutdown()
        self._stager.close()

    def _write(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        uri = storage.join(self.run, f"step-{step:08d}-{self.attempt}")
        remote = storage.scheme_of(uri) == "s3"
        folder = (_scratch(self.run) if remote else Path(storage.local_path(self.run))) / Path(uri).name
        try:
            self._together(lambda: folder.mkdir(parents=True, exist_ok=True))
            files = self._together(lambda: self._write_files(folder, uri if remote else None, state))
            if dist.get_rank() == 0:
                whole = {name: entry for mine in files for name, entry in mine.items()}
                self._seal(Checkpoint(uri, step, dist.get_world_size(), time.time(), metrics, whole))
                self._retain()
        except OSError as error:
            if dist.get_rank() == 0:
                self.tell(f"checkpoint after step {step} was not saved: {error}; the next one is tried again")
        finally:
            if remote:
                shutil.rmtree(folder, ignore_errors=True)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Every rank's result.

        Raises:
            OSError: on all ranks, if one failed: no space, no store.
        """
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            failure = _last_line(error)
        everyone = _gather((result, failure), self.group)
        for _, said in everyone:
            if said:
                raise OSError(said)
        return [result for result, _ in everyone]

    def _write_files(self, folder: Path, uri: str | None, state: dict[str, Any]) -> dict[str, tuple[int, str]]:
        """Write this rank's files to the folder, and from there to the store -> their entries in the seal."""
        state_dict_saver.save(state, checkpoint_id=folder, process_group=self.group)
        rank = dist.get_rank()
        mine = list(folder.glob(f"__{rank}_*"))
        if rank == 0:
            (folder / CONFIG).write_text(to_yaml(self.config))
            mine += [folder / CONFIG, folder / ".metadata"]
        files = {}
        for path in mine:
            with path.open("rb") as file:
                files[path.name] = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
            if uri:
                storage.upload_file(str(path), storage.join(uri, path.name))
        return files

    def _seal(self, checkpoint: Checkpoint) -> None:
        """What makes it a checkpoint; and what it makes superfluous goes."""
        if self._unsealed:
            history = f"history/step-{checkpoint.step:08d}.jsonl"
            storage.write_bytes(storage.join(self.run, history), "".join(self._unsealed).encode())
        said = asdict(checkpoint)
        del said["uri"]
        storage.write_bytes(storage.join(checkpoint.uri, SEAL), json.dumps(said).encode())
        self._unsealed = []

    def _retain(self) -> None:
        """Keep the newest and the best; remove the others, and what was left unfinished."""
        train = self.config.train
        try:
            found = sealed(self.run)
            kept = found[: train.keep_checkpoints] + best(found, train.keep_best)[:1]
            superfluous = [checkpoint.uri for checkpoint in found if checkpoint not in kept]
            for uri in superfluous + unsealed(self.run, found):
                remove(uri)
        except OSError as error:
            self.tell(f"checkpoints that are not needed any more were not removed: {error}")


def best(found: list[Checkpoint], metric: str | None) -> list[Checkpoint]:
    """Those that know the metric, the best one first: the lowest of a loss, the highest of anything else."""
    known = [checkpoint for checkpoint in found if metric and metric in checkpoint.metrics]
    sign = -1 if metric and metric.endswith("loss") else 1
    return sorted(known, key=lambda c: sign * c.metrics[str(metric)], reverse=True)


def export(folder: Path, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> None:
    """Gather all shards and write one `from_pretrained` folder on rank 0; all ranks call it."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        # Gathered, tied weights are two copies; the second one's name is no parameter's.
        own = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
        model.save_pretrained(folder, state_dict={name: value for name, value in whole.items() if name in own})
        processor.save_pretrained(folder)


def export_alone(folder: Path, to: Path) -> None:
    """What `export` makes of a run, made of a checkpoint's files in one CPU process without a group, however many ranks
    wrote them.

    Args:
        folder: local folder of the checkpoint.
        to: gets the `from_pretrained` folder.

    Raises:
        BadConfig: its configuration is not one that this version builds, or its weights fit another model.
    """
    config = validate_run(yaml.safe_load((folder / CONFIG).read_text()))
    # Flash attention is a matter of the machine that trained.
    shape = config.model.model_copy(update={"attention": "sdpa"})
    processor = build_processor(shape)
    # What no state dict holds (rotary frequencies) is made anew, so the weights are built, and then read over.
    model = build_model(shape, processor, config.seed, weights=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant
            state_dict_loader.load({"model": model.state_dict()}, checkpoint_id=folder, no_dist=True)
    except CheckpointException as error:
        raise BadConfig(f"{folder}: its weights are not those of its {CONFIG}: {_last_line(error)}") from error
    model.save_pretrained(to)
    processor.save_pretrained(to)


def _scratch(run: str) -> Path:
    """Where this machine keeps files of a run on their way to its store and from there."""
    return Path(tempfile.gettempdir()) / f"crosslmm-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _gather(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's object, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _last_line(error: BaseException) -> str:
    """DCP wraps a rank's error in its traceback, whose last line says what it was."""
    lines = str(error).strip().splitlines() or traceback.format_exception_only(error)
    return lines[-1].strip()[:300]
