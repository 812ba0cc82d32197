"""Read, write and remove files in storage: local paths and `s3://` URIs alike, through fsspec and s3fs."""

import itertools
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow.fs

from crosslmm.storage.names import absolute, require_file
from crosslmm.storage.range_reader import RangedFile
from crosslmm.storage.retry import (
    RANGE_NOT_SATISFIABLE,
    Unavailable,
    call_with_retries,
    classified_errors,
    current_policy,
    filesystem,
    http_status,
    keep_policy,
    scheme_of,
)

PART_BYTES = 32 * 2**20
"""Part size of multipart uploads, for larger objects; an object has at most 10,000 parts [bytes]."""
PARALLEL_PARTS = 4
"""Parts of one object that are uploaded at the same time, and so also held in memory."""
MAX_JSON_BYTES = 4 * 2**20
"""Largest file of `read_json`; one full of empty lists takes thirty times its size in memory [bytes]."""
ARROW_ATTEMPTS = 13
"""Attempts of Arrow's S3 client. Its n-th pause is 25 ms x 2^n, so these last about as long as `RetryPolicy`."""


def open_read(uri: str) -> BinaryIO:
    """Open a seekable file; for a remote object, only the ranges that are read are transferred.

    Raises:
        FileNotFoundError, PermissionError: this object cannot be read; reads raise these errors, too.
        Unavailable: the store is unreachable or failing; reads raise it, too.
        BadLocation: `uri` is neither a path nor an s3:// URI.
    """
    remote = scheme_of(uri) == "s3"
    return call_with_retries(uri, lambda fs, path: RangedFile(fs, path) if remote else fs.open(path, "rb"))  # type: ignore[return-value]


def version_of(file: BinaryIO) -> str | None:
    """Return the ETag of an open object, which changes when it is replaced; None for a local file."""
    return file.version if isinstance(file, RangedFile) else None


def version(uri: str) -> str | None:
    """Return a string that changes when the object is replaced: its ETag, or a local file's size and modification time.
    None if the object does not exist or may not be read. Makes one request.

    Raises:
        Unavailable: the store is unreachable or failing.
    """
    try:
        if scheme_of(uri) == "s3":
            return str(call_with_retries(uri, lambda fs, path: fs.info(path)).get("ETag", "")).strip('"') or None
        status = call_with_retries(uri, lambda _, path: Path(path).stat())
        return f"{status.st_size}-{status.st_mtime_ns}"
    except Unavailable:
        raise
    except OSError:  # a name that is too long, or has a file where a folder would be, among them
        return None


