"""Settings of a sweep: the arguments of jobs/tune.py besides the configuration of its trials."""

from typing import Annotated, Literal

from pydantic import Field

from crosslmm.config import BadConfig, RunConfig
from crosslmm.config.schema import Count
from crosslmm.planning.budget import Budget

NO_CLONES = (
    "it continues trials from other trials' checkpoints or pauses them, which Tune cannot do with Ray Train runs"
)
UNSUPPORTED_SCHEDULERS = ("pbt", "pbt_replay", "pb2", "hyperband", "hb_bohb", "bohb", "resource_changing")
SCHEDULERS = ("asha", "none")


class SweepSettings(Budget):
    """The sweep."""

    trials: Count | None = None
    """Trials in total, those of earlier starts included; null runs a whole grid, and draws 32 points of any other
    space."""
    scheduler: str = "asha"
    """asha stops trials that fall behind at a rung, by validation loss; none lets all trials finish."""
    rung: Literal["steps", "compute"] = "steps"
    """Unit of the positions of rungs: optimizer steps, or multiply-accumulates, which gives cheap trials more steps
    before they are judged."""
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Position of the first rung, as a share of a trial's steps (or of the base configuration's compute)."""
    keep_one_in: Annotated[float, Field(gt=1)] = 2.0
    """Reduction factor: one in this many trials passes a rung, and the next rung is this many times as far along."""
    concurrent: Count | None = None
    """Concurrent trials; null: as many as the cluster, scaled up to its limit, has room for."""
    gpu: Literal["l4", "rtx-4090", "a100-40", "l40s", "a100-80", "h100", "h200", "b200"] | None = None
    """GPU of the workers: points whose training, as the planner predicts, does not fit its memory are rejected before
    they start."""
    max_macs: Annotated[float, Field(gt=0)] | None = None
    """Limit of the prefill without the vision encoder [multiply-accumulates per sample]; points above are rejected."""
    features: Literal["auto", "bf16", "int8", "never"] = "auto"
    """Encode every video once, in this format, and train all trials from the features; auto: in bf16, if trials read
    more samples than there are videos."""
    promote: str | None = None
    """Register the model of one trial under `tracking.alias`: best (most accurate), knee (of the Pareto front, where
    more compute stops paying), or a trial's number."""

    def check(self, config: RunConfig) -> None:
        """Check the settings against each other and against the base configuration.

        Raises:
            BadConfig: naming the argument.
        """
        if self.scheduler in UNSUPPORTED_SCHEDULERS:
            raise BadConfig(f"--scheduler {self.scheduler}: {NO_CLONES}; choose {' or '.join(SCHEDULERS)}")
        if self.scheduler not in SCHEDULERS:
            raise BadConfig(f"--scheduler {self.scheduler}: choose {' or '.join(SCHEDULERS)}")
        self.check_budget()
        if self.promote and self.promote not in ("best", "knee") and not self.promote.isdecimal():
            raise BadConfig(f"--promote {self.promote}: give best, knee, or a trial's number")
        if not (config.data.validation_manifest or config.data.manifest == "sample"):
            raise BadConfig("data.validation_manifest: trials are compared on held-out samples; give their manifest")
