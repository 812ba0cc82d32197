"""The MLflow run of a training run, over sqlite: what it contains, on a resume and from a replay."""

import io
import json
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import av
import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, tracking
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, TrackingConfig, flatten, tracking_uri
from crosslmm.data.thumbnails import SIDE, square
from crosslmm.run_folder import validations_after
from crosslmm.tracking import BackgroundSync, RunSync, SyncTimeouts
from crosslmm.tracking.run import find_or_create

DIGEST = "0123456789abcdef" * 4
DATASET = {"uri": "s3://bucket/rows.jsonl", "digest": DIGEST, "rows": 7, "context": "training"}


def steps(*numbers, began=1e9):
    """Return step records. MLflow drops one of two equal points, but a repeated step has another time."""
    return [(step, began + step, {"loss": 1 / step, "lr": 0.1}) for step in numbers]


def start(folder, config, run_id=None, **timeouts):
    run_folder.begin_run(config, str(folder), {"seed": config.seed}, [DATASET], run_id)
    return BackgroundSync(str(folder), config.tracking, SyncTimeouts(**timeouts))


def run_file(folder):
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
    """A run that fails, resumes, and repeats steps."""
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


def test_a_resume_continues_the_same_mlflow_run(client, run, record):
    (experiment,) = [e for e in client.search_experiments() if e.name == "crosslmm"]
    assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [run.run_id]
    assert (record.info.run_name, record.info.status) == ("first", "FINISHED")


def test_parameters_are_the_first_starts_configuration(record, config):
    assert record.data.params == {key: str(value) for key, value in flatten(config.model_dump()).items()}
    assert record.data.params["train.learning_rate.v2v"] == str(config.train.learning_rate.v2v)
    assert record.data.params["seed"] == "0"


def test_repeated_steps_are_recorded_once(client, run):
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


def test_artifacts_are_stored_where_configured(record, config):
    assert record.info.artifact_uri.startswith(config.tracking.artifacts)
    (ledger,) = Path(config.tracking.artifacts).rglob("quarantine.jsonl")
    assert ledger.read_text() == "hello"


def test_run_json_holds_what_a_replay_needs(run, folder, config):
    content = run_file(folder)
    assert (content["run_id"], content["name"], content["status"]) == (run.run_id, "first", "FINISHED")
    assert content["order"] == {"seed": 1}
    assert parse_run([f"--config={folder}/config.yaml"], "a test") == config


def test_a_replay_sends_nothing_twice(client, run, folder):
    before = client.get_run(run.run_id)
    again = tracking.replay(str(folder))
    assert again == tracking.Delivered(run.run_id, 0, "FINISHED", None, None)
    assert client.get_run(run.run_id).to_dictionary() == before.to_dictionary()


def test_validations_after_a_step(tmp_path):
    """Steps 2 and 4 are in the folder twice: from a driver that could not deliver them, and from the workers."""
    (tmp_path / "history").mkdir()
    histories = {
        "driver-1.jsonl": {1: {"loss": 5.0}, 2: {"validation/loss": 2.0}, 4: {"validation/loss": 4.0}},
        "step-00000002.jsonl": {2: {"validation/loss": 2.5}},
        "step-00000006.jsonl": {3: {"loss": 3.0}, 4: {"validation/loss": 4.5}, 6: {"validation/loss": 6.0}},
    }
    for name, steps in histories.items():
        lines = [json.dumps({"step": step, "time": 0.0, "metrics": metrics}) for step, metrics in steps.items()]
        (tmp_path / "history" / name).write_text("\n".join(lines) + "\n")
    two, four, six = ((step, {"validation/loss": float(step)}) for step in (2, 4, 6))
    assert validations_after(str(tmp_path), 0) == [two, four, six]
    assert validations_after(str(tmp_path), 2) == [four, six]
    assert validations_after(str(tmp_path), 6) == []
    assert validations_after(str(tmp_path / "nothing"), 0) == []


def test_a_replay_recreates_the_run_on_another_server(run, folder, client, tmp_path):
    """The history is by workers and a driver that failed; step 3 was repeated at another time."""
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


def test_a_step_with_1500_metrics_is_delivered(client, config, tmp_path):
    wide = start(tmp_path, config.model_copy(update={"name": "wide"}))
    wide.log([(step, 1e9, {"loss": 1.0, **{f"k{i}": float(i) for i in range(1500)}}) for step in (1, 2)])
    wide.finish("FINISHED")
    metrics = client.get_run(wide.run_id).data.metrics
    assert len([name for name in metrics if name.startswith("k")]) == 1500
    assert len(client.get_metric_history(wide.run_id, "k7")) == 2
    client.delete_run(wide.run_id)


def test_concurrent_creation_leaves_one_mlflow_run(client, config, run):
    """The second one searches before the first one has created the run."""
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


