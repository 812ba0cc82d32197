"""Parquet files whose content is far larger than the file are refused before it is unpacked."""

import io
import itertools
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.rows import files, tables
from crosslmm.data.rows.values import BadRow
from crosslmm.storage import parquet, thrift
from crosslmm.storage.parquet import BadParquet, ParquetFile
from tests.support.common import ROOT, conversation

MB = 2**20
MAKE = """
import sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(5000, np.int32)), ["x" * 2**20])
lists = pa.ListArray.from_arrays(pa.array(range(0, 5001, 10), pa.int32()), texts)
long = pa.ListArray.from_arrays(pa.array([0, 3 * 10**7], pa.int32()), pa.nulls(3 * 10**7, pa.int8()))
tables = {
    "texts": pa.table({"id": range(5000), "messages": texts}),
    "lists": pa.table({"id": range(500), "messages": lists}),
    "structs": pa.table({"id": range(5000), "messages": pa.StructArray.from_arrays([texts], ["a"])}),
    "nulls": pa.table({"id": pa.nulls(10**8)}),
    "elements": pa.table({"id": ["a"], "messages": long}),
    "columns": pa.table({f"c{i}": [1] for i in range(500)}),
}
for name, table in tables.items():
    pq.write_table(table, f"{sys.argv[1]}/{name}.parquet", row_group_size=10**9)
zeros = pa.table({"id": range(300), "messages": ["x" * 2**20] * 300})
for codec in ("zstd", "gzip"):
    pq.write_table(zeros, f"{sys.argv[1]}/{codec}.parquet", compression=codec, use_dictionary=False)
"""
READ = """
import json, resource, sys
from crosslmm.data.ingest import split
from crosslmm.data.manifest import BadManifest, Manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
errors = {}
for name in sys.argv[2:]:
    uri = f"{sys.argv[1]}/{name}.parquet"
    for read in (Manifest, lambda uri: [list(split.read_rows(chunk)) for chunk in split.split_file(uri, 2**25)]):
        try:
            read(uri)
            errors.setdefault(name, []).append("was read")
        except (BadManifest, ValueError) as error:
            errors.setdefault(name, []).append(str(error))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps({"errors": errors, "grown": grown}))
"""
BOMBS = {
    "texts": "bytes of text", "lists": "bytes of text", "structs": "bytes of text", "zstd": "unpack to",
    "gzip": "unpack to", "nulls": "it claims 100000000 rows", "elements": "unpack to", "columns": "500 columns",
}  # fmt: skip


def python(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_small_files_that_unpack_to_gigabytes_are_refused(tmp_path):
    python(MAKE, tmp_path)
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 2 * MB
    read = json.loads(python(READ, tmp_path, *BOMBS))
    for name, reason in BOMBS.items():
        assert [reason in error for error in read["errors"][name]] == [True, True], (name, read["errors"][name])
    assert read["grown"] < 500  # MB


def rows(count=3000):
    texts = np.random.default_rng(0).integers(0, 9, count)
    return pa.table(
        {
            "id": [f"row {i}" for i in range(count)],
            "kind": [None if i % 3 else "colour" for i in range(count)],
            "text": pa.array(["x" * 2000 * int(n) for n in texts], pa.large_string()),
            "many": [[f"{i}", None, "b"] if i % 5 else None for i in range(count)],
            "nested": [[{"role": "user", "content": [{"type": "text", "text": f"{i}"}]}] for i in range(count)],
            "seconds": pa.array([[1.5, None]] * count, pa.list_(pa.float32())),
            "id_hash": pa.array(range(count), pa.uint64()),
            "kept": [i % 2 == 0 for i in range(count)],
            "digest": pa.array([b"0123456789abcdef"] * count, pa.binary(16)),
        }
    )


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0", "data_page_size": 900}]
)
def test_ordinary_files_are_read_as_arrow_reads_them(compression, options):
    buffer, table = io.BytesIO(), rows()
    pq.write_table(table, buffer, row_group_size=700, compression=compression, **options)
    file = ParquetFile.from_bytes(buffer.getvalue())
    assert file.read(table.schema).equals(table)
    some = pa.schema([table.schema.field(name) for name in ("seconds", "many")])
    assert file.read(some, [1]).equals(table.select(some.names).slice(700, 700))
    batches = itertools.chain.from_iterable(file.batches(group, 100) for group in range(5))
    assert [row for batch in batches for row in batch.to_pylist()] == table.to_pylist()


def test_only_the_columns_that_are_asked_for_are_fetched():
    buffer, fetched = io.BytesIO(), []
    pq.write_table(rows(), buffer, compression="none", use_dictionary=False)
    data = buffer.getvalue()

    def read(start, end):
        fetched.append(end - start)
        return data[start:end]

    file = ParquetFile(read, len(data))
    fetched.clear()
    schema = pa.schema({"id": pa.string(), "kept": pa.bool_()})
    assert file.read(schema).num_rows == 3000
    assert len(fetched) == 2
    assert sum(fetched) < len(data) / 20


