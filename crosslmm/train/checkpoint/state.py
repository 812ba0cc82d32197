"""What a checkpoint holds: copied from model and optimizer, and into them."""

import torch
from torch.distributed.tensor import DTensor

from crosslmm.config import BadConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.adapters import lora

State = dict[str, torch.Tensor]
"""Tensors of a checkpoint by name: model/PARAMETER, optimizer/PARAMETER/MOMENT. `state_of` returns those in use,
sharded, on the device; `shards.read` returns this rank's rows, in CPU memory."""


def load_state(state: State, model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint's state into model and optimizer.

    Args:
        state: from `read_newest`.
        model, optimizer: sharded over the ranks that read the state.

    Raises:
        BadConfig: the state belongs to another model.
    """
    load_weights(state, model)
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
def load_weights(state: State, model: CrossLMMForConditionalGeneration) -> None:
    """Copy the weights into the model's shards.

    Raises:
        BadConfig: they belong to another model.
    """
    tensors = weights_of(model)
    weights = {name.removeprefix("model/"): value for name, value in state.items() if name.startswith("model/")}
    if odd := sorted(tensors.keys() ^ weights.keys()):
        raise BadConfig(f"the checkpoint's weights are not those of this model: {', '.join(odd[:5])}")
    for name, tensor in tensors.items():
        local = _local(tensor)
        if local.shape != weights[name].shape:
            raise BadConfig(f"the checkpoint's weights are not those of this model: {name} has another shape")
        local.copy_(weights[name])


def weights_of(model: CrossLMMForConditionalGeneration) -> State:
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


def state_of(model: CrossLMMForConditionalGeneration, optimizer: torch.optim.Optimizer) -> State:
    """Return the state that a checkpoint holds. Schedule, learning rates, random numbers and sample order are functions
    of the step."""
    state: State = {f"model/{name}": tensor.detach() for name, tensor in weights_of(model).items()}
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer/{name}/{moment}"] = value
    return state
