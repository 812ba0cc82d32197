"""Detected hardware decides precision and kernels; object stores and worker environments."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from crosslmm.cli import parse_run, preset_names
from crosslmm.config import BadConfig, changes
from crosslmm.preflight import placement
from crosslmm.preflight.hardware import (
    GPU_ENVIRONMENT,
    OBJECT_STORE,
    Hardware,
    describe,
    detect_local,
    object_store_warning,
    require_float8,
    resolve_auto,
    resolve_checkpointing,
    worker_environment,
)
from crosslmm.preflight.placement import NodePool

H100 = Hardware("NVIDIA H100", memory_bytes=85e9, bf16=True, float8=True, torchao=True, nccl="2.27.3")
A100 = Hardware("NVIDIA A100-SXM4-80GB", memory_bytes=85e9, bf16=True, torchao=True, nccl="2.27.3")
V100 = Hardware("Tesla V100", memory_bytes=16.9e9, bf16=False, nccl="2.27.3")
AUTO = ("--train.precision=auto", "--model.attention=auto")


def run(*overrides):
    return parse_run(list(overrides), "")


@pytest.mark.parametrize(
    ("store_sizes", "warned"),
    # The blocks take 1.7 GB; two nodes of each size in units of 0.1 GB, None for an unknown size.
    [((8,), True), ((4, 3), True), ((9,), False), ((4, 5), False), ((4, None), False)],
)
def test_small_object_stores_are_warned_about(store_sizes, warned, monkeypatch):
    pools = [
        NodePool(2, {"CPU": 1} | ({} if size is None else {OBJECT_STORE: size * 10**8}), {}) for size in store_sizes
    ]
    monkeypatch.setattr(placement, "node_pools", lambda config: pools)
    warning = object_store_warning(run("--data.num_frames=256"), 448, None)
    assert bool(warning) is warned
    if warning:
        assert f"the object stores hold {2 * sum(store_sizes) / 10:.1f} GB: Ray will spill to disk" in warning


@pytest.mark.parametrize(
    ("use_gpu", "hardware", "precision", "attention"),
    [
        ("false", Hardware(), "fp32", "sdpa"),
        ("true", H100, "bf16", "sdpa"),
        ("true", V100, "fp32", "sdpa"),
    ],
)
def test_auto_is_resolved_by_the_hardware(use_gpu, hardware, precision, attention):
    config = resolve_auto(run(*AUTO, f"--scaling.use_gpu={use_gpu}"), hardware)
    assert (config.train.precision, config.model.attention) == (precision, attention)
    assert resolve_auto(config, V100) == config
    line = describe(config, hardware)
    assert f"{precision}, {attention}" in line
    assert "\n" not in line


def test_explicit_settings_are_kept():
    config = run("--scaling.use_gpu=true", "--train.precision=fp32", "--model.attention=eager")
    assert resolve_auto(config, H100) == config
    with pytest.raises(BadConfig, match=r"flash_attention_2, which needs .*precision bf16"):
        resolve_auto(
            run("--scaling.use_gpu=true", "--train.precision=auto", "--model.attention=flash_attention_2"), V100
        )


FP8 = ("--train.float8=true", "--scaling.use_gpu=true", "--train.precision=auto")


@pytest.fixture
def torchao(monkeypatch):
    """Return a function that installs torchao or not."""
    find = importlib.util.find_spec
    return lambda spec: monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: spec if name == "torchao" else find(name, *more)
    )


def test_float8_needs_torchao_and_a_gpu_that_has_it(torchao):
    torchao(None)  # on the driver, which needs none
    config = resolve_auto(run(*FP8), H100)
    require_float8(config, H100)
    assert "FP8 in training" in describe(config, H100)
    with pytest.raises(BadConfig, match=r"^train\.float8: NVIDIA A100.* no FP8; .*H100.*set train\.float8 to false$"):
        require_float8(config, A100)
    with pytest.raises(BadConfig, match=r"float8: it needs train\.precision bf16; .*train\.float8 to false$"):
        resolve_auto(run(*FP8), V100)
    with pytest.raises(BadConfig, match=r"^train\.float8: torchao is not installed beside the GPU; .*extra fp8"):
        require_float8(config, dataclasses.replace(H100, torchao=False))
    without = resolve_auto(run("--train.precision=auto", "--scaling.use_gpu=true"), A100)
    require_float8(without, A100)
    assert "FP8" not in describe(without, A100)


def test_cpus_emulate_float8_and_say_that_it_is_slow(torchao, caplog):
    torchao(object())
    require_float8(run("--train.float8=true", "--train.precision=bf16"), Hardware())
    assert "CPUs emulate FP8" in caplog.text
    assert "slower" in caplog.text
    torchao(None)
    with pytest.raises(BadConfig, match=r"^train\.float8: torchao is not installed here; .*extra fp8"):
        require_float8(run("--train.float8=true", "--train.precision=bf16"), Hardware())


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_float8_is_detected_by_the_compute_capability(capability, has, monkeypatch, torchao):
    torchao(object())
    properties = SimpleNamespace(total_memory=85e9)
    for name, value in {
        "is_available": True, "get_device_capability": capability, "get_device_name": "a GPU",
        "get_device_properties": properties,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    assert detect_local() == Hardware("a GPU", memory_bytes=85e9, bf16=True, float8=has, torchao=True, nccl="2.27.3")


def test_a_resume_on_other_hardware_shows_the_changed_precision():
    config = run(*AUTO, "--scaling.use_gpu=true")
    before, now = (resolve_auto(config, gpu).model_dump(mode="json") for gpu in (H100, V100))
    assert changes(before, now) == {"train.precision": ("bf16", "fp32")}


def test_gpu_presets_use_auto_and_the_laptop_preset_does_not():
    for name in ("paper-2b", "paper-7b"):
        assert name in preset_names()
        config = run(f"--config={name}", "--config=stage-1")
        assert (config.train.precision, config.model.attention, config.in_bf16) == ("auto", "auto", True)
    assert not run().in_bf16


@pytest.mark.parametrize("preset", [name for name in preset_names() if not name.startswith(("stage", "lora"))])
@pytest.mark.parametrize("hardware", [Hardware(), H100], ids=["CPUs", "GPU"])
def test_every_preset_can_be_described_before_its_recomputation_is_chosen(preset, hardware):
    """As jobs/tune.py and jobs/encode.py do: they leave `auto` to the trials, or need none."""
    try:
        config = run(f"--config={preset}", "--config=stage-1", f"--scaling.use_gpu={hardware is H100}".lower())
    except BadConfig:
        pytest.skip("not a preset of a model")
    assert describe(resolve_auto(config, hardware), hardware)


def test_the_users_gpu_environment_takes_precedence(monkeypatch):
    for name in GPU_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert worker_environment(run()) == {}
    assert worker_environment(run("--scaling.use_gpu=true")) == GPU_ENVIRONMENT
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert worker_environment(run("--scaling.use_gpu=true"))["NCCL_DEBUG"] == "INFO"


def test_what_is_recomputed_follows_from_the_memory_of_the_gpu(caplog):
    auto = run("--train.activation_checkpointing=auto", "--scaling.use_gpu=true")
    assert resolve_checkpointing(auto, H100).train.checkpointing == ("none", "none")
    assert "recomputation" not in describe(resolve_checkpointing(auto, H100), H100)
    tiny = dataclasses.replace(H100, memory_bytes=1e6)
    small = resolve_checkpointing(auto, tiny)
    assert small.train.checkpointing == ("full", "full")
    assert "a step needs" in caplog.text
    assert "recomputation: encoder full, decoder full" in describe(small, tiny)
    # No memory is known on CPUs, and what is explicit is kept.
    on_cpus = run("--train.activation_checkpointing=auto")
    assert resolve_checkpointing(on_cpus, Hardware()).train.checkpointing == ("none", "none")
    explicit = run("--train.activation_checkpointing={decoder: selective}")
    assert resolve_checkpointing(explicit, tiny) == explicit
    # A resume may choose anew.
    assert not changes(*(resolve_checkpointing(auto, gpu).model_dump(mode="json") for gpu in (H100, tiny)))
