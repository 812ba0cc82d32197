"""Run a job in Ray Train's workers, and restart them from the last checkpoint when they end early."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data.feature_cache import BadFeatures
from crosslmm.data.manifest import BadManifest
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.lease import LeaseLost
from crosslmm.preflight import hardware, placement
from crosslmm.ray_runtime import QUIET_ENVIRONMENT, worker_group_errors
from crosslmm.run_folder import RAY_FOLDER
from crosslmm.text import in_brief
from crosslmm.train import worker
from crosslmm.train.checkpoint import seals
from crosslmm.train.distributed.rendezvous import PrivateTorchConfig
from crosslmm.train.job import TRAIN, VALIDATION, DeferredDatasets, Job, placeholder_dataset
from crosslmm.train.worker import Stopped

log = logging.getLogger(__name__)

NON_RETRYABLE_ERRORS = (
    BadConfig,
    BadFeatures,
    BadManifest,
    TooManyUnreadable,
    FloatingPointError,
    LeaseLost,
    storage.BadLocation,
    storage.Refused,
)
"""Errors that would end every further attempt in the same way."""
ERRORS_OF_CODE_OR_DATA = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Errors that are probably deterministic: one restart, and no further one if it ends in the same words."""
PEER_FAILURE_MARKERS = ("gloo", "NCCL", "onnection", "socket", "ProcessGroup")
"""Words in the error of a rank that only lost a peer."""
STOP_TIMEOUT_S = 45.0
"""Time after the first signal in which the workers can finish their last step and its checkpoint [s]. `ray job stop`
itself waits for RAY_JOB_STOP_WAIT_TIME_S, which should be longer."""
ASK_TIMEOUT_S = 5.0
"""How long the event channel may take to answer [s]."""
BUDGET_POLL_S = 1.0
"""Pause between two looks at what the run has spent [s]."""
MAX_PAUSE_S = 30.0
"""Longest pause before a restart [s]."""

WorkerGroupStartupTimeout, WorkerDied = worker_group_errors()
_NO_RETRIES = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)  # type: ignore[call-arg]
"""Turns off Ray Train's retries: `fit` retries, and counts the attempts that brought no new checkpoint."""


class OutOfBudget(Exception):
    """The run was stopped, with a checkpoint, because its hours or dollars are spent; the message says which."""


class TrainingFailed(Exception):
    """The run ended before its last step; the message is one line with the root cause."""


def fit(job: Job, spent: Callable[[], str | None] = lambda: None) -> None:
    """Train in Ray Train workers, from the run's last checkpoint if it has one. Blocks until the end.

    Restarts the workers after any failure of theirs or of Ray Train's controller: without limit as long as new
    checkpoints are made, and `scaling.max_failures` times in a row without a new one; once, if it is an error of code
    or data that comes back with the same message.

    Args:
        job: what to train.
        spent: returns a message once a limit of the budget is reached, else None.

    Raises:
        OutOfBudget: finished steps are in a checkpoint, if the workers had begun.
        TrainingFailed: with the first worker's error.
        KeyboardInterrupt: the job was told to stop; finished steps are in a checkpoint, if there was time for it.
    """
    latest_step, failures, waiting = seals.latest_step(job.folder), 0, False
    previous = ""
    while True:
        try:
            run_interruptibly(job, lambda: _trainer(job).fit(), spent)
            with contextlib.suppress(OSError):
                storage.remove_folder(storage.join(job.folder, RAY_FOLDER))
            return
        except (TrainingFailedError, RayError) as error:
            cause, line = _root_cause(error)
            if isinstance(cause, NON_RETRYABLE_ERRORS):
                raise TrainingFailed(line) from error
            if isinstance(cause, WorkerGroupStartupTimeout):  # nodes may come back, or be added
                if not waiting:
                    log.warning("the cluster has no room for the workers now; the run waits until it has")
                waiting = True
                continue
            waiting = False
            try:
                step = seals.latest_step(job.folder)
            except OSError:  # the store is unreachable, which is why the workers ended
                step = latest_step
            stopped = isinstance(cause, Stopped | PreemptionError)
            failures = 0 if step > latest_step or stopped else failures + 1
            latest_step = max(step, latest_step)
            message = f"{type(cause).__name__}: {cause}"
            again = failures > 1 and message == previous and isinstance(cause, ERRORS_OF_CODE_OR_DATA)
            previous = message
            if again or failures > job.config.scaling.max_failures:
                tries = f"; given up after {failures - 1} restarts without a new checkpoint" if failures > 1 else ""
                raise TrainingFailed(f"{line}{tries}") from error
            log.warning("restarting from %s: %s", f"step {step}" if step else "the beginning", line)
            time.sleep(min(2.0**failures, MAX_PAUSE_S) if failures > 1 else 0.0)


