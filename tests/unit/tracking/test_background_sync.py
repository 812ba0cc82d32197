"""Runs whose MLflow server is away at the start, in the middle, at the end or always. Servers are real processes."""

import http.server
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from mlflow.tracking import MlflowClient

from crosslmm import run_folder, tracking
from crosslmm.cli import parse_run
from crosslmm.config import BadConfig
from crosslmm.text import safe_name
from tests.support.common import ROOT

pytestmark = pytest.mark.fault
FAST = tracking.SyncTimeouts(end_s=1.0, stopped_end_s=1.0, retry_s=0.3)
"""For tests whose server is away: seconds instead of a minute."""
DATASET = {"uri": "s3://bucket/rows.jsonl", "digest": "0123456789abcdef" * 4, "rows": 7, "context": "training"}
REPLAY = "python jobs/track.py replay --storage {0} --name {1} delivers the rest"


class Messages(logging.Handler):
    """Appends the messages of one run's thread and of the main thread to a list."""

    def __init__(self, folder, messages):
        super().__init__()
        self.threads, self.messages = ("MainThread", f"MLflow sync of {folder}"), messages

    def emit(self, record):
        if record.threadName in self.threads:
            self.messages.append(record.getMessage())


class Server:
    """`mlflow server` over sqlite, on one port for all of its lives."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self, wait=True):
        """Nothing happens if it is there."""
        if self.process is None:
            command = [
                sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/record.db",
                "--artifacts-destination", f"{self.folder}/artifacts",
            ]  # fmt: skip
            with (self.folder / "server.log").open("ab") as log:
                self.process = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=log)
        while wait:
            try:
                return urllib.request.urlopen(f"{self.uri}/health", timeout=5).read()
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def kill(self):
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server):
    one_server.start()
    return one_server


@pytest.fixture
def client(one_server):
    return MlflowClient(one_server.uri)


@pytest.fixture
def impatient(monkeypatch):
    """Make MLflow's client wait for seconds instead of half a minute."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


def steps(*numbers, began=1e9):
    return [(step, began + step, {"loss": 1 / step, "lr": 0.1}) for step in numbers]


@pytest.fixture
def begin(one_server, tmp_path, request):
    """Begin or resume a run -> its BackgroundSync, its folder, and the messages that it logs from now on."""
    logger = logging.getLogger("crosslmm.tracking.background_sync")
    handlers = []

    default = FAST if "impatient" in request.fixturenames else tracking.SyncTimeouts()

    def begin(name, timeouts=default):
        config = parse_run([f"--tracking.uri={one_server.uri}", f"--name={name}"], "a test")
        folder, messages = tmp_path / name, []
        run_folder.begin_run(config, str(folder), {}, [DATASET])
        handlers.append(Messages(folder, messages))
        logger.addHandler(handlers[-1])
        return tracking.BackgroundSync(str(folder), config.tracking, timeouts), folder, messages

    logger.setLevel(logging.INFO)
    yield begin
    logger.setLevel(logging.NOTSET)
    for handler in handlers:
        logger.removeHandler(handler)


def recorded(client, run_id):
    """(step, unix time [s]) of each loss."""
    return [(m.step, m.timestamp / 1000) for m in client.get_metric_history(run_id, "loss")]


def times(*numbers, began=1e9):
    return [(step, began + step) for step in numbers]


