"""A point -> a trial with what it costs, or the reason why it is not tried."""

from crosslmm.config import BadConfig, RunConfig
from crosslmm.planning import cost
from crosslmm.planning.plan import GPUS, Assumptions, usable_memory
from crosslmm.sweep import trials
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, apply, settings
from crosslmm.sweep.trials import Point, Trial
from crosslmm.tracking import MlflowRun

TEXT_TOKENS = Assumptions().text_tokens
"""Of the sample whose prefill is counted [tokens]."""


class Candidates:
    """Makes trials, each with an MLflow run of its own below the sweep's.

    Args:
        base: what points are laid over; its storage is the sweep's folder.
        chosen: the budget of MACs, and the GPU that trials have to fit.
        space: where points come from.
        record: of the sweep.
    """

    def __init__(self, base: RunConfig, chosen: SweepSettings, space: Space, record: MlflowRun) -> None:
        self.base, self.chosen, self.space, self.record = base, chosen, space, record

    def __call__(self, number: int, point: Point) -> Trial:
        """A trial for this point.

        Raises:
            BadConfig: it cannot be built, does not fit, or exceeds the budget of MACs.
        """
        given = settings(self.space, self.base, point)
        config = apply(self.base, given)
        model, frames = cost.empty_model(config.model), config.data.num_frames
        behind, of_encoder = prefill(config)
        if self.chosen.max_macs and behind > self.chosen.max_macs:
            allowed = f"--max_macs allows {self.chosen.max_macs:,.0f}"
            raise BadConfig(f"{behind:,} MACs of prefill behind the encoder; {allowed}")
        memory = cost.training_memory(config, cost.training_trace(config, frames, TEXT_TOKENS)).total
        if (gpu := self.chosen.gpu) and memory > usable_memory(Assumptions(gpu=gpu)):
            whole = GPUS[gpu].memory_bytes
            raise BadConfig(
                f"training takes {memory / 1e9:,.1f} GB, too much for the {whole / 1e9:.0f} GB of --gpu {gpu}"
            )
        trial = Trial(number, point, given, model.config.tokens_per_frame, behind, of_encoder, memory)
        child = MlflowRun.create(self.record.tracking, trial.name, "jobs/tune.py", parent=self.record.run_id)
        child.log_params({"trial": {"number": number, **point}})
        costs = {
            "macs_behind_encoder": behind,
            "macs_encoder": of_encoder,
            "tokens_per_frame": trial.tokens_per_frame,
            "memory_bytes": memory,
        }
        child.log_values({f"cost/{name}": float(value) for name, value in costs.items()}, {"trial": str(number)})
        trial.run_id = child.run_id
        # Before it starts: whenever the sweep is killed, this run is some trial's.
        trials.write(self.base.storage, trial)
        return trial


def prefill(config: RunConfig) -> tuple[int, int]:
    """MACs of one sample's prefill behind the vision encoder, and in it; attention products included."""
    model, frames = cost.empty_model(config.model), config.data.num_frames
    macs, of_encoder = cost.macs(model, frames, TEXT_TOKENS), cost.encoder_macs(model, frames)
    return macs.linear + macs.attention_products - of_encoder, of_encoder
