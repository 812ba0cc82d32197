"""Save and load the state of model and optimizer, and export the model.

Training waits only until the state is copied; a thread then writes the files and seals them.
"""

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.distributed.tensor import DTensor

from crosslmm import storage
from crosslmm.config import BadConfig, LoraConfig, RunConfig, to_yaml, validate_run
from crosslmm.inference.publish import CARD_FILE, model_card
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.adapters import lora
from crosslmm.model.adapters.base import Base, open_base
from crosslmm.model.loading import build_model, build_processor
from crosslmm.run_folder import (
    BASE_FILE,
    CHECKPOINT_INDEX_FILE,
    CONFIG_FILE,
    MODEL_CONFIG_FILE,
    SHARD_FILE,
    checkpoint_folder,
    has_run,
    read_run,
)
from crosslmm.train import checkpoint_store, shards
from crosslmm.train.checkpoint_store import Checkpoint
from crosslmm.train.distributed.collectives import broadcast_json, gather_json
from crosslmm.train.distributed.parallel import saved_rows
from crosslmm.train.shards import Part

log = logging.getLogger(__name__)


State = dict[str, torch.Tensor]
"""This rank's part of a checkpoint, in CPU memory, by name: model/PARAMETER, optimizer/PARAMETER/MOMENT."""


def read_newest(run: str, group: dist.ProcessGroup, shards_now: int | None = None) -> tuple[Checkpoint, State] | None:
    """Read this rank's part of the newest intact checkpoint; None if there is none.

    A collective: all ranks call it and get the same checkpoint. Each reads and verifies the chunks of its rows. A
    damaged checkpoint is reported and skipped, and its seal is broken.

    Args:
        run: the run's folder.
        group: a gloo group of all ranks.
        shards_now: number of shards into which `parallelize` splits the model, however many wrote the checkpoint;
            None: one for each rank.
    """
    rank, shards_now = dist.get_rank(), shards_now or dist.get_world_size()
    for checkpoint in _list_on_rank_0(run, group):
        state: State = {}
        damage = None
        try:
            if rank == 0:
                shards.read_verified(checkpoint, CONFIG_FILE)
                read_base(checkpoint)
            state = shards.read(checkpoint, rank % shards_now, shards_now, _is_state)
        except shards.Damaged as error:
            damage = str(error)
        of_all_ranks = [reason for reason in gather_json(damage, group) if reason]
        if not of_all_ranks:
            return checkpoint, state
        if rank == 0:
            reason = "; ".join(dict.fromkeys(of_all_ranks))
            log.warning("checkpoint %s is damaged: %s; trying the one before it", checkpoint.uri, reason)
            checkpoint_store.break_seal(checkpoint, reason)
    return None


def _is_state(name: str) -> bool:
    """Return whether a tensor is part of the state; earlier versions stored the random states of the ranks, too."""
    return not name.startswith("random/")


def read_base(checkpoint: Checkpoint) -> Base | None:
    """Return the model that the adapters in a checkpoint belong to; None if it has the whole model.

    Raises:
        shards.Damaged: the file is not what was written.
    """
    if BASE_FILE not in checkpoint.files:
        return None
    try:
        return Base.from_json(shards.read_verified(checkpoint, BASE_FILE))
    except ValueError as error:
        raise shards.Damaged(str(error)) from None


def _list_on_rank_0(run: str, group: dist.ProcessGroup) -> list[Checkpoint]:
    """Return the sealed checkpoints as rank 0 lists them; rank 0 logs those that are skipped."""
    sealed: list[Checkpoint] = []
    if dist.get_rank() == 0:
        sealed = checkpoint_store.list_sealed(run)
        for uri in checkpoint_store.list_unsealed(run, sealed):
            reason = checkpoint_store.unsealed_reason(uri) or "it was never finished"
            log.warning("checkpoint %s is skipped: %s", uri, reason)
    return [Checkpoint.from_fields(fields) for fields in broadcast_json([asdict(one) for one in sealed], group)]


