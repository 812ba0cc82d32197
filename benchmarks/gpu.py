"""Measure training and prefill on a GPU at the paper's sizes: python -m benchmarks.gpu [--json].

(a) Training steps of the presets on one GPU, through `crosslmm.train`: NCCL, FSDP, bf16, with the recomputation that
    `auto` chooses. Peak memory is compared with the prediction of `jobs/plan.py` (`ratio_...`, limit 0.8 to 1.2).
    `mfu_...` is the model's FLOPs per second over the GPU's dense peak; `hfu_...` counts recomputed FLOPs too, as plans
    do. `compiled_over_eager_...` is the time of a step with compiled blocks over that without.
(b) Prefill of CrossLMM and of the LLaVA-OneVision of Transformers in bf16, alternating: time, and peak memory above the
    weights, with logits of every position or the last one; reductions averaged over the numbers of frames, as in the
    paper for the 7B.
(c) Training steps with flash-attn, if installed, relative to SDPA (`flash_over_sdpa`).
(d) Compiled training steps in FP8, if torchao is installed and the GPU has it: time over that in bf16
    (`float8_over_bf16`). The table has samples/s and the loss of the last step of both, from equal weights and batches;
    utilisations are those of the bf16 peak.

`python -m benchmarks.profile_step` says where the time of a step goes.

Weights are random, which affects neither time nor memory. What does not fit the GPU's memory is left out.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
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
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.loading import build_config
from crosslmm.planning.assumptions import Assumptions, find_gpu
from crosslmm.planning.cost import TEXT, VIDEO
from crosslmm.planning.peak_memory import training_memory, training_trace
from crosslmm.preflight.hardware import detect_local, resolve_checkpointing
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
    compile: bool = False
    float8: bool = False
    from_features: bool = False
    """The encoder's features are given instead of frames."""

    @property
    def name(self) -> str:
        """Name of the setting in the figures."""
        size = f"frames{self.frames}" + (f"x{self.micro_batch}" if self.micro_batch > 1 else "")
        marks = {
            "features": self.from_features, "flash": self.attention != "sdpa", "compiled": self.compile,
            "float8": self.float8,
        }  # fmt: skip
        return "_".join([self.model, self.stage, size, *(m for m, given in marks.items() if given)]).replace("-", "")


SETTINGS = [
    Setting("paper-2b", "stage-1", 32, 4),
    Setting("paper-2b", "stage-2", 64, 1),
    Setting("paper-2b", "stage-2", 256, 1),
    Setting("paper-2b", "stage-1", 64, 4, from_features=True),
    Setting("paper-7b", "stage-1", 64, 1),
]
WITH_FLASH = [setting._replace(attention="flash_attention_2") for setting in SETTINGS[:3]]
COMPILED = [setting._replace(compile=True) for setting in SETTINGS[:3]]
IN_FLOAT8 = [setting._replace(float8=True) for setting in COMPILED]


def build_run(setting: Setting) -> RunConfig:
    """Return the configuration with one rank and one micro-batch per step."""
    return parse_run(
        [
            f"--config={setting.model}", f"--config={setting.stage}", f"--data.num_frames={setting.frames}",
            f"--model.attention={setting.attention}", "--train.precision=bf16", "--scaling.num_workers=1",
            f"--train.compile={setting.compile}".lower(), f"--train.float8={setting.float8}".lower(),
            *(["--data.features=given"] if setting.from_features else []),
            f"--train.micro_batch_size={setting.micro_batch}", f"--train.global_batch_size={setting.micro_batch}",
        ],
        "",
    )  # fmt: skip


def batch(config: RunConfig, model: Any) -> BatchFeature:
    """Return a micro-batch of noise videos, or their features, with text, all of it labelled."""
    frames, size = config.data.num_frames, config.train.micro_batch_size
    side, tokens_per_frame = model.vision_config.image_size, model.tokens_per_frame
    visual = {"pixel_values": torch.randint(0, 256, (size * frames, 3, side, side), dtype=torch.uint8)}
    if config.data.features:
        patches, width = model.patches_per_frame, model.vision_config.hidden_size
        visual = {"features": torch.randn(size * frames, patches, width, dtype=torch.bfloat16)}
    input_ids = torch.tensor([[VIDEO] * frames * tokens_per_frame + [TEXT] * TEXT_TOKENS] * size)
    return BatchFeature({
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == VIDEO, -100),
        "num_frames": torch.tensor([[frames]] * size),
        **visual,
    })  # fmt: skip


