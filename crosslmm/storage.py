"""The one door to files: local paths and `s3://` URIs alike, through fsspec and s3fs.

Credentials and the endpoint come from the environment or the machine's role (`AWS_*`), never from configuration. What
is asked of a store that cannot serve just now is asked again, for some minutes; what asking again cannot mend is said
at once, in one line.
"""

import errno
import io
import itertools
import os
import posixpath
import secrets
import shutil
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import sleep as pause
from typing import Any, BinaryIO, TypeVar

import fsspec
import pyarrow.fs

SCHEMES = ("file", "s3")

WAITS_S = (1, 2, 4, 8, 15)
"""Pauses before an unavailable store is asked again, the last one again and again [s]."""
PATIENCE_S = 180.0
"""From the first failure until a store is given up [s]; 0 asks once."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
"""A store that has not let us in, or sent no further byte of an answer, for so long is unavailable [s]."""
WRITE_TIMEOUT_S = 120
"""So long may a store take to get one part of an object, for no client notices that none of it is being taken [s]."""
PART_BYTES = 32 * 2**20
"""Larger objects are written in parts of this size, of which an object has 10,000 at most [bytes]."""
PARTS_AT_ONCE = 4
FILES_AT_ONCE = 8

# What a file system or a store says when it cannot serve anybody just now.
OUT_OF_ORDER = {
    errno.EBUSY, errno.EREMOTEIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
}  # fmt: skip
FULL = {errno.ENOSPC, errno.EDQUOT}

Made = TypeVar("Made")


class BadLocation(ValueError):
    """A path or URI that this project does not read."""


class Unavailable(OSError):
    """The store itself cannot be used: out of reach or out of order. No fault of one object."""


class Refused(Unavailable):
    """Nor will it be usable by waiting: there is no such bucket, or it takes none of our credentials."""


def patiently(ask: Callable[[], Made], despite: tuple[type[Exception], ...] = (Unavailable,)) -> Made:
    """What `ask` returns; while it raises one of `despite`, it is asked again, for `PATIENCE_S` from the first failure.

    Raises:
        Refused: at once.
        Exception: what `ask` raised last, or anything else that it raised.
    """
    give_up = None
    for wait in itertools.chain(WAITS_S, itertools.repeat(WAITS_S[-1])):
        try:
            return ask()
        except despite as error:
            now = time.monotonic()
            give_up = now + PATIENCE_S if give_up is None else give_up
            if isinstance(error, Refused) or now + wait > give_up:
                raise
        pause(wait)
    raise AssertionError("pauses have no end")


def scheme_of(uri: str) -> str:
    """`file` or `s3`.

    Raises:
        BadLocation: any other scheme, a chain of them, or credentials in it.
    """
    scheme, rest = uri.split("://", 1) if "://" in uri else ("file", "")
    if scheme not in SCHEMES or "::" in uri:
        raise BadLocation(f"{uri!r}: only local paths, file:// and s3:// are read")
    if "@" in rest.split("/", 1)[0]:
        raise BadLocation("s3://...: holds credentials, which belong in the environment (AWS_*) or the machine's role")
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


def within(uri: str, roots: Iterable[str]) -> bool:
    """Whether a path or URI lies in one of these folders, by its name: nothing is asked of a store, no link followed.

    A key with `..` in it lies nowhere: to an object store it is a name, to what stands before one a way out.
    """
    place = _plain(uri)
    folders = (_plain(root).rstrip("/") + "/" for root in roots)
    return ".." not in place.split("/") and any(place.startswith(folder) for folder in folders)


def real(uri: str) -> str:
    """A local path with all links followed; a URI of an object store as it is."""
    return os.path.realpath(_plain(uri)) if scheme_of(uri) == "file" else uri


def _plain(uri: str) -> str:
    if scheme_of(uri) == "s3":
        return uri
    # As fsspec reads it, which takes file:// off and undoes no escapes.
    return os.path.normpath(fsspec.get_filesystem_class("file")._strip_protocol(uri))


def _filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if scheme_of(uri) == "file":
        return fsspec.url_to_fs(uri)
    # The client's own few tries are for a request among thousands that is lost; outages are for `patiently`.
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    retries = {"mode": "standard", "total_max_attempts": 3}
    fs, path = fsspec.url_to_fs(uri, config_kwargs={**timeouts, "retries": retries})
    fs.retries = 1
    return fs, path


def _ask(uri: str, call: Callable[[fsspec.AbstractFileSystem, str], Made]) -> Made:
    """What a call on the file system and path of a URI returns, patiently."""

    def once() -> Made:
        with _told_apart(uri):
            fs, path = _filesystem(uri)
            # Another process may have written since this one last looked, and s3fs would believe its listing.
            fs.invalidate_cache()
            return call(fs, path)

    return patiently(once)


def open_read(uri: str) -> BinaryIO:
    """A seekable file; of a remote object only the pieces that are asked for travel. Reads may raise like the opening.

    Raises:
        FileNotFoundError, PermissionError: of this object.
        Unavailable: of the whole store.
        BadLocation: neither a path nor an s3:// URI.
    """
    remote = scheme_of(uri) == "s3"
    return _ask(uri, lambda fs, path: RangedFile(fs, path) if remote else fs.open(path, "rb"))  # type: ignore[return-value]


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
        if scheme_of(uri) == "s3":
            return str(_ask(uri, lambda fs, path: fs.info(path)).get("ETag", "")).strip('"') or None
        found = _ask(uri, lambda _, path: Path(path).stat())
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
            piece = span[0], future.result()
            self._coming = None
            if number + 1 < len(self._announced):
                self._ask(number + 1)
        else:
            end = self._position + min(max((self._position - self._run_start) // 2, self.LEAST), self.MOST)
            later = (start for start, _ in self._announced if start > self._position)
            span = self._position, min(end, self.size, next(later, self.size))
            piece = span[0], self._thread.submit(self._fetch, *span).result()
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
        def once() -> bytes:
            with _told_apart(self._name):
                self._file.seek(start)
                data = self._file.read(end - start)
            if len(data) != end - start:
                raise Unavailable(f"{self._name}: {len(data)} bytes came where {end - start} were asked for")
            return data

        try:
            return patiently(once)
        except OSError as error:
            if _status(error) == PRECONDITION_FAILED:  # whoever opens it again gets the new one
                raise Unavailable(f"{self._name}: it expired: another object has taken its place") from error
            raise

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


PRECONDITION_FAILED, OUT_OF_SPACE = 412, 507
ASK_AGAIN = {408, 429, 500, 502, 503, 504}


@contextmanager
def _told_apart(uri: str) -> Iterator[None]:
    """Errors of the store become `Unavailable`; those of one object pass, in words that name it."""
    try:
        yield
    except Exception as error:
        remote = scheme_of(uri) == "s3"
        kind, said = type(error).__name__, " ".join(str(error).split())
        if remote and isinstance(error, FileNotFoundError):
            _require_bucket(uri)
            raise FileNotFoundError(f"{uri}: no such object") from error
        if remote and (isinstance(error, PermissionError) or kind == "NoCredentialsError"):
            raise PermissionError(f"{uri}: permission denied; check AWS_* or the machine's role") from error
        if remote and kind == "ParamValidationError":
            raise BadLocation(f"{uri}: {said[:100]}") from error
        if isinstance(error, OSError) and (error.errno in FULL or _status(error) == OUT_OF_SPACE):
            raise OSError(error.errno, f"no space left for {uri}; free some, or write elsewhere") from error
        if _is_of_the_store(error):
            raise Unavailable(f"{uri}: {kind}: {said}") from error
        raise


def _is_of_the_store(error: Exception) -> bool:
    """Whether it says that nobody can be served; the S3 client has classes of its own for a store out of reach."""
    if status := _status(error):
        return status in ASK_AGAIN
    client = type(error).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "http")
    out_of_order = isinstance(error, OSError) and error.errno in OUT_OF_ORDER
    return client or out_of_order or isinstance(error, ConnectionError | TimeoutError)


def _status(error: BaseException | None) -> int:
    """The store's HTTP status, 0 of an error that is no answer of a store."""
    while error is not None:
        if response := getattr(error, "response", None):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        error = error.__cause__
    return 0


