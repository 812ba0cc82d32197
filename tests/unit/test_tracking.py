import json
import subprocess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from crosslmm.config import TrackingConfig, flatten, parse_run
from crosslmm.tracking import Run, tracking_uri

DIGEST = "0123456789abcdef" * 4


def steps(*numbers, began=1e9):
    """MLflow itself keeps one of two equal points; a step that is walked again has another time."""
    return [(step, began + step, {"loss": 1 / step, "lr": 0.1}) for step in numbers]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return parse_run(
        [f"--tracking.uri=sqlite:///{folder}/record.db", f"--tracking.artifacts={folder}/artifacts", "--name=first"],
        "a test",
    )


@pytest.fixture(scope="module")
def run(config):
    """One run that is written to, broken off and resumed, whose second half walks a step again."""
    run = Run(config)
    run.log_dataset("s3://bucket/rows.jsonl", DIGEST, rows=7, context="training")
    run.log(steps(1, 2))
    run.finish("FAILED")
    resumed = Run(config.model_copy(update={"seed": 1}), run_id=run.run_id)
    resumed.log(steps(2, 3, began=2e9))
    resumed.log(steps(1, 2, 3, began=3e9))
    resumed.log_text("note.txt", "hello")
    resumed.finish("FINISHED")
    assert resumed.run_id == run.run_id
    return resumed


@pytest.fixture
def client(config):
    return MlflowClient(config.tracking.uri)


@pytest.fixture
def record(client, run):
    return client.get_run(run.run_id)


def test_a_resumed_run_is_the_same_run(client, run, record):
    (experiment,) = [e for e in client.search_experiments() if e.name == "crosslmm"]
    assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [run.run_id]
    assert (record.info.run_name, record.info.status) == ("first", "FINISHED")


def test_parameters_are_the_flattened_configuration_and_a_resume_keeps_them(record, config):
    assert record.data.params == {key: str(value) for key, value in flatten(config.model_dump()).items()}
    assert record.data.params["train.learning_rate.v2v"] == str(config.train.learning_rate.v2v)
    assert record.data.params["seed"] == "0"


def test_steps_that_are_walked_again_are_recorded_once(client, run):
    history = client.get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (1, 1, 1_000_000_001_000),
        (2, 1 / 2, 1_000_000_002_000),
        (3, 1 / 3, 2_000_000_003_000),
    ]


def test_the_manifest_is_an_input_with_its_digest(record):
    (used,) = record.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.source_type) == ("rows.jsonl", "s3")
    assert DIGEST.startswith(used.dataset.digest)
    assert json.loads(used.dataset.profile) == {"num_rows": 7, "sha256": DIGEST}
    assert json.loads(used.dataset.source) == {"uri": "s3://bucket/rows.jsonl"}
    assert {tag.key: tag.value for tag in used.tags} == {"mlflow.data.context": "training"}


def test_artifacts_lie_where_the_configuration_says(record, config):
    assert record.info.artifact_uri.startswith(config.tracking.artifacts)
    (note,) = Path(config.tracking.artifacts).rglob("note.txt")
    assert note.read_text() == "hello"


def test_the_revision_of_the_code_is_recorded(record):
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    assert record.data.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()


def test_another_run_of_the_same_experiment_is_another_run(client, config, run):
    other = Run(config.model_copy(update={"name": "second"}))
    other.finish("KILLED")
    assert other.run_id != run.run_id
    assert client.get_run(other.run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.experiment_id == client.get_run(run.run_id).info.experiment_id
    client.delete_run(other.run_id)


def test_the_record_goes_to_the_configuration_then_the_environment_then_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(TrackingConfig()) == "http://tracker:5000"
    assert tracking_uri(TrackingConfig(uri="sqlite:///mine.db")) == f"sqlite:///{tmp_path}/mine.db"
    assert tracking_uri(TrackingConfig(uri="sqlite:////data/mine.db")) == "sqlite:////data/mine.db"


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2], "e": None}) == {"a.b.c": 1, "d": [2], "e": None}
