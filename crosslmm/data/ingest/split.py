"""A manifest -> pieces of about equal size, each of which any process can read, with the right numbers of its rows."""

import codecs
import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow.parquet as pq

from crosslmm import storage
from crosslmm.data import formats

WINDOW = 64 * 2**10
"""So much is read at first to find a line's end [bytes]."""
LONGEST_LINE = 256 * 2**20
"""A line that is longer is none [bytes]."""


@dataclass(frozen=True)
class Piece:
    """Rows of a manifest that follow one another.

    Attributes:
        uri: the file that they stand in.
        form: "lines" of JSON; row groups of "parquet"; the "whole" of what can only be read so.
        begin, end: bytes of the file, or row groups, [begin, end).
        first: number of the first row, blank lines counted, from 1.
        rows: how many, blank lines counted.
        sha256: hex, of its bytes.
    """

    uri: str
    form: Literal["lines", "parquet", "whole"]
    begin: int = 0
    end: int = 0
    first: int = 1
    rows: int = 0
    sha256: str = ""


def is_whole(uri: str) -> bool:
    """Whether it can only be read whole, by one process: a JSON list, or a folder of videos with sidecars."""
    return uri.lower().endswith(".json") or formats.is_folder(uri)


def stamp(uri: str) -> list[Any]:
    """What changes when a manifest is replaced: size and ETag or time; of a folder, which has none, nothing.

    Raises:
        OSError: it cannot be read.
    """
    return [] if formats.is_folder(uri) else list(storage.stamp_of(uri))


def cut(uri: str, piece_bytes: int) -> list[Piece]:
    """Cut a manifest of lines, roughly: `settle` each piece and `number` them all. Or one of Parquet, to the end.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    if uri.lower().endswith(".parquet"):
        return _cut_parquet(uri, piece_bytes)
    size, _ = storage.stamp_of(uri)
    return [Piece(uri, "lines", begin, min(begin + piece_bytes, size)) for begin in range(0, size, piece_bytes)]


def settle(piece: Piece, size: int) -> Piece:
    """Move both ends of a rough piece of a file of this size to where lines begin, the same for its neighbours, and
    count its lines."""
    begin = _line_after(piece.uri, piece.begin - 1, size) if piece.begin else 0
    end = _line_after(piece.uri, piece.end - 1, size)
    data = storage.read_bytes(piece.uri, begin, end) if begin < end else b""
    return replace(piece, begin=begin, end=end, rows=len(data.splitlines()), sha256=hashlib.sha256(data).hexdigest())


def number(pieces: Iterable[Piece]) -> list[Piece]:
    """Number the rows of pieces through. Empty ones, which lie in the midst of a line, are left out."""
    numbered: list[Piece] = []
    first = 1
    for piece in pieces:
        if piece.rows:
            numbered.append(replace(piece, first=first))
            first += piece.rows
    return numbered


def rewrite(uri: str, folder: str, piece_bytes: int) -> list[Piece]:
    """Read a manifest that can only be read whole, and write it as pieces of lines, a row each, into a folder.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    data, rows = formats.read_rows(uri)
    key = f"{hashlib.sha256(data).hexdigest()[:16]}-{piece_bytes}"
    pieces: list[Piece] = []
    lines, size, first = [], 0, 1
    for count, (_, row) in enumerate(rows, start=1):
        lines.append((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
        size += len(lines[-1])
        if size >= piece_bytes:
            pieces.append(_write(folder, key, len(pieces), lines, first))
            lines, size, first = [], 0, count + 1
    return [*pieces, _write(folder, key, len(pieces), lines, first)] if lines else pieces


def rows_of(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Its rows as `formats` gives them, with their numbers.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    if piece.form == "whole":
        yield from formats.read_rows(piece.uri)[1]
    elif piece.form == "parquet":
        with _parquet(piece.uri) as file:
            yield from formats.parquet_rows(file, range(piece.begin, piece.end), piece.first)
    else:
        data = storage.read_bytes(piece.uri, piece.begin, piece.end)
        yield from formats.numbered_lines(data if piece.begin else data.removeprefix(codecs.BOM_UTF8), piece.first)


def _line_after(uri: str, place: int, size: int) -> int:
    """The place behind the first line end at `place` or later; the end of the file if there is none."""
    window = WINDOW
    while place < size:
        if window > LONGEST_LINE:
            raise ValueError(f"a line has no end within {LONGEST_LINE} bytes")
        data = storage.read_bytes(uri, place, min(place + window, size))
        if (found := data.find(b"\n")) >= 0:
            return place + found + 1
        place, window = place + window, window * 2
    return size


def _cut_parquet(uri: str, piece_bytes: int) -> list[Piece]:
    """Runs of row groups of about so many bytes, uncompressed."""
    with _parquet(uri) as file:
        metadata = file.metadata
    about = f"{storage.stamp_of(uri)} {metadata.created_by} {metadata.schema}"
    pieces: list[Piece] = []
    begin, size, rows, first = 0, 0, 0, 1
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        rows += metadata.row_group(group).num_rows
        if size >= piece_bytes or group + 1 == metadata.num_row_groups:
            # Nobody has read its content: the file's stamp stands for it.
            digest = hashlib.sha256(f"{about} {begin}".encode()).hexdigest()
            pieces.append(Piece(uri, "parquet", begin, group + 1, first, rows, digest))
            begin, size, rows, first = group + 1, 0, 0, first + rows
    return pieces


@contextlib.contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    # Arrow takes a short read for the end of the file; a buffer reads on.
    with io.BufferedReader(storage.open_read(uri), 2**20) as file:  # type: ignore[type-var]
        yield pq.ParquetFile(file)


def _write(folder: str, key: str, count: int, lines: list[bytes], first: int) -> Piece:
    data = b"".join(lines)
    uri = storage.join(folder, f"{key}-{count:05d}.jsonl")
    storage.write_bytes(uri, data)
    return Piece(uri, "lines", 0, len(data), first, len(lines), hashlib.sha256(data).hexdigest())
