"""Training in emulated FP8: which layers are converted, how far losses are from bf16, and that checkpoints and exported
models stay the same."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from crosslmm.cli import parse_run
from crosslmm.model.adapters.lora import prepare_training
from crosslmm.model.compilation import compile_blocks
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train.distributed.float8 import convert_to_float8
from tests.distributed.test_fsdp import STEPS, STOP_AFTER, spawn, weights
from tests.support.common import conversation, open_gates, random_frames

# Beside the environment (see the Makefile): where Transformers finds torchao it imports it, which takes half a second
# and prints four warnings in each process. Processes that are spawned get this path, too.
sys.path.append(str(Path(sys.prefix) / "float8"))
import torchao.float8  # noqa: F401

BF16 = ("--train.precision=bf16",)
FP8 = (*BF16, "--train.float8=true")
LOSS, GRADIENT = 0.01, 0.25
"""How far FP8 may be from bf16 in the tiny model, relative: three bits of mantissa, and two for gradients."""


def tiny(*overrides):
    """Return the model and its processor."""
    config = parse_run(list(overrides), "")
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=0)
    open_gates(model, 0.5)
    prepare_training(model, config.train)
    return model.train(), processor


def linear_layers(model):
    return {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def test_linear_layers_of_the_right_size_are_converted_and_no_others():
    model, _ = tiny("--model.language.intermediate_size=264", "--model.cross_attention_layers=[0]")
    left = {"projector.1", "projector.3", "language_model.lm_head"}
    left |= {f"language_model.model.layers.{i}.mlp.{name}_proj" for i in range(4) for name in ("gate", "up", "down")}
    names = convert_to_float8(model, emulate=True)
    assert set(names) == linear_layers(model) - left
    assert {"language_model.model.layers.0.v2v.q_proj", "vision_tower.encoder.layers.1.mlp.fc2"} < set(names)
    assert {type(model.get_submodule(name)).__name__ for name in names} == {"Float8Linear"}
    assert {type(model.get_submodule(name)) for name in left} == {nn.Linear}


def test_adapters_stay_as_they_are_on_converted_layers():
    model, processor = tiny("--train.lora.rank=16", "--train.lora.targets=[decoder]", "--train.learning_rate.vision=0")
    names = convert_to_float8(model, emulate=True)
    assert {name for name in linear_layers(model) if ".lora_" in name}.isdisjoint(names)
    assert "language_model.model.layers.3.self_attn.q_proj.base_layer" in names
    loss_and_gradient(model, processor)
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_A." in name)


def loss_and_gradient(model, processor, video=True):
    """Return the loss of two samples, and all gradients as one vector."""
    talks = [conversation("Which shape is it?", "red circle", video=video), conversation("Why?", "left", video=False)]
    loss = model(**processor(talks, [[random_frames(3, 1)] if video else [], []])).loss
    loss.backward()
    gradients = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("video", [True, False], ids=["video", "text alone"])
def test_loss_and_gradients_are_near_those_of_bf16(video):
    """Text alone runs the cross-attentions on no rows."""
    (model, processor), (converted, _) = tiny(), tiny()
    convert_to_float8(converted, emulate=True)
    loss, gradient = loss_and_gradient(model.bfloat16(), processor, video)
    loss_8, gradient_8 = loss_and_gradient(converted.bfloat16(), processor, video)
    assert loss_8 == pytest.approx(loss, rel=LOSS)
    assert loss_8 != loss
    assert gradient_8.isfinite().all()
    assert 0 < (gradient_8 - gradient).norm() / gradient.norm() < GRADIENT


def test_weights_keep_names_dtypes_and_values():
    (model, _), (converted, _) = tiny(), tiny()
    convert_to_float8(converted, emulate=True)
    before, now = model.state_dict(), converted.state_dict()
    assert list(now) == list(before)
    for name, value in before.items():
        assert type(now[name]) is type(value)
        torch.testing.assert_close(now[name], value, rtol=0, atol=0)
    learns = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in converted.named_parameters()} == learns


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bf16")
    return spawn(1, folder, overrides=BF16), folder


@pytest.fixture(scope="module")
def in_float8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float8")
    return spawn(1, folder, overrides=FP8), folder


def assert_near(losses, others):
    assert [loss for loss, _ in losses.values()] == pytest.approx([others[step][0] for step in losses], rel=LOSS)


def test_sharded_training_is_near_that_in_bf16_and_exports_the_same_model(in_bf16, in_float8):
    assert sorted(in_float8[0]) == list(range(1, STEPS + 1))
    assert_near(in_float8[0], in_bf16[0])
    assert in_float8[0] != in_bf16[0]
    before, now = weights(in_bf16[1]), weights(in_float8[1])
    assert {name: value.dtype for name, value in now.items()} == {name: value.dtype for name, value in before.items()}
    assert {value.dtype for value in now.values()} == {torch.float32}


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_layers_train_like_kept_ones(how, in_float8, tmp_path):
    recomputed = spawn(1, tmp_path, overrides=(*FP8, f"--train.activation_checkpointing={how}"))
    assert recomputed == in_float8[0]


def test_two_ranks_train_like_one_process(in_float8, tmp_path):
    """Not to the last digits: scales are taken from micro-batches."""
    assert_near(spawn(2, tmp_path, overrides=FP8), in_float8[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch.compile's own
def test_compiled_blocks_compute_the_same():
    torch.compiler.reset()

    def computed(compiled):
        model, processor = tiny("--model.vision.num_hidden_layers=1", "--model.language.num_hidden_layers=1",
                                "--model.cross_attention_every=1")  # fmt: skip
        convert_to_float8(model, emulate=True)
        if compiled:
            compile_blocks(model, backend="aot_eager")
        return loss_and_gradient(model.bfloat16(), processor)

    (loss, gradient), (loss_compiled, gradient_compiled) = computed(False), computed(True)
    assert loss_compiled == pytest.approx(loss, rel=1e-3)
    assert (gradient_compiled - gradient).norm() < 1e-2 * gradient.norm()


@pytest.mark.parametrize(("first", "then"), [(BF16, FP8), (FP8, BF16)], ids=["into FP8", "out of FP8"])
def test_a_run_goes_on_with_the_other_setting(first, then, in_bf16, tmp_path):
    assert spawn(1, tmp_path, stop=True, overrides=first) == {}
    resumed = spawn(1, tmp_path, resume=True, overrides=then)
    assert sorted(resumed) == list(range(STOP_AFTER + 1, STEPS + 1))
    assert_near(resumed, in_bf16[0])
