"""Every row and every file of the tables in docs/data.md works, and means what is written here."""

import gzip
import io
import json
import re
import shlex
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crosslmm.config import DataConfig
from crosslmm.data.ingest import convert as conversion
from crosslmm.data.ingest import ray_tasks
from crosslmm.data.manifest import BadManifest, Manifest
from tests.support.common import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()


def table(heading):
    """(first cell, code of the second cell) of each row of the table below a heading."""
    section = PAGE.split(f"### {heading}\n")[1].split("\n### ")[0]
    return re.findall(r"^\| ([^|]+) \| `(.*)` \|$", section, re.MULTILINE)


ROWS = table("Forms of rows")
VIDEO, IMAGE = "<video>", "<image>"
RED = [("user", VIDEO, "What?"), ("assistant", "Red.")]
# The videos of each row of the table, and what the model sees and learns.
MEANS = {
    "this project's": (["a.mp4"], RED),
    "this project's, several files": (["a.mp4", "b.png"], [
        ("user", VIDEO, "And this one?", IMAGE), ("assistant", "Red.")
    ]),
    "this project's, frames": (['{"frames":["f/1.jpg","f/2.jpg"],"fps":2.0}'], RED),
    "this project's, frames with times": (['{"frames":["f/1.jpg","f/2.jpg"],"times":[0.0,0.5]}'], RED),
    "LLaVA": (["a.mp4"], RED),
    "LLaVA, lists": (["a.jpg", "b.jpg"], [("user", IMAGE, IMAGE, "Same?"), ("assistant", "No.")]),
    "LLaMA-Factory, ShareGPT": (["a.mp4"], [("system", "Be brief."), *RED]),
    "LLaMA-Factory, Alpaca": (["a.mp4"], [
        ("user", "Hello"), ("assistant", "Hi"), ("user", VIDEO, "What is it?\nIn a word."), ("assistant", "Red.")
    ]),
    "ms-swift, messages": (["a.jpg", "b.mp4"], [
        ("system", "Be brief."), ("user", IMAGE, "Before,", VIDEO, "after?"), ("assistant", "No.")
    ]),
    "ms-swift, query": (["a.mp4"], [
        ("user", VIDEO, "Hello"), ("assistant", "Hi"), ("user", "What is it?"), ("assistant", "Red.")
    ]),
    "ms-swift, pairs": (["a.mp4"], RED),
    "OpenAI, vLLM": (["a.mp4", "b.png"], [("user", VIDEO, IMAGE, "Same?"), ("assistant", "No.")]),
    "Qwen": (["a.mp4#t=2,10.5"], RED),
    "Transformers, TRL": (["a.png", "b.mp4"], [("user", IMAGE, VIDEO, "Same?"), ("assistant", "No.")]),
    "roles in conversations": (["a.mp4"], RED),
    "VideoChat2": (["a.mp4#t=1.5,4"], [
        ("system", "Answer in a word."), *RED, ("user", "And then?"), ("assistant", "Blue.")
    ]),
    "Video-ChatGPT": (["v_abc.mp4"], RED),
    "questions": (["a.mp4"], RED),
    "captions": (["a.mp4"], [("user", VIDEO), ("assistant", "A red square.")]),
    "VideoFolder": (["a.mp4"], [("user", VIDEO), ("assistant", "A red square.")]),
    "WebVid": (["006001_006050/21179416.mp4"], [("user", VIDEO), ("assistant", "A forest")]),
}  # fmt: skip


