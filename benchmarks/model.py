"""Compare CrossLMM with the LLaVA-OneVision of Transformers: python -m benchmarks.model [--json].

Both have the same encoder (27 x 27 patches), decoder and frames, and alternate within one run. Measured are prefill
time with and without the encoder, training step time, peak memory above the weights, and multiply-accumulates as the
paper counts them (linear layers, counted by torch on the running models). There are two ratios of encoder to decoder:
that of the 7B (a frame in the encoder costs 51 times a token in the decoder) and that of the 2B (254). Then, for
CrossLMM alone: the time per generated token with cached or recomputed keys and values of the videos, and the growth of
prefill time with the number of frames. Weights are random, which affects neither time nor memory. Fifteen minutes on
one core.
"""

import argparse
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from benchmarks import report
from crosslmm.cli import parse_run
from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration
from crosslmm.model.cache import recall, remember
from crosslmm.model.cross_attention import DualCrossAttentionLayer
from crosslmm.model.vision_encoder import in_chunks
from crosslmm.planning import cost

FRAMES = (8, 16, 32, 64)
STEP_FRAMES = (8, 16, 32)
TOKEN_FRAMES = (16, 64, 256)
GROWTH_FRAMES = (16, 32, 64, 128, 256)
ROUNDS = 3
TEXT = 60
PAPER = {"prefill_time_reduction": 0.487, "memory_reduction": 0.792, "macs_reduction": 0.748}
"""Averages of the paper over 32 to 256 frames, 7B (Figure 4): the limits to reach."""
SIDE, PATCH, GRID = 378, 14, 27
VISION = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH}


class Proportion(NamedTuple):
    """A decoder, and the cost of a frame in the encoder relative to a token in this decoder."""

    ratio: int
    width: int
    heads: int
    intermediate: int
    vocabulary: int
    """Vocabulary size, in the same ratio to the width as in Qwen."""


