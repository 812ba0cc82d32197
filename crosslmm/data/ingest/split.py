"""Split a manifest into chunks of similar size that any process can read, with the right line numbers."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from crosslmm import storage
from crosslmm.data.rows import files
from crosslmm.data.rows.folders import manifest_files
from crosslmm.data.rows.tables import parquet_rows
from crosslmm.data.rows.tars import count_rows, tar_rows
from crosslmm.data.rows.unpack import cut, numbered_lines
from crosslmm.data.rows.values import BadRow
from crosslmm.storage.parquet import ParquetFile

SEARCH_BYTES = 64 * 2**10
"""Size of the first read that searches for the end of a line; it doubles until one is found [bytes]."""
MAX_LINE_BYTES = 256 * 2**20
"""Longest line that the search for its end reads; rows have a smaller limit [bytes]."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a manifest.

    Attributes:
        uri: file that holds the rows.
        form: "lines" of JSON; row groups of "parquet"; a "tar"; "whole": a manifest that can only be read from start to
            end; "numbered": rows of such a manifest, as `split_whole_file` wrote them.
        begin, end: range [begin, end) of the file in bytes, or in row groups.
        first: line number of the first row, from 1, blank lines counted.
        rows: number of lines, blank ones included, or of rows; 0 for "whole".
        sha256: of the bytes ("lines", "numbered"), or of the file's change stamp and the range ("parquet", "tar");
            empty for "whole" [hex].
    """

    uri: str
    form: Literal["lines", "parquet", "tar", "whole", "numbered"]
    begin: int = 0
    end: int = 0
    first: int = 1
    rows: int = 0
    sha256: str = ""


def files_to_split(uri: str, roots: Sequence[str] = ()) -> list[str]:
    """Return the files of a manifest that can be split, in order; empty if one process must read the whole manifest.

    Args:
        uri: manifest.
        roots: further folders that links in a folder may lead to.

    Raises:
        OSError, ValueError: it cannot be read, or its compression or encoding is not supported.
    """
    parts = manifest_files(uri, roots)
    kinds = {files.kind_of(part) for part in parts}
    # Lines of several files would have to be counted before they have numbers.
    return parts if kinds <= {"parquet", "tar"} or (kinds == {"lines"} and len(parts) == 1) else []


def change_stamp(uri: str, roots: Sequence[str] = ()) -> list[Any]:
    """Return a value that changes when the manifest is replaced: size, and ETag or time, of each of its files; empty
    for a folder of sidecars.

    Raises:
        OSError: it cannot be read.
    """
    return [value for part in manifest_files(uri, roots) for value in storage.size_and_version(part)]


def split_file(uri: str, chunk_bytes: int) -> list[Chunk]:
    """Split a file of lines, Parquet or a tar. Chunks of lines still need `align_to_lines`, those of a tar `count_tar`,
    and all `number_rows`.

    Raises:
        OSError, ValueError: it cannot be read, or its content does not match its suffix.
    """
    kind = files.kind_of(uri)
    if kind == "parquet":
        return _split_parquet(uri, chunk_bytes)
    if kind == "tar":
        return [Chunk(uri, "tar", sha256=hashlib.sha256(f"{uri} {storage.size_and_version(uri)}".encode()).hexdigest())]
    size, _ = storage.size_and_version(uri)
    return [Chunk(uri, "lines", begin, min(begin + chunk_bytes, size)) for begin in range(0, size, chunk_bytes)]


def count_tar(chunk: Chunk, _: int) -> Chunk:
    """Count the rows of a tar; has the parameters of `align_to_lines`."""
    return replace(chunk, rows=count_rows(chunk.uri))


def align_to_lines(
    chunk: Chunk, size: int, search_bytes: int = SEARCH_BYTES, max_line_bytes: int = MAX_LINE_BYTES
) -> Chunk:
    """Move both ends of a chunk to the next start of a line, where its neighbours meet it, and count its lines.

    Args:
        chunk: from `split_file`.
        size: size of the file [bytes].
        search_bytes: size of the first read that searches for the end of a line [bytes].
        max_line_bytes: longest line [bytes].

    Raises:
        ValueError: a line is too long.
    """

    def next_line(offset: int) -> int:
        return _next_line_start(chunk.uri, offset, size, search_bytes, max_line_bytes)

    begin = next_line(chunk.begin - 1) if chunk.begin else 0
    end = next_line(chunk.end - 1)
    data = storage.read_bytes(chunk.uri, begin, end) if begin < end else b""
    return replace(chunk, begin=begin, end=end, rows=len(data.splitlines()), sha256=hashlib.sha256(data).hexdigest())


def number_rows(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Give each chunk the number of its first row, and drop empty chunks, which lie within a long line."""
    numbered: list[Chunk] = []
    first = 1
    for chunk in chunks:
        if chunk.rows:
            numbered.append(replace(chunk, first=first))
            first += chunk.rows
    return numbered


