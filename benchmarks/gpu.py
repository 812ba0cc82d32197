"""Measure training and prefill on a GPU at the paper's sizes: python -m benchmarks.gpu [--json].

(a) Training steps of the presets on one GPU, through `crosslmm.train`: NCCL, FSDP, bf16, checkpointed activations. Peak
    memory compared with the prediction of `jobs/plan.py` (`ratio_...`, limit 0.8 to 1.2), and the share of the GPU's
    dense FLOP/s, counting recomputation as work: the `utilisation` that the planner assumes.
(b) Prefill of CrossLMM and of the LLaVA-OneVision of Transformers in bf16, alternating: time, and peak memory above the
    weights, with logits of every position or the last one; reductions averaged over the numbers of frames, as in the
    paper for the 7B.
(c) Training steps with flash-attn, if installed, relative to SDPA (`flash_over_sdpa`).

Weights are random, which affects neither time nor memory. What does not fit the GPU's memory is left out.
"""

import argparse
import contextlib
import functools
import gc
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.table import Table
from transformers import BatchFeature
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks import report
from benchmarks.memory import LIMIT
from benchmarks.model import PAPER, Ours, Theirs, prefill, reduction
from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_config
from crosslmm.planning.assumptions import GPUS, Assumptions
from crosslmm.planning.cost import TEXT, VIDEO, training_memory, training_trace
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.loop import Callbacks, Metrics, StepBatch, pinned, train
from crosslmm.train.optim import build_optimizer

FRAMES = (32, 64, 128, 256)
ROUNDS = 5
STEPS, WARM = 8, 3
"""Training steps, and how many of them are warm-up and not timed."""
TEXT_TOKENS = Assumptions().text_tokens
PICKS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "prefill_time_reduction": lambda row: row["prefill_s"],
    "memory_reduction": lambda row: row["memory_bytes"]["all_logits"],
    "memory_reduction_last_logit": lambda row: row["memory_bytes"]["last_logit"],
}
"""Name of each figure, and the values of a prefill row that it compares."""


class Setting(NamedTuple):
    """Settings of a training run."""

    model: str
    stage: str
    frames: int
    micro_batch: int
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        """Name of the setting in the figures."""
        kernels = "" if self.attention == "sdpa" else "_flash"
        return f"{self.model}_{self.stage}_frames{self.frames}x{self.micro_batch}{kernels}".replace("-", "")


SETTINGS = [
    Setting("paper-2b", "stage-1", 32, 4),
    Setting("paper-2b", "stage-2", 64, 1),
    Setting("paper-2b", "stage-2", 256, 1),
    Setting("paper-7b", "stage-1", 64, 1),
]
WITH_FLASH = [setting._replace(attention="flash_attention_2") for setting in SETTINGS[:3]]


def build_run(setting: Setting) -> RunConfig:
    """Return the configuration with one rank and one micro-batch per step."""
    return parse_run(
        [
            f"--config={setting.model}", f"--config={setting.stage}", f"--data.num_frames={setting.frames}",
            f"--model.attention={setting.attention}", "--train.precision=bf16", "--scaling.num_workers=1",
            f"--train.micro_batch_size={setting.micro_batch}", f"--train.global_batch_size={setting.micro_batch}",
        ],
        "",
    )  # fmt: skip


def batch(config: RunConfig, side: int, tokens_per_frame: int) -> BatchFeature:
    """Return a micro-batch of noise videos with text, all of it labelled."""
    frames, size = config.data.num_frames, config.train.micro_batch_size
    input_ids = torch.tensor([[VIDEO] * frames * tokens_per_frame + [TEXT] * TEXT_TOKENS] * size)
    return BatchFeature({
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == VIDEO, -100),
        "pixel_values": torch.randint(0, 256, (size * frames, 3, side, side), dtype=torch.uint8),
        "num_frames": torch.tensor([[frames]] * size),
    })  # fmt: skip


