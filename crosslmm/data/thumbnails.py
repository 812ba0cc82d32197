"""Small pictures of the frames that the model sees, for HTML pages and MLflow."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

STRIP = 8
"""Frames of a strip, at most."""
SQUARE = 2
"""Rows, and columns, of frames in a square."""
SIDE = 96
"""Side of each [px]."""
QUALITY = 6
"""Quantiser of the JPEG, 2 (best) to 31."""


def strip(videos: Sequence[np.ndarray]) -> bytes:
    """Return some frames of videos, side by side, as one JPEG.

    Args:
        videos: uint8 (frames, side, side, 3) each, together at least one frame.
    """
    return _jpeg(np.concatenate(_small_frames(videos, STRIP), axis=1))


def square(videos: Sequence[np.ndarray]) -> bytes:
    """Return a few frames of videos in rows, as one JPEG: for MLflow's tables, whose cells are square.

    Args:
        videos: uint8 (frames, side, side, 3) each, together at least one frame.
    """
    small = _small_frames(videos, SQUARE**2)
    small += [np.zeros_like(small[0])] * (SQUARE**2 - len(small))
    rows = [np.concatenate(small[i : i + SQUARE], axis=1) for i in range(0, SQUARE**2, SQUARE)]
    return _jpeg(np.concatenate(rows))


def _small_frames(videos: Sequence[np.ndarray], most: int) -> list[np.ndarray]:
    """Return up to `most` frames, evenly spaced over all videos, uint8 (SIDE, SIDE, 3) each."""
    frames = [frame for video in videos for frame in video]
    chosen = np.linspace(0, len(frames) - 1, min(most, len(frames))).round().astype(int)
    resize = VideoReformatter()
    return [
        resize.reformat(av.VideoFrame.from_ndarray(np.ascontiguousarray(frames[i]), "rgb24"), SIDE, SIDE).to_ndarray()
        for i in chosen
    ]


def _jpeg(image: np.ndarray) -> bytes:
    """Encode an image, uint8 (height, width, 3), both even."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "yuvj420p", Fraction(1)
    codec.qmin = codec.qmax = QUALITY
    frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="yuvj420p")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])
