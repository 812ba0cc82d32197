"""Limits come before the cost: files that would take much memory or time are refused while they have taken little."""

import functools
import io
import re
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.video.decode import VideoFailure, probe_video
from crosslmm.data.video.decode_pool import VideoPool
from tests.support import misbehave, zoo

pytestmark = pytest.mark.corrupt

DATA = DataConfig(num_frames=4, decode_timeout_s=60, decode_memory_gib=4)
MAX_MIB, MAX_S = 120, 4.0
"""Bounds of what a refusal may cost: libav's buffers and a busy machine [MiB, s]."""
TOO_LARGE = r"its frames are \d+ x \d+, and data\.max_frame_pixels is 35651584"


def png(width, height, *more_chunks):
    """Return a black PNG of 1 byte per pixel, which compresses a thousandfold."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            *(chunk(name, data) for name, data in more_chunks),
            chunk(b"IDAT", rows),
            chunk(b"IEND", b""),
        ]
    )


def jpeg(width, height):
    """Return a JPEG whose header states another size than its picture has."""
    encoder = av.codec.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = 64, 64, "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(zoo.draw(0, 64, 64), format="rgb24").reformat(format="yuvj420p")
    data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def lying_avi(frame):
    """Return an .avi that claims frames of 64 x 64 and has this one."""
    data = zoo.video("avi", "mjpeg", frames=1, size=(64, 64))
    start = data.index(b"\xff\xd8\xff")
    size = struct.unpack_from("<I", data, start - 4)[0]
    chunk = frame + b"\0" * (len(frame) % 2)
    grown = bytearray(data[: start - 4] + struct.pack("<I", len(frame)) + chunk + data[start + size + size % 2 :])
    movi = data.rindex(b"movi", 0, start) - 4
    struct.pack_into("<I", grown, movi, struct.unpack_from("<I", data, movi)[0] + len(chunk) - size - size % 2)
    return bytes(grown)


def cropped(width, height):
    """Return an H.264 stream whose frames are coded in this size and cropped to 64 x 64."""
    crop = f"h264_metadata=crop_right={width - 64}:crop_bottom={height - 64}"
    fast = {"preset": "ultrafast", "tune": "zerolatency", "bf": "0"}
    source = zoo.video("mp4", frames=2, size=(width, height), picture=black, **fast)
    with av.open(io.BytesIO(source)) as container, io.BytesIO() as file:
        stream = container.streams.video[0]
        with av.open(file, "w", format="mpegts") as output:
            copy = output.add_stream_from_template(stream)
            to_annex_b = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream, copy)
            filters = av.bitstream.BitStreamFilterContext(crop, copy, copy)
            for packet in container.demux(stream):
                for one in to_annex_b.filter(packet):
                    for other in filters.filter(one):
                        other.stream = copy
                        output.mux(other)
        return file.getvalue()


def black(number, width, height):
    return np.zeros((height, width, 3), np.uint8)
