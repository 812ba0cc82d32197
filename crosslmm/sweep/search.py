"""Which point a sweep tries next: what an earlier start left unfinished, then the grid, or what Optuna draws."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from ray.tune.search import Searcher

from crosslmm.config import BadConfig, RunConfig
from crosslmm.sweep import trials
from crosslmm.sweep.space import Space, grid, is_grid, suggest
from crosslmm.sweep.trials import Point, Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)

REFUSALS = 50
"""So many points refused in a row end the search: there is hardly another one."""


class Search(Searcher):
    """Points for Tune, each refused or made a trial before anything starts.

    Optuna's TPE seeks high accuracy and little compute at once; of a trial that was stopped early it hears where that
    one stood. What Tune would keep of it in pickles is not kept: `known` holds all that a resume needs.

    Args:
        space: what is searched.
        config: what it is laid over.
        known: trials of earlier starts.
        make: a number and a point -> the trial; raises BadConfig where it should not be tried, saying why.
        most: trials of the whole sweep.
    """

    def __init__(
        self,
        space: Space,
        config: RunConfig,
        known: Sequence[Trial],
        make: Callable[[int, Point], Trial],
        most: int,
    ) -> None:
        super().__init__()
        self.space, self.config, self.make, self.most = space, config, make, most
        self.trials = list(known)
        self.by_id: dict[str, Trial] = {}
        """Trials of this start, by Tune's name for them."""
        self.refused: list[tuple[Point, str]] = []
        self._unfinished = [trial for trial in known if trial.state in ("running", "out of budget")]
        self._grid = [point for point in grid(space, config) if not self._was_tried(point)] if is_grid(space) else None
        self._study = optuna.create_study(
            directions=["maximize", "minimize"],
            # Other draws than an earlier start made.
            sampler=optuna.samplers.TPESampler(seed=config.seed + len(known)),
        )
        self._asked: dict[int, optuna.Trial] = {}
        if self._grid is None:
            for trial in known:  # drawn again, as they were then, so that the study stands where it stood
                self._draw_again(trial)

    def suggest(self, trial_id: str) -> Any:
        """Tune asks for a trial: {"trial": its JSON}, or that there are no more."""
        trial = self._unfinished.pop(0) if self._unfinished else self._next()
        if trial is None:
            return Searcher.FINISHED
        trial.state = "running"
        self.by_id[trial_id] = trial
        return {"trial": trials.to_json(trial)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune says that a trial has ended, in whichever way."""
        self._tell(self.by_id[trial_id], result or {}, error)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing is decided in between: that is the scheduler's part."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing; see above."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see above."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def _next(self) -> Trial | None:
        refused_before = len(self.refused)
        while len(self.trials) < self.most and (self._grid or len(self.refused) - refused_before < REFUSALS):
            number, asked = len(self.trials), None
            if self._grid is None:
                asked = self._study.ask()
                point = suggest(self.space, self.config, asked)
            elif self._grid:
                point = self._grid.pop(0)
            else:
                return None
            trial = self._made(number, point)
            if trial:
                self.trials.append(trial)
                if asked:
                    self._asked[number] = asked
                return trial
            if asked:
                self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _made(self, number: int, point: Point) -> Trial | None:
        try:
            if self._was_tried(point):
                raise BadConfig("it was tried already")
            return self.make(number, point)
        except BadConfig as error:
            self.refused.append((point, str(error)))
            return None

    def _was_tried(self, point: Point) -> bool:
        return any(trial.point == point for trial in self.trials)

    def _draw_again(self, trial: Trial) -> None:
        self._study.enqueue_trial(trial.point)
        self._asked[trial.number] = asked = self._study.ask()
        suggest(self.space, self.config, asked)
        if trial not in self._unfinished:
            self._tell(trial, {}, error=trial.state == "failed")

    def _tell(self, trial: Trial, result: Mapping[str, Any], error: bool) -> None:
        """A stopped trial comes with its last validation, maybe before `Watch` hears of it; one that ended, without."""
        asked = self._asked.pop(trial.number, None)
        if asked is None:
            return
        if "loss" not in result and trial.last:
            result = trial.last._asdict()
        if not error and np.isfinite(result.get("loss", np.nan)):
            self._study.tell(asked, [result["accuracy"], float(np.log(trial.macs))])
        else:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
