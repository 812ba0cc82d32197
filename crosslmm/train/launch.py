"""A job -> Ray Train's workers, and the data that they are given."""

import json
from typing import Any

import pyarrow.fs
import ray.train
from ray.data import Dataset, ExecutionOptions
from ray.train import CheckpointConfig, DataConfig, FailureConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from crosslmm import storage
from crosslmm.data.pipeline import build_dataset
from crosslmm.train import worker
from crosslmm.train.job import Job
from crosslmm.train.placement import QUIET
from crosslmm.train.worker import TRAIN, VALIDATION


class TrainingFailed(Exception):
    """The run ended before its last step; the message is one line with the first cause."""


def fit(job: Job) -> None:
    """Train in Ray Train workers, from the run's last checkpoint if it has one. Blocks until the end.

    Raises:
        TrainingFailed: with the first worker's error.
    """
    config = job.config
    filesystem, path = storage.arrow_filesystem(storage.absolute(config.storage))
    datasets: dict[str, Any] = {TRAIN: lambda: _training_data(job)}
    if job.validation_rows:
        datasets[VALIDATION] = lambda: _validation_data(job)
    trainer = TorchTrainer(
        worker.train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if config.scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.scaling.num_workers,
            use_gpu=config.scaling.use_gpu,
            resources_per_worker={"CPU": config.scaling.cpus_per_worker}
            | ({"GPU": 1} if config.scaling.use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            worker_runtime_env={"env_vars": QUIET},  # type: ignore[call-arg]
        ),
        datasets=datasets,
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True)),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {-1: getattr(error, "controller_failure", error)}
        rank, cause = next(iter(failures.items()))
        where = f"worker {rank}: " if rank >= 0 else ""
        raise TrainingFailed(f"{where}{type(cause).__name__}: {' '.join(str(cause).split())[:500]}") from error


def _training_data(job: Job) -> Dataset:
    """What is left of the run. Runs in Train's controller at every start of the workers."""
    scaling = job.config.scaling
    layout = job.training(_committed_step(job))
    return build_dataset(
        layout,
        job.rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
    )


def _validation_data(job: Job) -> Dataset:
    assert job.validation_rows is not None
    scaling = job.config.scaling
    return build_dataset(
        job.validation(),
        job.validation_rows,
        job.config.data,
        job.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        job.features,
    )


def _committed_step(job: Job) -> int:
    """The step of the checkpoint that Train is about to hand to the workers: the latest in its own snapshot."""
    filesystem, path = storage.arrow_filesystem(storage.absolute(job.folder))
    snapshot = f"{path}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(snapshot).type == pyarrow.fs.FileType.NotFound:
        return 0
    with filesystem.open_input_stream(snapshot) as file:
        latest = json.loads(file.read())["latest_checkpoint_result"]
    return int(latest["metrics"]["step"]) if latest else 0
