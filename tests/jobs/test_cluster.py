"""Clusters that this project starts: who may use them."""

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

STARTS = """\
from pathlib import Path
from crosslmm.ray_runtime import start_ray
start_ray()
import os
print(os.environ["RAY_AUTH_MODE"], oct((Path.home() / ".ray/auth_token").stat().st_mode & 0o777))
"""

STOPPED = """\
import os, signal, time
import ray
from crosslmm.cli import stop_on_sigterm
from crosslmm.ray_runtime import start_ray
stop_on_sigterm()
start_ray()
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
except KeyboardInterrupt:
    print(ray.get(ray.put("still here")))
"""


def test_a_local_cluster_s_token_is_private_and_its_dashboard_is_on_loopback():
    with LocalCluster(num_cpus=1) as cluster:
        assert cluster.token.stat().st_mode & 0o077 == 0
        assert cluster.folder.stat().st_mode & 0o077 == 0
        port = int(cluster.address.rsplit(":", 1)[1])
        listeners = [c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and c.laddr.port == port]
        assert {address.ip for address in listeners} == {"127.0.0.1"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)


@pytest.mark.fault
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_of_a_local_cluster_outlives_the_command_that_started_it(ending):
    command = [sys.executable, str(ROOT / "jobs" / "local_cluster.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said = "".join(itertools.takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
        folder = Path(said.split("RAY_AUTH_TOKEN_PATH=")[1].split()[0]).parent
        own = psutil.Process(process.pid).children(recursive=True)
        assert own
        process.send_signal(ending)
        assert process.wait(timeout=60) == 0
    assert not [child for child in own if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not folder.exists()


def test_a_cluster_that_a_job_starts_for_itself_wants_a_token_that_is_private():
    job = _alone(STARTS)
    assert job.stdout == "token 0o600\n", job.stderr


@pytest.mark.fault
def test_a_job_that_is_told_to_stop_keeps_the_cluster_that_it_started_until_its_checkpoint_is_taken():
    job = _alone(STOPPED)
    assert job.stdout == "still here\n", job.stderr


def _alone(code: str) -> subprocess.CompletedProcess:
    """Run it where there is no cluster."""
    hidden = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    with tempfile.TemporaryDirectory(prefix="ray-") as home:  # short, for sockets live below it
        environment |= {"HOME": home, "RAY_TMPDIR": home, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
