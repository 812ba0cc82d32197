"""Which cross-attentions, as in Table 2a of the paper: none, T2V, V2V, both; at the configured depth K."""

from ray import tune

from crosslmm.config import BadConfig, RunConfig
from crosslmm.sweep.space import OnlyIf, Space
from tune_spaces import depth

SEEDS = (0, 1, 2)


def space(config: RunConfig) -> Space:
    """Return grids; three seeds if the encoder has published weights, since a seed would change a random encoder."""
    depth.require_every(config)
    configured = config.model.cross_attention_every
    if not (configured and config.model.v2v and config.model.t2v):
        raise BadConfig(
            "--space branches and ablation: need model.v2v true, model.t2v true and model.cross_attention_every of at "
            "least 1"
        )
    has_weights = config.model.vision_weights or config.model.init_from
    return {
        "model.cross_attention_every": tune.grid_search([0, configured]),
        "model.v2v": OnlyIf(
            lambda values: values["model.cross_attention_every"] == configured, tune.grid_search([True, False]), True
        ),
        # With neither branch it would be K = 0 again.
        "model.t2v": OnlyIf(
            lambda values: values["model.cross_attention_every"] == configured and values["model.v2v"],
            tune.grid_search([True, False]),
            True,
        ),
        "seed": tune.grid_search(list(SEEDS) if has_weights else [config.seed]),
    }
