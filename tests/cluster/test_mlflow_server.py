"""MLflow server as on clusters: train, tune, promote, load and prune against it; logins that it refuses."""

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys

import fsspec
import pytest

from crosslmm import storage
from crosslmm.data.samples.shapes import write_sample_set
from tests.support.common import ROOT
from tests.support.mlflow_server import running_mlflow_server
from tests.support.object_store import object_store_in_use

# Beside a full CI run a training took 245 s with its store and server, and the sweep had not ended after 400 s.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
DATA, RUNS, ARTIFACTS = "s3://videos/data", "s3://videos/runs", "s3://crosslmm-example/mlflow"
SPACE = """
from ray import tune
def space(config):
    return {"train.learning_rate.decoder": tune.grid_search([1e-3, 2e-3])}
"""
SMALL = [
    f"--storage={RUNS}", f"--data.manifest={DATA}/train.jsonl", f"--data.validation_manifest={DATA}/held_out.jsonl",
    "--train.max_steps=2", "--train.epochs=9", "--train.global_batch_size=8", "--train.micro_batch_size=4",
    "--train.warmup_steps=1", "--train.validate_every=2", "--train.checkpoint_every=1", "--scaling.max_failures=0",
]  # fmt: skip
TABLES = ["runs", "params", "metrics", "latest_metrics", "tags", "logged_models"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "swift"
    with object_store_in_use(root, venv=ROOT / ".cache" / "swift-venv", bucket="videos") as store:
        write_sample_set(DATA, train=24, held_out=8)
        yield store


@pytest.fixture(scope="module")
def server(store):
    with running_mlflow_server(store) as server:
        yield server


def job(server, *command, status=0, password=None):
    """Run a command against the server -> its last line on stdout, and its output."""
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | server.login(password),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return (done.stdout.splitlines() or [""])[-1], done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(server):
    return json.loads(job(server, "jobs/train.py", "--config=tiny", "--name=first", *SMALL)[0])


@pytest.fixture(scope="module")
def swept(server, trained, tmp_path_factory):
    """Later than the training, whose model its own one supersedes."""
    space = tmp_path_factory.mktemp("space") / "space.py"
    space.write_text(SPACE)
    command = ["jobs/tune.py", "--config=tiny", "--config=tiny-sweep", f"--space={space}", "--name=sweep", *SMALL]
    return json.loads(job(server, *command, "--scheduler=none", "--features=never", "--promote=best")[0])


def objects(*folders):
    """All objects of these folders, those that Arrow makes of folders below them included."""
    found = {f"s3://{key}" for folder in folders for key in fsspec.filesystem("s3").find(folder, refresh=True)}
    return found - {f"{folder}/" for folder in folders}


def owner(name):
    """Whose an object is: a run's or a model's in MLflow, or of a folder below RUNS."""
    if name.startswith(f"{RUNS}/"):
        return name.removeprefix(f"{RUNS}/").split("/")[0]
    _experiment, one, two, *_ = name.removeprefix(f"{ARTIFACTS}/").split("/")
    return two if one == "models" else one


def test_a_training_is_recorded_and_its_model_registered(server, trained):
    assert trained["model_uri"] == "models:/crosslmm@candidate"
    run = trained["run_id"]
    assert server.query(f"SELECT status FROM runs WHERE run_uuid = '{run}'") == [("FINISHED",)]
    steps = server.query(f"SELECT step FROM metrics WHERE run_uuid = '{run}' AND key = 'loss' ORDER BY step")
    assert steps == [(1,), (2,)]
    # Weights lie in the store, brought there by the server.
    assert any(name.endswith("/model.safetensors") for name in objects(ARTIFACTS))


def test_a_sweep_is_recorded_and_its_best_model_answers(server, swept):
    assert (swept["trials"], swept["finished"]) == (2, 2)
    assert swept["promoted"]["model_uri"] == "models:/crosslmm@candidate"
    assert isinstance(swept["promoted"]["answer"], str)
    children = f"SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId' AND value = '{swept['run_id']}'"
    assert server.query(children) == [(2,)]
    versions = "SELECT version, run_id FROM model_versions WHERE current_stage != 'Deleted_Internal' ORDER BY version"
    assert len(server.query(versions)) == 2
    assert server.query("SELECT alias, version FROM registered_model_aliases") == [("candidate", 2)]


def test_prune_leaves_no_trace_and_the_kept_model_answers(server, trained, swept):
    old, retained = trained["run_id"], swept["run_id"]
    prune = ["jobs/track.py", "prune", f"--storage={RUNS}", "--older_than=0", "--keep=0"]
    before = objects(ARTIFACTS, RUNS)
    _, output = job(server, *prune)
    assert "1 of 2 would be removed" in output
    assert "its model is crosslmm@candidate" in output
    assert objects(ARTIFACTS, RUNS) == before

    ((model,),) = server.query(f"SELECT model_id FROM logged_models WHERE source_run_id = '{old}'")
    _, output = job(server, *prune, "--delete=true")
    assert "first is removed" in output
    after = objects(ARTIFACTS, RUNS)
    # Runs and models are removed completely, and all remaining objects belong to remaining ones.
    left = [run for (run,) in server.query("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'")]
    models = [m for (m,) in server.query("SELECT model_id FROM logged_models WHERE lifecycle_stage = 'active'")]
    assert len(left) == 3
    assert len(models) == 1
    assert {owner(name) for name in after} <= {*left, *models, "sweep"}
    assert models[0] in {owner(name) for name in after}
    removed = {owner(name) for name in before - after}
    assert {model, "first"} <= removed
    assert not removed & {*left, *models, "sweep"}

    # A week later the nightly job deletes the rows.
    week = 8 * 86400 * 1000
    server.query(f"UPDATE runs SET deleted_time = deleted_time - {week} WHERE lifecycle_stage = 'deleted'")
    deleted = "lifecycle_stage = 'deleted'"
    server.query(
        f"UPDATE logged_models SET last_updated_timestamp_ms = last_updated_timestamp_ms - {week} WHERE {deleted}"
    )
    assert f"Run with ID {old} has been permanently deleted" in server.run("gc")
    for table in TABLES:
        column = "source_run_id" if table == "logged_models" else "run_uuid"
        rows = {run for (run,) in server.query(f"SELECT DISTINCT {column} FROM {table}")}
        assert rows, table
        assert rows <= set(left), table
    assert old not in left
    assert retained in left
    assert server.query("SELECT version FROM model_versions WHERE current_stage != 'Deleted_Internal'") == [(2,)]
    assert objects(ARTIFACTS, RUNS) == after

    # Exit status 0: the kept model is loaded from the registry and answers.
    row = json.loads(storage.read_bytes(f"{DATA}/held_out.jsonl").decode().splitlines()[0])
    job(server, "jobs/answer.py", f"--video={DATA}/{row['video']}", "--question=Which shape is it?")
    _, output = job(server, *prune)
    assert "0 of 1 would be removed" in output


def test_a_wrong_password_is_refused_before_the_start(server):
    _, output = job(server, "jobs/train.py", "--config=tiny", "--name=stranger", *SMALL, status=2, password="wrong")
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert error.startswith(f"error: tracking.uri: {server.uri} refuses: ")
    assert "MLFLOW_TRACKING_PASSWORD" in error
    assert "training" not in output
    for command in (
        ["jobs/track.py", "prune", f"--storage={RUNS}"],
        ["jobs/tune.py", "--name=stranger", "--scheduler=none", *SMALL],
    ):
        _, output = job(server, *command, status=2, password="wrong")
        assert "refuses: " in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("host", "login", "status"),
    [("localhost:{}", False, 401), ("127.0.0.1:{}", True, 403), ("evil.example", True, 403)],
)
def test_missing_logins_and_other_host_names_are_refused(server, host, login, status):
    headers = {"Host": host.format(server.port), "Content-Type": "application/json"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(f"admin:{server.password}".encode()).decode()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)) as connection:
        connection.request("POST", "/api/2.0/mlflow/experiments/search", json.dumps({"max_results": 1}), headers)
        answer = connection.getresponse()
        answer.read()
    assert answer.status == status
