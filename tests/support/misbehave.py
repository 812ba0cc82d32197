"""Decoders that misbehave in native code. In a file of their own, because each child process imports it."""

import ctypes
import os
import signal

import numpy as np

from crosslmm.config import DataConfig
from crosslmm.data.video.decode import decode_video


def spins(uri):
    """Hold the GIL forever, so that no Python signal handler runs."""
    if "good" not in uri:
        # Exponential backtracking: takes some million years.
        import re

        re.match(r"(a+)+$", "a" * 60 + "b")
    return good(uri)


def crashes(uri):
    """Die of a segmentation fault signal."""
    if "good" not in uri:
        os.kill(os.getpid(), signal.SIGSEGV)
    return good(uri)


def overflows(uri):
    """Write to an invalid address."""
    if "good" not in uri:
        ctypes.memset(8, 0, 8)
    return good(uri)


def hogs(uri):
    """Allocate 8 GiB."""
    if "good" not in uri:
        return np.ones(2**33, np.uint8)
    return good(uri)


def good(uri):
    """Decode the video."""
    return decode_video(uri, DataConfig(num_frames=8), 64)
