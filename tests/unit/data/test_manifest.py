import json

import pytest

from crosslmm.data.manifest import BadManifest, Manifest

VIDEO_QUESTION = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What is it?"}]}
TEXT_QUESTION = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "red"}


def row(**changes):
    return json.dumps({"id": "a", "video": "clip.mp4", "messages": [VIDEO_QUESTION, ANSWER]} | changes)


@pytest.fixture
def read(tmp_path):
    def read(*lines, roots=()):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))
        return Manifest(str(path), roots)

    return read


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "b", ', "Invalid JSON"),
        ("[1, 2]", r"is \[1, 2\], and should be an object"),
        (row(id="b", extra=1), "the key 'extra' is not known"),
        (row(id="b", messages=[{**VIDEO_QUESTION, "name": "x"}, ANSWER]), "message 1: the key 'name' is not known"),
        (row(id="b", messages=[{"role": "robot", "content": ""}]), "message 1: role is 'robot'"),
        (row(id="b", messages=[TEXT_QUESTION, ANSWER]), "the messages have no <video>, and the row names 1 video"),
        (
            row(id="b", messages=[VIDEO_QUESTION, VIDEO_QUESTION, ANSWER]),
            "the messages have 2 <video>, and the row names 1 video",
        ),
        (row(id="b", video=None), "the messages have 1 <video>, and the row names no video"),
        (row(id="b", messages=[VIDEO_QUESTION]), "there is no message of the assistant"),
        (row(id="b", messages=[]), r"messages is \[\], and should be a list with at least one element"),
        (row(id="b", **{"k\x1b\n": 1}), r"the key 'k\\x1b\\n' is not known"),
        (row(id="b", messages=[ANSWER, VIDEO_QUESTION, ANSWER]), "the assistant speaks first"),
        (row(id="b", messages=[TEXT_QUESTION, ANSWER, VIDEO_QUESTION]), "a video comes after the last answer"),
        (row(id="a"), "id 'a' is also on line 1"),
        (row(id=""), "id is '', and should be text or a whole number"),
        (row(id="b", video="http://host/clip.mp4"), "'http://host/clip.mp4': only local paths, file:// and s3://"),
        (row(id="b", video="file:///a::s3://b"), ".*only local paths"),
        (row(id="b", video=""), "the messages have 1 <video>, and the row names no video"),
        (row(id="b", video="a.mp4#t=9,3"), "'a.mp4#t=9,3': the part ends before it begins|.*#t=9,3': the part ends"),
        (row(id="b", messages=[VIDEO_QUESTION, {**ANSWER, "content": [{"type": "text", "text": 5}]}]), ".*"),
        ('{"id": "b", "conversations": [{"from": ["x"], "value": "y"}]}', ".*"),
        ('{"id": "b", "image": 5, "conversations": []}', ".*"),
        ("[" * 100_000, "maximum recursion depth|Invalid JSON"),
        (row(id="b", kind="\ud800"), ".*surrogates not allowed"),
        (row(id="b", messages=[VIDEO_QUESTION, {**ANSWER, "content": "\ud800"}]), ".*surrogates not allowed"),
    ],
)
def test_malformed_line_is_named_with_reason(read, line, reason):
    with pytest.raises(BadManifest, match=f"rows.jsonl: line 3: {reason}"):
        read(row(), "", line)


def test_an_error_names_the_first_malformed_line_and_has_a_table_of_all_reasons(read, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    bad = [row(id=f"{i}", messages=[TEXT_QUESTION, ANSWER]) for i in range(7)]
    with pytest.raises(BadManifest, match=r"line 2: id is '', and .*; 8 of 9 rows are malformed$") as raised:
        read(row(), row(id=""), *bad)
    assert raised.value.details.splitlines() == [
        "rows  lines               reason",
        "   7  3, 4, 5, 6, 7, ...  the messages have no <video>, and the row names 1",
        "                          video",
        "   1  2                   id is '', and should be text or a whole number",
    ]


@pytest.mark.parametrize("lines", [(), ("", "  ")])
def test_empty_manifest_is_refused(read, lines):
    with pytest.raises(BadManifest, match="is empty"):
        read(*lines)


@pytest.mark.parametrize(("uri", "reason"), [("nonesuch.jsonl", "FileNotFoundError"), ("http://h/r", "BadLocation")])
def test_unreadable_manifest_is_refused(tmp_path, monkeypatch, uri, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadManifest, match=f"{uri}: cannot be read: {reason}"):
        Manifest(uri)


@pytest.mark.parametrize(
    ("video", "resolved"),
    [
        ("clips/a.mp4", "{folder}/clips/a.mp4"),
        ("/elsewhere/a.mp4", "/elsewhere/a.mp4"),
        ("s3://bucket/a.mp4", "s3://bucket/a.mp4"),
        ("file:///elsewhere/a.mp4", "file:///elsewhere/a.mp4"),
    ],
)
def test_video_paths_start_at_the_manifest_folder(read, tmp_path, video, resolved):
    rows = read(row(video=video), roots=["/elsewhere", "s3://bucket"]).rows
    assert rows[0]["videos"] == [resolved.format(folder=tmp_path)]


def test_relative_manifest_path_resolves_its_videos(read, tmp_path, monkeypatch):
    read(row())
    monkeypatch.chdir(tmp_path)
    assert Manifest("rows.jsonl").rows[0]["videos"] == [f"{tmp_path}/clip.mp4"]


def test_row_without_video_keeps_messages_and_kind(read):
    (only,) = read(row(video=None, messages=[TEXT_QUESTION, ANSWER], kind="colour")).rows
    assert (only["videos"], only["messages"], only["kind"]) == ([], [TEXT_QUESTION, ANSWER], "colour")


def test_blank_lines_are_skipped_but_counted(read):
    manifest = read("", row(), "  ", row(id="b"))
    assert [(r["id"], r["line"]) for r in manifest.rows] == [("a", 2), ("b", 4)]
    assert len(manifest) == 2


def test_digest_depends_on_the_content_only(read):
    first, same, other = (read(line).digest for line in (row(), row(), row(id="b")))
    assert first == same != other
