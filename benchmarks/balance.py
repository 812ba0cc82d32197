"""Count the frames that each rank encodes, before and after they are dealt: python -m benchmarks.balance [--json].

Videos have 8 to 512 frames (uniform in the logarithm). Eight ranks: 1,000 passes of one video each, planned by the
function that training plans with. One, two and three gloo ranks: tiny models train three steps of six videos through
`crosslmm.train.loop`, with and without `train.balance_frames`, and a hook counts what enters the encoder. FSDP makes
all ranks wait for the most loaded one, so the imbalance is its frames over the mean, summed over passes. Limits:
`imbalance` 1.1; `loss_difference` to one process 1e-5. Two core minutes.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from benchmarks import report
from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train.distributed.frame_exchange import even_loads, plan_transfers
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.loop import Callbacks, Metrics, StepBatch, train
from crosslmm.train.optim import build_optimizer

LIMITS = {"imbalance": 1.1, "loss_difference": 1e-5}
FEWEST, MOST = 8, 512
PASSES, PLANNED_RANKS = 1000, 8
RANKS = (1, 2, 3)
STEPS, VIDEOS = 3, 6


def main() -> None:
    """Plan, train, count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    measured = {f"{PLANNED_RANKS} ranks, planned": planned()}
    with tempfile.TemporaryDirectory(prefix="balance-") as folder:
        torch.multiprocessing.spawn(train_rank, (folder,), nprocs=max(RANKS))  # type: ignore[attr-defined]
        alone, *several = (
            [json.loads((Path(folder) / f"{rank}-of-{ranks}.json").read_text()) for rank in range(ranks)]
            for ranks in RANKS
        )
    for of_ranks in several:
        measured[f"{len(of_ranks)} ranks, trained"] = compared(of_ranks, alone[0]["even"]["losses"])
    table = Table(title=f"frames of the most loaded rank over the mean; videos of {FEWEST} to {MOST} frames")
    for heading in ("ranks", "before", "after", "most in a pass: before", "after", "frames moved", "loss difference"):
        table.add_column(heading, justify="left" if heading == "ranks" else "right")
    for name, row in measured.items():
        table.add_row(
            name, f"{row['imbalance_before']:.3f}", against_limit(row, "imbalance", ".3f"),
            f"{row['most_before']:.3f}", f"{row['most']:.3f}", f"{row['moved_share']:.0%}",
            against_limit(row, "loss_difference", ".1e") if "loss_difference" in row else "",
        )  # fmt: skip
    figures = {
        name: max(row[name] for row in measured.values() if name in row)
        for name in ("imbalance_before", "imbalance", "loss_difference")
    }
    report("balance", table, figures, measured, arguments.json)


def against_limit(row: dict[str, float], name: str, form: str) -> str:
    """Return a figure beside its limit."""
    missed = "" if row[name] <= LIMITS[name] else " MISSED"
    return f"{row[name]:{form}} (limit {LIMITS[name]:g}){missed}"


def draw(random: np.random.Generator, count: int) -> list[int]:
    """Return numbers of frames."""
    return np.exp(random.uniform(np.log(FEWEST), np.log(MOST + 1), count)).astype(int).tolist()


def planned() -> dict[str, float]:
    """Return the imbalance of passes of eight ranks that are only planned."""
    random = np.random.default_rng(0)
    passes = [draw(random, PLANNED_RANKS) for _ in range(PASSES)]
    return imbalances(passes, [even_loads(frames) for frames in passes])


def imbalances(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return imbalances, over all passes and in the worst one, and the share of frames that move.

    Args:
        before, after: frames of each rank, pass by pass.
    """

    def over_mean(passes: Sequence[Sequence[int]]) -> float:
        return sum(map(max, passes)) * len(passes[0]) / sum(map(sum, passes))

    moved = sum(transfer.frames for frames in before for transfer in plan_transfers(frames))
    return {
        "imbalance_before": over_mean(before),
        "imbalance": over_mean(after),
        "most_before": max(over_mean([frames]) for frames in before),
        "most": max(over_mean([frames]) for frames in after),
        "moved_share": moved / sum(map(sum, before)),
    }


def compared(ranks: list[Any], losses: list[float]) -> dict[str, float]:
    """Return the imbalances that ranks counted, and how far their losses are from those of one process."""
    before, after = (
        list(zip(*(of_rank[arm]["encoded"] for of_rank in ranks), strict=True)) for arm in ("uneven", "even")
    )
    apart = [abs(loss - alone) for loss, alone in zip(ranks[0]["even"]["losses"], losses, strict=True)]
    return {**imbalances(before, after), "loss_difference": max(apart)}


def train_rank(rank: int, folder: str) -> None:
    """Train with frames as they come (uneven) and dealt evenly (even), on one rank, two and three, as far as this
    rank takes part, and write the records."""
    torch.set_num_threads(1)
    for ranks in RANKS[rank:]:
        method = f"file://{folder}/rendezvous-{ranks}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
        recorded = {
            arm: train_arm(build_run(ranks, f"--train.balance_frames={balanced}"))
            for arm, balanced in {"uneven": "false", "even": "true"}.items()
        }
        (Path(folder) / f"{rank}-of-{ranks}.json").write_text(json.dumps(recorded))
        dist.destroy_process_group()


def build_run(ranks: int, *overrides: str) -> RunConfig:
    """Return a run of tiny models with one token per frame."""
    return parse_run(
        [
            "--config=tiny", "--model.pool_stride=8", f"--data.num_frames={MOST}", f"--scaling.num_workers={ranks}",
            f"--train.global_batch_size={VIDEOS}", "--train.micro_batch_size=1", "--train.warmup_steps=1", *overrides,
        ],
        "",
    )  # fmt: skip


def train_arm(config: RunConfig) -> dict[str, list[Any]]:
    """Return the losses of the steps, and the frames that entered this rank's encoder in each pass."""
    processor = build_processor(config.model)

    def build(weights: bool) -> CrossLMMForConditionalGeneration:
        model = build_model(config.model, processor, config.seed)
        for name, parameter in model.named_parameters():
            if name.endswith(".gate"):  # closed at first, so that the cross-attentions would add nothing to the loss
                torch.nn.init.constant_(parameter, 0.3)
        return model

    model: Any = parallelize(build, config.train, torch.device("cpu"))
    encoded: list[int] = []
    model.vision_tower.encoder.layers[0].register_forward_pre_hook(lambda layer, inputs: encoded.append(len(inputs[0])))
    callbacks = _Losses()
    train(config, model, build_optimizer(model, config.train), _batches(processor), range(STEPS), callbacks)
    return {"losses": callbacks.losses, "encoded": encoded}


class _Losses(Callbacks):
    """Collects the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def log(self, step: int, metrics: Metrics) -> None:
        self.losses.append(metrics["loss"])


def _batches(processor: CrossLMMProcessor) -> Iterator[StepBatch]:
    """Yield this rank's share of each step, one video a micro-batch."""
    random, side, share = np.random.default_rng(1), processor.image_size, VIDEOS // dist.get_world_size()
    question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which way does it move?"}]}
    for _ in range(STEPS):
        videos = [random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8) for frames in draw(random, VIDEOS)]
        answers = [["left", "right"][random.integers(2)] for _ in videos]
        micro = [
            processor([[question, {"role": "assistant", "content": answer}]], [[video]])
            for video, answer in zip(videos, answers, strict=True)
        ]
        first = dist.get_rank() * share
        yield StepBatch(micro[first : first + share], [])


if __name__ == "__main__":
    main()
