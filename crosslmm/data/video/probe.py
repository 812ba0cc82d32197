"""Read the header of a video without decoding a frame."""

from dataclasses import dataclass, replace
from typing import BinaryIO

from av.container import InputContainer
from av.video.stream import VideoStream

from crosslmm.config import DataConfig
from crosslmm.data.video import mp4
from crosslmm.data.video.image import IMAGE_CODECS, stored_size
from crosslmm.data.video.pyav import (
    INDEXED_FORMATS,
    open_container,
    require_size,
    select_video_stream,
    video_duration,
)


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
    with open_container(file, format_name, data) as container:
        stream = select_video_stream(container, data)
        duration = video_duration(container, stream, data)
        context = stream.codec_context
        require_size(context.width, context.height, data, known=True)
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
    return replace(result, rotation=mp4.read_rotation(file, track)) if format_name == "mov" else result


def probe_image(file: BinaryIO, format_name: str, data: DataConfig) -> Probe:
    """Read the size of an image; arguments and errors are those of `with_pyav`."""
    width, height = stored_size(file, format_name)
    require_size(width, height, data)
    return Probe(0.0, 1, width, height, IMAGE_CODECS[format_name], rotation=0, keyframes=None)


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
