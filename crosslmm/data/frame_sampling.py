"""Which frames of a video are looked at. Pure functions of its times; decoders do as they say.

A policy is named in the configuration and stored with the model, so that training and evaluation cannot drift apart.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

Policy = Literal["uniform", "fps", "fps_then_uniform"]

EXCERPT = re.compile(r"#t=(\d+(?:\.\d+)?)?(?:,(\d+(?:\.\d+)?))?$")
"""What stands behind a video's place where a part of it is meant: the temporal fragment of W3C's Media Fragments."""


def split_time_range(uri: str) -> tuple[str, float, float | None]:
    """`clip.mp4#t=START,END` -> (place of the file, start, end) [s]; without START from the beginning, without END or
    without a fragment to the end (None).

    Raises:
        ValueError: a part that ends before it begins.
    """
    found = EXCERPT.search(uri)
    if not found:
        return uri, 0.0, None
    start, end = float(found[1] or 0), float(found[2]) if found[2] else None
    if end is not None and end <= start:
        raise ValueError(f"{uri!r}: the part ends before it begins")
    return uri[: found.start()], start, end


@dataclass(frozen=True)
class FrameSampling:
    """Which moments of a video are looked at.

    A video gives fewer frames than moments where several moments show the same frame: none is repeated.

    Attributes:
        num_frames: the most frames that a video gives; `uniform` gives as many wherever there are.
        policy: "uniform": the middles of equal parts of the video (InternVL's segments). "fps": every 1/fps s from its
            beginning, and no more than the first `num_frames` of them. "fps_then_uniform": every 1/fps s, and where
            these would be too many, `num_frames` spread from the first frame to the last (LLaVA-Video's).
        fps: frames per second of the last two.
    """

    num_frames: int
    policy: Policy = "uniform"
    fps: float = 1.0

    def times(self, duration: float, last: float | None = None) -> np.ndarray:
        """Moments to look at, ascending, from the first frame on [s], float64.

        Args:
            duration: from the first frame's appearance to the last one's end [s].
            last: when the last frame appears, if it is known [s].
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
        """How many frames videos of these durations give at most, float64 [s] -> int64; a duration of NaN is unknown,
        one of 0 that of an image."""
        if self.policy == "uniform":
            return np.where(seconds == 0, 1, self.num_frames)
        frames = np.clip(np.ceil(seconds * self.fps - 1e-6), 1, self.num_frames)
        return np.where(np.isnan(seconds), self.num_frames, frames).astype(np.int64)


def uniform(duration: float, count: int) -> np.ndarray:
    """Times of `count` frames spread evenly: the middles of `count` equal parts of [0, duration) [s], float64."""
    return (np.arange(count) + 0.5) * duration / count


def at_rate(duration: float, fps: float, most: int) -> np.ndarray:
    """0, 1/fps, 2/fps, ... before `duration`, the first at least and `most` at most [s], float64."""
    # A duration that rounding has made a hair too long shows no further frame.
    return np.arange(int(np.clip(np.ceil(duration * fps - 1e-6), 1, most))) / fps


def frames_at(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted time the index of the frame that is on screen then, each frame at most once.

    A video with fewer frames than wanted gives fewer, never one twice.

    Args:
        times: ascending presentation times of the frames [s].
        wanted: ascending [s].
    """
    shown = np.searchsorted(times, wanted, side="right") - 1
    return np.unique(shown.clip(min=0))
