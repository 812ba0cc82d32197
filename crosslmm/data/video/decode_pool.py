"""URI -> frames, in a child process that can be killed: decoders are old native code fed with foreign bytes."""

import functools
import importlib
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as Overtime
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import av
import numpy as np
import pebble
import psutil

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.video.backends import with_decord, with_torchcodec
from crosslmm.data.video.probe import Probe, probe
from crosslmm.data.video.pyav import UnreadableVideo, with_pyav
from crosslmm.storage import retry

BACKENDS: dict[str, Any] = {
    "auto": with_pyav,  # by `python -m benchmarks.decoders`
    "pyav": with_pyav,
    "decord": with_decord,
    "torchcodec": with_torchcodec,
}
REMEDIES = {
    "decord": "its wheels are for x86_64 (pip install decord)",
    "torchcodec": "pip install 'torchcodec>=0.13,<0.14', beside the shared libraries of an FFmpeg from 4 to 8",
}

IMAGES = {"jpeg_pipe": b"\xff\xd8\xff", "png_pipe": b"\x89PNG\r\n\x1a\n"}
"""An image is a video of one frame."""

RECYCLE_AFTER = 1000
"""Videos after which a child is replaced, before what its libraries leak adds up."""
ANSWER_WITHIN_S = 30.0
"""After a deadline has passed, the store has so long to show that it was not the cause [s]."""

Stage = Literal["read", "check", "decode", "deadline", "crash"]


@dataclass(frozen=True)
class Unreadable:
    """A video that gave no frames, and why. All text is printable ASCII, whatever the file contains."""

    reason: str
    stage: Stage
    """Where it failed: getting its bytes; type and limits; decoding; time; the child's death."""
    version: str | None = None
    """The object's ETag, where it has one."""
    attempts: int = 1
    """How often it was tried: twice where the machine may have been the cause, by time or by killing."""


