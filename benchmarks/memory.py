"""Compare the memory that the planner predicts with that of training processes: python -m benchmarks.memory [--json].

Each setting runs in new processes that take two training steps on the CPU: forward, backward, AdamW. Their peak
resident memory, less that after the imports, is compared with `crosslmm.planning.peak_memory`. Linux only; eight
minutes.
"""

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from benchmarks import report
from crosslmm.config import RunConfig, validate_run

LIMIT = 0.20
"""Largest allowed difference of predicted / measured from 1."""
TEXT_TOKENS = 64
"""Text per sample [tokens]."""


class Setting(NamedTuple):
    """Settings of one measurement."""

    frames: int
    pool_stride: int
    checkpointing: bool
    workers: int = 0
    """Number of FSDP workers; 0 for one process without FSDP."""
    precision: str = "fp32"
    accumulation: int = 1
    rank: int | None = None
    """Rank of adapters in encoder, decoder and cross-attentions; None trains their own weights."""

    @property
    def name(self) -> str:
        """Name of the setting in the figures."""
        return "_".join([
            f"frames{self.frames}", f"stride{self.pool_stride}",
            *(["checkpointing"] if self.checkpointing else []),
            *([f"fsdp{self.workers}", self.precision] if self.workers else []),
            *([f"accumulation{self.accumulation}"] if self.accumulation > 1 else []),
            *([f"rank{self.rank}"] if self.rank else []),
        ])  # fmt: skip


SETTINGS = [
    Setting(4, 4, False),
    Setting(16, 4, False),
    Setting(32, 4, False),
    Setting(8, 1, False),
    Setting(16, 16, False),
    Setting(16, 4, True),
    Setting(48, 4, True),
    Setting(32, 2, True),
    Setting(16, 4, False, workers=2),
    Setting(48, 4, True, workers=2),
    Setting(16, 4, True, workers=2, accumulation=2),
    Setting(16, 4, True, workers=2, precision="bf16"),
    Setting(16, 4, False, rank=16),
    Setting(16, 4, True, workers=2, precision="bf16", rank=16),
]


def main() -> None:
    """Measure and predict each setting; print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--only", type=int, metavar="N", help="run the N-th setting only, counted from 0")
    arguments = parser.parse_args()
    # Return freed blocks to the system at once, so that resident memory is that of the tensors.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    from crosslmm.planning.peak_memory import training_memory, training_trace

    table = Table(title="peak memory of a training step above the imports [MB]")
    for heading in ("setting", "measured", "predicted", "weights", "gradients", "optimizer", "activations", "logits",
                    f"predicted / measured (limit 1 ± {LIMIT})"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    figures, detail = {}, {}
    for setting in SETTINGS if arguments.only is None else [SETTINGS[arguments.only]]:
        config = build_run(setting)
        traced = training_trace(config, setting.frames, TEXT_TOKENS)
        memory = training_memory(config, traced, sharded=setting.workers > 0)
        measured = measure(setting)
        ratio = memory.total / measured
        figures[f"ratio_{setting.name}"] = ratio
        detail[setting.name] = {"measured_bytes": measured, "predicted_bytes": memory.total, **vars(memory)}
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
        megabytes = (f"{n / 1e6:.0f}" for n in (measured, memory.total, *parts))
        table.add_row(setting.name, *megabytes, f"{ratio:.3f}{'' if abs(ratio - 1) <= LIMIT else '  MISSED'}")
    figures["worst_ratio"] = max(figures.values(), key=lambda ratio: abs(ratio - 1))
    figures["within_limit"] = sum(abs(ratio - 1) <= LIMIT for name, ratio in figures.items() if name != "worst_ratio")
    figures["settings"] = len(detail)
    table.caption = f"worst {figures['worst_ratio']:.3f}; {figures['within_limit']} of {len(detail)} within the limit"
    report("memory", table, figures, detail, arguments.json)


def build_run(setting: Setting) -> RunConfig:
    """Return the configuration: a model of 36 M parameters on a 16 x 16 grid, with every component trainable."""
    rates = dict.fromkeys(("vision", "projector", "v2v", "t2v", "decoder"), 1e-3)
    workers = max(setting.workers, 1)
    return validate_run({
        "model": {
            "vision": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6,
                       "num_attention_heads": 4, "image_size": 224, "patch_size": 14},
            "language": {"model_type": "qwen2", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
                         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
                         "max_position_embeddings": 32768, "tie_word_embeddings": True},
            "pool_stride": setting.pool_stride, "cross_attention_every": 4,
        },
        "train": {"learning_rate": rates, "activation_checkpointing": setting.checkpointing,
                  "lora": {"rank": setting.rank, "targets": ["vision", "v2v", "t2v", "decoder"]},
                  "precision": setting.precision, "micro_batch_size": 1,
                  "global_batch_size": workers * setting.accumulation},
        "scaling": {"use_gpu": False, "num_workers": workers},
    })  # fmt: skip


def measure(setting: Setting) -> int:
    """Return the peak memory of the largest worker, without that of the imports [bytes]."""
    workers = max(setting.workers, 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return max(pool.map(_train, [setting] * workers, range(workers), [os.getpid()] * workers))


def _train(setting: Setting, rank: int, port: int) -> int:
    """Take two steps in this process; return its peak memory without that of the imports [bytes]."""
    import torch
    from transformers import BatchFeature

    from crosslmm.model import CrossLMMForConditionalGeneration
    from crosslmm.model.adapters.lora import prepare_training
    from crosslmm.model.loading import build_config
    from crosslmm.model.recomputation import checkpoint_activations
    from crosslmm.train.distributed.parallel import parallelize
    from crosslmm.train.optim import build_optimizer

    torch.set_num_threads(1)
    config = build_run(setting)
    if setting.rank:
        import peft.tuners.lora.model  # noqa: F401
    before = _resident("VmRSS")

    def build(weights: bool) -> CrossLMMForConditionalGeneration:
        return CrossLMMForConditionalGeneration(build_config(config.model, video_token_id=0))

    model: Any
    if setting.workers:
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{20000 + port % 20000}", rank=rank, world_size=setting.workers
        )
        model = parallelize(build, config.train, torch.device("cpu"))
    else:
        model = build(True)
        prepare_training(model, config.train)
        checkpoint_activations(model, config.train.checkpointing)
    model.train()
    optimizer = build_optimizer(model, config.train)
    pooled, side = setting.frames * model.config.tokens_per_frame, model.config.vision_config.image_size
    input_ids = torch.tensor([[0] * pooled + [1] * TEXT_TOKENS])
    batch = BatchFeature({
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(input_ids == 0, -100),
        "pixel_values": torch.randint(0, 256, (setting.frames, 3, side, side), dtype=torch.uint8),
        "num_frames": torch.tensor([[setting.frames]]),
    })  # fmt: skip
    for _ in range(2):
        for _ in range(setting.accumulation):
            model(**batch, num_items_in_batch=1).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    """Return VmRSS, the resident memory of this process, or VmHWM, its peak [bytes]."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
