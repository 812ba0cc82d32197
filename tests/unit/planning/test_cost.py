"""The planner's counts, compared with the built model, torch's FLOP counter and the paper's tables."""

import contextlib
import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.flop_counter import FlopCounterMode

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, LearningRates, NodeType
from crosslmm.model.loading import build_config
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import component_of, fsdp_units
from crosslmm.planning import cost, meta_trace, peak_memory
from crosslmm.planning import plan as planning
from crosslmm.planning.assumptions import GPUS, Assumptions
from crosslmm.planning.meta_trace import trace
from crosslmm.planning.plan import Fit, plan
from crosslmm.train.distributed.parallel import parallelize
from tests.support.common import random_frames

JOB = Path(__file__).parents[3] / "jobs" / "plan.py"
FRAMES = (32, 64, 128, 256)


@pytest.fixture
def measured():
    """A small model whose four kinds of memory differ."""
    rates = [f"--train.learning_rate.{part}=1e-3" for part in ("vision", "projector", "v2v", "t2v", "decoder")]
    return parse_run([*rates, "--train.global_batch_size=2", "--train.micro_batch_size=1"], "")


def memory(config, frames=8, text_tokens=40, sharded=True):
    return peak_memory.training_memory(config, peak_memory.training_trace(config, frames, text_tokens), sharded)


def changed(config, section, **values):
    part = getattr(config, section)
    return config.model_copy(update={section: part.model_copy(update=values)})


# Counts


def test_parameter_counts_match_the_built_model(config, model):
    counts = cost.parameters(cost.meta_model(config.model))
    for component, count in counts.items():
        assert count == sum(p.numel() for name, p in model.named_parameters() if component_of(name) == component)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_components_with_a_learning_rate_are_trainable():
    counts = {"vision": 1, "projector": 10, "v2v": 100, "t2v": 1000, "decoder": 10000}
    assert cost.trainable(counts, LearningRates(projector=1e-3, v2v=1e-3)) == 110
    assert cost.trainable(counts, LearningRates(vision=1, projector=0, v2v=0, t2v=1, decoder=1)) == 11001


@torch.no_grad()
@pytest.mark.parametrize("stamp_tokens", [0, 3])
def test_macs_are_half_the_flops_torch_counts_in_a_prefill(config, model, processor, stamp_tokens):
    frames, text_tokens = 5, 7
    macs = cost.macs(cost.meta_model(config.model), frames, text_tokens, stamp_tokens)
    frame = [5] * stamp_tokens + [processor.video_token_id] * model.config.tokens_per_frame
    model.set_attn_implementation("eager")  # its products are plain matrix products, which the counter knows
    with FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.tensor([frame * frames + [5] * text_tokens]),
            pixel_values=torch.from_numpy(random_frames(frames)).permute(0, 3, 1, 2),
            num_frames=torch.tensor([[frames]]),
            logits_to_keep=text_tokens,
        )
    flops = counter.get_flop_counts()
    aten = torch.ops.aten
    result = dict.fromkeys(("encoder", "projector", "decoder", "cross_attention", "attention_products"), 0)
    for name, module in model.named_modules():
        operators = flops.get(f"{type(model).__name__}.{name}", {})
        if isinstance(module, nn.Linear | nn.Conv2d):
            part = {"vision": "encoder", "v2v": "cross_attention", "t2v": "cross_attention"}
            part = part.get(component_of(name), component_of(name))
            result[part] += sum(operators.get(f, 0) for f in (aten.mm, aten.addmm, aten.convolution)) // 2
        if name.endswith((".self_attn", ".v2v", ".t2v")):
            result["attention_products"] += operators[aten.bmm] // 2
    assert result == dataclasses.asdict(macs)


@pytest.mark.parametrize(
    ("preset", "paper", "derived"),
    [
        ("paper-2b", (10.93, 21.77, 43.46, 86.82), (10.44, 20.79, 41.48, 82.87)),  # Table 6
        ("paper-7b", (13.17, 25.92, 51.43, 102.42), (13.57, 26.71, 52.98, 105.52)),  # Figure 4
    ],
)
def test_linear_macs_match_the_paper_within_5_percent(preset, paper, derived):
    model = cost.meta_model(parse_run(["--config", preset], "").model)
    result = [cost.macs(model, frames, 60).linear / 1e12 for frames in FRAMES]
    assert result == pytest.approx(paper, rel=0.05)
    assert result == pytest.approx(derived, abs=0.005)


