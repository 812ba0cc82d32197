"""What a plan assumes: GPUs, prices, speeds and data. Imports nothing heavy: bad arguments are refused at once."""

import itertools
from typing import Annotated, Literal, NamedTuple

from pydantic import Field, model_validator

from crosslmm.config.schema import Count, Section, Share


class Range(NamedTuple):
    """A value for the low and for the high end of an assumption."""

    low: float
    high: float


class Gpu(NamedTuple):
    """A GPU model that can be rented."""

    memory_bytes: float
    """Memory as advertised [bytes, powers of ten]; the driver reports a little more."""
    flops: dict[str, float]
    """Dense FLOP/s by `train.precision`, from the vendor's data sheet."""
    price: float
    """Example cloud price [USD/hour]."""


GPUS = {
    "l4": Gpu(24e9, {"bf16": 121e12, "fp32": 30e12}, 0.80),
    "rtx-4090": Gpu(24e9, {"bf16": 165e12, "fp32": 83e12}, 0.50),
    "a100-40": Gpu(40e9, {"bf16": 312e12, "fp32": 19.5e12}, 1.30),
    "l40s": Gpu(48e9, {"bf16": 362e12, "fp32": 92e12}, 1.00),
    "a100-80": Gpu(80e9, {"bf16": 312e12, "fp32": 19.5e12}, 1.80),
    "h100": Gpu(80e9, {"bf16": 989e12, "fp32": 67e12}, 3.00),
    "h200": Gpu(141e9, {"bf16": 989e12, "fp32": 67e12}, 3.80),
    "b200": Gpu(180e9, {"bf16": 2250e12, "fp32": 75e12}, 5.50),
}


def find_gpu(device: str) -> Gpu | None:
    """Return the GPU of a device's name, such as "NVIDIA A100-SXM4-80GB"; None if it is not in `GPUS`. Slower cards of
    the same name (PCIe, NVL) and parts of a card (MIG) are not."""
    words = device.lower().replace("-", " ").replace("gb", "").split()
    if {"pcie", "nvl", "mig"} & set(words):
        return None
    names = {*words, *("-".join(pair) for pair in itertools.permutations(words, 2))}
    return next((gpu for name, gpu in GPUS.items() if name in names), None)


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]


class Assumptions(Section):
    """What a plan assumes in addition to the configuration."""

    gpu: Literal["l4", "rtx-4090", "a100-40", "l40s", "a100-80", "h100", "h200", "b200"] = "h100"
    """GPU model."""
    gpus_per_node: Count | None = None
    """GPUs of a node; null takes those of `scaling.node_types` that train. Where neither says it, no hybrid sharding is
    recommended."""
    price: Positive | None = None
    """Price of one GPU [USD/hour]; null uses the built-in example price."""
    hfu: PositiveShare | tuple[PositiveShare, PositiveShare] = (0.14, 0.3)
    """Hardware FLOPs utilisation: share of the GPU's dense FLOP/s that a training step reaches, with what the backward
    pass computes again; a number, or [low, high]. MFU, which leaves it out, follows from it. Measured: 0.19 and 0.24,
    the two stages of the 2B in bf16 on one H200 (MFU 0.18 and 0.19). The default is a quarter wider either way, since
    neither another model nor several GPUs have been measured."""
    reserve: Share = 0.1
    """Share of the GPU's memory reserved for CUDA's context, NCCL's buffers and fragmentation."""
    text_tokens: Count = 60
    """Text per sample, all of it labelled [tokens]."""
    stamp_tokens: Count = 7
    """With data.timestamps: tokens of a frame's time. Qwen's tokenizers take 7 below 100 s, as in "<12.0 seconds>", and
    one more for each further digit."""
    samples: Count = 1_000_000
    """Rows of the manifest, with one video each."""
    video_seconds: Positive = 60.0
    """Length of a video [s]."""
    bitrate: Positive = 2.5e6
    """Bitrate of the stored videos [bit/s]; typical of 640 x 360 H.264."""
    decode_speed: Positive = 62.0
    """Seconds of video that one core decodes per second, decoding all of it (measured: 60 s in 0.97 s)."""
    storage_price: NotNegative = 0.023
    """Price of stored videos, checkpoints and model [USD per GB-month]; that of S3 Standard."""
    traffic_price: NotNegative = 0.0
    """Price of reading from the store [USD/GB]: nothing within a cloud's region, 0.02 to 0.09 from outside."""
    request_price: NotNegative = 0.0004
    """Price of a thousand reads [USD]; that of S3 Standard."""

    @model_validator(mode="after")
    def _low_comes_first(self) -> "Assumptions":
        if self.hfus.low > self.hfus.high:
            raise ValueError(f"hfu: {self.hfu} is not [low, high]")
        return self

    @property
    def hfus(self) -> Range:
        """Low and high end of `hfu`."""
        return Range(*(self.hfu if isinstance(self.hfu, tuple) else [self.hfu] * 2))
