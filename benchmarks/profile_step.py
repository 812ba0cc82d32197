"""Profile a training step: python -m benchmarks.profile_step [--config NAME ...] [--json].

One process without FSDP, one thread, float32 on CPU, a batch of the configuration's own shape with random frames:
forward, backward, clipping, AdamW. The table lists the time of each part, and the operators with the largest share of
the time. Besides `tiny`, a middle size:

  python -m benchmarks.profile_step --config tiny --data.num_frames 16 --model.pool_stride 9
      --model.vision '{hidden_size: 384, intermediate_size: 1152, num_hidden_layers: 6, num_attention_heads: 6,
                       image_size: 378, patch_size: 14}'
      --model.language '{model_type: qwen2, vocab_size: 8192, hidden_size: 512, intermediate_size: 2048,
                         num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 2}'
      --train.micro_batch_size 1 --train.global_batch_size 2
"""

import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks import report
from crosslmm.cli import fail, parse_run
from crosslmm.config import BadConfig, RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import component_of, freeze
from crosslmm.train.optim import build_optimizer

STEPS = 5
"""Steps of each measurement."""
QUESTION, ANSWER = "Which way does it move, and what colour is it?", "right, red"
"""About as long as those of the sample set."""


class Step:
    """A training step on a fixed batch, which can be repeated."""

    def __init__(self, config: RunConfig) -> None:
        processor = build_processor(config.model)
        self.config = config
        self.model: Any = build_model(config.model, processor, config.seed).train()
        freeze(self.model, config.train.learning_rate)
        if config.train.activation_checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.optimizer = build_optimizer(self.model, config.train)
        side, frames = processor.image_size, config.data.num_frames
        random = np.random.default_rng(0)
        videos = [[random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)]] * config.train.micro_batch_size
        question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
        talk: list[dict[str, Any]] = [question, {"role": "assistant", "content": ANSWER}]
        self.batch = processor([talk] * len(videos), videos)

    def __call__(self) -> None:
        """Run forward, backward and the optimizer step."""
        self.model(**self.batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        """Return the median time of `STEPS` steps [s]."""
        taken = []
        for _ in range(STEPS):
            began = time.perf_counter()
            self()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def operators(self) -> dict[str, float]:
        """Return the share of each operator in the time (without the operators it calls), the largest first."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                self()
        times = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
        total = sum(times.values())
        return {name: t / total for name, t in sorted(times.items(), key=lambda item: -item[1])}

    def parts(self) -> dict[str, float]:
        """Return the time of each component in the forward pass, and of the backward pass and the update [s]."""
        seconds: dict[str, float] = defaultdict(float)
        began: dict[int, float] = {}
        hooks = []
        for name, module in _outermost(self.model):
            hooks.append(module.register_forward_pre_hook(lambda m, _: began.__setitem__(id(m), time.perf_counter())))

            def stop(m: torch.nn.Module, _: Any, __: Any, part: str = name) -> None:
                seconds[part] += time.perf_counter() - began[id(m)]

            hooks.append(module.register_forward_hook(stop))
        began_all = time.perf_counter()
        loss = self.model(**self.batch).loss
        forward = time.perf_counter() - began_all
        for hook in hooks:
            hook.remove()
        began_backward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter() - began_backward
        began_update = time.perf_counter()
        self.optimizer.step()
        update = time.perf_counter() - began_update
        self.optimizer.zero_grad(set_to_none=True)
        rest = forward - sum(seconds.values())
        named = {f"forward: {part}": value for part, value in seconds.items()}
        return {**named, "forward: rest": rest, "backward": backward, "AdamW": update}


def _outermost(model: CrossLMMForConditionalGeneration) -> list[tuple[str, torch.nn.Module]]:
    """Return (component, module) for the modules that belong to a single component."""
    chosen = [*model.vision_tower.encoder.layers, model.vision_tower.embeddings, model.projector]
    for layer in model.language_model.model.layers:
        chosen += [module for name, module in layer.named_children() if name in ("self_attn", "mlp", "v2v", "t2v")]
    names = {id(module): name for name, module in model.named_modules()}
    return [(component_of(f"{names[id(module)]}."), module) for module in chosen]


def main() -> None:
    """Profile and print the result."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    try:
        config = parse_run(arguments, description=str(__doc__))
    except BadConfig as error:
        fail(error)
    torch.set_num_threads(1)
    step = Step(config)
    step()
    seconds, parts, operators = step.seconds(), step.parts(), step.operators()
    figures = {"step_s": seconds, **{f"part {name}": s for name, s in parts.items()}}
    table = Table(title=f"a training step: {seconds * 1e3:.0f} ms")
    for heading in ("part", "ms", "operator", "self time"):
        table.add_column(heading, justify="left" if heading in ("part", "operator") else "right")
    left = [(name, f"{s * 1e3:.1f}") for name, s in parts.items()]
    right = [(name, f"{share:.1%}") for name, share in list(operators.items())[:14]]
    for i in range(max(len(left), len(right))):
        table.add_row(*(left[i] if i < len(left) else ("", "")), *(right[i] if i < len(right) else ("", "")))
    report("profile_step", table, figures, {"operators": operators}, "--json" in sys.argv)


if __name__ == "__main__":
    main()
