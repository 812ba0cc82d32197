"""A run's state as Ray metrics, which Prometheus scrapes on the driver's node; `cluster/grafana.json` draws them."""

from ray.util.metrics import Gauge

STEP_GAUGES = {
    "loss": ("crosslmm_loss", "Training loss of the last step."),
    "step_s": ("crosslmm_step_seconds", "Duration of the last step, without its wait for data [s]."),
    "frames_per_s": ("crosslmm_frames_per_second", "Frames of all ranks [1/s]."),
    "samples_per_s": ("crosslmm_samples_per_second", "Samples of all ranks [1/s]."),
    "tokens_per_s": ("crosslmm_tokens_per_second", "Tokens of all ranks, padding not counted [1/s]."),
    "data_wait_share": ("crosslmm_data_wait_share", "Share of the last step's time that ranks waited for data."),
}
"""Gauge, and its description, of each metric of a step that is exported."""
RUN_GAUGES = {
    "step": ("crosslmm_step", "Optimizer steps done."),
    "total_steps": ("crosslmm_total_steps", "Optimizer steps of the whole run."),
    "unreadable": ("crosslmm_unreadable_rows", "Rows in the run's quarantine.jsonl."),
    "waiting": ("crosslmm_steps_waiting_for_mlflow", "Steps whose metrics MLflow does not have yet."),
    "sealed_at": ("crosslmm_checkpoint_timestamp_seconds", "When the last checkpoint was sealed [unix time, s]."),
}
"""Other gauges of a run."""


class RunGauges:
    """The gauges of one run, told apart from those of others by the label `run`. Ray prefixes their names with `ray_`.

    Ray forgets a gauge that was not set for two of its intervals, which are 20 s: `repeat` keeps them all, or nobody
    would learn that the last checkpoint is old, or that a step takes long.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self._labels = {"run": run}
        self._gauges = {key: Gauge(name, text, ("run",)) for key, (name, text) in {**STEP_GAUGES, **RUN_GAUGES}.items()}
        self._values: dict[str, float] = {}

    def set(self, **values: float) -> None:
        """Set the gauges that have these keys; other values, as most metrics of a step are, are not exported."""
        for key in values.keys() & self._gauges.keys():
            self._values[key] = float(values[key])
            self._gauges[key].set(self._values[key], self._labels)

    def repeat(self) -> None:
        """Set all gauges to what they are."""
        self.set(**self._values)