def _require_bucket(uri: str) -> None:
    """A store says the same of a missing object and of an object in a missing bucket.

    Raises:
        Refused: the bucket is missing.
        Unavailable: the store does not answer.
    """
    fs, path = _filesystem(uri)
    bucket = path.split("/", 1)[0]
    try:
        fs.call_s3("head_bucket", Bucket=bucket)
    except FileNotFoundError:
        raise Refused(f"{uri}: there is no bucket {bucket}") from None
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
    return _ask(uri, lambda fs, path: fs.cat_file(path, start=start, end=end))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and the folders above it where there are such. It appears whole or not at all.

    Raises:
        OSError: of this object, no space among them.
        Unavailable: of the whole store.
    """
    if scheme_of(uri) == "s3":
        _write_object(uri, [data])
    else:
        _ask(uri, lambda _, path: _write_file(path, [data]))


def write_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """`write_bytes` of data that is made while it is written, and may be larger than memory."""
    if scheme_of(uri) == "s3":
        _write_object(uri, chunks)
    else:
        # Not asked for twice: what was taken of the chunks is gone.
        with _told_apart(uri):
            _write_file(_filesystem(uri)[1], chunks)


def upload_file(path: str, uri: str) -> None:
    """`write_bytes` of a local file, which may be larger than memory."""

    def chunks() -> Iterator[bytes]:
        with Path(path).open("rb") as file:
            yield from iter(lambda: file.read(PART_BYTES), b"")

    if scheme_of(uri) == "s3":
        _write_object(uri, chunks())
    else:
        _ask(uri, lambda _, place: _write_file(place, chunks()))


def _write_file(path: str, chunks: Iterable[bytes]) -> None:
    """A local file is put in its place when it is whole."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    begun = Path(f"{path}.{secrets.token_hex(4)}.part")
    try:
        with begun.open("wb") as file:
            file.writelines(chunks)
        begun.replace(path)
    finally:
        begun.unlink(missing_ok=True)


