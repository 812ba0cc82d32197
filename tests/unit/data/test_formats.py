import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from crosslmm.data.manifest import BadManifest, Manifest
from tests.support.common import conversation

ROWS = [
    {"id": "a", "video": "clips/a.mp4", "messages": conversation("What?", "Red.")},
    {"id": "b", "messages": conversation("And?", "No video.", video=False), "kind": "text"},
]
LLAVA = [
    {
        "id": 7,
        "video": "clips/a.mp4",
        "data_source": "somewhere",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "Red."},
            {"from": "human", "value": "And then?"},
            {"from": "gpt", "value": "Blue."},
        ],
    },
    {
        "video": "/elsewhere/b.mp4",
        "conversations": [{"from": "human", "value": "Look: <video> What?"}, {"from": "gpt", "value": "Red."}],
    },
    {"conversations": [{"from": "human", "value": "What is <video>?"}, {"from": "gpt", "value": "A tag."}]},
    {"image": "c.jpg", "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]},
]


def fields_of(rows):
    return [(row["id"], row["videos"], row["kind"], row["messages"]) for row in rows]


@pytest.fixture
def jsonl(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Manifest(str(tmp_path / "rows.jsonl"))


def parts(content):
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


@pytest.mark.parametrize("as_json", [False, True])
def test_parquet_and_jsonl_give_the_same_rows(tmp_path, jsonl, as_json):
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
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    assert fields_of(Manifest(str(tmp_path / "rows.parquet")).rows) == fields_of(jsonl.rows)


def test_llava_rows_are_converted(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(LLAVA))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LLAVA))
    first, second, third, fourth = fields_of(Manifest(str(tmp_path / "rows.json"), ["/elsewhere"]).rows)
    assert fields_of(Manifest(str(tmp_path / "rows.jsonl"), ["/elsewhere"]).rows) == [first, second, third, fourth]
    text = {"type": "text", "text": "What?"}
    assert first[:2] == ("7", [f"{tmp_path}/clips/a.mp4"])
    assert first[3] == [
        {"role": "user", "content": [{"type": "video"}, text]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "Blue."},
    ]
    assert second[:2] == ("2", ["/elsewhere/b.mp4"])
    assert second[3][0]["content"] == [{"type": "text", "text": "Look:"}, {"type": "video"}, text]
    assert third[1] == []
    assert third[3][0]["content"] == "What is <video>?"
    pair = {"image": ["x.jpg", "y.jpg"], "video": None, "conversations": [
        {"from": "human", "value": "<image>Before\n<image> after?"}, {"from": "gpt", "value": "No."}
    ]}  # fmt: skip
    (tmp_path / "pair.json").write_text(json.dumps([pair]))
    (two,) = fields_of(Manifest(str(tmp_path / "pair.json")).rows)
    assert two[1] == [f"{tmp_path}/x.jpg", f"{tmp_path}/y.jpg"]
    assert [part["type"] for part in two[3][0]["content"]] == ["image", "text", "image", "text"]
    assert fourth[1] == [f"{tmp_path}/c.jpg"]
    assert fourth[3][0]["content"] == [{"type": "image", "image": "c.jpg"}, text]


def test_folder_rows_are_its_videos_with_sidecars(tmp_path):
    for name in ("b/two.mp4", "a.webm", "alone.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"video")
    (tmp_path / "a.json").write_text(json.dumps({"messages": conversation("What?", "Red.")}))
    (tmp_path / "b/two.json").write_text(json.dumps({"conversations": LLAVA[1]["conversations"]}))
    rows = fields_of(Manifest(str(tmp_path)).rows)
    assert [(row[0], row[1]) for row in rows] == [
        ("a", [f"{tmp_path}/a.webm"]),
        ("b/two", [f"{tmp_path}/b/two.mp4"]),
    ]
    assert rows[0][3][1]["content"] == "Red."


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.json", "{}", "cannot be read: BadRow: a .json manifest is a list of objects"),
        ("rows.json", "[", "cannot be read: JSONDecodeError"),
        ("rows.parquet", "no parquet", "cannot be read: BadParquet: not a Parquet file"),
        ("rows.json", '[{"conversations": [{"from": "nobody", "value": "x"}]}]', "line 1: a turn of conversations is"),
        ("rows.json", '[{"conversations": []}]', "line 1: messages: List should have at least 1 item"),
        ("rows.json", "[3]", "line 1: Input should be an object"),
    ],
)
def test_unknown_format_is_refused_with_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(BadManifest, match=reason):
        Manifest(str(tmp_path / name))


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


@pytest.mark.parametrize(
    ("messages", "message"), [("{broken", "line 1: messages: Invalid JSON"), ('["hello"]', "line 1: messages")]
)
def test_malformed_parquet_row_is_named(tmp_path, messages, message):
    table = pa.table({"id": ["a"], "messages": [messages]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(BadManifest, match=message):
        Manifest(str(tmp_path / "rows.parquet"))
