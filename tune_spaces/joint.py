"""How few tokens, with cross-attention how often, at which learning rates: all three at once."""

from ray import tune

from crosslmm.config import RunConfig
from crosslmm.sweep.space import Space
from tune_spaces import depth, learning_rate, pooling


def space(config: RunConfig) -> Space:
    """Drawn, not walked: a grid of all would be too many."""
    return {
        "model.pool_stride": tune.choice(pooling.strides(config)),
        "model.cross_attention_every": tune.choice(depth.depths(config)),
        **learning_rate.space(config),
    }
