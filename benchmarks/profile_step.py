"""Profile a training step: python -m benchmarks.profile_step [--config NAME ...] [--trace FILE] [--json].

One rank, as a run trains (FSDP, the run's precision, AdamW), on a batch of the configuration's own shape with random
frames; on a GPU where there is one and `scaling.use_gpu` is set, otherwise on one thread of the CPU. The table has the
time of each part, forward and backward (recomputation counts as backward), and the operators with the largest share of
the time. --trace writes a trace that https://ui.perfetto.dev opens. Besides `tiny`, a middle size:

  python -m benchmarks.profile_step --config tiny --data.num_frames 16 --model.pool_stride 9
      --model.vision '{hidden_size: 384, intermediate_size: 1152, num_hidden_layers: 6, num_attention_heads: 6,
                       image_size: 378, patch_size: 14}'
      --model.language '{model_type: qwen2, vocab_size: 8192, hidden_size: 512, intermediate_size: 2048,
                         num_hidden_layers: 8, num_attention_heads: 8, num_key_value_heads: 2}'
      --train.micro_batch_size 1 --train.global_batch_size 2

Without internet access, a preset of the paper needs --model.vision_weights null --model.language_weights null
--model.tokenizer tiny: random weights take as long as trained ones.
"""

import os
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BatchFeature

from benchmarks import report
from crosslmm.cli import fail, parse_run
from crosslmm.config import BadConfig, RunConfig
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.cross_attention import leave_out_closed_branches
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.param_groups import component_of
from crosslmm.preflight.hardware import Hardware, detect_local, resolve_auto, resolve_checkpointing
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.loop import pinned
from crosslmm.train.optim import build_optimizer

WARM, STEPS = 2, 5
"""Steps before and in each measurement."""
QUESTION, ANSWER = "Which way does it move, and what colour is it?", "right, red"
"""About as long as those of the sample set."""


class Clock:
    """Times spans on the device: by events in its stream on a GPU, so that nothing waits for it in between."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def now(self) -> Any:
        """Return the present moment of the device's stream."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self, name: str, began: Any) -> None:
        """Note a span that ends now."""
        self._spans.append((name, began, self.now()))

    def take(self) -> Counter[str]:
        """Return the time of all spans by name [s], and forget them."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds: Counter[str] = Counter()
        for name, began, ended in self._spans:
            seconds[name] += began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began
        self._spans.clear()
        return seconds


class Step:
    """A training step on a fixed batch, which can be repeated. The process group must be initialised."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.clock = config, device, Clock(device)
        processor = build_processor(config.model)

        def build(weights: bool) -> CrossLMMForConditionalGeneration:
            return build_model(config.model, processor, config.seed, weights)

        self.model: Any = parallelize(build, config.train, device).train()
        leave_out_closed_branches(self.model)
        self.optimizer = build_optimizer(self.model, config.train)
        side, frames = processor.image_size, config.data.num_frames
        random = np.random.default_rng(0)
        videos = [[random.integers(0, 256, (frames, side, side, 3), dtype=np.uint8)]] * config.train.micro_batch_size
        question = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}
        talk: list[dict[str, Any]] = [question, {"role": "assistant", "content": ANSWER}]
        self.batch = pinned(processor([talk] * len(videos), videos), device)

    def __call__(self) -> None:
        """Take the step; note its parts."""
        step = began = self.clock.now()
        inputs = BatchFeature(self.batch.data.copy()).to(self.device, non_blocking=True)  # `to` changes the batch
        loss = self.model(**inputs).loss
        self.clock.note("forward", began)
        began = self.clock.now()
        loss.backward()
        self.clock.note("backward", began)
        began = self.clock.now()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.note("clipping, AdamW", began)
        self.clock.note("step", step)

    def seconds(self) -> float:
        """Return the median time of a step [s]."""
        taken = []
        for _ in range(WARM + STEPS):
            self.clock.take()
            began = time.perf_counter()
            self()
            self.clock.take()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[WARM:])

    def parts(self) -> dict[str, float]:
        """Return the mean time of each part of a step [s]; what lies between the parts is named `rest`."""
        hooks = [hook for name, module in _outermost(self.model) for hook in self._timed(name, module)]
        self.clock.take()
        for _ in range(STEPS):
            self()
        for hook in hooks:
            hook.remove()
        seconds = self.clock.take()
        parts = {name: value / STEPS for name, value in sorted(seconds.items()) if ": " in name}
        for phase in ("forward", "backward"):
            of_parts = sum(value for name, value in parts.items() if name.startswith(f"{phase}: "))
            parts[f"{phase}: rest"] = seconds[phase] / STEPS - of_parts
        return {**parts, "clipping, AdamW": seconds["clipping, AdamW"] / STEPS}

    def _timed(self, name: str, module: nn.Module) -> list[Any]:
        """Return hooks that note the module's forward and backward passes."""
        forward: list[Any] = []
        backward: list[Any] = []

        def enter(*_: Any) -> None:
            if torch._C._current_graph_task_id() < 0:  # else it is computed again, as a part of the backward pass
                forward.append(self.clock.now())

        def leave(*_: Any) -> None:
            if torch._C._current_graph_task_id() < 0:
                self.clock.note(f"forward: {name}", forward.pop())

        def enter_backward(*_: Any) -> None:
            backward.append(self.clock.now())

        def leave_backward(*_: Any) -> None:
            if backward:
                self.clock.note(f"backward: {name}", backward.pop())

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
            module.register_full_backward_pre_hook(enter_backward),
            module.register_full_backward_hook(leave_backward),
        ]

    def operators(self, trace: str | None) -> dict[str, float]:
        """Return the share of each operator in the time (without the operators it calls), the largest first.

        Args:
            trace: file for the trace of all events; None for none.
        """
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.clock.on_gpu else [])]
        with profile(activities=activities) as profiled:
            for _ in range(STEPS):
                self()
        if trace:
            profiled.export_chrome_trace(trace)
        kind = "self_device_time_total" if self.clock.on_gpu else "self_cpu_time_total"
        times = {event.key: getattr(event, kind) for event in profiled.key_averages()}
        total = sum(times.values()) or 1
        return {name: t / total for name, t in sorted(times.items(), key=lambda item: -item[1])}


