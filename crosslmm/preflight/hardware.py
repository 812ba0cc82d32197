"""Detects the GPU; chooses what the configuration leaves to it: precision, kernels, recomputation."""

import importlib.util
import logging
import math
import os
import time
from dataclasses import dataclass

import ray
import torch
from ray.exceptions import RayError

from crosslmm import ray_runtime
from crosslmm.config import BadConfig, RunConfig, validate_run
from crosslmm.data.dataset import rows_per_block
from crosslmm.data.feature_format import BF16_BYTES, FeatureRecipe
from crosslmm.planning import checkpointing
from crosslmm.planning.assumptions import Assumptions
from crosslmm.preflight import placement

log = logging.getLogger(__name__)

GPU_ENVIRONMENT = {
    # A broken link becomes a line in the worker's log instead of silence until the watchdog.
    "NCCL_DEBUG": "WARN",
    # Batches differ in length: expandable segments avoid fragmentation.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""Environment of workers on GPUs; variables that the driver's environment sets take precedence."""
BLOCKS_PER_DECODER = 3
"""Blocks in the object store for each decoder: two finished ones and one being consumed."""
BLOCKS_PER_RANK = 4
"""Blocks in the object store for each rank: two prefetched ones, those of the current step and of the next one."""
OBJECT_STORE = "object_store_memory"
"""Ray's name for the resource "memory of a node's object store" [bytes]."""
LOG_AFTER_S = 10.0
"""Time without a free GPU after which a line is logged [s]."""


@dataclass(frozen=True)
class Hardware:
    """Hardware of a node that trains."""

    gpu: str | None = None
    """Name of the GPU, None on CPUs."""
    memory_bytes: float = 0
    """Memory of the GPU [bytes]."""
    bf16: bool = False
    """Whether the GPU computes in bf16."""
    float8: bool = False
    """Whether the GPU computes in FP8."""
    torchao: bool = False
    """Whether torchao is installed beside the GPU."""
    nccl: str = ""
    """Version of NCCL."""


def detect_local() -> Hardware:
    """Return the hardware of this machine. Runs on a node that trains."""
    if not torch.cuda.is_available():
        return Hardware()
    capability = torch.cuda.get_device_capability()
    return Hardware(
        gpu=torch.cuda.get_device_name(),
        memory_bytes=torch.cuda.get_device_properties().total_memory,
        bf16=capability >= (8, 0),  # Ampere
        float8=capability >= (8, 9),  # Ada
        torchao=importlib.util.find_spec("torchao") is not None,
        nccl=".".join(map(str, torch.cuda.nccl.version())),
    )


def detect(config: RunConfig, within_s: float = math.inf) -> Hardware:
    """Return the hardware of the nodes that train. Runs `detect_local` on one of them, and waits until it has a free
    GPU: without one no run could start either.

    Args:
        config: the run's configuration.
        within_s: longest wait for a free GPU [s].

    Raises:
        BadConfig: the cluster can never have such a node, none is free in time, or the detection fails there.
    """
    if not config.scaling.use_gpu:
        return Hardware()
    ray_runtime.start_ray()
    placement.check_placement(config)
    scaling = config.scaling
    remote = ray.remote(detect_local).options(
        num_cpus=0, num_gpus=1, resources=dict(scaling.worker_resources), label_selector=dict(scaling.train_on)
    )
    task, began, logged = remote.remote(), time.monotonic(), False
    while not ray.wait([task], timeout=1.0)[0]:
        waited_s = time.monotonic() - began
        if not logged and waited_s > LOG_AFTER_S:
            logged = True
            log.info("machine   waiting for a free GPU")
        if waited_s > within_s:
            ray.cancel(task)
            raise BadConfig(f"scaling.use_gpu: no GPU was free within {within_s:g} s; see `ray status`")
    try:
        hardware: Hardware = ray.get(task)
    except RayError as error:
        line = str(error).strip().splitlines()[-1]
        raise BadConfig(f"scaling.use_gpu: cannot detect the hardware of the node that trains: {line}") from error
    return hardware


def resolve_auto(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return the configuration with `auto` replaced in train.precision and model.attention.

    Raises:
        BadConfig: flash attention is requested, and the GPU has no bf16.
    """
    values = config.model_dump()
    if config.train.precision == "auto":
        values["train"]["precision"] = "bf16" if hardware.bf16 else "fp32"
    if config.model.attention == "auto":
        # Measured, SDPA is the faster: flash-attn's steps took 16 % longer on an H200 (docs/log.md).
        values["model"]["attention"] = "sdpa"
    return validate_run(values)


def resolve_checkpointing(config: RunConfig, hardware: Hardware) -> RunConfig:
    """Return the configuration with `auto` replaced in train.activation_checkpointing, by what the GPU's memory allows;
    on CPUs nothing is recomputed.

    Raises:
        BadConfig: the model cannot be built.
    """
    if config.train.activation_checkpointing != "auto":
        return config
    chosen = checkpointing.choose(config, usable_memory(hardware))
    if chosen.needed_bytes > usable_memory(hardware):
        log.warning(
            "machine   a step needs %.1f GB by the plan, and the GPU has %.1f GB: give it smaller micro-batches, fewer "
            "frames or more GPUs if it runs out of memory",
            chosen.needed_bytes / 1e9, hardware.memory_bytes / 1e9,
        )  # fmt: skip
    return chosen.config


def require_float8(config: RunConfig, hardware: Hardware) -> None:
    """Check that a run with train.float8 can compute in FP8, or emulate it. A driver that has no GPU needs no torchao.

    Raises:
        BadConfig: torchao is not installed where the run trains, or the GPU has no FP8.
    """
    if not config.train.float8:
        return
    installed = hardware.torchao if hardware.gpu else importlib.util.find_spec("torchao") is not None
    if not installed:
        raise BadConfig(
            f"train.float8: torchao is not installed {'beside the GPU' if hardware.gpu else 'here'}; pip install "
            "torchao there (the extra fp8), or set train.float8 to false"
        )
    if hardware.gpu and not hardware.float8:
        raise BadConfig(
            f"train.float8: {hardware.gpu} has no FP8; train on Ada, Hopper or newer (L4, L40S, H100), or set "
            "train.float8 to false"
        )
    if not hardware.gpu:
        log.warning("machine   CPUs emulate FP8: the rounding is that of a GPU, and a step is slower than in bf16")


def usable_memory(hardware: Hardware) -> float:
    """Return the GPU's memory without the reserve of a plan [bytes]; infinite on CPUs."""
    return hardware.memory_bytes * (1 - Assumptions().reserve) if hardware.gpu else math.inf


def describe(config: RunConfig, hardware: Hardware) -> str:
    """Return device, precision, attention kernels, recomputation, FP8 and communication backend in one line.

    A sweep's trials choose what they recompute themselves, and encoding recomputes nothing: `auto` is left out.
    """
    kernels = f"{config.train.precision}, {config.model.attention}"
    train = config.train
    if train.activation_checkpointing != "auto" and train.checkpointing != ("none", "none"):
        encoder, decoder = train.checkpointing
        kernels += f", recomputation: encoder {encoder}, decoder {decoder}"
    if train.float8:
        kernels += ", FP8 in training"
    if hardware.gpu is None:
        return f"CPUs, {kernels}, gloo"
    return f"{hardware.gpu}, {kernels}, NCCL {hardware.nccl}"


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment variables of training workers."""
    return {k: os.environ.get(k, v) for k, v in GPU_ENVIRONMENT.items()} if config.scaling.use_gpu else {}


def object_store_warning(config: RunConfig, image_size: int, features: FeatureRecipe | None) -> str | None:
    """Return a warning if the object stores of all nodes, autoscaled to their limit, are too small for the blocks in
    flight; else None. Node types that do not state `object_store_memory` count as large enough.

    Args:
        config: the run's configuration.
        image_size: height and width of a frame [pixels].
        features: recipe of the cached features that are read instead of videos.
    """
    scaling, data = config.scaling, config.data
    frame_bytes = image_size**2 * 3 if features is None else features.patches * features.width * BF16_BYTES
    block_bytes = rows_per_block(data, image_size, features) * data.num_frames * frame_bytes
    decoders = placement.demands(config, scaling.most_workers)[1].count
    needed = block_bytes * (BLOCKS_PER_DECODER * decoders + BLOCKS_PER_RANK * scaling.most_workers)
    pools = placement.node_pools(config)
    available = sum(pool.count * pool.resources.get(OBJECT_STORE, math.inf) for pool in pools)
    if needed <= available:
        return None
    return (
        f"blocks in flight take {needed / 1e9:.1f} GB and the object stores hold {available / 1e9:.1f} GB: Ray will "
        "spill to disk; give nodes more (ray start --object-store-memory), or lower data.num_frames"
    )