def run_interruptibly(job: Job, work: Callable[[], Any], spent: Callable[[], str | None] = lambda: None) -> None:
    """Run `work` in a thread and wait for it. Signals reach the waiting thread, which asks the workers to stop; so does
    the end of the budget.

    Ray Train would set its own handler for Ctrl-C, and kill the workers.

    Raises:
        OutOfBudget: `spent` returned something, and the workers have ended, had not begun, or did not finish their last
            step within the watchdog's limits.
        KeyboardInterrupt: a signal came, and the workers have ended or not begun, or `STOP_TIMEOUT_S` is over.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    try:
        # Not `Thread.join`: if a signal interrupts it, Python considers the thread ended (bpo-45274).
        while not wait([future], BUDGET_POLL_S).done:
            if reason := spent():
                raise OutOfBudget(reason)
    except (KeyboardInterrupt, SystemExit, OutOfBudget) as error:
        if _request_stop(job):
            if isinstance(error, OutOfBudget):
                watchdog = job.config.watchdog  # nobody is waiting: a large checkpoint may take its time
                log.info("%s; stopping after this step and its checkpoint", error)
                wait([future], watchdog.step_s + watchdog.validation_s + watchdog.checkpoint_s)
            else:
                text = "stopping after this step and its checkpoint, in %g s at most; a second signal stops at once"
                log.info(text, STOP_TIMEOUT_S)
                wait([future], STOP_TIMEOUT_S)  # a second signal ends this wait
        else:
            log.info("stopping; the workers have not begun to train, and there is nothing to save")
        if not future.done() or future.exception():
            raise
    future.result()


def _request_stop(job: Job) -> bool:
    """Ask the workers to stop; return whether to wait for them: not if they are known not to have begun."""
    try:
        return bool(ray.get(job.events.request_stop.remote(), timeout=ASK_TIMEOUT_S))
    except RayError:
        return True


def _root_cause(error: Exception) -> tuple[Exception, str]:
    """Return the first worker's error that does not merely follow from another's, and one line about it."""
    if isinstance(error, PreemptionError):
        return error, "Ray Train: a node of the workers is being taken away"
    failures = getattr(error, "worker_failures", None) or {-1: getattr(error, "controller_failure", error)}

    def priority(rank: int) -> tuple[bool, bool, int]:
        cause = failures[rank]
        lost_peer = isinstance(cause, RuntimeError) and any(word in str(cause) for word in PEER_FAILURE_MARKERS)
        return not isinstance(cause, (*NON_RETRYABLE_ERRORS, Stopped)), lost_peer, rank

    rank = min(failures, key=priority)
    where = f"worker {rank}: " if rank >= 0 else "Ray Train: "
    cause = failures[rank]
    if isinstance(cause, (WorkerDied, RayActorError)):
        return cause, f"{where}its process ended: it was killed, ran out of memory, or its node is gone"
    return cause, f"{where}{type(cause).__name__}: {in_brief(cause, 500)}"


def _trainer(job: Job) -> TorchTrainer:
    """Build the trainer of one attempt."""
    config = job.config
    scaling = config.scaling
    # Ray Train's own files, new for each attempt. Nothing is read from them: checkpoints are recognised by their seals,
    # which neither a broken snapshot nor a missing folder can hide.
    filesystem, path = storage.arrow_filesystem(storage.join(job.folder, RAY_FOLDER))
    return TorchTrainer(
        worker.train,
        train_loop_config={"job": job},
        torch_config=PrivateTorchConfig("nccl" if scaling.use_gpu else "gloo", timeout_s=job.collective_timeout_s),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=scaling.resize_every_s,  # type: ignore[call-arg]
            use_gpu=scaling.use_gpu,
            resources_per_worker=placement.worker_resources(config),
            label_selector=dict(scaling.train_on) or None,
        ),
        run_config=ray.train.RunConfig(
            name=f"start-{time.time_ns()}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=_NO_RETRIES,
            worker_runtime_env={"env_vars": QUIET_ENVIRONMENT | hardware.worker_environment(config)},  # type: ignore[call-arg]
        ),
        datasets=dict.fromkeys([TRAIN, VALIDATION] if job.validation_rows else [TRAIN], placeholder_dataset),
        dataset_config=DeferredDatasets(job),
    )
