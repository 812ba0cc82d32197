"""Which trial comes next: first those an earlier start left unfinished, then the grid or Optuna's next point.

`Search` is the searcher that Tune asks; `TrialFactory` makes a trial of a point, with its costs, or rejects it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from ray.tune.search import Searcher

from crosslmm.config import BadConfig, RunConfig
from crosslmm.planning import checkpointing, cost, peak_memory
from crosslmm.planning.assumptions import GPUS, Assumptions
from crosslmm.planning.plan import usable_memory
from crosslmm.sweep import trials
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import Space, apply, grid, is_grid, settings, suggest
from crosslmm.sweep.trials import Point, Trial
from crosslmm.tracking import MlflowRun

MAX_REJECTIONS = 50
"""Rejected points in a row that end the search."""


class Search(Searcher):
    """Suggests trials to Tune. Each point becomes a trial or is rejected before anything starts.

    Optuna's TPE has two objectives, high accuracy and low compute; for a trial that was stopped early it gets the last
    accuracy. Nothing of this object is pickled by Tune: the trials' files hold all that a resume needs.

    Args:
        space: the search space.
        config: the sweep's configuration.
        earlier: trials of earlier starts.
        make: creates the trial with a number and a point; raises BadConfig with the reason to reject the point.
        max_trials: trials of the whole sweep.
    """

    def __init__(
        self,
        space: Space,
        config: RunConfig,
        earlier: Sequence[Trial],
        make: Callable[[int, Point], Trial],
        max_trials: int,
    ) -> None:
        super().__init__()
        self.space, self.config, self.make, self.max_trials = space, config, make, max_trials
        self.trials = list(earlier)
        self.by_id: dict[str, Trial] = {}
        """Trials of this start, by Tune's id."""
        self.rejected: list[tuple[Point, str]] = []
        self._unfinished = [trial for trial in earlier if trial.state in ("running", "out of budget")]
        self._grid = [point for point in grid(space, config) if not self._was_tried(point)] if is_grid(space) else None
        self._study = optuna.create_study(
            directions=["maximize", "minimize"],
            # Another seed at each start, so that it does not draw the same points again.
            sampler=optuna.samplers.TPESampler(seed=config.seed + len(earlier)),
        )
        self._pending: dict[int, optuna.Trial] = {}
        if self._grid is None:
            for trial in earlier:  # bring the study to the state it had
                self._replay(trial)

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial as {"trial": JSON}, or that there is none."""
        trial = self._unfinished.pop(0) if self._unfinished else self._next()
        if trial is None:
            return Searcher.FINISHED
        trial.state = "running"
        self.by_id[trial_id] = trial
        return {"trial": trials.to_json(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record the end of a trial, whatever the reason."""
        self._report(self.by_id[trial_id], result or {}, error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: intermediate results are the scheduler's business."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' files hold the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' files hold the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _next(self) -> Trial | None:
        rejected_before = len(self.rejected)
        while len(self.trials) < self.max_trials and (
            self._grid or len(self.rejected) - rejected_before < MAX_REJECTIONS
        ):
            number, drawn = len(self.trials), None
            if self._grid is None:
                drawn = self._study.ask()
                point = suggest(self.space, self.config, drawn)
            elif self._grid:
                point = self._grid.pop(0)
            else:
                return None
            trial = self._create(number, point)
            if trial:
                self.trials.append(trial)
                if drawn:
                    self._pending[number] = drawn
                return trial
            if drawn:
                self._study.tell(drawn, state=optuna.trial.TrialState.FAIL)
        return None

    def _create(self, number: int, point: Point) -> Trial | None:
        try:
            if self._was_tried(point):
                raise BadConfig("already tried")
            return self.make(number, point)
        except BadConfig as error:
            self.rejected.append((point, str(error)))
            return None

    def _was_tried(self, point: Point) -> bool:
        return any(trial.point == point for trial in self.trials)

    def _replay(self, trial: Trial) -> None:
        self._study.enqueue_trial(trial.point)
        self._pending[trial.number] = drawn = self._study.ask()
        suggest(self.space, self.config, drawn)
        if trial not in self._unfinished:
            self._report(trial, {}, error=trial.state == "failed")

    def _report(self, trial: Trial, result: Mapping[str, Any], error: bool) -> None:
        """Report a trial's result to Optuna. A stopped trial's result has its last validation; an ended trial's has
        none."""
        drawn = self._pending.pop(trial.number, None)
        if drawn is None:
            return
        if "loss" not in result and trial.last:
            result = trial.last._asdict()
        if not error and np.isfinite(result.get("loss", np.nan)):
            self._study.tell(drawn, [result["accuracy"], float(np.log(trial.macs))])
        else:
            self._study.tell(drawn, state=optuna.trial.TrialState.FAIL)


TEXT_TOKENS, STAMP_TOKENS = Assumptions().text_tokens, Assumptions().stamp_tokens
"""Length of the text in the sample whose prefill is counted, and of each frame's timestamp if `data.timestamps` is set
[tokens]."""


class TrialFactory:
    """Makes trials, each with an MLflow run below the sweep's.

    Args:
        base: configuration on which the points are applied; its storage is the sweep's folder.
        sweep: limit of MACs, and the GPU whose memory trials must fit.
        space: the search space.
        record: MLflow run of the sweep.
        available: memory of a worker, if `sweep` names no GPU [bytes].
    """

    def __init__(
        self, base: RunConfig, sweep: SweepSettings, space: Space, record: MlflowRun, available: float = math.inf
    ) -> None:
        self.base, self.sweep, self.space, self.record = base, sweep, space, record
        self._available = usable_memory(Assumptions(gpu=sweep.gpu)) if sweep.gpu else available

    def __call__(self, number: int, point: Point) -> Trial:
        """Make the trial of a point.

        Raises:
            BadConfig: the model cannot be built, does not fit the GPU, or exceeds the limit of MACs.
        """
        values = settings(self.space, self.base, point)
        config = apply(self.base, values)
        model = cost.meta_model(config.model)
        macs, encoder_macs = prefill_macs(config)
        if self.sweep.max_macs and macs > self.sweep.max_macs:
            limit = f"--max_macs allows {self.sweep.max_macs:,.0f}"
            raise BadConfig(f"prefill needs {macs:,} MACs without the vision encoder; {limit}")
        memory = self._memory(config)
        if (gpu := self.sweep.gpu) and memory > self._available:
            holds = GPUS[gpu].memory_bytes
            raise BadConfig(
                f"training needs {memory / 1e9:,.1f} GB, more than is usable of the {holds / 1e9:.0f} GB of --gpu {gpu}"
            )
        trial = Trial(number, point, values, model.config.tokens_per_frame, macs, encoder_macs, memory)
        child = MlflowRun.create(
            self.record.tracking, trial.title or trial.name, "jobs/tune.py", parent=self.record.run_id
        )
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

    def _memory(self, config: RunConfig) -> int:
        """Return the peak memory of a trial's training step [bytes]."""
        if config.train.activation_checkpointing == "auto":
            return checkpointing.choose(config, self._available).needed_bytes
        text = TEXT_TOKENS, STAMP_TOKENS * config.data.timestamps
        traced = peak_memory.training_trace(config, config.data.num_frames, *text)
        return peak_memory.training_memory(config, traced).total


def prefill_macs(config: RunConfig) -> tuple[int, int]:
    """Count the MACs of one sample's prefill, attention products included -> (without the vision encoder, of the
    encoder)."""
    model, frames = cost.meta_model(config.model), config.data.num_frames
    macs = cost.macs(model, frames, TEXT_TOKENS, STAMP_TOKENS * config.data.timestamps)
    encoder_macs = cost.encoder_macs(model, frames)
    return macs.linear + macs.attention_products - encoder_macs, encoder_macs
