"""How often do the tokens have to look back? Cross-attention in every K-th decoder layer, K as in Table 2b."""

from ray import tune

from crosslmm.config import BadConfig, RunConfig
from crosslmm.model.loading import build_config
from crosslmm.sweep.space import Space


def space(config: RunConfig) -> Space:
    """A grid over K; 0 is none."""
    return {"model.cross_attention_every": tune.grid_search(depths(config))}


def depths(config: RunConfig) -> list[int]:
    """0, 1, 2, 4, 8 as far as the decoder has so many layers."""
    if config.model.cross_attention_layers is not None:
        raise BadConfig("--space: model.cross_attention_layers is given, beside which K says nothing; make it null")
    layers = build_config(config.model).text_config.num_hidden_layers
    return [every for every in (0, 1, 2, 4, 8) if every <= layers]
