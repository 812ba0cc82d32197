"""Read Parquet files that somebody else wrote: what they unpack to is known before they are unpacked.

Compression and dictionaries make a small file large: a kilobyte can hold a thousand copies of a megabyte. So the
headers of all pages are read first, strings stay in their dictionaries until the sum of their lengths is known, and
encodings whose size only decoding tells are refused.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosslmm import storage
from crosslmm.storage import thrift

MAX_FILE_BYTES = 2**30
"""Largest file that is read in one piece, and largest row group, as stored [bytes]."""
MAX_FOOTER_BYTES = 8 * 2**20
"""Largest footer [bytes]."""
MAX_COLUMNS, MAX_FIELDS = 256, 1000
"""Most columns (each leaf of a nested field is one), and most fields of the schema, including those that hold others.
Arrow's reader recurses into each level of a schema: one that is too deep overflows the stack and kills the process."""
MAX_FOOTER_ITEMS = 500_000
"""Most items of all lists in a footer: an item of three bytes takes 600 in memory."""
UNPACKED_BYTES, UNPACKED_RATIO, MAX_UNPACKED_BYTES = 256 * 2**20, 250, 4 * 2**30
"""What packed bytes may unpack to: `UNPACKED_BYTES`, or `UNPACKED_RATIO` times their size up to `MAX_UNPACKED_BYTES`.
Conversations in zstd unpack to 5 to 100 times their size."""
VALUE_BYTES = 16
"""What Arrow needs for a value besides the text of a string: levels, offset, index [bytes]."""
OBJECT_BYTES = 100
"""What Python needs for a value besides the text of a string [bytes]."""
TAIL_BYTES = 64 * 2**10
"""Size of the first read of a footer, and gap below which two ranges are read as one [bytes]."""
MAGIC = b"PAR1"
ENCODINGS = {0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 4: "BIT_PACKED", 5: "DELTA_BINARY_PACKED",
             8: "RLE_DICTIONARY", 9: "BYTE_STREAM_SPLIT"}  # fmt: skip
"""Encodings whose decoded size follows from a page's header."""

# Thrift's field ids: in a footer, in a page's header, and in the header of each kind of page inside that.
ROW_GROUPS = 4
UNCOMPRESSED_SIZE, COMPRESSED_SIZE, NUM_VALUES = 2, 3, 1
DATA_PAGES = (5, 8)
ENCODING_FIELDS = {5: 2, 7: 2, 8: 4}
"""Header of each kind of page (data, dictionary, data of version 2) -> field of the encoding in it."""


class BadParquet(ValueError):
    """A file that is not Parquet, is damaged, or unpacks to far more than it holds; one line."""


def unpacked_limit(packed: int) -> int:
    """Return the most bytes that `packed` bytes may unpack to."""
    return min(max(UNPACKED_BYTES, UNPACKED_RATIO * packed), MAX_UNPACKED_BYTES)


