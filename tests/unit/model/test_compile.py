"""Layers compile without graph breaks, which `fullgraph=True` makes an error."""

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from crosslmm.model.loading import build_model
from tests.support.common import conversation, open_gates, random_frames


@pytest.fixture
def model(config, processor):
    torch.compiler.reset()
    model = build_model(config.model, processor, seed=0)
    open_gates(model)
    yield model
    torch.compiler.reset()


@pytest.fixture
def batch(processor):
    """With labels. The first sample has more frames than the encoder takes at a time, the second has none."""
    talks = [conversation("Which shape is it?", "red circle"), conversation("Why?", "it is", video=False)]
    return processor(talks, [[random_frames(9, 1)], []])


def plain_layers(model):
    """The layers of the encoder, and those of the decoder without cross-attention."""
    plain = [layer for layer in model.language_model.model.layers if isinstance(layer, Qwen2DecoderLayer)]
    return [*model.vision_tower.encoder.layers, *plain]


def compile_all(layers):
    """Compile the layers in place; return a list that fills with their graphs."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    return graphs


@torch.no_grad()
def test_a_prompt_with_videos_through_compiled_layers(model, batch):
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    expected = model(**inputs).logits
    graphs = compile_all(plain_layers(model))
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert graphs


@torch.no_grad()
def test_a_prompt_of_text_through_compiled_layers(model):
    model.eval()
    ids = torch.arange(20, 32).view(2, 6)
    expected = model(input_ids=ids).logits
    graphs = compile_all(model.language_model.model.layers)
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_through_compiled_layers(model, batch, checkpointing):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    expected = gradients(model, batch)
    graphs = compile_all(plain_layers(model))
    torch.testing.assert_close(gradients(model, batch), expected)
    assert graphs


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def test_the_encoder_compiles_as_a_whole(model, batch):
    model.eval()
    encode = torch.compile(model.encode, backend="eager", fullgraph=True)
    torch.testing.assert_close(encode(batch["pixel_values"]), model.encode(batch["pixel_values"]))