def rows(job):
    """Of the table that it printed."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in job.stdout.splitlines() if "│" in line]


def test_server_away_at_start_and_hanging_later(one_server, client, begin, impatient):
    one_server.kill()
    began = time.monotonic()
    run, folder, messages = begin("late")
    assert time.monotonic() - began < 10  # without its own limit, MLflow retries for half a minute and more
    waits = f"MLflow: {one_server.uri} does not answer; the run goes on, and what it has for MLflow waits in {folder}"
    assert messages == [waits]
    assert json.loads((folder / "run.json").read_text())["run_id"] is None
    run.log(steps(1, 2))
    run.wait_delivered(0.1)
    run.log(steps(3))
    one_server.start()
    run.wait_delivered(60)
    assert recorded(client, run.run_id) == times(1, 2, 3)
    assert messages[1:] == [f"MLflow: {one_server.uri} answers; run {run.run_id} has the steps that waited"]
    assert json.loads((folder / "run.json").read_text())["run_id"] == run.run_id

    one_server.signal(signal.SIGSTOP)
    try:
        for number in range(4, 104):
            began = time.monotonic()
            run.log(steps(number))
            assert time.monotonic() - began < 0.1
        began = time.monotonic()
        hung, folder, messages = begin("hung", replace(FAST, start_s=1.0))
        waits = (
            f"MLflow: {one_server.uri} does not answer; the run goes on, and what it has for MLflow waits in {folder}"
        )
        assert messages == [waits]
        hung.finish("KILLED")
        assert 1 < time.monotonic() - began < 5
        assert not hung.delivered
    finally:
        one_server.signal(signal.SIGCONT)
    run.wait_delivered(60)
    run.finish("FINISHED")
    assert run.delivered, repr(run._error)  # failed twice on a loaded machine, without a message
    assert recorded(client, run.run_id) == times(*range(1, 104))
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_server_away_during_the_run(server, client, begin, impatient):
    run, _, messages = begin("gap")
    run.log(steps(1, 2))
    run.wait_delivered(60)
    server.kill()
    run.log(steps(3))
    run.wait_delivered(1)
    run.log(steps(4, 3, 4, began=2e9))  # workers that started again
    run.wait_delivered(0.1)
    server.start()
    run.log(steps(5, began=2e9))
    run.wait_delivered(60)
    run.finish("FINISHED")
    assert recorded(client, run.run_id) == [*times(1, 2, 3), *times(4, 5, began=2e9)]
    assert messages == [
        f"MLflow: {server.uri} does not answer; steps wait",
        f"MLflow: {server.uri} answers; run {run.run_id} has the steps that waited",
    ]


def test_server_away_at_the_end_then_replay(server, client, begin, impatient, tmp_path):
    """The last one has a model, which the replay registers; and its driver never knew the MLflow run."""
    ended, ended_in, messages = begin("ended")
    ended.log(steps(1, 2))
    ended.wait_delivered(60)
    run_id = ended.run_id
    server.kill()
    ended.log(steps(3))
    ended.finish("FAILED")
    assert (ended.delivered, ended.run_id, ended.model_uri, ended.model_version) == (False, None, None, None)
    assert messages[-1] == f"MLflow: {server.uri} does not answer; {REPLAY.format(tmp_path, 'ended')}"
    (saved,) = (ended_in / "history").iterdir()
    assert json.loads(saved.read_text()) == {"step": 3, "time": 1e9 + 3, "metrics": {"loss": 1 / 3, "lr": 0.1}}

    always, folder, messages = begin("always")
    always.log(steps(1, 2))
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("these")
    (folder / "quarantine.jsonl").write_text("that")
    always.finish("FINISHED", {"data_sha256": "abc"})
    assert (always.delivered, always.run_id, always.model_uri) == (False, None, None)
    assert messages[-1].endswith(f"{REPLAY.format(tmp_path, 'always')} and registers the model")
    end = json.loads((folder / "run.json").read_text())
    assert (end["status"], end["run_id"]) == ("FINISHED", None)

    command = [sys.executable, "jobs/track.py", "replay", "--storage", str(tmp_path)]
    options = {"cwd": ROOT, "capture_output": True, "text": True}
    away = subprocess.run(command, **options)
    assert away.returncode == 1
    assert away.stderr.splitlines() == [
        f"error: {name}: tracking.uri: {server.uri} does not answer" for name in ("ended", "always")
    ]

    server.start()
    printed = subprocess.run(command, **options)
    assert printed.returncode == 0, printed.stderr
    of_ended, of_always = rows(printed)
    assert of_ended == ["ended", run_id, "2", "FAILED", ""]
    assert of_always[2:] == ["4", "FINISHED", "models:/crosslmm/1"]
    assert recorded(client, run_id) == times(1, 2, 3)
    made = client.get_run(of_always[1])
    assert recorded(client, made.info.run_id) == times(1, 2)
    assert (made.info.run_name, made.info.status) == ("always", "FINISHED")
    assert (made.info.start_time, made.info.end_time) == (int(end["start_time"] * 1000), int(end["end_time"] * 1000))
    assert made.data.params["name"] == "always"
    assert {item.path for item in client.list_artifacts(made.info.run_id)} == {"quarantine.jsonl"}
    registered = client.get_model_version_by_alias("crosslmm", "candidate")
    assert (registered.run_id, registered.tags["data_sha256"]) == (made.info.run_id, "abc")

    (logged,) = client.search_logged_models([made.info.experiment_id])
    assert logged.source_run_id == made.info.run_id

    again = subprocess.run([*command, "--name", "always", "ended"], **options)
    assert again.returncode == 0, again.stderr
    assert [row[2] for row in rows(again)] == ["0", "0"]
    assert len(client.search_model_versions("name = 'crosslmm'")) == 1
    assert client.get_run(made.info.run_id).to_dictionary() == made.to_dictionary()
    unknown = subprocess.run([*command, "--name", "nobody"], **options)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


def test_resume_after_a_killed_driver_has_each_step_once(server, client, begin, tmp_path):
    """Before that, its MLflow run was made and its folder does not know: as if killed in between."""
    script = f"""if True:
        import os, signal
        from crosslmm import run_folder, tracking
        from crosslmm.cli import parse_run
        tracking.quiet_mlflow()
        config = parse_run(["--tracking.uri={server.uri}", "--name=killed"], "a test")
        run_folder.begin_run(config, "{tmp_path}/killed", {{}}, [])
        run = tracking.BackgroundSync("{tmp_path}/killed", config.tracking)
        run.log([(step, 1e9 + step, {{"loss": 1 / step, "lr": 0.1}}) for step in (1, 2, 3, 4)])
        run.wait_delivered(60)
        print(run.run_id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    known = tmp_path / "killed" / "run.json"
    known.write_text(json.dumps(json.loads(known.read_text()) | {"run_id": None}))
    run, _, _ = begin("killed")
    assert run.run_id == killed.stdout.split()[-1]
    run.log(steps(3, 4, 5, began=2e9))
    run.finish("FINISHED")
    assert recorded(client, run.run_id) == [*times(1, 2, 3, 4), *times(5, began=2e9)]


def test_kinds_of_questions_that_are_no_names_reach_the_server(server, client, begin):
    kinds = ["what?", "OCR & text", "", "x" * 300, "../loss", "\x1b[31m\n", "हिन्दी"]
    run, folder, messages = begin("kinds")
    values = {f"validation/accuracy/{kind}": float(i) for i, kind in enumerate(kinds)}
    run.log([(1, 1e9 + 1, {"loss": 1.0} | values)])
    run.finish("FINISHED")
    assert run.delivered
    assert not messages
    data = client.get_run(run.run_id).data
    assert {name: data.metrics[safe_name(name)] for name in values} == values
    assert data.tags[f"original_name/{safe_name('validation/accuracy/what?')}"] == "validation/accuracy/what?"
    assert tracking.replay(str(folder)).points == 0


def test_replays_during_a_run_repeat_no_step(server, client, begin):
    run, folder, _ = begin("both")
    (folder / "history").mkdir()
    lines = [
        json.dumps({"step": step, "time": when, "metrics": values}) for step, when, values in steps(*range(1, 400))
    ]
    (folder / "history" / "step-00000399.jsonl").write_text("\n".join(lines))
    replays = [threading.Thread(target=tracking.replay, args=(str(folder),)) for _ in range(2)]
    for replay in replays:
        replay.start()
    for number in range(1, 401):
        run.log(steps(number))
    run.wait_delivered(60)
    for replay in replays:
        replay.join()
    assert client.get_run(run.run_id).info.status == "RUNNING"
    run.finish("FINISHED")
    assert recorded(client, run.run_id) == times(*range(1, 401))


def test_a_sweeps_run_retries_while_the_server_is_away(server, client, begin, impatient, caplog):
    config = parse_run([f"--tracking.uri={server.uri}"], "a test").tracking
    record = tracking.MlflowRun.create(config, "sweep", "a test")
    server.kill()
    server.start(wait=False)
    record.log_values({"cost/seconds": 1.0}, {"state": "finished"})
    assert client.get_run(record.run_id).data.metrics == {"cost/seconds": 1.0}
    (messages,) = [entry.getMessage() for entry in caplog.records if entry.name == "crosslmm.tracking.client"]
    assert messages == f"MLflow: {server.uri} does not answer; retrying for 10 minutes"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_end_the_run_at_its_start(status, begin, one_server, monkeypatch):
    """A proxy in front of the server requires a password."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(status)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setattr(one_server, "uri", f"http://127.0.0.1:{proxy.server_port}")
        with pytest.raises(BadConfig, match=f"tracking.uri: {one_server.uri} refuses: .*{status}"):
            begin("refused")
        with pytest.raises(BadConfig, match="refuses"):
            tracking.require_answer(parse_run([f"--tracking.uri={one_server.uri}"], "a test").tracking)
        proxy.shutdown()