def _outermost(model: CrossLMMForConditionalGeneration) -> list[tuple[str, nn.Module]]:
    """Return (component, module) for the parts of the layers, each of which belongs to a single component."""
    chosen: list[nn.Module] = [*model.vision_tower.encoder.layers, model.projector]
    for layer in model.language_model.model.layers:
        chosen += [module for name, module in layer.named_children() if name in ("self_attn", "mlp", "v2v", "t2v")]
    names = {id(module): name for name, module in model.named_modules()}
    return [(component_of(f"{names[id(module)]}."), module) for module in chosen]


def main() -> None:
    """Profile and print the result."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--json"]
    trace = None
    if "--trace" in arguments[:-1]:
        at = arguments.index("--trace")
        trace = arguments[at + 1]
        del arguments[at : at + 2]
    try:
        config = parse_run(arguments, description=str(__doc__))
        if config.data.features:
            raise BadConfig("data.features: the profile is of a step from frames; leave it out")
        if trace and not Path(trace).absolute().parent.is_dir():
            raise BadConfig(f"--trace {trace}: its folder does not exist")
    except BadConfig as error:
        fail(error)
    on_gpu = config.scaling.use_gpu and torch.cuda.is_available()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as crosslmm.preflight.hardware sets it
    torch.set_num_threads(1)
    hardware = detect_local() if on_gpu else Hardware()
    config = resolve_checkpointing(resolve_auto(config, hardware), hardware)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    step = Step(config, torch.device("cuda" if on_gpu else "cpu"))
    seconds, parts, operators = step.seconds(), step.parts(), step.operators(trace)
    dist.destroy_process_group()
    figures = {"step_s": seconds, **{f"part {name}": s for name, s in parts.items()}}
    table = Table(title=f"a training step: {seconds * 1e3:.0f} ms", caption=f"trace: {trace}" if trace else None)
    for heading in ("part", "ms", "operator", "self time"):
        table.add_column(heading, justify="left" if heading in ("part", "operator") else "right")
    left = [(name, f"{s * 1e3:.1f}") for name, s in parts.items()]
    right = [(name, f"{share:.1%}") for name, share in list(operators.items())[:14]]
    for i in range(max(len(left), len(right))):
        table.add_row(*(left[i] if i < len(left) else ("", "")), *(right[i] if i < len(right) else ("", "")))
    report("profile_step", table, figures, {"operators": operators}, "--json" in sys.argv)


if __name__ == "__main__":
    main()
