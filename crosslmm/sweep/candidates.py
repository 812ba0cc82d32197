"""Makes a trial of a point, with its costs, or rejects the point before it starts."""

from crosslmm.config import BadConfig, RunConfig
from crosslmm.planning import cost
from crosslmm.planning.plan import GPUS, Assumptions, usable_memory
from crosslmm.sweep import trials
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, apply, settings
from crosslmm.sweep.trials import Point, Trial
from crosslmm.tracking import MlflowRun

TEXT_TOKENS = Assumptions().text_tokens
"""Text length of the sample whose prefill is counted [tokens]."""


class Candidates:
    """Makes trials, each with an MLflow run below the sweep's.

    Args:
        base: configuration under every point; its storage is the sweep's folder.
        sweep: limit of MACs, and the GPU whose memory trials must fit.
        space: the search space.
        record: MLflow run of the sweep.
    """

    def __init__(self, base: RunConfig, sweep: SweepSettings, space: Space, record: MlflowRun) -> None:
        self.base, self.sweep, self.space, self.record = base, sweep, space, record

    def __call__(self, number: int, point: Point) -> Trial:
        """Make the trial of a point.

        Raises:
            BadConfig: the model cannot be built, does not fit the GPU, or exceeds the limit of MACs.
        """
        values = settings(self.space, self.base, point)
        config = apply(self.base, values)
        model, frames = cost.empty_model(config.model), config.data.num_frames
        macs, encoder_macs = prefill(config)
        if self.sweep.max_macs and macs > self.sweep.max_macs:
            limit = f"--max_macs allows {self.sweep.max_macs:,.0f}"
            raise BadConfig(f"prefill needs {macs:,} MACs without the vision encoder; {limit}")
        memory = cost.training_memory(config, cost.training_trace(config, frames, TEXT_TOKENS)).total
        if (gpu := self.sweep.gpu) and memory > usable_memory(Assumptions(gpu=gpu)):
            available = GPUS[gpu].memory_bytes
            raise BadConfig(
                f"training needs {memory / 1e9:,.1f} GB, more than the {available / 1e9:.0f} GB of --gpu {gpu} hold"
            )
        trial = Trial(number, point, values, model.config.tokens_per_frame, macs, encoder_macs, memory)
        child = MlflowRun.create(self.record.tracking, trial.name, "jobs/tune.py", parent=self.record.run_id)
        child.log_params({"trial": {"number": number, **point}})
        costs = {
            "macs_behind_encoder": macs,
            "macs_encoder": encoder_macs,
            "tokens_per_frame": trial.tokens_per_frame,
            "memory_bytes": memory,
        }
        child.log_values({f"cost/{name}": float(value) for name, value in costs.items()}, {"trial": str(number)})
        trial.run_id = child.run_id
        # Written before the trial starts, so that a killed sweep never leaves an MLflow run without its trial.
        trials.write(self.base.storage, trial)
        return trial


def prefill(config: RunConfig) -> tuple[int, int]:
    """Count the MACs of one sample's prefill, attention products included -> (without the vision encoder, of the
    encoder)."""
    model, frames = cost.empty_model(config.model), config.data.num_frames
    macs, encoder_macs = cost.macs(model, frames, TEXT_TOKENS), cost.encoder_macs(model, frames)
    return macs.linear + macs.attention_products - encoder_macs, encoder_macs