class Recorder(Callbacks):
    """Collects the time of every step [s], and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def log(self, step: int, metrics: Metrics) -> None:
        """Store the time and the loss of the step."""
        self.seconds.append(metrics["step_s"])
        self.losses.append(metrics["loss"])


def trained(setting: Setting) -> dict[str, float]:
    """Train; return the time per step [s], samples/s, the loss of the last step, and peak memory allocated and reserved
    after building the model [bytes]."""
    torch.manual_seed(0)  # the same weights and batches, whose losses can be compared
    device = torch.device("cuda")
    config = resolve_checkpointing(build_run(setting), detect_local())

    def build(weights: bool) -> CrossLMMForConditionalGeneration:
        model_config = build_config(config.model, video_token_id=VIDEO)
        model_config._attn_implementation = config.model.attention
        with device if weights else contextlib.nullcontext():
            return CrossLMMForConditionalGeneration(model_config)

    model: Any = parallelize(build, config.train, device)
    reset_memory()
    optimizer = build_optimizer(model, config.train)
    leave_out_closed_branches(model)
    made = batch(config, model.config)
    callbacks = Recorder()
    # Each step copies its batch to the GPU, as in a run.
    train(
        config, model, optimizer, (StepBatch([pinned(made, device)], []) for _ in range(STEPS)), range(STEPS), callbacks
    )
    step_s = statistics.median(callbacks.seconds[WARM:])
    return {
        "step_s": step_s,
        "samples_per_s": setting.micro_batch / step_s,
        "loss": callbacks.losses[-1],
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def training(settings: list[Setting]) -> Iterator[dict[str, Any]]:
    """Yield measurement and prediction of each setting."""
    gpu = find_gpu(torch.cuda.get_device_name())
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    for setting in settings:
        row: dict[str, Any] = {"setting": setting.name}
        try:
            row |= trained(setting)
        except torch.OutOfMemoryError:
            row["step_s"] = None
        reset_memory()
        if row["step_s"] is not None:
            row |= planned(setting._replace(attention="sdpa"))
            for name in ("mfu", "hfu"):
                row[name] = gpu and row[f"{name}_flops"] / row["step_s"] / gpu.flops["bf16"]
        yield row
    dist.destroy_process_group()


@functools.cache
def planned(setting: Setting) -> dict[str, Any]:
    """Return what `jobs/plan.py` predicts of a step: recomputation by part, memory [bytes] and FLOPs."""
    config = resolve_checkpointing(build_run(setting), detect_local())
    traced = training_trace(config, setting.frames, TEXT_TOKENS)
    return {
        "recomputed": list(config.train.checkpointing),
        "predicted_bytes": training_memory(config, traced).total,
        "mfu_flops": traced.flops - traced.recomputed_flops,
        "hfu_flops": traced.flops,
    }


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
    float8 = IN_FLOAT8 if importlib.util.find_spec("torchao") and detect_local().float8 else []
    rows = list(printed(training([*SETTINGS, *flash, *COMPILED, *float8])))
    prefill_rows = {preset: prefills(preset) for preset in ("paper-2b", "paper-7b")}
    figures: dict[str, float] = {}
    for row in rows:
        if row["step_s"] is not None:
            figures[f"ratio_{row['setting']}"] = row["predicted_bytes"] / row["allocated_bytes"]
            figures |= {f"{name}_{row['setting']}": row[name] for name in ("mfu", "hfu") if row[name] is not None}
    for preset, preset_rows in prefill_rows.items():
        size = preset.removeprefix("paper-")
        for figure, pick in PICKS.items():
            if both := [row for row in preset_rows if len(pick(row)) == 2]:
                figures[f"{figure}_{size}"] = reduction(both, pick)
    by_name = {row["setting"]: row["step_s"] for row in rows}
    pairs = [("flash_over_sdpa", setting, setting._replace(attention="sdpa")) for setting in flash]
    pairs += [("compiled_over_eager", setting, setting._replace(compile=False)) for setting in COMPILED]
    pairs += [("float8_over_bf16", setting, setting._replace(float8=False)) for setting in float8]
    for name, setting, plain in pairs:
        if by_name[setting.name] and by_name[plain.name]:
            figures[f"{name}_{plain.name}"] = by_name[setting.name] / by_name[plain.name]
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
    for heading in ("setting", "step [s]", "samples/s", "loss", "MFU", "HFU", "recomputed", "allocated [GB]",
                    "reserved [GB]", "predicted [GB]", f"predicted / allocated (limit 1 ± {LIMIT})"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        if row["step_s"] is None:
            table.add_row(row["setting"], "does not fit")
            continue
        ratio = row["predicted_bytes"] / row["allocated_bytes"]
        gigabytes = (f"{row[key] / 1e9:.1f}" for key in ("allocated_bytes", "reserved_bytes", "predicted_bytes"))
        utilisations = (f"{row[name]:.2f}" if row[name] else "unknown GPU" for name in ("mfu", "hfu"))
        missed = "" if abs(ratio - 1) <= LIMIT else "  MISSED"
        recomputed = ", ".join(row["recomputed"])
        table.add_row(
            row["setting"], f"{row['step_s']:.3f}", f"{row['samples_per_s']:.2f}", f"{row['loss']:.3f}",
            *utilisations, recomputed, *gigabytes, f"{ratio:.3f}{missed}",
        )  # fmt: skip
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
