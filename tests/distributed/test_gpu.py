"""Tests that need a GPU: CUDA kernels, NCCL, bf16, pinned memory, flash-attn. Run them with `make gpu`."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from crosslmm.cli import parse_run
from crosslmm.model.loading import build_model, build_processor
from crosslmm.preflight import hardware
from tests.distributed.test_fsdp import STEPS, STOP_AFTER, spawn, weights
from tests.support.common import ROOT, conversation, open_gates, random_frames

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")]
with_flash = pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
# Heads of 64 channels, a common size, so that the kernels of real models are used.
WIDE = ["--model.vision.hidden_size=256", "--model.language.hidden_size=256"]


@pytest.fixture
def padded():
    """Model, batch and prompts: conversations of different lengths, with 4, 2, no and 1 frames."""
    config = parse_run(["--model.vision.patch_size=8", "--model.pool_stride=3", *WIDE], "")
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=0)
    open_gates(model, 0.5)
    videos = [[random_frames(4, 1)], [random_frames(2, 2)], [], [random_frames(1, 3)]]
    questions = ["Which shape is it?", "Which way does it move, and what colour is it?", "What is red?", "Why?"]
    talks = [conversation(q, "red circle", video=bool(v)) for q, v in zip(questions, videos, strict=True)]
    prompts = processor([talk[:1] for talk in talks], videos, for_generation=True)
    return model.eval(), processor(talks, videos), prompts


def logits_and_gradients(model, batch, attention, dtype, device):
    """Logits at the labelled positions, and every parameter's gradient; float32 on the CPU."""
    model.set_attn_implementation(attention)
    model.to(device, dtype).zero_grad(set_to_none=True)
    batch = {name: value.to(device) for name, value in batch.items()}
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    model(**batch).loss.backward()
    gradients = {name: p.grad.float().cpu().clone() for name, p in model.named_parameters()}
    return logits[batch["labels"] != -100].detach().float().cpu(), gradients


def relative_error(ours, theirs):
    """||ours - theirs|| / ||theirs||."""
    return float((ours - theirs).norm() / theirs.norm())


def errors_against_cpu(model, batch, attention, dtype):
    """Relative errors of logits and gradients (as one vector) against float32 on the CPU."""
    right, right_gradients = logits_and_gradients(model, batch, "eager", torch.float32, "cpu")
    ours, gradients = logits_and_gradients(model, batch, attention, dtype, "cuda")
    assert ours.isfinite().all()
    flat = [torch.cat([g[name].flatten() for name in right_gradients]) for g in (gradients, right_gradients)]
    return relative_error(ours, right), relative_error(*flat)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float32_on_the_gpu_equals_the_cpu(padded, attention):
    logits, gradients = errors_against_cpu(*padded[:2], attention, torch.float32)
    assert logits < 1e-4
    assert gradients < 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa", pytest.param("flash_attention_2", marks=with_flash)])
def test_bf16_equals_float32_up_to_rounding(padded, attention):
    logits, gradients = errors_against_cpu(*padded[:2], attention, torch.bfloat16)
    assert logits < 3e-2
    assert gradients < 1e-1


@with_flash
def test_flash_attention_generates_like_sdpa(padded):
    """Greedy, with caches, left-padded prompts."""
    model, _, prompts = padded
    given = {name: value.cuda() for name, value in prompts.items()}
    model.to("cuda", torch.bfloat16)
    first, second, chosen = [], [], []
    for attention in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(attention)
        out = model.generate(
            **given, max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        first.append(out.logits[0].float())
        second.append(out.logits[1].float())
        chosen.append(out.sequences[:, -2])
    assert relative_error(first[1], first[0]) < 3e-2
    # The second token uses the caches; compare the samples whose first token was the same.
    alike = chosen[0] == chosen[1]
    assert alike.any()
    assert relative_error(second[1][alike], second[0][alike]) < 3e-2


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return spawn(1, folder, device="cuda"), folder


def test_training_over_nccl_equals_training_on_the_cpu(on_the_gpu, tmp_path):
    cpu = spawn(1, tmp_path / "cpu")
    assert sorted(on_the_gpu[0]) == list(range(1, STEPS + 1))
    for step, values in on_the_gpu[0].items():
        assert values == pytest.approx(cpu[step], rel=1e-3)


def test_resume_after_a_kill_equals_an_uninterrupted_run(on_the_gpu, tmp_path):
    """Up to the last bits: the order of CUDA's sums varies."""
    assert spawn(1, tmp_path / "killed", stop=True, device="cuda") == {}
    resumed = spawn(1, tmp_path / "killed", resume=True, device="cuda")
    assert sorted(resumed) == list(range(STOP_AFTER + 1, STEPS + 1))
    for step, values in resumed.items():
        assert values == pytest.approx(on_the_gpu[0][step], rel=1e-5)
    theirs = weights(on_the_gpu[1])
    for name, value in weights(tmp_path / "killed").items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)