def test_a_deleted_mlflow_run_is_not_recreated(client, config, tmp_path):
    config = config.model_copy(update={"name": "unwanted"})
    unwanted = start(tmp_path, config)
    unwanted.finish("FAILED")
    client.delete_run(unwanted.run_id)
    with pytest.raises(BadConfig, match=f"MLflow run {unwanted.run_id} of unwanted was deleted"):
        start(tmp_path, config)
    with pytest.raises(BadConfig, match="was deleted"):
        tracking.replay(str(tmp_path))


@pytest.mark.parametrize("uri", ["htp://tracker:5000", "http://tracker:99999", "sqlite:////dev/null/x.db"])
def test_a_uri_without_a_server_is_refused_at_once(uri, config, tmp_path):
    with pytest.raises(BadConfig, match=f"tracking.uri: {uri}"):
        start(tmp_path, config.model_copy(update={"tracking": TrackingConfig(uri=uri)}))


def test_no_password_is_written_to_the_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracker:5000")
    run_folder.begin_run(config.model_copy(update={"tracking": TrackingConfig()}), str(tmp_path), {}, [])
    assert run_file(tmp_path)["tracking"]["uri"] == "http://tracker:5000"
    assert not [path for path in tmp_path.iterdir() if "secret" in path.read_text()]


def test_the_revision_of_the_code_is_recorded(record):
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    assert record.data.tags.get("mlflow.source.git.commit", "") == head.stdout.strip()


def test_another_name_makes_another_mlflow_run(client, config, run, tmp_path):
    other = start(tmp_path, config.model_copy(update={"name": "second"}))
    other.finish("KILLED")
    assert other.run_id != run.run_id
    assert client.get_run(other.run_id).info.status == "KILLED"
    assert client.get_run(other.run_id).info.experiment_id == client.get_run(run.run_id).info.experiment_id
    client.delete_run(other.run_id)


class MlflowPanic(BaseException):
    """Like pyo3's PanicException: no subclass of Exception."""


def fail_once(monkeypatch, error):
    """Make the next delivery of steps raise an error."""
    log, errors = RunSync.log, [error]

    def failing(self, steps):
        if self.last_step == 1 and errors:
            raise errors.pop()
        return log(self, steps)

    monkeypatch.setattr(RunSync, "log", failing)


def test_the_thread_goes_on_after_an_exception(client, config, tmp_path, monkeypatch, caplog):
    run = start(tmp_path, config.model_copy(update={"name": "unlucky"}), retry_s=0.01)
    run.log(steps(1))
    run.wait_delivered(30)
    fail_once(monkeypatch, TypeError("unexpected"))
    run.log(steps(2))
    run.wait_delivered(30)
    run.finish("FINISHED")
    assert run.delivered
    assert [m.step for m in client.get_metric_history(run.run_id, "loss")] == [1, 2]
    assert "does not answer: TypeError: unexpected; steps wait" in caplog.text
    client.delete_run(run.run_id)


def test_a_thread_that_cannot_go_on_ends_with_an_error(client, config, tmp_path, monkeypatch, caplog):
    run = start(tmp_path, config.model_copy(update={"name": "doomed"}))
    run_id = run.run_id
    run.log(steps(1))
    run.wait_delivered(30)
    fail_once(monkeypatch, MlflowPanic("lost its lock"))
    run.log(steps(2))
    began = time.monotonic()
    run.finish("FINISHED")
    assert time.monotonic() - began < 30
    assert not run.delivered
    assert f"delivery to {run.uri} stopped: MlflowPanic: lost its lock; python jobs/track.py replay" in caplog.text
    assert tracking.replay(str(tmp_path)) == tracking.Delivered(run_id, 2, "FINISHED", None, None)
    client.delete_run(run_id)


def test_a_trial_uses_the_mlflow_run_of_its_sweep(client, config, tmp_path):
    made = tracking.MlflowRun.create(config.tracking, "trial", "a test")
    trial = start(tmp_path, config.model_copy(update={"name": "trial"}), made.run_id)
    trial.log(steps(1))
    trial.wait_delivered(30)
    assert [m.step for m in client.get_metric_history(made.run_id, "loss")] == [1]
    trial.finish("FINISHED")
    assert trial.run_id == made.run_id
    client.delete_run(made.run_id)


def test_tracking_uri_configuration_environment_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    assert tracking_uri(TrackingConfig()) == "http://tracker:5000"
    assert tracking_uri(TrackingConfig(uri="sqlite:///mine.db")) == f"sqlite:///{tmp_path}/mine.db"
    assert tracking_uri(TrackingConfig(uri="sqlite:////data/mine.db")) == "sqlite:////data/mine.db"


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2], "e": None}) == {"a.b.c": 1, "d": [2], "e": None}


