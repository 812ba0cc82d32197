"""jobs/encode.py is killed and resumes; jobs/train.py reads its features. On a real cluster, with the real jobs."""

import functools
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient

from crosslmm.cli import parse_run
from crosslmm.data.feature_cache import FeatureCache
from crosslmm.data.manifest import Manifest
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.data.video.decode import decode_video
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train import loop
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.optim import build_optimizer
from tests.support.common import conversation, processes

CLIPS, STEPS = 800, 4
"""Enough clips for the job to be killed before it ends, and training steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the sample set and one more row, whose video is missing."""
    folder = tmp_path_factory.mktemp("encode")
    write_sample_set(str(folder / "data"), train=CLIPS, held_out=4)
    with (folder / "data" / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"id": "gone", "video": "gone.mp4", "messages": conversation("What?", "nothing")}) + "\n")
    return folder


def command(folder, name, *arguments):
    return [
        "python", f"jobs/{name}.py", f"--data.manifest={folder}/data/train.jsonl", f"--storage={folder}/runs",
        "--train.learning_rate.vision=0", *arguments,
    ]  # fmt: skip


def start(cluster, *entrypoint):
    return subprocess.Popen(cluster.submit(*entrypoint), env=cluster.environment, cwd="/", stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def finish(job):
    output, _ = job.communicate(timeout=200)
    results = [line for line in output.splitlines() if line.startswith("{")]
    return output, json.loads(results[-1]) if results else None


@pytest.fixture(scope="module")
def encoded(cluster, folder):
    """Kill the job with SIGKILL after its first index file, and run it again.

    Returns:
        (first, second, result, stored, clips): output of both jobs, result of the second, the first one's index entries
        by URI, and the paths of all clips.
    """
    job = start(cluster, *command(folder, "encode"))
    deadline = time.monotonic() + 150
    while not (indices := list(folder.glob("runs/features/*/index-*.parquet"))):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    drivers = [pid for pid, title in processes() if "jobs/encode.py" in title and "submit" not in title]
    assert drivers
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    first, _ = finish(job)
    assert job.returncode != 0, first
    before = FeatureCache(str(indices[0].parent))
    clips = sorted(str(path) for path in (folder / "data" / "train").glob("*.mp4"))
    stored = {uri: before.find(uri) for uri in clips if before.find(uri)}
    job = start(cluster, *command(folder, "encode"))
    second, result = finish(job)
    assert job.returncode == 0, second
    return first, second, result, stored, clips


def test_killed_job_resumes_and_encodes_no_video_twice(encoded):
    first, _, result, stored, clips = encoded
    assert f"to do     {CLIPS + 1} videos, {(CLIPS + 1) * 4:,} frames at most" in first
    assert "--features.price 0.023 USD per GB and month" in first
    assert "int8    " in first
    assert 0 < len(stored) < CLIPS
    assert result["already"] == len(stored)
    assert result["videos"] == CLIPS - len(stored)
    assert 0 < result["encoding_s"] < result["seconds"]
    assert 0 < result["relative_error"] < 0.002  # bfloat16 keeps 8 bits
    features = FeatureCache(result["folder"])
    assert all(features.find(uri) == entry for uri, entry in stored.items())
    assert all(features.read(uri).images.shape == (4, 64, 64) for uri in clips[:: CLIPS // 20])


def test_unreadable_video_is_named_and_quarantined(encoded):
    _, second, result, *_ = encoded
    assert result["quarantined"] == 1
    assert f"line {CLIPS + 1} (gone): no such file" in second
    (entry,) = map(json.loads, Path(result["folder"], "quarantine.jsonl").read_text().splitlines())
    assert (entry["id"], entry["line"], entry["stage"]) == ("gone", CLIPS + 1, "read")


def train_arguments(folder):
    steps = (f"--train.max_steps={STEPS}", "--train.warmup_steps=1", "--train.epochs=9")
    return [*command(folder, "train")[2:], *steps]


def train_from_videos(folder):
    """Return the losses of the same run in this process, from decoded videos."""
    config = parse_run([*train_arguments(folder), "--scaling.num_workers=1"], "")
    rows = Manifest(config.data.manifest).rows
    order = DeterministicSampler((len(rows),), config.train.global_batch_size, config.seed)
    processor = build_processor(config.model)

    def batches():
        for step in range(STEPS):
            numbers, weights = order.rows_at(step * order.global_batch_size + np.arange(order.global_batch_size))
            assert all(rows[i]["id"] != "gone" for i in numbers), "the unreadable row has a substitute"
            videos = [[decode_video(rows[i]["videos"][0], config.data, processor.image_size).images] for i in numbers]
            yield loop.StepBatch([processor([rows[i]["messages"] for i in numbers], videos, weights=weights)], [])

    losses = []

    class Losses(loop.Callbacks):
        def log(self, step, metrics):
            losses.append(metrics["loss"])

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        build = functools.partial(build_model, config.model, processor, config.seed)
        model = parallelize(build, config.train, torch.device("cpu"))
        optimizer = build_optimizer(model, config.train)
        loop.train(config, model, optimizer, batches(), range(STEPS), Losses())
    finally:
        dist.destroy_process_group()
    return losses


def test_losses_from_features_match_losses_from_videos(cluster, folder, encoded):
    """Compare two FSDP workers on Ray, which read features, with one process, which decodes.

    bfloat16 rounds each feature by at most 2^-8, up or down, so a loss over hundreds of them differs by far less: by
    3e-5 after 20 steps (docs/log.md). With another sample's features it would differ by percents.
    """
    uri = f"sqlite:///{folder}/mlflow.db"
    arguments = (f"--tracking.uri={uri}", f"--data.features={encoded[2]['folder']}")
    output, result = finish(start(cluster, "python", "jobs/train.py", *train_arguments(folder), *arguments))
    assert result, output
    assert "instead of videos" in output
    history = MlflowClient(uri).get_metric_history(result["run_id"], "loss")
    from_features = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    from_videos = train_from_videos(folder)
    assert len(from_videos) == STEPS
    assert from_features == pytest.approx(from_videos, rel=2e-4)
    assert from_features != from_videos
    assert max(from_videos) / min(from_videos) > 1.05  # the model has learnt something
