"""The one door to files: local paths and `s3://` URIs alike, through fsspec and s3fs.

Credentials and the endpoint come from the environment or the machine's role (`AWS_*`), never from configuration.
"""

import errno
import io
import os
import posixpath
import secrets
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow.fs

SCHEMES = ("file", "s3")

# What a store answers, or its client says, when it cannot serve anybody.
OUT_OF_ORDER = {
    errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip


class BadLocation(ValueError):
    """A path or URI that this project does not read."""


class Unavailable(OSError):
    """The store itself cannot be used: out of reach, out of order, or without that bucket. No fault of one object."""


def scheme_of(uri: str) -> str:
    """`file` or `s3`.

    Raises:
        BadLocation: any other scheme, or a chain of them.
    """
    scheme = uri.split("://", 1)[0] if "://" in uri else "file"
    if scheme not in SCHEMES or "::" in uri:
        raise BadLocation(f"{uri!r}: only local paths, file:// and s3:// are read")
    return scheme


def absolute(uri: str) -> str:
    """Make a local path absolute; leave URIs as they are."""
    return str(Path(uri).absolute()) if "://" not in uri else uri


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, unless it is a URI or an absolute path itself."""
    return name if "://" in name or name.startswith("/") else posixpath.join(folder, name)


def parent(uri: str) -> str:
    """The folder that a path or URI lies in."""
    return posixpath.dirname(uri)


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme_of(uri)
    return fsspec.url_to_fs(uri)


def open_read(uri: str) -> BinaryIO:
    """A seekable file; of a remote object only the pieces that are asked for travel. Reads may raise like the opening.

    Raises:
        FileNotFoundError, PermissionError: of this object.
        Unavailable: of the whole store.
        BadLocation: neither a path nor an s3:// URI.
    """
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        return RangedFile(fs, path) if scheme_of(uri) == "s3" else fs.open(path, "rb")  # type: ignore[return-value]


def version_of(file: BinaryIO) -> str | None:
    """What changes when the object is replaced: its ETag; None for a local file."""
    return file.version if isinstance(file, RangedFile) else None


def version(uri: str) -> str | None:
    """What changes when the object is replaced, in one request: its ETag; a local file's size and time of change. None
    where there is no such object, or none that we may see.

    Raises:
        Unavailable: the whole store is.
    """
    try:
        with _told_apart(uri):
            fs, path = _filesystem(uri)
            if scheme_of(uri) == "s3":
                return str(fs.info(path, refresh=True).get("ETag", "")).strip('"') or None
            found = Path(path).stat()
            return f"{found.st_size}-{found.st_mtime_ns}"
    except (FileNotFoundError, PermissionError):
        return None


def will_read(file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> None:
    """Say which bytes [start, end) of an open file will be read, in this order, and no others in between."""
    if isinstance(file, RangedFile):
        file.will_read(ranges)


class RangedFile(io.RawIOBase):
    """A remote object, read in ranges.

    s3fs' own read-ahead of 50 MiB fetches 182 MB of a 188 MB video for 32 of its frames. Here an announced range is one
    request (large ones are cut), made while the one before it is in use; elsewhere the file reads ahead half as much as
    it was asked for in one go, so that a header costs few requests and a jump little waste.

    Attributes:
        size: of the object [bytes].
        version: its ETag. An object that is replaced while it is read is an error.
    """

    LEAST, MOST = 64 * 2**10, 8 * 2**20
    """Bounds of one request [bytes]; an announced range may be smaller."""
    PIECES = 4
    """Pieces kept: a demuxer jumps between the head, the index and the frames."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__()
        self._name = f"s3://{path}"
        self._file: Any = fs.open(path, "rb", cache_type="none")
        self.size = int(self._file.size)
        self.version = str(self._file.details.get("ETag", "")).strip('"') or None
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=self.PIECES)
        self._announced: list[tuple[int, int]] = []
        self._coming: tuple[tuple[int, int], Future[bytes]] | None = None
        # One thread makes all requests, so one file position is enough.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._position = self._run_start = 0

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce ranges [start, end), ascending; overlapping ones are joined."""
        joined: list[tuple[int, int]] = []
        for start, end in ranges:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, min(end, self.size)))
        self._announced = [
            (at, min(at + self.MOST, end)) for start, end in joined for at in range(start, end, self.MOST)
        ]
        if self._announced:  # a file without an index announces nothing
            self._ask(0)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is at hand, one byte at least before the end of the file."""
        if self._position >= self.size or not len(buffer):
            return 0
        start, data = self._piece()
        here = data[self._position - start :][: len(buffer)]
        buffer[: len(here)] = here
        self._position += len(here)
        return len(here)

    def _piece(self) -> tuple[int, bytes]:
        """The piece that holds the position, fetched if it is not at hand."""
        for start, data in self._pieces:
            if start <= self._position < start + len(data):
                return start, data
        number = bisect_right(self._announced, (self._position, self.size)) - 1
        if number >= 0 and self._position < self._announced[number][1]:
            span, future = self._ask(number)
            with _told_apart(self._name):
                piece = span[0], future.result()
            self._coming = None
            if number + 1 < len(self._announced):
                self._ask(number + 1)
        else:
            end = self._position + min(max((self._position - self._run_start) // 2, self.LEAST), self.MOST)
            later = (start for start, _ in self._announced if start > self._position)
            span = self._position, min(end, self.size, next(later, self.size))
            with _told_apart(self._name):
                piece = span[0], self._thread.submit(self._fetch, *span).result()
        if len(piece[1]) != span[1] - span[0]:
            raise Unavailable(f"{self._name}: {len(piece[1])} bytes came where {span[1] - span[0]} were asked for")
        self._pieces.append(piece)
        return piece

    def _ask(self, number: int) -> tuple[tuple[int, int], "Future[bytes]"]:
        """Have an announced range fetched, if it is not on its way."""
        if number < len(self._announced) and (self._coming is None or self._coming[0] != self._announced[number]):
            span = self._announced[number]
            self._coming = span, self._thread.submit(self._fetch, *span)
        assert self._coming is not None
        return self._coming

    def _fetch(self, start: int, end: int) -> bytes:
        self._file.seek(start)
        return self._file.read(end - start)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; a jump ends the reading ahead."""
        position = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset)
        if position != self._position:
            self._position = self._run_start = position
        return position

    def tell(self) -> int:
        """The position [bytes]."""
        return self._position

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Let go of what was read and of what is on its way."""
        if not self.closed:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._pieces.clear()
            self._coming = None
        super().close()


@contextmanager
def _told_apart(uri: str) -> Iterator[None]:
    """Errors of the store become `Unavailable`; those of one object pass."""
    try:
        yield
    except Exception as error:
        if isinstance(error, FileNotFoundError) and scheme_of(uri) == "s3":
            _require_bucket(uri)
        elif _is_of_the_store(error):
            raise Unavailable(f"{uri}: {type(error).__name__}: {error}") from error
        raise


def _is_of_the_store(error: Exception) -> bool:
    """Whether it says that nobody can be served; the S3 client has classes of its own for a store out of reach."""
    client = type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp")
    out_of_order = isinstance(error, OSError) and error.errno in OUT_OF_ORDER
    return client or out_of_order or isinstance(error, ConnectionError | TimeoutError)


def _require_bucket(uri: str) -> None:
    """A store says the same of a missing object and of an object in a missing bucket.

    Raises:
        Unavailable: the bucket is missing, or the store.
    """
    fs, path = _filesystem(uri)
    bucket = path.split("/", 1)[0]
    try:
        fs.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        raise Unavailable(f"{uri}: there is no bucket {bucket}") from None
    except PermissionError:
        pass  # it may exist and not be listed
    except Exception as error:
        raise Unavailable(f"{uri}: {type(error).__name__}: {error}") from error


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole object, or its bytes [start, end).

    Raises:
        OSError: of this object.
        Unavailable: of the whole store.
    """
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        # Another process may have written it since this one last looked, and s3fs would believe its listing.
        fs.invalidate_cache()
        return fs.cat_file(path, start=start, end=end)


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and the folders above it where there are such. It appears whole or not at all."""
    write_chunks(uri, [data])


def write_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """`write_bytes` of data that is made while it is written, and may be larger than memory."""
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        if scheme_of(uri) == "file":  # an object store has no folders, and would make a bucket of a typing error
            fs.makedirs(posixpath.dirname(path), exist_ok=True)
            # An object store shows nothing until all is there; a local file is put in its place when it is whole.
            begun = Path(f"{path}.{secrets.token_hex(4)}.part")
            try:
                with begun.open("wb") as file:
                    file.writelines(chunks)
                begun.replace(path)
            finally:
                begun.unlink(missing_ok=True)
        elif isinstance(chunks, list) and len(chunks) == 1:
            fs.pipe_file(path, chunks[0])
        else:
            file = fs.open(path, "wb")
            try:
                file.writelines(chunks)
            except BaseException:
                file.discard()
                file.closed = True  # its closing would keep what is there
                raise
            file.close()


def remove(uris: Sequence[str]) -> None:
    """Remove objects, one after the other."""
    for uri in uris:
        fs, path = _filesystem(uri)
        fs.rm_file(path)


def stamp_of(uri: str) -> tuple[int, str]:
    """Size [bytes], and what changes when the object does: its ETag, or a local file's time of change.

    Raises:
        OSError: there is none, or no way to it.
        Unavailable: of the whole store.
    """
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        info = fs.info(path)
        return int(info["size"]), str(info.get("ETag") or info.get("mtime")).strip('"')


def is_empty(folder: str) -> bool:
    """Whether nothing is in it, or there is no such folder."""
    with _told_apart(folder):
        fs, path = _filesystem(folder)
        fs.invalidate_cache()
        return not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False))