def test_nothing_is_delivered_for_a_run_that_has_another_owner(tmp_path, config, client):
    run = start(tmp_path, config, retry_s=0.1, stopped_end_s=1.0)
    run.log(steps(1))
    run.wait_delivered(60)

    def lost():
        raise RuntimeError("taken over")

    run.require_owner = lost
    run.log(steps(2))
    time.sleep(1)
    run.abandon()
    run_id = run_file(tmp_path)["run_id"]
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1]
    assert client.get_run(run_id).info.status == "RUNNING"


def test_the_run_says_who_runs_it_where_and_what_it_trains(tmp_path, config, client):
    run = start(tmp_path, config)
    run.tag({"mlflow.user": "alice", "host": "node-1", "ray_job": "first-try-1"})
    run.log(steps(1))
    run.wait_delivered(60)
    run.finish("FAILED")
    assert client.get_run(run.run_id).data.tags.items() >= {"mlflow.user": "alice", "host": "node-1"}.items()
    resumed = start(tmp_path, config)
    resumed.tag({"host": "node-2", "parameters": "1,000"})
    resumed.finish("FAILED")
    tags = client.get_run(run.run_id).data.tags
    assert tags.items() >= {"host": "node-2", "ray_job": "first-try-1", "parameters": "1,000"}.items()
    assert run_file(tmp_path)["tags"].items() >= {"host": "node-2", "parameters": "1,000"}.items()


def test_sample_answers_are_a_table_that_grows_during_the_run(tmp_path, config, client):
    config = config.model_copy(update={"name": "answers"})
    run = start(tmp_path, config)
    texts = {"question": "Which?", "reference": "red", "answer": "blue\x1b[31m"}

    def rows():
        with suppress(OSError, MlflowException):
            return mlflow.artifacts.load_dict(f"{client.get_run(run.run_id).info.artifact_uri}/answers.json")

    for step in (5, 10):
        run_folder.write_answers(str(tmp_path), step, [{"row": 0, "kind": None, **texts, "right": False}])
        run.queue_answers()
        wait_for(lambda: (rows() or {"data": []})["data"][:1], lambda data, step=step: data and data[0][0] == step)
    table = rows()
    assert table["columns"] == ["step", "row", "kind", "question", "reference", "answer", "right"]
    assert [row[:4] for row in table["data"]] == [[10, 0, None, "Which?"], [5, 0, None, "Which?"]]
    tags = client.get_run(run.run_id).data.tags
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "answers.json", "type": "table"}]
    run.finish("FINISHED")
    assert rows() == table


def test_sample_answers_stand_beside_the_frames_that_they_are_about(tmp_path, config, client):
    run = start(tmp_path, config.model_copy(update={"name": "pictures"}))
    texts = {"kind": None, "question": "Which?", "reference": "red", "answer": "blue", "right": False}
    jpeg = square([np.full((3, 8, 8, 3), 200, np.uint8)])
    with av.open(io.BytesIO(jpeg)) as picture:
        shown = next(picture.decode(video=0)).to_ndarray(format="gray")
    # Three frames, and an empty place.
    middles = slice(SIDE // 2, None, SIDE)
    assert (shown[middles, middles] > 100).tolist() == [[True, True], [True, False]]
    run_folder.write_answers(str(tmp_path), 5, [{"row": 3, **texts}, {"row": 4, **texts}])
    run_folder.write_pictures(str(tmp_path), {3: jpeg, 9: jpeg})
    run_folder.write_answers(str(tmp_path), 10, [{"row": 3, **texts}])
    run.finish("FINISHED")
    root = client.get_run(run.run_id).info.artifact_uri
    table = mlflow.artifacts.load_dict(f"{root}/answers.json")
    path = "table_images/answers/row-00000003.jpg"
    cell = {"type": "image", "filepath": path, "compressed_filepath": path}
    assert [row[:3] for row in table["data"]] == [[cell, 10, 3], [cell, 5, 3], [None, 5, 4]]
    assert table["columns"][0] == "frames"
    assert [file.path for file in client.list_artifacts(run.run_id, "table_images/answers")] == [path]
    assert Path(mlflow.artifacts.download_artifacts(f"{root}/{path}")).read_bytes() == jpeg


def wait_for(look, is_there):
    until = time.monotonic() + 30
    while not is_there(look()):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_what_a_run_took_survives_its_driver(tmp_path, config):
    """The next start's budget counts it."""
    config = config.model_copy(update={"name": "costly"})
    run = start(tmp_path, config)
    assert run_file(tmp_path)["worker_seconds"] == 0
    run.save_worker_seconds(7.5)
    assert run_file(tmp_path)["worker_seconds"] == 7.5
    run.tag({"ended": "failed: worker 0: no"})
    run.finish("FAILED")
    assert run_file(tmp_path)["tags"]["ended"] == "failed: worker 0: no"
    start(tmp_path, config).finish("FAILED")
    assert run_file(tmp_path)["worker_seconds"] == 7.5
