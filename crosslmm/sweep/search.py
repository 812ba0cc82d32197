"""The searcher for Tune: first the trials that an earlier start left unfinished, then the grid or Optuna's next
point."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from ray.tune.search import Searcher

from crosslmm.config import BadConfig, RunConfig
from crosslmm.sweep import trials
from crosslmm.sweep.space import Space, grid, is_grid, suggest
from crosslmm.sweep.trials import Point, Trial

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
        make: creates the trial of a number and a point; raises BadConfig with the reason to reject the point.
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
            # A new start draws other points than an earlier one.
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
