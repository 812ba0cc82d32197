"""Count what makes a GPU wait in a training step and in a generated token: python -m benchmarks.syncs [--json].

A model of the 2B's depth (27 encoder layers in chunks of 64 frames, 28 decoder layers, 7 with cross-attention) and of
the widths of `tiny` runs on a device that computes on the CPU and counts (`benchmarks.emulated_gpu`): a training step
of two micro-batches of one video of 64 frames each, with recomputation, through `crosslmm.train.loop` without FSDP;
and `generate`, alone and in a padded batch of two. Flash attention is a stand-in that Transformers calls as it would
call flash-attn. Limits: `syncs_per_step` 2, `syncs_per_token` 1. Two minutes.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers.modeling_flash_attention_utils as flash_utils
from rich.table import Table
from torch import Tensor

from benchmarks import emulated_gpu, report
from benchmarks.emulated_gpu import COUNTS, DEVICE, Emulation
from crosslmm.cli import parse_run
from crosslmm.config import RunConfig
from crosslmm.model import CrossLMMProcessor
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.recomputation import checkpoint_activations
from crosslmm.train.loop import Callbacks, Metrics, StepBatch, train
from crosslmm.train.optim import build_optimizer

Counted = dict[str, Counter[str]]
"""Synchronisations, copies and launches, each by operator."""

FRAMES, STEPS, NEW_TOKENS = 64, 3, 12
QUESTION, ANSWER = "Which way does it move, and what colour is it?", "right, red"
LIMITS = {"syncs_per_step": 2, "syncs_per_token": 1}
DEPTH = [
    "--model.vision.num_hidden_layers=27", "--model.language.num_hidden_layers=28", "--model.cross_attention_every=4",
    "--model.encoder_chunk=64",
]  # fmt: skip


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    config = build_run()
    counted: dict[str, Counted] = {}
    for attention in ("sdpa", "flash"):
        counted[f"per_step {attention}"] = of_step(config, attention)
        for padded in (False, True):
            counted[f"per_token {attention}{' padded' if padded else ''}"] = of_token(config, attention, padded)
    table = Table(title="a training step of two micro-batches, and a generated token, at the 2B's depth")
    for heading in ("of", "synchronisations", "copies to the GPU", "launches", "what synchronises"):
        table.add_column(heading, justify="left" if heading in ("of", "what synchronises") else "right")
    for name, counts in counted.items():
        numbers = [f"{counter.total():g}" for counter in counts.values()]
        limit = LIMITS[f"syncs_{name.split()[0]}"]
        numbers[0] += f" (limit {limit})" + ("" if counts["syncs"].total() <= limit else " MISSED")
        table.add_row(name.replace("_", " "), *numbers, ", ".join(f"{n:g} {op}" for op, n in counts["syncs"].items()))
    figures = {
        f"{kind}_{name.replace(' ', '_')}": counter.total()
        for name, counts in counted.items()
        for kind, counter in counts.items()
    }
    worst = {
        name: max(c["syncs"].total() for key, c in counted.items() if key.startswith(name.removeprefix("syncs_")))
        for name in LIMITS
    }
    launches = counted["per_step sdpa"]["launches"].total()
    report("syncs", table, {**worst, "launches_per_step": launches, **figures}, counted, arguments.json)
    dist.destroy_process_group()


def build_run(*overrides: str) -> RunConfig:
    """Return a run of the 2B's depth and tiny widths."""
    return parse_run(
        [
            "--config=tiny", *DEPTH, "--model.pool_stride=4", f"--data.num_frames={FRAMES}",
            "--train.activation_checkpointing=true", "--train.micro_batch_size=1", "--train.global_batch_size=2",
            "--scaling.num_workers=1", *overrides,
        ],
        "",
    )  # fmt: skip


def of_step(config: RunConfig, attention: str) -> Counted:
    """Return the counts of the last of `STEPS` training steps; the process group must be initialised."""
    with Emulation():
        processor = build_processor(config.model)
        model = _on_gpu(config, processor, attention)
        checkpoint_activations(model, config.train.checkpointing)
        optimizer = build_optimizer(model, config.train)
        last = _LastStep()
        conversation = [_question(QUESTION), {"role": "assistant", "content": ANSWER}]
        batches = (
            StepBatch([processor([conversation], _videos(config, processor, 1)) for _ in range(2)], ["a", "b"])
            for _ in range(STEPS)
        )
        train(config, model, optimizer, batches, range(STEPS), last)
    return last.counted


def of_token(config: RunConfig, attention: str, padded: bool) -> Counted:
    """Return the counts per generated token: those of a longer answer less those of a shorter one."""
    with Emulation():
        processor = build_processor(config.model)
        model = _on_gpu(config, processor, attention).eval()
        model.generation_config.eos_token_id = None
        questions = [[_question(QUESTION)], [_question(2 * QUESTION)]][: 1 + padded]
        prompts = processor(questions, _videos(config, processor, len(questions)), for_generation=True).to(DEVICE)
        short, long = (_generated(model, prompts, tokens) for tokens in (4, 4 + NEW_TOKENS))
    return {
        kind: Counter({op: (n - short[kind][op]) / NEW_TOKENS for op, n in long[kind].items() if n > short[kind][op]})
        for kind in long
    }


class _LastStep(Callbacks):
    """Keeps the counts of the last step."""

    counted: Counted

    def log(self, step: int, metrics: Metrics) -> None:
        self.counted = COUNTS.take()


def _generated(model: Any, prompts: Any, tokens: int) -> Counted:
    COUNTS.take()
    model.generate(**prompts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return COUNTS.take()


def _on_gpu(config: RunConfig, processor: CrossLMMProcessor, attention: str) -> Any:
    model: Any = build_model(config.model, processor, 0)
    model.to(DEVICE)
    if attention == "flash":
        _stand_in_for_flash()
        # `set_attn_implementation` would look for the package.
        for part in (model.config, model.config.text_config, model.config.vision_config):
            part._attn_implementation_internal = "flash_attention_2"
    return model


def _question(text: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}


def _videos(config: RunConfig, processor: CrossLMMProcessor, samples: int) -> list[list[np.ndarray]]:
    side = processor.image_size
    return [[np.zeros((config.data.num_frames, side, side, 3), dtype=np.uint8)] for _ in range(samples)]


def _stand_in_for_flash() -> None:
    """Give Transformers functions in place of those of flash-attn."""
    utils: Any = flash_utils
    utils._loaded_implementation = "flash_attention_2"
    utils._flash_fn, utils._flash_varlen_fn = _flash, _flash_varlen
    utils._pad_fn, utils._unpad_fn = utils._pad_input, utils._unpad_input
    utils._process_flash_kwargs_fn = utils._lazy_define_process_function(_flash_varlen)


def _flash(query: Tensor, key: Tensor, value: Tensor, causal: bool = False, softmax_scale: Any = None) -> Tensor:
    """flash_attn_func: (batch, positions, heads, channels) each."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    attended: Tensor = emulated_gpu.attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return attended.transpose(1, 2)


def _flash_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, causal: bool = False, softmax_scale: Any = None,
) -> Tensor:  # fmt: skip
    """flash_attn_varlen_func: (all positions, heads, channels) each; one kernel, here one for each sequence."""
    ends_q, ends_k = cu_seqlens_q.inner.tolist(), cu_seqlens_k.inner.tolist()
    sequences = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
    return torch.cat([
        _flash(query[None, a:b], key[None, c:d], value[None, c:d], causal, softmax_scale)[0] for a, b, c, d in sequences
    ])  # fmt: skip


if __name__ == "__main__":
    main()
