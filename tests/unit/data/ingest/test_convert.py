"""The driver of a conversion, with its tasks run one after another in this process."""

import contextlib
import json
import logging
import re
import subprocess
import sys

import numpy as np
import pytest

from crosslmm import lease, storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.ingest import convert as conversion
from crosslmm.data.ingest import ray_tasks
from crosslmm.data.ingest.plan import PLAN_FILE, Plan
from crosslmm.data.ingest.ray_tasks import IngestError
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.data.quarantine import TooManyUnreadable
from crosslmm.data.samples.clips import encode_clip
from tests.support.common import ROOT, conversation


class LocalTasks:
    """Stands in for Ray: runs tasks here, records their functions, and stops after `max_chunks` converted chunks."""

    def __init__(self):
        self.called, self.max_chunks = [], None

    def __call__(self, function, calls, memory_gib=0.0):
        for key, arguments in calls.items():
            if self.max_chunks is not None and self.called.count("convert_chunk") >= self.max_chunks:
                raise KeyboardInterrupt
            self.called.append(function.__name__)
            yield key, function(*arguments)


@pytest.fixture
def tasks(monkeypatch):
    tasks = LocalTasks()
    monkeypatch.setattr(ray_tasks, "run_tasks", tasks)
    return tasks


@pytest.fixture
def convert(tasks, tmp_path, caplog):
    """Convert rows.jsonl in small chunks -> result, and the log."""

    def convert(name="rows.jsonl", skip_bad=False, probe=False, chunk_bytes=1000, **limits):
        caplog.clear()
        caplog.set_level(logging.INFO, "crosslmm")
        tasks.called = []
        folder = str(tmp_path / "out")
        result = conversion.convert(str(tmp_path / name), folder, probe, skip_bad, chunk_bytes, DataConfig(**limits))
        return result, "\n".join(caplog.messages)

    return convert


