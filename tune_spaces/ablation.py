"""Tables 2b and 2a of the paper as one grid: no cross-attention or K = 1, 2, 4, 8; at the configured K, also
single branches."""

from ray import tune

from crosslmm.config import RunConfig
from crosslmm.sweep.space import Space
from tune_spaces import branches, depth


def space(config: RunConfig) -> Space:
    """Return the grids of `branches`, with more depths."""
    at_k = branches.space(config)
    return at_k | {
        "model.cross_attention_every": tune.grid_search(
            sorted({*depth.depths(config), config.model.cross_attention_every})
        )
    }
