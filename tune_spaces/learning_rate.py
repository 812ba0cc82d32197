"""Learning rates: for each trained component but the vision encoder, a fifth to five times the configured rate."""

from ray import tune

from crosslmm.config import RunConfig
from crosslmm.sweep.space import OnlyIf, Space


def space(config: RunConfig) -> Space:
    """Return log-uniform rates; those of the cross-attentions only if the model has any."""
    rates = {part: rate for part, rate in config.train.learning_rate.model_dump().items() if rate and part != "vision"}
    domains: Space = {
        f"train.learning_rate.{part}": tune.loguniform(rate / 5, rate * 5) for part, rate in rates.items()
    }
    for path in ("train.learning_rate.v2v", "train.learning_rate.t2v"):
        if path in domains:
            domains[path] = OnlyIf(lambda values: values["model.cross_attention_every"] > 0, domains[path], 0.0)
    return domains
