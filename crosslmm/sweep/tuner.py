"""The part of a sweep that Tune does: which trial runs when, which is stopped early, and when all is over."""

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from ray import tune
from ray.tune.error import TuneError
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from crosslmm import storage
from crosslmm.config import RunConfig
from crosslmm.preflight import placement
from crosslmm.sweep import trials
from crosslmm.sweep.candidates import prefill
from crosslmm.sweep.progress import SweepProgress
from crosslmm.sweep.search import Search
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import apply
from crosslmm.sweep.trials import Rung, Trial
from crosslmm.train.run import TrialContext, run_training

OWN_CPUS = 0.01
"""A trial's own process waits for its workers; Tune takes no 0 [cores]."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record is MLflow's
    "RAY_AIR_NEW_OUTPUT": "0",  # the terminal is ours
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last report says that a trial ended, and how
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial reaches the terminal as one line
}


class SweepFailed(Exception):
    """No trial came to its end, or Tune itself broke off; one line with the first cause."""


def at_once(config: RunConfig) -> int:
    """Trials that the cluster, scaled up to its limit, can place beside one another."""
    return placement.max_concurrent_runs(config, placement.node_pools(config), OWN_CPUS)


def run_trials(base: RunConfig, chosen: SweepSettings, search: Search, watch: SweepProgress, concurrent: int) -> None:
    """Run trials until the search or the budget is at its end.

    Args:
        base: what points are laid over; trials' runs go to its storage.
        chosen: how to search.
        search: gives the points.
        watch: is told of all that happens.
        concurrent: trials at a time.
    """
    os.environ |= ENVIRONMENT
    scheduler = scheduler_of(chosen, search, watch.total_steps, base)
    in_trial = _in_a_process_of_its_own(base, watch.total_steps)
    tuner = tune.Tuner(
        tune.with_resources(in_trial, _own_place(base)),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=_bookkeeping(base, chosen, watch),
    )
    try:
        tuner.fit()
    except TuneError as error:
        raise SweepFailed(str(error).strip().splitlines()[-1]) from error


def _own_place(base: RunConfig) -> dict[str, float] | tune.PlacementGroupFactory:
    """What the driver of a trial reserves, and where: its workers are elsewhere, in a group of their own."""
    if not base.scaling.drive_on:
        return {"CPU": OWN_CPUS}
    # A node that is to drive alone may have no CPU to give. Each has memory, and a bundle must have something.
    return tune.PlacementGroupFactory([{"memory": 2**20}], bundle_label_selector=[dict(base.scaling.drive_on)])


def scheduler_of(chosen: SweepSettings, search: Search, total_steps: int, base: RunConfig) -> TrialScheduler:
    """ASHA that has seen what trials of earlier starts reported, or none."""
    if chosen.scheduler == "none":
        return FIFOScheduler()
    whole: Any = total_steps
    if chosen.rung == "compute":
        whole *= base.train.global_batch_size * prefill(base)[0]
    scheduler = AsyncHyperBandScheduler(
        time_attr=chosen.rung,
        metric="loss",
        mode="min",
        grace_period=whole * chosen.first_rung,
        reduction_factor=chosen.keep_one_in,
        # No rung at the very end: who comes so far is exported.
        max_t=whole * (1 - 1e-6),
        stop_last_trials=False,
    )
    for trial in search.trials:
        if trial.state not in ("finished", "stopped early"):
            continue  # it will be judged when it goes on
        # Of Tune's controller and trial it needs the trial's name alone.
        controller, earlier = cast(Any, None), cast(Any, SimpleNamespace(trial_id=f"earlier-{trial.number}"))
        scheduler.on_trial_add(controller, earlier)
        for rung in trial.curve:
            scheduler.on_trial_result(controller, earlier, _news(trial, rung, base, total_steps))
    return scheduler


def _news(trial: Trial, rung: Rung, base: RunConfig, total_steps: int) -> dict[str, float]:
    """What Tune is told after a validation. ASHA passes over the last one, which lacks what rungs are counted in: it
    would judge there a trial that jumped over a rung, and stop it before its export."""
    news: dict[str, float] = rung._asdict()
    if rung.step < total_steps:
        news |= {"steps": rung.step, "compute": float(rung.step * base.train.global_batch_size * trial.macs)}
    return news


def _in_a_process_of_its_own(base: RunConfig, total_steps: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function that Tune runs for each trial: a training run whose validations Tune hears of.

    Not Train's own TuneReportCallback: it hears of checkpoints alone, at the controller's poll, and maybe before the
    record has them.
    """

    def in_trial(given: dict[str, Any]) -> dict[str, Any]:
        trial = trials.from_json(given["trial"])
        config = apply(base, trial.settings | {"name": trial.name})

        def report(step: int, metrics: dict[str, float]) -> None:
            rung = Rung(step, metrics["validation/loss"], metrics["validation/accuracy"])
            tune.report(_news(trial, rung, base, total_steps))

        assert trial.run_id
        try:
            outcome = run_training(config, TrialContext(trial.run_id, report, trial.last.step if trial.last else 0))
        except Exception as error:
            tune.report({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
            raise
        return {"finished": True, "train_s": outcome.train_s}

    return in_trial


class Budget(tune.Stopper):
    """Ends a sweep whose time or money is spent."""

    def __init__(self, chosen: SweepSettings, watch: SweepProgress) -> None:
        self.chosen, self.watch = chosen, watch
        self._began = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped."""
        return False

    def stop_all(self) -> bool:
        """Whether hours or dollars are spent."""
        chosen = self.chosen
        hours = (time.monotonic() - self._began) / 3600
        spent = self.watch.worker_seconds() / 3600 * (chosen.price or 0)
        over = bool((chosen.hours and hours >= chosen.hours) or (chosen.dollars and spent >= chosen.dollars))
        self.watch.out_of_budget |= over
        return over

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles it; nothing of that is read again


def _bookkeeping(base: RunConfig, chosen: SweepSettings, watch: SweepProgress) -> tune.RunConfig:
    """Tune's own files, a folder for each start: what a resume needs lies beside them, in `trials`."""
    filesystem, path = storage.arrow_filesystem(storage.join(base.storage, "tune"))
    return tune.RunConfig(
        name=f"start-{time.time_ns()}",
        storage_path=path,
        storage_filesystem=filesystem,
        verbose=0,
        stop=Budget(chosen, watch),
        callbacks=[watch],
    )
