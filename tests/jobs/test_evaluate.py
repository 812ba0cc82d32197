"""jobs/evaluate.py on a real cluster: killed and resumed, unreadable videos, a bucket, two registered versions."""

import json
import shutil
import signal
import subprocess
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from mlflow import MlflowClient

from crosslmm import storage
from crosslmm.config import TrackingConfig
from crosslmm.tracking import MlflowRun, register
from tests.support.benchmark_folders import FOLDERS, ROWS, clip
from tests.support.common import ROOT, conversation
from tests.support.evaluations import export_model

QUESTIONS, PER_VIDEO = 240, 2


@pytest.fixture(scope="module")
def exported(config, processor, tmp_path_factory):
    return export_model(config, processor, tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """240 questions about 120 clips: four blocks of 32 videos."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "questions.jsonl").open("w") as rows:
        for i in range(QUESTIONS):
            video = f"clip{i // PER_VIDEO}.mp4"
            if i % PER_VIDEO == 0:
                (folder / video).write_bytes(clip(i // PER_VIDEO))
            question = f"What is it, {i}?{' And where?' * (i % 3)}"
            rows.write(
                json.dumps({"id": str(i), "video": video, "messages": conversation(question, "-"), "kind": "k"}) + "\n"
            )
    return folder / "questions.jsonl"


def evaluate(cluster, folder: Path, *arguments: str) -> subprocess.Popen:
    """Start the job, with storage and record in a folder."""
    command = [
        sys.executable, "jobs/evaluate.py", f"--storage={folder}/runs", f"--tracking.uri=sqlite:///{folder}/mlflow.db",
        f"--tracking.artifacts={folder}/artifacts", *arguments,
    ]  # fmt: skip
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs_address}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(job: subprocess.Popen) -> tuple[str, dict | None]:
    output, _ = job.communicate(timeout=400)
    results = [line for line in output.splitlines() if line.startswith('{"name"')]
    return output, json.loads(results[-1]) if results else None


def answers(result: dict) -> list[dict]:
    """Return the lines of answers.jsonl, without times."""
    lines = [json.loads(line) for line in Path(result["folder"], "answers.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(cluster, exported, manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    output, result = finish(evaluate(cluster, folder, f"--model={exported}", f"--manifest={manifest}"))
    assert result, output
    return result


def test_each_question_has_one_answer(undisturbed):
    lines = answers(undisturbed)
    assert [line["number"] for line in lines] == list(range(QUESTIONS))
    assert undisturbed["counts"]["unreadable"] == 0
    assert len({line["prediction"] for line in lines}) >= 3
    assert {tuple(line["frames"]) for line in lines} == {(4,)}
    for line in lines:
        assert line["times"][0] == sorted(set(line["times"][0]))
    assert undisturbed["accuracy"]["clusters"] == QUESTIONS // PER_VIDEO


def kill_and_resume(cluster, folder: Path, arguments: list[str], moments: int) -> tuple[str, dict | None]:
    """Kill the job with SIGKILL at some moments, each time with another number of workers; return the last start. An
    evaluation that ends before all kills is begun anew."""
    kills = 0
    while kills < moments:
        workers = 1 + kills % 2
        job = evaluate(cluster, folder, f"--scaling.num_workers={workers}", *arguments)
        deadline = time.monotonic() + 240
        wanted = kills % 4  # blocks that this start may finish; 0: while the model is being loaded
        before = len(list(folder.glob("runs/evaluations/*/blocks/*.jsonl")))
        while job.poll() is None and time.monotonic() < deadline:
            blocks = len(list(folder.glob("runs/evaluations/*/blocks/*.jsonl")))
            if blocks - before >= wanted and list(folder.glob("runs/evaluations/*/evaluation.json")):
                time.sleep(0.3 * kills % 1.7)
                break
            time.sleep(0.02)
        if job.poll() is None:
            job.kill()
            kills += 1
        else:
            shutil.rmtree(folder / "runs")
        output, _ = job.communicate()
        assert job.returncode in (0, -signal.SIGKILL), output
    return finish(evaluate(cluster, folder, f"--scaling.num_workers={1 + moments % 2}", *arguments))


def test_killed_and_resumed_gives_the_same_answers(cluster, undisturbed, exported, manifest, tmp_path):
    output, result = kill_and_resume(cluster, tmp_path, [f"--model={exported}", f"--manifest={manifest}"], moments=2)
    assert result, output
    assert result["asked"] < QUESTIONS
    assert answers(result) == answers(undisturbed)
    assert result["accuracy"] == undisturbed["accuracy"]


@pytest.mark.fault
@pytest.mark.timeout(3600)
def test_killed_at_ten_moments_gives_the_same_answers(cluster, undisturbed, exported, manifest, tmp_path):
    output, result = kill_and_resume(cluster, tmp_path, [f"--model={exported}", f"--manifest={manifest}"], moments=10)
    assert result, output
    assert answers(result) == answers(undisturbed)


def slow_video(path: Path, frames: int = 150_000) -> None:
    """Write a video that takes longer to decode than the deadline: one keyframe, and all frames after it are needed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", 1000, {"preset": "ultrafast", "g": str(frames), "sc_threshold": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24").reformat(format="yuv420p")
        for i in range(frames):
            picture.pts, picture.time_base = i, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def test_unreadable_videos_are_counted_and_named(cluster, exported, manifest, tmp_path):
    good = [json.loads(line) for line in manifest.read_text().splitlines()[:20]]
    for row in good:
        row["video"] = str(manifest.parent / row["video"])
    bad = {"corrupt": b"no video at all", "cut": clip(0)[:900]}
    rows = good + [
        {"id": name, "video": f"{name}.mp4", "messages": conversation("?", "-")} for name in [*bad, "missing", "slow"]
    ]
    for name, data in bad.items():
        (tmp_path / f"{name}.mp4").write_bytes(data)
    slow_video(tmp_path / "slow.mp4")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        f"--model={exported}", f"--manifest={tmp_path}/rows.jsonl", f"--roots=[{manifest.parent}]",
        "--decode_timeout_s=1.5",
    ]  # fmt: skip
    job = evaluate(cluster, tmp_path, *arguments)
    output, result = finish(job)
    assert job.returncode == 1, output
    assert result["accuracy"] is None
    assert (
        result["counts"] == {"answered": 20, "empty": 0, "unparsable": 0, "unreadable": 4}
        or result["counts"]["unreadable"] == 4
    )
    assert "4 of 24 questions could not be asked: no score" in output
    for name, reason in {
        "corrupt": "not an mp4",
        "missing": "no such file",
        "slow": "it took over 1.5 s (data.decode_timeout_s)",
    }.items():
        assert f"not asked: {name} (" in output
        assert reason in output
    assert "No score: 4 of 24 questions" in Path(result["page"]).read_text()
    # With a higher limit there is a score, in which they count as wrong.
    job = evaluate(cluster, tmp_path, *arguments, "--max_unreadable=0.5")
    output, result = finish(job)
    assert job.returncode == 0, output
    assert result["asked"] == 0
    assert result["accuracy"]["count"] == 24


