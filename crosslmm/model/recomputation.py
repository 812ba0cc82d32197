"""Activation checkpointing by part of the model: what the backward pass recomputes instead of keeping it."""

import functools
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from crosslmm.config import Checkpointing, Recomputed
from crosslmm.model.cross_attention import DualCrossAttentionLayer
from crosslmm.model.modeling import CrossLMMForConditionalGeneration

aten = torch.ops.aten
PRODUCTS: list[Any] = [
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""Operators whose results `selective` keeps: they take nearly all the time. What is recomputed, norms and activation
functions, takes much of the memory. flash-attn's operator is not among them, since flash-attn may not be installed."""


def checkpoint_activations(model: CrossLMMForConditionalGeneration, parts: Checkpointing) -> None:
    """Set what each layer of the encoder, and of the decoder with its cross-attentions, recomputes."""
    for layer in model.vision_tower.encoder.layers:
        _set(layer, parts.encoder)
    for layer in model.language_model.model.layers:
        _set(layer, parts.decoder)


def _set(layer: Any, how: Recomputed) -> None:
    in_pieces = isinstance(layer, DualCrossAttentionLayer)
    if in_pieces:
        # The cross-attentions are FSDP units of their own, and selective checkpointing fails if FSDP's operators are
        # within it: recomputation does not repeat them in the same order. So only the layer's other parts have it.
        for name in ("_attend_to_itself", "_feed_forward"):
            layer.__dict__.pop(name, None)
            if how == "selective":
                setattr(layer, name, functools.partial(_selectively_in_training, layer, getattr(layer, name)))
    # The names under which Transformers' layers look for both.
    layer.gradient_checkpointing = how == "full" or (how == "selective" and not in_pieces)
    layer._gradient_checkpointing_func = (
        _selectively if how == "selective" else functools.partial(checkpoint, use_reentrant=False)
    )


def _selectively(function: Any, *inputs: Any, **options: Any) -> Any:
    contexts = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts, **options)


def _selectively_in_training(layer: Any, function: Any, *inputs: Any, **options: Any) -> Any:
    if not layer.training:
        return function(*inputs, **options)
    return _selectively(function, *inputs, **options)
