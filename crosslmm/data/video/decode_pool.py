"""Read videos in child processes that can be killed: decoders are old native code that parses untrusted files."""

import functools
import os
import resource
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as DeadlineExceeded
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import pebble
import psutil

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video.children import context, end_with_owner
from crosslmm.data.video.decode import VideoFailure, decode_video, probe_video
from crosslmm.data.video.frame_list import describe_video, first_file
from crosslmm.data.video.probe import Probe

MAX_TASKS_PER_CHILD = 1000
"""Videos after which a child process is replaced, because its libraries leak memory [videos]."""
HEADER_CHILDREN = 4
"""Child processes of a `HeaderReader`."""
STORE_CHECK_TIMEOUT_S = 30.0
"""Default of `store_timeout_s` [s]."""


class VideoPool:
    """Child processes that read videos, each video with a deadline and a memory limit. Thread-safe.

    A child that hangs or crashes in native code is killed and replaced; other videos are not affected. Use the pool as
    a context manager, or leave it running until the process ends.

    Args:
        data: deadline and limits, the memory of one child among them.
        read: reads one video in a child.
        children: number of child processes.
        store_timeout_s: after a video's deadline, time in which the store must answer to show that it was not the cause
            [s].
    """

    def __init__(
        self,
        data: DataConfig,
        read: Callable[[str], Any],
        children: int = 1,
        store_timeout_s: float = STORE_CHECK_TIMEOUT_S,
    ) -> None:
        self.data = data
        self._store_timeout_s = store_timeout_s
        self._read = read
        self._children = children
        self._readable_uri: dict[str, str] = {}  # for each bucket, a URI that could be read
        self._restart = threading.Lock()
        self._pool = self._start()

    def _start(self) -> pebble.ProcessPool:
        return pebble.ProcessPool(
            max_workers=self._children,
            max_tasks=MAX_TASKS_PER_CHILD,
            context=context(),
            initializer=_initialise_child,
            initargs=(int(self.data.decode_memory_gib * 2**30), dict(os.environ)),
        )

    def __call__(self, uris: Sequence[str]) -> list[Any]:
        """Read videos; return the result or the `VideoFailure` of each, in order.

        Raises:
            storage.Unavailable: the store cannot be used and did not recover in time; says nothing about the videos.
        """
        futures = [self._schedule(self._read, uri) for uri in uris]
        return [self._result(uri, future) for uri, future in zip(uris, futures, strict=True)]

    def _schedule(self, function: Any, uri: str, timeout_s: float | None = None) -> pebble.ProcessFuture:
        with self._restart:
            if not self._pool.active:
                # If the kernel's OOM killer kills a child between two calls, the whole pool stops.
                self._pool = self._start()
        return self._pool.schedule(
            _call_without_retries, (function, uri), timeout=timeout_s or self.data.decode_timeout_s
        )

    def _result(self, uri: str, future: pebble.ProcessFuture) -> Any:
        """Wait for a video, and retry it once if the machine may have been the cause of its failure."""
        scheduled = [future]

        def attempt() -> Any:
            result = self._attempt(uri, scheduled.pop() if scheduled else self._schedule(self._read, uri))
            if isinstance(result, VideoFailure) and result.stage in ("deadline", "crash"):
                result = self._attempt(uri, self._schedule(self._read, uri))
                result = replace(result, attempts=2) if isinstance(result, VideoFailure) else result
            return result

        # BrokenProcessPool: an idle child died.
        return storage.with_retries(attempt, retry_on=(storage.Unavailable, BrokenProcessPool))

    def _attempt(self, uri: str, future: pebble.ProcessFuture) -> Any:
        try:
            result = future.result()
        except DeadlineExceeded:
            self._require_store_answers(uri)
            return VideoFailure(
                f"it took over {self.data.decode_timeout_s:g} s (data.decode_timeout_s) to read", "deadline"
            )
        except pebble.ProcessExpired as error:
            return VideoFailure(f"the decoder died (exit code {error.exitcode})", "crash")
        except MemoryError:
            reason = f"it takes more than the {self.data.decode_memory_gib:g} GiB of data.decode_memory_gib"
            return VideoFailure(reason, "decode")
        except PermissionError:
            self._require_store_access(uri)
            return VideoFailure("permission denied", "read")
        if not isinstance(result, VideoFailure):
            self._readable_uri[_bucket_of(uri)] = uri
        return result

    def _require_store_answers(self, uri: str) -> None:
        """Raise `storage.Unavailable` if the store may have used up the video's time."""
        if _bucket_of(uri):
            try:
                self._schedule(_read_first_byte, uri, self._store_timeout_s).result()
            except DeadlineExceeded:
                raise self._no_answer(uri) from None
            except (PermissionError, FileNotFoundError, pebble.ProcessExpired):
                pass

    def _require_store_access(self, uri: str) -> None:
        """Raise `storage.Unavailable` if the whole store denies access; S3 also denies access to a missing object."""
        if _bucket_of(uri):
            readable = self._readable_uri.get(_bucket_of(uri))
            try:
                if readable is None:
                    raise PermissionError
                self._schedule(_read_first_byte, readable, self._store_timeout_s).result()
            except DeadlineExceeded:
                raise self._no_answer(uri) from None
            except PermissionError:
                name, bucket = describe_video(uri), _bucket_of(uri)
                raise storage.Refused(
                    f"{name}: permission denied, as for all of {bucket}; check the credentials (AWS_*)"
                ) from None
            except (FileNotFoundError, pebble.ProcessExpired):
                pass  # the readable one was removed

    def _no_answer(self, uri: str) -> storage.Unavailable:
        name = describe_video(uri)
        return storage.Unavailable(f"{name}: the store did not answer in {self._store_timeout_s:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()


class Decoder(VideoPool):
    """Decodes videos in one child process.

    Args:
        data: frame sampling, decoder, deadline, limits.
        image_size: side of the square that frames are resized to [px]. The aspect ratio is not kept, as in SigLIP.
        store_timeout_s: as for `VideoPool` [s].
    """

    def __init__(self, data: DataConfig, image_size: int, store_timeout_s: float = STORE_CHECK_TIMEOUT_S) -> None:
        read = functools.partial(decode_video, data=data, image_size=image_size)
        super().__init__(data, read, store_timeout_s=store_timeout_s)

    def __call__(self, uris: Sequence[str]) -> list[SampledFrames | VideoFailure]:
        """Decode videos; return the frames or the failure of each, in order.

        Raises:
            storage.Unavailable: the store cannot be used and did not recover in time; says nothing about the videos.
        """
        return super().__call__(uris)


class HeaderReader(VideoPool):
    """Reads the headers of videos in four child processes, which mostly wait for the store.

    Args:
        data: deadline, limits; the children share `data.decode_memory_gib`.
    """

    def __init__(self, data: DataConfig) -> None:
        share = data.model_copy(update={"decode_memory_gib": data.decode_memory_gib / HEADER_CHILDREN})
        super().__init__(share, functools.partial(probe_video, data=share), HEADER_CHILDREN)

    def __call__(self, uris: Sequence[str]) -> list[Probe | VideoFailure]:
        """Probe whole videos (URIs without `#t=`); return the header or the failure of each, in order.

        Raises:
            storage.Unavailable: the store cannot be used and did not recover in time; says nothing about the videos.
        """
        return super().__call__(uris)


def _bucket_of(uri: str) -> str:
    """Return the bucket of a video in a store, that of the first frame of a list; empty for a local file."""
    name = first_file(uri)
    return name.removeprefix("s3://").split("/")[0] if name.startswith("s3://") else ""


def _read_first_byte(uri: str) -> None:
    with storage.open_read(first_file(uri)) as file:
        file.read(1)


def _call_without_retries(function: Callable[[str], Any], uri: str) -> Any:
    """Call a function in a child. The pool's owner retries while a store is unavailable: in the child, that would count
    towards the video's deadline."""
    with storage.retrying(storage.NO_RETRIES):
        return function(uri)


def _initialise_child(memory_bytes: int, environment: dict[str, str]) -> None:
    """Set up a child process.

    Args:
        memory_bytes: how much its address space may grow.
        environment: of the pool's owner; that of the fork server may be older and lack credentials.
    """
    end_with_owner()
    os.environ.update(environment)
    limit = psutil.Process().memory_info().vms + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # decord prints parts of the files that it reads.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        os.dup2(devnull, output)
