"""Names out of data and configuration that MLflow refuses: the record goes on, over a real store."""

import json
import logging
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, tracking
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.text import safe_name
from crosslmm.tracking import BackgroundSync, RunSync, SyncTimeouts
from crosslmm.tracking.run import ORIGINAL_NAME
from tests.support.common import ROOT

KINDS = [
    "what?",
    "what!",
    "OCR & text",
    "",
    "x" * 300,
    "..",
    "../loss",
    "a//b",
    "a\nb",
    "\x1b[31m",
    "हिन्दी",
    "🦜",
    "loss",
]
PREFIX = "validation/accuracy/"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    return parse_run(
        [f"--tracking.uri=sqlite:///{folder}/record.db", f"--tracking.artifacts={folder}/artifacts", "--name=odd"],
        "a test",
    )


@pytest.fixture
def client(config):
    return MlflowClient(config.tracking.uri)


def validated(step):
    """A step with a validation, each kind with another accuracy."""
    kinds = {f"{PREFIX}{kind}": i + step / 10 for i, kind in enumerate(KINDS)}
    return step, 1e9 + step, {"loss": 1 / step, "validation/loss": 2.0, "validation/accuracy": 0.5, **kinds}


def begin(config, folder, datasets=()):
    run_folder.begin_run(config, str(folder), {}, list(datasets))


def require_all_kinds(client, run_id, steps):
    run = client.get_run(run_id)
    for i, kind in enumerate(KINDS):
        name = safe_name(f"{PREFIX}{kind}")
        history = client.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(step, i + step / 10) for step in steps], kind
    originals = {key: value for key, value in run.data.tags.items() if key.startswith(ORIGINAL_NAME)}
    assert originals[f"{ORIGINAL_NAME}{safe_name(f'{PREFIX}what?')}"] == f"{PREFIX}what?"
    assert originals[f"{ORIGINAL_NAME}{safe_name(PREFIX)}"] == PREFIX
    assert len(originals) == len(KINDS) - 1  # loss is a good name
    assert f"{PREFIX}loss" in run.data.metrics
    assert run.data.metrics["loss"] == 1 / steps[-1]


