"""Frame sampling policies: pure functions of a video's times, which all decoders use.

The configuration names a policy, and the registered model stores it, so training and evaluation use the same one.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from crosslmm.config import DataConfig

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

    @classmethod
    def of(cls, data: DataConfig) -> "FrameSampling":
        """Return the policy of a configuration."""
        return cls(data.num_frames, data.sampling, data.fps)

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

    def last_moment(self, start: float, end: float | None) -> float:
        """Return a time that no moment of a part of a video comes after, whatever the video's duration [s].

        Args:
            start, end: of the part; None means the end of the video [s].
        """
        end = math.inf if end is None else end
        return min(end, start + (self.num_frames - 1) / self.fps) if self.policy == "fps" else end

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


@dataclass(frozen=True)
class SampledFrames:
    """The frames of a video that are on screen at the sampled moments, each once."""

    images: np.ndarray
    """uint8 (frames, side, side, 3), RGB; or their stored features, uint16 (frames, patches, width) with the bits of
    bfloat16."""
    times: np.ndarray
    """When each frame appears, counted from the video's first frame, float64 (frames,) [s]. A part of a video
    (`#t=START`) may begin with a frame that appeared before START."""
    shortfall: str | None = None
    """Why there are fewer frames than the policy asked for, or frames from a part of the file only; None if neither."""
    is_picture: bool = False
    """Whether it is the only frame of an image or an animation: its time says nothing."""

    def __len__(self) -> int:
        return len(self.images)

    def with_shortfall(self, reason: str) -> "SampledFrames":
        """Return the same frames with one more reason."""
        return replace(self, shortfall=f"{self.shortfall}; {reason}" if self.shortfall else reason)


def describe_shortfall(moments: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> str | None:
    """Return why there are fewer frames than sampled moments; None if there are not.

    Args:
        moments: ascending [s].
        starts, ends: when each returned frame appears and leaves the screen, ascending [s].
    """
    if len(starts) >= len(moments):
        return None
    frame_of = np.searchsorted(starts, moments, side="right") - 1
    served = frame_of >= 0
    served[served] = moments[served] < ends[frame_of[served]]
    reasons = []
    if not served.all():
        first, last = moments[~served][[0, -1]]
        reasons.append(f"none can be decoded at {(~served).sum()} moments from {first:.1f} s to {last:.1f} s")
    counts = np.bincount(frame_of[served], minlength=1)
    longest, count = int(counts.argmax()), int(counts.max())
    if count > 1:
        appears, leaves = max(starts[longest], 0.0), ends[longest]
        reasons.append(f"one picture stays from {appears:.1f} s to {leaves:.1f} s, at {count} of the moments")
    return f"{len(starts)} of {len(moments)} frames: {'; '.join(reasons)}"


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