def test_macs_with_attention_products_of_the_2b():
    model = cost.meta_model(parse_run(["--config", "paper-2b"], "").model)
    macs = [cost.macs(model, frames, 60) for frames in FRAMES]
    total = [(m.linear + m.attention_products) / 1e12 for m in macs]
    assert total == pytest.approx((11.7, 23.6, 48.3, 101.3), abs=0.05)


def test_parameters_and_trainable_parameters_match_the_paper():
    config = parse_run(["--config", "paper-2b"], "")
    parameters = plan(config, [1], Assumptions()).parameters
    assert parameters.total == pytest.approx(2.04e9, rel=0.005)
    assert parameters.trainable["stage-1"] == pytest.approx(42.7e6, rel=0.002)
    assert parameters.trainable["stage-2"] == parameters.total


# Traces and memory


def test_trace_is_exact_to_the_byte():
    with torch.device("meta"):
        layers = nn.Sequential(nn.Linear(10, 100, bias=False), nn.ReLU(), nn.Linear(100, 7, bias=False))
        x = torch.empty(50, 10)
    traced = trace(lambda: layers(x).sum().backward(), list(layers.parameters()), [x], vocabulary=7, fused_norm=False)
    hidden, logits, scalars = 50 * 100 * 4, 50 * 7 * 4, 8
    # The peak is in ReLU's backward: its output (saved by both neighbours), its output gradient and input gradient; the
    # loss and its gradient. By then the second layer has its gradient, and the logits are freed.
    highest = traced.peak(with_kept=True)
    assert sum(highest) == x.nbytes + 3 * hidden + scalars + 100 * 7 * 4
    assert (highest.kept, highest.logits) == (100 * 7 * 4, logits)
    assert sum(traced.peak(with_kept=False)) == x.nbytes + 3 * hidden + scalars
    assert traced.kept_bytes == (10 * 100 + 100 * 7) * 4
    assert traced.flops == 2 * 50 * (2 * (10 * 100 + 100 * 7) + 100 * 7)  # x needs no gradient


def test_traced_prefill_flops_match_the_counted_macs():
    config = parse_run(["--config", "paper-2b"], "")
    model = cost.meta_model(config.model)
    macs = cost.macs(model, 32, 60)
    batch = peak_memory._batch(model, 1, 32, 60, 0)
    with torch.no_grad():
        traced = peak_memory._trace(model, config, batch, lambda: model(**batch, logits_to_keep=60) and None)
    assert traced.flops / 2 == pytest.approx(macs.linear + macs.attention_products, rel=0.002)


def test_flash_attention_stores_no_queries_times_keys(measured):
    frames = 48
    with_flash = memory(measured, frames).activations
    eager = memory(changed(measured, "model", attention="eager"), frames).activations
    patches, pooled = frames * 64, frames * 16
    assert eager - with_flash > 4 * 4 * patches * pooled  # four heads of one V2V, in float32
    assert memory(measured, 2 * frames).activations < 2.1 * with_flash


def test_checkpointing_saves_memory_and_adds_compute(measured):
    plain, checkpointed = (
        peak_memory.training_trace(changed(measured, "train", activation_checkpointing=on), 16, 40)
        for on in (False, True)
    )
    assert sum(checkpointed.peak(with_kept=False)) < 0.7 * sum(plain.peak(with_kept=False))
    assert 1.2 * plain.flops < checkpointed.flops < 1.4 * plain.flops


def test_frozen_components_have_no_gradients_or_moments(measured):
    rates = LearningRates(projector=1e-3, v2v=0, t2v=0, decoder=0, vision=0)
    config = changed(measured, "train", learning_rate=rates)
    projector = cost.parameters(cost.meta_model(config.model))["projector"]
    result = memory(config, sharded=False)
    assert result.gradients <= 4 * projector
    assert 8 * projector <= result.optimizer <= 12 * projector
    assert result.activations < memory(measured, sharded=False).activations