class ParquetFile:
    """A Parquet file whose row groups are checked before they are unpacked.

    Attributes:
        size: size of the file [bytes].
        footer: its metadata.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int, footer_bytes: int = TAIL_BYTES) -> None:
        """Read the footer.

        Args:
            read: returns the bytes [start, end) of the file.
            size: size of the file [bytes].
            footer_bytes: size of the footer with the eight bytes that follow it, if known [bytes].

        Raises:
            BadParquet: this is not a Parquet file, or one with too many columns.
            OSError: from `read`.
        """
        self.size, self._read = size, read
        tail = read(max(0, size - footer_bytes), size)
        if len(tail) < 12 or tail[-4:] != MAGIC:
            raise BadParquet(f"not a Parquet file: it does not end with {MAGIC!r}")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if not 8 < length <= min(size, MAX_FOOTER_BYTES):
            raise BadParquet(f"its footer has {length} bytes, of at most {min(size, MAX_FOOTER_BYTES)}")
        tail = tail[-length:] if length <= len(tail) else read(size - length, size)
        with _arrow_errors():
            items = thrift.count_items(tail, MAX_FOOTER_ITEMS)
            if any(count > MAX_FIELDS for number, count in items.items() if number != ROW_GROUPS):
                raise BadParquet(f"its footer has a list of more than {MAX_FIELDS:,} items")
            self.footer: pq.FileMetaData = pq.read_metadata(io.BytesIO(tail))
            if self.footer.num_columns > MAX_COLUMNS:
                raise BadParquet(f"it has {self.footer.num_columns} columns, of at most {MAX_COLUMNS}")
            self._columns = [_Column.of(self.footer.schema.column(i)) for i in range(self.footer.num_columns)]

    @classmethod
    def from_bytes(cls, data: bytes) -> "ParquetFile":
        """Open a file that is in memory."""
        view = memoryview(data)
        return cls(lambda start, end: view[start:end].tobytes(), len(data))

    @classmethod
    def from_uri(cls, uri: str, size: int, footer_bytes: int = TAIL_BYTES) -> "ParquetFile":
        """Open a file of `size` bytes in storage: a request for its footer, and at least one for each row group."""
        return cls(lambda start, end: storage.read_bytes(uri, start, end), size, footer_bytes)

    def rows(self, group: int) -> int:
        """Return the number of rows of a row group; 0 for one that does not exist."""
        with _arrow_errors():
            return self.footer.row_group(group).num_rows if 0 <= group < self.footer.num_row_groups else 0

    def read(self, schema: pa.Schema, groups: Sequence[int] | None = None) -> pa.Table:
        """Read the columns of `schema` of these row groups (default: all); other columns are not read.

        Raises:
            BadParquet: it is damaged, lacks a column, has another type, or unpacks to too much.
        """
        tables, packed, unpacked, text = [schema.empty_table()], 0, 0, 0
        for number in range(self.footer.num_row_groups) if groups is None else groups:
            if not self.rows(number):
                continue
            group = self._open_group(number, schema.names)
            packed, unpacked = packed + group.packed, unpacked + group.unpacked
            with _arrow_errors():
                table = group.reader.read_row_group(number, columns=schema.names, use_threads=False)
                table.validate(full=True)
                text += string_bytes(table)
                _require(max(unpacked, text), min(packed, self.size))
                tables.append(table.select(schema.names).cast(schema))
        return pa.concat_tables(tables)

    def batches(self, number: int, rows: int) -> Iterator[pa.RecordBatch]:
        """Yield a row group in batches of up to `rows` rows. Strings are in dictionaries, see `string_bytes`.

        Raises:
            BadParquet: it is damaged, or unpacks to too much.
        """
        if not self.rows(number):
            return
        batches = self._open_group(number).reader.iter_batches(batch_size=rows, row_groups=[number], use_threads=False)
        while True:
            with _arrow_errors():
                if (batch := next(batches, None)) is None:
                    return
                batch.validate(full=True)
            yield batch

    def _open_group(self, number: int, columns: Sequence[str] | None = None) -> "_Group":
        """Fetch a row group, and check what it unpacks to besides repeated strings."""
        wanted = [i for i, column in enumerate(self._columns) if columns is None or column.field in columns]
        with _arrow_errors():
            group = self.footer.row_group(number)
            chunks = [group.column(i) for i in wanted]
            spans = [self._span(chunk) for chunk in chunks]
            counts = [chunk.num_values for chunk in chunks]
        packed, unpacked = sum(end - begin for begin, end in spans), 0
        if packed > min(self.size, MAX_FILE_BYTES):
            raise BadParquet(f"row group {number} has {packed} bytes, of at most {min(self.size, MAX_FILE_BYTES)}")
        pieces = _Pieces(self.size)
        for begin, end in _merged(spans):
            data = self._read(begin, end)
            if len(data) != end - begin:
                raise BadParquet(f"it ends before byte {end}")
            pieces.add(begin, data)
        for i, (begin, end), count in zip(wanted, spans, counts, strict=True):
            values, size = _count_pages(pieces.at(begin, end))
            if not group.num_rows <= count == values:
                raise BadParquet(
                    f"row group {number}: a column has {values} values in its pages, {count} in the footer, and there "
                    f"are {group.num_rows} rows"
                )
            unpacked += size + values * (VALUE_BYTES + self._columns[i].width)
        _require(unpacked, packed)
        strings = [i for i in wanted if self._columns[i].is_string]
        options = {"read_dictionary": strings, "pre_buffer": False, "arrow_extensions_enabled": False}
        with _arrow_errors():
            return _Group(pq.ParquetFile(pieces, metadata=self.footer, **options), packed, unpacked)

    def _span(self, chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
        """Return the bytes [begin, end) of a column chunk that Arrow will read."""
        begin, dictionary = chunk.data_page_offset, chunk.dictionary_page_offset
        if dictionary is not None and 0 < dictionary < begin:
            begin = dictionary
        end = begin + chunk.total_compressed_size
        if not len(MAGIC) <= begin <= end <= self.size:
            raise BadParquet(f"column {chunk.path_in_schema!a} lies outside of the file")
        return begin, end


class _Column(NamedTuple):
    """What has to be known about a column."""

    field: str
    """Name of the field of a row that it belongs to."""
    is_string: bool
    width: int
    """Size of a fixed-length binary value; 0 for a column of any other type [bytes]."""

    @classmethod
    def of(cls, column: pq.ColumnSchema) -> "_Column":
        width = column.length if column.physical_type == "FIXED_LEN_BYTE_ARRAY" else 0
        return cls(column.path.split(".")[0], column.physical_type == "BYTE_ARRAY", width)


class _Group(NamedTuple):
    """A row group that was fetched and checked."""

    reader: pq.ParquetFile
    """Reads this group from memory."""
    packed: int
    """Size of the columns that were fetched, as stored [bytes]."""
    unpacked: int
    """Their size in memory, repeated strings counted once [bytes]."""


def _require(unpacked: int, packed: int) -> None:
    if unpacked > unpacked_limit(packed):
        raise BadParquet(
            f"{packed} bytes unpack to {unpacked} or more; they may unpack to at most {unpacked_limit(packed)}"
        )


def string_bytes(data: pa.Table | pa.RecordBatch, value_bytes: int = 0) -> int:
    """Return the size of all strings of a table, each copy counted, plus `value_bytes` for every value [bytes].

    Raises:
        BadParquet: a column has a type that no file of this project needs.
    """
    arrays = [array for column in data.columns for array in getattr(column, "chunks", [column])]
    return sum(_string_bytes(array, value_bytes) for array in arrays)


def _string_bytes(array: pa.Array, value_bytes: int) -> int:
    kind, own = array.type, value_bytes * len(array)
    if pa.types.is_dictionary(kind) and pa.types.is_binary(kind.value_type) | pa.types.is_string(kind.value_type):
        lengths = pc.cast(pc.binary_length(array.dictionary), pa.int64())
        return own + (pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return own + sum(_string_bytes(field, value_bytes) for field in array.flatten())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return own + _string_bytes(array.flatten(), value_bytes)
    if pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_fixed_size_binary(kind):
        return own + (kind.byte_width * len(array) if pa.types.is_fixed_size_binary(kind) else 0)
    raise BadParquet(f"a column has the type {kind}; write text, numbers, lists and structs")


def _count_pages(data: bytes) -> tuple[int, int]:
    """Return the values of a column chunk, and the size of its unpacked pages [bytes], from the pages' headers.

    Raises:
        BadParquet: a header is damaged, or a page has an encoding that is not in `ENCODINGS`.
    """
    at = count = size = 0
    while at < len(data):
        try:
            header, at = thrift.read_struct(data, at)
            packed, unpacked = header[COMPRESSED_SIZE], header[UNCOMPRESSED_SIZE]
            values = [header[field][NUM_VALUES] for field in DATA_PAGES if field in header]
            unknown = {header[field][number] for field, number in ENCODING_FIELDS.items() if field in header}
            unknown -= ENCODINGS.keys()
            damaged = min(packed, unpacked, *values) < 0 or at + packed > len(data)
        except (thrift.Malformed, KeyError, TypeError):
            damaged = True
        if damaged:
            raise BadParquet("a page has a damaged header")
        if unknown:
            raise BadParquet(
                f"a page has encoding {min(unknown)}, whose size only decoding tells; write the file with "
                f"{', '.join(ENCODINGS.values())} only, as pyarrow does"
            )
        at, count, size = at + packed, count + sum(values), size + unpacked
    return count, size


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges that cover all spans; one range covers spans that lie near each other."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin - merged[-1][1] < TAIL_BYTES:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


class _Pieces(io.RawIOBase):
    """A file of `size` bytes of which only some pieces can be read."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._pieces: list[tuple[int, bytes]] = []
        self._size, self._offset = size, 0

    def add(self, begin: int, data: bytes) -> None:
        self._pieces.append((begin, data))

    def at(self, begin: int, end: int) -> bytes:
        for start, data in self._pieces:
            if start <= begin <= end <= start + len(data):
                return data[begin - start : end - start]
        raise BadParquet(f"its bytes {begin} to {end} are missing")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def read(self, count: int | None = -1) -> bytes:
        end = self._size if count is None or count < 0 else min(self._offset + count, self._size)
        data = self.at(self._offset, end)
        self._offset += len(data)
        return data


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Context manager: turns Arrow's errors about a damaged file into `BadParquet`."""
    try:
        yield
    except BadParquet:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError) as error:
        message = " ".join(str(error).split())[:200]
        raise BadParquet(f"{type(error).__name__}: {message}") from error
