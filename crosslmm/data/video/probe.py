"""Read the properties of a video without decoding a frame: from its header, its index, or all its packets."""

from dataclasses import dataclass, replace
from typing import BinaryIO

from av.container import InputContainer
from av.video.stream import VideoStream

from crosslmm.config import DataConfig
from crosslmm.data.video import mp4
from crosslmm.data.video.container import open_container, require_animation_size, require_size
from crosslmm.data.video.image import IMAGE_CODECS, read_webp_header, require_whole, stored_size
from crosslmm.data.video.timeline import Timeline, has_index, index_of, open_stream


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
    """Read a video's header and index, and of its packets only what these do not state; damaged frames go unnoticed.

    A transport or program stream states no duration. It is estimated from the last time stamps, unless the estimate is
    plainly wrong: an exact duration takes all packets, as in decoding, and so a read of the whole file.

    Arguments and errors are those of `with_pyav`.
    """
    with open_container(file, format_name, data) as container:
        stream, timeline = open_stream(file, container, data, estimate=True)
        context = stream.codec_context
        require_size(context.width, context.height, data, known=True)
        frames, keyframes = _count_frames(container, stream, timeline)
        result = Probe(
            seconds=timeline.duration,
            frames=frames,
            width=context.width,
            height=context.height,
            codec=context.codec.canonical_name,
            rotation=0,
            keyframes=keyframes,
        )
        track = stream.id
    return replace(result, rotation=mp4.read_rotation(file, track)) if format_name == "mov" else result


def probe_picture(file: BinaryIO, format_name: str, data: DataConfig) -> Probe:
    """Read the size of an image, and the duration of an animation; arguments and errors are those of `with_pyav`."""
    if format_name == "webp":
        header = read_webp_header(file, data)
        return Probe(header.duration, header.frames, header.width, header.height, "webp", 0, None)
    if format_name == "heif":
        require_whole(file)
    else:
        width, height = stored_size(file, format_name)
        require_size(width, height, data)
        if format_name in IMAGE_CODECS:
            return Probe(0.0, 1, width, height, IMAGE_CODECS[format_name], rotation=0, keyframes=None)
    result = replace(probe(file, "mov" if format_name == "heif" else format_name, data), keyframes=None)
    require_animation_size(result.width, result.height, result.frames or 0)
    return replace(result, seconds=0.0) if result.frames == 1 else result


def _count_frames(container: InputContainer, stream: VideoStream, timeline: Timeline) -> tuple[int | None, int | None]:
    """Return the number of frames, and that of keyframes; None if it takes more packets to know them."""
    if timeline.keyframes is not None:
        return timeline.frames, len(timeline.keyframes)
    if timeline.in_pieces or not has_index(container, stream):
        return None, None
    shown = [entry.is_keyframe for entry in index_of(stream) if not entry.is_discard]
    return len(shown) if timeline.lists_frames else None, sum(shown)