def seen(row, folder):
    """(videos relative to the folder, conversation) of a row."""
    turns = []
    for message in row["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append((message["role"], *(part.get("text", f"<{part['type']}>") for part in parts)))
    return [video.replace(f"{folder}/", "") for video in row["videos"]], turns


def test_the_table_of_forms_has_no_other_row():
    assert [form for form, _ in ROWS] == list(MEANS)


@pytest.mark.parametrize(("form", "line"), ROWS, ids=[form for form, _ in ROWS])
def test_a_documented_row_means_what_it_says(tmp_path, form, line):
    for name, text in (("rows.jsonl", f"{line}\n"), ("rows.json", f"[{line}]")):
        (tmp_path / name).write_text(text)
        (row,) = Manifest(str(tmp_path / name)).rows
        assert seen(row, tmp_path) == MEANS[form]


ROW = {
    "video": "a.mp4",
    "messages": [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "Red."}],
}
CAPTION = (["a.mp4"], [("user", VIDEO), ("assistant", "A red square.")])


def captions(path, data=None):
    video = {"bytes": data, "path": "a.mp4"} if data else "a.mp4"
    pq.write_table(pa.Table.from_pylist([{"video": video, "caption": "A red square."}]), path)


def shard(path):
    with tarfile.open(path, "w") as file:
        for name, data in (("a.mp4", b"video"), ("a.txt", b"A red square.")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def sidecars(folder):
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"video")
    (folder / "a.json").write_text(json.dumps({"messages": ROW["messages"]}))


def with_metadata(folder):
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\na.mp4,A red square.\n")


def several(path, make):
    path.parent.mkdir()
    make(path.parent / path.name.replace("*", "00000-of-00001"))


# Name in the table, how such a file is made, and what its only row means.
FILES = {
    "train.jsonl": (lambda path: path.write_text(json.dumps(ROW)), (["a.mp4"], RED)),
    "train.json": (lambda path: path.write_text(json.dumps([ROW])), (["a.mp4"], RED)),
    "train.csv": (lambda path: path.write_text("video,caption\na.mp4,A red square.\n"), CAPTION),
    "train.parquet": (captions, CAPTION),
    "data/train-*.parquet": (lambda path: several(path, captions), CAPTION),
    "train.jsonl.gz": (lambda path: path.write_bytes(gzip.compress(json.dumps(ROW).encode())), (["a.mp4"], RED)),
    "clips": (sidecars, (["a.mp4"], RED)),
    "folder": (with_metadata, CAPTION),
    "hub/train-*.parquet": (lambda path: several(path, lambda file: captions(file, b"video")), CAPTION),
    "shards/train-*.tar": (lambda path: several(path, shard), CAPTION),
}
LINES = [shlex.split(line) for _, line in table("Files of rows")]


def test_the_table_of_files_has_no_other_row():
    assert [line[3] if "convert" in line else line[1] for line in LINES] == list(FILES)


@pytest.mark.parametrize("line", LINES, ids=[" ".join(line) for line in LINES])
def test_a_documented_file_is_read(tmp_path, monkeypatch, line):
    """As the line says: directly, or after it was converted."""

    def run(function, calls, memory_gib=0.0):
        for key, arguments in calls.items():
            yield key, function(*arguments)

    monkeypatch.setattr(ray_tasks, "run_tasks", run)
    monkeypatch.chdir(tmp_path)
    name = line[3] if "convert" in line else line[1]
    make, expected = FILES[name]
    make(tmp_path / name)
    if "convert" in line:
        with pytest.raises(BadManifest, match=r"convert"):
            Manifest(name)
        conversion.convert(name, line[4], False, False, None, DataConfig())
        name = line[4]
    (row,) = Manifest(name).rows
    videos, turns = seen(row, tmp_path / ("clips" if name == "clips" else "folder" if name == "folder" else "data"))
    assert turns == expected[1]
    assert len(videos) == 1
    if "convert" in line:
        assert re.fullmatch(rf"{tmp_path}/prepared/media/\w\w/\w+\.mp4", videos[0])
    else:
        assert videos[0].rpartition("/")[2] == "a.mp4"


def test_the_documented_program_writes_a_table(tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.split("### Files of rows")[1].split("\n### ")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    (row,) = Manifest("clips.parquet").rows
    assert seen(row, tmp_path) == (
        ["clips/clip-1.mp4"],
        [("user", VIDEO, "What happens?"), ("assistant", "A dog jumps.")],
    )