@pytest.fixture(scope="module")
def registry(config, processor, tmp_path_factory):
    """A folder with an MLflow server of two versions, of which the first is the champion."""
    folder = tmp_path_factory.mktemp("registry")
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(2):
            model = export_model(config, processor, tmp_path_factory.mktemp(f"seed{seed}"), seed)
            register(MlflowRun.create(tracking, f"seed{seed}", "a test"), str(model), {})
    MlflowClient(tracking.uri).set_registered_model_alias("crosslmm", "champion", "1")
    return folder


def test_version_is_scored_from_a_bucket_and_not_promoted(cluster, store, registry, tmp_path):
    FOLDERS["videomme"](tmp_path)
    storage.upload(str(tmp_path), "s3://videos/videomme")
    arguments = ["--benchmark=videomme", "--data=s3://videos/videomme", "--likelihood=true", "--promote=champion"]
    job = evaluate(cluster, registry, *arguments)
    output, result = finish(job)
    assert result, output
    assert result["model"] == "models:/crosslmm/2"
    assert result["against"]["model"] == "models:/crosslmm/1"
    assert result["questions"] == ROWS
    assert set(result["by_group"]["duration"]) == {"short", "medium", "long"}
    difference = result["against"]["difference"]
    assert difference["low"] <= difference["value"] <= difference["high"]
    client = MlflowClient(f"sqlite:///{registry}/mlflow.db")
    champion = client.get_model_version_by_alias("crosslmm", "champion").version
    assert (job.returncode, result["promoted"], str(champion)) in ((3, False, "1"), (0, True, "2"))
    assert result["promoted"] == (difference["low"] > 0)
    for number, scored in {"2": result["accuracy"], "1": result["against"]["accuracy"]}.items():
        tags = client.get_model_version("crosslmm", number).tags
        assert tags["score.videomme.likelihood"].startswith(f"{scored['value']:.4f} [")
        assert tags["score.videomme.likelihood.data_sha256"] == result["data_sha256"]
    # The same command asks nothing again, and records nothing twice.
    job = evaluate(cluster, registry, *arguments)
    output, again = finish(job)
    assert (again["asked"], again["run_id"], again["accuracy"]) == (0, result["run_id"], result["accuracy"])


def test_bad_request_ends_with_one_line(cluster, exported, tmp_path):
    job = evaluate(cluster, tmp_path, f"--model={exported}", "--benchmark=mvbench", f"--data={tmp_path}")
    output, result = finish(job)
    assert (job.returncode, result) == (2, None)
    assert output.splitlines()[-1].startswith(f"error: {tmp_path}: there is no json/TASK.json in it")
    assert "Traceback" not in output
