"""Save checkpoints. Training waits only until the state is copied; a thread then writes the files and seals them."""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from crosslmm import storage
from crosslmm.config import RunConfig, to_yaml
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.adapters.base import Base
from crosslmm.run_folder import BASE_FILE, CHECKPOINT_INDEX_FILE, CONFIG_FILE, SHARD_FILE, checkpoint_folder
from crosslmm.train.checkpoint import seals, shards
from crosslmm.train.checkpoint.seals import Checkpoint
from crosslmm.train.checkpoint.shards import Part
from crosslmm.train.checkpoint.state import State, state_of
from crosslmm.train.distributed.collectives import gather_json
from crosslmm.train.distributed.parallel import saved_rows

log = logging.getLogger(__name__)


class _Staging:
    """Copies a state to CPU memory, pinned where there is a GPU; the next copy takes the same memory."""

    def __init__(self) -> None:
        self._buffers: State = {}

    def copy(self, state: State) -> dict[str, Part]:
        """Return this rank's parts of all tensors, which change at the next call only."""
        parts = {}
        for name, tensor in state.items():
            sharded = isinstance(tensor, DTensor)
            if not sharded and dist.get_rank():
                continue  # rank 0 writes it
            rows, first = saved_rows(tensor) if isinstance(tensor, DTensor) else (tensor, 0)
            if name not in self._buffers:
                pinned = rows.device.type == "cuda"
                self._buffers[name] = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=pinned)
            self._buffers[name].copy_(rows, non_blocking=True)
            parts[name] = Part(self._buffers[name], first, tuple(tensor.shape), sharded)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return parts


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
        base: on rank 0, the model that the adapters belong to; None without adapters.
        sealed: called on rank 0, in the saver's thread, with step and unix time [s] of each finished checkpoint.
        require_owner: raises an error if the folder has another owner; rank 0 calls it before it seals.
    """

    def __init__(
        self,
        run: str,
        config: RunConfig,
        attempt: str,
        group: dist.ProcessGroup,
        base: Base | None = None,
        sealed: Callable[[int, float], None] = lambda step, when: None,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self.config, self.attempt, self.group, self.base = run, config, attempt, group, base
        self.sealed, self.require_owner = sealed, require_owner
        self._staging = _Staging()
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
        parts = self._staging.copy(state_of(model, optimizer))
        self._history += history
        self._pending = self._thread.submit(self._write, step, parts, dict(metrics))

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        if self._pending:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait until nothing is being written, then free the memory of the copy."""
        self.wait()
        self._thread.shutdown()
        self._staging = _Staging()

    def _write(self, step: int, parts: dict[str, Part], metrics: dict[str, float]) -> None:
        """Write all files, then the seal; runs in the saver's thread."""
        uri = storage.join(self.run, checkpoint_folder(step, self.attempt))
        rank = dist.get_rank()
        # Rank 0 may still be removing what the last seal made superfluous. That includes all unsealed folders, and this
        # checkpoint's would be one of them.
        dist.barrier(self.group)
        try:
            written = self._on_all_ranks(lambda: self._write_shard(uri, rank, parts))
            if rank == 0:
                files = {SHARD_FILE.format(of): entry for of, (entry, _) in enumerate(written)}
                files[CHECKPOINT_INDEX_FILE] = shards.write_index(
                    uri, [shards.index_from_json(index) for _, index in written]
                )
                files[CONFIG_FILE] = _write_small(uri, CONFIG_FILE, to_yaml(self.config).encode())
                if self.base:
                    files[BASE_FILE] = _write_small(uri, BASE_FILE, self.base.to_json())
                self._seal(Checkpoint(uri, step, dist.get_world_size(), time.time(), metrics, files))
                self._prune()
        except OSError as error:
            if rank == 0:
                log.warning(
                    "checkpoint after step %s was not saved: %s; training goes on, and the next one is saved as usual",
                    step, error, extra={"step": step},
                )  # fmt: skip

    def _on_all_ranks(self, work: Callable[[], Any]) -> list[Any]:
        """Do the work on every rank; return the results of all ranks as JSON represents them.

        Raises:
            OSError: on all ranks, if one failed (disk full, store unreachable).
        """
        result, failure = None, None
        try:
            result = work()
        except Exception as error:
            failure = " ".join(str(error).split())[:300] or type(error).__name__
        outcomes = gather_json((result, failure), self.group)
        for _, message in outcomes:
            if message:
                raise OSError(message)
        return [result for result, _ in outcomes]

    @staticmethod
    def _write_shard(uri: str, rank: int, parts: dict[str, Part]) -> tuple[tuple[int, str], object]:
        entry, index = shards.write_shard(uri, rank, parts)
        return entry, shards.index_to_json(index)

    def _seal(self, checkpoint: Checkpoint) -> None:
        """Write the history of the steps up to the checkpoint, then its seal."""
        self.require_owner()
        if self._history:
            history = f"history/step-{checkpoint.step:08d}.jsonl"
            storage.write_bytes(storage.join(self.run, history), "".join(self._history).encode())
        seals.write_seal(checkpoint)
        self._history = []
        self.sealed(checkpoint.step, checkpoint.sealed_at)

    def _prune(self) -> None:
        try:
            seals.prune(self.run, self.config.train)
        except OSError as error:
            log.warning("superfluous checkpoints were not removed: %s; the next checkpoint tries again", error)


def _write_small(uri: str, name: str, data: bytes) -> tuple[int, str]:
    """Write a file of a checkpoint; return its size [bytes] and sha256."""
    storage.write_bytes(storage.join(uri, name), data)
    return len(data), hashlib.sha256(data).hexdigest()
