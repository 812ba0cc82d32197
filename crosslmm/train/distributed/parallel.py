"""FSDP2: shard the model over processes. The model itself knows nothing of it.

With hybrid sharding, consecutive ranks hold one copy of the model between them, a shard each; of each shard there are
as many replicas as copies. Ray Train numbers the workers node by node, so a copy stays within a node where it can.
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from crosslmm.config import TrainConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.adapters.lora import prepare_training
from crosslmm.model.compilation import compile_blocks
from crosslmm.model.param_groups import fsdp_units
from crosslmm.model.recomputation import checkpoint_activations
from crosslmm.train.distributed.float8 import convert_to_float8


def parallelize(
    build: Callable[[bool], CrossLMMForConditionalGeneration],
    config: TrainConfig,
    device: torch.device,
    shards: int | None = None,
) -> CrossLMMForConditionalGeneration:
    """Return a model sharded over all processes of the default group, which must be initialised.

    Only rank 0 builds the real weights, in its CPU memory; the others start on the meta device and receive shards.

    Args:
        build: builds the model: with weights if its argument is true, otherwise (on the meta device) only shapes.
        config: precision, FP8, activation checkpointing, compilation, learning rates (a component with rate 0 is
            frozen), and adapters.
        device: device of the shards.
        shards: number of shards, which divides that of the processes; None: one for each process.
    """
    source = build(True) if dist.get_rank() == 0 else None
    if source is not None:
        prepare_training(source, config)
    with torch.device("meta"):
        model = build(False)
    prepare_training(model, config)
    if config.float8:
        convert_to_float8(model, emulate=device.type == "cpu")
    checkpoint_activations(model, config.checkpointing)
    _shard(model, config, _mesh(device, shards or dist.get_world_size()))
    if config.compile:  # after sharding: FSDP replaces the layers' classes, and its hooks must not be compiled
        compile_blocks(model)
    model.to_empty(device=device)
    # `to_empty` unties tied weights.
    model.tie_weights()
    _send_weights(model, source, device)
    return model


def _mesh(device: torch.device, shards: int) -> DeviceMesh:
    """Return the ranks as (replicas, shards); in one dimension, which takes the default process group, if there is one
    copy of the model."""
    replicas = dist.get_world_size() // shards
    if replicas == 1:
        return init_device_mesh(device.type, (shards,))
    return init_device_mesh(device.type, (replicas, shards), mesh_dim_names=("replicate", "shard"))


def _shard(model: CrossLMMForConditionalGeneration, config: TrainConfig, mesh: DeviceMesh) -> None:
    """Shard each FSDP unit, and the model with all that is left."""
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.precision == "bf16" else MixedPrecisionPolicy()
    for unit in [*fsdp_units(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def shard_rows(rows: int, shard: int, shards: int) -> tuple[int, int]:
    """Return the rows [first, end) of a shard: FSDP2 splits the first dimension as `torch.chunk` does."""
    per_shard = -(-rows // shards)
    return min(shard * per_shard, rows), min((shard + 1) * per_shard, rows)


def held_rows(tensor: DTensor) -> tuple[int, int]:
    """Return the rows [first, end) of a sharded tensor that this rank holds."""
    shards = tensor.device_mesh.shape[-1]
    return shard_rows(len(tensor), dist.get_rank() % shards, shards)


def saved_rows(tensor: DTensor) -> tuple[torch.Tensor, int]:
    """Return the rows of a sharded tensor that this rank saves, and the position of the first one.

    Each replica of a shard saves a part of it, so that all ranks write, and none writes what another does.

    Raises:
        RuntimeError: the tensor is not sharded as FSDP2 does it by default.
    """
    rows, (first, end), mesh = tensor.to_local(), held_rows(tensor), tensor.device_mesh
    if len(rows) != end - first:
        raise RuntimeError(f"a tensor {tuple(tensor.shape)} is not sharded along its first dimension as FSDP2 does it")
    shards = mesh.shape[-1]
    start, stop = shard_rows(len(rows), dist.get_rank() // shards, mesh.size() // shards)
    return rows[start:stop], first + start


@torch.no_grad()
def _send_weights(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Broadcast rank 0's parameters, one after another, and all buffers: those outside the state dict (rotary
    frequencies) are uninitialised until then. Each rank keeps its rows. Torch's own function sends pickles."""
    tensors = dict(_named_tensors(source)) if source is not None else {}
    for name, target in _named_tensors(model):
        whole = torch.empty(target.shape, dtype=target.dtype, device=device)
        if source is not None:
            whole.copy_(tensors[name])
        dist.broadcast(whole, src=0)
        if isinstance(target, DTensor):
            first, end = held_rows(target)
            target.to_local().copy_(whole[first:end])
        else:
            target.copy_(whole)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
