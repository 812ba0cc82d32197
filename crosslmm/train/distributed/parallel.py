"""FSDP2: shard the model over processes. The model itself knows nothing of it."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
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
    build: Callable[[bool], CrossLMMForConditionalGeneration], config: TrainConfig, device: torch.device
) -> CrossLMMForConditionalGeneration:
    """Return a model sharded over all processes of the default group, which must be initialised.

    Only rank 0 builds the real weights, in its CPU memory; the others start on the meta device and receive shards.

    Args:
        build: builds the model: with weights if its argument is true, otherwise (on the meta device) only shapes.
        config: precision, FP8, activation checkpointing, compilation, learning rates (a component with rate 0 is
            frozen), and adapters.
        device: device of the shards.
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
    _shard(model, config, device)
    if config.compile:  # after sharding: FSDP replaces the layers' classes, and its hooks must not be compiled
        compile_blocks(model)
    model.to_empty(device=device)
    # `to_empty` unties tied weights.
    model.tie_weights()
    _send_weights(model, source, device)
    return model


def _shard(model: CrossLMMForConditionalGeneration, config: TrainConfig, device: torch.device) -> None:
    """Shard each FSDP unit, and the model with all that is left."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.precision == "bf16" else MixedPrecisionPolicy()
    for unit in [*fsdp_units(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def shard_rows(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the rows [first, end) of a rank: FSDP2 splits the first dimension as `torch.chunk` does."""
    per_rank = -(-rows // world_size)
    return min(rank * per_rank, rows), min((rank + 1) * per_rank, rows)


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
            first, end = shard_rows(len(whole), dist.get_rank(), dist.get_world_size())
            target.to_local().copy_(whole[first:end])
        else:
            target.copy_(whole)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())