class Seconds(Callbacks):
    """Collects the time of every step [s]."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def log(self, step: int, metrics: Metrics) -> None:
        """Store the time of the step."""
        self.steps.append(metrics["step_s"])


def trained(setting: Setting) -> dict[str, float]:
    """Train; return the time per step [s], and peak memory allocated and reserved after building the model [bytes]."""
    config, device = build_run(setting), torch.device("cuda")

    def build(weights: bool) -> CrossLMMForConditionalGeneration:
        model_config = build_config(config.model, video_token_id=VIDEO)
        model_config._attn_implementation = config.model.attention
        with device if weights else contextlib.nullcontext():
            return CrossLMMForConditionalGeneration(model_config)

    model: Any = parallelize(build, config.train, device)
    reset_memory()
    optimizer = build_optimizer(model, config.train)
    made = batch(config, model.config.vision_config.image_size, model.config.tokens_per_frame)
    callbacks = Seconds()
    # Each step copies its batch to the GPU, as in a run.
    train(
        config, model, optimizer, (StepBatch([pinned(made, device)], []) for _ in range(STEPS)), range(STEPS), callbacks
    )
    return {
        "step_s": statistics.median(callbacks.steps[WARM:]),
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def training(settings: list[Setting]) -> Iterator[dict[str, Any]]:
    """Yield measurement and prediction of each setting."""
    peak = next((gpu.flops["bf16"] for name, gpu in GPUS.items() if name in _words(torch.cuda.get_device_name())), None)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    for setting in settings:
        row: dict[str, Any] = {"setting": setting.name}
        try:
            row |= trained(setting)
        except torch.OutOfMemoryError:
            row["step_s"] = None
        reset_memory()
        if row["step_s"] is not None:
            row["predicted_bytes"], row["flops"] = planned(setting._replace(attention="sdpa"))
            row["utilisation"] = peak and row["flops"] / row["step_s"] / peak
        yield row
    dist.destroy_process_group()


def _words(device: str) -> set[str]:
    """Return possible keys of `GPUS` for a device name, such as a100-80 for NVIDIA A100-SXM4-80GB."""
    words = device.lower().replace("-", " ").replace("gb", "").split()
    return {*words, *("-".join((a, b)) for a, b in itertools.permutations(words, 2))}


@functools.cache
def planned(setting: Setting) -> tuple[int, int]:
    """Return memory [bytes] and FLOPs of a step as predicted by `jobs/plan.py`."""
    config = build_run(setting)
    traced = training_trace(config, setting.frames, TEXT_TOKENS)
    return training_memory(config, traced).total, traced.flops


def reset_memory() -> None:
    """Collect garbage, empty the GPU's cache and reset the peak memory."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def printed(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows, printing each as soon as it is measured: that takes minutes per row."""
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        yield row


@torch.no_grad()
def prefills(preset: str) -> list[dict[str, Any]]:
    """Return one row per number of frames; a model that does not fit the memory is missing from it."""
    chunk = parse_run([f"--config={preset}"], "").model.encoder_chunk
    with _in_bf16_on_the_gpu():
        arms: dict[str, Ours | Theirs] = {"ours": Ours(preset, encoder_chunk=chunk), "theirs": Theirs(preset)}
    return list(printed(_prefill_row(arms, frames) for frames in FRAMES))


