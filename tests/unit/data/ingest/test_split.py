import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm import storage
from crosslmm.data.ingest import split
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.manifest import Manifest
from crosslmm.data.rows import files
from tests.support.common import conversation

ENDS = [b"\n", b"\r\n", b"\r"]
LINES = st.lists(st.tuples(st.binary(max_size=40).filter(lambda b: not set(b) & set(b"\r\n")), st.sampled_from(ENDS)))


def rows_of(chunks):
    return [row for chunk in chunks for row in split.read_rows(chunk)]


def text_of(rows):
    return ((number, row.decode() if isinstance(row, bytes) else row) for number, row in rows)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("chunks") / "rows.jsonl"


@given(LINES, st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_any_split_has_every_line_once_with_its_number(path, lines, mark, ended, chunk_bytes, search_bytes):
    """For any line ends, with and without a byte order mark, and with and without an end of the last line."""
    # Without the mark and the dot, some lines begin as a list, a compressed file or UTF-16 does.
    data = b"\xef\xbb\xbf" * mark + b".." + b"".join(line + end for line, end in lines)
    path.write_bytes(data if ended else data.rstrip(b"\r\n"))
    size = path.stat().st_size
    unaligned = split.split_file(str(path), chunk_bytes)
    chunks = split.number_rows(split.align_to_lines(chunk, size, search_bytes) for chunk in unaligned)
    assert rows_of(chunks) == list(files.read_rows(str(path))[1])
    assert all(a.end == b.begin for a, b in pairwise(chunks))
    assert all(a.first + a.rows == b.first for a, b in pairwise(chunks))


def test_a_line_that_is_too_long_is_refused(path):
    path.write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="no end within 100 bytes"):
        split.align_to_lines(split.split_file(str(path), 300)[0], 1000, search_bytes=8, max_line_bytes=100)


def test_parquet_is_split_at_its_row_groups(tmp_path):
    rows = [{"id": f"{i}", "messages": json.dumps(conversation("?", f"{i}", video=False))} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=90)
    chunks = split.number_rows(split.split_file(str(tmp_path / "rows.parquet"), 20_000))
    assert len(chunks) > 2
    assert rows_of(chunks) == list(files.read_rows(str(tmp_path / "rows.parquet"))[1])
    assert len({chunk.sha256 for chunk in chunks}) == len(chunks)


@pytest.mark.parametrize("kind", ["list", "folder"])
def test_a_whole_manifest_is_split_with_the_same_numbers(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    if kind == "list":
        uri = str(source / "rows.json")
        rows = [{"id": f"{i}", "messages": conversation("?", f"é{i}", video=False)} for i in range(20)]
        (source / "rows.json").write_text(json.dumps([*rows, 7]))
    else:
        uri = str(source)
        for i in range(20):
            (source / f"{i:02d}.mp4").write_bytes(b"video")
            (source / f"{i:02d}.json").write_text(json.dumps({"messages": conversation("?", f"{i}")}))
    assert split.files_to_split(uri) == []
    chunks = split.split_whole_file(uri, str(tmp_path / "chunks"), 1000)
    assert len(chunks) > 2
    whole = list(text_of(files.read_rows(uri)[1]))
    assert rows_of(chunks) == whole == list(text_of(split.read_rows(Chunk(uri, "whole"))))
    if kind == "folder":
        assert [json.loads(row)["id"] for _, row in whole] == [row["id"] for row in Manifest(uri).rows]


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    def breaks():
        yield b"half"
        raise OSError("no space left on device")

    uri = str(tmp_path / "folder" / "file")
    storage.write_chunks(uri, [b"a", b"b"])
    with pytest.raises(OSError, match="no space"):
        storage.write_chunks(uri, breaks())
    assert storage.read_bytes(uri) == b"ab"
    assert storage.names_in(str(tmp_path)) == ["folder/file"]
    size, stamp = storage.size_and_version(uri)
    storage.write_bytes(uri, b"cd")
    assert storage.size_and_version(uri)[0] == size == 2
    assert storage.size_and_version(uri)[1] != stamp
    assert not storage.is_empty(str(tmp_path))
    assert storage.is_empty(str(tmp_path / "nowhere"))