def write(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def text(name):
    return {"id": f"{name}", "messages": conversation("What?", f"{name}", video=False)}


def ids(tmp_path):
    return [row["id"] for row in Manifest(str(tmp_path / "out")).rows]


def test_a_stopped_conversion_resumes(convert, tasks, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    tasks.max_chunks = 2
    with pytest.raises(KeyboardInterrupt):
        convert()
    with pytest.raises(BadManifest, match="is a conversion that has not finished"):  # it has no seal yet
        Manifest(str(tmp_path / "out"))
    tasks.max_chunks = None
    result, output = convert()
    chunks = result["parts"]
    assert "resuming: 2 of" in output
    assert tasks.called.count("convert_chunk") == chunks - 2
    assert ids(tmp_path) == [f"{i}" for i in range(50)]
    again, output = convert()
    assert "already prepared" in output
    assert tasks.called == []
    assert (again["rows"], again["parts"]) == (50, chunks)


def change(path, update):
    content = json.loads(path.read_text())
    update(content)
    path.write_text(json.dumps(content))


def test_a_summary_that_cannot_be_used_is_made_again(convert, tasks, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    tasks.max_chunks = 3
    with pytest.raises(KeyboardInterrupt):
        convert()
    tasks.max_chunks = None
    pieces = tmp_path / "out/pieces"
    change(pieces / "00000.json", lambda summary: summary["files"].update(index="../../secret.parquet"))
    (pieces / "00001.json").write_text("[" * 100_000)
    (tmp_path / "summary.json").write_bytes((pieces / "00002.json").read_bytes())
    (pieces / "00002.json").unlink()
    (pieces / "00002.json").symlink_to("../../summary.json")
    result, output = convert()
    assert "pieces/00000.json is ignored: '../../secret.parquet' is not a name inside" in output
    assert "pieces/00001.json is ignored: nested too deep" in output
    assert "pieces/00002.json is ignored: " in output
    assert "a link leads out of its folder" in output
    assert tasks.called.count("convert_chunk") == result["parts"]
    assert ids(tmp_path) == [f"{i}" for i in range(50)]


@pytest.mark.parametrize("uri", ["/etc/passwd", "s3://other/rows.jsonl", "{out}/pieces/../../secret.jsonl", "{out}/x"])
def test_a_plan_names_the_manifest_and_its_pieces_only(convert, tasks, tmp_path, uri):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    tasks.max_chunks = 1
    with pytest.raises(KeyboardInterrupt):
        convert()
    tasks.max_chunks = None
    plan = tmp_path / "out/pieces/plan.json"
    change(plan, lambda plan: plan["pieces"][1].update(uri=uri.format(out=tmp_path / "out")))
    with pytest.raises(
        BadConfig, match=r"out: pieces/plan\.json cannot be used: .*lies outside of.*; give another folder"
    ):
        convert()
    for content in ("[]", "{}", "[" * 100_000, '{"asked": {}, "stamp": [], "pieces": [{"uri": 3}]}'):
        plan.write_text(content)
        with pytest.raises(BadConfig, match=r"out: pieces/plan\.json cannot be used"):
            convert()
    plan.unlink()
    plan.mkdir()
    with pytest.raises(BadConfig, match=r"out: pieces/plan\.json cannot be used: .*Is a directory"):
        convert()


def test_a_lost_file_of_an_earlier_call_is_named(convert, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    convert()
    (tmp_path / "out/_prepared.json").unlink()
    (tmp_path / "out/pieces/00001.parquet").write_bytes(b"no Parquet")
    with pytest.raises(BadConfig, match=r"out: a file of an earlier call is lost or damaged: BadParquet: pieces/00001"):
        convert()
    (tmp_path / "out/pieces/00001.parquet").unlink()
    with pytest.raises(BadConfig, match=r"lost or damaged: FileNotFoundError: .*00001\.parquet.*; give another folder"):
        convert()


def test_only_a_changed_manifest_is_converted_again(convert, tasks, tmp_path):
    write(tmp_path / "rows.jsonl", map(text, range(50)))
    convert()
    (tmp_path / "rows.jsonl").touch()
    _, output = convert()
    assert "already prepared" in output
    assert set(tasks.called) == {"align_to_lines"}
    (tmp_path / "out" / "clip.mp4").write_bytes(b"not ours")
    write(tmp_path / "rows.jsonl", map(text, range(20, 40)))
    tasks.max_chunks = 1
    with pytest.raises(KeyboardInterrupt):
        convert()
    with pytest.raises(BadManifest):  # the old seal was removed first
        Manifest(str(tmp_path / "out"))
    tasks.max_chunks = None
    convert()
    assert ids(tmp_path) == [f"{i}" for i in range(20, 40)]
    assert (tmp_path / "out" / "clip.mp4").exists()
    with pytest.raises(BadConfig, match=r"out: was converted from another manifest or with other settings"):
        convert(chunk_bytes=2000)
    assert ids(tmp_path) == [f"{i}" for i in range(20, 40)]


def test_malformed_and_duplicate_rows_are_reported_or_skipped(convert, tmp_path):
    rows = [*map(text, range(30)), "{", *map(text, range(100, 130)), text(3), text(129)]
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        IngestError, match=r"line 31: Invalid JSON: .*; 3 of 65 rows are malformed; all are in "
    ) as raised:
        convert()
    assert re.search(r"2  62, 63  its id is also on line 4\n", f"{raised.value.details}\n")
    assert str(raised.value).endswith(f"all are in {tmp_path}/out/rejected.jsonl; --skip_bad true leaves them out")
    assert [json.loads(line)["line"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()] == [
        31,
        62,
        63,
    ]
    result, output = convert(skip_bad=True)
    assert "resuming" in output
    assert (result["rows"], result["rejected"]) == (60, 3)
    assert ids(tmp_path) == [f"{i}" for i in [*range(30), *range(100, 130)]]
    assert [json.loads(line)["line"] for line in (tmp_path / "out/rejected.jsonl").read_text().splitlines()] == [
        31,
        62,
        63,
    ]


def test_a_json_list_is_split_and_read_like_lines(convert, tasks, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([text(i) for i in range(50)]))
    result, _ = convert("rows.json")
    assert result["parts"] == tasks.called.count("convert_chunk") > 2
    assert Manifest(str(tmp_path / "out")).rows == [
        {**row, "manifest": str(tmp_path / "out")} for row in Manifest(str(tmp_path / "rows.json")).rows
    ]


def test_too_many_unreadable_videos_stop_with_their_reasons(convert, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(encode_clip(np.zeros((4, 32, 32, 3), np.uint8)))
    rows = [{"id": f"{i}", "video": "no.mp4" if i % 2 else "clip.mp4", "messages": conversation("?", "!")}
            for i in range(20)]  # fmt: skip
    write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        TooManyUnreadable, match=r"rows\.jsonl: \d videos could not .*data\.bad_allowed 5: \d x read: no such"
    ):
        convert(probe=True, bad_allowed=5)
    result, _ = convert(probe=True, bad_allowed=10)
    assert (result["rows"], result["quarantined"]) == (10, 10)
    assert result["codecs"] == {"h264": result["videos"]}
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == list(range(2, 21, 2))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("none.jsonl", BadManifest, r"none\.jsonl: cannot be read: FileNotFoundError"),
        ("blank.jsonl", BadManifest, r"blank\.jsonl: is empty"),
        ("empty.jsonl", BadManifest, r"empty\.jsonl: is empty"),
        ("rows.parquet", BadManifest, r"rows\.parquet: cannot be read: BadParquet: not a Parquet file"),
        ("rows.json", BadManifest, r"rows\.json: cannot be read: row 1 of the list: Invalid JSON"),
        ("bad.jsonl", IngestError, r"no row is left: 1 are malformed"),
    ],
)
def test_a_bad_manifest_is_refused_by_name(convert, tmp_path, name, error, message):
    contents = {"blank.jsonl": "\n \n", "empty.jsonl": "", "rows.parquet": "no", "rows.json": "[", "bad.jsonl": "{"}
    for file, content in contents.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(error, match=message):
        convert(name, skip_bad=True)


def test_a_folder_with_other_files_is_refused(convert, tmp_path):
    write(tmp_path / "rows.jsonl", [text(1)])
    storage.write_bytes(str(tmp_path / "out/mine.txt"), b"mine")
    with pytest.raises(BadConfig, match="out: is not empty, and no earlier call started it"):
        convert()


def run(*arguments):
    command = [sys.executable, ROOT / "jobs" / "prepare.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_the_job_reports_errors_in_one_line_and_has_help(tmp_path):
    done = run("convert", tmp_path / "none.jsonl", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: .*none\.jsonl: cannot be read: FileNotFoundError.*\n", done.stderr)
    done = run("convert", tmp_path / "none.jsonl", tmp_path / "out", "--data.bad_allowed=-1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "data.bad_allowed" in done.stderr
    done = run("requeue", "--help")
    assert done.returncode == 0
    assert "--data.decode_timeout_s number" in done.stdout
    assert "python jobs/prepare.py requeue " in done.stdout


def test_the_job_writes_a_sample_set(tmp_path):
    done = run("sample", tmp_path, "--train", "4", "--held_out", "4")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(Manifest(str(tmp_path / "train.jsonl"))) == 4


def test_a_call_that_begins_between_two_checks_of_another_owns_the_folder(convert, tmp_path, monkeypatch):
    """The other is refused by its name, and not told that the folder is somebody else's."""
    write(tmp_path / "rows.jsonl", map(text, range(5)))
    folder = str(tmp_path / "out")
    with contextlib.ExitStack() as owner:

        def begin_after(check):
            def check_and_begin(*arguments):
                result = check(*arguments)
                if not (tmp_path / "out").exists():
                    owner.enter_context(lease.claim(folder, "preparation", "wait").take())
                    storage.write_bytes(storage.join(folder, PLAN_FILE), Plan({}, [], []).to_json())
                return result

            return check_and_begin

        monkeypatch.setattr(conversion, "read_plan", begin_after(conversion.read_plan))
        monkeypatch.setattr(conversion.run_folder, "is_unused", begin_after(conversion.run_folder.is_unused))
        with pytest.raises(lease.FolderInUse, match="belongs to the preparation of"):
            convert()
