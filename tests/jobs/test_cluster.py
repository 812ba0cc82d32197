"""Clusters that this project starts: their tokens, ports and lifetime."""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.local.cluster import LocalCluster
from tests.support.common import ROOT

PRINT_TOKEN_MODE = """\
from pathlib import Path
from crosslmm.ray_runtime import start_ray
start_ray()
import os
print(os.environ["RAY_AUTH_MODE"], oct((Path.home() / ".ray/auth_token").stat().st_mode & 0o777))
"""

STOP_BEFORE_CHECKPOINT = """\
import os, signal, time
import ray
from crosslmm.cli import start_job
from crosslmm.ray_runtime import start_ray
start_job()
start_ray()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
except KeyboardInterrupt:
    print(ray.get(ray.put("still here")))
"""


def test_a_local_cluster_is_private_and_on_loopback():
    with LocalCluster(num_cpus=1) as cluster:
        assert cluster.token.stat().st_mode & 0o077 == 0
        assert cluster.folder.stat().st_mode & 0o077 == 0
        port = int(cluster.address.rsplit(":", 1)[1])
        listeners = [c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == port]
        assert {address.ip for address in listeners} == {"127.0.0.1"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)


@pytest.mark.fault
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_local_cluster_ends_with_its_command(number):
    command = [sys.executable, str(ROOT / "jobs" / "local_cluster.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        output = "".join(itertools.takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
        folder = Path(output.split("RAY_AUTH_TOKEN_PATH=")[1].split()[0]).parent
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()


HOLD = """\
import sys, time
from cluster.local.cluster import LocalCluster
with LocalCluster(num_cpus=1) as cluster:
    print(cluster.folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.fault
def test_a_local_cluster_ends_with_any_holder_and_wherever_its_temporary_folder_is(tmp_path):
    """Like the demo, the holder sets no handler itself; 107 bytes are all that the path of a socket has."""
    deep = tmp_path / ("x" * 43)
    deep.mkdir()
    environment = os.environ | {"TMPDIR": str(deep), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        assert folder.is_dir()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()


def test_a_job_starts_its_own_cluster_with_a_private_token():
    job = run_without_cluster(PRINT_TOKEN_MODE)
    assert job.stdout == "token 0o600\n", job.stderr


@pytest.mark.fault
def test_a_stopped_job_keeps_its_cluster_for_its_checkpoint():
    job = run_without_cluster(STOP_BEFORE_CHECKPOINT)
    assert job.stdout == "still here\n", job.stderr


def run_without_cluster(code: str) -> subprocess.CompletedProcess:
    """Run a program where no Ray cluster is in reach."""
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory(prefix="ray-") as home:  # short, since the paths of sockets are below it
        environment |= {"HOME": home, "RAY_TMPDIR": home, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("job", ["demo", "local_cluster", "doctor"])
def test_help_starts_no_cluster(job: str) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert help_text.startswith("usage:")
    assert "starting" not in help_text
