"""Cross-attention depth: every K-th decoder layer, K as in Table 2b of the paper."""

from ray import tune

from crosslmm.config import BadConfig, RunConfig
from crosslmm.model.loading import build_config
from crosslmm.sweep.space import Space


def space(config: RunConfig) -> Space:
    """Return a grid over K; 0 is no cross-attention."""
    return {"model.cross_attention_every": tune.grid_search(depths(config))}


def depths(config: RunConfig) -> list[int]:
    """Return 0, 1, 2, 4, 8, up to the number of decoder layers.

    Raises:
        BadConfig: the configuration lists its layers, which makes K meaningless.
    """
    require_every(config)
    layers = build_config(config.model).text_config.num_hidden_layers
    return [every for every in (0, 1, 2, 4, 8) if every <= layers]


def require_every(config: RunConfig) -> None:
    """Check that K decides which layers have cross-attention.

    Raises:
        BadConfig: the configuration lists them.
    """
    if config.model.cross_attention_layers is not None:
        raise BadConfig("--space: model.cross_attention_layers is given, so K has no effect; set it to null")
