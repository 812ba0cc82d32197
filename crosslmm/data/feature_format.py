"""How frozen-encoder features are made and stored: the recipe that is their cache key, and their byte format."""

import hashlib
import json
import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from crosslmm.config import DataConfig
from crosslmm.config.schema import Section
from crosslmm.data.frame_sampling import FrameSampling, Policy
from crosslmm.data.video.decode import BACKENDS

FORMAT = 3
"""Version of the cache's files; also raised when the same settings take other frames from a video; part of the key."""
BF16_BYTES = 2
"""Size of a bfloat16 value [bytes]."""

DType = Literal["bf16", "int8"]


class FeatureConfig(Section):
    """Where features are stored, and in which format."""

    folder: str | None = None
    """Path or s3:// URI; each recipe (encoder, sampling, decoder, image size, precision) gets a subfolder. Null:
    `features` in `storage`."""
    dtype: DType = "bf16"
    """bf16: two bytes a value; int8: one byte a value, scaled by each token's largest value."""
    price: Annotated[float, Field(ge=0)] = 0.023
    """Price of storage for the estimate; the default is a typical cloud price [USD per GB and month]."""


class FeatureRecipe(Section):
    """Everything that features depend on besides the video itself; the key of their folder."""

    num_frames: int
    """Frames of a video."""
    sampling: Policy
    """Frame sampling policy."""
    fps: float
    """Frames per second of that policy."""
    decoder: str
    """Library that decodes, never `auto`."""
    image_size: int
    """Side of a frame [px]."""
    precision: str
    """Precision that the encoder computes in."""
    patches: int
    """Tokens of a frame."""
    width: int
    """Values of a token."""
    encoder: str
    """Digest of the encoder's weights and configuration."""
    dtype: DType
    """Format that the features are stored in."""
    format: int = FORMAT

    @classmethod
    def from_config(
        cls, data: DataConfig, image_size: int, precision: str, patches: int, width: int, encoder: str, dtype: DType
    ) -> "FeatureRecipe":
        """Return the recipe of a run's configuration."""
        return cls(
            num_frames=data.num_frames,
            sampling=data.sampling,
            fps=data.fps,
            decoder=BACKENDS[data.decoder].__name__.removeprefix("with_"),
            image_size=image_size,
            precision=precision,
            patches=patches,
            width=width,
            encoder=encoder,
            dtype=dtype,
        )

    @property
    def key(self) -> str:
        """Name of the folder; any change of a field changes it."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def frame_sampling(self) -> FrameSampling:
        """The frame policy."""
        return FrameSampling(self.num_frames, self.sampling, self.fps)

    @property
    def frame_bytes(self) -> int:
        """Size of one frame's features in storage [bytes]."""
        return bytes_per_frame(self.patches, self.width, self.dtype)

    def differences(self, other: "FeatureRecipe") -> list[str]:
        """Return `KEY THIS and OTHER` for each field that differs."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]


def bytes_per_frame(patches: int, width: int, dtype: DType) -> int:
    """Return the size of one frame's features in storage [bytes]; int8 has two more bytes a token for its scale."""
    return patches * BF16_BYTES * width if dtype == "bf16" else patches * (width + 2)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; return its bits, uint16 of the same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Convert the bits of bfloat16, uint16, to float32 of the same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(x_FPD: np.ndarray, dtype: DType) -> bytes:
    """Encode features, float32 (frames, patches, width), as they are stored.

    int8 values are scaled by each token's largest value; the scales, float16, follow the values.

    Raises:
        ValueError: values that are not finite, or too large.
    """
    if dtype == "bf16":
        packed, finite = to_bf16(x_FPD).tobytes(), np.isfinite(x_FPD).all()
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            scale_FP1 = (np.abs(x_FPD).max(axis=-1, keepdims=True) / 127).astype(np.float16)
            steps = x_FPD / np.where(scale_FP1 > 0, scale_FP1, 1).astype(np.float32)
            packed = np.clip(np.rint(steps), -127, 127).astype(np.int8).tobytes() + scale_FP1.tobytes()
        finite = np.isfinite(scale_FP1).all()
    if not finite:
        raise ValueError(f"the encoder gave values that {dtype} cannot store: not finite, or too large")
    return packed


def unpack(data: bytes, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """Decode stored features of `shape` (frames, patches, width) to the bits of bfloat16, uint16.

    int8 is multiplied by its scales here, so readers deal with one format only.
    """
    if dtype == "bf16":
        return np.frombuffer(data, np.uint16).reshape(shape)
    tokens_FPD = np.frombuffer(data, np.int8, math.prod(shape)).reshape(shape)
    scale_FP1 = np.frombuffer(data, np.float16, offset=tokens_FPD.nbytes).reshape(*shape[:-1], 1)
    return to_bf16(tokens_FPD * scale_FP1.astype(np.float32))