@contextlib.contextmanager
def _in_bf16_on_the_gpu() -> Iterator[None]:
    """Create tensors in bf16 on the GPU. Time nothing inside: the mode intercepts every call."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(default)


def _prefill_row(arms: dict[str, Ours | Theirs], frames: int) -> dict[str, Any]:
    with _in_bf16_on_the_gpu():
        inputs = {name: arm.inputs(frames) for name, arm in arms.items()}
    peaks: dict[str, dict[str, int]] = {"all_logits": {}, "last_logit": {}}
    for kind, keep in (("all_logits", 0), ("last_logit", 1)):
        for name, arm in arms.items():
            reset_memory()
            before = torch.cuda.memory_allocated()
            with contextlib.suppress(torch.OutOfMemoryError):
                prefill(arm, inputs[name], keep)
                # Include the pixels, as the paper does.
                pixels = next(value for key, value in inputs[name].items() if "pixel" in key)
                peaks[kind][name] = torch.cuda.max_memory_allocated() - before + pixels.nbytes
    reset_memory()
    timed = {name: functools.partial(prefill, arms[name], inputs[name]) for name in peaks["last_logit"]}
    return {"frames": frames, "memory_bytes": peaks, "prefill_s": in_turns(timed)}


def in_turns(works: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median GPU time of each [s], alternating in every round; the first round is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS + 1):
        for name, work in works.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1000)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU found; python -m benchmarks.model and benchmarks.memory run on CPUs")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as crosslmm.preflight.hardware sets it
    flash = WITH_FLASH if is_flash_attn_2_available() else []
    rows = list(printed(training([*SETTINGS, *flash])))
    prefill_rows = {preset: prefills(preset) for preset in ("paper-2b", "paper-7b")}
    figures: dict[str, float] = {}
    for row in rows:
        if row["step_s"] is not None:
            figures[f"ratio_{row['setting']}"] = row["predicted_bytes"] / row["allocated_bytes"]
            if row["utilisation"] is not None:
                figures[f"utilisation_{row['setting']}"] = row["utilisation"]
    for preset, preset_rows in prefill_rows.items():
        size = preset.removeprefix("paper-")
        for figure, pick in PICKS.items():
            if both := [row for row in preset_rows if len(pick(row)) == 2]:
                figures[f"{figure}_{size}"] = reduction(both, pick)
    by_name = {row["setting"]: row["step_s"] for row in rows}
    for setting in flash:
        sdpa, packed = by_name[setting._replace(attention="sdpa").name], by_name[setting.name]
        if sdpa and packed:
            figures[f"flash_over_sdpa_{setting.name}"] = packed / sdpa
    table = _training_table(rows)
    report("gpu training", table, {}, None, False)
    report(
        "gpu",
        _prefill_table(prefill_rows, figures),
        figures,
        {"training": rows, "prefill": prefill_rows},
        arguments.json,
    )


def _training_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"training steps on one {torch.cuda.get_device_name()}")
    for heading in ("setting", "step [s]", "utilisation", "allocated [GB]", "reserved [GB]", "predicted [GB]",
                    f"predicted / allocated (limit 1 ± {LIMIT})"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        if row["step_s"] is None:
            table.add_row(row["setting"], "does not fit")
            continue
        ratio = row["predicted_bytes"] / row["allocated_bytes"]
        gigabytes = (f"{row[key] / 1e9:.1f}" for key in ("allocated_bytes", "reserved_bytes", "predicted_bytes"))
        utilisation = f"{row['utilisation']:.2f}" if row["utilisation"] else "unknown GPU"
        missed = "" if abs(ratio - 1) <= LIMIT else "  MISSED"
        table.add_row(row["setting"], f"{row['step_s']:.3f}", utilisation, *gigabytes, f"{ratio:.3f}{missed}")
    return table


def _prefill_table(prefill_rows: dict[str, list[dict[str, Any]]], figures: dict[str, float]) -> Table:
    table = Table(title="prefill, CrossLMM / LLaVA-OneVision, bf16: less is better")
    for heading in ("preset", "frames", "prefill [s]", "all logits [GB]", "last logit [GB]"):
        table.add_column(heading, justify="right")

    def pair(values: dict[str, float], unit: float, digits: int) -> str:
        return " / ".join(
            f"{values[a] / unit:.{digits}f}" if a in values else "out of memory" for a in ("ours", "theirs")
        )

    for preset, preset_rows in prefill_rows.items():
        for row in preset_rows:
            memory = (pair(row["memory_bytes"][kind], 1e9, 2) for kind in ("all_logits", "last_logit"))
            table.add_row(preset, str(row["frames"]), pair(row["prefill_s"], 1, 3), *memory)
    table.caption = "\n".join(
        f"{name} {value:.3f}" + (f" (the paper: {PAPER[name[:-3]]:.3f})" if name[:-3] in PAPER and "7b" in name else "")
        for name, value in figures.items()
    )
    return table


if __name__ == "__main__":
    main()
