"""Compilation of the model's blocks, which fuses the many small kernels between matrix products."""

from collections.abc import Callable
from typing import Any

import torch

from crosslmm.model.cross_attention import DualCrossAttentionLayer
from crosslmm.model.modeling import CrossLMMForConditionalGeneration


def compile_blocks(model: CrossLMMForConditionalGeneration, backend: str = "inductor") -> None:
    """Compile encoder layers, decoder layers, and norms and projections of the cross-attentions, each as one graph.

    What depends on the data, such as who attends to which frames, stays outside of them. Module names, parameters and
    hooks (those of FSDP) stay as they are. Frames and positions are dynamic shapes: no batch shape is compiled
    separately.

    Args:
        model: on any device, the meta device included.
        backend: of `torch.compile`.
    """

    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    for layer in model.vision_tower.encoder.layers:
        layer._frames = compiled(layer._frames)
    for layer in model.language_model.model.layers:
        if isinstance(layer, DualCrossAttentionLayer):
            _compile_dual(layer, compiled)
        else:
            layer.forward = _unless_cached(compiled(layer.forward), layer.forward)


def _compile_dual(layer: Any, compiled: Callable[[Any], Any]) -> None:
    layer._attend_to_itself = _unless_cached(compiled(layer._attend_to_itself), layer._attend_to_itself)
    layer._feed_forward = compiled(layer._feed_forward)
    for branch in (layer.v2v, layer.t2v):
        if branch is not None:
            branch._query, branch._project = compiled(branch._query), compiled(branch._project)


def _unless_cached(compiled: Any, eager: Any) -> Any:
    """Return a function that calls `eager` if there is a cache, since each layer's cache would cause a compilation of
    its own."""

    def call(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        function = compiled if past_key_values is None else eager
        return function(*args, past_key_values=past_key_values, **kwargs)

    return call
