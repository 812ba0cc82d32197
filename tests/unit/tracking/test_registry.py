"""What a run leaves in the registry, over sqlite: a version with its validation, an example and all of its files."""

import json
import logging
import warnings

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, storage
from crosslmm.cli import parse_run
from crosslmm.config import TrackingConfig
from crosslmm.data.samples.clips import encode_clip
from crosslmm.inference.answerer import Answerer
from crosslmm.model import modeling
from crosslmm.model.loading import build_processor
from crosslmm.tracking import BackgroundSync, MlflowRun, register
from crosslmm.tracking.versions import find_version
from tests.support.common import random_frames
from tests.support.exports import export_model

DIGEST = "0123456789abcdef" * 4
DATASETS = [
    {"uri": "s3://bucket/rows.jsonl", "digest": "f" * 64, "rows": 70, "context": "training"},
    {"uri": "s3://bucket/held_out.jsonl", "digest": DIGEST, "rows": 8, "context": "validation"},
]
VALIDATION = {"validation/loss": 0.5, "validation/accuracy": 0.75, "validation/count": 8.0}


@pytest.fixture(autouse=True)
def without_advice():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(type hint|input example)", UserWarning)
        yield


def tracking_in(folder):
    return TrackingConfig(uri=f"sqlite:///{folder}/record.db", artifacts=str(folder / "artifacts"))


@pytest.fixture
def version(tmp_path, caplog):
    return leave_version(tmp_path, caplog, DATASETS)


def leave_version(tmp_path, caplog, datasets):
    """Return the version that a run leaves, and a client. Its model has no weights: nothing may load it."""
    folder, tracking = str(tmp_path / "first"), tracking_in(tmp_path)
    config = parse_run(["--name=first"], "a test").model_copy(update={"tracking": tracking})
    run_folder.begin_run(config, folder, {}, datasets)
    (tmp_path / "first/model").mkdir()
    (tmp_path / "first/model/run.yaml").write_text("seed: 1\n")
    early = {**VALIDATION, "validation/accuracy": 0.25}
    steps = [(1, 1e9, {**early, "loss": 3.0}), (2, 1e9 + 1, {**VALIDATION, "loss": 2.0}), (3, 1e9 + 2, {"loss": 1.0})]
    lines = [json.dumps({"step": step, "time": when, "metrics": metrics}) + "\n" for step, when, metrics in steps]
    storage.write_bytes(f"{folder}/history/step-00000003.jsonl", "".join(lines).encode())
    run = BackgroundSync(folder, tracking)
    with caplog.at_level(logging.WARNING):
        run.finish("FINISHED", {"data_sha256": "f" * 64})
    assert run.delivered
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    client = MlflowClient(tracking.uri)
    return client.get_model_version("crosslmm", "1"), client


def test_a_version_has_the_last_validation_with_its_data(version):
    found, client = version
    assert found.tags["validation"] == "accuracy 0.7500 (8 questions), loss 0.5, step 2"
    model = client.get_logged_model(find_version("models:/crosslmm/1", tracking_of(client)).model_id)
    metrics = {m.key: (m.value, m.step, m.dataset_name, m.dataset_digest) for m in model.metrics}
    assert metrics == {key: (value, 2, "held_out.jsonl", DIGEST[:36]) for key, value in VALIDATION.items()}
    # The run has each validation once.
    history = client.get_metric_history(found.run_id, "validation/accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.75)]


def test_a_run_that_was_begun_without_validation_is_registered_with_the_one_it_got_later(tmp_path, caplog):
    found, client = leave_version(tmp_path, caplog, DATASETS[:1])
    assert found.tags["validation"] == "accuracy 0.7500 (8 questions), loss 0.5, step 2"
    model = client.get_logged_model(find_version("models:/crosslmm/1", tracking_of(client)).model_id)
    assert {m.key: m.value for m in model.metrics} == VALIDATION


def tracking_of(client):
    return TrackingConfig(uri=client.tracking_uri)


def test_a_version_has_short_tags_and_an_example(version, tmp_path):
    found, client = version
    assert all(len(value) < 100 for value in found.tags.values())
    folder = mlflow.artifacts.download_artifacts(
        "models:/crosslmm/1", dst_path=str(tmp_path / "copy"), tracking_uri=client.tracking_uri
    )
    model = mlflow.models.Model.load(folder)
    assert model.load_input_example(folder) == [{"video": "clip.mp4", "question": "What happens?"}]
    assert model.signature.inputs.input_names() == ["video", "question"]
    assert (tmp_path / "copy/artifacts/model/run.yaml").read_text() == "seed: 1\n"


def test_a_model_in_several_files_is_registered_and_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(modeling, "SHARD_SIZE", "1MB")
    config, tracking = parse_run([], ""), tracking_in(tmp_path)
    model = export_model(tmp_path / "model", config, build_processor(config.model))
    sizes = [path.stat().st_size for path in model.glob("model-*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 1.1e6

    register(MlflowRun.create(tracking, "large", "a test"), str(model), {})
    (tmp_path / "a.mp4").write_bytes(encode_clip(np.repeat(random_frames(1, 5), 8, axis=0)))
    loaded = mlflow.pyfunc.load_model("models:/crosslmm/1", model_config={"roots": [str(tmp_path)]})
    (row,) = loaded.predict(pd.DataFrame({"video": ["a.mp4"], "question": ["What?"]})).itertuples()
    assert (row.answer, row.error) == (Answerer(model, "cpu")([str(tmp_path / "a.mp4")], ["What?"])[0], None)
