"""Two steps of the run itself, into a temporary folder; nothing is recorded in MLflow."""

import threading
import time
from collections.abc import Sequence

import ray

from crosslmm import lease, storage
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.encode.recipe import open_features
from crosslmm.preflight import hardware, placement
from crosslmm.preflight.findings import Finding
from crosslmm.text import in_brief
from crosslmm.train import launcher
from crosslmm.train.job import Job
from crosslmm.train.run import build_job

STEPS = 2
"""Optimizer steps of the dry run."""
REMEDY = "jobs/train.py would fail in the same way: fix what this names; jobs/plan.py says what fits a GPU's memory"


def train_two_steps(config: RunConfig, manifests: Sequence[Manifest], folder: str) -> Finding:
    """Train, save a checkpoint and export the model as the run would. With a fixed number of workers and no
    train.micro_batch_tokens, a step has one micro-batch per worker, without gradient accumulation.

    Args:
        config: the run's configuration.
        manifests: training manifests.
        folder: folder in storage for checkpoint and model; the caller removes it.
    """
    short = _shortened(config, folder)
    began = time.monotonic()
    try:
        placement.check_placement(short)
        if busy := _resources_in_use(short):
            remedy = "wait for that job, or stop it (`ray job list`), and run the doctor again"
            return Finding("training", "", False, busy, remedy)
        detected = hardware.detect(short, config.watchdog.startup_s)
        short = hardware.resolve_checkpointing(hardware.resolve_auto(short, detected), detected)
        hardware.require_float8(short, detected)
        features = open_features(short, Rows(list(manifests)))
        with lease.claim(storage.join(short.storage, str(short.name)), "dry run", "wait").take() as fence:
            job = build_job(short, list(manifests), None, features, fence)
            failure = _fit(job, config.watchdog.startup_s)
    except (BadConfig, storage.Unavailable) as error:
        return Finding("training", "", False, str(error), REMEDY)
    if failure:
        return Finding("training", "", False, failure, REMEDY)
    steps = [item[2] for kind, item in ray.get(job.events.drain.remote()) if kind == "step"]
    message = (
        f"{len(steps)} steps on {_workers(config)}, the last in {steps[-1]['step_s']:.1f} s, "
        f"loss {steps[-1]['loss']:.2f}; {time.monotonic() - began:.0f} s in all"
    )
    return Finding("training", "", True, message)


def _shortened(config: RunConfig, folder: str) -> RunConfig:
    """Return the run's configuration with two steps, no validation and no retries."""
    train, scaling = config.train, config.scaling
    batch = train.global_batch_size
    if not train.micro_batch_tokens and scaling.least_workers == scaling.most_workers:
        batch = scaling.most_workers * train.micro_batch_size  # gradient accumulation takes no more memory
    short = {"max_steps": STEPS, "epochs": STEPS * batch, "global_batch_size": batch, "checkpoint_every": STEPS}
    return config.model_copy(
        update={
            "name": "two-steps",
            "storage": folder,
            "train": train.model_copy(update=short),
            "data": config.data.model_copy(update={"validation_manifest": None}),
            "scaling": scaling.model_copy(update={"max_failures": 0}),
        }
    )


def _resources_in_use(config: RunConfig) -> str:
    """Return which needed resources other jobs hold; "" if enough are free, or an autoscaler may add them."""
    scaling = config.scaling
    cpus = scaling.least_workers * scaling.cpus_per_worker + scaling.decode_workers * scaling.cpus_per_decode_worker
    needed = {"CPU": cpus, "GPU": scaling.least_workers * scaling.use_gpu}
    for kind, count in needed.items():
        total, free = (resources.get(kind, 0) for resources in (ray.cluster_resources(), ray.available_resources()))
        if free + 1e-6 < count <= total:
            return f"needs {count:g} {kind}s, and other jobs hold {total - free:g} of {total:g}"
    return ""


def _fit(job: Job, timeout_s: float) -> str:
    """Train; return the error, or "" for none."""
    results: list[str] = []

    def run() -> None:
        try:
            launcher.fit(job)
            results.append("")
        except Exception as error:
            results.append(in_brief(error, 500))

    thread = threading.Thread(target=run, name="dry run", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return results[0] if results else f"not done after {timeout_s:g} s (watchdog.startup_s)"


def _workers(config: RunConfig) -> str:
    count, kind = config.scaling.most_workers, "GPU" if config.scaling.use_gpu else "CPU"
    return f"{count} {kind} worker{'s' * (count > 1)}"
