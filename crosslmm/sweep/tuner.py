"""Runs a sweep's trials with Ray Tune: schedule, early stopping, budget."""

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
from crosslmm.lease import Fence
from crosslmm.preflight import placement
from crosslmm.scoring import ACCURACY, COUNT
from crosslmm.sweep import trials
from crosslmm.sweep.progress import SweepProgress
from crosslmm.sweep.search import Search, prefill_macs
from crosslmm.sweep.settings import SweepSettings
from crosslmm.sweep.space import apply
from crosslmm.sweep.trials import Trial, Validation
from crosslmm.text import in_brief
from crosslmm.tracking import quiet_mlflow
from crosslmm.train.run import TrialContext, run_training

DRIVER_CPUS = 0.01
"""CPUs of a trial's driver, which waits for its workers; Tune does not accept 0 [cores]."""
ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # MLflow keeps the record
    "RAY_AIR_NEW_OUTPUT": "0",  # this package writes to the terminal
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report says only how it ended
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends a run
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # a failed trial is one log line
}


class SweepFailed(Exception):
    """No trial finished, or Tune itself failed; one line with the first cause."""


def max_concurrent_trials(config: RunConfig) -> int:
    """Return how many trials the cluster, scaled up to its limit, can run at the same time."""
    return placement.max_concurrent_runs(config, placement.node_pools(config), DRIVER_CPUS)


def run_trials(base: RunConfig, sweep: SweepSettings, search: Search, progress: SweepProgress, concurrent: int) -> None:
    """Run trials until the search or the budget is exhausted.

    Args:
        base: configuration on which the points are applied; its storage gets the trials' runs.
        sweep: settings of the sweep.
        search: suggests the trials.
        progress: Tune callback that records and shows the trials.
        concurrent: number of trials that run at the same time.

    Raises:
        SweepFailed: Tune itself failed.
    """
    os.environ |= ENVIRONMENT
    scheduler = build_scheduler(sweep, search, progress.total_steps, base)
    trainable = _trainable(base, progress.total_steps, progress.fence)
    tuner = tune.Tuner(
        tune.with_resources(trainable, _driver_resources(base)),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=_tune_files(base, sweep, progress),
    )
    try:
        tuner.fit()
    except TuneError as error:
        raise SweepFailed(str(error).strip().splitlines()[-1]) from error


def _driver_resources(base: RunConfig) -> dict[str, float] | tune.PlacementGroupFactory:
    """Return what a trial's driver reserves, and where. Its workers are in a placement group of their own."""
    if not base.scaling.drive_on:
        return {"CPU": DRIVER_CPUS}
    # The driver's node may have no CPU to give, but it has memory, and a bundle cannot be empty.
    return tune.PlacementGroupFactory([{"memory": 2**20}], bundle_label_selector=[dict(base.scaling.drive_on)])


def build_scheduler(sweep: SweepSettings, search: Search, total_steps: int, base: RunConfig) -> TrialScheduler:
    """Build ASHA, replay what trials of earlier starts reported, and return it; or return a scheduler that stops
    nothing."""
    if sweep.scheduler == "none":
        return FIFOScheduler()
    budget: Any = total_steps
    if sweep.rung == "compute":
        budget *= base.train.global_batch_size * prefill_macs(base)[0]
    scheduler = AsyncHyperBandScheduler(
        time_attr=sweep.rung,
        metric="loss",
        mode="min",
        grace_period=budget * sweep.first_rung,
        reduction_factor=sweep.keep_one_in,
        # No rung at the very end: a trial that gets that far is exported.
        max_t=budget * (1 - 1e-6),
        stop_last_trials=False,
    )
    for trial in search.trials:
        if trial.state not in ("finished", "stopped early"):
            continue  # it is judged when it resumes
        # ASHA uses only the trial's id.
        controller, earlier = cast(Any, None), cast(Any, SimpleNamespace(trial_id=f"earlier-{trial.number}"))
        scheduler.on_trial_add(controller, earlier)
        for rung in trial.curve:
            scheduler.on_trial_result(controller, earlier, _tune_metrics(trial, rung, base, total_steps))
    return scheduler


def _tune_metrics(trial: Trial, rung: Validation, base: RunConfig, total_steps: int) -> dict[str, float]:
    """Return what a trial reports to Tune after a validation. The last validation lacks the rung's unit, so that ASHA
    ignores it: ASHA could otherwise stop a trial that skipped a rung, just before its model is exported."""
    metrics: dict[str, float] = rung._asdict()
    if rung.step < total_steps:
        metrics |= {"steps": rung.step, "compute": float(rung.step * base.train.global_batch_size * trial.macs)}
    return metrics


def _trainable(base: RunConfig, total_steps: int, fence: Fence) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function that Tune runs for each trial, in a process of its own: a training run that reports its
    validations.

    Ray Train's TuneReportCallback is not used: it sees only checkpoints, at the controller's poll, and possibly before
    MLflow has their metrics.
    """

    def run_trial(given: dict[str, Any]) -> dict[str, Any]:
        quiet_mlflow()
        trial = trials.from_json(given["trial"])
        config = apply(base, trial.settings | {"name": trial.name})

        def report(step: int, metrics: dict[str, float]) -> None:
            if ACCURACY not in metrics:
                return  # no question could be asked, which is in the log
            rung = Validation(step, metrics["validation/loss"], metrics[ACCURACY], int(metrics.get(COUNT, 0)))
            tune.report(_tune_metrics(trial, rung, base, total_steps))

        assert trial.run_id
        try:
            reported = trial.last.step if trial.last else 0
            result = run_training(config, TrialContext(trial.run_id, fence, report, reported))
        except Exception as error:
            tune.report({"error": f"{type(error).__name__}: {in_brief(error, 500)}"})
            raise
        return {"finished": True, "train_s": result.train_s}

    return run_trial


class BudgetStopper(tune.Stopper):
    """Ends a sweep whose budget of hours or dollars is spent."""

    def __init__(self, sweep: SweepSettings, progress: SweepProgress) -> None:
        self.sweep, self.progress = sweep, progress
        self._began = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Return False: no single trial is stopped."""
        return False

    def stop_all(self) -> bool:
        """Return whether hours or dollars are spent."""
        seconds = time.monotonic() - self._began
        over = self.sweep.spent(seconds, self.progress.worker_seconds()) is not None
        self.progress.out_of_budget |= over
        return over

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles this object, and nothing reads it again


def _tune_files(base: RunConfig, sweep: SweepSettings, progress: SweepProgress) -> tune.RunConfig:
    """Return where Tune keeps its own files: a new folder for each start, since a resume reads only `trials`."""
    filesystem, path = storage.arrow_filesystem(storage.join(base.storage, "tune"))
    return tune.RunConfig(
        name=f"start-{time.time_ns()}",
        storage_path=path,
        storage_filesystem=filesystem,
        verbose=0,
        stop=BudgetStopper(sweep, progress),
        callbacks=[progress],
    )
