"""How a space is searched: the arguments of jobs/tune.py beside the configuration of its trials."""

from typing import Annotated, Literal

from pydantic import Field

from crosslmm.config import BadConfig, Count, RunConfig, Section

NO_CLONES = (
    "it continues trials from other trials' checkpoints or pauses them, which Tune cannot do with Ray Train runs"
)
REFUSED = ("pbt", "pbt_replay", "pb2", "hyperband", "hb_bohb", "bohb", "resource_changing")
SCHEDULERS = ("asha", "none")


class SweepSettings(Section):
    """How a space is searched."""

    trials: Count | None = None
    """Trials in all, those of earlier starts included; null walks a grid whole, and draws 32 of any other space."""
    scheduler: str = "asha"
    """asha stops trials whose validation loss at a rung is not among the best; none lets all go to their end."""
    rung: Literal["steps", "compute"] = "steps"
    """What rungs are counted in: optimizer steps, or multiply-accumulates spent, which lets cheap trials take more
    steps before they are judged."""
    first_rung: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Where the first rung is, as a share of a trial's steps (or of the compute of the configuration as given)."""
    keep_one_in: Annotated[float, Field(gt=1)] = 2.0
    """Of the trials that reach a rung, one in so many goes on; the next rung is so many times as far."""
    concurrent: Count | None = None
    """Trials at a time; null: as many as the cluster, scaled up to its limit, can place."""
    hours: Annotated[float, Field(gt=0)] | None = None
    """Wall clock of trials after which this start ends, running ones included; they go on at the next [h]."""
    dollars: Annotated[float, Field(gt=0)] | None = None
    """What trials may cost together, from start to end, earlier starts included; needs `price` [USD]."""
    price: Annotated[float, Field(gt=0)] | None = None
    """Of one training worker [USD an hour]."""
    gpu: Literal["l4", "rtx-4090", "a100-40", "l40s", "a100-80", "h100", "h200", "b200"] | None = None
    """What workers have: points whose training from videos, by the planner, it cannot hold are left out; null leaves
    none out."""
    max_macs: Annotated[float, Field(gt=0)] | None = None
    """Points whose prefill behind the vision encoder takes more are left out [MACs of one sample]."""
    features: Literal["auto", "bf16", "int8", "never"] = "auto"
    """Encode every video once, in this form, and train all trials from the features; auto: in bf16, where trials look
    at videos more often than there are videos."""
    promote: str | None = None
    """Register the model of a trial: best (most accurate), knee (of the front, where more compute stops paying), or a
    trial's number; it is given `tracking.alias`."""

    def check(self, config: RunConfig) -> None:
        """What types do not say, alone and beside the configuration that is searched.

        Raises:
            BadConfig: naming the argument.
        """
        if self.scheduler in REFUSED:
            raise BadConfig(f"--scheduler {self.scheduler}: {NO_CLONES}; take {' or '.join(SCHEDULERS)}")
        if self.scheduler not in SCHEDULERS:
            raise BadConfig(f"--scheduler {self.scheduler}: there are {' and '.join(SCHEDULERS)}")
        if self.dollars and not self.price:
            raise BadConfig("--dollars: needs --price, what one training worker costs [USD an hour]")
        if self.promote and self.promote not in ("best", "knee") and not self.promote.isdecimal():
            raise BadConfig(f"--promote {self.promote}: best, knee, or a trial's number")
        if not (config.data.validation_manifest or config.data.manifest == "sample"):
            raise BadConfig("data.validation_manifest: trials are compared on held-out samples; give their manifest")
