"""How frozen-encoder features are made and stored: the recipe that is their cache key, and their bytes."""

import hashlib
import json
import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from crosslmm.config import DataConfig, Section
from crosslmm.data.video.decode_pool import BACKENDS

FORMAT = 1
"""Of the files; another one is another key."""
BF16_BYTES = 2
"""Bytes of a value."""

DType = Literal["bf16", "int8"]


class FeatureConfig(Section):
    """Where features go, and in which form."""

    folder: str | None = None
    """Path or s3:// URI; features of each encoder and frame policy get a folder of their own in it. Null: `features` in
    `storage`."""
    dtype: DType = "bf16"
    """Two bytes a value, or int8: one, scaled by each token's largest value."""
    price: Annotated[float, Field(ge=0)] = 0.023
    """Of storage, for the estimate: an example of what a cloud asks [USD a GB and month]."""


class FeatureRecipe(Section):
    """What features depend on beside the video itself: the key of their folder."""

    num_frames: int
    sampling: str
    fps: float
    decoder: str
    """The library, never `auto`."""
    image_size: int
    """[px]"""
    precision: str
    """In which the encoder computes."""
    patches: int
    """Of a frame."""
    width: int
    """Of a token."""
    encoder: str
    """Digest of its weights and of what else it computes with."""
    dtype: DType
    """In which the features are stored."""
    format: int = FORMAT

    @classmethod
    def from_config(
        cls, data: DataConfig, image_size: int, precision: str, patches: int, width: int, encoder: str, dtype: DType
    ) -> "FeatureRecipe":
        """The recipe of a run's configuration."""
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
        """Name of the folder: changes with every field."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def frame_bytes(self) -> int:
        """Of one frame's features in storage."""
        return bytes_per_frame(self.patches, self.width, self.dtype)

    def differences(self, other: "FeatureRecipe") -> list[str]:
        """`KEY THIS and OTHER` for each field that differs."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]


def bytes_per_frame(patches: int, width: int, dtype: DType) -> int:
    """One frame's features in storage [bytes]: two a value, or one a value and two a token."""
    return patches * BF16_BYTES * width if dtype == "bf16" else patches * (width + 2)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as its bits: uint16, same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits, uint16 -> float32, same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(x_FPD: np.ndarray, dtype: DType) -> bytes:
    """Features, float32 (frames, patches, width) -> as they are stored. int8 is scaled by each token's largest value;
    the scales, float16, stand behind the tokens.

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
        raise ValueError(f"the encoder gave values that {dtype} does not hold: not finite, or too large")
    return packed


def unpack(data: bytes, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """As stored -> the bits of bfloat16, uint16 `shape` (frames, patches, width).

    int8 is multiplied out here, so that whoever reads knows one form only.
    """
    if dtype == "bf16":
        return np.frombuffer(data, np.uint16).reshape(shape)
    tokens_FPD = np.frombuffer(data, np.int8, math.prod(shape)).reshape(shape)
    scale_FP1 = np.frombuffer(data, np.float16, offset=tokens_FPD.nbytes).reshape(*shape[:-1], 1)
    return to_bf16(tokens_FPD * scale_FP1.astype(np.float32))