def test_adapters_take_the_memory_of_what_learns(measured):
    targets = ["vision", "v2v", "t2v", "decoder"]
    lora = measured.train.lora.model_copy(update={"rank": 2, "targets": targets})
    config = changed(measured, "train", lora=lora)
    learning, total = cost.learning(config), cost.learning(measured)
    assert learning < 0.15 * total
    result, whole = memory(config, sharded=False), memory(measured, sharded=False)
    assert 8 * learning <= result.optimizer <= 12 * learning
    assert result.gradients <= 4 * learning
    assert result.weights == pytest.approx(
        whole.weights + 4 * (learning - cost.parameters(cost.meta_model(config.model))["projector"])
    )
    stored = [
        plan(one, [4], Assumptions(samples=1, video_seconds=1e-6)).rows[0].storage_bytes for one in (config, measured)
    ]
    assert stored[0] == pytest.approx(4 * total + measured.train.keep_checkpoints * 12 * learning, rel=0.01)
    assert stored[1] == pytest.approx(4 * total + measured.train.keep_checkpoints * 12 * total, rel=0.01)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parallelize_shards_exactly_the_fsdp_units(measured, one_process_group):
    """`parallelize` wraps the list that the planner counts with, and the root; the list is every layer and branch."""

    def build(weights):
        return CrossLMMForConditionalGeneration(build_config(measured.model, video_token_id=0))

    model = parallelize(build, measured.train, torch.device("cpu"))
    names = {module: name for name, module in model.named_modules()}
    sharded = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert sharded == {names[unit] for unit in fsdp_units(model)} | {""}
    unit = re.compile(r"vision_tower\.encoder\.layers\.\d+|language_model\.model\.layers\.\d+(\.v2v|\.t2v)?")
    layers = {match[0] for name, _ in model.named_parameters() if (match := unit.match(name))}
    assert sharded == layers | {""}


def test_twice_the_workers_halve_the_shards(measured):
    def shards(workers):
        config = changed(changed(measured, "scaling", num_workers=workers), "train", global_batch_size=workers)
        return memory(config)

    two, four, total = shards(2), shards(4), sum(cost.parameters(cost.meta_model(measured.model)).values())
    assert two.weights - four.weights == pytest.approx(total, rel=0.01)  # 4 bytes each, a half less a quarter
    assert two.gradients - four.gradients == pytest.approx(total, rel=0.01)
    assert two.activations == four.activations


@pytest.fixture
def on_nodes(measured):
    """Four workers with two micro-batches each, on nodes of two GPUs."""
    config = changed(measured, "train", global_batch_size=8, learning_rate=LearningRates(vision=0, v2v=1e-3, t2v=0))
    kinds = [
        NodeType(most=2, resources={"GPU": 2}, labels={"role": "train"}),
        NodeType(most=1, resources={"GPU": 1}, labels={"role": "serve"}),
        NodeType(most=1, resources={"CPU": 9}, labels={"role": "train"}),
    ]
    return changed(config, "scaling", num_workers=4, train_on={"role": "train"}, node_types=kinds)


def test_hybrid_shards_are_those_of_a_node(on_nodes):
    within = changed(on_nodes, "scaling", workers_per_replica=2)
    assert memory(within) == memory(changed(within, "scaling", num_workers=2, workers_per_replica=None))


