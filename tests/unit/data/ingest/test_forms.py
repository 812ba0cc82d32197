"""Conversion and validation of manifests in other forms: the rows of the direct path, and files for embedded videos."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich
from rich.console import Console

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.ingest import convert as conversion
from crosslmm.data.ingest import ray_tasks
from crosslmm.data.ingest.plan import OUTPUT_FILES
from crosslmm.data.ingest.report import print_validated
from crosslmm.data.manifest import Manifest
from crosslmm.data.samples.clips import encode_clip
from crosslmm.data.video.decode import decode_video

CLIPS = [encode_clip(np.full((4 + 4 * i, 32, 48, 3), 60 * i, np.uint8)) for i in range(3)]  # of 1, 2 and 3 s


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    """Tasks run here, one after another."""

    def run(function, calls, memory_gib=0.0):
        for key, arguments in calls.items():
            yield key, function(*arguments)

    monkeypatch.setattr(ray_tasks, "run_tasks", run)


def convert(uri, target, probe=False, chunk_bytes=400, **options):
    return conversion.convert(str(uri), str(target), probe, False, chunk_bytes, DataConfig(), **options)


def rows(start=0):
    """Rows of many forms, some of them without an id."""
    for i in range(start, start + 20):
        match i % 5:
            case 0:
                turns = [{"from": "human", "value": "<video>?"}, {"from": "gpt", "value": f"{i}"}]
                yield {"id": "same", "video": "a.mp4", "conversations": turns}
            case 1:
                yield {"query": "é <video>?", "response": f"{i}", "videos": ["a.mp4"]}
            case 2:
                yield {"video": "b.mp4", "QA": [{"q": "?", "a": f"{i}"}]}
            case 3:
                part = {"type": "video", "video": ["f/1.jpg", "f/2.jpg"], "fps": 2}
                answer = {"role": "assistant", "content": f"{i}"}
                yield {"id": i, "messages": [{"role": "user", "content": [part]}, answer]}
            case 4:
                yield {"video": "a.mp4", "caption": f"{i}"}


def write(path, name):
    """Write the rows into one kind of manifest; return its URI."""
    text = "".join(json.dumps(row) + "\n" for row in rows())
    uri = path / name
    match name:
        case "rows.json":
            uri.write_text(json.dumps(list(rows())))
        case "rows.jsonl":
            uri.write_text(text.replace("\n", "\r\n\r\n"))
        case "rows.jsonl.gz":
            uri.write_bytes(gzip.compress(text.replace("\n", "\n\n").encode("utf-16")))
        case "rows.csv":
            uri.write_text("".join(["file_name,text\n", *(f'{i}.mp4,"one\nof {i}"\n' for i in range(20))]))
        case "rows-*.jsonl":
            for i in range(3):
                lines = [json.dumps(row) + "\n" for row in rows(20 * i)]
                (path / f"rows-{i}.jsonl").write_text("".join(["\n", *lines]))
        case "rows-*.parquet":
            for i in range(3):
                table = pa.table({"video": [f"{i}{j}.mp4" for j in range(8)], "caption": [f"{i}{j}" for j in range(8)]})
                pq.write_table(table, path / f"rows-{i}.parquet", row_group_size=3)
    return str(uri)


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows-*.jsonl", "rows-*.parquet"]
)
def test_a_converted_manifest_has_the_rows_of_the_direct_one(tmp_path, name):
    uri = write(tmp_path, name)
    result = convert(uri, tmp_path / "out")
    direct, prepared = Manifest(uri), Manifest(str(tmp_path / "out"), [str(tmp_path)])
    assert result["parts"] > 1
    assert len(direct) >= 20
    assert [{**row, "manifest": ""} for row in prepared.rows] == [{**row, "manifest": ""} for row in direct.rows]
    assert len({row["id"] for row in direct.rows} - {"same"}) == len([r for r in direct.rows if r["id"] != "same"])


def embedded(path):
    """Write the clips into a table of Hugging Face, with an image and a clip that occurs twice."""
    video = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"video": video, "question": pa.string(), "answer": pa.string()})
    table = [
        {"video": {"bytes": CLIPS[i % 3], "path": f"{i}.mp4"}, "question": "Which?", "answer": f"{i}"} for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(table, schema), path / "rows.parquet", row_group_size=2)
    return path / "rows.parquet"


def tars(path):
    """Write the clips into two tars."""
    for shard in range(2):
        with tarfile.open(path / f"rows-{shard}.tar", "w") as file:
            for i in range(2):
                turns = [{"from": "human", "value": "<video>Which?"}, {"from": "gpt", "value": f"{2 * shard + i}"}]
                row = {"conversations": turns, "url": "https://x"}
                for suffix, data in (("mp4", CLIPS[(2 * shard + i) % 3]), ("json", json.dumps(row).encode())):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
    return path / "rows-*.tar"


@pytest.mark.parametrize("make", [embedded, tars])
def test_videos_that_the_manifest_holds_become_files_of_the_folder(tmp_path, make):
    uri = make(tmp_path)
    result = convert(uri, tmp_path / "out", probe=True)
    assert (result["rows"], result["videos"], result["codecs"]) == (4, result["videos"], {"h264": result["videos"]})
    manifest = Manifest(str(tmp_path / "out"))
    assert [row["messages"][-1]["content"] for row in manifest.rows] == ["0", "1", "2", "3"]
    assert [row["line"] for row in manifest.rows] == [1, 2, 3, 4]
    lengths = [reference.seconds for _, reference in manifest.videos()]
    assert lengths == [1.0, 2.0, 3.0, 1.0]
    data = DataConfig(num_frames=2, roots=manifest.roots)
    for row, colour in zip(manifest.rows, [0, 60, 120, 0], strict=True):
        (video,) = row["videos"]
        assert video.startswith(f"{tmp_path}/out/media/")
        assert abs(int(decode_video(video, data, 16).images.mean()) - colour) < 4
    if make is embedded:
        assert len(list((tmp_path / "out/media").glob("*/*.mp4"))) == 3  # the clip that occurs twice is written once
    written = [name for name in storage.names_in(str(tmp_path / "out")) if not name.startswith("owners/")]
    assert all(map(OUTPUT_FILES.fullmatch, written))
    # The folder can be moved: videos are named relative to it.
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "rows.parquet").unlink(missing_ok=True)
    assert all(os.path.exists(row["videos"][0]) for row in Manifest(str(tmp_path / "moved")).rows)  # noqa: PTH110


def test_an_embedded_video_that_is_damaged_waits_like_another_one(tmp_path):
    table = pa.table({"video": [CLIPS[0], b"no video"], "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    result = convert(tmp_path / "rows.parquet", tmp_path / "out", probe=True)
    assert (result["rows"], result["quarantined"]) == (1, 1)


@pytest.mark.parametrize("make", [embedded, tars])
def test_validation_writes_no_video(tmp_path, make):
    before = storage.names_in(str(tmp_path))
    uri = make(tmp_path)
    after = storage.names_in(str(tmp_path))
    total = conversion.validate(str(uri), True, None, DataConfig())
    assert (total.rows, total.videos, total.rejected) == (4, 0, 0)
    assert storage.names_in(str(tmp_path)) == after != before


def test_ignored_keys_are_ignored_and_belong_to_the_plan(tmp_path):
    (tmp_path / "rows.csv").write_text("video,caption,aesthetic score\na.mp4,A dog,4.5\n")
    with pytest.raises(ray_tasks.IngestError, match=r"the key 'aesthetic score' is not known here; .* --ignore_keys"):
        convert(tmp_path / "rows.csv", tmp_path / "out")
    result = convert(tmp_path / "rows.csv", tmp_path / "out", ignored_keys=["aesthetic score"])
    assert result["rows"] == 1


SCREEN = """\
2 rows: conversations (LLaVA)
1 row: messages whose parts name their videos (this project, OpenAI, Qwen)

