"""Decode or probe one video in this process: open it, check its type and limits, and turn errors into reasons."""

import hashlib
import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

import av
import numpy as np

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.frame_sampling import FrameSampling, SampledFrames, describe_shortfall, split_time_range
from crosslmm.data.video.backends import with_decord, with_torchcodec
from crosslmm.data.video.container import UnreadableVideo
from crosslmm.data.video.detect import describe_missing_end, detect_format, require_unencrypted
from crosslmm.data.video.frame_list import BadFrameList, is_frame_list, parse_frame_list
from crosslmm.data.video.image import PICTURES, decode_picture
from crosslmm.data.video.probe import Probe, probe, probe_picture
from crosslmm.data.video.pyav import with_pyav
from crosslmm.data.video.timeline import choose_frames, require_duration
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

CONCURRENT_FRAMES = 4
"""Frame files of a list that are read at the same time; each may take as much memory as a video's frame."""

Stage = Literal["read", "check", "decode", "deadline", "crash", "process"]
"""Stage at which a row failed. read: getting a video's bytes. check: its type and limits. decode, deadline: decoding,
or the time for it. crash: death of the decoder. process: making the model's input, or features."""


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


def decode_video(uri: str, data: DataConfig, image_size: int) -> SampledFrames | VideoFailure:
    """Decode the sampled frames of one video, or of the part that a suffix `#t=START,END` selects.

    Returns:
        Up to data.num_frames frames; or why the video cannot be decoded.

    Raises:
        storage.Unavailable: the store cannot be used; says nothing about the file.
        PermissionError: access to the object, or to the whole store, is denied.
    """
    address, start, end = split_time_range(uri)
    if is_frame_list(address):
        return _decode_frame_list(address, start, end, data, image_size)

    def decode(file: BinaryIO, format_name: str) -> SampledFrames:
        if format_name in PICTURES:
            frames = decode_picture(file, format_name, data, image_size, start, end)
            return replace(frames, is_picture=len(frames) == 1)
        require_unencrypted(file, format_name)
        missing = describe_missing_end(file, format_name)
        frames = BACKENDS[data.decoder](file, format_name, data, image_size, start, end)
        return frames.with_shortfall(missing) if missing else frames

    return _read_file(address, data, decode)


def probe_video(uri: str, data: DataConfig) -> Probe | VideoFailure:
    """Read the header of one video, or that of a list's first frame; raises the same as `decode_video`."""

    def read_header(file: BinaryIO, format_name: str) -> Probe:
        if format_name not in PICTURES:
            require_unencrypted(file, format_name)
        result = (probe_picture if format_name in PICTURES else probe)(file, format_name, data)
        return replace(result, bytes=file.seek(0, os.SEEK_END), version=storage.version_of(file))

    address = split_time_range(uri)[0]
    if not is_frame_list(address):
        return _read_file(address, data, read_header)
    try:
        frames = parse_frame_list(address)
        require_duration(frames.duration, data)
        first = _read_file(frames.frames[0], data, read_header)
    except Exception as error:
        return _to_failure(error, data)
    return replace(first, seconds=frames.duration, frames=len(frames.frames)) if isinstance(first, Probe) else first


def video_version(uri: str, sampling: FrameSampling) -> str | None:
    """Return a string that changes when the file of a video is replaced, or a frame that is sampled from a list. None
    if there is no such file, or it may not be read. Makes one request a file.

    Raises:
        storage.Unavailable: the store is unreachable or failing.
    """
    address, start, end = split_time_range(uri)
    if not is_frame_list(address):
        return storage.version(address)
    try:
        listed = parse_frame_list(address)
        _, chosen = choose_frames(listed.starts, listed.duration, sampling, start, end)
    except (BadFrameList, UnreadableVideo):
        return None
    versions = [storage.version(listed.frames[number]) for number in chosen.tolist()]
    return None if None in versions else hashlib.sha256("\n".join(map(str, versions)).encode()).hexdigest()


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


def _decode_frame_list(
    address: str, start: float, end: float | None, data: DataConfig, image_size: int
) -> SampledFrames | VideoFailure:
    """Decode the sampled frames of a list of frame files, and open no others; see `decode_video`.

    A file that cannot be read loses only its own frame; the video is unreadable only if all files are.
    """
    one = data.model_copy(update={"num_frames": 1, "sampling": "fps"})  # of an animation, too

    def decode(file: BinaryIO, format_name: str) -> SampledFrames:
        if format_name not in PICTURES:
            raise UnreadableVideo("the frames of a list are images, and this is none")
        return decode_picture(file, format_name, one, image_size)

    try:
        listed = parse_frame_list(address)
        require_duration(listed.duration, data)
        moments, chosen = choose_frames(listed.starts, listed.duration, FrameSampling.of(data), start, end)
        with ThreadPoolExecutor(CONCURRENT_FRAMES) as threads:
            read = storage.keep_policy(lambda number: _read_file(listed.frames[number], data, decode))
            results = list(threads.map(read, chosen.tolist()))
    except Exception as error:
        return _to_failure(error, data)
    failed = [
        (number, result) for number, result in zip(chosen, results, strict=True) if isinstance(result, VideoFailure)
    ]
    if len(failed) == len(results):
        number, failure = failed[0]
        return replace(failure, reason=f"{_printable(listed.frames[number])}: {failure.reason}")
    readable = np.array([not isinstance(result, VideoFailure) for result in results])
    shown = chosen[readable]
    shortfall = describe_shortfall(moments, listed.starts[shown], listed.ends[shown])
    if shortfall and failed:
        number, failure = failed[0]
        shortfall += f"; {_printable(listed.frames[number])}: {failure.reason}"
    images = np.concatenate([result.images for result in results if not isinstance(result, VideoFailure)])
    return SampledFrames(images, listed.starts[shown], shortfall)


def _read_file(uri: str, data: DataConfig, read: Callable[[BinaryIO, str], Any]) -> Any:
    """Open a file and return `read(file, format_name)`, or the `VideoFailure` that describes its error."""
    version = None
    try:
        with storage.open_read(_resolve_links(uri, data.roots)) as file:
            version = storage.version_of(file)
            return read(file, detect_format(file, data.max_video_bytes))
    except Exception as error:
        return _to_failure(error, data, version)


def _to_failure(error: Exception, data: DataConfig, version: str | None = None) -> VideoFailure:
    """Return what an error says about a video; raise those again that say nothing about it."""
    match error:
        case UnreadableVideo():
            return VideoFailure(str(error), "check", version)
        case BadFrameList():
            return VideoFailure(_printable(error), "check", version)
        case MemoryError():
            reason = f"it takes more than the {data.decode_memory_gib:g} GiB of data.decode_memory_gib"
            return VideoFailure(reason, "decode", version)
        case av.FFmpegError():  # these derive from Python's own errors, PermissionError among them
            return VideoFailure(f"{type(error).__name__}: {error.strerror}", "decode", version)
        case storage.Unavailable() | PermissionError():
            raise error
        case FileNotFoundError():
            return VideoFailure("no such file", "read", version)
        case storage.BadLocation():
            return VideoFailure(_printable(error), "read", version)
    stage: Stage = "read" if isinstance(error, OSError) else "decode"
    return VideoFailure(f"{type(error).__name__}: {_printable(error)}", stage, version)


def _resolve_links(uri: str, roots: Sequence[str]) -> str:
    """Return a local file's path without symbolic links; without roots, as it is: a person named it, not a manifest.

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


def _printable(text: object) -> str:
    # The text may quote the file's content: ascii() keeps it to one line without escape sequences.
    return ascii(redacted(str(text)))[1:-1][:300]