def _write_object(uri: str, chunks: Iterable[bytes]) -> None:
    """An object store shows an upload when it is completed. Each part is sent patiently, for chunks come only once."""

    def call(method: str, **arguments: Any) -> dict[str, Any]:
        def once(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
            bucket, key, _ = fs.split_path(path)
            return fs.call_s3(method, Bucket=bucket, Key=key, timeout=WRITE_TIMEOUT_S, **arguments)

        return _ask(uri, once)

    parts = _cut(chunks, PART_BYTES)
    first, second = next(parts, b""), next(parts, None)
    if second is None:
        call("put_object", Body=first)
        return
    upload = call("create_multipart_upload")["UploadId"]
    try:
        with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
            sent: list[tuple[int, Future[dict[str, Any]]]] = []
            size = 0
            for number, part in enumerate(itertools.chain([first, second], parts), start=1):
                if number > PARTS_AT_ONCE:
                    sent[number - PARTS_AT_ONCE - 1][1].result()  # no more of them are held
                size += len(part)
                future = threads.submit(call, "upload_part", UploadId=upload, PartNumber=number, Body=part)
                sent.append((number, future))
        tags = [{"PartNumber": number, "ETag": future.result()["ETag"]} for number, future in sent]
        try:
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": tags})
        except FileNotFoundError:
            # Completed before, and the answer was lost: such an upload is known no more.
            if stamp_of(uri)[0] != size:
                raise
    except BaseException:
        with suppress(Exception):
            fs, path = _filesystem(uri)
            fs.abort_mpu(*fs.split_path(path)[:2], upload)
        raise


def _cut(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of this size, and a shorter one at the end."""
    held = bytearray()
    for chunk in chunks:
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def remove(uris: Sequence[str]) -> None:
    """Remove objects, one after the other."""
    for uri in uris:
        _ask(uri, lambda fs, path: fs.rm_file(path))


def remove_folder(uri: str) -> None:
    """Remove a folder with all that is in it, if there is one."""
    if scheme_of(uri) == "file":
        with suppress(FileNotFoundError):
            _ask(uri, lambda _, path: shutil.rmtree(path))
    else:
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            list(threads.map(lambda name: remove([f"{uri}/{name}"]), names_in(uri)))


def stamp_of(uri: str) -> tuple[int, str]:
    """Size [bytes], and what changes when the object does: its ETag, or a local file's time of change.

    Raises:
        OSError: there is none, or no way to it.
        Unavailable: of the whole store.
    """
    info = _ask(uri, lambda fs, path: fs.info(path))
    return int(info["size"]), str(info.get("ETag") or info.get("mtime")).strip('"')


def is_empty(folder: str) -> bool:
    """Whether nothing is in it, or there is no such folder."""
    return _ask(folder, lambda fs, path: not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False)))


def exists(uri: str) -> bool:
    """Whether there is such an object now."""
    return _ask(uri, lambda fs, path: fs.exists(path))


def is_folder(uri: str) -> bool:
    """Whether there are objects in it."""
    return _ask(uri, lambda fs, path: fs.isdir(path))


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder and the folders below it, relative to it."""

    def names(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in fs.find(path))

    return _ask(folder, names)


def download_file(uri: str, path: str) -> None:
    """Copy an object to a local file, which appears when it is whole."""
    with open_read(uri) as file:
        will_read(file, [(0, file.seek(0, os.SEEK_END))])
        file.seek(0)
        _write_file(path, iter(lambda: file.read(2**20), b""))


def folders_in(folder: str) -> list[str]:
    """Names of the folders in a folder; none where there is no such folder."""

    def listed(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        if not fs.isdir(path):
            return []
        return sorted(Path(item["name"]).name for item in fs.ls(path, detail=True) if item["type"] == "directory")

    return _ask(folder, listed)


def download(uri: str, folder: str) -> None:
    """Copy a folder's files to a local folder.

    Raises:
        BadLocation: a key leads out of it by its name.
    """

    def fetch(name: str) -> None:
        if not within(f"{folder}/{name}", [folder]):
            raise BadLocation(f"{uri}: its object {name!r} leads out of the folder")
        download_file(f"{uri}/{name}", f"{folder}/{name}")

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        list(threads.map(fetch, names_in(uri)))


def upload(folder: str, uri: str) -> None:
    """Copy a local folder's files to a folder, one whole file after the other."""
    for name in names_in(folder):
        upload_file(f"{folder}/{name}", f"{uri}/{name}")


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem and path that Ray Train keeps checkpoints in."""
    if scheme_of(uri) == "file":
        return pyarrow.fs.LocalFileSystem(), absolute(uri).removeprefix("file://")
    # pyarrow's own constructor does not read AWS_ENDPOINT_URL, and its defaults give up after 3 tries. The n-th pause
    # of this strategy is 25 ms x 2^n: 13 tries are as patient as we are. With the standard one, many requests at once
    # would use up each other's tries.
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=13),
    )
    return filesystem, uri.removeprefix("s3://")


def local_path(uri: str) -> str:
    """The path of a local file or folder."""
    return absolute(uri).removeprefix("file://")