def test_bf16_with_checkpointing_trains(on_the_gpu, tmp_path):
    half = ("--train.precision=bf16", "--train.activation_checkpointing=true")
    losses = spawn(1, tmp_path / "half", overrides=half, device="cuda")
    assert sorted(losses) == list(range(1, STEPS + 1))
    for step, (loss, _) in losses.items():
        assert loss == pytest.approx(on_the_gpu[0][step][0], rel=3e-2)


def test_float8_trains_like_bf16(tmp_path):
    """The numbers of tokens are not multiples of 16, and some steps have no videos."""
    pytest.importorskip("torchao")
    if not hardware.detect_local().float8:
        pytest.skip("the GPU has no FP8")
    bf16, float8 = (
        spawn(1, tmp_path / on, overrides=("--train.precision=bf16", f"--train.float8={on}"), device="cuda")
        for on in ("false", "true")
    )
    assert [loss for loss, _ in float8.values()] == pytest.approx([loss for loss, _ in bf16.values()], rel=3e-2)


def test_hardware_is_detected():
    detected = hardware.detect_local()
    assert detected.gpu == torch.cuda.get_device_name()
    assert detected.bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
    assert detected.float8 == (torch.cuda.get_device_capability() >= (8, 9))
    assert detected.nccl.count(".") == 2


def command(folder, name, *more):
    return [
        sys.executable, f"jobs/{name}.py", "--scaling.use_gpu=true", "--scaling.num_workers=1",
        "--train.precision=auto", "--model.attention=auto", f"--storage={folder}", f"--tracking.uri=sqlite:///{folder}/m.db",
        *more,
    ]  # fmt: skip


def job(folder, name, *more):
    """Run a job to its end; return its stdout."""
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command(folder, name, *more), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.timeout(1200)
def test_run_logs_its_hardware_stops_resumes_and_learns(tmp_path):
    run = ["--name=gpu", "--train.max_steps=200", "--train.validate_every=200"]
    with subprocess.Popen(command(tmp_path, "train", *run), cwd=ROOT, stdout=subprocess.PIPE, text=True) as stopped:
        output = "".join(itertools.takewhile(lambda line: " step " not in line, stopped.stdout))
        stopped.terminate()
        stopped.stdout.read()
    attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    assert f"{torch.cuda.get_device_name()}, bf16, {attention}, NCCL " in output
    assert stopped.returncode
    printed = job(tmp_path, "train", *run)
    assert "resumed after step " in printed
    outcome = json.loads(printed.strip().splitlines()[-1])
    assert outcome["steps"] == 200
    assert outcome["metrics"]["loss"] < 1.5  # from 6.1


@pytest.mark.timeout(1200)
def test_doctor_passes_on_the_gpu(tmp_path):
    assert "all checks passed" in job(tmp_path, "doctor", "--name=gpu")


@pytest.mark.timeout(1200)
def test_training_on_encoded_features(tmp_path):
    frozen = ["--train.learning_rate.vision=0", "--name=features"]
    encoded = json.loads(job(tmp_path, "encode", *frozen).strip().splitlines()[-1])
    printed = job(tmp_path, "train", *frozen, f"--data.features={encoded['folder']}", "--train.max_steps=20")
    assert json.loads(printed.strip().splitlines()[-1])["steps"] == 20
