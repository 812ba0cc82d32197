"""A job -> Ray Train's workers, started again from the last checkpoint whatever ends them."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError, RayError
from ray.train import FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import PreemptionError

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data.feature_cache import BadFeatures
from crosslmm.data.manifest import BadManifest
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.preflight import hardware, placement
from crosslmm.ray_runtime import QUIET_ENVIRONMENT, worker_group_errors
from crosslmm.train import checkpoint, worker
from crosslmm.train.job import TRAIN, VALIDATION, Given, Job, later
from crosslmm.train.worker import Stopped

HOPELESS = (
    BadConfig,
    BadFeatures,
    BadManifest,
    TooManyUnreadable,
    FloatingPointError,
    storage.BadLocation,
    storage.Refused,
)
"""What would end every other try in the same way."""
ECHOES = ("gloo", "NCCL", "onnection", "socket", "ProcessGroup")
"""In the words of a rank whose peer has gone."""
STOP_WITHIN_S = 45.0
"""From the first signal: so long the workers have for their last step and its checkpoint [s]. `ray job stop` waits for
RAY_JOB_STOP_WAIT_TIME_S."""


NO_ROOM, WORKER_DIED = worker_group_errors()
_NO_RETRIES = FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0)  # type: ignore[call-arg]
"""`fit` itself counts what brought no progress."""
RAYS_OWN = "ray"
"""Ray Train's bookkeeping, in the run's folder, anew for each start. Nothing is read from it: checkpoints are known by
their seals, which no broken snapshot and no missing folder can take away."""


class TrainingFailed(Exception):
    """The run ended before its last step; the message is one line with the first cause."""


def fit(job: Job, tell: checkpoint.Tell, pause: Callable[[float], None] = time.sleep) -> None:
    """Train in Ray Train workers, from the run's last checkpoint if it has one. Blocks until the end.

    What ends the workers, or Ray Train's controller, starts them again: without limit as long as checkpoints are made,
    and `scaling.max_failures` times without a new one.

    Args:
        job: what to train.
        tell: takes a line for the user about each restart.
        pause: waits before a restart [s].

    Raises:
        TrainingFailed: with the first worker's error.
        KeyboardInterrupt: the job was told to stop; what was done is in a checkpoint, if there was time for it.
    """
    reached, failures, waiting = _reached(job), 0, False
    while True:
        try:
            _waiting(job, lambda: _trainer(job).fit())
            with contextlib.suppress(OSError):
                storage.remove_folder(storage.join(job.folder, RAYS_OWN))
            return
        except (TrainingFailedError, RayError) as error:
            cause, line = _first_cause(error)
            if isinstance(cause, HOPELESS):
                raise TrainingFailed(line) from error
            if isinstance(cause, NO_ROOM):  # nodes come back, and are added
                if not waiting:
                    tell("the cluster has no room for the workers now; the run waits for it")
                waiting = True
                continue
            waiting = False
            try:
                now = _reached(job)
            except OSError:  # the store is away, which is why they ended
                now = reached
            failures = 0 if now > reached or isinstance(cause, Stopped | PreemptionError) else failures + 1
            reached = max(now, reached)
            if failures > job.config.scaling.max_failures:
                tries = f"; given up after {failures - 1} restarts without a new checkpoint" if failures > 1 else ""
                raise TrainingFailed(f"{line}{tries}") from error
            tell(f"starting again from {f'step {now}' if now else 'the beginning'}: {line}")
            pause(min(2.0**failures, 30.0) if failures > 1 else 0.0)


def _waiting(job: Job, work: Callable[[], Any]) -> None:
    """Do it in a thread, and wait for the thread: signals reach this one, which tells the workers to stop.

    Ray Train would set its own handler for Ctrl-C, and kill the workers.

    Raises:
        KeyboardInterrupt: it was told to stop, and the workers have ended, or their time is up.
    """
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fit", daemon=True).start()
    try:
        # Not by the thread's `join`: Python takes a thread for ended when a signal interrupts that (bpo-45274).
        wait([future])
    except (KeyboardInterrupt, SystemExit):
        job.events.request_stop.remote()
        wait([future], STOP_WITHIN_S)  # a second signal ends this
        if not future.done() or future.exception():
            raise
    future.result()


def _reached(job: Job) -> int:
    """Steps that the newest checkpoint knows of."""
    return max((found.step for found in checkpoint.sealed(job.folder)), default=0)


def _first_cause(error: Exception) -> tuple[Exception, str]:
    """The first worker's error that is no mere echo of another's, and one line about it."""
    if isinstance(error, PreemptionError):
        return error, "Ray Train: a node of the workers is being taken away"
    failures = getattr(error, "worker_failures", None) or {-1: getattr(error, "controller_failure", error)}

    def worth(rank: int) -> tuple[bool, bool, int]:
        cause = failures[rank]
        echo = isinstance(cause, RuntimeError) and any(word in str(cause) for word in ECHOES)
        return not isinstance(cause, (*HOPELESS, Stopped)), echo, rank

    rank = min(failures, key=worth)
    where = f"worker {rank}: " if rank >= 0 else "Ray Train: "
    cause = failures[rank]
    if isinstance(cause, (WORKER_DIED, RayActorError)):
        return cause, f"{where}its process has ended: it was killed, ran out of memory, or its node is gone"
    return cause, f"{where}{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"


def _trainer(job: Job) -> TorchTrainer:
    config = job.config
    scaling = config.scaling
    filesystem, path = storage.arrow_filesystem(storage.join(job.folder, RAYS_OWN))
    return TorchTrainer(
        worker.train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo", timeout_s=job.collectives_s),
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
        datasets=dict.fromkeys([TRAIN, VALIDATION] if job.validation_rows else [TRAIN], later),
        dataset_config=Given(job),
    )
