"""jobs/doctor.py on clusters of several raylets: one that is well, and ten that are not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cluster.local.cluster import LocalCluster
from crosslmm import storage
from crosslmm.data.samples.shapes import write_sample_set
from crosslmm.preflight.checks import ANSWER_WITHIN_S
from tests.support.common import ROOT
from tests.support.object_store import READER, object_store_in_use

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
HOOKS = ROOT / "tests" / "fault_hooks"
LIMIT_S = 240.0
"""Four times what it may take on a quiet machine."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "swift"
    with object_store_in_use(root, venv=ROOT / ".cache" / "swift-venv", bucket="doctor") as store:
        write_sample_set("s3://doctor/data", train=16, held_out=4)
        store.let_read("doctor")
        yield store


@pytest.fixture(scope="module")
def cluster(store):
    # The first node's Ray would let its workers starve beside anything else that runs here.
    environment = store.environment() | {"RAY_worker_niceness": "0"}
    with LocalCluster(num_cpus=2, environment=environment) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [BIN / "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close() is None)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def until(condition, within_s=120.0):
    deadline = time.monotonic() + within_s
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.3)


def alive(cluster):
    """Names of the cluster's nodes, by its own account."""
    header = {"Authorization": f"Bearer {cluster.token.read_text()}"}
    request = urllib.request.Request(f"{cluster.address}/api/v0/nodes", headers=header)
    answer = json.load(urllib.request.urlopen(request, timeout=10))
    return {node["node_name"] for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"}


def starts(cluster, name, *options):
    """The command that starts a further node."""
    ports = ["--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--metrics-export-port=0"]
    ports += ["--runtime-env-agent-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    where = [f"--address={cluster.gcs_address}", "--node-ip-address=127.0.0.1", f"--node-name={name}"]
    return [str(BIN / "ray"), "start", *where, "--num-cpus=2", "--block", "--disable-usage-stats", *ports, *options]


@contextmanager
def node(cluster, name, environment=None, mounts="true", options=()):
    """A further node, in an environment of its own and with file systems that no other process sees."""
    command = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *starts(cluster, name, *options)]
    log = cluster.folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=cluster.environment | (environment or {}), stdout=file, stderr=file, start_new_session=True
        )
    try:
        until(lambda: name in alive(cluster))
        yield
    except AssertionError:
        print(log.read_text()[-3000:])
        raise
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: name not in alive(cluster))


def ask(cluster, tracking_uri, *arguments, environment=None, job="doctor"):
    """What the doctor, or another job, prints, and its exit status."""
    command = [sys.executable, f"jobs/{job}.py", "--storage=s3://doctor/runs", f"--tracking.uri={tracking_uri}"]
    command += ["--data.manifest=s3://doctor/data/train.jsonl", "--data.validation_manifest=null", *arguments]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs_address} | (environment or {})
    environment = {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    print(done.stdout, done.stderr[-2000:])
    return done.stdout + done.stderr * (job != "doctor"), done.returncode


def rows(printed):
    """(ok, what, where, found, what to do) of each row; cells that were broken are joined again."""
    table = []
    for line in printed.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            if cells[0]:
                table.append(cells)
            else:
                table[-1] = [f"{above} {cell}".strip() for above, cell in zip(table[-1], cells, strict=True)]
    return table


def failures(printed):
    """What, where, found and what to do, of what is not well."""
    return [row[1:] for row in rows(printed) if row[0] == "NO"]


def test_a_cluster_that_is_well(cluster, tracking_uri, store):
    with node(cluster, "second"):
        began = time.monotonic()
        printed, status = ask(cluster, tracking_uri)
        took = time.monotonic() - began
    assert status == 0
    alone = ["versions", "clock", "disk", "storage", "manifest", "decoder", "video", "MLflow", "token"]
    assert [row[1] for row in rows(printed)] == [*alone, "all-reduce", "training"]
    assert {row[0] for row in rows(printed)} == {"ok"}
    assert {row[2] for row in rows(printed)} == {"all 2 nodes", ""}
    assert took < LIMIT_S
    assert [name for name in storage.names_in("s3://doctor/runs") if "doctor" in name] == []  # nothing is left behind


def test_a_node_that_may_not_write(cluster, tracking_uri):
    with node(cluster, "reader", {"AWS_ACCESS_KEY_ID": READER}):
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "storage", "reader")
    assert "permission denied" in found
    assert remedy.startswith("let it write there: AWS_* in its environment")


def test_a_node_with_another_ray(cluster, tracking_uri, tmp_path):
    hooked = {"FAULT_HOOKS": str(tmp_path), "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}"}
    with node(cluster, "other", hooked):
        (tmp_path / "ray_version").write_text("2.59.0")
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "versions", "other")
    assert found.startswith("Ray 2.59.0, and the driver has 2.")
    assert "install the driver's versions on it" in remedy

    # Where it was there before the node was started, Ray itself turns the node away, and the driver too.
    started = subprocess.run(
        starts(cluster, "late"), env=cluster.environment | hooked, capture_output=True, text=True, timeout=100
    )
    assert started.returncode
    assert "Version mismatch" in started.stdout + started.stderr
    printed, status = ask(cluster, tracking_uri, environment=hooked)
    ((what, where, found, _),) = failures(printed)
    assert (status, what, where) == (1, "versions", "driver")
    assert "2.59.0" in found


