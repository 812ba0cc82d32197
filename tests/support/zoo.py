"""Creates damaged and unusual video files. Each frame shows its number, in cells that survive a lossy codec."""

import io
import os
import struct
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

FPS, FRAMES = 10, 40
CELL = 16
RNG_SEED = 0


COARSE_CLOCKS = ("mpeg4", "mjpeg", "mpeg2video", "mpeg1video", "msmpeg4v2", "msmpeg4", "wmv2", "flv1")
"""Encoders whose clock must tick once a frame."""


def draw(number, width=8 * CELL, height=4 * CELL):
    """Draw a number as two rows of bits with their complement below, so that a damaged or rotated frame is noticed."""
    bits = np.array([number >> i & 1 for i in range(16)]).reshape(2, 8)
    cells = np.concatenate([bits, 1 - bits]).astype(np.uint8)
    image = (40 + 170 * cells).repeat(height // 4, 0).repeat(width // 8, 1)
    return np.ascontiguousarray(np.broadcast_to(image[..., None], (height, width, 3)))


def read_number(image):
    """Return the number in a frame of any size; None if the frame is damaged or rotated."""
    grey = image.mean(2)
    rows, columns = (((np.arange(n) + 0.5) * size / n).astype(int) for n, size in zip((4, 8), grey.shape, strict=True))
    bits = grey[np.ix_(rows, columns)] > 125
    if not np.array_equal(bits[:2], ~bits[2:]):
        return None
    return int(sum(1 << i for i, bit in enumerate(bits[:2].ravel()) if bit))


def video(
    form="mp4", codec="libx264", frames=FRAMES, times=None, container=None, audio=False, first=0, size=None,
    picture=draw, pixels="yuv420p", **o,
):  # fmt: skip
    """Encode a video; frame i is shown from times[i] on [s] and has the number first + i."""
    width, height = size or (8 * CELL, 4 * CELL)
    times = np.arange(frames) / FPS if times is None else times
    options = {"g": "10", "threads": "1", "crf": "20", **o} if codec == "libx264" else {"g": "10", "threads": "1", **o}
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=form, options=container or {}) as output:
            stream = output.add_stream(codec, rate=FPS, options=options)
            stream.width, stream.height = width, height
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else pixels
            if codec not in COARSE_CLOCKS:
                stream.codec_context.time_base = Fraction(1, 1000)
            sound = output.add_stream("aac", rate=44100) if audio else None
            ticks = int(1 / stream.codec_context.time_base) if stream.codec_context.time_base else FPS
            for i, moment in enumerate(times):
                frame = av.VideoFrame.from_ndarray(picture(first + i, width, height), format="rgb24")
                frame.pts, frame.time_base = round(moment * ticks), Fraction(1, ticks)
                output.mux(stream.encode(frame))
                if sound:
                    output.mux(sound.encode(silence(i * 4410, 4410)))
            output.mux(stream.encode())
            if sound:
                output.mux(sound.encode())
        # As root, SVT-AV1 makes its caller a real-time process, which starves others; children inherit it.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        return Path(file.name).read_bytes()


def silence(pts, samples):
    frame = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.float32), format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 44100, pts
    return frame


def audio_only(picture=False):
    """Encode a file without video; with `picture`, it has a cover picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        if picture:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(silence(0, 44100)))
        container.mux(stream.encode())
        if picture:
            packets = cover.encode(av.VideoFrame.from_ndarray(draw(0, 64, 64), format="rgb24")) + cover.encode()
            container.mux(packets)
    return file.getvalue()


def flip_bits(data, begin, end, count=3, seed=RNG_SEED):
    """Flip `count` random bits of data[begin:end]."""
    rng, damaged = np.random.default_rng(seed), bytearray(data)
    for position in rng.integers(begin, end, count):
        damaged[position] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def patch_boxes(data, box, offset, values, form=">I"):
    """Overwrite numbers in all boxes of an .mp4 with this name, `offset` bytes after the name."""
    damaged, at = bytearray(data), -1
    while (at := data.find(box, at + 1)) >= 0:
        struct.pack_into(form * 1 if len(values) == 1 else ">" + "I" * len(values), damaged, at + 4 + offset, *values)
    assert bytes(damaged) != data, f"there is no {box!r} to patch"
    return bytes(damaged)


def with_rotation(data, matrix):
    """Set the display matrix (a, b, c, d) of an .mp4, with which phones record how they were held."""

    def pack(a, b, c, d):
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    movie, track = data.rsplit(pack(1, 0, 0, 1), 1)
    return movie + pack(*matrix) + track


def with_edit_list(data, skipped, shown):
    """Set the edit list of an .mp4: it skips `skipped` frames and then shows `shown` frames."""
    at = data.index(b"elst") + 4
    assert struct.unpack_from(">I", data, at + 4) == (1,), "one edit"
    movie_scale = struct.unpack_from(">I", data, data.index(b"mvhd") + 16)[0]
    media_scale = struct.unpack_from(">I", data, data.index(b"mdhd") + 16)[0]
    media_time = struct.unpack_from(">I", data, at + 12)[0]
    changed = bytearray(data)
    struct.pack_into(">II", changed, at + 8, shown * movie_scale // FPS, media_time + skipped * media_scale // FPS)
    return bytes(changed)


def with_external_data(data, url):
    """Make the header of an .mp4 claim that its frames are at `url`."""
    at = data.index(b"url \0\0\0\1") - 4
    box = struct.pack(">I4sI", 12 + len(url) + 1, b"url ", 0) + url.encode() + b"\0"
    grown = bytearray(data[:at] + box + data[at + 12 :])
    for name in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        start = data.index(name) - 4
        struct.pack_into(">I", grown, start, struct.unpack_from(">I", data, start)[0] + len(box) - 12)
    return bytes(grown)
