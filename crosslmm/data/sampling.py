"""Which frames of a video are looked at. Pure functions."""

import numpy as np


def uniform(duration: float, count: int) -> np.ndarray:
    """Times of `count` frames spread evenly: the middles of `count` equal parts of [0, duration) [s], float64."""
    return (np.arange(count) + 0.5) * duration / count


def nearest(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each wanted time the index of the frame that is on screen then, each frame at most once.

    A video with fewer frames than wanted gives fewer, never one twice.

    Args:
        times: ascending presentation times of the frames [s].
        wanted: ascending [s].
    """
    shown = np.searchsorted(times, wanted, side="right") - 1
    return np.unique(shown.clip(min=0))
