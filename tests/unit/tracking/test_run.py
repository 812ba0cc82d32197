import json
import subprocess
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, tracking
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.run_folder import validations_after
from crosslmm.tracking import BackgroundSync
from crosslmm.tracking.run import find_or_create

DIGEST = "0123456789abcdef" * 4
DATASET = {"uri": "s3://bucket/rows.jsonl", "digest": DIGEST, "rows": 7, "context": "training"}


def steps(*numbers, began=1e9):
    """MLflow itself keeps one of two equal points; a step that is walked again has another time."""
    return [(step, began + step, {"loss": 1 / step, "lr": 0.1}) for step in numbers]


def start(folder, config, run_id=None):
    run_folder.begin_run(config, str(folder), {"seed": config.seed}, [DATASET], run_id)
    return BackgroundSync(str(folder), config.tracking, print)


def begun(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("first")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return parse_run(
        [f"--tracking.uri=sqlite:///{folder}/record.db", f"--tracking.artifacts={folder}/artifacts", "--name=first"],
        "a test",
    )


@pytest.fixture(scope="module")
def run(config, folder):
    """One run that is written to, broken off and resumed, whose second half walks a step again."""
    run = start(folder, config)
    run.log(steps(1, 2))
    run.finish("FAILED")
    first = run.run_id
    (folder / "quarantine.jsonl").write_text("hello")
    resumed = start(folder, config.model_copy(update={"seed": 1}))
    resumed.log(steps(2, 3, began=2e9))
    resumed.log(steps(1, 2, 3, began=3e9))
    resumed.finish("FINISHED")
    assert resumed.run_id == first
    assert resumed.delivered
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
    (ledger,) = Path(config.tracking.artifacts).rglob("quarantine.jsonl")
    assert ledger.read_text() == "hello"


def test_the_folder_says_what_the_record_is_made_from(run, folder, config):
    said = begun(folder)
    assert (said["run_id"], said["name"], said["status"]) == (run.run_id, "first", "FINISHED")
    assert said["order"] == {"seed": 1}
    assert parse_run([f"--config={folder}/config.yaml"], "a test") == config


def test_what_is_in_mlflow_is_not_sent_again(client, run, folder):
    before = client.get_run(run.run_id)
    again = tracking.replay(str(folder))
    assert again == tracking.Delivered(run.run_id, 0, "FINISHED", None)
    assert client.get_run(run.run_id).to_dictionary() == before.to_dictionary()


def test_validations_that_a_folder_has_behind_a_step(tmp_path):
    """Steps 2 and 4 were walked twice: a driver that could not deliver them kept its walk, and workers kept theirs."""
    (tmp_path / "history").mkdir()
    kept = {
        "driver-1.jsonl": {1: {"loss": 5.0}, 2: {"validation/loss": 2.0}, 4: {"validation/loss": 4.0}},
        "step-00000002.jsonl": {2: {"validation/loss": 2.5}},
        "step-00000006.jsonl": {3: {"loss": 3.0}, 4: {"validation/loss": 4.5}, 6: {"validation/loss": 6.0}},
    }
    for name, steps in kept.items():
        lines = [json.dumps({"step": step, "time": 0.0, "metrics": metrics}) for step, metrics in steps.items()]
        (tmp_path / "history" / name).write_text("\n".join(lines) + "\n")
    two, four, six = ((step, {"validation/loss": float(step)}) for step in (2, 4, 6))
    assert validations_after(str(tmp_path), 0) == [two, four, six]
    assert validations_after(str(tmp_path), 2) == [four, six]
    assert validations_after(str(tmp_path), 6) == []
    assert validations_after(str(tmp_path / "nothing"), 0) == []


def test_the_whole_record_can_be_made_elsewhere_from_the_folder(run, folder, client, tmp_path):
    """Workers write the history; a driver that broke off added steps, which were walked again with other times."""
    (folder / "history").mkdir()
    for name, lines in {
        "step-00000002": steps(1, 2),
        "driver-5": steps(3, began=2e9),
        "step-00000003": steps(3, began=4e9),
    }.items():
        text = [json.dumps({"step": step, "time": when, "metrics": values}) + "\n" for step, when, values in lines]
        (folder / "history" / f"{name}.jsonl").write_text("".join(text))
    elsewhere = f"sqlite:///{tmp_path}/other.db"
    made = tracking.replay(str(folder), elsewhere)
    assert (made.points, made.status) == (6, "FINISHED")
    assert tracking.replay(str(folder), elsewhere).points == 0
    there, here = MlflowClient(elsewhere).get_run(made.run_id), client.get_run(run.run_id)
    for part in ("start_time", "end_time", "status", "run_name"):
        assert getattr(there.info, part) == getattr(here.info, part)
    assert there.data.params == here.data.params
    assert there.inputs.to_dictionary() == here.inputs.to_dictionary()
    histories = [
        c.get_metric_history(r, "loss") for c, r in ((MlflowClient(elsewhere), made.run_id), (client, run.run_id))
    ]
    points = [[(m.step, m.value, m.timestamp) for m in history] for history in histories]
    assert points[0] == points[1]


def test_a_step_of_more_metrics_than_mlflow_takes_at_once_arrives_whole(client, config, tmp_path):
    wide = start(tmp_path, config.model_copy(update={"name": "wide"}))
    wide.log([(step, 1e9, {"loss": 1.0, **{f"k{i}": float(i) for i in range(1500)}}) for step in (1, 2)])
    wide.finish("FINISHED")
    metrics = client.get_run(wide.run_id).data.metrics
    assert len([name for name in metrics if name.startswith("k")]) == 1500
    assert len(client.get_metric_history(wide.run_id, "k7")) == 2
    client.delete_run(wide.run_id)


def test_two_who_make_a_run_at_the_same_time_have_one(client, config, run):
    """The second one's search came before the first one's call."""
    key = "a" * 32

    class Late:
        searched = False

        def __getattr__(self, name):
            return getattr(client, name)

        def search_runs(self, *arguments):
            runs = client.search_runs(*arguments)
            if not self.searched:
                self.searched = True
                self.first = find_or_create(client, config.tracking, key, {}, 1e9)
            return runs

    late = Late()
    assert find_or_create(late, config.tracking, key, {}, 1e9) == late.first
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "crosslmm"]
    (only,) = client.search_runs([experiment], f"tags.`crosslmm.key` = '{key}'")
    assert only.info.run_id == late.first
    client.delete_run(late.first)


