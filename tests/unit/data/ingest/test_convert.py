"""What the driver decides, with its tasks called one after the other in this process."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.ingest import convert as conversion
from crosslmm.data.ingest.ray_tasks import NotPrepared
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.data.samples.clips import encode_clip
from tests.support.common import ROOT, conversation


class Tasks:
    """Stands where Ray is: counts, and breaks off after so many calls of a function."""

    def __init__(self):
        self.called, self.last = [], None

    def __call__(self, function, calls, waited=lambda: None):
        for key, arguments in calls.items():
            if self.last is not None and self.called.count("convert_piece") >= self.last:
                raise KeyboardInterrupt
            self.called.append(function.__name__)
            waited()
            yield key, function(*arguments)


@pytest.fixture
def tasks(monkeypatch):
    tasks = Tasks()
    monkeypatch.setattr(conversion, "on_ray", tasks)
    return tasks


@pytest.fixture
def convert(tasks, tmp_path):
    """Of rows.jsonl, in small pieces -> what is said last, and all that was said before."""

    def convert(name="rows.jsonl", skip_bad=False, probe=False, piece_bytes=1000, **limits):
        text, tasks.called = io.StringIO(), []
        console = Console(file=text, width=200)
        folder = str(tmp_path / "out")
        data = DataConfig(**limits)
        said = conversion.convert(str(tmp_path / name), folder, probe, skip_bad, piece_bytes, data, console)
        return said, text.getvalue()

    return convert


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def text(name):
    return {"id": f"{name}", "messages": conversation("What?", f"{name}", video=False)}


def ids(tmp_path):
    return [row["id"] for row in Manifest(str(tmp_path / "out")).rows]


def test_what_is_done_is_not_done_again(convert, tasks, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    tasks.last = 2
    with pytest.raises(KeyboardInterrupt):
        convert()
    with pytest.raises(BadManifest, match="is empty"):  # without the seal it is none
        Manifest(str(tmp_path / "out"))
    tasks.last = None
    said, output = convert()
    pieces = said["parts"]
    assert "going on: 2 of" in output
    assert tasks.called.count("convert_piece") == pieces - 2
    assert ids(tmp_path) == [f"{i}" for i in range(50)]
    again, output = convert()
    assert "prepared already" in output
    assert tasks.called == []
    assert (again["rows"], again["parts"]) == (50, pieces)


def test_a_manifest_that_has_changed_is_begun_anew_and_one_that_was_touched_is_not(convert, tasks, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    convert()
    (tmp_path / "rows.jsonl").touch()
    _, output = convert()
    assert "prepared already" in output
    assert set(tasks.called) == {"settle"}
    (tmp_path / "out" / "clip.mp4").write_bytes(b"somebody's")
    write(tmp_path / "rows.jsonl", map(text, range(20, 40)))
    tasks.last = 1
    with pytest.raises(KeyboardInterrupt):
        convert()
    with pytest.raises(BadManifest):  # the old seal went first
        Manifest(str(tmp_path / "out"))
    tasks.last = None
    convert()
    assert ids(tmp_path) == [f"{i}" for i in range(20, 40)]
    assert (tmp_path / "out" / "clip.mp4").exists()
    with pytest.raises(BadConfig, match=r"out: is finished, from another manifest or with other settings"):
        convert(piece_bytes=2000)
    assert ids(tmp_path) == [f"{i}" for i in range(20, 40)]


def test_malformed_rows_and_ids_of_other_pieces_are_named_or_left_out(convert, tmp_path):
    rows = [*map(text, range(30)), "{", *map(text, range(100, 130)), text(3), text(129)]
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        NotPrepared, match=r"3 rows are malformed: line 31: Invalid JSON.*; line 62: .* on line 4; "
    ) as no:
        convert()
    assert str(no.value).endswith(f"all are in {tmp_path}/out/rejected.jsonl; --skip_bad true leaves them out")
    assert [json.loads(line)["line"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()] == [
        31,
        62,
        63,
    ]
    said, output = convert(skip_bad=True)
    assert "going on" in output
    assert (said["rows"], said["rejected"]) == (60, 3)
    assert ids(tmp_path) == [f"{i}" for i in [*range(30), *range(100, 130)]]
    assert [json.loads(line)["line"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()] == [
        31,
        62,
        63,
    ]


def test_a_json_list_is_cut_and_read_like_lines(convert, tasks, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([text(i) for i in range(50)]))
    said, _ = convert("rows.json")
    assert said["parts"] == tasks.called.count("convert_piece") > 2
    assert Manifest(str(tmp_path / "out")).rows == [
        {**row, "manifest": str(tmp_path / "out")} for row in Manifest(str(tmp_path / "rows.json")).rows
    ]


def test_too_many_videos_that_cannot_be_read_stop_it_with_their_reasons(convert, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(encode_clip(np.zeros((4, 32, 32, 3), np.uint8)))
    rows = [{"id": f"{i}", "video": "no.mp4" if i % 2 else "clip.mp4", "messages": conversation("?", "!")}
            for i in range(20)]  # fmt: skip
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        TooManyUnreadable, match=r"rows\.jsonl: \d videos could not .*data\.bad_allowed 5: \d x read: no such"
    ):
        convert(probe=True, bad_allowed=5)
    said, _ = convert(probe=True, bad_allowed=10)
    assert (said["rows"], said["quarantined"], said["codecs"]) == (10, 10, {"h264": said["videos"]})
    ledger = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in ledger] == list(range(2, 21, 2))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("none.jsonl", BadManifest, r"none\.jsonl: cannot be read: FileNotFoundError"),
        ("blank.jsonl", BadManifest, r"blank\.jsonl: is empty"),
        ("empty.jsonl", BadManifest, r"empty\.jsonl: is empty"),
        ("rows.parquet", BadManifest, r"rows\.parquet: cannot be read: ArrowInvalid"),
        ("rows.json", BadManifest, r"rows\.json: cannot be read: BadRow: a \.json manifest is a list"),
        ("bad.jsonl", NotPrepared, r"no row is left: 1 are malformed"),
    ],
)
def test_what_is_no_manifest_is_refused_with_its_name(convert, tmp_path, name, error, says):
    contents = {"blank.jsonl": "\n \n", "empty.jsonl": "", "rows.parquet": "no", "rows.json": "{}", "bad.jsonl": "{"}
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(error, match=says):
        convert(name, skip_bad=True)


def test_a_folder_of_somebody_else_s_is_left_alone(convert, tmp_path):
    write(tmp_path / "rows.jsonl", [text(1)])
    storage.write_bytes(str(tmp_path / "out/mine.txt"), b"mine")
    with pytest.raises(BadConfig, match="out: is not empty, and no earlier call began it"):
        convert()


def run(*arguments):
    command = [sys.executable, ROOT / "jobs" / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_job_refuses_in_one_line_and_explains_itself(tmp_path):
    done = run("convert", tmp_path / "none.jsonl", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*none\.jsonl: cannot be read: FileNotFoundError.*\n", done.stderr)
    done = run("convert", tmp_path / "none.jsonl", tmp_path / "out", "--data.bad_allowed=-1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data.bad_allowed" in done.stderr
    done = run("requeue", "--help")
    assert done.returncode == 0
    assert "--data.decode_timeout_s" in done.stdout


def test_the_job_writes_a_sample_set(tmp_path):
    done = run("sample", tmp_path, "--train", "4", "--held_out", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(Manifest(str(tmp_path / "train.jsonl"))) == 4
