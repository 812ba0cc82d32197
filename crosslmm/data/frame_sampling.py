"""Frame sampling policies: pure functions of a video's times, which all decoders use.

The configuration names a policy, and the registered model stores it, so training and evaluation use the same one.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Policy = Literal["uniform", "fps", "fps_then_uniform"]

TIME_RANGE = re.compile(r"#t=(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?$")
"""Suffix of a URI that selects a part of a video: the temporal fragment of W3C's Media Fragments."""


def split_time_range(uri: str) -> tuple[str, float, float | None]:
    """Split `clip.mp4#t=START,END` into (URI of the file, start, end) [s].

    Without START the part begins at 0; without END, or without `#t=`, it extends to the end of the video (None).

    Raises:
        ValueError: the part ends before it begins.
    """
    match = TIME_RANGE.search(uri)
    if not match:
        return uri, 0.0, None
    start, end = float(match[1] or 0), float(match[2]) if match[2] else None
    if end is not None and end <= start:
        raise ValueError(f"{uri!r}: the part ends before it begins")
    return uri[: match.start()], start, end


@dataclass(frozen=True)
class FrameSampling:
    """A policy that picks the moments of a video whose frames the model sees.

    A video gives fewer frames than moments if several moments show the same frame: no frame is repeated.

    Attributes:
        num_frames: most frames of a video; `uniform` gives exactly this many if the video has them.
        policy: "uniform": the middles of equal segments of the video (as InternVL). "fps": every 1/fps s from the
            beginning, at most `num_frames`. "fps_then_uniform": every 1/fps s, or, if these would be too many,
            `num_frames` spread evenly from the first frame to the last (as LLaVA-Video).
        fps: frames per second of the policies "fps" and "fps_then_uniform".
    """

    num_frames: int
    policy: Policy = "uniform"
    fps: float = 1.0

    def times(self, duration: float, last: float | None = None) -> np.ndarray:
        """Return the moments to show, ascending, relative to the first frame [s], float64.

        Args:
            duration: from the start of the first frame to the end of the last one [s].
            last: start of the last frame, if known [s].
        """
        if self.policy == "uniform":
            return uniform(duration, self.num_frames)
        regular = at_rate(duration, self.fps, self.num_frames + 1)
        if len(regular) <= self.num_frames:
            return regular
        if self.policy == "fps":
            return regular[: self.num_frames]
        return np.linspace(0, duration if last is None else last, self.num_frames)

    def count(self, seconds: np.ndarray) -> np.ndarray:
        """Return the largest number of frames that a video of each duration can give.

        Args:
            seconds: durations, float64 [s]; NaN if unknown, 0 for an image.

        Returns:
            int64, same shape.
        """
        if self.policy == "uniform":
            return np.where(seconds == 0, 1, self.num_frames)
        frames = np.clip(np.ceil(seconds * self.fps - 1e-6), 1, self.num_frames)
        return np.where(np.isnan(seconds), self.num_frames, frames).astype(np.int64)


def uniform(duration: float, count: int) -> np.ndarray:
    """Return the middles of `count` equal segments of [0, duration) [s], float64."""
    return (np.arange(count) + 0.5) * duration / count


def at_rate(duration: float, fps: float, limit: int) -> np.ndarray:
    """Return 0, 1/fps, 2/fps, ... before `duration` [s], float64; at least the first and at most `limit` of them."""
    # Subtract a little: a duration that rounding made slightly too long must not add a frame.
    return np.arange(int(np.clip(np.ceil(duration * fps - 1e-6), 1, limit))) / fps


def frames_at(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the indices of the frames that are on screen at some moments, without repetitions.

    Args:
        times: ascending presentation times of all frames [s].
        wanted: ascending moments [s].

    Returns:
        int64, ascending; shorter than `wanted` if several moments show the same frame.
    """
    indices = np.searchsorted(times, wanted, side="right") - 1
    return np.unique(indices.clip(min=0))
