"""Decode or probe one video in this process: open it, check its type and limits, and turn errors into reasons."""

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import av
import numpy as np

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.video.backends import with_decord, with_torchcodec
from crosslmm.data.video.image import IMAGE_SIGNATURES, decode_image
from crosslmm.data.video.probe import Probe, probe, probe_image
from crosslmm.data.video.pyav import UnreadableVideo, with_pyav
from crosslmm.text import redacted

BACKENDS: dict[str, Any] = {
    "auto": with_pyav,  # measured by `python -m benchmarks.decoders`
    "pyav": with_pyav,
    "decord": with_decord,
    "torchcodec": with_torchcodec,
}
"""Decoding function of each value of `data.decoder`. The function's name is part of the key of feature caches."""
REMEDIES = {
    "decord": "pip install decord (wheels for x86_64; this project's images leave it out: --build-arg DECORD=yes)",
    "torchcodec": "pip install 'torchcodec>=0.13,<0.14', with the shared libraries of FFmpeg 4 to 8",
}
"""How to install the optional decoders."""

Stage = Literal["read", "check", "decode", "deadline", "crash", "process"]
"""Stage at which a row failed: getting a video's bytes; its type and limits; decoding; deadline; death of the decoder's
process; making the model's input of conversation and frames, or features of frames."""


@dataclass(frozen=True)
class VideoFailure:
    """Why a video could not be read. All text is printable ASCII, whatever the file contains."""

    reason: str
    """Reason, in one line."""
    stage: Stage
    """Stage at which it failed."""
    version: str | None = None
    """ETag of the object, if it has one."""
    attempts: int = 1
    """Number of attempts: two if the machine may have been the cause (deadline, killed process)."""


def decode_video(uri: str, data: DataConfig, image_size: int) -> np.ndarray | VideoFailure:
    """Decode the sampled frames of one video, or of the part that a suffix `#t=START,END` selects.

    Returns:
        uint8 (up to data.num_frames, image_size, image_size, 3), RGB; or why the file cannot be decoded.

    Raises:
        storage.Unavailable: the store cannot be used; says nothing about the file.
        PermissionError: access to the object, or to the whole store, is denied.
    """

    def decode(file: BinaryIO, format_name: str) -> np.ndarray:
        if format_name in IMAGE_SIGNATURES:
            return decode_image(file, format_name, data, image_size)
        return BACKENDS[data.decoder](file, format_name, data, image_size, *split_time_range(uri)[1:])

    return _read_video(uri, data, decode)


def probe_video(uri: str, data: DataConfig) -> Probe | VideoFailure:
    """Read the header of one video; raises the same as `decode_video`."""

    def read_header(file: BinaryIO, format_name: str) -> Probe:
        result = (probe_image if format_name in IMAGE_SIGNATURES else probe)(file, format_name, data)
        return replace(result, bytes=file.seek(0, os.SEEK_END), version=storage.version_of(file))

    return _read_video(uri, data, read_header)


def require_backend(decoder: str) -> None:
    """Import the library of a value of `data.decoder`; an installed one may still lack libraries it is linked with.

    Raises:
        BadConfig: the library cannot be imported; the message names the remedy.
    """
    if decoder in REMEDIES:
        try:
            importlib.import_module(decoder)
        except Exception as error:  # RuntimeError and OSError among them
            missing = isinstance(error, ModuleNotFoundError) and error.name == decoder
            problem = "is not installed" if missing else f"does not load here ({type(error).__name__})"
            raise BadConfig(f"data.decoder: {decoder} {problem}; {REMEDIES[decoder]}; or use auto") from error


def _read_video(uri: str, data: DataConfig, read: Callable[[BinaryIO, str], Any]) -> Any:
    """Open a video and return `read(file, format_name)`, or the `VideoFailure` that describes its error."""
    version = None
    try:
        with storage.open_read(_resolve_links(split_time_range(uri)[0], data.roots)) as file:
            version = storage.version_of(file)
            return read(file, _detect_format(file, data.max_video_bytes))
    except UnreadableVideo as error:
        return VideoFailure(str(error), "check", version)
    except MemoryError:
        reason = f"it takes more than the {data.decode_memory_gib:g} GiB of data.decode_memory_gib"
        return VideoFailure(reason, "decode", version)
    except av.FFmpegError as error:  # these derive from Python's own errors, PermissionError among them
        return VideoFailure(f"{type(error).__name__}: {error.strerror}", "decode", version)
    except (storage.Unavailable, PermissionError):
        raise
    except FileNotFoundError:
        return VideoFailure("no such file", "read", version)
    except storage.BadLocation as error:
        return VideoFailure(_printable(error), "read", version)
    except Exception as error:
        stage: Stage = "read" if isinstance(error, OSError) else "decode"
        return VideoFailure(f"{type(error).__name__}: {_printable(error)}", stage, version)


def _resolve_links(uri: str, roots: Sequence[str]) -> str:
    """Return a local file's path without symbolic links. Without roots, a person named the video, not a manifest.

    Raises:
        UnreadableVideo: a link leads out of the roots.
    """
    if not roots:
        return uri
    try:
        return storage.follow(uri, roots)
    except storage.LeadsOut:
        reason = "a link leads outside of the manifest's folder; add its target to --data.roots"
        raise UnreadableVideo(reason) from None


def _detect_format(file: BinaryIO, max_bytes: int) -> str:
    """Return libav's name of the file's container, from its first bytes.

    No decoder is left to guess: playlists and scripts could make it open other files and hosts.

    Raises:
        UnreadableVideo: the file is empty, too large, or has none of the supported formats.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(400)
    file.seek(0)
    if not head:
        raise UnreadableVideo("the file is empty")
    if size > max_bytes:
        raise UnreadableVideo(f"it has {size} bytes, and data.max_video_bytes is {max_bytes}")
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
        return "mov"
    if head[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[:1] == b"G" and head[188:189] == b"G":
        return "mpegts"
    for format_name, signature in IMAGE_SIGNATURES.items():
        if head.startswith(signature):
            return format_name
    raise UnreadableVideo(
        f"not an mp4, mov, mkv, webm, avi or ts file, nor a jpeg or png image: it begins with {head[:12]!r}"
    )


def _printable(error: Exception) -> str:
    # The message may quote the file's content: ascii() keeps it to one line without escape sequences.
    return ascii(redacted(str(error)))[1:-1][:200]
