"""The paper's Table 2a on data that needs fine detail: no cross-attention, T2V, V2V and both, one token per frame.

    python -m benchmarks.ablation [--json]           a table, and as its last line one JSON object: about 25 minutes on
                                                     two cores; interrupted, the same command resumes
    python -m benchmarks.ablation --prepare FOLDER   only clips, encoder and settings for a sweep (docs/sweeps.md)

Real handwritten digits stand small on plates of four colours, each for a moment, and the question is about the red one:
pooled tokens tell which digits a frame shows, but not which of them is red (guessing among the digits of a clip is
right in 0.325 of cases). The vision encoder is frozen, as in the paper's first stage. It is not a published one: it is
first trained to name, patch by patch, the digits and colours of still frames, from the training digits alone. All arms
start from that encoder and see the same clips in the same order. Projector, decoder and cross-attentions start from
random weights, and are trained by the project's own loss and optimizer.
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from rich.table import Table
from torch import Tensor, nn
from transformers import SiglipVisionModel

import crosslmm
from benchmarks import report
from crosslmm import scoring
from crosslmm.cli import parse_run
from crosslmm.config import DataConfig, RunConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import Manifest
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples import digits, shapes
from crosslmm.data.video.decode import decode_video
from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.generation import greedy_answers
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import freeze
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.scoring import Outcome, is_right, questions_of
from crosslmm.sweep.resume import nest_keys
from crosslmm.train.optim import build_optimizer, learning_rate_factor, set_learning_rate

ARMS = {"none": (), "T2V": ("t2v",), "V2V": ("v2v",), "both": ("v2v", "t2v")}
# Table 2a: VideoMME and MVBench with one token a frame.
PAPER = {"none": (47.2, 47.5), "T2V": (47.3, 47.7), "V2V": (48.4, 48.9), "both": (48.7, 49.9)}
SEEDS = (0, 1, 2)
TRAIN_CLIPS, HELD_OUT_CLIPS = 3000, 500
ENCODER_STEPS, ARM_STEPS = 3000, 800
NAMES = (10 + 1, len(digits.PLATES) + 1)
"""What the encoder learns to tell apart: digits and ground, colours and ground."""

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "ablation"


def main() -> None:
    """Run the arms that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument(
        "--prepare",
        metavar="FOLDER",
        type=Path,
        help="write its clips, its encoder and sweep.yaml into FOLDER, and stop",
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    if arguments.prepare:
        print(json.dumps(prepare(arguments.prepare)))
        return
    folder = FOLDER / _digest()
    # One thread each: two on two busy cores spin.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        encoder_digits = pool.submit(load_or_measure, folder / "encoder.json", prepare, folder).result()
        runs = {
            (arm, seed): pool.submit(load_or_measure, folder / f"{arm}-{seed}.json", train_arm, folder, arm, seed)
            for seed in SEEDS
            for arm in ARMS
        }
        results = {run: future.result() for run, future in runs.items()}
    figures = {arm: statistics.mean(results[arm, seed]["accuracy"] for seed in SEEDS) for arm in ARMS}
    figures |= {"both_minus_none": figures["both"] - figures["none"], "chance": digits.CHANCE}
    detail = {
        "seconds": time.perf_counter() - began,
        "encoder": encoder_digits,
        "runs": [{"arm": arm, "seed": seed, **result} for (arm, seed), result in results.items()],
    }
    report("ablation", _table(results, encoder_digits), figures, detail, arguments.json)
    # Stored results serve an interrupted run; the next run measures again.
    shutil.rmtree(FOLDER)


def _digest() -> str:
    """Return a digest of the sources, so that no stored result of an older model is ever reported."""
    package = Path(crosslmm.__file__).parent
    sources = [Path(__file__), *package.rglob("*.py"), *package.rglob("*.yaml")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]


def load_or_measure(file: Path, measure: Any, *arguments: Any) -> dict[str, Any]:
    """Return the result in `file`, or measure and write it."""
    if not file.exists():
        result = measure(*arguments)
        print(f"{file.stem}: {json.dumps(result)}", flush=True)
        file.write_text(json.dumps(result))
    return json.loads(file.read_text())


def prepare(folder: Path) -> dict[str, Any]:
    """Write the clips, the trained encoder, and `sweep.yaml`; return what `train_encoder` measured."""
    if not (folder / "held_out.jsonl").exists():
        digits.write_digits(str(folder), TRAIN_CLIPS, HELD_OUT_CLIPS)
    measured = train_encoder(folder)
    every = ARM_STEPS // 4
    settings = {key: value for key, value in settings_of("both").items() if not key.startswith("model.vision.")} | {
        "model.vision": None,  # as the weights say
        "model.vision_weights": str(folder.absolute() / "encoder"),
        "data.manifest": str(folder.absolute() / "train.jsonl"),
        "data.validation_manifest": str(folder.absolute() / "held_out.jsonl"),
        "train.epochs": -(-ARM_STEPS * 32 // TRAIN_CLIPS),
        "train.max_steps": ARM_STEPS,
        "train.validate_every": every,
        "train.checkpoint_every": every,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(nest_keys(settings)))
    return measured


def settings_of(arm: str) -> dict[str, Any]:
    """Return what an arm changes in the preset `tiny`: 8 x 8 patches, one token per frame, a frozen encoder."""
    rates = {"vision": 0, "projector": 1e-3, "decoder": 1e-3} | {b: 3e-3 * (b in ARMS[arm]) for b in ("v2v", "t2v")}
    return {
        "model.vision.image_size": shapes.SIDE,
        "model.vision.patch_size": 8,
        "model.pool_stride": 8,
        "model.v2v": "v2v" in ARMS[arm],
        "model.t2v": "t2v" in ARMS[arm],
        "data.num_frames": 4,
        "train.global_batch_size": 32,
        "train.learning_rate": rates,
    }


def configure(arm: str, seed: int) -> RunConfig:
    """Return the configuration of an arm."""
    settings = settings_of(arm) | {"seed": seed}
    return parse_run([f"--{key}={json.dumps(value)}" for key, value in settings.items()], "")


def train_encoder(folder: Path) -> dict[str, Any]:
    """Train the encoder of all arms and save it as a SigLIP; return its accuracy on patches of held-out digits."""
    config = configure("none", seed=0)
    model = build_model(config.model, build_processor(config.model), config.seed)
    width = model.config.vision_config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(NAMES)))
    optimizer = torch.optim.AdamW([*model.vision_tower.parameters(), *head.parameters()], weight_decay=0.01)
    known = digits.load_digits()
    rng = np.random.default_rng(1)
    for step in range(ENCODER_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor(step, ENCODER_STEPS, config.train)
        pixels, digit, colour = stills(rng, known["train"], 32)
        digit_logits, colour_logits = head(model.encode(pixels)).split(NAMES, dim=-1)
        loss = nn.functional.cross_entropy(digit_logits.flatten(0, 1), digit.flatten())
        loss = loss + nn.functional.cross_entropy(colour_logits.flatten(0, 1), colour.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        pixels, digit, _ = stills(rng, known["held_out"], 256)
        right = head(model.encode(pixels)).split(NAMES, dim=-1)[0].argmax(dim=-1) == digit
    published = SiglipVisionModel(model.config.vision_config)
    published.load_state_dict(model.vision_tower.state_dict())
    published.save_pretrained(folder / "encoder")
    return {"patches_named": float(right[(digit >= 0) & (digit < 10)].float().mean())}


def stills(rng: np.random.Generator, known: digits.Digits, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw frames with one to nine plates.

    Returns:
        uint8 (count, 3, SIDE, SIDE), and int64 (count, patches) each: the digit and the colour that a patch shows, one
        more of either where it shows ground, and -100 where it shows less than a third of a patch of plate.
    """
    edges = np.arange(0, shapes.SIDE, 8)
    frames, labels = [], np.empty((2, count, 8, 8), dtype=np.int64)
    labels[0], labels[1] = NAMES[0] - 1, NAMES[1] - 1
    for i in range(count):
        (frame,) = digits.empty(rng, 1)
        for corner in digits.plate_corners(rng, int(rng.integers(1, 10))):
            digit, colour = rng.integers(len(known.labels)), rng.integers(len(digits.PLATES))
            drawn = digits.plate(known.images[digit], digits.PLATES[colour])
            y, x = (slice(start, start + len(drawn)) for start in corner)
            frame[y, x] = drawn
            rows, columns = (np.clip(np.minimum(s.stop, edges + 8) - np.maximum(s.start, edges), 0, 8) for s in (y, x))
            covered = np.outer(rows, columns)
            labels[:, i, covered > 0] = -100
            labels[:, i, covered > 64 / 3] = [[known.labels[digit]], [colour]]
        frames.append(frame)
    digit, colour = torch.from_numpy(labels).flatten(2)
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous(), digit, colour


def train_arm(folder: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; return the exact match of its greedy answers about held-out clips, and its gates at the end."""
    config = configure(arm, seed)
    processor = build_processor(config.model)
    with_encoder = config.model.model_copy(update={"vision_weights": str(folder / "encoder")})
    model = build_model(with_encoder, processor, config.seed)
    freeze(model, config.train.learning_rate)
    optimizer = build_optimizer(model, config.train)
    rows, videos = clips(folder, "train", config.data.num_frames)
    order = DeterministicSampler((len(rows),), config.train.global_batch_size, config.seed)
    losses = []
    for step in range(ARM_STEPS):
        set_learning_rate(optimizer, step, ARM_STEPS, config.train)
        places = np.arange(step * order.global_batch_size, (step + 1) * order.global_batch_size)
        sample_rows, weights = order.rows_at(places)
        messages = [rows[i]["messages"] for i in sample_rows]
        loss = model(**_inputs(processor, messages, [videos[i] for i in sample_rows], weights=weights)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    gates = {name: float(p.detach().tanh()) for name, p in model.named_parameters() if name.endswith(".gate")}
    return {**score(model.eval(), processor, folder, config), "loss": statistics.mean(losses[-50:]), "gates": gates}


def score(
    model: CrossLMMForConditionalGeneration, processor: CrossLMMProcessor, folder: Path, config: RunConfig
) -> dict[str, float]:
    """Return the exact match of greedy answers on held-out clips, which have one question each: all of them, and those
    about late digits."""
    rows, videos = clips(folder, "held_out", config.data.num_frames)
    limit = answer_limit(Manifest(str(folder / "held_out.jsonl")), processor)
    asked = [(prompt, reference) for row in rows for prompt, reference in questions_of(row["messages"])]
    outcomes: list[Outcome] = []
    for start in range(0, len(asked), 50):
        part = slice(start, start + 50)
        prompts = _inputs(processor, [prompt for prompt, _ in asked[part]], videos[part], for_generation=True)
        answers = greedy_answers(model, processor, prompts, limit)
        outcomes += [
            (row["kind"], is_right(answer, reference))
            for row, answer, (_, reference) in zip(rows[part], answers, asked[part], strict=True)
        ]
    scored = scoring.score(outcomes)
    return {"accuracy": scored.overall.share, "late": scored.by_kind["late digit"].share}


def _inputs(processor: CrossLMMProcessor, messages: list[Any], videos: list[np.ndarray], **options: Any) -> Any:
    return processor(messages, [[video] for video in videos], **options)


@functools.cache
def clips(folder: Path, split: str, num_frames: int) -> tuple[list[dict], list[np.ndarray]]:
    """Return the rows of a manifest and their frames, decoded once per process."""
    rows = Manifest(str(folder / f"{split}.jsonl")).rows
    data = DataConfig(num_frames=num_frames)
    videos = [decode_video(row["videos"][0], data, shapes.SIDE) for row in rows]
    # All of them were written a moment ago.
    return rows, [video.images for video in cast("list[SampledFrames]", videos)]


def _table(results: dict[tuple[str, int], dict[str, Any]], encoder: dict[str, Any]) -> Table:
    table = Table("arm", *(f"seed {seed}" for seed in SEEDS), "mean", "from - to", "late", "paper: VideoMME / MVBench")
    for arm in ARMS:
        scores = [results[arm, seed]["accuracy"] for seed in SEEDS]
        late = statistics.mean(results[arm, seed]["late"] for seed in SEEDS)
        table.add_row(
            arm,
            *(f"{score:.3f}" for score in scores),
            f"{statistics.mean(scores):.3f}",
            f"{min(scores):.3f} - {max(scores):.3f}",
            f"{late:.3f}",
            "{} / {}".format(*PAPER[arm]),
        )
    table.caption = (
        f"exact match on {HELD_OUT_CLIPS} held-out clips, chance {digits.CHANCE:.3f}; late: digits of the last frames; "
        f"the frozen encoder names {encoder['patches_named']:.3f} of held-out patches"
    )
    return table


if __name__ == "__main__":
    main()
