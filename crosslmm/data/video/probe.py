"""Read the header of a video without decoding a frame."""

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from av.container import InputContainer
from av.video.stream import VideoStream

from crosslmm.config import DataConfig
from crosslmm.data.video.pyav import INDEXED_FORMATS, open_container, select_video_stream, video_duration


@dataclass(frozen=True)
class Probe:
    """Properties of a video according to its header."""

    seconds: float
    """Duration, 0 for an image [s]."""
    frames: int | None
    """Number of frames; None if the container does not count them."""
    width: int
    """Width of the stored frames, before rotation [px]."""
    height: int
    """Height of the stored frames, before rotation [px]."""
    codec: str
    """libav's name of the codec."""
    rotation: int
    """Counterclockwise rotation that a player applies [degrees]; known for mp4 and mov only, else 0."""
    keyframes: int | None
    """Number of keyframes; None without an index of the whole video."""
    bytes: int = 0
    """Size of the file [bytes]."""
    version: str | None = None
    """ETag of the object, if it has one."""


def probe(file: BinaryIO, format_name: str, data: DataConfig) -> Probe:
    """Read a video's header and index, and its packets only if these do not state its duration.

    Arguments and errors are those of `with_pyav`; damaged frames go unnoticed.
    """
    with open_container(file, format_name) as container:
        stream = select_video_stream(container, data)
        duration = video_duration(container, stream, data)
        context = stream.codec_context
        result = Probe(
            seconds=duration,
            frames=stream.frames or None,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
            rotation=0,
            keyframes=_count_keyframes(container, stream, duration),
        )
        track = stream.id
    return replace(result, rotation=_read_rotation(file, track)) if format_name == "mov" else result


def _count_keyframes(container: InputContainer, stream: VideoStream, duration: float) -> int | None:
    """Count the keyframes in the index; None if there is no index, or if it ends early (fragmented mp4)."""
    index = stream.index_entries
    if not len(index) or not any(name in container.format.name for name in INDEXED_FORMATS):
        return None
    # Matroska's index has keyframes only, so its last entry may be long before the end.
    reach = (index[len(index) - 1].timestamp - index[0].timestamp) * float(stream.time_base or 1)
    if len(index) > 1 and reach < duration / 2 and "matroska" not in container.format.name:
        return None
    return sum(entry.is_keyframe for entry in index)


def _read_rotation(file: BinaryIO, track: int) -> int:
    """Return the rotation in the display matrix of an mp4's track [degrees]. PyAV has it only for decoded frames."""
    header = b""
    for box, box_start, box_end in _boxes(file, 0, file.seek(0, io.SEEK_END)):
        for child, start, end in _boxes(file, box_start, box_end) if box == b"moov" else ():
            for name, position, _ in _boxes(file, start, end) if child == b"trak" else ():
                if name == b"tkhd":
                    file.seek(position)
                    header = file.read(92)
                    has_long_times = header[:1] == b"\1"  # version 1: times of 8 bytes
                    number, matrix = (20, 52) if has_long_times else (12, 40)
                    if len(header) >= matrix + 16 and struct.unpack_from(">I", header, number)[0] == track:
                        a, b, _, c, d = struct.unpack_from(">5i", header + bytes(4), matrix)
                        angle = math.atan2(b * math.hypot(a, c), a * math.hypot(b, d))
                        return -round(math.degrees(angle))
    return 0


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield name and content [start, end) of each mp4 box between two offsets; stop at a malformed box."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name, header_size = int.from_bytes(head[:4]), head[4:8], 8
        if size == 1:
            size, header_size = int.from_bytes(head[8:16]), 16
        elif size == 0:
            size = end - start
        if size < header_size:
            return
        yield name, start + header_size, min(start + size, end)
        start += size
