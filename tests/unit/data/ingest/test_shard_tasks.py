import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.ingest.check_rows import IngestJob, check_chunk, find_duplicates
from crosslmm.data.ingest.plan import OUTPUT_FILES
from crosslmm.data.ingest.retry_unreadable import retry_entries, retry_waiting
from crosslmm.data.ingest.shard_tasks import convert_chunk, drop_rows
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.ingest.summary import Summary, parse_summary
from crosslmm.data.manifest import BadManifest
from crosslmm.data.samples.clips import encode_clip
from tests.support.common import conversation


def jsonl(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return Chunk(str(path), "lines", 0, path.stat().st_size, 1, len(lines))


def text(name):
    return {"id": name, "messages": conversation("?", name, video=False)}


def clip(name, uri):
    return {"id": name, "video": uri, "messages": conversation("?", name)}


def job(tmp_path, probe=False, **limits):
    data = DataConfig(roots=[str(tmp_path)], **limits)
    return IngestJob(str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "plan", probe, data)


def read(target, name):
    return pq.read_table(storage.join(target, name))


@pytest.fixture
def video(tmp_path):
    """A video of 3 s."""
    (tmp_path / "clip.mp4").write_bytes(encode_clip(np.zeros((12, 32, 32, 3), np.uint8)))
    return tmp_path / "clip.mp4"


def test_parts_have_a_maximum_size_and_keep_the_order(tmp_path):
    chunk = jsonl(tmp_path / "rows.jsonl", [text(f"{i}") for i in range(20)])
    summary = convert_chunk(job(tmp_path), 3, chunk, part_rows=7, batch_rows=5)
    assert [part["name"] for part in summary.parts] == [
        "part-03000.parquet",
        "part-03001.parquet",
        "part-03002.parquet",
    ]
    assert [part["rows"] for part in summary.parts] == [7, 7, 6]
    ids = [name for part in summary.parts for name in read(str(tmp_path / "out"), part["name"])["id"].to_pylist()]
    assert ids == [f"{i}" for i in range(20)]
    written = json.loads(storage.read_bytes(str(tmp_path / "out/pieces/00003.json")))
    assert Summary(**written) == summary


def test_all_output_files_are_recognised(tmp_path, video):
    chunk = jsonl(tmp_path / "rows.jsonl", [clip("a", "clip.mp4"), clip("b", "gone.mp4"), text("c"), "{"])
    done = convert_chunk(job(tmp_path, probe=True), 0, chunk)
    drop_rows(job(tmp_path), 0, done, [(3, 1)])
    assert all(OUTPUT_FILES.fullmatch(name) for name in storage.names_in(str(tmp_path / "out")))
    assert not any(
        OUTPUT_FILES.fullmatch(name) for name in ("clip.mp4", "clips/part-1.parquet", "rows.jsonl", "part-.txt")
    )


def test_durations_are_added_and_unreadable_rows_wait(tmp_path, video):
    rows = [
        clip("whole", "clip.mp4"), clip("part", "clip.mp4#t=1,2.5"), clip("end", "clip.mp4#t=2"),
        clip("gone", "no.mp4"), clip("late", "clip.mp4#t=5,6"), text("words"),
        clip("inside", str(tmp_path / "out/clip.mp4")),
    ]  # fmt: skip
    target = str(tmp_path / "out")
    storage.write_bytes(f"{target}/clip.mp4", video.read_bytes())
    summary = convert_chunk(job(tmp_path, probe=True), 0, jsonl(tmp_path / "rows.jsonl", rows))
    part = read(target, summary.parts[0]["name"])
    assert part["id"].to_pylist() == ["whole", "part", "end", "words", "inside"]
    assert part["seconds"].to_pylist() == [[3.0], [1.5], [1.0], [], [3.0]]
    assert part["videos"].to_pylist()[-1] == ["clip.mp4"]
    assert part["videos"].to_pylist()[1] == [f"{tmp_path}/clip.mp4#t=1,2.5"]
    waiting = read(target, summary.files["waiting"]).to_pylist()
    entries = [json.loads(row["entry"]) for row in waiting]
    assert [(e["id"], e["line"], e["stage"]) for e in entries] == [("gone", 4, "read"), ("late", 5, "check")]
    assert "lasts 3.0 s, and the requested part starts at 5 s" in entries[1]["reason"]
    probes = read(target, summary.files["probes"]).to_pylist()
    assert [(p["video"], p["seconds"], p["width"], p["codec"]) for p in probes] == [
        (f"{tmp_path}/clip.mp4", 3.0, 32, "h264"), ("clip.mp4", 3.0, 32, "h264")
    ]  # fmt: skip
    index = read(target, summary.files["index"])
    assert index["kept"].to_pylist() == [True, True, True, False, False, True, True]
    assert (summary.rows, summary.quarantined, summary.videos, summary.seconds) == (5, 2, 2, 6.0)


def test_reasons_are_counted_by_kind(tmp_path):
    rows = ["{", text("a"), text("a"), text("b"), text("b"), "[", {"id": "\x1b[2J"}]
    summary, hashes, lines = check_chunk(job(tmp_path), jsonl(tmp_path / "rows.jsonl", rows))
    assert (summary.rows, summary.rejected) == (2, 5)
    assert lines.tolist() == [2, 4]
    assert len(set(hashes.tolist())) == 2
    counted = {reason: (count, lines) for count, lines, reason in summary.reasons.values()}
    assert counted["id 'a' is also on line 2"] == (2, [3, 5])
    assert [line for line, _ in summary.named] == [1, 3, 5, 6, 7]
    assert all(reason.isprintable() for _, reason in summary.named)
    total = Summary()
    for _ in range(3):
        total.add(summary)
    assert (total.rejected, len(total.named)) == (15, 5)


def test_duplicate_ids_are_detected_across_chunks():
    hashes = [np.array([5, 9], np.uint64), np.array([], np.uint64), np.array([9, 2**64 - 1, 5, 9], np.uint64)]
    lines = [np.array([1, 3]), np.array([], int), np.array([10, 11, 12, 13])]
    assert find_duplicates(hashes, lines) == {2: [(10, 3), (12, 1), (13, 3)]}
    assert find_duplicates([], []) == find_duplicates(hashes[1:2], lines[1:2]) == {}


def test_dropped_rows_are_removed_from_all_files(tmp_path, video):
    rows = [clip("a", "clip.mp4"), clip("gone", "gone.mp4"), "{", text("c")]
    before = convert_chunk(job(tmp_path, probe=True), 0, jsonl(tmp_path / "rows.jsonl", rows))
    after = drop_rows(job(tmp_path), 0, before, [(1, 0), (2, 0)])
    target = str(tmp_path / "out")
    assert (after.rows, after.quarantined, after.rejected) == (1, 0, 3)
    assert read(target, after.parts[0]["name"])["id"].to_pylist() == ["c"]
    assert read(target, after.files["index"])["line"].to_pylist() == [4]
    assert "waiting" not in after.files
    lines = storage.read_bytes(storage.join(target, after.files["rejected"])).splitlines()
    assert [json.loads(line)["line"] for line in lines] == [1, 2, 3]
    # The files of the old summary are unchanged.
    assert read(target, before.parts[0]["name"]).num_rows == 2


def test_quarantined_videos_are_decoded_again(tmp_path, video):
    def entry(name, uri, **more):
        fields = {"manifest": "m", "line": 1, "id": name, "uri": uri, "version": None, "stage": "read", "reason": "?"}
        return fields | {"attempts": 2, **more}

    (tmp_path / "é.mp4").write_bytes(video.read_bytes())
    rows = [
        entry("good", str(video)), entry("part", f"{video}#t=1,2"), entry("gone", "gone.mp4", split="train"),
        entry("é", f"{tmp_path}/\\xe9.mp4"),
    ]  # fmt: skip
    result = retry_entries(DataConfig(), jsonl(tmp_path / "quarantine.jsonl", rows))
    assert [name for _, _, name in result.readable] == ["good", "part", "\\xe9"]
    assert [json.loads(line) for line in result.entries.splitlines()] == [
        {**rows[2], "reason": "no such file", "attempts": 3}
    ]
    for uri in ("/etc/passwd", "../x.mp4", "s3://other/x.mp4", "http://host/x.mp4"):
        with pytest.raises(
            BadManifest, match=r"quarantine\.jsonl: line 2: .*(lies outside of .*--data\.roots|only local)"
        ):
            retry_entries(DataConfig(), jsonl(tmp_path / "quarantine.jsonl", [rows[0], entry("x", uri)]))
    # Unescaped, this is `..`.
    hidden = [entry("x", "\\x2e\\x2e/clip.mp4")]
    (tmp_path / "runs").mkdir()
    assert not retry_entries(DataConfig(), jsonl(tmp_path / "runs/quarantine.jsonl", hidden)).readable
    elsewhere = jsonl(tmp_path / "runs/quarantine.jsonl", [rows[0]])
    assert len(retry_entries(DataConfig(roots=[str(tmp_path)]), elsewhere).readable) == 1
    with pytest.raises(Exception, match=r"line 1 is not a line of a quarantine\.jsonl"):
        retry_entries(DataConfig(), jsonl(tmp_path / "rows.jsonl", [{"id": "a"}]))


def test_rows_that_the_model_cannot_take_stay_in_the_quarantine(tmp_path):
    """Their videos can be decoded: that is not what is wrong with them."""
    entry = {
        "manifest": "m", "line": 3, "id": "a", "uri": "", "version": None, "stage": "process", "reason": "too long",
        "attempts": 1, "split": "train",
    }  # fmt: skip
    result = retry_entries(DataConfig(), jsonl(tmp_path / "quarantine.jsonl", [entry]))
    assert (result.readable, result.unreadable) == ([], 1)
    assert json.loads(result.entries) == entry


def test_waiting_rows_are_probed_again(tmp_path, video):
    rows = [clip("a", "clip.mp4"), clip("late", "late.mp4"), clip("gone", "gone.mp4")]
    target, settings = str(tmp_path / "out"), job(tmp_path, probe=True)
    name = convert_chunk(settings, 0, jsonl(tmp_path / "rows.jsonl", rows)).files["waiting"]
    nothing = retry_waiting(settings, 1, name)
    assert (nothing.parts, nothing.waiting, nothing.unreadable) == ([], name, 2)
    before = storage.read_bytes(storage.join(target, name))
    (tmp_path / "late.mp4").write_bytes(video.read_bytes())
    some = retry_waiting(settings, 1, name)
    assert some.readable == [(f"{tmp_path}/rows.jsonl", 2, "late")]
    assert read(target, some.parts[0]["name"])["seconds"].to_pylist() == some.lengths["seconds"].to_pylist() == [[3.0]]
    assert [(e["id"], e["attempts"]) for e in map(json.loads, some.entries.splitlines())] == [("gone", 3)]
    assert read(target, some.waiting)["id"].to_pylist() == ["gone"]
    # The current seal names the old file.
    assert storage.read_bytes(storage.join(target, name)) == before


def test_waiting_rows_outside_of_the_roots_are_not_opened(tmp_path, video):
    rows = [clip("a", "clip.mp4"), clip("gone", "gone.mp4")]
    settings = job(tmp_path, probe=True)
    name = convert_chunk(settings, 0, jsonl(tmp_path / "rows.jsonl", rows)).files["waiting"]
    foreign = replace(settings, data=DataConfig(roots=[]))
    with pytest.raises(BadManifest, match=rf"{name}: row 1: '.*gone\.mp4' lies outside of .*/out; add its folder to"):
        retry_waiting(foreign, 1, name)


@pytest.mark.parametrize("name", ["/etc/passwd", "../rows.parquet", "", "pieces/../../rows.parquet"])
def test_waiting_rows_are_read_from_the_folder_only(tmp_path, video, name):
    rows = [clip("a", "clip.mp4"), clip("gone", "gone.mp4")]
    settings = job(tmp_path, probe=True)
    before = convert_chunk(settings, 0, jsonl(tmp_path / "rows.jsonl", rows))
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "out" / before.files["waiting"]).read_bytes())
    with pytest.raises(storage.BadLocation, match="is not a name inside"):
        retry_waiting(settings, 1, name)
    (tmp_path / "out/linked.parquet").symlink_to(tmp_path / "rows.parquet")
    with pytest.raises(storage.LeadsOut):
        retry_waiting(replace(settings, data=DataConfig()), 1, "linked.parquet")


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "."])
def test_a_summary_names_files_of_its_folder_only(tmp_path, video, name):
    rows = [clip("a", "clip.mp4"), "{"]
    summary = convert_chunk(job(tmp_path, probe=True), 0, jsonl(tmp_path / "rows.jsonl", rows))
    assert parse_summary(json.dumps(asdict(summary)).encode(), "/out") == summary
    changed = [
        {"parts": [summary.parts[0] | {"name": name}]},
        *({"files": summary.files | {key: name}} for key in summary.files),
    ]
    for change in changed:
        with pytest.raises(ValueError, match="is not a name inside"):
            parse_summary(json.dumps(asdict(summary) | change).encode(), "/out")
    for change in ({"files": {}}, {"parts": [{}]}, {"reasons": {"a": [1]}}, {"rows": "many"}):
        with pytest.raises(ValueError, match=r".*"):
            parse_summary(json.dumps(asdict(summary) | change).encode(), "/out")
