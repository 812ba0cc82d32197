"""Tokens per frame: every number below 256 that the encoder's grid can be pooled to, and the whole grid."""

from ray import tune

from crosslmm.config import RunConfig
from crosslmm.model.loading import build_config
from crosslmm.sweep.space import Space


def space(config: RunConfig) -> Space:
    """Return a grid over the pooling stride."""
    return {"model.pool_stride": tune.grid_search(strides(config))}


def strides(config: RunConfig) -> list[int]:
    """Return the smallest stride for each number of tokens per frame below 256, and 1 for all tokens."""
    grid = build_config(config.model).grid_size
    smallest = {-(-grid // stride): stride for stride in range(grid, 0, -1)}
    few = [stride for side, stride in sorted(smallest.items()) if side**2 < 256]
    return [*few, *([1] if 1 not in few else [])]
