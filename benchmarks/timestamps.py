"""Questions about when: the time of each frame in the prompt, rotary positions over frames, and neither.

    python -m benchmarks.timestamps [--json]   a table, and as its last line one JSON object: about 4 minutes on two
                                               cores

A shape flashes up once in a clip whose frames are shown for one, two or three seconds each, and the question is when.
Who knows the frame, but not its time, guesses among three answers. All arms are the preset `tiny` at one token per
frame, from the same random weights, see the same clips in the same order, and are trained by the project's own loss and
optimizer: what differs are `data.timestamps` and `model.cross_attention_rotary`. The clips are real H.264 files, and
the times are those that decoding reports.
"""

import argparse
import functools
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from rich.table import Table
from torch import nn

from benchmarks import report
from crosslmm import scoring
from crosslmm.cli import parse_run
from crosslmm.config import DataConfig, RunConfig
from crosslmm.data.collate import Sample, collate, collate_questions
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import Manifest
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples import moments
from crosslmm.data.video.decode import decode_video
from crosslmm.model.generation import greedy_answers
from crosslmm.model.loading import build_model, build_processor
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.train.optim import build_optimizer, set_learning_rate

ARMS: dict[str, dict[str, Any]] = {
    "neither": {},
    "rotary": {"model.cross_attention_rotary": True},
    "timestamps": {"data.timestamps": True},
}
TRAIN_CLIPS, HELD_OUT_CLIPS, STEPS = 3000, 300, 300
LEAST_WITH, MAX_WITHOUT = 0.9, moments.CHANCE + 0.1
"""Accuracy that the arm with times reaches, and that no arm without them exceeds."""


def main() -> None:
    """Train the arms and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps of each arm [{STEPS}]")
    arguments = parser.parse_args()
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        # One thread each: two on two busy cores spin.
        ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        moments.write_moments(folder, TRAIN_CLIPS, HELD_OUT_CLIPS)
        results = dict(zip(ARMS, pool.map(train_arm, [folder] * 3, ARMS, [arguments.steps] * 3), strict=True))
    figures = {arm: result["accuracy"] for arm, result in results.items()} | {"chance": moments.CHANCE}
    detail = {"seconds": time.perf_counter() - began, "arms": results}
    report("timestamps", _table(results), figures, detail, arguments.json)


def configure(arm: str) -> RunConfig:
    """Return the configuration of an arm."""
    settings = {"model.vision.patch_size": 12, "model.pool_stride": 4, "data.num_frames": moments.FRAMES} | ARMS[arm]
    return parse_run([f"--{key}={json.dumps(value)}" for key, value in settings.items()], "")


def train_arm(folder: str, arm: str, steps: int) -> dict[str, float]:
    """Train one arm; return the exact match of its greedy answers about held-out clips, and its last losses."""
    config = configure(arm)
    processor = build_processor(config.model, config.data)
    model = build_model(config.model, processor, config.seed)
    optimizer = build_optimizer(model, config.train)
    rows = samples(folder, "train")
    order = DeterministicSampler((len(rows),), config.train.global_batch_size, config.seed)
    losses = []
    for step in range(steps):
        set_learning_rate(optimizer, step, steps, config.train)
        places = np.arange(step * order.global_batch_size, (step + 1) * order.global_batch_size)
        loss = model(**collate([rows[i] for i in order.rows_at(places)[0]], processor)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    limit = answer_limit(Manifest(f"{folder}/held_out.jsonl"), processor)
    require_room = functools.partial(processor.require_room, new_tokens=limit)
    outcomes: list[scoring.Outcome] = []
    held_out = samples(folder, "held_out")
    for start in range(0, len(held_out), 50):
        for part in collate_questions(held_out[start : start + 50], processor, require_room):
            outcomes += part.outcomes(greedy_answers(model.eval(), processor, part.prompts(), limit))
    return {"accuracy": float(scoring.score(outcomes).overall.share), "loss": float(np.mean(losses[-50:]))}


@functools.cache
def samples(folder: str, split: str) -> list[Sample]:
    """Return the rows of a manifest with their frames and the times of these, decoded once per process."""
    data = DataConfig(num_frames=moments.FRAMES)
    rows = []
    for row in Manifest(f"{folder}/{split}.jsonl").rows:
        video = cast(SampledFrames, decode_video(row["videos"][0], data, 48))  # written a moment ago
        fields = {key: row[key] for key in ("manifest", "line", "id", "messages", "kind")}
        times = [video.times.tolist()]
        rows.append(Sample(0, videos=[video.images], weight=1.0, error=None, times=times, **fields))
    return rows


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table("arm", "accuracy", "limit", "loss", title=f"When? Exact match on {HELD_OUT_CLIPS} held-out clips")
    for arm, result in results.items():
        value, stamped = result["accuracy"], arm == "timestamps"
        missed = value < LEAST_WITH if stamped else value > MAX_WITHOUT
        limit = f"{'>=' if stamped else '<='} {LEAST_WITH if stamped else MAX_WITHOUT:.3f}"
        table.add_row(arm, f"{value:.3f}", f"{limit}{'  MISSED' if missed else ''}", f"{result['loss']:.3f}")
    table.caption = f"who knows the frame and guesses its time reaches {moments.CHANCE:.3f}"
    return table


if __name__ == "__main__":
    main()
