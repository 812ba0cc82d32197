"""Images and animations: JPEG, PNG, GIF, WebP, AVIF and HEIC. Their size is known before anything is decoded."""

import contextlib
import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, SampledFrames, describe_shortfall
from crosslmm.data.video import mp4
from crosslmm.data.video.container import (
    NoFrames,
    UnreadableVideo,
    open_container,
    require_animation_size,
    require_size,
)
from crosslmm.data.video.pyav import ANIMATIONS, to_image, with_pyav
from crosslmm.data.video.timeline import choose_frames, require_duration

IMAGE_CODECS = {"jpeg_pipe": "mjpeg", "png_pipe": "png"}
"""libav's name of the codec of each format of still images."""
PICTURES = (*IMAGE_CODECS, *ANIMATIONS, "webp", "heif")
"""Formats of images and animations, which the same code reads whatever `data.decoder` is."""
NO_DURATION_MS = 100
"""How long a frame of an animation is shown that states no duration, in browsers as here [ms]."""


def decode_picture(
    file: BinaryIO, format_name: str, data: DataConfig, image_size: int, start: float = 0.0, end: float | None = None
) -> SampledFrames:
    """Decode an image, or the sampled frames of an animation. Args, result and errors are those of `with_pyav`."""
    if format_name == "webp":
        return _decode_webp(file, data, image_size, start, end)
    if format_name == "heif":
        require_whole(file)
        return with_pyav(file, "mov", data, image_size, start, end)
    require_size(*stored_size(file, format_name), data)
    content = file if format_name in ("jpeg_pipe", "gif") else _without_compressed_metadata(file)
    if format_name in IMAGE_CODECS:
        return _decode_still(content, format_name, data, image_size)
    return with_pyav(content, format_name, data, image_size, start, end)


def require_whole(file: BinaryIO) -> None:
    """Raise UnreadableVideo if a HEIF image is stored in pieces."""
    if mp4.is_in_tiles(file):
        raise UnreadableVideo("its picture is stored in tiles, as in photos of an iPhone; convert it to JPEG")


def _decode_still(file: BinaryIO, format_name: str, data: DataConfig, image_size: int) -> SampledFrames:
    """Decode a JPEG or PNG, the first picture if the file has several (a stereo photo)."""
    with open_container(file, format_name, data, [IMAGE_CODECS[format_name]]) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(data.max_frame_pixels)}
        frame = next(container.decode(stream), None)
        if frame is None or frame.is_corrupt:
            raise NoFrames
        return SampledFrames(np.ascontiguousarray(to_image(frame, VideoReformatter(), image_size)[None]), np.zeros(1))


def _decode_webp(file: BinaryIO, data: DataConfig, image_size: int, start: float, end: float | None) -> SampledFrames:
    """Decode a WebP with Pillow: libav decodes no animated ones."""
    header = read_webp_header(file, data)
    moments, chosen = np.zeros(1), np.zeros(1, np.int64)
    if header.frames > 1:
        moments, chosen = choose_frames(header.starts, header.duration, FrameSampling.of(data), start, end)
    resize = VideoReformatter()
    images: list[np.ndarray] = []
    file.seek(0)
    # A damaged frame ends the loop and keeps the frames before it; without any, NoFrames is raised below.
    with contextlib.suppress(OSError, EOFError, SyntaxError), Image.open(file, formats=["WEBP"]) as image:
        for number in chosen.tolist():
            image.seek(number)
            frame = av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")
            images.append(np.ascontiguousarray(to_image(frame, resize, image_size)))
    if not images:
        raise NoFrames
    shown = chosen[: len(images)]
    ends = np.append(header.starts[1:], header.duration)
    shortfall = describe_shortfall(moments, header.starts[shown], ends[shown]) if header.frames > 1 else None
    return SampledFrames(np.stack(images), header.starts[shown], shortfall)


