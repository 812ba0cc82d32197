"""What the backward pass recomputes: counted, chosen by the GPU's memory, and never a change of the gradients."""

import math

import pytest

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.planning import checkpointing, cost, peak_memory
from crosslmm.planning.assumptions import GPUS, Assumptions, find_gpu
from crosslmm.planning.plan import plan
from crosslmm.planning.utilisation import Utilisation

FRAMES, TEXT = 4, 40
RATES = [f"--train.learning_rate.{part}=1e-3" for part in ("vision", "projector", "v2v", "t2v", "decoder")]


def run(*overrides):
    small = ["--train.micro_batch_size=1", "--train.global_batch_size=4", f"--data.num_frames={FRAMES}"]
    return parse_run([*RATES, *small, "--train.activation_checkpointing=auto", *overrides], "")


def chosen(config, available=math.inf):
    return checkpointing.choose(config, available).config.train.checkpointing


@pytest.fixture(scope="module")
def peaks():
    """The memory of a step by pair of parts, with the text of `choose`."""

    def peak(encoder, decoder):
        config = run(f"--train.activation_checkpointing={{encoder: {encoder}, decoder: {decoder}}}")
        traced = peak_memory.training_trace(config, FRAMES, checkpointing.LONG_TEXT)
        return peak_memory.training_memory(config, traced).total

    return [peak(*pair) for pair in checkpointing.BY_COST]


def test_the_cheapest_that_fits_is_chosen(peaks):
    assert peaks[-1] == min(peaks)
    for available in (max(peaks), sorted(peaks)[4], peaks[-1]):
        first = next(i for i, needed in enumerate(peaks) if needed <= available)
        assert chosen(run(), available) == checkpointing.BY_COST[first]
    # Where nothing fits, the smallest is the best that can be had.
    assert checkpointing.choose(run(), 1).needed_bytes == peaks[-1]
    assert chosen(run(), 1) == ("full", "full")


def test_an_elastic_run_chooses_for_its_fewest_workers(peaks):
    alone, two, elastic = (run(f"--scaling.num_workers={workers}") for workers in ("1", "2", "[1,2]"))
    needed = [checkpointing.choose(config, math.inf).needed_bytes for config in (alone, two, elastic)]
    assert needed[0] == needed[2] > needed[1]


def test_a_run_of_hybrid_shards_chooses_for_as_few_as_it_may_have():
    def needed(workers, per_replica="null"):
        config = run(f"--scaling.num_workers={workers}", f"--scaling.workers_per_replica={per_replica}")
        return checkpointing.choose(config, math.inf).needed_bytes

    assert needed(4, 2) == needed(2) > needed(4)
    assert needed("[1,2]", 2) == needed(1)


def test_what_is_recomputed_is_counted_beside_the_model():
    def flops(how):
        traced = peak_memory.training_trace(run(f"--train.activation_checkpointing={how}"), FRAMES, TEXT)
        return traced.flops - traced.recomputed_flops, traced.recomputed_flops

    model, nothing = flops("none")
    assert nothing == 0
    # No matrix product is repeated, so selective checkpointing costs no FLOPs that are counted.
    assert flops("selective") == (model, 0)
    same_model, recomputed = flops("full")
    assert same_model == model
    assert 0.2 * model < recomputed < 0.4 * model  # a forward pass is a third of the work


def test_a_frozen_encoder_is_left_alone_and_compiled_blocks_are_whole():
    assert chosen(run("--train.learning_rate.vision=0"), 1) == ("none", "full")
    # Selective checkpointing would fit, but is refused.
    compiled = run("--train.compile=true")
    selective = run("--train.activation_checkpointing=selective")
    needed = peak_memory.training_memory(
        selective, peak_memory.training_trace(selective, FRAMES, checkpointing.LONG_TEXT)
    ).total
    assert "selective" in chosen(run(), needed)
    assert "selective" not in chosen(compiled, needed)
    with pytest.raises(BadConfig, match="a compiled block is recomputed as a whole"):
        run("--train.activation_checkpointing=selective", "--train.compile=true")


def test_the_plan_says_what_it_chose_and_both_utilisations(peaks, monkeypatch):
    config = run()
    for memory, fits in ((max(peaks), True), (1e6, False)):
        monkeypatch.setitem(GPUS, "l4", GPUS["l4"]._replace(memory_bytes=memory))
        (row,) = plan(config, [FRAMES], Assumptions(gpu="l4", reserve=0, text_tokens=TEXT, hfu=0.4)).rows
        assert row.fits == fits
        assert tuple(row.checkpointing.values()) == (("none", "none") if fits else ("full", "full"))
        flops = row.training_flops_per_sample, row.recomputed_flops_per_sample
        assert row.hfu == (0.4, 0.4)
        assert row.mfu.low == pytest.approx(0.4 * flops[0] / sum(flops))


def test_utilisation_follows_from_the_speed():
    config = run("--train.activation_checkpointing=full", "--train.precision=bf16", f"--data.num_frames={FRAMES}")
    (row,) = plan(config, [FRAMES], Assumptions(gpu="h100")).rows
    of_run = Utilisation.of(config, "NVIDIA H100 80GB HBM3")
    frames_per_s = 4 * 0.25 * GPUS["h100"].flops["bf16"] / row.training_flops_per_sample * FRAMES  # of four GPUs
    at = of_run.at(frames_per_s, 4)
    assert at["mfu"] == pytest.approx(0.25, rel=1e-6)
    assert at["hfu"] == pytest.approx(
        0.25 * (1 + row.recomputed_flops_per_sample / row.training_flops_per_sample), rel=1e-6
    )
    assert Utilisation.of(config, None) is None
    assert Utilisation.of(config, "Abacus 9000") is None


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA H200", "h200"), ("NVIDIA GeForce RTX 4090", "rtx-4090"),
     ("NVIDIA L40S", "l40s"), ("Tesla V100", None),
     ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
)  # fmt: skip
def test_the_driver_s_name_of_a_gpu_is_known(device, name):
    assert find_gpu(device) == (GPUS[name] if name else None)


def test_the_longest_sample_is_within_the_decoder_s_context():
    config = run("--data.num_frames=100000")
    frames, text, stamp = cost.longest_sample(config, 512, 7)
    model = cost.meta_model(config.model)
    cost.check_lengths(model, frames, text, stamp)
    with pytest.raises(BadConfig):
        cost.check_lengths(model, frames + 1, text, stamp)
