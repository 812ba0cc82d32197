"""Tokens per frame, cross-attention depth and learning rates together."""

from ray import tune

from crosslmm.config import RunConfig
from crosslmm.sweep.space import Space
from tune_spaces import depth, learning_rate, pooling


def space(config: RunConfig) -> Space:
    """Return distributions: a grid over all three would be too large."""
    return {
        "model.pool_stride": tune.choice(pooling.strides(config)),
        "model.cross_attention_every": tune.choice(depth.depths(config)),
        **learning_rate.space(config),
    }
