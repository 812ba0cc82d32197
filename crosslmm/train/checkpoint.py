"""Save and load the state of model and optimizer with torch.distributed.checkpoint (DCP), and export the model.

Training waits only until the state is copied; a thread then writes the files and seals them. DCP loads a file with
flipped bits without an error, and its `.metadata` is a pickle, so files are read only from the run's own folder, and
only if they match their seal (`checkpoint_store`).
"""

import hashlib
import itertools
import logging
import shutil
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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
from crosslmm.run_folder import CONFIG_FILE, MODEL_CONFIG_FILE, checkpoint_folder
from crosslmm.train import checkpoint_store
from crosslmm.train.checkpoint_store import Checkpoint

log = logging.getLogger(__name__)


@contextmanager
def open_newest(run: str, group: dist.ProcessGroup) -> Iterator[tuple[Checkpoint, Path] | None]:
    """Find the newest intact checkpoint; yield it and a local folder with its files, or None if there is none.

    A collective: all ranks call it and get the same checkpoint. From remote storage, each node downloads one copy, and
    its ranks share that work; the copy is removed at the end of the context. A damaged checkpoint is reported and
    skipped, and its seal is broken.

    Args:
        run: the run's folder.
        group: a gloo group of all ranks.
    """
    rank = dist.get_rank()
    sealed = _list_on_rank_0(run, group)
    hosts = _gather(socket.gethostname(), group)
    peers = [peer for peer, host in enumerate(hosts) if host == hosts[rank]]
    if rank == peers[0]:  # remove what a killed worker left
        shutil.rmtree(_scratch(run), ignore_errors=True)
    dist.barrier(group)
    for checkpoint in sealed:
        remote = storage.scheme_of(checkpoint.uri) == "s3"
        folder = _scratch(run) / Path(checkpoint.uri).name if remote else Path(storage.local_path(checkpoint.uri))
        if remote:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            names = sorted(checkpoint.files)[peers.index(rank) :: len(peers)]
            results = [checkpoint_store.verify_file(checkpoint, name, folder if remote else None) for name in names]
            damage = [reason for reasons in _gather(results, group) for reason in reasons if reason]
            if not damage:
                yield checkpoint, folder
                dist.barrier(group)  # a peer may still read
                return
        finally:
            if remote and rank == peers[0]:
                shutil.rmtree(folder, ignore_errors=True)
        if rank == 0:
            reason = "; ".join(dict.fromkeys(damage))
            log.warning("checkpoint %s is damaged: %s; trying the one before it", checkpoint.uri, reason)
            checkpoint_store.break_seal(checkpoint, reason)
    yield None


def _list_on_rank_0(run: str, group: dist.ProcessGroup) -> list[Checkpoint]:
    """Return the sealed checkpoints as rank 0 lists them; rank 0 logs those that are skipped."""
    result: list[Any] = [None]
    if dist.get_rank() == 0:
        result = [checkpoint_store.list_sealed(run)]
        for uri in checkpoint_store.list_unsealed(run, result[0]):
            reason = checkpoint_store.unsealed_reason(uri) or "it was never finished"
            log.warning("checkpoint %s is skipped: %s", uri, reason)
    dist.broadcast_object_list(result, src=0, group=group)
    return list(result[0])


def load(
    folder: Path, checkpoint: Checkpoint, model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer
) -> None:
    """Read a checkpoint, written by any number of ranks, into model and optimizer.

    Random states are restored only if the number of ranks is still the one that wrote it.

    Args:
        folder: folder with its files on this machine.
        checkpoint: the checkpoint, as its seal describes it.
        model, optimizer: sharded over any number of ranks.
    """
    state = _state(model, optimizer)
    if checkpoint.world_size != dist.get_world_size():
        del state["random"]
    state_dict_loader.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for device, random_state in state.get("random", {}).get(str(dist.get_rank()), {}).items():
        torch.set_rng_state(random_state) if device == "cpu" else torch.cuda.set_rng_state(random_state)