class _Children:
    """Child processes that read videos, each under a deadline and a limit of memory. Threads may share it.

    A child that spins or crashes in native code is killed and replaced; the other videos do not notice. Use as a
    context manager, or leave it to the end of the process.
    """

    def __init__(self, data: DataConfig, decode: Callable[[str], Any], children: int) -> None:
        self.data = data
        self._decode = decode
        self._children = children
        self._read_before: dict[str, str] = {}
        self._restart = threading.Lock()
        self._pool = self._start()

    def _start(self) -> pebble.ProcessPool:
        return pebble.ProcessPool(
            max_workers=self._children,
            max_tasks=RECYCLE_AFTER,
            context=_context(),
            initializer=_settle_in,
            initargs=(int(self.data.decode_memory_gib * 2**30), dict(os.environ)),
        )

    def __call__(self, uris: Sequence[str]) -> list[Any]:
        """Read videos, in order: what the child makes of each, or `Unreadable`.

        Raises:
            storage.Unavailable: the store cannot be used, and did not recover in time; no video's fault.
        """
        futures = [self._schedule(self._decode, uri) for uri in uris]
        return [self._result(uri, future) for uri, future in zip(uris, futures, strict=True)]

    def _schedule(self, function: Any, uri: str, timeout_s: float | None = None) -> pebble.ProcessFuture:
        with self._restart:
            if not self._pool.active:
                # A child that was killed between two calls, by the kernel for its memory, takes the pool with it.
                self._pool = self._start()
        return self._pool.schedule(function, (uri,), timeout=timeout_s or self.data.decode_timeout_s)

    def _result(self, uri: str, future: pebble.ProcessFuture) -> Any:
        under_way = [future]

        def once() -> Any:
            result = self._verdict(uri, under_way.pop() if under_way else self._schedule(self._decode, uri))
            if isinstance(result, Unreadable) and result.stage in ("deadline", "crash"):
                result = self._verdict(uri, self._schedule(self._decode, uri))
                result = replace(result, attempts=2) if isinstance(result, Unreadable) else result
            return result

        # Or a child died with nothing to do.
        return storage.patiently(once, despite=(storage.Unavailable, BrokenProcessPool))

    def _verdict(self, uri: str, future: pebble.ProcessFuture) -> Any:
        try:
            result = future.result()
        except Overtime:
            self._require_answer(uri)
            return Unreadable(f"decoding took over {self.data.decode_timeout_s:g} s and was killed", "deadline")
        except pebble.ProcessExpired as error:
            return Unreadable(f"the decoder died (exit code {error.exitcode})", "crash")
        except MemoryError:
            return Unreadable(f"it takes more than the {self.data.decode_memory_gib:g} GiB of memory it may", "decode")
        except PermissionError:
            self._require_open(uri)
            return Unreadable("permission denied", "read")
        if not isinstance(result, Unreadable):
            self._read_before[_bucket_of(uri)] = uri
        return result

    def _require_answer(self, uri: str) -> None:
        """Raise `storage.Unavailable` if it may have been the store that took all the time."""
        if _bucket_of(uri):
            try:
                self._schedule(_touch, uri, ANSWER_WITHIN_S).result()
            except Overtime:
                raise storage.Unavailable(f"{uri}: the store has not answered for {ANSWER_WITHIN_S:g} s") from None
            except (PermissionError, FileNotFoundError, pebble.ProcessExpired):
                pass

    def _require_open(self, uri: str) -> None:
        """Raise `storage.Unavailable` if the whole store refuses us: S3 says the same where one object is missing."""
        if _bucket_of(uri):
            before = self._read_before.get(_bucket_of(uri))
            try:
                if before is None:
                    raise PermissionError
                self._schedule(_touch, before, ANSWER_WITHIN_S).result()
            except Overtime:
                raise storage.Unavailable(f"{uri}: the store has not answered for {ANSWER_WITHIN_S:g} s") from None
            except PermissionError:
                raise storage.Refused(
                    f"{uri}: permission denied, as for all of {_bucket_of(uri)}; check the credentials (AWS_*)"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()


class Decoder(_Children):
    """Decodes videos in one child process.

    Args:
        data: frames, decoder, deadline, limits.
        image_size: side of the square that frames are resized to [px]. Aspect ratio is not kept, as in SigLIP.
    """

    def __init__(self, data: DataConfig, image_size: int) -> None:
        super().__init__(data, functools.partial(decode_video, data=data, image_size=image_size), children=1)

    def __call__(self, uris: Sequence[str]) -> list[np.ndarray | Unreadable]:
        """Decode videos, in order: uint8 (frames, image_size, image_size, 3) each, or why there is none.

        Raises:
            storage.Unavailable: the store cannot be used, and did not recover in time; no video's fault.
        """
        return super().__call__(uris)


class Prober(_Children):
    """Reads the headers of videos in four child processes, which wait for the store most of the time.

    Args:
        data: deadline, limits.
    """

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data, functools.partial(probe_video, data=data), children=4)

    def __call__(self, uris: Sequence[str]) -> list[Probe | Unreadable]:
        """Probe whole videos (no `#t=` behind their places), in order.

        Raises:
            storage.Unavailable: the store cannot be used, and did not recover in time; no video's fault.
        """
        return super().__call__(uris)


def decode_video(uri: str, data: DataConfig, image_size: int) -> np.ndarray | Unreadable:
    """Decode one video, or the part of it that `#t=START,END` behind its place names, in this process.

    Returns:
        uint8 (up to data.num_frames, image_size, image_size, 3), RGB; or whatever is wrong with the file, in one line.

    Raises:
        storage.Unavailable: the whole store is, so nothing can be said about the file.
        PermissionError: this object, or the whole store.
    """

    def decode(file: BinaryIO, form: str) -> np.ndarray:
        backend = "pyav" if form in IMAGES else data.decoder  # the others read no images
        return BACKENDS[backend](file, form, data, image_size, *split_time_range(uri)[1:])

    return _judged(uri, data, decode)


def probe_video(uri: str, data: DataConfig) -> Probe | Unreadable:
    """Read one video's header in this process; otherwise as `decode_video`."""

    def look(file: BinaryIO, form: str) -> Probe:
        found = probe(file, form, data)
        if form in IMAGES and not found.width * found.height:
            raise UnreadableVideo("the file has no frames that can be decoded")
        size = file.seek(0, os.SEEK_END)
        seconds, frames = (0.0, 1) if form in IMAGES else (found.seconds, found.frames)
        return replace(found, seconds=seconds, frames=frames, bytes=size, version=storage.version_of(file))

    return _judged(uri, data, look)


