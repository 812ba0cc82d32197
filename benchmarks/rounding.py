"""Accuracy that training loses when frozen features are rounded: the second half of `benchmarks.sweep`.

Models of the `tiny-sweep` preset are trained in this process on the sample set, from float32, bf16 and int8 features.
All share the encoder and its features; the seed fixes the other initial weights and the order of samples.
"""

import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import BatchFeature

from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.data.feature_format import DType, from_bf16, pack, to_bf16, unpack
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import Manifest
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples import shapes
from crosslmm.data.video.decode import decode_video
from crosslmm.model.generation import greedy_answers
from crosslmm.model.loading import build_encoder, build_model, build_processor
from crosslmm.model.param_groups import freeze
from crosslmm.model.vision_encoder import encode
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.scoring import Outcome, is_right, questions_of, score
from crosslmm.train.optim import build_optimizer, set_learning_rate

ROOT = Path(__file__).parent.parent
DTYPES: tuple[DType, ...] = ("bf16", "int8")
FORMATS = ("float32", *DTYPES)
SEEDS = (0, 1, 2)
SPLITS = ("train", "held_out")


def accuracy_by_format() -> dict[str, list[float]]:
    """Return the exact-match accuracy of models trained from features of each format, one value a seed."""
    data = str(ROOT / "runs" / "sample")
    shapes.sample_manifests(data)
    # One thread each: more threads than free cores waste time in spin locks.
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="sweep-") as folder,
        ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        list(pool.map(encode_split, [data] * 2, SPLITS, [folder] * 2))
        runs = {
            (feature_format, seed): pool.submit(train, data, folder, feature_format, seed)
            for seed in SEEDS
            for feature_format in FORMATS
        }
        for (feature_format, seed), future in runs.items():
            print(f"from {feature_format}, seed {seed}: accuracy {future.result():.3f}", file=sys.stderr, flush=True)
        return {name: [runs[name, seed].result() for seed in SEEDS] for name in FORMATS}


def configure(seed: int) -> RunConfig:
    """Return the configuration of the `tiny-sweep` preset."""
    return parse_run(["--config=tiny", "--config=tiny-sweep", f"--seed={seed}"], "")


def encode_split(data: str, split: str, folder: str) -> None:
    """Encode a split's clips with the encoder of seed 0 and save float32 (clips, frames, patches, width)."""
    config = configure(seed=0)
    processor = build_processor(config.model)
    tower = build_encoder(config.model, processor, config.seed).requires_grad_(False)
    features = []
    for row in Manifest(f"{data}/{split}.jsonl").rows:
        video = cast("SampledFrames", decode_video(row["videos"][0], config.data, processor.image_size))
        pixels = torch.from_numpy(video.images).permute(0, 3, 1, 2).contiguous()
        features.append(encode(tower, pixels, config.model.encoder_chunk).numpy())
    np.save(f"{folder}/{split}.npy", np.stack(features))


def rounded(x_FPD: np.ndarray, feature_format: str) -> np.ndarray:
    """Return a video's features as training reads them from storage in this format, float32; "float32" is exact."""
    if feature_format == "float32":
        return np.array(x_FPD)
    dtype = cast("DType", feature_format)
    return from_bf16(unpack(pack(x_FPD, dtype), x_FPD.shape, dtype))


def train(data: str, folder: str, feature_format: str, seed: int) -> float:
    """Train from features of this format with the project's sampler, loss and optimizer, and return the accuracy.

    Accuracy is the exact match of greedy answers about held-out clips, from features of the same format. The seed fixes
    everything but the encoder.
    """
    config = configure(seed)
    steps, batch = cast("int", config.train.max_steps), config.train.global_batch_size
    processor = build_processor(config.model)
    rows = {split: Manifest(f"{data}/{split}.jsonl").rows for split in SPLITS}
    features = {split: [rounded(x, feature_format) for x in np.load(f"{folder}/{split}.npy", "r")] for split in SPLITS}
    model = build_model(config.model, processor, config.seed)
    freeze(model, config.train.learning_rate)
    optimizer = build_optimizer(model, config.train)
    order = DeterministicSampler((len(rows["train"]),), batch, config.seed)
    for step in range(steps):
        set_learning_rate(optimizer, step, steps, config.train)
        chosen, weights = order.rows_at(np.arange(step * batch, (step + 1) * batch))
        messages = [rows["train"][i]["messages"] for i in chosen]
        model(**_inputs(processor, messages, [features["train"][i] for i in chosen], weights=weights)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    limit = answer_limit(Manifest(f"{data}/held_out.jsonl"), processor)
    asked = [question for row in rows["held_out"] for question in questions_of(row["messages"])]  # one of each clip
    outcomes: list[Outcome] = []
    for start in range(0, len(asked), 32):
        part = slice(start, start + 32)
        prompts = _inputs(
            processor, [prompt for prompt, _ in asked[part]], features["held_out"][part], for_generation=True
        )
        answers = greedy_answers(model, processor, BatchFeature(prompts), limit)
        outcomes += [
            (None, is_right(answer, reference)) for answer, (_, reference) in zip(answers, asked[part], strict=True)
        ]
    return score(outcomes).overall.share


def _inputs(processor: Any, messages: list[Any], features: list[np.ndarray], **options: Any) -> dict[str, Any]:
    """Return a batch with float32 features, so all formats take the same path through the model."""
    batch = processor(messages, [[to_bf16(x)] for x in features], features=features[0].shape[1:], **options)
    return {**batch, "features": torch.from_numpy(np.concatenate(features))}


def lost(accuracy: dict[str, list[float]]) -> dict[str, float]:
    """Return the accuracy that each format loses against float32 features, mean over the seeds."""
    reference = statistics.mean(accuracy["float32"])
    return {f"accuracy_lost_{dtype}": reference - statistics.mean(accuracy[dtype]) for dtype in DTYPES}
