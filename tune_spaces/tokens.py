"""Tokens per frame, without cross-attention and with it: does looking back at all patches replace tokens?"""

from ray import tune

from crosslmm.config import BadConfig, RunConfig
from crosslmm.model.loading import build_config
from crosslmm.sweep.space import Space
from tune_spaces import depth, pooling

MAX_TOKENS = 16
"""Largest number of tokens per frame in the paper."""


def space(config: RunConfig) -> Space:
    """Return a grid over the pooling strides that leave up to `MAX_TOKENS` tokens, and K = 0 or as configured."""
    depth.require_every(config)
    every = config.model.cross_attention_every
    if not every:
        raise BadConfig("--space tokens: needs model.cross_attention_every of at least 1")
    grid = build_config(config.model).grid_size
    strides = [stride for stride in pooling.strides(config) if (-(-grid // stride)) ** 2 <= MAX_TOKENS]
    return {
        "model.pool_stride": tune.grid_search(strides),
        "model.cross_attention_every": tune.grid_search([0, every]),
    }
