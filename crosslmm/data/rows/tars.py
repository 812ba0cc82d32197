"""WebDataset: tar files whose neighbouring members with the same name up to its first dot are one row.

    000.mp4  000.json  001.mp4  001.txt

Only headers, texts and JSON are read here. A video stays where it is until it is converted: its bytes are a range of
the tar, which is never extracted.
"""

import functools
import hashlib
import io
import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from crosslmm import storage
from crosslmm.data.rows.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Embedded
from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow, parse_json, shown, too_long

MAX_HEADER_BYTES = 2**20
"""Longest header of a member, with the long names that it may have [bytes]."""
MAX_MEMBERS = 100
"""Most members of a row."""

Member = tuple[str, int, int]
"""Name, and the bytes [start, end) of the tar."""


def tar_rows(uri: str, first: int = 1) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield the rows of a tar, with their numbers from `first` on.

    Raises:
        BadRow: it is not a tar, or is compressed.
        OSError: it cannot be read.
    """
    stamp = storage.size_and_version(uri)
    with storage.open_read(uri) as file:
        for number, (name, members) in enumerate(_samples(file), start=first):
            try:
                yield number, _row(uri, str(stamp), file, name, members)
            except BadRow as error:
                yield number, error


def count_rows(uri: str) -> int:
    """Return the number of rows of a tar; errors are those of `tar_rows`."""
    with storage.open_read(uri) as file:
        return sum(1 for _ in _samples(file))


def _samples(file: BinaryIO) -> Iterator[tuple[str, list[Member]]]:
    """Yield name and members of each row."""
    files = ((member, _name_and_field(member[0])[0]) for member in _members(file))
    for name, group in itertools.groupby(files, key=lambda item: item[1]):
        yield name, [member for member, _ in itertools.islice(group, MAX_MEMBERS + 1)]


def _members(file: BinaryIO) -> Iterator[Member]:
    """Yield the files of a tar in order. Folders, links, and files without a suffix are left out, as in WebDataset."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=_Limited(file), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it keeps all, and there may be millions
                if (end := member.offset_data + member.size) > size:
                    raise BadRow(f"is cut off within {shown(member.name)}")
                if member.isfile() and not member.issparse() and posixpath.basename(member.name).rpartition(".")[0]:
                    yield member.name, member.offset_data, end
            file.seek(tar.offset)
            # At a damaged header, tarfile stops as at the end.
            if tar.offset < size and any(file.read(tarfile.BLOCKSIZE)):
                raise BadRow(f"is damaged at byte {tar.offset}")
    except tarfile.TarError as error:
        raise BadRow(f"is not a tar, or a packed or damaged one: {error}") from None


def _name_and_field(path: str) -> tuple[str, str]:
    """Split `a/000.left.JPG` into `a/000` and `left.jpg`."""
    folder, name = posixpath.split(path)
    stem, _, field = name.partition(".")
    return posixpath.join(folder, stem), field.lower()


def _row(uri: str, stamp: str, file: BinaryIO, name: str, members: list[Member]) -> dict[str, Any]:
    if len(members) > MAX_MEMBERS:
        raise BadRow(f"has more than {MAX_MEMBERS} members")
    row: dict[str, Any] = {}
    for path, start, end in members:
        field = _name_and_field(path)[1]
        fields: dict[str, Any]
        if f".{field}" in VIDEO_SUFFIXES:
            fields = {"video": _range(uri, stamp, path, start, end)}
        elif f".{field}" in IMAGE_SUFFIXES:
            fields = {"image": _range(uri, stamp, path, start, end)}
        elif field == "txt":
            fields = {"caption": _text(file, start, end)}
        elif field == "json":
            fields = _object(_text(file, start, end))
        else:
            fields = {field: path}  # known to no form: a tar may hold tensors, which nobody reads here
        for key in row.keys() & fields.keys():
            if row[key] != fields[key]:
                raise BadRow(f"{shown(name)} has two values of {shown(key)}")
        row |= fields
    return {"id": name, **row}


def _range(uri: str, stamp: str, path: str, start: int, end: int) -> Embedded:
    """Return a member that is a video or image."""
    key = hashlib.sha256(f"{uri}\n{stamp}\n{path}\n{start}\n{end}".encode("utf-8", "surrogatepass")).hexdigest()
    read = functools.partial(storage.read_bytes, uri, start, end)
    return Embedded(path, end - start, key, read)


def _text(file: BinaryIO, start: int, end: int) -> str:
    if end - start > MAX_ROW_BYTES:
        raise BadRow(too_long(end - start))
    file.seek(start)
    try:
        return file.read(end - start).decode().strip()
    except UnicodeDecodeError as error:
        raise BadRow(f"its text is not UTF-8: {error}") from None


def _object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise BadRow("its .json is not an object")
    return value


class _Limited(io.RawIOBase):
    """A file of which at most `MAX_HEADER_BYTES` are read at a time: a header may claim any length."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise BadRow(f"a header of {size} bytes")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