def split_whole_file(uri: str, folder: str, chunk_bytes: int, roots: Sequence[str] = ()) -> list[Chunk]:
    """Read a manifest from start to end, and write its rows into files in `folder`, each with its number.

    Args:
        uri: manifest.
        folder: path or URI.
        chunk_bytes: size of a file [bytes].
        roots: further folders that links in a manifest that is a folder may lead to.

    Raises:
        OSError, ValueError: it cannot be read, or its content does not match its suffix.
    """
    digest, rows = files.read_rows(uri, roots)
    prefix = f"{digest[:16]}-{chunk_bytes}"
    chunks: list[Chunk] = []
    lines: list[bytes] = []
    size = first = 0
    for number, row in rows:
        first = first or number
        lines.append(_numbered_line(number, row))
        size += len(lines[-1])
        if size >= chunk_bytes:
            chunks.append(_write_lines(folder, f"{prefix}-{len(chunks):05d}.jsonl", lines, first))
            lines, size, first = [], 0, 0
    if lines:
        chunks.append(_write_lines(folder, f"{prefix}-{len(chunks):05d}.jsonl", lines, first))
    return chunks


def _numbered_line(number: int, row: str | bytes | dict[str, Any] | BadRow) -> bytes:
    """Return a line of a "numbered" file: [number, row, reason]; the row is text that is JSON, or a value."""
    if isinstance(row, bytes):
        try:
            row = row.decode()
        except UnicodeDecodeError as error:
            row = BadRow(f"Invalid JSON: {error}")
    content = [number, None, str(row)] if isinstance(row, BadRow) else [number, row, None]
    return json.dumps(content).encode() + b"\n"


def _parse_numbered_line(line: bytes) -> tuple[int, Any]:
    match storage.parse_json(line):
        case [int(number), row, None]:
            return number, row
        case [int(number), None, str(reason)]:
            return number, BadRow(reason)
    raise ValueError("a piece of the conversion is damaged; give another folder")


def read_rows(chunk: Chunk, roots: Sequence[str] = ()) -> Iterator[tuple[int, Any]]:
    """Yield the line number and the raw row of each row of a chunk, as `rows.files.read_rows` does.

    Raises:
        OSError, ValueError: it cannot be read, or its content does not match its suffix.
    """
    if chunk.form == "whole":
        yield from files.read_whole(chunk.uri, roots)
    elif chunk.form == "tar":
        yield from tar_rows(chunk.uri, chunk.first)
    elif chunk.form == "parquet":
        yield from parquet_rows(_open_parquet(chunk.uri), range(chunk.begin, chunk.end), chunk.first)
    elif chunk.form == "numbered":
        yield from map(_parse_numbered_line, storage.read_bytes(chunk.uri).splitlines())
    else:
        data = storage.read_bytes(chunk.uri, chunk.begin, chunk.end)
        yield from numbered_lines(cut(data if chunk.begin else data.removeprefix(codecs.BOM_UTF8)), chunk.first)


def _next_line_start(uri: str, offset: int, size: int, search_bytes: int, max_line_bytes: int) -> int:
    """Return the offset after the first line end at or after `offset`; the size of the file if there is none."""
    window = search_bytes
    while offset < size:
        if window > max_line_bytes:
            raise ValueError(f"a line has no end within {max_line_bytes} bytes")
        data = storage.read_bytes(uri, offset, min(offset + window, size))
        if (position := data.find(b"\n")) >= 0:
            return offset + position + 1
        offset, window = offset + window, window * 2
    return size


def _split_parquet(uri: str, chunk_bytes: int) -> list[Chunk]:
    """Return runs of row groups of about `chunk_bytes` uncompressed bytes."""
    metadata = _open_parquet(uri).footer
    identity = f"{storage.size_and_version(uri)} {metadata.created_by} {metadata.schema}"
    chunks: list[Chunk] = []
    begin, size, rows, first = 0, 0, 0, 1
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= chunk_bytes or group + 1 == metadata.num_row_groups:
            # The content is not read here, so the file's stamp stands in for it.
            digest = hashlib.sha256(f"{identity} {begin}".encode()).hexdigest()
            chunks.append(Chunk(uri, "parquet", begin, group + 1, first, rows, digest))
            begin, size, rows, first = group + 1, 0, 0, first + rows
    return chunks


def _open_parquet(uri: str) -> ParquetFile:
    return ParquetFile.from_uri(uri, storage.size_and_version(uri)[0])


def _write_lines(folder: str, name: str, lines: list[bytes], first: int) -> Chunk:
    data = b"".join(lines)
    uri = storage.join(folder, name)
    storage.write_bytes(uri, data)
    return Chunk(uri, "numbered", 0, len(data), first, len(lines), hashlib.sha256(data).hexdigest())
