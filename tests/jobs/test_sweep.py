"""A sweep end to end: killed and resumed, with one trial stopped early and one failure; its MLflow runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from selenium.webdriver.support.ui import WebDriverWait

from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.sweep import trials
from tests.support.browser_page import resize
from tests.support.common import ROOT, processes

# Five starts of jobs that train or encode, half a minute each where nothing else runs.
pytestmark = pytest.mark.timeout(900)
STEPS, EVERY = 8, 2
# In this order, one at a time: a good one, one whose gradient is not finite, one that does not learn and is stopped at
# the first rung.
SPACE = """
from ray import tune
RATES = [1e-3, 1e30, 1e-9]
def space(config):
    return {"train.learning_rate.decoder": tune.grid_search(RATES)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sample_set(str(folder / "data"), train=48, held_out=8)
    (folder / "space.py").write_text(SPACE)
    return folder


def command(folder, *more):
    return [
        "python", "jobs/tune.py", "--config=tiny", "--config=tiny-sweep", f"--space={folder}/space.py", "--name=sweep",
        f"--storage={folder}/runs", f"--tracking.uri=sqlite:///{folder}/mlflow.db",
        f"--data.manifest={folder}/data/train.jsonl", f"--data.validation_manifest={folder}/data/held_out.jsonl",
        f"--train.max_steps={STEPS}", "--train.epochs=9", "--train.global_batch_size=8", "--train.warmup_steps=1",
        f"--train.validate_every={EVERY}", f"--train.checkpoint_every={EVERY}", "--train.keep_checkpoints=9",
        "--train.final_learning_rate_share=1", "--scaling.max_failures=0",
        # A trial whose workers' place leaked would leave no room for the next one.
        "--scaling.cpus_per_worker=1.2", "--first_rung=0.6", "--features=bf16", *more,
    ]  # fmt: skip


def submit(cluster, *entrypoint):
    return subprocess.Popen(cluster.submit(*entrypoint), env=cluster.environment, cwd="/", stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.fixture(scope="module")
def swept(cluster, folder):
    """Killed with SIGKILL when the last trial has a checkpoint, then the same command again, and its model promoted."""
    sweep = folder / "runs" / "sweep"
    job = submit(cluster, *command(folder))
    until = time.monotonic() + 400
    while not list(sweep.glob(f"002-*/step-{EVERY:08d}-*/seal.json")):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until, [trial.state for trial in trials.read(str(sweep))]
        time.sleep(0.05)
    drivers = [pid for pid, title in processes() if "jobs/tune.py" in title and "submit" not in title]
    assert drivers
    for pid in drivers:
        os.kill(pid, signal.SIGKILL)
    first, _ = job.communicate(timeout=60)
    before = {path.name: path.read_bytes() for path in (sweep / "trials").iterdir()}
    # Whether the sweep recorded the validation before that checkpoint is a race of half a second: make it unrecorded.
    last = json.loads(before["002.json"])
    assert last["state"] == "running", "it was killed too late"
    last["curve"] = []
    (sweep / "trials" / "002.json").write_text(json.dumps(last))
    job = submit(cluster, *command(folder, "--promote=best"))
    second, _ = job.communicate(timeout=400)
    assert job.returncode == 0, second
    outcome = json.loads([line for line in second.splitlines() if line.startswith("{")][-1])
    return first, before, second, outcome


@pytest.fixture(scope="module")
def known(swept, folder):
    return trials.read(str(folder / "runs" / "sweep"))


def test_trials_end_in_the_expected_states(swept, known):
    outcome = swept[3]
    assert [trial.state for trial in known] == ["finished", "failed", "stopped early"]
    counted = (outcome["trials"], outcome["finished"], outcome["stopped_early"], outcome["failed"])
    assert counted == (3, 1, 1, 1)
    assert [len(trial.curve) for trial in known] == [4, 0, 3]
    assert "FloatingPointError: the gradient's norm is" in known[1].error
    # The first validation at or after 0.6 of 8 steps; what it is measured against was trained before the kill.
    assert known[2].last.step == 3 * EVERY


def test_resume_repeats_no_trial_and_uses_checkpoints(swept, folder):
    first, before, second, _ = swept
    sweep = folder / "runs" / "sweep"
    for number in (0, 1):
        assert (sweep / "trials" / f"{number:03d}.json").read_bytes() == before[f"{number:03d}.json"]
        assert f"trial {number}  starts" in first
        assert f"trial {number}  starts" not in second
    assert "trial 2  starts" in second
    # A start from nothing would have saved the first steps again, under another attempt's name.
    saved = sorted(path.name.rpartition("-")[0] for path in sweep.glob("002-*/step-*"))
    assert saved[0] == f"step-{EVERY:08d}"
    assert len(saved) == len(set(saved)) > 1


def test_videos_are_encoded_once(swept):
    first, _, second, _ = swept
    assert "to do     56 videos" in first
    assert "videos" not in second


def test_report_is_in_the_folder_and_in_mlflow(swept, folder):
    outcome = swept[3]
    assert Path(outcome["report"]).read_text().startswith("<!")
    artifacts = {item.path for item in client(folder).list_artifacts(outcome["run_id"])}
    assert "report.html" in artifacts


def client(folder):
    return MlflowClient(f"sqlite:///{folder}/mlflow.db")


@pytest.fixture(scope="module")
def server(swept, folder):
    """MLflow's own server on the sweep's store, as `make ui` starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, cwd=folder,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).read()
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()
                assert time.monotonic() < until, (folder / "server.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(server, path, **body):
    request = urllib.request.Request(
        f"{server}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=30).read())


def by_key(items):
    return {item["key"]: item["value"] for item in items}


def test_rest_api_shows_a_parent_and_a_child_per_trial(server, swept, known):
    outcome = swept[3]
    experiments = post(server, "experiments/search", max_results=9)["experiments"]
    (experiment,) = [e["experiment_id"] for e in experiments if e["name"] == "crosslmm"]
    runs = post(server, "runs/search", experiment_ids=[experiment], max_results=50)["runs"]
    tags = {run["info"]["run_id"]: by_key(run["data"]["tags"]) for run in runs}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in tags[run["info"]["run_id"]]]
    assert parent["info"]["run_id"] == outcome["run_id"]
    assert (parent["info"]["run_name"], parent["info"]["status"]) == ("sweep", "FINISHED")
    children = {run["info"]["run_id"]: run for run in runs if run is not parent}
    assert children.keys() == {trial.run_id for trial in known}
    statuses = {"finished": "FINISHED", "stopped early": "FINISHED", "failed": "FAILED"}
    for trial in known:
        child = children[trial.run_id]
        assert tags[trial.run_id]["mlflow.parentRunId"] == outcome["run_id"]
        assert tags[trial.run_id]["state"] == trial.state
        assert tags[trial.run_id]["trial"] == str(trial.number)
        assert child["info"]["status"] == statuses[trial.state]
        params = by_key(child["data"]["params"])
        rate = params["trial.train.learning_rate.decoder"]
        assert float(rate) == trial.point["train.learning_rate.decoder"]
        if trial.state != "failed":
            assert float(params["train.learning_rate.decoder"]) == float(rate)
        metrics = by_key(child["data"]["metrics"])
        assert metrics["cost/macs_behind_encoder"] == trial.macs
        assert metrics["cost/tokens_per_frame"] == 16
        assert metrics["cost/memory_bytes"] == trial.memory_bytes
        assert metrics["cost/seconds"] == pytest.approx(trial.seconds, rel=0.01)


def test_curves_of_children_hold_each_step_once(swept, known, folder):
    for trial in known:
        losses = client(folder).get_metric_history(trial.run_id, "loss")
        steps = sorted(metric.step for metric in losses)
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) >= (trial.last.step if trial.last else 1)
        validations = client(folder).get_metric_history(trial.run_id, "validation/loss")
        assert {metric.step: pytest.approx(metric.value) for metric in validations} == {
            rung.step: rung.loss for rung in trial.curve
        }


def test_best_trial_is_promoted_with_its_lineage(server, swept, known):
    promoted = swept[3]["promoted"]
    best = trials.best(known)
    assert promoted["trial"] == best.number
    assert promoted["expected"]
    assert isinstance(promoted["answer"], str)  # eight steps teach no more than to load and to end
    response = urllib.request.urlopen(
        f"{server}/api/2.0/mlflow/registered-models/alias?name=crosslmm&alias=candidate", timeout=30
    )
    version = json.loads(response.read())["model_version"]
    tags = by_key(version["tags"])
    assert version["run_id"] == best.run_id
    assert (tags["sweep"], tags["trial"], tags["promoted_as"]) == (swept[3]["run_id"], str(best.number), "best")
    assert len(tags["data_sha256"]) == 64
    assert tags["validation"].startswith(f"accuracy {best.last.accuracy:.4f} (")
    # The page of a version shows its tags in full.
    assert all(len(value) < 100 for value in tags.values())


def wait_for_texts(browser, address, *texts):
    """Open a page of MLflow's and wait until all of these can be read on it."""
    browser.get("about:blank")
    browser.get(address)
    body = lambda: browser.find_element("css selector", "body").text  # noqa: E731
    WebDriverWait(browser, 60).until(lambda _: all(text in body() for text in texts), f"not all of {texts} are shown")


def test_mlflow_pages_show_nested_runs_and_aliases(server, swept, known, browser):
    resize(browser, 1600)
    experiment = MlflowClient(server).get_experiment_by_name("crosslmm").experiment_id
    wait_for_texts(
        browser, f"{server}/#/experiments/{experiment}/runs?workflowType=machine_learning", "sweep", "4 matching runs"
    )
    assert known[0].title not in browser.find_element("css selector", "body").text
    browser.find_element("css selector", "[role=row] button[data-component-id*=runnamecellrenderer]").click()
    names = [trial.title for trial in known]
    WebDriverWait(browser, 30).until(
        lambda _: all(name in browser.find_element("css selector", "body").text for name in names)
    )
    wait_for_texts(browser, f"{server}/#/models/crosslmm", "Version 1", "@ candidate", "promoted_as")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space=joint", "--scheduler=pbt"], "--scheduler pbt: it continues trials from other trials' checkpoints"),
        (["--space=joint", "--scheduler=best"], "--scheduler best: choose asha or none"),
        (["--space=joint", "--dollars=5"], "--dollars: needs --price"),
        (["--space=joint", "--promote=winner"], "--promote winner: give best, knee, or a trial's number"),
        (["--space=deep"], "--space deep: neither a file nor one of"),
        (["--data.manifest=x.jsonl"], "data.validation_manifest: trials are compared on held-out samples"),
    ],
)
def test_bad_arguments_are_rejected_before_a_start(tmp_path, arguments, message):
    done = subprocess.run([sys.executable, "jobs/tune.py", f"--storage={tmp_path}", *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
