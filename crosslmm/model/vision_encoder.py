"""The vision encoder, run on a few frames at a time. Axis suffixes: F frame, P patch, D width, C H W as in images."""

import hashlib
import json
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

COMPUTES_WITH = ("num_attention_heads", "hidden_act", "layer_norm_eps", "image_size", "patch_size", "num_channels")
"""Configuration fields that change the output and do not follow from the shapes of the weights."""


def in_chunks(function: Callable[[Tensor], Tensor], x_FPD: Tensor, chunk: int) -> Tensor:
    """Return `function(x_FPD)`; without gradients in chunks of `chunk` frames, to bound intermediate memory."""
    if torch.is_grad_enabled() or x_FPD.shape[0] <= chunk:
        return function(x_FPD)
    out: Tensor | None = None
    for start in range(0, x_FPD.shape[0], chunk):
        part = function(x_FPD[start : start + chunk])
        out = part.new_empty(x_FPD.shape[0], *part.shape[1:]) if out is None else out
        out[start : start + chunk] = part
    assert out is not None
    return out


class ChunkedEncoderLayer(nn.Module):
    """A pretrained SigLIP layer that processes `chunk` frames at a time; frames do not attend to each other.

    It keeps the modules of the pretrained layer under their names, so the state-dict keys do not change. The loop is
    inside the layer, not around the encoder, because FSDP gathers a layer's weights at each call: ranks with different
    numbers of frames would make different numbers of calls and deadlock.
    """

    gradient_checkpointing = False

    def __init__(self, layer: nn.Module, chunk: int) -> None:
        super().__init__()
        parts = dict(layer.named_children())
        self.layer_norm1 = parts["layer_norm1"]
        self.self_attn = parts["self_attn"]
        self.layer_norm2 = parts["layer_norm2"]
        self.mlp = parts["mlp"]
        self.chunk = chunk

    def forward(self, x_FPD: Tensor) -> Tensor:
        """(F, P, D) -> (F, P, D). Without gradients `x_FPD` is overwritten with the result, which saves memory."""
        if not torch.is_grad_enabled():
            for start in range(0, x_FPD.shape[0], self.chunk):
                x_FPD[start : start + self.chunk] = self._frames(x_FPD[start : start + self.chunk])
            return x_FPD
        return torch.cat([self._checkpointed(part) for part in x_FPD.split(self.chunk)])

    def _checkpointed(self, x_FPD: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(self._frames, x_FPD)  # type: ignore[operator]
        return self._frames(x_FPD)

    def _frames(self, x_FPD: Tensor) -> Tensor:
        x_FPD = x_FPD + self.self_attn(hidden_states=self.layer_norm1(x_FPD), attention_mask=None)[0]
        return x_FPD + self.mlp(self.layer_norm2(x_FPD))


def build_vision_encoder(config: SiglipVisionConfig, chunk: int) -> SiglipVisionModel:
    """Build a SigLIP encoder, randomly initialised, whose layers process `chunk` frames at a time."""
    tower = SiglipVisionModel(config)
    for i, layer in enumerate(tower.encoder.layers):
        tower.encoder.layers[i] = ChunkedEncoderLayer(layer, chunk)
    return tower


def digest(tower: SiglipVisionModel) -> str:
    """Return the sha256 [hex] of everything the features depend on: weights (as float32) and `COMPUTES_WITH`."""
    settings = {name: getattr(tower.config, name) for name in COMPUTES_WITH}
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in sorted(tower.state_dict().items()):
        sha.update(f"{name} {tuple(weight.shape)}".encode())
        sha.update(weight.detach().cpu().float().contiguous().numpy().data)
    return sha.hexdigest()


def encode(tower: SiglipVisionModel, pixels_FCHW: Tensor, chunk: int) -> Tensor:
    """Encode frames; an encoder whose parameters are all frozen stores nothing for a backward pass.

    Args:
        tower: the encoder, from `build_vision_encoder`.
        pixels_FCHW: uint8 (frames, 3, image_size, image_size). SigLIP's normalisation to [-1, 1] happens on the
            device, so that only a quarter as many bytes are copied to it.
        chunk: frames converted to floating point at a time.

    Returns:
        (frames, patches, width) in the encoder's dtype.
    """
    frames = pixels_FCHW.shape[0]
    if not frames:
        # SigLIP takes no empty batch, but under FSDP every rank must run it: encode a black frame, drop the result.
        pixels_FCHW = pixels_FCHW.new_zeros(1, *pixels_FCHW.shape[1:])
    dtype = tower.embeddings.patch_embedding.weight.dtype
    learns = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
        x_FPD = in_chunks(lambda part: tower.embeddings(part.to(dtype).div_(127.5).sub_(1.0)), pixels_FCHW, chunk)
        for layer in tower.encoder.layers:
            x_FPD = layer(x_FPD)
        return in_chunks(tower.post_layernorm, x_FPD, chunk)[:frames]