def bytes_of(table, **options):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a Parquet file"),
        (b"PAR1PAR1", "not a Parquet file"),
        (b"PAR1" + bytes(8) + b"PAR1", "its footer has 8 bytes"),
        (b"PAR1" + b"\xff" * 8 + b"PAR1", "its footer has 4294967303 bytes"),
        (bytes_of(pa.table({f"c{i}": [1] for i in range(300)})), "it has 300 columns, of at most 256"),
        (bytes_of(rows(), use_dictionary=False, column_encoding={"id": "DELTA_BYTE_ARRAY"}), "encoding 7, whose size"),
        (bytes_of(rows())[1000:], "."),
        (bytes_of(rows())[:1000] + bytes(1000) + bytes_of(rows())[2000:], "."),
        (bytes_of(pa.table({"id": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))})), "has the type map"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_says_why(data, reason):
    def read():
        file = ParquetFile.from_bytes(data)
        return file.read(file.footer.schema.to_arrow_schema())

    with pytest.raises(BadParquet, match=reason) as raised:
        read()
    assert "\n" not in str(raised.value)


def test_a_limit_holds_for_a_page_a_group_and_the_file(monkeypatch):
    table = pa.table({"id": range(4), "text": ["x" * MB, "y" * MB, "z" * MB, "z" * MB]})
    plain = bytes_of(table, compression="zstd", use_dictionary=False, row_group_size=2)
    schema = table.schema
    for limit, bad in ((5 * MB, False), (3 * MB, True), (MB, True)):
        monkeypatch.setattr(parquet, "UNPACKED_BYTES", limit)
        if bad:
            with pytest.raises(BadParquet, match=r"\d+ bytes unpack to \d+ or more; they may unpack to at most \d+"):
                ParquetFile.from_bytes(plain).read(schema)
        else:
            assert ParquetFile.from_bytes(plain).read(schema).equals(table)
    monkeypatch.setattr(parquet, "UNPACKED_BYTES", 3 * MB)
    assert ParquetFile.from_bytes(plain).read(schema, [1]).num_rows == 2  # a group by itself


def test_a_row_that_is_too_large_costs_itself_only(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 300_000)
    messages = [json.dumps(conversation("?", "!" * (400_000 if i == 77 else 10), video=False)) for i in range(200)]
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"id": [f"{i}" for i in range(200)], "messages": messages}), path)
    read = list(files.read_rows(path)[1])
    assert [number for number, _ in read] == list(range(1, 201))
    assert [number for number, row in read if isinstance(row, BadRow)] == [78]
    with pytest.raises(BadManifest, match=r"rows\.parquet: line 78: takes \d+ bytes of memory, of at most 300000"):
        Manifest(path)


# Files that no library writes, in Thrift's compact protocol.


def varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def field(step, kind, value):
    """A field whose number is `step` more than that of the field before it."""
    return bytes([step << 4 | kind]) + value


def items(values):
    return (bytes([len(values) << 4 | 12]) if len(values) < 15 else b"\xfc" + varint(len(values))) + b"".join(values)


def file_with(schema, groups=(), more=b""):
    footer = field(1, 5, varint(2)) + field(1, 9, items(schema)) + more + field(1, 6, b"\0")
    footer += field(1, 9, items(groups)) + b"\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


NAME = field(1, 8, b"\1a")
LEAF = field(1, 5, b"\2") + field(2, 5, b"\0") + NAME + b"\0"
COLUMN = field(2, 6, b"\0") + b"\0"


def node(children):
    return field(3, 5, b"\0") + NAME + field(1, 5, varint(2 * children)) + b"\0"


def group(columns):
    return field(1, 9, items([COLUMN] * columns)) + field(1, 6, b"\0") + field(1, 6, b"\0") + b"\0"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            file_with([node(1)] * 100_000 + [LEAF]),
            "its footer has a list of more than 1,000 items",
        ),  # Arrow's stack would end
        (
            file_with([node(1)] * 600 + [LEAF], more=field(15, 9, items([node(1)] * 1001))),
            "a list of more than 1,000 items",
        ),
        (file_with([node(900)] + [LEAF] * 900), "it has 900 columns"),
        (file_with([node(1), LEAF], [group(20_000)] * 30), "its lists have more than 500000 items"),
        (file_with([node(1), LEAF], more=field(1, 9, b"\xfc" + b"\xff" * 9)), "items|ends early"),
        (file_with([node(1), LEAF], more=field(1, 12, field(1, 12, b"") * 100)), "lie in each other|ends early"),
        (file_with([node(1), LEAF], more=field(1, 11, b"\1")), "it has a field of type 11"),
    ],
)
def test_a_footer_that_would_cost_too_much_is_not_parsed(data, reason):
    with pytest.raises(BadParquet, match=reason):
        ParquetFile.from_bytes(data)


def test_a_footer_within_the_limits_is_parsed():
    assert ParquetFile.from_bytes(file_with([node(1)] * 900 + [LEAF])).footer.num_columns == 1
    assert ParquetFile.from_bytes(file_with([node(1), LEAF], [group(1)] * 5000)).footer.num_row_groups == 5000


def test_a_header_is_read_as_thrift_reads_it():
    size = field(2, 5, varint(2 * 10**9))
    again = field(0, 5, varint(4) + varint(20))  # a field with its number in full
    other = field(0, 6, varint(4) + varint(20))  # the same number, another type: not read
    assert thrift.read_struct(size + b"\0", 0) == ({2: 10**9}, len(size) + 1)
    assert thrift.read_struct(size + again + b"\0", 0)[0] == {2: 10}
    assert thrift.read_struct(size + other + b"\0", 0)[0] == {2: 10**9}
    assert thrift.read_struct(field(1, 5, varint(2**32 + 6)) + b"\0", 0)[0] == {1: 3}  # of 32 bits
    for data in (b"", size, b"\x15", b"\x15\x80", field(1, 12, b"") * 20):
        with pytest.raises(thrift.Malformed):
            thrift.read_struct(data, 0)