def test_a_deleted_run_is_not_brought_back(client, config, tmp_path):
    config = config.model_copy(update={"name": "unwanted"})
    unwanted = start(tmp_path, config)
    unwanted.finish("FAILED")
    client.delete_run(unwanted.run_id)
    with pytest.raises(BadConfig, match=f"MLflow run {unwanted.run_id} of unwanted was deleted"):
        start(tmp_path, config)
    with pytest.raises(BadConfig, match="was deleted"):
        tracking.replay(str(tmp_path))


@pytest.mark.parametrize("uri", ["htp://tracker:5000", "http://tracker:99999", "sqlite:////dev/null/x.db"])
def test_where_no_server_can_be_is_refused_at_once(uri, config, tmp_path):
    with pytest.raises(BadConfig, match=f"tracking.uri: {uri}"):
        start(tmp_path, config.model_copy(update={"tracking": TrackingConfig(uri=uri)}))


def test_no_password_is_written_down(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracker:5000")
    run_folder.begin_run(config.model_copy(update={"tracking": TrackingConfig()}), str(tmp_path), {}, [])
    assert begun(tmp_path)["tracking"]["uri"] == "http://tracker:5000"
    assert not [path for path in tmp_path.iterdir() if "secret" in path.read_text()]


def test_the_revision_of_the_code_is_recorded(record):
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    assert record.data.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()


def test_another_run_of_the_same_experiment_is_another_run(client, config, run, tmp_path):
    other = start(tmp_path, config.model_copy(update={"name": "second"}))
    other.finish("KILLED")
    assert other.run_id != run.run_id
    assert client.get_run(other.run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.experiment_id == client.get_run(run.run_id).info.experiment_id
    client.delete_run(other.run_id)


def test_a_run_that_a_sweep_made_is_taken(client, config, tmp_path):
    made = tracking.MlflowRun.create(config.tracking, "trial", "a test")
    trial = start(tmp_path, config.model_copy(update={"name": "trial"}), made.run_id)
    trial.log(steps(1))
    trial.settle(30)
    assert [m.step for m in client.get_metric_history(made.run_id, "loss")] == [1]
    trial.finish("FINISHED")
    assert trial.run_id == made.run_id
    client.delete_run(made.run_id)


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
