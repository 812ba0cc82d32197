"""The one door to files: local paths and `s3://` URIs alike, through fsspec and s3fs."""

import itertools
import os
import posixpath
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow.fs

from crosslmm.storage.range_reader import RangedFile
from crosslmm.storage.retry import (
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    BadLocation,
    ask,
    filesystem,
    scheme_of,
    told_apart,
)

WRITE_TIMEOUT_S = 120
"""So long may a store take to get one part of an object, for no client notices that none of it is being taken [s]."""
PART_BYTES = 32 * 2**20
"""Larger objects are written in parts of this size, of which an object has 10,000 at most [bytes]."""
PARTS_AT_ONCE = 4
FILES_AT_ONCE = 8


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


def open_read(uri: str) -> BinaryIO:
    """A seekable file; of a remote object only the pieces that are asked for travel. Reads may raise like the opening.

    Raises:
        FileNotFoundError, PermissionError: of this object.
        Unavailable: of the whole store.
        BadLocation: neither a path nor an s3:// URI.
    """
    remote = scheme_of(uri) == "s3"
    return ask(uri, lambda fs, path: RangedFile(fs, path) if remote else fs.open(path, "rb"))  # type: ignore[return-value]


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
            return str(ask(uri, lambda fs, path: fs.info(path)).get("ETag", "")).strip('"') or None
        found = ask(uri, lambda _, path: Path(path).stat())
        return f"{found.st_size}-{found.st_mtime_ns}"
    except (FileNotFoundError, PermissionError):
        return None


def will_read(file: BinaryIO, ranges: Sequence[tuple[int, int]]) -> None:
    """Say which bytes [start, end) of an open file will be read, in this order, and no others in between."""
    if isinstance(file, RangedFile):
        file.will_read(ranges)


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """The whole object, or its bytes [start, end).

    Raises:
        OSError: of this object.
        Unavailable: of the whole store.
    """
    return ask(uri, lambda fs, path: fs.cat_file(path, start=start, end=end))


def write_bytes(uri: str, data: bytes) -> None:
    """Write the whole object, and the folders above it where there are such. It appears whole or not at all.

    Raises:
        OSError: of this object, no space among them.
        Unavailable: of the whole store.
    """
    if scheme_of(uri) == "s3":
        _write_object(uri, [data])
    else:
        ask(uri, lambda _, path: _write_file(path, [data]))


def write_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """`write_bytes` of data that is made while it is written, and may be larger than memory."""
    if scheme_of(uri) == "s3":
        _write_object(uri, chunks)
    else:
        # Not asked for twice: what was taken of the chunks is gone.
        with told_apart(uri):
            _write_file(filesystem(uri)[1], chunks)


def upload_file(path: str, uri: str) -> None:
    """`write_bytes` of a local file, which may be larger than memory."""

    def chunks() -> Iterator[bytes]:
        with Path(path).open("rb") as file:
            yield from iter(lambda: file.read(PART_BYTES), b"")

    if scheme_of(uri) == "s3":
        _write_object(uri, chunks())
    else:
        ask(uri, lambda _, place: _write_file(place, chunks()))


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

        return ask(uri, once)

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
            fs, path = filesystem(uri)
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
        _remove(uri)


def _remove(uri: str) -> None:
    # Arrow makes an object of each folder, whose name ends with a slash.
    slash = "/" if uri.endswith("/") else ""
    ask(uri, lambda fs, path: fs.rm_file(path + slash))


def remove_folder(uri: str) -> None:
    """Remove a folder with all that is in it, if there is one."""
    if scheme_of(uri) == "file":
        with suppress(FileNotFoundError):
            ask(uri, lambda _, path: shutil.rmtree(path))
    else:
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            list(threads.map(lambda name: remove([f"{uri}/{name}"]), names_in(uri)))


def stamp_of(uri: str) -> tuple[int, str]:
    """Size [bytes], and what changes when the object does: its ETag, or a local file's time of change.

    Raises:
        OSError: there is none, or no way to it.
        Unavailable: of the whole store.
    """
    info = ask(uri, lambda fs, path: fs.info(path))
    return int(info["size"]), str(info.get("ETag") or info.get("mtime")).strip('"')


def is_empty(folder: str) -> bool:
    """Whether nothing is in it, or there is no such folder."""
    return ask(folder, lambda fs, path: not fs.exists(path) or (fs.isdir(path) and not fs.ls(path, detail=False)))


def exists(uri: str) -> bool:
    """Whether there is such an object now."""
    return ask(uri, lambda fs, path: fs.exists(path))


def is_folder(uri: str) -> bool:
    """Whether there are objects in it."""
    return ask(uri, lambda fs, path: fs.isdir(path))


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder and the folders below it, relative to it."""

    def names(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in fs.find(path))

    return ask(folder, names)


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

    return ask(folder, listed)


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