def _state(model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state that a checkpoint holds. Schedule and sample order are functions of the step."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    random_states = {"cpu": torch.get_rng_state()}
    if next(model.parameters()).device.type == "cuda":
        random_states["cuda"] = torch.cuda.get_rng_state()
    return {"model": model_state, "optimizer": optimizer_state, "random": {str(dist.get_rank()): random_states}}


class Saver:
    """Writes the checkpoints of one attempt. Training waits until the state is copied, and before that for the previous
    checkpoint if it is still being written.

    All ranks save at the same steps. A failed write is logged and costs that checkpoint, not the run: the next save is
    tried as usual.

    Args:
        run: the run's folder.
        config: written into each checkpoint; says how many are kept.
        attempt: differs between starts of the workers, so that none overwrites what an earlier one left.
        group: a gloo group of all ranks that nothing else uses while checkpoints are written.
    """

    def __init__(self, run: str, config: RunConfig, attempt: str, group: dist.ProcessGroup) -> None:
        self.run, self.config, self.attempt, self.group = run, config, attempt, group
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, False))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._history: list[str] = []

    def save(
        self,
        step: int,
        model: CrossLMMForConditionalGeneration,
        optimizer: torch.optim.Optimizer,
        metrics: dict[str, float],
        history: list[str],
    ) -> None:
        """Start a checkpoint.

        Args:
            step: optimizer steps done.
            model, optimizer: state that is copied.
            metrics: metrics of the last validation.
            history: on rank 0, the history lines of the steps since the last call. They are in storage before the seal.
        """
        self.wait()
        state: Any = self._stager.stage(_state(model, optimizer))
        self._history += history
        self._pending = self._thread.submit(self._write, step, state, dict(metrics))

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait until nothing is being written, then free the memory of the copy."""
        self.wait()
        self._thread.shutdown()
        self._stager.close()

    def _write(self, step: int, state: dict[str, Any], metrics: dict[str, float]) -> None:
        """Write all files, then the seal; runs in the saver's thread."""
        uri = storage.join(self.run, checkpoint_folder(step, self.attempt))
        remote = storage.scheme_of(uri) == "s3"
        folder = (_scratch(self.run) if remote else Path(storage.local_path(self.run))) / Path(uri).name
        try:
            self._on_all_ranks(lambda: folder.mkdir(parents=True, exist_ok=True))
            files = self._on_all_ranks(lambda: self._write_files(folder, uri if remote else None, state))
            if dist.get_rank() == 0:
                all_files = {name: entry for of_rank in files for name, entry in of_rank.items()}
                self._seal(Checkpoint(uri, step, dist.get_world_size(), time.time(), metrics, all_files))
                self._retain()
        except OSError as error:
            if dist.get_rank() == 0:
                log.warning(
                    "checkpoint after step %s was not saved: %s; the next one is tried again",
                    step, error, extra={"step": step},
                )  # fmt: skip
        finally:
            if remote:
                shutil.rmtree(folder, ignore_errors=True)

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Do the work on every rank; return the results of all ranks.

        Raises:
            OSError: on all ranks, if one failed (disk full, store unreachable).
        """
        result, failure = None, None
        try:
            result = work()
        except (Exception, CheckpointException) as error:
            failure = _last_line(error)
        outcomes = _gather((result, failure), self.group)
        for _, message in outcomes:
            if message:
                raise OSError(message)
        return [result for result, _ in outcomes]

    def _write_files(self, folder: Path, uri: str | None, state: dict[str, Any]) -> dict[str, tuple[int, str]]:
        """Write this rank's files to the folder, and from there to the store; return their entries in the seal."""
        state_dict_saver.save(state, checkpoint_id=folder, process_group=self.group)
        rank = dist.get_rank()
        paths = list(folder.glob(f"__{rank}_*"))
        if rank == 0:
            (folder / CONFIG_FILE).write_text(to_yaml(self.config))
            paths += [folder / CONFIG_FILE, folder / ".metadata"]
        files = {}
        for path in paths:
            with path.open("rb") as file:
                files[path.name] = path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
            if uri:
                storage.upload_file(str(path), storage.join(uri, path.name))
        return files

    def _seal(self, checkpoint: Checkpoint) -> None:
        """Write the history of the steps up to the checkpoint, then its seal."""
        if self._history:
            history = f"history/step-{checkpoint.step:08d}.jsonl"
            storage.write_bytes(storage.join(self.run, history), "".join(self._history).encode())
        checkpoint_store.write_seal(checkpoint)
        self._history = []

    def _retain(self) -> None:
        try:
            checkpoint_store.retain(self.run, self.config.train)
        except OSError as error:
            log.warning("superfluous checkpoints were not removed: %s; the next checkpoint tries again", error)


def export(folder: Path, model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor) -> None:
    """Gather all shards and write one `from_pretrained` folder on rank 0; all ranks call it."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        # Gathering turns tied weights into two copies; the name of the second one belongs to no parameter.
        names = {name for name, _ in itertools.chain(model.named_parameters(), model.named_buffers())}
        model.save_pretrained(folder, state_dict={name: value for name, value in weights.items() if name in names})
        processor.save_pretrained(folder)


def export_sealed(checkpoint: Checkpoint, folder: str) -> list[str]:
    """Verify a checkpoint and export it, in one CPU process, however many ranks wrote it.

    Args:
        checkpoint: from `checkpoint_store`.
        folder: path or URI of an empty folder, which gets what `export` writes, and the configuration.

    Returns:
        What is damaged; empty if the model was exported.

    Raises:
        BadConfig: the configuration is not one that this version builds, or the weights belong to another model.
    """
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as copy, tempfile.TemporaryDirectory() as exported:
        remote = storage.scheme_of(checkpoint.uri) == "s3"
        files = Path(copy if remote else storage.local_path(checkpoint.uri))
        if damage := checkpoint_store.verify(checkpoint, files if remote else None):
            return damage
        _export_files(files, Path(exported))
        (Path(exported) / MODEL_CONFIG_FILE).write_bytes((files / CONFIG_FILE).read_bytes())
        storage.upload(exported, folder)
    return []


def _export_files(files: Path, folder: Path) -> None:
    """Write the `from_pretrained` folder of a checkpoint's local files, without a process group."""
    config = validate_run(yaml.safe_load((files / CONFIG_FILE).read_text()))
    # The machine that trained may have had flash attention; this one need not have it.
    model_config = config.model.model_copy(update={"attention": "sdpa"})
    processor = build_processor(model_config)
    # Buffers outside the state dict (rotary frequencies) must be computed, so the whole model is built with random
    # weights, which are then overwritten.
    model = build_model(model_config, processor, config.seed, weights=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as intended
            state_dict_loader.load({"model": model.state_dict()}, checkpoint_id=files, no_dist=True)
    except CheckpointException as error:
        raise BadConfig(f"{files}: its weights do not fit its {CONFIG_FILE}: {_last_line(error)}") from error
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _scratch(run: str) -> Path:
    """Return this machine's temporary folder for files of a run on their way to and from its store."""
    return Path(tempfile.gettempdir()) / f"crosslmm-{hashlib.sha256(run.encode()).hexdigest()[:16]}"


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the value of every rank, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _last_line(error: BaseException) -> str:
    """Return the last line of an error's text: DCP wraps a rank's error in its traceback, which ends with it."""
    lines = str(error).strip().splitlines() or traceback.format_exception_only(error)
    return lines[-1].strip()[:300]
