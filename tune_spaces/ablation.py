"""Table 2b (none, K = 1, 2, 4, 8, with both branches) and, at the configuration's own K, Table 2a (T2V, V2V alone)."""

from ray import tune

from crosslmm.config import BadConfig, RunConfig
from crosslmm.sweep.space import OnlyIf, Space
from tune_spaces import depth

SEEDS = (0, 1, 2)


def space(config: RunConfig) -> Space:
    """Grids; three seeds where the encoder has weights, for without them a seed would change it too."""
    own = config.model.cross_attention_every
    if not (own and config.model.v2v and config.model.t2v):
        raise BadConfig("--space ablation: the configuration has to have both branches, V2V and T2V, to take one away")
    fixed = config.model.vision_weights or config.model.init_from
    return {
        "model.cross_attention_every": tune.grid_search(sorted({*depth.depths(config), own})),
        "model.v2v": OnlyIf(
            lambda values: values["model.cross_attention_every"] == own, tune.grid_search([True, False]), True
        ),
        # Without either it would be K = 0 again.
        "model.t2v": OnlyIf(
            lambda values: values["model.cross_attention_every"] == own and values["model.v2v"],
            tune.grid_search([True, False]),
            True,
        ),
        "seed": tune.grid_search(list(SEEDS) if fixed else [config.seed]),
    }
