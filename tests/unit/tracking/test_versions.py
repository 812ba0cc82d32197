"""Versions in the registry, over sqlite: found, fetched, with scores, and with an alias."""

import json
import warnings
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.tracking import MlflowRun, register
from crosslmm.tracking.versions import (
    EvaluationRecord,
    fetch_version,
    find_alias,
    find_version,
    move_alias,
    record_evaluation,
)

DIGEST = "0123456789abcdef" * 4
METRICS = {
    "accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.9, "answered": 8.0, "empty": 0.0, "unparsable": 0.0,
    "unreadable": 0.0, "accuracy/duration/long": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return TrackingConfig(uri=f"sqlite:///{folder}/record.db", artifacts=str(folder / "artifacts"), experiment="toys")


@pytest.fixture(scope="module")
def version(tracking, tmp_path_factory):
    """Two versions of a registered model, the second of which is the candidate."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "run.yaml").write_text("seed: 1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `quiet_mlflow` does for MLflow's advice
        for _ in range(2):
            register(MlflowRun.create(tracking, "training", "a test"), str(folder), {"data_sha256": DIGEST})
    return find_version("models:/crosslmm@candidate", tracking)


@pytest.fixture
def client(tracking):
    return MlflowClient(tracking.uri)


def evaluation(name="videomme-crosslmm-2", **changed) -> EvaluationRecord:
    fields = {
        "name": name, "key": name, "benchmark": "videomme", "params": {"num_frames": 4, "prompt": "ab"},
        "metrics": METRICS, "data_uri": "s3://bucket/videomme", "data_digest": DIGEST, "questions": 8,
        "files": {"answers.jsonl": b'{"number": 0}\n', "report.html": b"<p>"},
    }  # fmt: skip
    return EvaluationRecord(**fields | changed)


def test_alias_is_resolved_to_a_number(version, tracking):
    assert (version.uri, version.name, version.number) == ("models:/crosslmm/2", "crosslmm", "2")
    assert find_version("models:/crosslmm/1", tracking).run_id != version.run_id
    assert find_alias("crosslmm", "champion", tracking) is None


@pytest.mark.parametrize(
    "uri", ["models:/crosslmm@nothing", "models:/crosslmm/99", "models:/other/1", "models:/crosslmm"]
)
def test_version_that_does_not_exist_is_one_line(uri, version, tracking):
    with pytest.raises(BadConfig, match=uri) as error:
        find_version(uri, tracking)
    assert "\n" not in str(error.value)


def test_files_of_a_version_are_those_that_were_registered(version, tracking, tmp_path):
    folder = Path(fetch_version(version, tracking, str(tmp_path)))
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("run.yaml", "seed: 1\n")]


def test_score_is_on_the_run_and_on_the_version(version, tracking, client):
    run_id = record_evaluation(evaluation(), version, tracking)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == METRICS
    assert run.data.params == {"num_frames": "4", "prompt": "ab", "model": "models:/crosslmm/2"}
    assert run.data.tags["mlflow.parentRunId"] == version.run_id
    assert {file.path for file in client.list_artifacts(run_id)} == {"answers.jsonl", "report.html"}
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.profile) == {"num_rows": 8, "sha256": DIGEST}
    # The registry: which version scored what, on which data.
    model = client.get_logged_model(version.model_id)
    of_model = {metric.key: (metric.value, metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert of_model["accuracy"] == (0.75, "videomme", DIGEST[:36])
    assert of_model["accuracy/duration/long"][0] == 0.5
    tags = client.get_model_version("crosslmm", "2").tags
    assert tags["score.videomme"] == "0.7500 [0.5000, 0.9000]"
    assert (tags["score.videomme.data_sha256"], tags["score.videomme.run"]) == (DIGEST, run_id)
    files = client.list_logged_model_artifacts(version.model_id, "evaluations/videomme-crosslmm-2")
    assert {file.path.rsplit("/", 1)[-1] for file in files} == {"answers.jsonl", "report.html"}


def test_same_evaluation_is_recorded_once(version, tracking, client):
    first = record_evaluation(evaluation("again"), version, tracking)
    points = len(client.get_metric_history(first, "accuracy"))
    assert record_evaluation(evaluation("again"), version, tracking) == first
    assert len(client.get_metric_history(first, "accuracy")) == points == 1


def test_version_without_a_score_says_so(version, tracking, client):
    counts = {"answered": 5.0, "empty": 0.0, "unparsable": 0.0, "unreadable": 3.0}
    run_id = record_evaluation(evaluation("none", benchmark="mvbench", metrics=counts), version, tracking)
    assert "accuracy" not in client.get_run(run_id).data.metrics
    tags = client.get_model_version("crosslmm", "2").tags
    assert tags["score.mvbench"] == "none: 3 of 8 questions could not be asked"


def test_folder_has_a_run_but_no_version(version, tracking, client):
    run = client.get_run(record_evaluation(evaluation("folder"), None, tracking))
    assert run.data.metrics["accuracy"] == 0.75
    assert "mlflow.parentRunId" not in run.data.tags


def test_names_that_mlflow_refuses_are_replaced(version, tracking, client):
    metrics = METRICS | {"accuracy/type/what? why!": 0.25}
    run = client.get_run(record_evaluation(evaluation("odd", metrics=metrics), version, tracking))
    (odd,) = [name for name in run.data.metrics if name.startswith("accuracy/type/what_why_-")]
    assert run.data.tags[f"original_name/{odd}"] == "accuracy/type/what? why!"


def test_alias_moves_with_its_evidence(version, tracking, client):
    move_alias(version, "champion", {"promoted_as.champion": "better"}, tracking)
    assert find_alias("crosslmm", "champion", tracking) == version
    assert client.get_model_version("crosslmm", "2").tags["promoted_as.champion"] == "better"
