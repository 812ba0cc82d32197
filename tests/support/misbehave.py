"""Decoders that misbehave in native code. In a file of their own, because each child process imports it."""

import ctypes
import os
import platform
import signal
import socket
import struct
import time
from pathlib import Path

import numpy as np
import psutil

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


def decode_without_sockets(uri, data):
    """Decode a local file in a process that the kernel kills as soon as it asks for a socket that is not a Unix one."""
    # BPF: load the number of the system call; if it is socket(2) and its family is not AF_UNIX, kill the process.
    load, jump_if_equal, give = 0x20, 0x15, 0x06
    program = [
        (load, 0, 0, 0),
        (jump_if_equal, 0, 2, SOCKET_CALL[platform.machine()]),
        (load, 0, 0, 16),
        (jump_if_equal, 0, 1, socket.AF_UNIX),
        (give, 0, 0, 0x7FFF0000),
        (give, 0, 0, 0x80000000),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    prctl, no_new_privileges, set_seccomp = ctypes.CDLL(None).prctl, 38, 22
    assert prctl(no_new_privileges, 1, 0, 0, 0) == prctl(set_seccomp, 2, filters, 0, 0) == 0
    if uri == "socket":
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    return decode_video(uri, data, 64)


SOCKET_CALL = {"x86_64": 41, "aarch64": 198}
"""Number of socket(2)."""


def decode_measured(uri, data):
    """Decode a file; return the result, how far memory grew in between [MiB], and the time [s]."""
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    began = time.monotonic()
    result = decode_video(uri, data, 64)
    seconds = time.monotonic() - began
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return result, (int(status["VmHWM"].split()[0]) * 2**10 - before) / 2**20, seconds
