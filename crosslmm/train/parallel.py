"""FSDP2: shard the model over processes. The model itself knows nothing of it."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from crosslmm.config import TrainConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import freeze, fsdp_units


def parallelize(
    build: Callable[[bool], CrossLMMForConditionalGeneration], config: TrainConfig, device: torch.device
) -> CrossLMMForConditionalGeneration:
    """Return a model sharded over all processes of the default group, which must be initialised.

    Only rank 0 builds the real weights, in its CPU memory; the others start on the meta device and receive shards.

    Args:
        build: builds the model: with weights if its argument is true, otherwise (on the meta device) only shapes.
        config: precision, activation checkpointing, and learning rates (a component with rate 0 is frozen).
        device: device of the shards.
    """
    source = build(True) if dist.get_rank() == 0 else None
    with torch.device("meta"):
        model = build(False)
    freeze(model, config.learning_rate)
    if config.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _shard(model, config, device)
    model.to_empty(device=device)
    # `to_empty` unties tied weights.
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)
    _send_buffers(model, source, device)
    return model


def _shard(model: CrossLMMForConditionalGeneration, config: TrainConfig, device: torch.device) -> None:
    """Shard each FSDP unit, and the model with all that is left."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if config.precision == "bf16" else MixedPrecisionPolicy()
    for unit in [*fsdp_units(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)


def _send_buffers(model: nn.Module, source: nn.Module | None, device: torch.device) -> None:
    """Broadcast rank 0's buffers: those outside the state dict (rotary frequencies) are uninitialised until then."""
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
