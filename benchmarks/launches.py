"""Count the kernels of a training step with compiled blocks: python -m benchmarks.launches [--json].

Setting and eager count are those of `benchmarks.syncs`. Inductor compiles each kind of block for the CPU, and the calls
in its generated code are counted, forward and backward: fused kernels, matrix products, attention. A GPU's code has the
same graphs and fuses nearly alike; none was at hand. Limit: a third fewer (`launches_compiled_over_eager` 0.67). Ten
minutes, nearly all of them compilation.
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import run_fw_bw_and_get_code

from benchmarks import report
from benchmarks.emulated_gpu import COUNTS, DEVICE, Emulation
from benchmarks.syncs import FRAMES, build_run, of_step
from crosslmm.model.compilation import compile_blocks
from crosslmm.model.loading import build_model, build_processor

LIMIT = 0.67
CALL = re.compile(r"^\s+(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.(?!inductor)[\w.]+)\(", re.MULTILINE)
"""A line of inductor's code that runs a kernel."""
MICRO_BATCHES = 2
LENGTH = FRAMES * 4 + 30


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    config = build_run()
    whole = of_step(config, "sdpa")["launches"].total()
    table = Table(title="kernels of a training step of two micro-batches, at the 2B's depth")
    for heading in ("block", "calls", "eager: forward + backward", "compiled: forward + backward"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    saved = 0
    blocks = {name: (calls, eager(name), compiled(name)) for name, calls in _blocks().items()}
    for name, (calls, before, after) in blocks.items():
        # Recomputation runs each forward pass twice.
        saved += calls * (2 * (before[0] - after[0]) + before[1] - after[1])
        table.add_row(name, str(calls), *(f"{forward} + {backward}" for forward, backward in (before, after)))
    breaks = {name: graph_breaks(name) for name in blocks}
    figures = {
        "graph_breaks_in_blocks": sum(breaks.values()),
        "launches_per_step": whole,
        "launches_per_step_compiled": whole - saved,
        "launches_compiled_over_eager": (whole - saved) / whole,
    }
    missed = "" if figures["launches_compiled_over_eager"] <= LIMIT else "  MISSED"
    table.caption = (
        f"{whole} in all, {whole - saved} with compiled blocks: "
        f"{figures['launches_compiled_over_eager']:.3f} (limit {LIMIT}){missed}; graph breaks in blocks: "
        f"{figures['graph_breaks_in_blocks']} (limit 0)"
    )
    report("launches", table, figures, {"launches": blocks, "graph_breaks": breaks}, arguments.json)
    dist.destroy_process_group()


def _blocks() -> dict[str, int]:
    """Return how often each kind of block is called in a step."""
    model = _model().config
    layers, dual = model.text_config.num_hidden_layers, len(model.dual_layers)
    calls = {
        "encoder layer": model.vision_config.num_hidden_layers,
        "decoder layer": layers - dual,
        "self-attention of a layer with cross-attention": dual,
        "feed-forward of a layer with cross-attention": dual,
        "queries of a cross-attention": 2 * dual,
        "keys and values of a cross-attention": 2 * dual,
    }
    return {name: MICRO_BATCHES * number for name, number in calls.items()}


def _model() -> Any:
    config = build_run().model
    return build_model(config, build_processor(config), 0).train()


def eager(name: str) -> tuple[int, int]:
    """Return the launches of a block, forward and backward."""
    with Emulation():
        call = _call(_model().to(DEVICE), name, DEVICE)
        COUNTS.take()
        out = call()
        forward = COUNTS.take()["launches"].total()
        out.backward(torch.ones_like(out))
        # Neither the gradient that is given nor the sums over calls belong to the block.
        return forward, COUNTS.take()["launches"].total() - 1


def compiled(name: str) -> tuple[int, int]:
    """Return the kernels that inductor's code runs for a block, forward and backward."""
    torch._dynamo.reset()
    model = _model()
    compile_blocks(model)
    _, (forward, backward) = run_fw_bw_and_get_code(_call(model, name, "cpu"))
    return len(CALL.findall(forward)), len(CALL.findall(backward))


def graph_breaks(name: str) -> int:
    """Return how often Dynamo leaves the graph in a block."""
    torch._dynamo.reset()
    return int(torch._dynamo.explain(_call(_model(), name, "cpu"))().graph_break_count)


def _call(model: Any, name: str, device: str) -> Callable[[], Tensor]:
    vision, text = model.config.vision_config, model.config.text_config
    frames = torch.randn(FRAMES, model.config.patches_per_frame, vision.hidden_size).to(device).requires_grad_()
    tokens = torch.randn(FRAMES, model.config.patches_per_frame, text.hidden_size).to(device).requires_grad_()
    x = torch.randn(1, LENGTH, text.hidden_size).to(device).requires_grad_()
    layers = model.language_model.model.layers
    dual = layers[0]
    positions = torch.arange(LENGTH)[None].to(device)
    attention = {
        "position_embeddings": model.language_model.model.rotary_emb(x, positions),
        "attention_mask": None,
        "past_key_values": None,
    }
    calls: dict[str, Callable[[], Tensor]] = {
        "encoder layer": lambda: model.vision_tower.encoder.layers[0]._frames(frames),
        "decoder layer": lambda: layers[1].forward(x, **attention),
        "self-attention of a layer with cross-attention": lambda: dual._attend_to_itself(x, **attention),
        "feed-forward of a layer with cross-attention": lambda: dual._feed_forward(x),
        "queries of a cross-attention": lambda: dual.v2v._query(x, positions),
        "keys and values of a cross-attention": lambda: dual.v2v._project(tokens),
    }
    return calls[name]


if __name__ == "__main__":
    main()