@dataclass(frozen=True)
class WebpHeader:
    """Size and times of a WebP image or animation."""

    width: int
    height: int
    starts: np.ndarray
    """When each frame appears, float64 (frames,) [s]."""
    duration: float
    """Of all frames; 0 for an image [s]."""

    @property
    def frames(self) -> int:
        """Number of frames; 1 for an image."""
        return len(self.starts)


def read_webp_header(file: BinaryIO, data: DataConfig) -> WebpHeader:
    """Read the size of a WebP, and the times of its frames.

    Raises:
        UnreadableVideo: there is no picture, or it is too large or too long.
    """
    width, height, milliseconds, pictures = 0, 0, [], 0
    for name, start, size in _webp_chunks(file):
        pictures += name in (b"VP8 ", b"VP8L", b"ANMF")
        file.seek(start)
        head = file.read(16)
        if name == b"ANMF" and size >= 16:
            milliseconds.append(int.from_bytes(head[12:15], "little") or NO_DURATION_MS)
            require_animation_size(width, height, len(milliseconds))
        elif width:
            continue
        elif name == b"VP8X" and len(head) >= 10:
            width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (4, 7))
        elif name == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
            width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", head, 6))
        elif name == b"VP8L" and head[:1] == b"\x2f":
            bits = int.from_bytes(head[1:5], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    require_size(width, height, data)
    if not pictures:
        raise NoFrames
    require_size(width, height, data, known=True)
    ends = np.cumsum(milliseconds or [0]) / 1000
    duration = float(ends[-1]) if len(ends) > 1 else 0.0
    require_duration(duration, data)
    return WebpHeader(width, height, np.append(0.0, ends[:-1]), duration)


def _webp_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, start and size of the content of each chunk of a WebP."""
    end = file.seek(0, io.SEEK_END)
    at = 12
    while at + 8 <= end:
        file.seek(at)
        name, size = struct.unpack("<4sI", file.read(8))
        yield name, at + 8, size
        at += 8 + size + size % 2


def stored_size(file: BinaryIO, format_name: str) -> tuple[int, int]:
    """Return width and height that the header of a JPEG, PNG or GIF states, before rotation [px].

    Raises:
        UnreadableVideo: there is no such header.
    """
    width, height = {"jpeg_pipe": _jpeg_size, "gif": _gif_size}.get(format_name, _png_size)(file)
    if not width * height:
        raise NoFrames
    return width, height


def _without_compressed_metadata(file: BinaryIO) -> BinaryIO:
    """Return a PNG without comments and colour profile: libav unpacks them, whatever their size, to no use here."""
    file.seek(0)
    data = file.read()
    pieces, at = [data[:8]], 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name not in (b"zTXt", b"iTXt", b"iCCP"):
            pieces.append(data[at : at + 12 + length])
        at += 12 + length
    return io.BytesIO(b"".join(pieces))


def _png_size(file: BinaryIO) -> tuple[int, int]:
    file.seek(0)
    head = file.read(24)
    return struct.unpack(">II", head[16:24]) if head[12:16] == b"IHDR" and len(head) == 24 else (0, 0)


def _gif_size(file: BinaryIO) -> tuple[int, int]:
    file.seek(6)
    head = file.read(4)
    return struct.unpack("<HH", head) if len(head) == 4 else (0, 0)


def _jpeg_size(file: BinaryIO) -> tuple[int, int]:
    """Follow a JPEG's segments to the frame header (SOF), which comes before the first scan."""
    file.seek(2)
    while len(head := file.read(9)) >= 4 and head[0] == 0xFF:
        marker, length = head[1], int.from_bytes(head[2:4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # not DHT, JPG, DAC
            height, width = struct.unpack(">HH", head[5:9]) if len(head) == 9 else (0, 0)
            return width, height
        # Any number of 0xFF may come before a marker.
        file.seek(1 - len(head) if marker == 0xFF else 2 + length - len(head), 1)
    return 0, 0