def exists(uri: str) -> bool:
    """Whether there is such an object now."""
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        # Another process may have written it since this one last looked.
        fs.invalidate_cache()
        return fs.exists(path)


def is_folder(uri: str) -> bool:
    """Whether there are objects in it."""
    with _told_apart(uri):
        fs, path = _filesystem(uri)
        fs.invalidate_cache()
        return fs.isdir(path)


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder and the folders below it, relative to it."""
    with _told_apart(folder):
        fs, path = _filesystem(folder)
        fs.invalidate_cache()
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in fs.find(path))


def folders_in(folder: str) -> list[str]:
    """Names of the folders in a folder; none where there is no such folder."""
    with _told_apart(folder):
        fs, path = _filesystem(folder)
        fs.invalidate_cache()
        if not fs.isdir(path):
            return []
        return sorted(Path(item["name"]).name for item in fs.ls(path, detail=True) if item["type"] == "directory")


def download(uri: str, folder: str) -> None:
    """Copy a folder's files to a local folder."""
    fs, path = _filesystem(uri)
    fs.get(f"{path}/", f"{folder}/", recursive=True)


def upload(folder: str, uri: str) -> None:
    """Copy a local folder's files to a folder."""
    fs, path = _filesystem(uri)
    if scheme_of(uri) == "file":
        fs.makedirs(path, exist_ok=True)
    fs.put(f"{folder}/", f"{path}/", recursive=True)


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem and path that Ray Train keeps checkpoints in."""
    if scheme_of(uri) == "file":
        return pyarrow.fs.LocalFileSystem(), absolute(uri).removeprefix("file://")
    # pyarrow's own constructor does not read AWS_ENDPOINT_URL, and its defaults give up after 3 tries.
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=8),
    )
    return filesystem, uri.removeprefix("s3://")
