"""Kinds of files, compressions and encodings: the same rows, whatever they come in."""

import codecs
import gzip
import io
import json
import random
import re
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.rows import files, tables
from crosslmm.data.rows.json_list import json_list
from crosslmm.data.rows.unpack import lines, numbered_lines
from crosslmm.data.rows.values import MAX_ROW_BYTES, BadRow
from tests.support.common import ROOT, conversation

MB = 2**20
ROWS = [
    {"id": "a", "video": "clips/a.mp4", "messages": conversation("What?", "Röd.")},
    {"id": "b", "messages": conversation("And?", "No video.", video=False), "kind": "text"},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
JSON = json.dumps(ROWS, indent=2, ensure_ascii=False)


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def fields_of(rows):
    return [(row["id"], row["videos"], row["kind"], row["messages"], row["line"]) for row in rows]


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return fields_of(Manifest(str(path)).rows)


@pytest.fixture
def expected(tmp_path):
    return [
        ("a", [f"{tmp_path}/clips/a.mp4"], None, ROWS[0]["messages"], 1),
        ("b", [], "text", ROWS[1]["messages"], 2),
    ]


SAME = {
    "plain.jsonl": JSONL.encode(),
    "list.json": JSON.encode(),
    "mark.jsonl": codecs.BOM_UTF8 + JSONL.encode(),
    "mark.json": codecs.BOM_UTF8 + JSON.encode(),
    "windows.jsonl": JSONL.replace("\n", "\r\n").encode(),
    "mac.jsonl": JSONL.replace("\n", "\r").encode(),
    "no-end.jsonl": JSONL.rstrip().encode(),
    "utf-16.jsonl": JSONL.encode("utf-16"),
    "utf-16-be.json": codecs.BOM_UTF16_BE + JSON.encode("utf-16-be"),
    "utf-32.jsonl": JSONL.encode("utf-32"),
    "packed.jsonl.gz": gzip.compress(JSONL.encode()),
    "packed.jsonl.zst": zstd(JSONL.encode()),
    "packed.json.gz": gzip.compress(JSON.encode()),
    "packed-utf-16.jsonl.gz": gzip.compress(JSONL.encode("utf-16")),
    "two-members.jsonl.gz": b"".join(gzip.compress(f"{line}\n".encode()) for line in JSONL.splitlines()),
    "packed-unsaid.jsonl": gzip.compress(JSONL.encode()),
    "unpacked.jsonl.gz": JSONL.encode(),  # as a browser saves what a server had packed
    "list.jsonl": JSON.encode(),
    "lines.json": JSONL.encode(),
    "lines.ndjson": JSONL.encode(),
    "no-suffix": JSONL.encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_rows_in_any_file(tmp_path, expected, name):
    assert read(tmp_path / name, SAME[name]) == expected


REFUSED = {
    "utf-16-le.jsonl": (JSONL.encode("utf-16-le"), "is UTF-16LE without a byte order mark; iconv -f UTF-16LE -t UTF-8"),
    "utf-16-be.json": (JSON.encode("utf-16-be"), "is UTF-16BE without a byte order mark"),
    "rows.jsonl.bz2": (b"BZh91AY", "is packed with bzip2; unpack it, or pack it with gzip or zstd"),
    "rows.jsonl.xz": (b"\xfd7zXZ\x00\x00", "is packed with xz"),
    "rows.zip": (b"PK\x03\x04....", "is packed with zip"),
    "cut.jsonl.gz": (gzip.compress(JSONL.encode() * 99)[:-20], "its gzip is damaged"),
    "cut.jsonl.zst": (zstd(JSONL.encode() * 99)[:-6], "its zstd is damaged"),
    "cut-utf-16.jsonl": (JSONL.encode("utf-16")[:-1], "its UTF-16-LE is damaged"),
    "object.json": (json.dumps({"data": ROWS}, indent=1), r"is neither a list of objects nor one object a line; "),
    "open.json": ("[", r"row 1 of the list: Invalid JSON: Expecting value"),
    "cut.json": (JSON[:-9], "row 2 of the list: Invalid JSON"),
    "comma.json": ('[{"id": "a"} {"id": "b"}]', "row 1 of the list is followed by '{' and not by a comma"),
    "more.json": (JSON + "[]", "the list is followed by something else"),
    "deep.json": ("[" * 100_000, "row 1 of the list: Invalid JSON: nested too deep"),
    "latin.json": ('["é"]'.encode("latin-1"), "is not UTF-8"),
    "rows.parquet": ("no parquet", "BadParquet: not a Parquet file"),
    "rows.csv": ("", "is empty"),
    "twice.csv": ("video,video\na.mp4,b.mp4\n", "the first row of a CSV names its columns, each once; .*'video,video'"),
    "rows.tar": ("x" * 1024, "a tar holds its videos; convert it to one that is read in pieces: python jobs/prep"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_by_name(tmp_path, name):
    content, reason = REFUSED[name]
    with pytest.raises(BadManifest, match=f"{name}: (cannot be read: )?{reason}"):
        read(tmp_path / name, content)


LINES = {
    "NaN": ('{"id": NaN}', "Invalid JSON: NaN is not a JSON value; write null or a number"),
    "infinity": ('{"id": "a", "score": -Infinity}', "Invalid JSON: -Infinity is not a JSON value"),
    "a key twice": ('{"video": "a.mp4", "video": "b.mp4"}', "Invalid JSON: the key 'video' occurs twice in one object"),
    "two objects": ('{"id": "a"} {"id": "b"}', "Invalid JSON: something follows the value, at character 13"),
    "cut off": ('{"id": "b", ', "Invalid JSON: .* at character"),
    "no UTF-8": (b'{"id": "\xff"}', "Invalid JSON: 'utf-8' codec can't decode byte 0xff"),
    "no object": ("[1, 2]", r"is \[1, 2\], and should be an object"),
    "too deep": ("[" * 100_000, "Invalid JSON: nested too deep"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named_and_costs_no_other(tmp_path, name, packed):
    line, reason = LINES[name]
    first, second = JSONL.encode().splitlines()
    content = b"\n".join([first, b"", line if isinstance(line, bytes) else line.encode(), second])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(BadManifest, match=f"rows.jsonl: line 3: {reason}") as raised:
        Manifest(str(path))
    assert "rows are malformed" not in str(raised.value)


@pytest.mark.parametrize("name", ["NaN", "a key twice"])
def test_a_bad_element_of_a_list_is_named_and_costs_no_other(tmp_path, name):
    line, reason = LINES[name]
    with pytest.raises(BadManifest, match=f"rows.json: line 2: {reason}$"):
        read(tmp_path / "rows.json", f"[{json.dumps(ROWS[0])}, {line}, {json.dumps(ROWS[1])}]")


def test_a_line_of_a_million_characters_is_read(tmp_path):
    row = {"id": "a", "messages": conversation("?", "x" * 10**6, video=False)}
    for name, content in {
        "rows.jsonl": json.dumps(row),
        "rows.json": json.dumps([row]),
        "rows.csv": f"id,messages\na,{csv_quoted(json.dumps(row['messages']))}\n",
        "rows.jsonl.gz": gzip.compress(json.dumps(row).encode()),
    }.items():
        ((_, _, _, messages, _),) = read(tmp_path / name, content)
        assert messages[1]["content"] == "x" * 10**6


def csv_quoted(text):
    return '"' + text.replace('"', '""') + '"'


BOMBS = {
    "lines.jsonl.gz": (gzip.compress(b"\n" * 3 * 10**8, 6), "unpack to more than"),
    "line.jsonl.zst": (zstd(b"x" * 10**9), "unpack to more than"),
    "list.json.zst": (zstd(b"[" + b"{}," * 10**8), "20,001 of 20,001 rows are malformed"),
    "value.json.zst": (zstd(b'["' + b"x" * 10**9), "has no end within 4194304 characters"),
    "field.csv.zst": (zstd(b'video,caption\na.mp4,"' + b"x\n" * 2 * 10**8), "field larger than field limit|unp"),
    "rows.jsonl": (b"{}\n" * 20_000, "20,000 of 20,000 rows are malformed"),
}
READ = """
import json, resource, sys, time
from crosslmm.data.manifest import BadManifest, Manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
errors = {}
for name in sys.argv[2:]:
    try:
        Manifest(f"{sys.argv[1]}/{name}", max_rows=20_000)
    except BadManifest as error:
        errors[name] = str(error)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(json.dumps({"errors": errors, "grown": grown}))
"""


@pytest.mark.timeout(200)
def test_a_small_file_that_unpacks_to_a_gigabyte_costs_little_memory(tmp_path):
    for name, (content, _) in BOMBS.items():
        assert len(content) < 2 * MB
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", READ, str(tmp_path), *BOMBS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    for name, (_, reason) in BOMBS.items():
        assert re.search(reason, read["errors"][name]), (name, read["errors"][name])
    assert read["grown"] < 150  # MB


@given(
    st.binary(max_size=60).map(lambda data: data.replace(b"a", b"\n").replace(b"c", b" ").replace(b"b", b"\r\n")),
    st.randoms(),
)
def test_lines_are_the_same_however_the_text_is_cut(data, cuts):
    at = sorted(cuts.randrange(len(data) + 1) for _ in range(cuts.randrange(6)))
    pieces = [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]
    assert [line for _, line in lines(pieces)] == data.splitlines()
    numbered = [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]
    assert list(numbered_lines(pieces)) == numbered
    assert b"".join(line for _, line in lines(pieces, keep_ends=True)) == data


@given(st.lists(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=4)), st.integers(1, 9))
def test_a_list_is_the_same_however_its_text_is_cut(values, size):
    text = json.dumps(values, ensure_ascii=False, indent=random.Random(size).choice([None, 1])).encode()
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert list(json_list(pieces)) == list(enumerate(values, start=1))


# Tables

CSV = {
    "commas": "id,video,caption\n1,a.mp4,A dog\n2,b.mp4,A cat\n",
    "semicolons": "id;video;caption\n1;a.mp4;A dog\n2;b.mp4;A cat\n",
    "tabs": "id\tvideo\tcaption\n1\ta.mp4\tA dog\n2\tb.mp4\tA cat\n",
    "index": ",id,video,caption\n0,1,a.mp4,A dog\n1,2,b.mp4,A cat\n",
    "windows": "\ufeffid,video,caption\r\n1,a.mp4,A dog\r\n2,b.mp4,A cat\r\n",
    "quoted": '"id","video","caption"\n"1","a.mp4","A dog"\n"2","b.mp4","A cat"\n',
}


@pytest.mark.parametrize("name", CSV)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_captions_in_a_csv(tmp_path, name, encoding):
    path = tmp_path / "rows.csv"
    path.write_bytes(CSV[name].removeprefix("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    assert fields_of(Manifest(str(path)).rows) == [
        (f"{i}", [f"{tmp_path}/{video}"], None, caption(words), line)
        for i, video, words, line in ((1, "a.mp4", "A dog", 2), (2, "b.mp4", "A cat", 3))
    ]


def caption(words):
    return [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": words}]


def test_a_csv_with_quotes_commas_and_line_ends_in_its_fields(tmp_path):
    text = 'video,caption\na.mp4,"One, two\nand ""three"""\nb.mp4,5" pipe\n'
    rows = read(tmp_path / "rows.csv", text)
    assert [(row[0].partition("/")[2], row[3][1]["content"]) for row in rows] == [
        ("rows.csv:2", 'One, two\nand "three"'), ("rows.csv:3", '5" pipe')
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.mp4", "has 1 fields, and the first row names 2"),
        ("a.mp4,A,dog", "has 3 fields, and the first row names 2"),
        ('a.mp4,"A dog', "Invalid CSV: unexpected end of data"),
        ('a.mp4,"A "dog""', "Invalid CSV: ',' expected after"),
        ("a.mp4,", "has none of the known forms, with the keys 'video'"),
        (b"a.mp4,\xe9t\xe9", "is not UTF-8; save the table as CSV in UTF-8"),
    ],
)
def test_a_bad_row_of_a_csv_is_named(tmp_path, row, reason):
    content = b"video,caption\nb.mp4,A cat\n" + (row if isinstance(row, bytes) else row.encode())
    with pytest.raises(BadManifest, match=f"rows.csv: line 3: {reason}"):
        read(tmp_path / "rows.csv", content)


def parts(content):
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


@pytest.mark.parametrize("as_json", [False, True])
def test_parquet_has_the_same_rows(tmp_path, expected, as_json):
    rows = [
        {
            **row,
            "messages": json.dumps(row["messages"])
            if as_json
            else [{**message, "content": parts(message["content"])} for message in row["messages"]],
        }
        for row in ROWS
    ]
    part = pa.struct({"type": pa.string(), "text": pa.string()})
    messages = pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))
    columns = {"id": pa.string(), "video": pa.string(), "kind": pa.string()}
    schema = pa.schema(columns | {"messages": pa.string() if as_json else messages})
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    assert fields_of(Manifest(str(tmp_path / "rows.parquet")).rows) == expected


def test_a_table_of_hugging_face_with_paths_is_read_and_one_with_bytes_is_to_be_converted(tmp_path):
    for data, name in ((None, "a.mp4"), (b"video", "a.mp4")):
        rows = [{"video": {"bytes": data, "path": name}, "caption": "A dog"}]
        video = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"video": video, "caption": pa.string()})
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / f"{data is None}.parquet")
    (row,) = Manifest(str(tmp_path / "True.parquet")).rows
    assert (row["videos"], row["messages"]) == ([f"{tmp_path}/a.mp4"], caption("A dog"))
    with pytest.raises(BadManifest, match=r"line 1: the row holds its video itself; python jobs/prepare\.py convert"):
        Manifest(str(tmp_path / "False.parquet"))


def test_large_videos_in_a_table_are_read_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BATCH_BYTES", 10_000)
    monkeypatch.setattr(tables, "MAX_BLOB_BYTES", 50_000)
    sizes = [10, 20_000, 60_000]
    table = pa.table({"video": [random.Random(n).randbytes(n) for n in sizes], "caption": ["A dog"] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = [row for _, row in files.read_rows(str(tmp_path / "rows.parquet"))[1]]
    assert [len(row["video"]) for row in rows[:2]] == sizes[:2]
    assert str(rows[2]) == "holds 60000 bytes of videos and images, of at most 50000"


@pytest.mark.parametrize(
    ("messages", "message"),
    [("{broken", "line 1: messages: Invalid JSON"), ('["hello"]', "line 1: message 1: is 'hello'"),
     ("hello", "line 1: messages is 'hello', and should be a list")],
)  # fmt: skip
def test_malformed_parquet_row_is_named(tmp_path, messages, message):
    table = pa.table({"id": ["a"], "messages": [messages]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(BadManifest, match=message):
        Manifest(str(tmp_path / "rows.parquet"))


# Several files


def test_files_that_a_pattern_matches_are_read_in_the_order_of_their_names(tmp_path):
    for number, names in enumerate([["a", "b"], ["c"], ["d"]]):
        table = pa.table({"video": [f"{name}.mp4" for name in names], "caption": names})
        pq.write_table(table, tmp_path / f"train-{number}-of-3.parquet")
    pq.write_table(pa.table({"video": ["t.mp4"], "caption": ["t"]}), tmp_path / "test-0-of-1.parquet")
    rows = Manifest(str(tmp_path / "train-*.parquet")).rows
    assert [(row["messages"][1]["content"], row["line"]) for row in rows] == list(
        zip("abcd", (1, 2, 3, 4), strict=True)
    )
    with pytest.raises(BadManifest, match=r"none-\*\.parquet: cannot be read: no file matches it"):
        Manifest(str(tmp_path / "none-*.parquet"))
    (tmp_path / "test-1.jsonl").write_text("")
    with pytest.raises(BadManifest, match=r"files of several kinds match it, 'test-0-of-1.parquet' and 'test-1.jsonl'"):
        Manifest(str(tmp_path / "test-*"))
    with pytest.raises(
        BadManifest, match=r"is a folder without sidecars .*: 'test-0-of-1.parquet', or all: '\*.parquet'"
    ):
        Manifest(str(tmp_path))


def test_a_folder_with_a_metadata_file_is_that_file(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips/a.mp4").write_bytes(b"video")
    (tmp_path / "metadata.csv").write_text("file_name,text\nclips/a.mp4,A dog\n")
    (row,) = Manifest(str(tmp_path)).rows
    assert (row["videos"], row["messages"]) == ([f"{tmp_path}/clips/a.mp4"], caption("A dog"))
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(BadManifest, match=r"has both metadata\.jsonl and metadata\.csv; name one of them"):
        Manifest(str(tmp_path))


def test_folder_rows_are_its_videos_with_sidecars(tmp_path):
    for name in ("b/two.mp4", "a.webm", "alone.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "a.json").write_text(json.dumps({"messages": conversation("What?", "Red.")}))
    turns = [{"from": "human", "value": "Look: <video> What?"}, {"from": "gpt", "value": "Red."}]
    (tmp_path / "b/two.json").write_text(json.dumps({"conversations": turns}))
    rows = fields_of(Manifest(str(tmp_path)).rows)
    assert [row[:2] for row in rows] == [("a", [f"{tmp_path}/a.webm"]), ("b/two", [f"{tmp_path}/b/two.mp4"])]
    assert rows[0][3][1]["content"] == "Red."


def test_sidecar_paths_are_relative_and_bad_sidecars_are_named(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"video")
    question = {"role": "user", "content": [{"type": "video"}, {"type": "image", "image": "c.png"}]}
    (tmp_path / "a.json").write_text(json.dumps({"messages": [question, {"role": "assistant", "content": "Red."}]}))
    (row,) = Manifest(str(tmp_path)).rows
    assert row["videos"] == [f"{tmp_path}/a.mp4", f"{tmp_path}/c.png"]
    for text, message in {"[1]": "a.json: a sidecar is one object", "{": "a.json: Invalid JSON"}.items():
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(BadManifest, match=message):
            Manifest(str(tmp_path))


# WebDataset


def tar(path, members, fmt=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=fmt) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def tar_rows(path):
    return list(files.read_whole(path))


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_members_of_a_tar_with_the_same_name_are_a_row(tmp_path, fmt):
    members = {
        "README": b"no suffix: left out",
        "p/000.mp4": b"first video",
        "p/000.json": json.dumps({"conversations": [], "source": "x"}).encode(),
        "p/001.txt": "A dög\n".encode(),
        "p/001.mp4": b"second",
        "p/002.JPG": b"image",
        "p/002.txt": b"A cat",
        "p/003.pth": b"tensor",
        f"p/{'n' * 90}.mp4": b"long name",
    }
    rows = tar_rows(tar(tmp_path / "rows.tar", members, fmt))
    read = [
        (number, {key: value.read() if hasattr(value, "read") else value for key, value in row.items()})
        for number, row in rows
    ]
    assert read == [
        (1, {"id": "p/000", "video": b"first video", "conversations": [], "source": "x"}),
        (2, {"id": "p/001", "video": b"second", "caption": "A dög"}),
        (3, {"id": "p/002", "image": b"image", "caption": "A cat"}),
        (4, {"id": "p/003", "pth": "p/003.pth"}),
        (5, {"id": f"p/{'n' * 90}", "video": b"long name"}),
    ]
    assert rows[0][1]["video"].file_name.endswith(".mp4")


def test_a_damaged_tar_ends_with_a_reason(tmp_path):
    members = {f"{i:03d}.{suffix}": b"x" * 600 for i in range(4) for suffix in ("mp4", "txt")}
    tar(tmp_path / "rows.tar", members)
    header = (tmp_path / "rows.tar").read_bytes()
    data = bytearray(header)
    data[3 * 1536 + 148 : 3 * 1536 + 156] = b"garbage!"  # the checksum of the fourth header
    for content, reason in {
        bytes(data): "is damaged at byte 4608",
        header[: 7 * 1536 + 700]: "is cut off within '003.txt'|unexpected end of data",
        header[: 6 * 1536 + 100]: "is damaged at byte|unexpected end",
        gzip.compress(header): "is not a tar, or a packed or damaged one",
        b"": "is not a tar",
    }.items():
        (tmp_path / "rows.tar").write_bytes(content)
        with pytest.raises(BadRow, match=reason):
            tar_rows(str(tmp_path / "rows.tar"))


def test_a_tar_whose_headers_lie_costs_no_memory(tmp_path):
    info = tarfile.TarInfo("x" * 20)
    info.type, info.size = tarfile.XHDTYPE, 2**33
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    for header in (info, long_name):
        (tmp_path / "rows.tar").write_bytes(header.tobuf() + bytes(10_000))
        with pytest.raises(BadRow, match=r"a header of 8589934592 bytes|cut off|damaged"):
            tar_rows(str(tmp_path / "rows.tar"))


def test_texts_of_a_tar_are_limited_and_two_values_are_refused(tmp_path):
    members = {
        "a.mp4": b"v", "a.txt": b"x" * (MAX_ROW_BYTES + 1), "b.mp4": b"v", "b.json": b'{"caption": "A"}', "b.txt": b"B",
        "c.mp4": b"v", "c.webm": b"w", "d.mp4": b"v", "d.json": b"[]", "e.txt": b"\xff",
    }  # fmt: skip
    reasons = [str(row) for _, row in tar_rows(tar(tmp_path / "rows.tar", members))]
    assert reasons == [
        f"has {MAX_ROW_BYTES + 1} bytes, of at most {MAX_ROW_BYTES}",
        "'b' has two values of 'caption'",
        "'c' has two values of 'video'",
        "its .json is not an object",
        "its text is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
    ]
