"""JPEG and PNG images, read as videos of one frame. Their size is known before anything is decoded."""

import io
import struct
from typing import BinaryIO

import numpy as np
from av.video.reformatter import VideoReformatter

from crosslmm.config import DataConfig
from crosslmm.data.video.pyav import UnreadableVideo, open_container, require_size, to_image

IMAGE_SIGNATURES = {"jpeg_pipe": b"\xff\xd8\xff", "png_pipe": b"\x89PNG\r\n\x1a\n"}
"""First bytes of each image format, by libav's name."""
IMAGE_CODECS = {"jpeg_pipe": "mjpeg", "png_pipe": "png"}
"""libav's name of each image format's codec."""
NO_FRAMES = "the file has no frames that can be decoded"


def decode_image(file: BinaryIO, format_name: str, data: DataConfig, image_size: int) -> np.ndarray:
    """Decode an image, the first one if the file has several (a stereo photo, an animation).

    Args and errors are those of `with_pyav`.

    Returns:
        uint8 (1, image_size, image_size, 3), RGB.
    """
    require_size(*stored_size(file, format_name), data)
    content = _without_compressed_metadata(file) if format_name == "png_pipe" else file
    with open_container(content, format_name, data, [IMAGE_CODECS[format_name]]) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(data.max_frame_pixels)}
        frame = next(container.decode(stream), None)
        if frame is None or frame.is_corrupt:
            raise UnreadableVideo(NO_FRAMES)
        return np.ascontiguousarray(to_image(frame, VideoReformatter(), image_size)[None])


def stored_size(file: BinaryIO, format_name: str) -> tuple[int, int]:
    """Return width and height that an image's header states, before rotation [px].

    Raises:
        UnreadableVideo: there is no such header.
    """
    width, height = _png_size(file) if format_name == "png_pipe" else _jpeg_size(file)
    if not width * height:
        raise UnreadableVideo(NO_FRAMES)
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
