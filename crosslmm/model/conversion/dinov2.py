"""DINOv2 as a SigLIP encoder: reads its weights from an ONNX file and writes them in the layout of `SiglipVisionModel`.

Layer scale goes into the layer before it, and the normalisation of pixels into the patch embedding, so the outputs stay
the same. What SigLIP has no place for is the class token: it is dropped, which changes the features a little (cosine
0.939 to the original at 224 px, 0.981 at 384 px).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from crosslmm.config import BadConfig

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of pixels in [0, 1] that DINOv2 was trained with."""
PREFIX = "backbone."
"""Where the encoder is in a model with a head."""
HEAD_WIDTH = 64
"""Width of an attention head, in all sizes of DINOv2."""
KINDS = ("weight", "bias")

Weights = dict[str, Tensor]


def read_onnx(file: Path) -> Weights:
    """Read the weights of a DINOv2 from an ONNX file, under the names of the modules that it was exported from.

    Returns:
        float32 each. Linear layers are (out, in), `embeddings.position_embeddings` is (positions, width), with or
        without the class token.

    Raises:
        BadConfig: the package onnx is missing, or the file holds no DINOv2.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise BadConfig("onnx is not installed: pip install onnx, or the extra `dev`") from None
    graph = onnx.load(str(file)).graph
    arrays = {tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor))) for tensor in graph.initializer}
    weights = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
    for node in graph.node:
        constant = next((name for name in node.input if name in arrays), None)
        module, _, operation = node.name.strip("/").replace("/", ".").removeprefix(PREFIX).rpartition(".")
        # The exporter folds a transposed or sliced weight into a constant without a name.
        if constant is not None and operation == "MatMul":
            weights[f"{module}.weight"] = arrays[constant].T
        if constant is not None and module == "embeddings" and arrays[constant].ndim == 3 and "Reshape" in operation:
            weights["embeddings.position_embeddings"] = arrays[constant][0]
    if "embeddings.position_embeddings" not in weights or "encoder.layer.0.layer_scale1.lambda1" not in weights:
        raise BadConfig(f"{file}: holds no DINOv2 with its position embeddings")
    return weights


def to_siglip(weights: Weights, image_size: int) -> SiglipVisionModel:
    """Build the SigLIP encoder that computes what DINOv2 computes without its class token.

    Args:
        weights: as `read_onnx` returns them.
        image_size: side of the frames; position embeddings are resized to it [px].

    Raises:
        BadConfig: the side is not a multiple of a patch's.
    """
    model = SiglipVisionModel(_config(weights, image_size)).eval()
    state = _embeddings(weights, model.config)
    for i in range(model.config.num_hidden_layers):
        state |= {f"encoder.layers.{i}.{name}": value for name, value in _layer(weights, f"encoder.layer.{i}").items()}
    state |= {f"post_layernorm.{kind}": weights[f"layernorm.{kind}"] for kind in KINDS}
    model.load_state_dict(state)
    return model


def _config(weights: Weights, image_size: int) -> SiglipVisionConfig:
    width, _, patch_size, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    if image_size % patch_size:
        raise BadConfig(f"image_size {image_size}: is not a multiple of the patch size {patch_size}")
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights["encoder.layer.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith("layer_scale1.lambda1") for name in weights),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=image_size,
        patch_size=patch_size,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        vision_use_head=False,
    )


def _embeddings(weights: Weights, config: Any) -> Weights:
    """SigLIP's pixels are y = 2 p - 1 for p in [0, 1], and DINOv2's (p - mean) / deviation = (y + 1 - 2 mean) / (2
    deviation)."""
    kernel = weights["embeddings.patch_embeddings.projection.weight"]
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    shift = (kernel * (1 - 2 * mean) / (2 * deviation)).sum(dim=(1, 2, 3))
    return {
        "embeddings.patch_embedding.weight": kernel / (2 * deviation),
        "embeddings.patch_embedding.bias": weights["embeddings.patch_embeddings.projection.bias"] + shift,
        "embeddings.position_embedding.weight": _positions(weights, config.image_size // config.patch_size),
    }


def _positions(weights: Weights, grid: int) -> Tensor:
    """Resize the position embeddings to (grid * grid, width), as DINOv2 does for frames of another size."""
    positions_PD = weights["embeddings.position_embeddings"]
    side = int(len(positions_PD) ** 0.5)
    image_1DHW = positions_PD[-(side**2) :].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    if grid != side:
        image_1DHW = nn.functional.interpolate(image_1DHW, size=(grid, grid), mode="bicubic", align_corners=False)
    return image_1DHW[0].flatten(1).T.contiguous()


def _layer(weights: Weights, name: str) -> Weights:
    """Return the weights of a layer under SigLIP's names, layer scales multiplied in."""
    scaled = {
        "self_attn.out_proj": ("attention.output.dense", weights[f"{name}.layer_scale1.lambda1"]),
        "mlp.fc2": ("mlp.fc2", weights[f"{name}.layer_scale2.lambda1"]),
    }
    plain = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        **{f"self_attn.{part[0]}_proj": f"attention.attention.{part}" for part in ("query", "key", "value")},
    }
    layer = {f"{new}.{kind}": weights[f"{name}.{old}.{kind}"] for new, old in plain.items() for kind in KINDS}
    for new, (old, scale_D) in scaled.items():
        layer[f"{new}.weight"] = scale_D[:, None] * weights[f"{name}.{old}.weight"]
        layer[f"{new}.bias"] = scale_D * weights[f"{name}.{old}.bias"]
    return layer
