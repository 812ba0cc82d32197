"""What the nodes that train have, and what a run makes of it: precision, kernels, settings of CUDA and NCCL."""

import logging
import math
import os
import time
from dataclasses import dataclass

import ray
import torch
from ray.exceptions import RayError
from transformers.utils.import_utils import is_flash_attn_2_available

from crosslmm import ray_runtime
from crosslmm.config import BadConfig, RunConfig, validate_run
from crosslmm.data.dataset import block_rows
from crosslmm.data.feature_cache import BF16, FeatureRecipe
from crosslmm.preflight import placement

log = logging.getLogger(__name__)

GPU_ENVIRONMENT = {
    # A broken link is a line in the worker's log instead of silence until the watchdog.
    "NCCL_DEBUG": "WARN",
    # Batches differ in length: segments that grow are not cut into pieces that fit nothing.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Of workers on GPUs, where the driver's own environment does not say otherwise."""
READERS_HOLD, RANKS_HOLD = 3, 4
"""Blocks on their way: of a decoder two that are made and one that is taken, of a rank two that are fetched, those of
the step in use and of the next one."""
STORE = "object_store_memory"
"""Ray's name for what a node's object store has [bytes]."""
SAY_AFTER_S = 10.0


@dataclass(frozen=True)
class Hardware:
    """A node that trains."""

    gpu: str | None = None
    """Its name, None on CPUs."""
    bf16: bool = False
    """The GPU computes in it."""
    flash: bool = False
    """flash-attn is there as Transformers wants it, and the GPU can run it."""
    nccl: str = ""
    """Version."""


def look() -> Hardware:
    """What is here. Runs on a node that trains."""
    if not torch.cuda.is_available():
        return Hardware()
    ampere = torch.cuda.get_device_capability() >= (8, 0)
    return Hardware(
        gpu=torch.cuda.get_device_name(),
        bf16=ampere,
        flash=ampere and is_flash_attn_2_available(),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )


def detect(config: RunConfig, within_s: float = math.inf) -> Hardware:
    """What the nodes that train have. On GPUs one of them is asked, and waited for: without it no run starts either.

    Args:
        config: the run.
        within_s: how long it is waited for [s].

    Raises:
        BadConfig: the cluster can never have one, has none in this time, or the one that it has cannot say.
    """
    if not config.scaling.use_gpu:
        return Hardware()
    ray_runtime.start_ray()
    placement.check_placement(config)
    scaling = config.scaling
    asked = ray.remote(look).options(
        num_cpus=0, num_gpus=1, resources=dict(scaling.worker_resources), label_selector=dict(scaling.train_on)
    )
    answer, began, said = asked.remote(), time.monotonic(), False
    while not ray.wait([answer], timeout=1.0)[0]:
        if not said and time.monotonic() - began > SAY_AFTER_S:
            said = True
            log.info("machine   waiting for a GPU")
        if time.monotonic() - began > within_s:
            ray.cancel(answer)
            raise BadConfig(f"scaling.use_gpu: no GPU was free within {within_s:g} s; see `ray status`")
    try:
        machine: Hardware = ray.get(answer)
    except RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise BadConfig(f"scaling.use_gpu: the node that trains cannot say what it has: {line}") from error
    return machine


def resolve_auto(config: RunConfig, machine: Hardware) -> RunConfig:
    """The configuration with nothing left open.

    Raises:
        BadConfig: flash attention is asked for, and the GPU has no bf16.
    """
    values = config.model_dump()
    if config.train.precision == "auto":
        values["train"]["precision"] = "bf16" if machine.bf16 else "fp32"
    if config.model.attention == "auto":
        flash = machine.flash and values["train"]["precision"] == "bf16"
        values["model"]["attention"] = "flash_attention_2" if flash else "sdpa"
    return validate_run(values)


def describe(config: RunConfig, machine: Hardware) -> str:
    """What is computed on, and how, in one line."""
    how = f"{config.train.precision}, {config.model.attention}"
    if machine.gpu is None:
        return f"CPUs, {how}, gloo"
    return f"{machine.gpu}, {how}, NCCL {machine.nccl}"


def environment(config: RunConfig) -> dict[str, str]:
    """Of the workers."""
    return {k: os.environ.get(k, v) for k, v in GPU_ENVIRONMENT.items()} if config.scaling.use_gpu else {}


def object_store_warning(config: RunConfig, image_size: int, features: FeatureRecipe | None) -> str | None:
    """A line, where the object stores of the nodes that there are, and of those that may come, do not hold the blocks
    that are on their way. A type of node that does not say what its store has is taken to have enough."""
    scaling, data = config.scaling, config.data
    frame = image_size**2 * 3 if features is None else features.patches * features.width * BF16
    block = block_rows(data, image_size, features) * data.num_frames * frame
    decoders = placement.pools_of(config, scaling.most_workers)[1].count
    need = block * (READERS_HOLD * decoders + RANKS_HOLD * scaling.most_workers)
    have = sum(node.count * node.resources.get(STORE, math.inf) for node in placement.cluster(config))
    if need <= have:
        return None
    return (
        f"blocks on their way take {need / 1e9:.1f} GB, and object stores have {have / 1e9:.1f} GB, so that "
        "Ray spills to disk; give nodes more (ray start --object-store-memory), or lower data.num_frames"
    )
