"""Open a file with one named demuxer, and check its video stream before anything is decoded."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import av
import av.stream
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from crosslmm.config import DataConfig
from crosslmm.data.video import mp4

DISCARD: Any = getattr(av.stream, "Discard", None)
"""What can be done with the packets of a stream. PyAV 15, which lmms-eval needs, lacks it and reads the packets of all
streams: slower, but right."""

CODECS = (
    "h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "msmpeg4v2", "msmpeg4v3", "h263", "mjpeg",
    "prores", "dnxhd", "dvvideo", "flv1", "vp6f", "wmv1", "wmv2", "wmv3", "vc1", "theora", "gif", "apng",
)  # fmt: skip
"""Codecs of videos that are decoded, by libav's names: what cameras, phones and the web make or made. libav has some
250 more, most of them old formats of games: hardly tested, and a hostile file could choose one."""
OTHER_NAMES = ("libdav1d", "flv", "msmpeg4")
"""Names of decoders that differ from those of their codecs: av1, flv1, msmpeg4v3."""
MAX_ANIMATION_PIXELS = 2**33
"""Most pixels of all frames of a GIF, APNG or WebP together: each frame is drawn in full, however few bytes it has."""


class UnreadableVideo(Exception):
    """A video that cannot be decoded; the message is the reason."""


class NoFrames(UnreadableVideo):
    """A file without frames that can be decoded."""

    def __init__(self) -> None:
        super().__init__("the file has no frames that can be decoded")


def open_container(
    file: BinaryIO, format_name: str, data: DataConfig, codecs: Sequence[str] = CODECS
) -> InputContainer:
    """Open a file as this libav format and no other; libav is kept from following playlists and opening other URLs.

    libav decodes some frames to learn about the streams: only of these codecs, and with the same limits as later ones.

    Raises:
        UnreadableVideo: the header is compressed.
        av.FFmpegError, OSError: from libav and the file.
    """
    if format_name == "mov" and mp4.has_compressed_header(file):
        raise UnreadableVideo("its header is compressed (cmov); copy it into a new file")
    file.seek(0)
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": format_name,
        "codec_whitelist": ",".join((*codecs, *OTHER_NAMES)),
        "max_pixels": str(data.max_frame_pixels),
    }
    return av.open(file, "r", format=format_name, options=options, metadata_errors="replace")


def select_video_stream(container: InputContainer, data: DataConfig, number: int = 0) -> VideoStream | None:
    """Return video stream `number`, cover pictures not counted, and discard the packets of all other streams. None if
    there are fewer.

    Raises:
        UnreadableVideo: there is no video stream, its codec is not decoded, or its frames are too large.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    streams.sort(key=lambda stream: stream.frames == 1)  # an animation may come after its first frame
    if not streams:
        raise UnreadableVideo("the file has no video stream")
    if number >= len(streams):
        return None
    selected = streams[number]
    require_codec(selected)
    require_size(selected.codec_context.width, selected.codec_context.height, data)
    for stream in container.streams if DISCARD else ():
        stream.discard = DISCARD.default if stream is selected else DISCARD.all
    context = selected.codec_context
    context.thread_count = 1
    context.options = {"max_pixels": str(data.max_frame_pixels)}  # frames may become larger within the stream
    return selected


def require_codec(stream: VideoStream) -> None:
    """Check the codec of a video stream.

    Raises:
        UnreadableVideo: it is not in `CODECS`.
    """
    if stream.codec_context is None:
        raise UnreadableVideo("no decoder knows its codec")
    if (codec := stream.codec_context.codec.canonical_name) not in CODECS:
        raise UnreadableVideo(f"its codec is {codec}, and only {', '.join(CODECS)} are decoded; encode it again")


def require_size(width: int, height: int, data: DataConfig, known: bool = False) -> None:
    """Check the size of a frame [px].

    Args:
        width, height: zero if unknown, as after libav has met a frame that is too large.
        data: the limit.
        known: refuse an unknown size, too.

    Raises:
        UnreadableVideo: it exceeds `data.max_frame_pixels`, or is unknown.
    """
    if known and not width * height:
        raise UnreadableVideo(
            f"its frames have no size, or more than the {data.max_frame_pixels} pixels of data.max_frame_pixels"
        )
    if width * height > data.max_frame_pixels:
        raise UnreadableVideo(
            f"its frames are {width} x {height}, and data.max_frame_pixels is {data.max_frame_pixels}"
        )


def require_animation_size(width: int, height: int, frames: int) -> None:
    """Check what drawing all frames of an animation costs.

    Raises:
        UnreadableVideo: it exceeds `MAX_ANIMATION_PIXELS`.
    """
    if width * height * frames > MAX_ANIMATION_PIXELS:
        raise UnreadableVideo(
            f"its {frames} frames of {width} x {height} are more than {MAX_ANIMATION_PIXELS} pixels; make it a video"
        )