def test_a_manifest_that_is_missing(cluster, tracking_uri):
    with node(cluster, "second"):
        everybody = alive(cluster) | {"driver"}
        printed, status = ask(cluster, tracking_uri, "--data.manifest=s3://doctor/data/nothing.jsonl")
    found = failures(printed)
    assert status == 1
    assert {row[0] for row in found} == {"manifest"}
    assert {where for row in found for where in row[1].split(", ")} == everybody
    assert all("s3://doctor/data/nothing.jsonl" in row[2] and "mend --data.manifest" in row[3] for row in found)


def test_mlflow_that_is_down(cluster):
    nobody = f"http://127.0.0.1:{free_port()}"
    with node(cluster, "second"):
        everybody = alive(cluster)
        printed, status = ask(cluster, nobody)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, set(where.split(", "))) == (1, "MLflow", everybody)
    assert f"{nobody} does not answer" in found
    assert remedy.startswith("start the server, mend --tracking.uri")


def test_a_node_whose_decoder_does_not_load(cluster, tracking_uri, tmp_path):
    import av

    libraries = Path(av.__file__).parents[1] / "av.libs"
    with node(cluster, "blind", mounts=f"mount --bind {tmp_path} {libraries}"):
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "decoder", "blind")
    assert "cannot open shared object file" in found
    assert remedy == "pip install -c constraints.txt . on it, or another --data.decoder"


def test_a_node_whose_disk_is_full(cluster, tracking_uri, tmp_path):
    fill = f"mount -t tmpfs -o size=8m tmpfs {tmp_path} && ! cat /dev/zero > {tmp_path}/filler"
    with node(cluster, "full", {"TMPDIR": str(tmp_path)}, mounts=f"({fill}) 2>&1"):
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "disk", "full")
    assert found == f"temporary files, {tmp_path}: 0 MB of 8 MB left"
    assert remedy == "free some, or point TMPDIR to a larger disk"


def test_a_node_whose_clock_is_wrong(cluster, tracking_uri, tmp_path):
    (tmp_path / "clock").write_text("-3600")
    with node(cluster, "late", {"FAULT_HOOKS": str(tmp_path), "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}"}):
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "clock", "late")
    assert 3600 - ANSWER_WITHIN_S <= int(found.split()[0]) <= 3600  # as long as the answer takes it may be less
    assert found.endswith("s behind the driver's")
    assert "chrony" in remedy


def test_a_driver_without_the_token(cluster, tracking_uri, tmp_path):
    for given in ({"RAY_AUTH_MODE": None}, {"RAY_AUTH_MODE": "token"}):
        nothing = {"RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)} | given
        printed, status = ask(cluster, tracking_uri, environment=nothing)
        ((what, where, found, remedy),) = failures(printed)
        assert (status, what, where) == (1, "token", "driver")
        assert "none is given" in found or "couldn't find an authentication token" in found
        assert remedy.startswith("export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")


def test_a_node_whose_token_others_can_read(cluster, tracking_uri, tmp_path):
    token = tmp_path / "token"
    shutil.copy(cluster.token, token)
    token.chmod(0o644)
    with node(cluster, "open", {"RAY_AUTH_TOKEN_PATH": str(token)}):
        printed, status = ask(cluster, tracking_uri)
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "token", "open")
    # A long path is folded.
    assert found.startswith("other users of the machine may read ")
    assert "(mode 644)" in found
    assert remedy.replace(" ", "") == f"chmod600{token}".replace(" ", "")


def test_a_node_that_the_store_is_out_of_reach_of(cluster, tracking_uri):
    with node(cluster, "away", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}):
        printed, status = ask(cluster, tracking_uri)
    found = failures(printed)
    assert status == 1
    assert {row[1] for row in found} == {"away"}
    assert [row[0] for row in found] == ["storage", "manifest", "video"]
    assert all("open the way from there to it" in row[3] for row in found)


def test_a_node_that_gives_out_a_gpu_that_torch_does_not_see(cluster, tracking_uri):
    with node(cluster, "fast", options=["--num-gpus=16"]):  # more than any machine has
        printed, status = ask(cluster, tracking_uri, "--scaling.use_gpu=true")
    ((what, where, found, remedy),) = failures(printed)
    assert (status, what, where) == (1, "GPU", "fast")
    assert "Ray gives out 16 GPUs here, and torch sees " in found
    assert remedy.startswith("look at nvidia-smi there")


@pytest.mark.parametrize(("job", "own"), [("train", []), ("tune", ["--scheduler=none"])])
def test_a_run_is_refused_before_it_starts_workers(cluster, tracking_uri, tmp_path, job, own):
    token = tmp_path / "token"
    shutil.copy(cluster.token, token)
    token.chmod(0o644)
    faults = {
        f"error: token (driver): other users of the machine may read {token} (mode 644); chmod 600 {token}": {
            "RAY_AUTH_TOKEN_PATH": str(token)
        },
        "permission denied; check AWS_* or the machine's role; let it write there": {"AWS_ACCESS_KEY_ID": READER},
        "and none is given; export RAY_AUTH_MODE=token": {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None},
    }
    for line, environment in faults.items():
        printed, status = ask(
            cluster,
            tracking_uri,
            "--data.validation_manifest=s3://doctor/data/held_out.jsonl",
            *own,
            environment={"HOME": str(tmp_path)} | environment,
            job=job,
        )
        assert status == 2
        assert line in printed.splitlines()[-1]
        assert "storage" not in "".join(printed.splitlines()[:-1])  # nothing was begun
