"""jobs/doctor.py on clusters of several raylets: a healthy one, and ten with one fault each."""

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
from crosslmm.preflight.cluster_probe import PROBE_TIMEOUT_S
from tests.support.common import ROOT
from tests.support.object_store import READER, object_store_in_use

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
BIN = Path(sys.executable).parent
HOOKS = ROOT / "tests" / "fault_hooks"
LIMIT_S = 240.0
"""Four times the limit on a quiet machine [s]."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "swift"
    with object_store_in_use(root, venv=ROOT / ".cache" / "swift-venv", bucket="doctor") as store:
        write_sample_set("s3://doctor/data", train=16, held_out=4)
        store.let_read("doctor")
        yield store


@pytest.fixture(scope="module")
def cluster(store):
    # Ray's default niceness would let the workers starve when anything else runs on the machine.
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
        wait_until(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close() is None)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def wait_until(condition, within_s=120.0):
    deadline = time.monotonic() + within_s
    while True:
        with suppress(OSError):
            if condition():
                return
        assert time.monotonic() < deadline
        time.sleep(0.3)


def alive_nodes(cluster):
    """Names of the living nodes, from Ray's state API."""
    header = {"Authorization": f"Bearer {cluster.token.read_text()}"}
    request = urllib.request.Request(f"{cluster.address}/api/v0/nodes", headers=header)
    response = json.load(urllib.request.urlopen(request, timeout=10))
    return {node["node_name"] for node in response["data"]["result"]["result"] if node["state"] == "ALIVE"}


def start_command(cluster, name, *options):
    """The command that starts one more node."""
    ports = ["--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--metrics-export-port=0"]
    ports += ["--runtime-env-agent-port=0", "--min-worker-port=0", "--max-worker-port=0"]
    identity = [f"--address={cluster.gcs_address}", "--node-ip-address=127.0.0.1", f"--node-name={name}"]
    return [str(BIN / "ray"), "start", *identity, "--num-cpus=2", "--block", "--disable-usage-stats", *ports, *options]


@contextmanager
def node(cluster, name, environment=None, mounts="true", options=()):
    """One more node, with its own environment and mounts that no other process sees."""
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        f'{mounts} && exec "$@"',
        "sh",
        *start_command(cluster, name, *options),
    ]
    log = cluster.folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=cluster.environment | (environment or {}), stdout=file, stderr=file, start_new_session=True
        )
    try:
        wait_until(lambda: name in alive_nodes(cluster))
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
        wait_until(lambda: name not in alive_nodes(cluster))


def run_job(cluster, tracking_uri, *arguments, environment=None, job="doctor"):
    """Run the doctor, or another job -> what it prints, and its exit status."""
    command = [sys.executable, f"jobs/{job}.py", "--storage=s3://doctor/runs", f"--tracking.uri={tracking_uri}"]
    command += ["--data.manifest=s3://doctor/data/train.jsonl", "--data.validation_manifest=null", *arguments]
    environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs_address} | (environment or {})
    environment = {key: value for key, value in environment.items() if value is not None}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400)
    print(done.stdout, done.stderr[-2000:])
    return done.stdout + done.stderr * (job != "doctor"), done.returncode


def rows(printed):
    """(status, check, node, result, what to do) of each row; folded cells are joined again."""
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
    """(check, node, result, what to do) of each failed row."""
    return [row[1:] for row in rows(printed) if row[0] == "FAIL"]


def test_a_healthy_cluster_passes_all_checks(cluster, tracking_uri, store):
    with node(cluster, "second"):
        began = time.monotonic()
        printed, status = run_job(cluster, tracking_uri)
        took = time.monotonic() - began
    assert status == 0
    node_checks = ["versions", "clock", "disk", "storage", "manifest", "decoder", "video", "MLflow", "token"]
    assert [row[1] for row in rows(printed)] == [*node_checks, "all-reduce", "training"]
    assert {row[0] for row in rows(printed)} == {"ok"}
    assert {row[2] for row in rows(printed)} == {"all 2 nodes", ""}
    assert took < LIMIT_S
    assert [name for name in storage.names_in("s3://doctor/runs") if "doctor" in name] == []  # nothing is left behind


def test_a_node_without_write_permission(cluster, tracking_uri):
    with node(cluster, "reader", {"AWS_ACCESS_KEY_ID": READER}):
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "storage", "reader")
    assert "permission denied" in result
    assert remedy.startswith("grant write access there: AWS_* in its environment")


def test_a_node_with_another_ray(cluster, tracking_uri, tmp_path):
    other_ray = {"FAULT_HOOKS": str(tmp_path), "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}"}
    with node(cluster, "other", other_ray):
        (tmp_path / "ray_version").write_text("2.59.0")
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "versions", "other")
    assert result.startswith("Ray 2.59.0, driver has 2.")
    assert "install the driver's versions on it" in remedy

    # A node that starts with another version is refused by Ray itself, and so is such a driver.
    started = subprocess.run(
        start_command(cluster, "late"), env=cluster.environment | other_ray, capture_output=True, text=True, timeout=100
    )
    assert started.returncode
    assert "Version mismatch" in started.stdout + started.stderr
    printed, status = run_job(cluster, tracking_uri, environment=other_ray)
    ((check, node_name, result, _),) = failures(printed)
    assert (status, check, node_name) == (1, "versions", "driver")
    assert "2.59.0" in result