def test_a_copy_in_each_node_is_recommended_where_it_fits(on_nodes, monkeypatch, capsys):
    """Weights of the frozen encoder are gathered once, those of the root too, and those of T2V, whose gates are closed,
    never."""
    model = cost.meta_model(on_nodes.model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = {name: size for name, size in sizes.items() if ".layers." in name}
    t2v, encoder = (sum(size for name, size in layers.items() if part in name) for part in (".t2v.", "vision_tower."))
    gathered = sum(sizes.values()) - t2v + sum(layers.values()) - t2v - encoder
    learning = cost.learning(on_nodes)

    (row,) = plan(on_nodes, [4], Assumptions()).rows
    hybrid = row.hybrid
    assert (hybrid.nodes, hybrid.gpus_per_node, hybrid.micro_batches) == (2, 2, 2)
    assert hybrid.received_bytes == 2 * 4 * (gathered + learning) // 2
    assert hybrid.received_bytes_hybrid == 2 * 4 * learning // 2
    within = changed(on_nodes, "scaling", workers_per_replica=2)
    assert hybrid.peak_memory_bytes == memory(within, 4, 60).total > row.peak_memory_bytes

    def recommended(config, memory_bytes=80e9, **assumed):
        monkeypatch.setitem(GPUS, "h100", GPUS["h100"]._replace(memory_bytes=memory_bytes))
        return plan(config, [4], Assumptions(reserve=0, **assumed)).rows[0].hybrid is not None

    assert recommended(on_nodes, hybrid.peak_memory_bytes)
    assert not recommended(on_nodes, hybrid.peak_memory_bytes - 1)
    assert not recommended(within)
    assert not recommended(changed(on_nodes, "scaling", workers_per_replica=4))
    assert not recommended(on_nodes, gpus_per_node=4)
    assert not recommended(on_nodes, gpus_per_node=3)
    anywhere = changed(on_nodes, "scaling", node_types=[])
    assert not recommended(anywhere)
    assert recommended(anywhere, gpus_per_node=2)


def test_the_job_says_what_to_set_and_why(run_job):
    _, out, _ = run_job("--config=tiny", "--frames=2,4", "--gpus=4", "--train.micro_batch_size=2", "--gpus_per_node=2")
    said = " ".join(out.split())
    assert "2 nodes of 2 GPUs: --scaling.workers_per_replica 2 gives each a copy of the model; 4 frames take" in said
    assert said.count("--scaling.workers_per_replica") == 1


def test_larger_shards_are_given_up_first_where_they_do_not_fit(on_nodes, monkeypatch):
    within = changed(on_nodes, "scaling", workers_per_replica=2)
    needed = [memory(config, 4, 60).total for config in (within, on_nodes)]
    monkeypatch.setitem(planning.GPUS, "l4", GPUS["l4"]._replace(memory_bytes=sum(needed) / 2))
    (row,) = plan(within, [4], Assumptions(gpu="l4", reserve=0)).rows
    assert row.nearest_fit == Fit("--scaling.workers_per_replica null", needed[1])


def test_more_micro_batches_need_no_more_memory(measured):
    assert memory(changed(measured, "train", global_batch_size=8)) == memory(measured)


def test_bf16_halves_activations_and_keeps_float32_moments(measured):
    half = memory(changed(measured, "train", precision="bf16"))
    full = memory(measured)
    assert half.activations < 0.75 * full.activations
    assert half.optimizer == full.optimizer


def test_answering_counts_the_caches_of_decoder_and_video(measured):
    result = peak_memory.answering_memory(measured, frames=8, text_tokens=40)
    positions, originals, kv_width, layers = 8 * 16 + 40, 8 * 64, 2 * 32, 4
    assert result.kv_caches >= 2 * 4 * kv_width * (layers * positions + 2 * originals)
    assert result.gradients == result.optimizer == 0


# Plans and the job


def test_every_gpu_is_a_choice_of_the_argument():
    assert set(Assumptions.model_json_schema()["properties"]["gpu"]["enum"]) == set(GPUS)


def test_nearest_setting_that_fits_is_reported(measured, monkeypatch):
    config = changed(measured, "train", micro_batch_size=8, global_batch_size=16)
    needed = [memory(changed(config, "train", micro_batch_size=size), 4, 60).total for size in (8, 4, 2)]
    monkeypatch.setitem(planning.GPUS, "l4", GPUS["l4"]._replace(memory_bytes=(needed[0] + needed[1]) / 2))
    (row,) = plan(config, [4], Assumptions(gpu="l4", reserve=0)).rows
    assert not row.fits
    assert row.nearest_fit == Fit("--train.micro_batch_size 4", needed[1])


def test_time_price_and_bandwidth_follow_from_the_assumptions(measured):
    assumed = Assumptions(gpu="h100", price=2.0, hfu=0.5, samples=1000, video_seconds=31, bitrate=8e6)
    (row,) = plan(measured, [4], assumed).rows
    seconds = row.training_flops_per_sample / (0.5 * GPUS["h100"].flops["fp32"])
    workers, epochs = measured.scaling.num_workers, measured.train.epochs
    assert row.samples_per_s == pytest.approx([1 / seconds] * 2)
    assert row.decode_cores == pytest.approx([0.5 / seconds] * 2)  # 31 s of video at 62 s a second
    assert row.s3_bytes_per_s == pytest.approx([31e6 / seconds] * 2)
    samples = min(epochs * 1000, measured.train.max_steps * 2)
    hours = samples * seconds / workers / 3600
    assert row.run_hours == pytest.approx([hours] * 2)
    assert row.price.gpus == pytest.approx([hours * workers * 2.0] * 2)
    assert row.storage_bytes > 1000 * 31e6
    # Without other prices given: S3 Standard's, within its region.
    assert row.price.reading == pytest.approx(samples * (4 + 6) / 1000 * 0.0004)
    assert row.price.storage_month == pytest.approx(row.storage_bytes / 1e9 * 0.023)
    spent = row.price.gpus.low + row.price.reading + row.price.storage_month * hours / 730
    assert row.price.total == pytest.approx([spent] * 2)


def test_traffic_and_storage_are_priced_by_their_arguments(measured):
    prices = {"storage_price": 0.1, "traffic_price": 0.09, "request_price": 0.0, "samples": 1000, "bitrate": 8e6}
    (row,) = plan(changed(measured, "train", max_steps=None), [4], Assumptions(**prices)).rows
    assert row.price.reading == pytest.approx(measured.train.epochs * 1000 * 60e6 / 1e9 * 0.09)
    assert row.price.storage_month == pytest.approx(row.storage_bytes / 1e9 * 0.1)
    assert row.features_bytes == 1000 * 4 * 64 * 64 * 2  # 8 x 8 patches of 64 values in bf16


def test_hours_and_price_range_with_the_utilisation(measured):
    def row(hfu):
        return plan(measured, [4], Assumptions(hfu=hfu)).rows[0]

    low, high, both = row(0.2), row(0.4), row((0.2, 0.4))
    assert both.samples_per_s == pytest.approx((low.samples_per_s.low, high.samples_per_s.low))
    assert both.run_hours == pytest.approx((high.run_hours.low, low.run_hours.low))
    assert both.price.total == pytest.approx((high.price.total.low, low.price.total.low))
    hours = plan(measured, [4], Assumptions()).rows[0].run_hours
    assert hours.high / hours.low == pytest.approx(0.3 / 0.14)


@pytest.fixture
def run_job(monkeypatch, capsys):
    """Run the script in this process; return exit status, stdout and stderr."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(JOB), *argv])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(JOB), run_name="__main__")
        return exit_info.value.code, *capsys.readouterr()

    return run


def test_job_prints_only_json_with_json_flag():
    argv = ["--config=tiny", "--frames=2,4", "--gpus=4", "--train.micro_batch_size=2", "--json"]
    done = subprocess.run([sys.executable, JOB, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert [row["frames"] for row in out["rows"]] == [2, 4]
    parts = {"encoder", "projector", "decoder", "cross_attention", "attention_products"}
    for row in out["rows"]:
        assert set(row["macs"]) == parts
        assert all(isinstance(count, int) for count in [*row["macs"].values(), *row["memory_bytes"].values()])
        assert sum(row["memory_bytes"].values()) == row["peak_memory_bytes"]
    assert out["gpus"] == 4
    assert out["parameters"]["trainable"]["stage-1"] < out["parameters"]["total"]


def test_a_plan_in_float8_says_that_it_is_one_in_bf16(run_job):
    _, in_bf16, _ = run_job("--config=tiny", "--train.precision=bf16", "--json")
    _, in_float8, _ = run_job("--config=tiny", "--train.precision=bf16", "--train.float8=true", "--json")
    assert json.loads(in_float8) == json.loads(in_bf16) | {"float8": True}
    _, table, _ = run_job("--config=tiny", "--train.precision=bf16", "--train.float8=true")
    assert "train.float8: planned as in bf16" in table
    _, table, _ = run_job("--config=tiny", "--train.precision=bf16")
    assert "float8" not in table


def test_job_prints_a_table_and_the_assumptions(run_job):
    status, out, _ = run_job("--config", "tiny")
    assert status == 0
    for words in (
        "attention products",
        "KV caches",
        "--hfu [0.14, 0.3]",
        " to ",
        "not in the price",
        "--decode_speed 62.0",
        "fits",
    ):
        assert words in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--frames", "32,x"], "--frames 32,x"),
        (["--frames", "0"], "at least 1"),
        (["--frames", "10000"], "max_position_embeddings"),
        (["--gpu", "abacus"], "h100"),
        (["--gpus", "7"], "multiple of 7"),
        (["--price", "-1"], "greater than 0; got: -1"),
        (["--hfu", "[0.4,0.2]"], "is not [low, high]"),
        (["--hfu", "2"], "hfu"),
        (["--hfuu", "0.5"], "did you mean hfu?"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(run_job, argv, words):
    status, out, error = run_job(*argv)
    assert (status, out) == (2, "")
    assert len(error.splitlines()) == 1
    assert words in error


def test_zero_frames_or_text_tokens_are_refused(config):
    model = cost.meta_model(config.model)
    for frames, text_tokens in ((0, 5), (5, 0)):
        with pytest.raises(BadConfig, match="at least 1"):
            cost.macs(model, frames, text_tokens)


@pytest.mark.parametrize("names", ["paper-2b", "paper-2b stage-2"])
def test_running_identical_layers_once_gives_the_same_trace(names, monkeypatch):
    arguments = [f"--config={name}" for name in names.split()]
    config = parse_run([*arguments, "--train.activation_checkpointing=full"], "")
    once = peak_memory.training_trace(config, 12, 20), peak_memory.answering_memory(config, 12, 20)
    monkeypatch.setattr(meta_trace, "_run_once", lambda *_: contextlib.nullcontext())
    each = peak_memory.training_trace(config, 12, 20), peak_memory.answering_memory(config, 12, 20)
    assert once[0].peak(with_kept=True) == each[0].peak(with_kept=True)
    assert (once[0].flops, once[1]) == (each[0].flops, each[1])
