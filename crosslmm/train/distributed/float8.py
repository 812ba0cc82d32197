"""Matrix products of linear layers in FP8, by torchao (extra `fp8`)."""

import functools
from typing import Any

import torch
from torch import nn

from crosslmm.model import CrossLMMForConditionalGeneration

MULTIPLE = 16
"""What the sizes of a layer must be multiples of, for the FP8 kernels."""


def convert_to_float8(model: CrossLMMForConditionalGeneration, emulate: bool) -> list[str]:
    """Let the linear layers of encoder, cross-attentions and decoder compute in FP8, forward and backward.

    Inputs and weights are rounded to E4M3, gradients to E5M2, each with one scale for the whole tensor, taken from its
    largest value at each use. Parameters stay as they are, with their names and dtypes. Embeddings, output head,
    projector, adapters (LoRA), and layers whose sizes are not multiples of `MULTIPLE` are left alone.

    Args:
        model: on any device, the meta device included, not yet sharded or compiled.
        emulate: compute the products of the rounded values in float32, where there are no FP8 kernels.

    Returns:
        The names of the layers.

    Raises:
        ImportError: torchao is not installed.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    names = [name for name, part in model.named_modules() if _qualifies(name, part)]
    # The gradient of a weight is a sum over tokens, whose number must be such a multiple, too: hence the padding.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.forward = functools.partial(_unless_empty, layer, layer.forward)
    return names


def _qualifies(name: str, part: nn.Module) -> bool:
    if not isinstance(part, nn.Linear) or part.in_features % MULTIPLE or part.out_features % MULTIPLE:
        return False
    return ".layers." in name and ".lora_" not in name


def _unless_empty(layer: nn.Linear, in_float8: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the layer's output. Text without videos runs the cross-attentions on no rows, which have no largest value
    to take a scale from."""
    return in_float8(x) if x.numel() else nn.functional.linear(x, layer.weight, layer.bias)