def test_a_missing_manifest(cluster, tracking_uri):
    with node(cluster, "second"):
        all_nodes = alive_nodes(cluster) | {"driver"}
        printed, status = run_job(cluster, tracking_uri, "--data.manifest=s3://doctor/data/nothing.jsonl")
    failed = failures(printed)
    assert status == 1
    assert {row[0] for row in failed} == {"manifest"}
    assert {where for row in failed for where in row[1].split(", ")} == all_nodes
    assert all("s3://doctor/data/nothing.jsonl" in row[2] and "correct --data.manifest" in row[3] for row in failed)


def test_mlflow_is_down(cluster):
    unreachable = f"http://127.0.0.1:{free_port()}"
    with node(cluster, "second"):
        all_nodes = alive_nodes(cluster)
        printed, status = run_job(cluster, unreachable)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, set(node_name.split(", "))) == (1, "MLflow", all_nodes)
    assert f"{unreachable} does not answer" in result
    assert remedy.startswith("start the server, correct --tracking.uri")


def test_a_node_whose_decoder_does_not_load(cluster, tracking_uri, tmp_path):
    import av

    libraries = Path(av.__file__).parents[1] / "av.libs"
    with node(cluster, "no-decoder", mounts=f"mount --bind {tmp_path} {libraries}"):
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "decoder", "no-decoder")
    assert "cannot open shared object file" in result
    assert remedy == "pip install -c constraints.txt . on it, or another --data.decoder"


def test_a_node_whose_disk_is_full(cluster, tracking_uri, tmp_path):
    fill = f"mount -t tmpfs -o size=8m tmpfs {tmp_path} && ! cat /dev/zero > {tmp_path}/filler"
    with node(cluster, "full", {"TMPDIR": str(tmp_path)}, mounts=f"({fill}) 2>&1"):
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "disk", "full")
    assert result == f"temporary files, {tmp_path}: 0 MB of 8 MB free"
    assert remedy == "free some space, or point TMPDIR to a larger disk"


def test_a_node_whose_clock_is_wrong(cluster, tracking_uri, tmp_path):
    (tmp_path / "clock").write_text("-3600")
    with node(cluster, "late", {"FAULT_HOOKS": str(tmp_path), "PYTHONPATH": f"{HOOKS}{os.pathsep}{ROOT}"}):
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "clock", "late")
    assert 3600 - PROBE_TIMEOUT_S <= int(result.split()[0]) <= 3600  # less by the time that the report took
    assert result.endswith("s behind the driver's")
    assert "chrony" in remedy


def test_a_driver_without_the_token(cluster, tracking_uri, tmp_path):
    for settings in ({"RAY_AUTH_MODE": None}, {"RAY_AUTH_MODE": "token"}):
        environment = {"RAY_AUTH_TOKEN_PATH": None, "HOME": str(tmp_path)} | settings
        printed, status = run_job(cluster, tracking_uri, environment=environment)
        ((check, node_name, result, remedy),) = failures(printed)
        assert (status, check, node_name) == (1, "token", "driver")
        assert "none is set" in result or "couldn't find an authentication token" in result
        assert remedy.startswith("export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH")


def test_a_node_whose_token_others_can_read(cluster, tracking_uri, tmp_path):
    token = tmp_path / "token"
    shutil.copy(cluster.token, token)
    token.chmod(0o644)
    with node(cluster, "open", {"RAY_AUTH_TOKEN_PATH": str(token)}):
        printed, status = run_job(cluster, tracking_uri)
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "token", "open")
    # A long path is folded.
    assert result.startswith("other users of the machine may read ")
    assert "(mode 644)" in result
    assert remedy.replace(" ", "") == f"chmod600{token}".replace(" ", "")


def test_a_node_that_cannot_reach_the_store(cluster, tracking_uri):
    with node(cluster, "away", {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}):
        printed, status = run_job(cluster, tracking_uri)
    failed = failures(printed)
    assert status == 1
    assert {row[1] for row in failed} == {"away"}
    assert [row[0] for row in failed] == ["storage", "manifest", "video"]
    assert all("make the store reachable from there" in row[3] for row in failed)


def test_a_node_with_more_gpus_in_ray_than_in_torch(cluster, tracking_uri):
    with node(cluster, "fast", options=["--num-gpus=16"]):  # more than any machine has
        printed, status = run_job(cluster, tracking_uri, "--scaling.use_gpu=true")
    ((check, node_name, result, remedy),) = failures(printed)
    assert (status, check, node_name) == (1, "GPU", "fast")
    assert "Ray assigns 16 GPUs here, and torch sees " in result
    assert remedy.startswith("check nvidia-smi there")


@pytest.mark.parametrize(("job", "options"), [("train", []), ("tune", ["--scheduler=none"])])
def test_a_run_is_refused_before_it_starts_workers(cluster, tracking_uri, tmp_path, job, options):
    token = tmp_path / "token"
    shutil.copy(cluster.token, token)
    token.chmod(0o644)
    faults = {
        f"error: token (driver): other users of the machine may read {token} (mode 644); chmod 600 {token}": {
            "RAY_AUTH_TOKEN_PATH": str(token)
        },
        "permission denied; check AWS_* or the machine's role; grant write access there": {"AWS_ACCESS_KEY_ID": READER},
        "and none is set; export RAY_AUTH_MODE=token": {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None},
    }
    for line, environment in faults.items():
        printed, status = run_job(
            cluster,
            tracking_uri,
            "--data.validation_manifest=s3://doctor/data/held_out.jsonl",
            *options,
            environment={"HOME": str(tmp_path)} | environment,
            job=job,
        )
        assert status == 2
        assert line in printed.splitlines()[-1]
        assert "storage" not in "".join(printed.splitlines()[:-1])  # nothing was started