def load(state: State, model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint's state into model and optimizer.

    Args:
        state: from `read_newest`.
        model, optimizer: sharded over the ranks that read the state.

    Raises:
        BadConfig: the state belongs to another model.
    """
    _load_weights(state, model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    # The optimizer numbers its parameters through all groups.
    numbered = enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])
    moments = {
        number: {
            key.rpartition("/")[2]: _like(parameter, value) if value.ndim else value
            for key, value in state.items()
            if key.startswith(f"optimizer/{names[parameter]}/")
        }
        for number, parameter in numbered
    }
    optimizer.load_state_dict(
        {
            "state": {number: of_parameter for number, of_parameter in moments.items() if of_parameter},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )


@torch.no_grad()
def _load_weights(state: State, model: CrossLMMForConditionalGeneration) -> None:
    """Copy the weights into the model's shards.

    Raises:
        BadConfig: they belong to another model.
    """
    tensors = _weights(model)
    weights = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    if odd := sorted(tensors.keys() ^ weights.keys()):
        raise BadConfig(f"the checkpoint's weights are not those of this model: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        local = _local(tensor)
        if local.shape != weights[name].shape:
            raise BadConfig(f"the checkpoint's weights are not those of this model: {name} has another shape")
        local.copy_(weights[name])


def _weights(model: CrossLMMForConditionalGeneration) -> State:
    """Return parameters and persistent buffers by name, each once: tied weights have the name of the first. Of a model
    with adapters, only what learns: the rest is in its base."""
    if lora.is_adapted(model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(parameter: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is sharded like the parameter, with these rows on this rank."""
    tensor = torch.zeros_like(parameter)
    _local(tensor).copy_(rows)
    return tensor.detach()


def _state(model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> State:
    """Return the state that a checkpoint holds. Schedule, learning rates, random numbers and sample order are functions
    of the step."""
    state: State = {f"model/{name}": tensor.detach() for name, tensor in _weights(model).items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{moment}"] = value
    return state


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
        parts = self._staging.copy(_state(model, optimizer))
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
                    uri, [shards.from_json(index) for _, index in written]
                )
                files[CONFIG_FILE] = _write_small(uri, CONFIG_FILE, to_yaml(self.config).encode())
                if self.base:
                    files[BASE_FILE] = _write_small(uri, BASE_FILE, self.base.to_json())
                self._seal(Checkpoint(uri, step, dist.get_world_size(), time.time(), metrics, files))
                self._retain()
        except OSError as error:
            if rank == 0:
                log.warning(
                    "checkpoint after step %s was not saved: %s; the next one is tried again",
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
        return entry, shards.to_json(index)

    def _seal(self, checkpoint: Checkpoint) -> None:
        """Write the history of the steps up to the checkpoint, then its seal."""
        self.require_owner()
        if self._history:
            history = f"history/step-{checkpoint.step:08d}.jsonl"
            storage.write_bytes(storage.join(self.run, history), "".join(self._history).encode())
        checkpoint_store.write_seal(checkpoint)
        self._history = []
        self.sealed(checkpoint.step, checkpoint.sealed_at)

    def _retain(self) -> None:
        try:
            checkpoint_store.retain(self.run, self.config.train)
        except OSError as error:
            log.warning("superfluous checkpoints were not removed: %s; the next checkpoint tries again", error)


def _write_small(uri: str, name: str, data: bytes) -> tuple[int, str]:
    """Write a file of a checkpoint; return its size [bytes] and sha256."""
    storage.write_bytes(storage.join(uri, name), data)
    return len(data), hashlib.sha256(data).hexdigest()


def export(
    folder: Path,
    model: CrossLMMForConditionalGeneration,
    processor: CrossLMMProcessor,
    adapters: LoraConfig | None = None,
    base: Base | None = None,
) -> None:
    """Gather all shards and write one folder on rank 0, for `from_pretrained` or of adapters; all ranks call it.

    Args:
        folder: local folder.
        model, processor: what is written.
        adapters, base: of a model with adapters, their settings and, on rank 0, the model that they belong to.
    """
    weights = {}
    for name, tensor in _weights(model).items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if dist.get_rank() == 0:
            weights[name] = whole.detach().cpu()
    if dist.get_rank() == 0:
        if adapters and base:
            lora.save(folder, weights, adapters, base)
        else:
            model.save_pretrained(folder, state_dict=weights)
        processor.save_pretrained(folder)


def export_sealed(checkpoint: Checkpoint, folder: str, merged: bool = False) -> list[str]:
    """Verify a checkpoint's weights and export them, in one CPU process, however many ranks wrote it.

    Args:
        checkpoint: from `checkpoint_store`.
        folder: path or URI of an empty folder, which gets what `export` writes.
        merged: of a run that trains adapters, export the whole model instead.

    Returns:
        What is damaged; empty if the model was exported.

    Raises:
        BadConfig: the configuration is not one that this version builds, or the weights belong to another model; or
            there are no adapters to merge.
    """
    try:
        data = shards.read_verified(checkpoint, CONFIG_FILE)
        recorded = read_base(checkpoint)
        state = shards.read(checkpoint, 0, 1, lambda name: name.startswith("model/"))
    except shards.Damaged as error:
        return [str(error)]
    if merged and recorded is None:
        raise BadConfig(f"--merge: {checkpoint.uri} has the whole model and no adapters; leave --merge out")
    config = validate_run(yaml.safe_load(data))
    # The machine that trained may have had flash attention; this one need not have it.
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "sdpa"})})
    processor, run = build_processor(config.model, config.data), storage.parent(checkpoint.uri)
    with tempfile.TemporaryDirectory() as exported:
        if recorded is None or merged:
            if recorded is None:
                model = build_model(config.model, processor, config.seed, weights=False)
                _load_weights(state, model)
            else:
                model = _merged(state, config, run, processor, recorded)
            model.save_pretrained(exported)
            write_card(Path(exported), model, config, run, checkpoint.step, checkpoint.metrics)
        else:
            weights = {name.removeprefix("model/"): tensor for name, tensor in state.items()}
            lora.save(Path(exported), weights, config.train.lora, recorded.located(run))
        processor.save_pretrained(exported)
        (Path(exported) / MODEL_CONFIG_FILE).write_bytes(data)
        storage.upload(exported, folder)
    return []


def write_card(
    folder: Path,
    model: CrossLMMForConditionalGeneration,
    config: RunConfig,
    run: str,
    step: int,
    metrics: dict[str, float],
) -> None:
    """Write the model card of an exported model.

    Args:
        folder: local folder.
        model: what was exported.
        config: of the run.
        run: the run's folder.
        step: training steps.
        metrics: of the last validation.
    """
    datasets = read_run(run).get("datasets", []) if has_run(run) else []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    (folder / CARD_FILE).write_text(model_card(config, model.config, parameters, datasets, step, metrics))


def _merged(
    state: State, config: RunConfig, run: str, processor: CrossLMMProcessor, recorded: Base
) -> CrossLMMForConditionalGeneration:
    """Return a run's model with the adapters merged into it."""
    with open_base(config, run, processor, recorded) as (_, model_config):
        model = build_model(model_config, processor, config.seed)
    lora.prepare_training(model, config.train)
    _load_weights(state, model)
    lora.merge(model)
    return model
