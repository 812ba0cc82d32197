"""Ranks that deal their frames evenly for encoding learn what one process learns."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from crosslmm.train import loop
from crosslmm.train.optim import build_optimizer
from tests.distributed.test_fsdp import forbid_pickles, leave, run_config, sharded
from tests.support.common import conversation, random_frames

FRAMES = (
    ((9, 2), (0, 0), (1, 0)),
    ((1, 1), (0, 30), (2, 2)),
    ((4, 4), (4, 4), (4, 4)),
    ((0, 0), (0, 1), (0, 0)),
)
"""Frames of each sample, by step and micro-batch: a rank or more of text only, equal ranks, and fewer frames than
ranks."""
SAMPLES = 6
RANKS = (1, 2, 3)
ARMS = {
    "trainable": ("--train.activation_checkpointing=true",),
    "frozen": ("--train.learning_rate.vision=0",),
    "off": ("--train.balance_frames=false",),
}
SETTING = (
    f"--train.global_batch_size={SAMPLES}", "--train.micro_batch_size=1", "--train.max_grad_norm=1000",
    "--model.pool_stride=8",
)  # fmt: skip


def micro_batches(processor, ranks: int, rank: int):
    """Yield this rank's micro-batches of two samples of each step. Three of them on two ranks: the second has one and
    repeats it."""
    for step, frames in enumerate(FRAMES):
        talks, videos = [], []
        for place, count in enumerate(itertools.chain.from_iterable(frames)):
            videos.append([random_frames(count, seed=100 * step + place)] if count else [])
            talks.append(conversation(f"Question {place}?", ["circle", "a red square"][place % 2], video=count > 0))
        starts = {1: [[0, 2, 4]], 2: [[0, 2], [4]], 3: [[0], [2], [4]]}[ranks][rank]
        yield [processor(talks[start : start + 2], videos[start : start + 2]) for start in starts]


def train(rank: int, folder: Path) -> None:
    """Train on one rank, on two and on three, as far as this rank takes part."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", category=UserWarning, module=r"torch\.distributed\.fsdp.*")
    forbid_pickles()
    for ranks in RANKS[rank:]:
        method = f"file://{folder}/rendezvous-{ranks}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
        arms = [arm for arm in ARMS if arm != "off" or ranks == 3]
        seen = {arm: train_arm(run_config(ranks, *SETTING, *ARMS[arm]), ranks, rank) for arm in arms}
        torch.save(seen, folder / f"{rank}-of-{ranks}.pt")
        if ranks < max(RANKS):
            dist.destroy_process_group()
    leave()


def train_arm(config, ranks: int, rank: int) -> dict:
    """Return the metrics of each step, its gradients, and the frames that this rank encoded in each pass."""
    model, processor = sharded(config, 0.3)
    optimizer = build_optimizer(model, config.train)
    seen: dict = {"metrics": [], "gradients": [], "encoded": []}

    def count(module, args):
        (x_FPD,) = args
        seen["encoded"].append(len(x_FPD))

    def keep_gradients(*_):
        learning = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        seen["gradients"].append({name: parameter.grad.full_tensor() for name, parameter in learning})

    class RecordingCallbacks(loop.Callbacks):
        def log(self, step, metrics):
            seen["metrics"].append(metrics)

    model.vision_tower.encoder.layers[0].register_forward_pre_hook(count)
    optimizer.register_step_pre_hook(keep_gradients)
    steps = (loop.StepBatch(micro, []) for micro in micro_batches(processor, ranks, rank))
    loop.train(config, model, optimizer, steps, range(len(FRAMES)), RecordingCallbacks())
    return seen


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    torch.multiprocessing.spawn(train, (folder,), nprocs=max(RANKS))
    return {ranks: [torch.load(folder / f"{rank}-of-{ranks}.pt") for rank in range(ranks)] for ranks in RANKS}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("arm", ["trainable", "frozen"])
def test_losses_and_gradients_equal_those_of_one_process(by_ranks, ranks, arm):
    one, several = by_ranks[1][0][arm], by_ranks[ranks][0][arm]
    assert len(one["gradients"]) == len(several["gradients"]) == len(FRAMES)
    for step in range(len(FRAMES)):
        for metric in ("loss", "grad_norm"):
            assert several["metrics"][step][metric] == pytest.approx(one["metrics"][step][metric], rel=1e-5)
        of_encoder = [name for name in one["gradients"][step] if name.startswith("vision_tower.")]
        assert bool(of_encoder) == (arm != "frozen")
        for name, gradient in one["gradients"][step].items():
            torch.testing.assert_close(several["gradients"][step][name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arm", ARMS)
def test_ranks_encode_equal_numbers_of_frames(by_ranks, arm):
    encoded = [of_rank[arm]["encoded"] for of_rank in by_ranks[3]]
    metrics = [metrics["frame_imbalance"] for metrics in by_ranks[3][0][arm]["metrics"]]
    if arm == "off":
        # A rank without frames encodes a black one.
        assert list(zip(*encoded, strict=True)) == [(11, 1, 1), (2, 30, 4), (8, 8, 8), (1, 1, 1)]
        assert metrics == pytest.approx([11 / 4, 30 / 12, 1, 3])
    else:
        assert list(zip(*encoded, strict=True)) == [(4, 4, 4), (12, 12, 12), (8, 8, 8), (1, 1, 1)]
        assert metrics == pytest.approx([1, 1, 1, 3])
