"""Two steps of the run itself, into a folder that is thrown away; nothing of it is recorded."""

import threading
import time
from collections.abc import Sequence

import ray

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.encode.recipe import open_features
from crosslmm.preflight import hardware, placement
from crosslmm.preflight.findings import Finding
from crosslmm.train import launcher
from crosslmm.train.job import Job
from crosslmm.train.run import build_job

STEPS = 2
REMEDY = "jobs/train.py would end so too: mend what it names; jobs/plan.py says what fits a GPU's memory"


def two_steps(config: RunConfig, manifests: Sequence[Manifest], folder: str) -> Finding:
    """Train, save a checkpoint and export the model as the run would, with as many samples in a step as workers hold at
    once.

    Args:
        config: of the run.
        manifests: of training.
        folder: in storage; what is left in it is no longer needed.
    """
    short = _shortened(config, folder)
    began = time.monotonic()
    try:
        placement.check_placement(short)
        if busy := _busy(short):
            return Finding("training", "", False, busy, "wait for it, or stop it (`ray job list`), and ask again")
        short = hardware.resolve_auto(short, hardware.detect(short, config.watchdog.startup_s))
        job = build_job(short, list(manifests), None, open_features(short, Rows(list(manifests))))
    except (BadConfig, storage.Unavailable) as error:
        return Finding("training", "", False, str(error), REMEDY)
    why = _failure(job, config.watchdog.startup_s)
    if why:
        return Finding("training", "", False, why, REMEDY)
    news = ray.get(job.events.drain.remote())
    steps = [metrics for kind, item in news if kind == "step" for metrics in [item[2]]]
    last = steps[-1]
    said = (
        f"{len(steps)} steps on {_workers(config)}, {last['step_s']:.1f} s the last, loss {last['loss']:.2f}; "
        f"{time.monotonic() - began:.0f} s in all"
    )
    return Finding("training", "", True, said)


def _shortened(config: RunConfig, folder: str) -> RunConfig:
    """The same, but for how long it goes on."""
    train, workers = config.train, config.scaling
    batch = train.global_batch_size
    if not train.micro_batch_tokens and workers.least_workers == workers.most_workers:
        batch = workers.most_workers * train.micro_batch_size  # what is accumulated takes no more memory
    short = {"max_steps": STEPS, "epochs": STEPS * batch, "global_batch_size": batch, "checkpoint_every": STEPS}
    return config.model_copy(
        update={
            "name": "two-steps",
            "storage": folder,
            "train": train.model_copy(update=short),
            "data": config.data.model_copy(update={"validation_manifest": None}),
            "scaling": workers.model_copy(update={"max_failures": 0}),
        }
    )


def _busy(config: RunConfig) -> str:
    """What others hold of the room that the run needs; "" where there is enough, or an autoscaler may make some."""
    scaling = config.scaling
    cpus = scaling.least_workers * scaling.cpus_per_worker + scaling.decode_workers * scaling.cpus_per_decode_worker
    need = {"CPU": cpus, "GPU": scaling.least_workers * scaling.use_gpu}
    for kind, count in need.items():
        there, free = (got.get(kind, 0) for got in (ray.cluster_resources(), ray.available_resources()))
        if free + 1e-6 < count <= there:
            return f"needs {count:g} {kind}s, and of {there:g} others hold {there - free:g}"
    return ""


def _failure(job: Job, within_s: float) -> str:
    """What went wrong; "" for nothing."""
    ended: list[str] = []

    def run() -> None:
        try:
            launcher.fit(job, lambda line: None)
            ended.append("")
        except Exception as error:
            ended.append(" ".join(str(error).split())[:500])

    thread = threading.Thread(target=run, name="two steps", daemon=True)
    thread.start()
    thread.join(within_s)
    return ended[0] if ended else f"not done after {within_s:g} s (watchdog.startup_s)"


def _workers(config: RunConfig) -> str:
    count, kind = config.scaling.most_workers, "GPU" if config.scaling.use_gpu else "CPU"
    return f"{count} {kind} worker{'s' * (count > 1)}"
