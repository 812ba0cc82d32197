"""Files of rows: what kind a file is, and its raw rows with their numbers.

*.jsonl      one object a line
*.json       a list of objects; the first character, not the name, tells a list from JSON Lines
*.csv, *.tsv the first row names the fields
*.parquet    the fields are columns
*.tar        WebDataset
a folder     videos, each with a sidecar NAME.json; or with a metadata file of one of these kinds
a pattern    train-*.parquet: several files of one kind, in the order of their names

All but Parquet and tars may be packed with gzip or zstd, and be UTF-8 or, with a byte order mark, UTF-16.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from crosslmm import storage
from crosslmm.data.rows.folders import manifest_files, sidecars_as_jsonl, suffix_of
from crosslmm.data.rows.json_list import json_list
from crosslmm.data.rows.tables import csv_rows, parquet_rows
from crosslmm.data.rows.tars import tar_rows
from crosslmm.data.rows.unpack import compression_of, cut, encoding_of, numbered_lines, utf8_pieces
from crosslmm.data.rows.values import BadRow, parse_json
from crosslmm.storage.parquet import ParquetFile

MAX_FILE_BYTES = 4 * 2**30
"""Largest manifest that is read in one piece [bytes]."""
HEAD_BYTES = 4096
"""First bytes of a file that say what kind it is."""
PREPARE_HINT = "convert it to one that is read in pieces: python jobs/prepare.py convert {uri} FOLDER"

Raw = str | bytes | dict[str, Any] | BadRow
"""A row as JSON or parsed, or why it cannot be read."""
NumberedRows = Iterator[tuple[int, Raw]]
FileKind = Literal["lines", "text", "parquet", "tar"]
"""How a file can be split. lines: at any line. text: not at all, since only a reader of the whole text knows its rows.
parquet: at its row groups. tar: not at all, but its videos stay where they are."""


def kind_of(uri: str) -> FileKind:
    """Return the kind of a file, by its suffix and its first bytes.

    Raises:
        BadRow: it has a compression or encoding that is not read.
        OSError: it cannot be read.
    """
    suffix = suffix_of(uri)
    if suffix in (".parquet", ".tar"):
        return "parquet" if suffix == ".parquet" else "tar"
    size = storage.size_and_version(uri)[0]
    head = storage.read_bytes(uri, 0, min(HEAD_BYTES, size)) if size else b""
    if compression_of(head) or suffix in (".csv", ".tsv", ".json"):
        return "text"
    encoding, mark = encoding_of(head)
    return "text" if encoding != "utf-8" or _begins_list(head[mark:]) else "lines"


def read_rows(uri: str, roots: Sequence[str] = ()) -> tuple[str, NumberedRows]:
    """Read a manifest in one piece.

    Args:
        uri: path or URI.
        roots: further folders that links in a folder may lead to.

    Returns:
        (digest, rows): the SHA-256 [hex] of its files, or of a folder's rows as JSONL, and (number, raw row) of each
        row. Rows are numbered from 1, as lines or elements of the file; in a CSV the header is number 1, and the first
        row 2.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or does not have the format that its name promises; also
            while the rows are read.
    """
    files = manifest_files(uri, roots)
    if not files:
        data = sidecars_as_jsonl(uri, roots)
        return hashlib.sha256(data).hexdigest(), numbered_lines(cut(data))
    if suffix_of(files[0]) == ".tar":
        raise BadRow(f"a tar holds its videos; {PREPARE_HINT.format(uri=uri)}")
    size = sum(storage.size_and_version(file)[0] for file in files)
    if size > MAX_FILE_BYTES:
        raise BadRow(f"has {size / 1e9:.1f} GB; {_how_to_prepare(uri, files)}")
    contents = [storage.read_bytes(file) for file in files]
    digest = hashlib.sha256()
    for data in contents:
        digest.update(data)
    return digest.hexdigest(), _numbered_on(rows_in(data, file) for data, file in zip(contents, files, strict=True))


def _how_to_prepare(uri: str, files: list[str]) -> str:
    hint = PREPARE_HINT.format(uri=uri)
    in_pieces = suffix_of(uri) == ".parquet" or (len(files) == 1 and kind_of(uri) == "lines")
    return hint if in_pieces else f"write its rows one a line, as one .jsonl, and {hint}"


def read_whole(uri: str, roots: Sequence[str] = ()) -> NumberedRows:
    """Yield the rows of a manifest, those of tars too, whose videos stay where they are; see `read_rows`."""
    files = manifest_files(uri, roots)
    if files and suffix_of(files[0]) == ".tar":
        return _numbered_on(map(tar_rows, files))
    return read_rows(uri, roots)[1]


def _numbered_on(files: Iterable[NumberedRows]) -> NumberedRows:
    """Yield the rows of several files, each numbered on from the one before."""
    last = 0
    for rows in files:
        before = last
        for number, row in rows:
            last = before + number
            yield last, row


def rows_in(data: bytes, name: str) -> NumberedRows:
    """Yield the rows of a file's content; errors are those of `read_rows`."""
    suffix = suffix_of(name)
    if suffix == ".parquet":
        file = ParquetFile.from_bytes(data)
        return parquet_rows(file, range(file.footer.num_row_groups))
    pieces = utf8_pieces(data)
    if suffix in (".csv", ".tsv"):
        return csv_rows(pieces)
    first = next(pieces, b"")
    pieces = itertools.chain([first], pieces)
    if _begins_list(first):
        return json_list(pieces)
    if suffix == ".json":
        _require_lines(first)
    return numbered_lines(pieces)


def _begins_list(text: bytes) -> bool:
    return text[:HEAD_BYTES].lstrip()[:1] == b"["


def _require_lines(text: bytes) -> None:
    """Raise BadRow if a .json without a list has no object on its first line either."""
    line, end, _ = text.lstrip().partition(b"\n")
    try:
        if end:
            parse_json(line)
    except BadRow:
        remedy = "if the list is the value of KEY in an object, jq -c '.KEY[]' makes such lines"
        raise BadRow(f"is neither a list of objects nor one object a line; {remedy}") from None
