"""What the cluster must have before a run starts on it."""

import os
from typing import Any

import ray

from crosslmm.config import BadConfig, RunConfig
from crosslmm.data import tasks

# What Ray says about itself is for its own log files; a failure reaches the terminal as our one line.
QUIET = {
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Relative paths of a configuration mean the same in a trial of a sweep.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def start_ray() -> None:
    """Connect to the cluster at hand (RAY_ADDRESS, or the one of this job), or start one on this machine."""
    # Of a cluster started here: trials beside one another are more processes than its cores, which Ray remarks on.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    tasks.start_ray(runtime_env={"env_vars": QUIET})


def check_placement(config: RunConfig) -> None:
    """Refuse what the cluster, autoscaled to its limit, could never place: Ray would wait for ever without a word.

    Raises:
        BadConfig: naming the keys, what they ask for and what there is.
    """
    scaling = config.scaling
    need, limit = resources(config, scaling.least_workers), cluster_limit()
    cpus, gpus, pools = need["CPU"], need["GPU"], _pools(config)
    if gpus > limit.get("GPU", 0):
        raise BadConfig(
            f"scaling.num_workers: {gpus} workers need {gpus} GPUs, and the cluster has {limit.get('GPU', 0):g}; "
            "lower it, or train on CPUs with scaling.use_gpu false"
        )
    if cpus > limit.get("CPU", 0) + 1e-6:
        raise BadConfig(
            f"scaling: num_workers {scaling.least_workers} x cpus_per_worker {scaling.cpus_per_worker:g} + "
            f"{pools} x decode_workers {scaling.decode_workers} x cpus_per_decode_worker "
            f"{scaling.cpus_per_decode_worker:g} = {cpus:g} CPUs, "
            f"and the cluster has {limit.get('CPU', 0):g}; lower one of them"
        )
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    if not _autoscaled_limit() and scaling.cpus_per_worker > max(nodes):
        raise BadConfig(
            f"scaling.cpus_per_worker: no node has {scaling.cpus_per_worker:g} CPUs; the largest has {max(nodes):g}"
        )


def resources(config: RunConfig, workers: int) -> dict[str, float]:
    """CPUs and GPUs that a run with so many training workers holds, its decoders included."""
    scaling = config.scaling
    cpus = workers * scaling.cpus_per_worker
    cpus += _pools(config) * scaling.decode_workers * scaling.cpus_per_decode_worker
    return {"CPU": cpus, "GPU": workers if scaling.use_gpu else 0}


def cluster_limit() -> dict[str, float]:
    """What the cluster has, scaled up to its limit."""
    return _autoscaled_limit() or ray.cluster_resources()


def _autoscaled_limit() -> Any:
    return ray._private.state.state.get_max_resources_from_cluster_config()


def _pools(config: RunConfig) -> int:
    """Validation decodes beside training's own decoders."""
    return 2 if config.data.validation_manifest else 1
