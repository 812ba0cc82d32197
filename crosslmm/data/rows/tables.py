"""Rows of tables: CSV and Parquet. A cell that is empty or null is a field that the row lacks."""

import csv
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from crosslmm.data.rows.unpack import lines
from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow
from crosslmm.storage.parquet import OBJECT_BYTES, BadParquet, ParquetFile, string_bytes, unpacked_limit

BATCH_ROWS, BATCH_BYTES = 1024, 64 * 2**20
"""Rows of a Parquet file that become Python objects together, and their size [rows], [bytes]."""
MAX_BLOB_BYTES = 2**29
"""Most bytes of a row's videos and images that stand in the manifest itself [bytes]."""
DELIMITERS = (",", "\t", ";")
INDEX_COLUMNS = {"", "Unnamed: 0", "__index_level_0__"}
"""Columns in which pandas keeps the numbers of its rows."""

NumberedRow = tuple[int, dict[str, Any] | BadRow]


def csv_rows(pieces: Iterable[bytes]) -> Iterator[NumberedRow]:
    """Yield the rows of a CSV, whose first row names the columns: that one is number 1.

    Commas, tabs or semicolons separate the fields. A quoted field may contain them, line ends, and "" for a quote.

    Raises:
        BadRow: there is no such first row.
    """
    text = _text_lines(pieces)
    first = next(text, "")
    delimiter = max(DELIMITERS, key=first.count)
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # one limit for the whole process
    records = csv.reader(itertools.chain([first], text), delimiter=delimiter, strict=True)
    header: list[str] = []
    for number in itertools.count(1):
        try:
            record = next(records, None)
        except csv.Error as error:
            if not header:
                raise BadRow(f"the first row of a CSV names its columns: {error}") from None
            yield number, BadRow(f"Invalid CSV: {error}")
            continue
        if record is None:
            return
        if header and record:
            yield number, _csv_row(header, record)
        elif record:
            header = _column_names(record)


def _text_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    for number, line in lines(pieces, keep_ends=True):
        if isinstance(line, BadRow):
            raise BadRow(f"line {number} {line}")
        yield line.decode(errors="surrogateescape")


def _column_names(record: list[str]) -> list[str]:
    names = [name.strip() for name in record]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated or not names:
        raise BadRow(f"the first row of a CSV names its columns, each once; this one is {','.join(names)[:100]!a}")
    return names


def _csv_row(header: list[str], record: list[str]) -> dict[str, Any] | BadRow:
    if len(record) != len(header):
        return BadRow(f"has {len(record)} fields, and the first row names {len(header)}")
    row = {name: field for name, field in zip(header, record, strict=True) if field and name not in INDEX_COLUMNS}
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return BadRow("is not UTF-8; save the table as CSV in UTF-8")
    return row


def parquet_rows(file: ParquetFile, groups: Sequence[int], first: int = 1) -> Iterator[NumberedRow]:
    """Yield the rows of these row groups, with their numbers from `first` on.

    Raises:
        BadParquet: the file is damaged, or its rows together are far larger than the file.
    """
    if file.footer.num_rows > file.size:  # every row has some text of its own
        raise BadParquet(f"it claims {file.footer.num_rows} rows in {file.size} bytes")
    numbers, text = itertools.count(first), 0
    for group in groups:
        for batch in file.batches(group, BATCH_ROWS):
            text += string_bytes(batch)
            if text > unpacked_limit(file.size):
                raise BadParquet(f"{file.size} bytes unpack to more than {unpacked_limit(file.size)} bytes of text")
            for row in _batch_rows(batch):
                yield next(numbers), row


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """Yield the rows of a batch; one that would take too much memory becomes a `BadRow`, and is never unpacked."""
    size = string_bytes(batch, OBJECT_BYTES)
    if size <= BATCH_BYTES:
        yield from map(_table_row, batch.to_pylist())
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _batch_rows(batch.slice(0, half))
        yield from _batch_rows(batch.slice(half))
    elif size - (blobs := sum(map(_blob_bytes, batch.columns))) > BATCH_BYTES:
        yield BadRow(f"takes {size} bytes of memory, of at most {BATCH_BYTES}")
    elif blobs > MAX_BLOB_BYTES:
        yield BadRow(f"holds {blobs} bytes of videos and images, of at most {MAX_BLOB_BYTES}")
    else:
        yield from map(_table_row, batch.to_pylist())


def _table_row(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in _without_nulls(row).items() if name not in INDEX_COLUMNS}


def _without_nulls(value: Any) -> Any:
    """Drop nulls from objects: a column has the fields of all rows, and those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _blob_bytes(array: pa.Array) -> int:
    """Return the size of all binary values."""
    kind = array.type
    if pa.types.is_struct(kind):
        return sum(map(_blob_bytes, array.flatten()))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _blob_bytes(array.flatten())
    values = kind.value_type if pa.types.is_dictionary(kind) else kind
    return string_bytes(pa.record_batch([array], ["values"])) if pa.types.is_binary(values) else 0