line 1, id a
  video 1              {folder}/a.mp4, 4 frames spread evenly
  system               Be brief.
  user                 <video 1> What?
  assistant (learned)  Red.

line 2, id {made}
  image 1              {folder}/b.png, one frame
  user                 <image 1> What?
  assistant (learned)  A [red] one.

line 3, id c, kind order
  video 1              {folder}/f/1.jpg and the frames after it, 2 s: the frames at 0.25, 0.75, 1.25, 1.75 s
  user                 <video 1> Which came first?
  assistant (learned)  Blue.
note: nframes is not used (1 row): data.sampling, data.num_frames and data.fps choose the frames of all videos
note: no video was opened; --probe true reads the header of each

malformed: 2 rows
rows  lines  reason
   2  4, 5   the messages have 1 <video>, and the row names no video; to keep
             these characters as text, write the message as a part: {{"type":
             "text", "text": ...}}
"""


def human(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_validate_shows_what_the_model_will_see(tmp_path, monkeypatch):
    frames = {"type": "video", "video": [f"f/{i}.jpg" for i in range(1, 5)], "fps": 2, "nframes": 4}
    manifest = [
        {"id": "a", "video": "a.mp4", "system": "Be brief.", "conversations": human("<image>\nWhat?", "Red.")},
        {"image": "b.png", "conversations": human("<image>What?", "A [red] one.")},
        {"id": "c", "kind": "order", "messages": [
            {"role": "user", "content": [frames, {"type": "text", "text": "Which came first?"}]},
            {"role": "assistant", "content": "Blue."},
        ]},
        {"conversations": human("<video>What?", "Red.")},
        {"conversations": human("<video>What?", "Blue.")},
    ]  # fmt: skip
    uri = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in manifest))
    data = DataConfig(num_frames=4)
    total = conversion.validate(uri, False, None, data)
    screen = io.StringIO()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=screen, width=200, highlight=False))
    print_validated(uri, total, False, data)
    printed = [line.rstrip() for line in screen.getvalue().splitlines()]
    made = next(row["id"] for row in total.previews if row["line"] == 2)
    assert made.endswith("/rows.jsonl:2")
    assert printed == SCREEN.format(folder=tmp_path, made=made).splitlines()


def test_probed_videos_are_shown_with_the_moments_of_their_frames(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(CLIPS[1])
    row = {"id": "a", "video": "a.mp4#t=0.5", "conversations": human("<video>What?", "x" * 400)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = DataConfig(num_frames=8)
    total = conversion.validate(str(tmp_path / "rows.jsonl"), True, None, data)
    screen = io.StringIO()
    monkeypatch.setattr(rich, "get_console", lambda: Console(file=screen, width=200, highlight=False))
    print_validated("rows.jsonl", total, True, data)
    text = screen.getvalue()
    assert "a.mp4#t=0.5, 1.5 s: the frames at 0.09, 0.28, 0.47, 0.66, 0.84, ..., 1.41 s (8 moments)" in text
    assert "each after its time" not in text
    print_validated("rows.jsonl", total, True, data.model_copy(update={"timestamps": True}))
    assert '1.41 s (8 moments), each after its time: "<12.0 seconds>"' in " ".join(screen.getvalue().split())
    assert f"{'x' * 100}" in text
    assert "x... (400 characters)" in text.replace("\n", "")
    assert "no video was opened" not in text