def _judged(uri: str, data: DataConfig, read: Callable[[BinaryIO, str], Any]) -> Any:
    """What `read` makes of an open video of a container, or what is wrong with it."""
    version = None
    try:
        with storage.open_read(_followed(split_time_range(uri)[0], data.roots)) as file:
            version = storage.version_of(file)
            return read(file, _container_of(file, data.max_video_bytes))
    except UnreadableVideo as error:
        return Unreadable(str(error), "check", version)
    except MemoryError:
        reason = f"it takes more than the {data.decode_memory_gib:g} GiB of data.decode_memory_gib"
        return Unreadable(reason, "decode", version)
    except av.FFmpegError as error:  # these derive from Python's own errors, PermissionError among them
        return Unreadable(f"{type(error).__name__}: {error.strerror}", "decode", version)
    except (storage.Unavailable, PermissionError):
        raise
    except FileNotFoundError:
        return Unreadable("no such file", "read", version)
    except storage.BadLocation as error:
        return Unreadable(_harmless(error), "read", version)
    except Exception as error:
        stage: Stage = "read" if isinstance(error, OSError) else "decode"
        return Unreadable(f"{type(error).__name__}: {_harmless(error)}", stage, version)


def _followed(place: str, roots: Sequence[str]) -> str:
    """What is opened for a place: a local file with its links followed, which may not lead out of the roots. Without
    roots somebody has named the video, not a manifest."""
    if not roots:
        return place
    if not storage.within(storage.real(place), map(storage.real, roots)):
        raise UnreadableVideo("a link leads outside of the manifest's folder; add where it leads to --data.roots")
    return storage.real(place)


def require_backend(decoder: str) -> None:
    """Load what `data.decoder` names: that it is installed does not say that it finds what it is linked with.

    Raises:
        BadConfig: it does not load here; what would help.
    """
    if decoder in REMEDIES:
        try:
            importlib.import_module(decoder)
        except Exception as error:  # RuntimeError and OSError among them
            why = f"{decoder} does not load here ({type(error).__name__})"
            raise BadConfig(f"data.decoder: {why}; {REMEDIES[decoder]}; or take auto") from error


def _harmless(error: Exception) -> str:
    # What a file contains may stand in the message: ascii() keeps it to one line without escape sequences.
    return ascii(str(error))[1:-1][:200]


def _container_of(file: BinaryIO, max_bytes: int) -> str:
    """The file's container by its first bytes, as libav names it.

    No decoder guesses: playlists and scripts could make it open other files and hosts.
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
    for form, magic in IMAGES.items():
        if head.startswith(magic):
            return form
    raise UnreadableVideo(
        f"not an mp4, mov, mkv, webm, avi or ts file, nor a jpeg or png image: it begins with {head[:12]!r}"
    )


def _bucket_of(uri: str) -> str:
    """Bucket of an s3:// URI; empty for a path."""
    return uri.removeprefix("s3://").split("/")[0] if uri.startswith("s3://") else ""


def _touch(uri: str) -> None:
    """Ask the store for the object's first bytes."""
    with storage.open_read(split_time_range(uri)[0]) as file:
        file.read(1)


def _context() -> BaseContext:
    """Children are forked from a clean process that has imported what they need: neither threads nor readers survive
    a fork from this one, and a replacement is there in milliseconds. fsspec would import s3fs in each of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "crosslmm.data.video.decode_pool", "s3fs"])
    return context


def _settle_in(memory_bytes: int, environment: dict[str, str]) -> None:
    """First thing a child does: take the environment (credentials) from its owner, since it was forked from a process
    with an older one; leave patience with the store to the owner, since here it would count as the video's time; bound
    its memory [bytes]; leave no core; say nothing, as decord prints what it reads."""
    os.environ.update(environment)
    retry.PATIENCE_S = 0
    limit = psutil.Process().memory_info().vms + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(nowhere, output)