def will_read(file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> None:
    """Announce the byte ranges [start, end) of an open file that will be read next, in ascending order."""
    if isinstance(file, RangedFile):
        file.will_read(ranges)


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read an object, or its bytes [start, end).

    Raises:
        OSError: this object cannot be read.
        Unavailable: the store is unreachable or failing.
    """
    return call_with_retries(uri, lambda fs, path: fs.cat_file(path, start=start, end=end))


def read_at_most(uri: str, most: int) -> bytes:
    """Read an object of at most `most` bytes, by one request; see `read_bytes`.

    Raises:
        ValueError: it is larger, and is not read any further.
    """
    try:
        data = read_bytes(uri, 0, most + 1)
    except OSError as error:
        if http_status(error) != RANGE_NOT_SATISFIABLE:
            raise
        data = b""  # a store has no first byte of an empty object
    if len(data) > most:
        raise ValueError(f"{uri!a}: has more than {most} bytes")
    return data


def read_json(uri: str, most: int = MAX_JSON_BYTES) -> Any:
    """Read and parse a JSON file of at most `most` bytes; see `read_bytes`.

    Raises:
        ValueError: it is larger, or no JSON.
    """
    return parse_json(read_at_most(uri, most))


def parse_json(data: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: the data is not JSON, or is nested too deeply to be read.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def write_bytes(uri: str, data: bytes, part_bytes: int = PART_BYTES) -> None:
    """Write an object atomically, and create the folders above a local file.

    Args:
        uri: path or URI of the object.
        data: its content.
        part_bytes: larger objects are uploaded in parts of this size [bytes].

    Raises:
        OSError: this object cannot be written, for lack of space, say.
        Unavailable: the store is unreachable or failing.
    """
    if scheme_of(uri) == "s3":
        _write_object(uri, [data], part_bytes)
    else:
        call_with_retries(uri, lambda _, path: write_file(path, [data]))


def write_chunks(uri: str, chunks: Iterable[bytes], part_bytes: int = PART_BYTES) -> None:
    """Write an object from an iterator, like `write_bytes`; the data may be larger than memory."""
    if scheme_of(uri) == "s3":
        _write_object(uri, chunks, part_bytes)
    else:
        # No retry: the iterator is consumed.
        with classified_errors(uri):
            write_file(filesystem(uri)[1], chunks)


def upload_file(path: str, uri: str, part_bytes: int = PART_BYTES) -> None:
    """Copy a local file to a path or URI, like `write_bytes`; it may be larger than memory."""

    def chunks() -> Iterator[bytes]:
        with Path(path).open("rb") as file:
            yield from iter(lambda: file.read(part_bytes), b"")

    if scheme_of(uri) == "s3":
        _write_object(uri, chunks(), part_bytes)
    else:
        call_with_retries(uri, lambda _, target: write_file(target, chunks()))


def write_file(path: str, chunks: Iterable[bytes]) -> None:
    """Write a local file under a temporary name, and rename it when it is complete."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("wb") as file:
            file.writelines(chunks)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_object(uri: str, chunks: Iterable[bytes], part_bytes: int) -> None:
    """Upload an object, which appears when the upload completes. Each part is retried by itself, since the chunks can
    be iterated only once."""
    timeout_s = current_policy().write_timeout_s

    @keep_policy
    def call(method: str, **arguments: Any) -> dict[str, Any]:
        def attempt(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any]:
            bucket, key, _ = fs.split_path(path)
            return fs.call_s3(method, Bucket=bucket, Key=key, timeout=timeout_s, **arguments)

        return call_with_retries(uri, attempt)

    parts = _split(chunks, part_bytes)
    first, second = next(parts, b""), next(parts, None)
    if second is None:
        call("put_object", Body=first)
        return
    upload = call("create_multipart_upload")["UploadId"]
    try:
        with ThreadPoolExecutor(PARALLEL_PARTS) as threads:
            sent: list[tuple[int, Future[dict[str, Any]]]] = []
            size = 0
            for number, part in enumerate(itertools.chain([first, second], parts), start=1):
                if number > PARALLEL_PARTS:
                    sent[number - PARALLEL_PARTS - 1][1].result()  # bounds the parts in memory
                size += len(part)
                future = threads.submit(call, "upload_part", UploadId=upload, PartNumber=number, Body=part)
                sent.append((number, future))
        tags = [{"PartNumber": number, "ETag": future.result()["ETag"]} for number, future in sent]
        try:
            call("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": tags})
        except FileNotFoundError:
            # An earlier attempt completed the upload and its response was lost: the store no longer knows the upload.
            if size_and_version(uri)[0] != size:
                raise
    except BaseException:
        with suppress(Exception):
            fs, path = filesystem(uri)
            fs.abort_mpu(*fs.split_path(path)[:2], upload)
        raise


def _split(chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the same bytes in pieces of `size`; the last one may be shorter."""
    buffered = bytearray()
    for chunk in chunks:
        buffered += chunk
        while len(buffered) >= size:
            yield bytes(buffered[:size])
            del buffered[:size]
    if buffered:
        yield bytes(buffered)


def remove(uris: Sequence[str]) -> None:
    """Remove objects, in this order."""
    for uri in uris:
        _remove(uri)


def _remove(uri: str) -> None:
    # Arrow creates an object per folder, whose name ends with a slash.
    slash = "/" if uri.endswith("/") else ""
    call_with_retries(uri, lambda fs, path: fs.rm_file(path + slash))


def size_and_version(uri: str) -> tuple[int, str]:
    """Return an object's size [bytes] and its ETag, or a local file's size and modification time.

    Raises:
        OSError: this object does not exist or cannot be read.
        BadLocation: a local one is neither a file nor a folder.
        Unavailable: the store is unreachable or failing.
    """
    if scheme_of(uri) == "file":
        require_file(local_path(uri))
    info = call_with_retries(uri, lambda fs, path: fs.info(path))
    return int(info["size"]), str(info.get("ETag") or info.get("mtime")).strip('"')


def exists(uri: str) -> bool:
    """Return whether the object exists."""
    return call_with_retries(uri, lambda fs, path: fs.exists(path))


def download_file(uri: str, path: str) -> None:
    """Copy an object to a local file, which appears when it is complete."""
    with open_read(uri) as file:
        will_read(file, [(0, file.seek(0, os.SEEK_END))])
        file.seek(0)
        write_file(path, iter(lambda: file.read(2**20), b""))


def arrow_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Return the Arrow filesystem and path of a URI, for Ray Train's own files."""
    if scheme_of(uri) == "file":
        return pyarrow.fs.LocalFileSystem(), absolute(uri).removeprefix("file://")
    # pyarrow does not read AWS_ENDPOINT_URL, and gives up after 3 attempts by default. With its standard strategy, many
    # parallel requests would use up each other's attempts.
    policy = current_policy()
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"),
        connect_timeout=policy.connect_timeout_s,
        request_timeout=policy.read_timeout_s,
        retry_strategy=pyarrow.fs.AwsDefaultS3RetryStrategy(max_attempts=ARROW_ATTEMPTS),
    )
    return filesystem, uri.removeprefix("s3://")


def local_path(uri: str) -> str:
    """Return the path of a local file or folder, without file://."""
    return absolute(uri).removeprefix("file://")
