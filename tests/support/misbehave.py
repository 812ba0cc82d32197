"""Decoders that misbehave in native code. Apart from the zoo, because a child imports what it is given."""

import ctypes
import os
import signal

import numpy as np

from crosslmm.config import DataConfig
from crosslmm.data.video.decode import decode_video


def spins(uri):
    """Holds the interpreter's lock for ever: no Python signal handler runs any more."""
    if "good" not in uri:
        # A regular expression engine at work for some million years.
        import re

        re.match(r"(a+)+$", "a" * 60 + "b")
    return good(uri)


def crashes(uri):
    if "good" not in uri:
        os.kill(os.getpid(), signal.SIGSEGV)
    return good(uri)


def overflows(uri):
    """Writes to an address that is not its own."""
    if "good" not in uri:
        ctypes.memset(8, 0, 8)
    return good(uri)


def hogs(uri):
    if "good" not in uri:
        return np.ones(2**33, np.uint8)
    return good(uri)


def good(uri):
    return decode_video(uri, DataConfig(num_frames=8), 64)