PROPORTIONS = {
    "7b": Proportion(51, 256, 8, 1352, 256 * 152_064 // 3584),
    "2b": Proportion(254, 128, 4, 512, 128 * 151_936 // 1536),
}
LAYERS, KV_HEADS = 8, 1


def decoder_macs(size: Proportion) -> int:
    """Count the multiply-accumulates of one token in the layers of the decoder."""
    kv = KV_HEADS * size.width // size.heads
    return LAYERS * (2 * size.width**2 + 2 * size.width * kv + 3 * size.width * size.intermediate)


def encoder_intermediate(size: Proportion) -> int:
    """Return the feed-forward width of the encoder that gives the ratio, including score and value products."""
    width, layers, patches = int(VISION["hidden_size"]), int(VISION["num_hidden_layers"]), GRID**2
    per_layer = size.ratio * decoder_macs(size) / layers
    return round((per_layer - 4 * patches * width**2 - 2 * patches**2 * width) / (2 * patches * width))


def configurations(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the vision and text configuration of both models, for a proportion or a preset."""
    if name not in PROPORTIONS:
        model = parse_run([f"--config={name}"], "").model
        assert model.vision is not None
        assert model.language is not None
        return {**model.vision, "image_size": SIDE}, model.language
    size = PROPORTIONS[name]
    text = {
        "model_type": "qwen2", "vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": LAYERS,
        "intermediate_size": size.intermediate, "num_attention_heads": size.heads, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 65536,
    }  # fmt: skip
    return {**VISION, "intermediate_size": encoder_intermediate(size)}, text


class Ours:
    """CrossLMM with 9 tokens per frame and K = 4."""

    name = "CrossLMM"

    def __init__(self, proportion: str, **settings: Any) -> None:
        vision, text = configurations(proportion)
        video = text["vocab_size"] - 1
        torch.manual_seed(0)
        self.model = CrossLMMForConditionalGeneration(
            CrossLMMConfig(vision_config=vision, text_config=text, video_token_id=video, **settings)
        ).eval()
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if key.endswith(".gate"):
                    parameter.fill_(0.5)

    def inputs(self, frames: int) -> dict[str, Tensor]:
        """Return the inputs for one video and 60 text tokens."""
        ids = torch.full((1, frames * self.model.config.tokens_per_frame + TEXT), 7)
        ids[:, :-TEXT] = self.model.config.video_token_id
        pixels = torch.zeros(frames, 3, SIDE, SIDE, dtype=torch.uint8)
        return {"input_ids": ids, "pixel_values": pixels, "num_frames": torch.tensor([[frames]])}

    def without_encoder(self, inputs: dict[str, Tensor]) -> Callable[[], None]:
        """Encode once and reuse the result, so that the encoder costs nothing; return a function that undoes this."""
        features = self.model.encode(inputs["pixel_values"])
        self.model.encode = lambda pixels: features
        return lambda: self.model.__dict__.pop("encode")


class Theirs:
    """LLaVA-OneVision of Transformers with its 196 tokens per frame."""

    name = "LLaVA-OneVision"

    def __init__(self, proportion: str) -> None:
        vision, text = configurations(proportion)
        video = text["vocab_size"] - 1
        torch.manual_seed(0)
        vision_config = {**vision, "model_type": "siglip_vision_model", "vision_use_head": False}
        config = LlavaOnevisionConfig(
            vision_config=vision_config, text_config=text, image_token_index=video - 1, video_token_index=video
        )
        self.model = LlavaOnevisionForConditionalGeneration(config).eval()

    def inputs(self, frames: int) -> dict[str, Tensor]:
        """Return the same inputs; LLaVA takes normalised float pixels, and one more token at the end of the video."""
        ids = torch.full((1, frames * 196 + 1 + TEXT), 7)
        ids[:, :-TEXT] = self.model.config.video_token_id
        return {"input_ids": ids, "pixel_values_videos": torch.zeros(1, frames, 3, SIDE, SIDE)}

    def without_encoder(self, inputs: dict[str, Tensor]) -> Callable[[], None]:
        """See `Ours.without_encoder`."""
        tower = self.model.model.vision_tower
        features = tower(inputs["pixel_values_videos"][0], output_hidden_states=True)
        tower.forward = lambda *_, **__: features
        return lambda: tower.__dict__.pop("forward")


def prefill(arm: Ours | Theirs, inputs: dict[str, Tensor], logits_to_keep: int = 1) -> None:
    """Run what generation computes before the first token."""
    arm.model(**inputs, use_cache=True, logits_to_keep=logits_to_keep)


def step(arm: Ours | Theirs, inputs: dict[str, Tensor]) -> None:
    """Run forward and backward with every parameter trainable and the text labelled."""
    labels = inputs["input_ids"].clone()
    labels[:, :-TEXT] = -100
    arm.model(**inputs, labels=labels, use_cache=False).loss.backward()
    arm.model.zero_grad(set_to_none=True)


def in_turns(works: Mapping[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Return the median time of each [s], alternating in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def linear_macs(arm: Ours | Theirs, inputs: dict[str, Tensor]) -> int:
    """Count the MACs of a prefill in linear layers and the patch convolution, as the paper does."""
    with FlopCounterMode(display=False) as counter:
        prefill(arm, inputs)
    return counter.get_total_flops() // 2


def attention_products(ours: Ours, theirs: Theirs, frames: int) -> dict[str, int]:
    """Count the MACs of all score and value products, which the paper omits; half of LLaVA's, which are causal.

    Those of the decoder of CrossLMM are counted in full; they are less than 1 % of its total.
    """
    config = theirs.model.config
    vision, text = config.vision_config, config.text_config
    encoder = 2 * frames * GRID**4 * vision.hidden_size * vision.num_hidden_layers
    positions = frames * 196 + 1 + TEXT
    decoder = positions**2 * text.hidden_size * text.num_hidden_layers
    return {"ours": cost.macs(ours.model, frames, TEXT).attention_products, "theirs": encoder + decoder}


def peak_memory(arm_name: str, proportion: str, frames: int, last_only: bool) -> int:
    """Return the peak memory of a prefill above the model, pixels included [bytes]. Run it in a new process."""
    torch.set_num_threads(1)
    arm = (Ours if arm_name == "ours" else Theirs)(proportion)
    keep = 1 if last_only else 0
    with torch.no_grad():
        prefill(arm, arm.inputs(1), keep)  # allocations that libraries make once
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
        prefill(arm, arm.inputs(frames), keep)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def compare(proportion: str) -> list[dict[str, Any]]:
    """Return one row per number of frames: times, memory and multiply-accumulates of both models."""
    ours, theirs = Ours(proportion), Theirs(proportion)
    for arm in (ours, theirs):
        prefill(arm, arm.inputs(1))  # warm-up
    rows = []
    for frames in FRAMES:
        row: dict[str, Any] = {"frames": frames}
        inputs = {"ours": ours.inputs(frames), "theirs": theirs.inputs(frames)}
        works = {
            "ours": functools.partial(prefill, ours, inputs["ours"]),
            "theirs": functools.partial(prefill, theirs, inputs["theirs"]),
        }
        row["prefill_s"] = in_turns(works)
        row["macs"] = {"ours": linear_macs(ours, inputs["ours"]), "theirs": linear_macs(theirs, inputs["theirs"])}
        products = attention_products(ours, theirs, frames)
        row["macs_with_products"] = {arm: row["macs"][arm] + products[arm] for arm in products}
        undo = [ours.without_encoder(inputs["ours"]), theirs.without_encoder(inputs["theirs"])]
        row["prefill_without_encoder_s"] = in_turns(works)
        for restore in undo:
            restore()
        if frames in STEP_FRAMES:
            with torch.enable_grad():
                steps = {
                    "ours": functools.partial(step, ours, inputs["ours"]),
                    "theirs": functools.partial(step, theirs, inputs["theirs"]),
                }
                row["step_s"] = in_turns(steps)
        row["memory_bytes"] = {
            kind: {arm: _in_own_process(arm, proportion, frames, kind == "last_logit") for arm in ("ours", "theirs")}
            for kind in ("all_logits", "last_logit")
        }
        rows.append(row)
    return rows


def _in_own_process(*arguments: Any) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, *arguments).result()


@torch.no_grad()
def token_times() -> list[dict[str, float]]:
    """Return the time per generated token [s] with keys and values of the video cached, and recomputed."""
    arm = Ours("7b")
    model, rows = arm.model, []
    for frames in TOKEN_FRAMES:
        inputs = arm.inputs(frames)
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        tokens_FPD = model.projector(model.encode(inputs["pixel_values"]))
        works = {
            "cached": functools.partial(_token, model, cache),
            "recomputed": functools.partial(_token_recomputed, model, cache, tokens_FPD),
        }
        rows.append({"frames": frames, **in_turns(works, rounds=15)})
    return rows


def _token(model: CrossLMMForConditionalGeneration, cache: Cache) -> None:
    model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    cache.crop(-1)


def _token_recomputed(model: CrossLMMForConditionalGeneration, cache: Cache, tokens_FPD: Tensor) -> None:
    """Generate a token after projecting the video's keys and values again."""
    for layer in model.language_model.model.layers:
        if isinstance(layer, DualCrossAttentionLayer) and layer.t2v is not None:
            branch, seen = layer.t2v, recall(cache, layer.t2v.layer_idx)
            assert seen is not None
            projected_FPC = in_chunks(branch._project, tokens_FPD, model.config.encoder_chunk)
            key, value = map(branch._heads, projected_FPC.flatten(0, 1)[None].chunk(2, dim=-1))
            remember(cache, branch.layer_idx, replace(seen, key_BHSC=key, value_BHSC=value))
    _token(model, cache)


@torch.no_grad()
def growth() -> dict[str, dict[str, Any]]:
    """Return prefill times [s] by `v2v_scope` at rising numbers of frames, and the exponent that fits them best."""
    arms = {scope: Ours("7b", v2v_scope=scope) for scope in ("video", "frame")}
    seconds: dict[str, list[float]] = {scope: [] for scope in arms}
    for frames in GROWTH_FRAMES:
        inputs = arms["video"].inputs(frames)
        works = {scope: functools.partial(prefill, arm, inputs) for scope, arm in arms.items()}
        for scope, value in in_turns(works).items():
            seconds[scope].append(value)
    logs = torch.tensor(GROWTH_FRAMES).log2()
    return {
        scope: {
            "seconds": dict(zip(GROWTH_FRAMES, values, strict=True)),
            "exponent": _slope(logs, torch.tensor(values).log2()),
        }
        for scope, values in seconds.items()
    }


def _slope(x: Tensor, y: Tensor) -> float:
    """Return the slope of the least-squares line."""
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def reduction(rows: list[dict[str, Any]], pick: Callable[[dict[str, Any]], dict[str, float]]) -> float:
    """Return 1 - ours / theirs, averaged over the numbers of frames."""
    return statistics.mean(1 - pick(row)["ours"] / pick(row)["theirs"] for row in rows)


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    # Return freed blocks to the system at once, so that resident memory is that of the tensors. Only child processes
    # are affected: the allocator of this one has already read its environment.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    torch.set_num_threads(1)
    rows = {proportion: compare(proportion) for proportion in PROPORTIONS}
    tokens, grown = token_times(), growth()
    figures: dict[str, float] = {}
    for proportion, measured_rows in rows.items():
        stepped = [row for row in measured_rows if "step_s" in row]
        measured = {
            "prefill_time_reduction": reduction(measured_rows, lambda row: row["prefill_s"]),
            "prefill_time_reduction_without_encoder": reduction(
                measured_rows, lambda row: row["prefill_without_encoder_s"]
            ),
            "memory_reduction": reduction(measured_rows, lambda row: row["memory_bytes"]["all_logits"]),
            "memory_reduction_last_logit": reduction(measured_rows, lambda row: row["memory_bytes"]["last_logit"]),
            "macs_reduction": reduction(measured_rows, lambda row: row["macs"]),
            "step_time_ratio": 1 - reduction(stepped, lambda row: row["step_s"]),
        }
        measured["measured_over_analytic"] = (1 - measured["prefill_time_reduction"]) / (1 - measured["macs_reduction"])
        with_products = reduction(measured_rows, lambda row: row["macs_with_products"])
        measured["measured_over_analytic_with_products"] = (1 - measured["prefill_time_reduction"]) / (
            1 - with_products
        )
        figures |= {name if proportion == "7b" else f"{name}_{proportion}": value for name, value in measured.items()}
    # At the largest number of frames.
    figures["token_time_cached_over_recomputed"] = tokens[-1]["cached"] / tokens[-1]["recomputed"]
    figures["growth_exponent_global"] = grown["video"]["exponent"]
    figures["growth_exponent_frame"] = grown["frame"]["exponent"]
    report("model", _table(rows, figures), figures, {"rows": rows, "tokens": tokens, "growth": grown}, arguments.json)


def _table(rows: dict[str, list[dict[str, Any]]], figures: dict[str, float]) -> Table:
    table = Table(title="CrossLMM / LLaVA-OneVision: less is better")
    for heading in ("encoder : decoder", "frames", "prefill [s]", "without encoder [s]", "training step [s]",
                    "all logits [MB]", "last logit [MB]", "linear MACs [G]", "with products [G]"):  # fmt: skip
        table.add_column(heading, justify="right")

    def pair(values: dict[str, float] | None, unit: float, digits: int) -> str:
        return f"{values['ours'] / unit:.{digits}f} / {values['theirs'] / unit:.{digits}f}" if values else ""

    for proportion, measured_rows in rows.items():
        for row in measured_rows:
            memory = row["memory_bytes"]
            table.add_row(
                f"{PROPORTIONS[proportion].ratio} : 1 ({proportion})", str(row["frames"]), pair(row["prefill_s"], 1, 2),
                pair(row["prefill_without_encoder_s"], 1, 2), pair(row.get("step_s"), 1, 2),
                pair(memory["all_logits"], 1e6, 0), pair(memory["last_logit"], 1e6, 0), pair(row["macs"], 1e9, 1),
                pair(row["macs_with_products"], 1e9, 1),
            )  # fmt: skip
    lines = [
        f"{name} {value:.3f}" + (f" (limit {PAPER[name]:.3f}, the paper's)" if name in PAPER else "")
        + ("  MISSED" if value < PAPER.get(name, value) else "")
        for name, value in figures.items()
    ]  # fmt: skip
    table.caption = "\n".join(lines)
    return table


if __name__ == "__main__":
    main()
