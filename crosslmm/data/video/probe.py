"""An open file -> what its header says of the video; nothing is decoded."""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from av.container import InputContainer
from av.video.stream import VideoStream

from crosslmm.config import DataConfig
from crosslmm.data.video.pyav import INDEXED, choose_stream, duration_of, open_container


@dataclass(frozen=True)
class Probe:
    """What a file says of its video, without a frame being decoded."""

    seconds: float
    """Duration, 0 of an image [s]."""
    frames: int | None
    """None where the container does not count them."""
    width: int
    """As it is stored [px]."""
    height: int
    """As it is stored [px]."""
    codec: str
    """libav's name of it."""
    rotation: int
    """By which its frames are to be turned counterclockwise [degrees]; told of mp4 and mov only."""
    keyframes: int | None
    """None where there is no index of the whole video."""
    bytes: int = 0
    """Size of the file."""
    version: str | None = None
    """The object's ETag, where it has one."""


def probe(file: BinaryIO, form: str, data: DataConfig) -> Probe:
    """Read a video's header and index, and its packets only where these do not say how long it lasts.

    Arguments and errors are those of `with_pyav`; a broken frame is not noticed.
    """
    with open_container(file, form) as container:
        stream = choose_stream(container, data)
        duration = duration_of(container, stream, data)
        context = stream.codec_context
        found = Probe(
            seconds=duration,
            frames=stream.frames or None,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
            rotation=0,
            keyframes=_keyframes(container, stream, duration),
        )
        track = stream.id
    return replace(found, rotation=_rotation(file, track)) if form == "mov" else found


def _keyframes(container: InputContainer, stream: VideoStream, duration: float) -> int | None:
    """How many the index names; None without one, or with one of the beginning alone, as of an mp4 in fragments."""
    index = stream.index_entries
    if not len(index) or not any(name in container.format.name for name in INDEXED):
        return None
    # Matroska's index has keyframes only, and the last one may come early.
    reach = (index[len(index) - 1].timestamp - index[0].timestamp) * float(stream.time_base or 1)
    if len(index) > 1 and reach < duration / 2 and "matroska" not in container.format.name:
        return None
    return sum(entry.is_keyframe for entry in index)


def _rotation(file: BinaryIO, track: int) -> int:
    """How the phone was held: the angle in the display matrix of an mp4's track, which PyAV tells of frames only."""
    header = b""
    for box, begin, end in _boxes(file, 0, file.seek(0, io.SEEK_END)):
        for inner, start, stop in _boxes(file, begin, end) if box == b"moov" else ():
            for name, at, _ in _boxes(file, start, stop) if inner == b"trak" else ():
                if name == b"tkhd":
                    file.seek(at)
                    header = file.read(92)
                    long = header[:1] == b"\1"  # times of 8 bytes
                    number, matrix = (20, 52) if long else (12, 40)
                    if len(header) >= matrix + 16 and struct.unpack_from(">I", header, number)[0] == track:
                        a, b, _, c, d = struct.unpack_from(">5i", header + bytes(4), matrix)
                        turned = math.atan2(b * math.hypot(a, c), a * math.hypot(b, d))
                        return -round(math.degrees(turned))
    return 0


def _boxes(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name and content [start, end) of each box of an mp4 between two places; a broken one is the last."""
    while begin + 8 <= end:
        file.seek(begin)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name, content = int.from_bytes(head[:4]), head[4:8], 8
        if size == 1:
            size, content = int.from_bytes(head[8:16]), 16
        elif size == 0:
            size = end - begin
        if size < content:
            return
        yield name, begin + content, min(begin + size, end)
        begin += size
