"""jobs/prepare.py end to end: a real cluster, a real object store over HTTP, real videos, and a kill."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
import ray
from s3fs import S3FileSystem

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout, ReadSamples, unpack_block
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples.clips import encode_clip
from tests.support.common import ROOT, conversation

ROWS, CLIPS = 4000, 6
BAD = {2000: "{broken", 3001: json.dumps({"id": "row 1", "messages": conversation("?", "again", video=False)})}
SOURCE, TARGET = "s3://videos/many", "s3://videos/prepared"
# Small chunks, so that the kill comes between two of them.
SMALL_CHUNKS = ("--chunk_bytes", "150000")


def row(i):
    if i in BAD:
        return BAD[i]
    uri = "gone.mp4" if i == 17 else f"clips/{i % CLIPS}.mp4{'#t=0.5,1' if i % 5 == 0 else ''}"
    return json.dumps({"id": f"row {i}", "video": uri, "messages": conversation("What?", f"{i}")})


@pytest.fixture(scope="module")
def manifest(store):
    for i in range(CLIPS):
        storage.write_bytes(f"{SOURCE}/clips/{i}.mp4", clip(4 + 2 * i))
    lines = "".join(f"{row(i)}\n" for i in range(ROWS))
    storage.write_bytes(f"{SOURCE}/rows.jsonl", lines.encode())
    good = "".join(f"{row(i)}\n" for i in range(ROWS) if i not in BAD)
    storage.write_bytes(f"{SOURCE}/good.jsonl", good.encode())
    return f"{SOURCE}/rows.jsonl"


def clip(frames):
    """Return a video with 4 frames per second."""
    return encode_clip(np.full((frames, 48, 64, 3), 90, np.uint8))


def start(cluster, *arguments):
    """Start the job as a driver on the cluster; `ray job submit` takes 3 s longer and gives no process to kill."""
    command = [sys.executable, ROOT / "jobs" / "prepare.py", *arguments]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs_address}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def run(cluster, *arguments):
    job = start(cluster, *arguments)
    output, _ = job.communicate(timeout=120)
    return job.returncode, output


def last_line(output):
    return json.loads(output.splitlines()[-1])


def finished_chunks():
    """Return the modification time of the first part of each chunk that is done."""
    names = [name for name in storage.names_in(f"{TARGET}/pieces") if re.fullmatch(r"\d+\.json", name)]
    fs = S3FileSystem()
    fs.invalidate_cache()
    return {name: fs.info(f"{TARGET}/part-{name[3:5]}000.parquet")["LastModified"] for name in names}


@pytest.fixture(scope="module")
def prepared(cluster, manifest):
    """Kill a conversion after some chunks, resume it to an error about malformed rows, and finish it without them."""
    command = ["convert", manifest, TARGET, *SMALL_CHUNKS]
    job = start(cluster, *command)
    until = time.monotonic() + 60
    while not finished_chunks():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGKILL)
    job.communicate()
    before = finished_chunks()
    refused = run(cluster, *command)
    unsealed = not storage.exists(f"{TARGET}/_prepared.json")
    finished = run(cluster, *command, "--skip_bad", "true")
    return before, refused, unsealed, finished


def test_a_killed_conversion_resumes_and_repeats_nothing(prepared):
    before, (_, refused), _, (_, finished) = prepared
    chunks = len(json.loads(storage.read_bytes(f"{TARGET}/pieces/plan.json"))["pieces"])
    assert 1 <= len(before) < chunks
    resumed = int(refused.split("resuming: ")[1].split(" of ")[0])
    assert len(before) <= resumed < chunks
    assert f"resuming: {chunks} of {chunks} chunks are done" in finished
    after = finished_chunks()
    assert len(after) == chunks
    assert before.items() <= after.items()


def test_malformed_rows_prevent_the_seal_and_are_reported(prepared):
    _, (status, output), unsealed, _ = prepared
    assert status == 1
    assert unsealed
    error = next(line for line in output.splitlines() if line.startswith("error:"))
    assert re.search(
        r"line 2001: Invalid JSON: .*; 2 of 4,001 rows are malformed; all are in s3://videos/prepared/", error
    )
    assert re.search(r"1  3002 +its id is also on line 2", output)


def test_prepared_rows_equal_those_of_the_manifest(prepared):
    _, _, _, (status, output) = prepared
    assert status == 0, output
    result = last_line(output)
    assert (result["rows"], result["rejected"], result["quarantined"]) == (ROWS - 3, 2, 1)
    assert result["codecs"].keys() == {"h264"}
    manifest, good = Manifest(TARGET, [SOURCE]), Manifest(f"{SOURCE}/good.jsonl")
    assert len(manifest) == ROWS - 3
    rows = {row["id"]: row for row in good.rows}
    prepared_rows = manifest.rows
    assert [row["id"] for row in prepared_rows] == [name for name in rows if name != "row 17"]
    for one in prepared_rows:
        number = int(one["id"].removeprefix("row "))
        assert one["line"] == number + 1
        assert {**one, "line": 0, "manifest": ""} == {**rows[one["id"]], "line": 0, "manifest": ""}
    # 4 + 2i frames at 4 frames/s; of every fifth row, half a second.
    lengths = manifest.estimate_tokens(FrameSampling(64, "fps", 4.0), 100)
    assert Counter(np.round(lengths[:6] / 100).astype(int).tolist()) == Counter([2, 6, 8, 10, 12, 2])
    (rejected, duplicate) = map(json.loads, storage.read_bytes(f"{TARGET}/rejected.jsonl").splitlines())
    assert (rejected["line"], duplicate["line"]) == (2001, 3002)
    (entry,) = map(json.loads, storage.read_bytes(f"{TARGET}/quarantine.jsonl").splitlines())
    assert (entry["id"], entry["line"], entry["stage"]) == ("row 17", 18, "read")


def test_the_data_pipeline_reads_a_prepared_folder(prepared, monkeypatch):
    data = DataConfig(num_frames=2)
    samples = []
    for uri in (TARGET, f"{SOURCE}/good.jsonl"):
        monkeypatch.setattr(ray, "get", lambda rows: rows)
        rows = Rows([Manifest(uri, [SOURCE])])
        reader = ReadSamples(BlockLayout(DeterministicSampler((10,), 4, None), 1, 0, 2, 4), rows, data, 32)
        samples.append(reader({"block": [0]}))
        reader.decoder.__exit__(None, None, None)
    samples, expected = map(list, map(unpack_block, samples))
    assert [sample.id for sample in samples] == [f"row {i}" for i in range(4)]
    for one, other in zip(samples, expected, strict=True):
        assert (one.id, one.messages, one.error) == (other.id, other.messages, None)
        assert all(np.array_equal(a, b) for a, b in zip(one.videos, other.videos, strict=True))


def test_an_unchanged_manifest_is_not_converted_again(prepared, cluster, manifest):
    status, output = run(cluster, "convert", manifest, TARGET, *SMALL_CHUNKS)
    assert status == 0
    assert "already prepared" in output
    assert last_line(output)["rows"] == ROWS - 3


def test_requeue_adds_readable_rows_and_removes_their_entries(prepared, cluster):
    digest = Manifest(TARGET, [SOURCE]).digest
    (entry,) = map(json.loads, storage.read_bytes(f"{TARGET}/quarantine.jsonl").splitlines())
    quarantine = "s3://videos/runs/one/quarantine.jsonl"
    missing = {**entry, "split": "train", "id": "lost", "uri": f"{SOURCE}/lost.mp4"}
    storage.write_bytes(
        quarantine, "".join(json.dumps(one) + "\n" for one in (missing, {**entry, "split": "train"})).encode()
    )
    storage.write_bytes(f"{SOURCE}/gone.mp4", clip(8))
    for place in (TARGET, quarantine):
        status, output = run(cluster, "requeue", place, "--data.roots", f'["{SOURCE}"]')
        assert status == 0, output
        assert f"readable now: {SOURCE}/rows.jsonl line 18 (row 17)" in output
    assert storage.read_bytes(f"{TARGET}/quarantine.jsonl") == b""
    (entry,) = map(json.loads, storage.read_bytes(quarantine).splitlines())
    assert (entry["id"], entry["attempts"], entry["split"]) == ("lost", 2, "train")
    manifest = Manifest(TARGET, [SOURCE])
    assert len(manifest) == ROWS - 2
    assert manifest.digest != digest
    assert manifest.take([ROWS - 3])[0]["id"] == "row 17"
    assert manifest.estimate_tokens(FrameSampling(64, "fps", 4.0), 100)[-1] // 100 == 8


def test_validate_agrees_with_convert_and_writes_nothing(cluster, manifest):
    before = storage.names_in("s3://videos")
    command = cluster.submit("python", "jobs/prepare.py", "validate", manifest, *SMALL_CHUNKS)
    job = subprocess.run(command, env=cluster.environment, cwd="/", capture_output=True, text=True, timeout=100)
    assert job.returncode == 1
    result = json.loads(next(line for line in job.stdout.splitlines() if line.startswith('{"manifest"')))
    assert (result["rows"], result["rejected"]) == (ROWS - 2, 2)
    assert "3002" in job.stdout
    assert "its id is also on line 2" in job.stdout
    assert storage.names_in("s3://videos") == before


def test_a_webdataset_in_the_store_becomes_a_prepared_folder(cluster, store):
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as file:
            for i in range(3):
                for suffix, data in (("mp4", clip(4 + 4 * i)), ("txt", f"clip {shard} {i}".encode())):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))
        storage.write_bytes(f"s3://videos/shards/train-{shard}.tar", buffer.getvalue())
    source, target = "s3://videos/shards/train-*.tar", "s3://videos/from-shards"
    status, output = run(cluster, "validate", source, "--data.num_frames", "2")
    assert status == 0, output
    assert "6 rows: captions" in output
    assert re.search(r"line 1, id 00\n +video 1 +in the manifest: 00.mp4, [\d,]+ bytes, 2 frames spread evenly", output)
    assert re.search(r"assistant \(learned\) +clip 0 0", output)
    status, output = run(cluster, "convert", source, target)
    assert status == 0, output
    assert last_line(output)["codecs"] == {"h264": 6}
    rows = Manifest(target).rows
    assert [row["messages"][1]["content"] for row in rows] == [
        f"clip {shard} {i}" for shard in (0, 1) for i in range(3)
    ]
    assert [reference.seconds for _, reference in Manifest(target).videos()] == [1.0, 2.0, 3.0] * 2
    status, output = run(cluster, "convert", source, target)
    assert "already prepared" in output