@pytest.mark.filterwarnings("ignore:(?s).*input example:UserWarning")  # as jobs do
def test_any_kind_of_question_is_recorded_and_the_run_ends_with_a_model(config, client, tmp_path):
    begin(config, tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("these")
    run = BackgroundSync(str(tmp_path), config.tracking)
    run.log([validated(1)])
    run.wait_delivered(60)
    run.log([validated(2)])
    run.finish("FINISHED", {"data_sha256": "abc"})
    assert run.delivered
    assert run.model_uri == "models:/crosslmm@candidate"
    assert client.get_run(run.run_id).info.status == "FINISHED"
    require_all_kinds(client, run.run_id, [1, 2])


def test_a_replay_delivers_what_an_earlier_version_could_not(config, client, tmp_path):
    """Its history has the kinds as the rows name them: of the workers, and what the driver could not send."""
    config = config.model_copy(update={"name": "earlier"})
    begin(config, tmp_path)
    (tmp_path / "history").mkdir()
    for file, steps in {"step-00000001": [1], "driver-5": [2, 3]}.items():
        lines = [
            json.dumps({"step": step, "time": when, "metrics": values}) for step, when, values in map(validated, steps)
        ]
        (tmp_path / "history" / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    run = json.loads((tmp_path / "run.json").read_text()) | {"status": "FAILED", "end_time": 2e9}
    (tmp_path / "run.json").write_text(json.dumps(run))
    done = tracking.replay(str(tmp_path))
    assert (done.points, done.status) == (3 * (3 + len(KINDS)), "FAILED")
    require_all_kinds(client, done.run_id, [1, 2, 3])
    assert tracking.replay(str(tmp_path)).points == 0


def test_parameters_with_names_of_a_cluster_s_choice(config, client, tmp_path):
    resources = {"GPU (A100)": 1.0, "": 2.0, "r" * 300: 3.0, "TPU-v4": 4.0, "../name": 5.0}
    scaling = config.scaling.model_copy(update={"worker_resources": resources})
    config = config.model_copy(update={"name": "parameters", "scaling": scaling})
    begin(config, tmp_path)
    run = BackgroundSync(str(tmp_path), config.tracking)
    run.finish("FINISHED")
    assert run.delivered
    data = client.get_run(run.run_id).data
    assert data.params["name"] == "parameters"
    for resource, amount in resources.items():
        key = f"scaling.worker_resources.{resource}"
        assert data.params[safe_name(key)] == str(amount)
        assert data.tags.get(f"{ORIGINAL_NAME}{safe_name(key)}", key) == key


def test_one_refused_item_is_left_out_and_the_rest_is_delivered(config, client, tmp_path, monkeypatch, caplog):
    """A server on Windows takes no colon; one refuses the name of an input that is longer than 500."""
    monkeypatch.setattr("mlflow.utils.validation.is_windows", lambda: True)
    dataset = {"uri": f"s3://bucket/{'a' * 600}", "digest": "ab" * 32, "rows": 7, "context": "training"}
    scaling = config.scaling.model_copy(update={"worker_resources": {"node:a": 1.0}})
    config = config.model_copy(update={"name": "windows", "scaling": scaling})
    begin(config, tmp_path, [dataset, dataset | {"uri": "s3://bucket/rows.jsonl"}])
    with caplog.at_level(logging.WARNING):
        run = BackgroundSync(str(tmp_path), config.tracking)
        for step in (1, 2):
            run.log([(step, 1e9, {"loss": 1.0, f"{PREFIX}a:b": 0.1, f"{PREFIX}c": 0.2, f"{PREFIX}d:e": 0.3})])
            run.wait_delivered(60)
        run.finish("FINISHED")
    assert run.delivered
    recorded = client.get_run(run.run_id)
    assert set(recorded.data.metrics) == {"loss", f"{PREFIX}c"}
    assert [m.step for m in client.get_metric_history(run.run_id, f"{PREFIX}c")] == [1, 2]
    assert recorded.data.params["name"] == "windows"
    assert [used.dataset.name for used in recorded.inputs.dataset_inputs] == ["rows.jsonl"]
    left_out = [line.split(" refuses ")[1].split(",")[0] for line in caplog.messages if "left out" in line]
    assert left_out == [
        "params scaling.worker_resources.node:a", f"input {dataset['uri']}",
        f"metrics {PREFIX}a:b", f"metrics {PREFIX}d:e",
    ]  # fmt: skip
    assert all("\n" not in line for line in caplog.messages)


def test_a_registration_that_fails_each_time_does_not_keep_the_run_from_ending(config, client, tmp_path, caplog):
    """Its artifacts belong below what is a file."""
    (tmp_path / "file").write_text("")
    tracked = {"experiment": "unwritable", "artifacts": f"{tmp_path}/file/artifacts"}
    config = config.model_copy(update={"name": "tries", "tracking": config.tracking.model_copy(update=tracked)})
    folder = tmp_path / "run"
    begin(config, folder)
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("these")
    run = BackgroundSync(str(folder), config.tracking, SyncTimeouts(end_s=1.0, retry_s=0.1))
    run.log([validated(1)])
    run.wait_delivered(60)
    run_id = run.run_id
    run.finish("FINISHED", {"data_sha256": "abc"})
    assert not run.delivered
    assert "delivers the rest and registers the model" in caplog.messages[-1]
    while client.get_run(run_id).info.status != "FINISHED":  # the last attempt may still be going on
        time.sleep(0.1)


def test_a_table_of_runs_obeys_no_name(config, tmp_path):
    """A folder can be called anything; rich reads square brackets as markup, and fails at some."""
    folder = tmp_path / "[/x] \x1b[31m [red]"
    begin(config.model_copy(update={"name": "table"}), folder)
    command = [sys.executable, "jobs/track.py", "replay", "--storage", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert r"[/x] \x1b[31m [red]" in done.stdout


def test_a_run_that_was_deleted_is_not_a_run_that_refuses_its_items(config, client, tmp_path):
    config = config.model_copy(update={"name": "deleted"})
    begin(config, tmp_path)
    sync = RunSync(str(tmp_path), run_folder.read_run(str(tmp_path)), config.tracking)
    client.delete_run(sync.run_id)
    with pytest.raises(BadConfig, match="was deleted"):
        sync.log([validated(1)])


@pytest.mark.parametrize(
    "argument",
    [
        "--tracking.registered_model=a/b", "--tracking.registered_model=a:b", "--tracking.registered_model=",
        "--tracking.alias=latest", "--tracking.alias=v3", "--tracking.alias=a b", "--tracking.experiment=",
        f"--tracking.experiment={'x' * 501}", f"--name={'x' * 300}",
    ],
)  # fmt: skip
def test_names_that_mlflow_would_refuse_at_the_end_are_refused_at_the_start(argument):
    key = argument.removeprefix("--").partition("=")[0].replace(".", r"(\.|: )")
    with pytest.raises(BadConfig, match=rf'^"?{key}"?: .') as raised:
        parse_run([argument], "a test")
    assert "\n" not in str(raised.value)
