"""Tiny models that learn to find needles, in one process."""

from pathlib import Path

import numpy as np
import torch

from crosslmm.cli import parse_run
from crosslmm.data.samples import needles
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import freeze
from crosslmm.train.optim import build_optimizer, set_learning_rate
from tests.support.exports import save_exported

STEPS, BATCH, FRAMES = 300, 32, 4
SETTINGS = {
    "model.vision.patch_size": 8, "model.pool_stride": 6, "model.language.max_position_embeddings": 4096,
    "train.learning_rate.vision": 0, "train.learning_rate.decoder": 2e-3, "train.warmup_steps": 20,
    "data.num_frames": FRAMES,
}  # fmt: skip
"""One token per frame, and a frozen random encoder: the tint of a frame hides a plate from the pooled token."""
WITH = {"train.learning_rate.v2v": 3e-3, "train.learning_rate.t2v": 3e-3}
WITHOUT = {"model.cross_attention_every": 0, "train.learning_rate.v2v": 0, "train.learning_rate.t2v": 0}


def train_and_export(folder: Path, cross_attention: bool) -> Path:
    """Train a model on generated needles for a minute or two, and write it as a run does."""
    arguments = SETTINGS | (WITH if cross_attention else WITHOUT)
    config = parse_run([f"--{key}={value}" for key, value in arguments.items()], "")
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=0).train()
    freeze(model, config.train.learning_rate)
    optimizer = build_optimizer(model, config.train)
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        set_learning_rate(optimizer, step, STEPS, config.train)
        examples = [example(rng, int(rng.integers(2, FRAMES + 1)), 1 + i % 2) for i in range(BATCH)]
        messages, videos = [row for row, _ in examples], [[video] for _, video in examples]
        model(**processor(messages, videos, weights=np.ones(BATCH))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    save_exported(folder, model.eval(), processor, config)
    return folder


def example(rng: np.random.Generator, frames: int, hops: int):
    """A conversation about needles, and its video."""
    video = needles.haystack(int(rng.integers(2**31)), range(frames), 48)
    colours = [str(colour) for colour in rng.choice(needles.NEEDLES, hops, replace=False)]
    for place, colour in zip(np.sort(rng.choice(frames, hops, replace=False)), colours, strict=True):
        video[place] = needles.insert(video[place], colour, rng)
    question, answer = needles.question(colours)
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": answer}], video
