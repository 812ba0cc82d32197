import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslmm import storage
from crosslmm.data import formats
from crosslmm.data.ingest import split
from crosslmm.data.ingest.split import Piece
from crosslmm.data.manifest import Manifest
from tests.support.common import conversation

ENDS = [b"\n", b"\r\n", b"\r"]
LINES = st.lists(st.tuples(st.binary(max_size=40).filter(lambda b: not set(b) & set(b"\r\n")), st.sampled_from(ENDS)))


def of(cut):
    return [row for piece in cut for row in split.rows_of(piece)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("pieces") / "rows.jsonl"


@given(LINES, st.booleans(), st.booleans(), st.integers(1, 60), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_any_cut_gives_every_line_once_with_its_number(path, lines, mark, ended, piece_bytes, window):
    """Whatever ends the lines; with and without a byte order mark, and an end of the last line."""
    data = b"\xef\xbb\xbf" * mark + b"".join(line + end for line, end in lines)
    path.write_bytes(data if ended else data.rstrip(b"\r\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "WINDOW", window)
        rough = split.cut(str(path), piece_bytes)
        cut = split.number(split.settle(piece, path.stat().st_size) for piece in rough)
    assert of(cut) == list(formats.read_rows(str(path))[1])
    assert all(a.end == b.begin for a, b in pairwise(cut))
    assert all(a.first + a.rows == b.first for a, b in pairwise(cut))


def test_a_line_without_end_is_no_line(path, monkeypatch):
    path.write_bytes(b"x" * 1000)
    monkeypatch.setattr(split, "WINDOW", 8)
    monkeypatch.setattr(split, "LONGEST_LINE", 100)
    with pytest.raises(ValueError, match="no end within 100 bytes"):
        split.settle(split.cut(str(path), 300)[0], 1000)


def test_parquet_is_cut_at_its_row_groups(tmp_path):
    rows = [{"id": f"{i}", "messages": json.dumps(conversation("?", f"{i}", video=False))} for i in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=90)
    cut = split.cut(str(tmp_path / "rows.parquet"), 20_000)
    assert len(cut) > 2
    assert of(cut) == list(formats.read_rows(str(tmp_path / "rows.parquet"))[1])
    assert len({piece.sha256 for piece in cut}) == len(cut)


@pytest.mark.parametrize("kind", ["list", "folder"])
def test_what_is_read_whole_is_written_as_lines_with_the_same_numbers(tmp_path, kind):
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
    assert split.is_whole(uri)
    cut = split.rewrite(uri, str(tmp_path / "cut"), 1000)
    assert len(cut) > 2
    read = [(number, formats.parse_row(row, number) if row != b"7" else 7) for number, row in of(cut)]
    whole = split.rows_of(Piece(uri, "whole"))
    assert read == [(number, formats.parse_row(row, number) if row != 7 else 7) for number, row in whole]
    if kind == "folder":
        assert [row["id"] for _, row in read] == [row["id"] for row in Manifest(uri).rows]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def breaks():
        yield b"half"
        raise OSError("no space left on device")

    uri = str(tmp_path / "folder" / "file")
    storage.write_chunks(uri, [b"a", b"b"])
    with pytest.raises(OSError, match="no space"):
        storage.write_chunks(uri, breaks())
    assert storage.read_bytes(uri) == b"ab"
    assert storage.names_in(str(tmp_path)) == ["folder/file"]
    size, stamp = storage.stamp_of(uri)
    storage.write_bytes(uri, b"cd")
    assert storage.stamp_of(uri)[0] == size == 2
    assert storage.stamp_of(uri)[1] != stamp
    assert not storage.is_empty(str(tmp_path))
    assert storage.is_empty(str(tmp_path / "nowhere"))
