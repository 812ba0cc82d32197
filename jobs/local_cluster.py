"""A Ray cluster of one node on this machine, with token authentication and its dashboard on loopback.

python jobs/local_cluster.py starts one, prints what `ray job submit` needs, and runs until Ctrl-C.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

START_DEADLINE_S = 240.0


class LocalCluster:
    """Starts `ray start --head --block` as a child in a session of its own; leaving the context kills that session.

    Ports are free ones and the token lies in a private folder of this cluster alone, so that it can live beside other
    clusters of the same user; `ray stop` would end those too.

    Args:
        num_cpus: CPUs that Ray may hand out; default all.
        environment: added to what every process of the cluster inherits (`AWS_*`, say).

    Raises:
        RuntimeError: it does not come up; with the end of its log.
    """

    def __init__(self, num_cpus: int | None = None, environment: dict[str, str] | None = None) -> None:
        # Short, for sockets live below it; private, for Ray makes its own folders readable to all.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.token = self.folder / "token"
        with os.fdopen(os.open(self.token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        gcs, dashboard, client, agent, agent_grpc, metrics = _free_ports(6)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.gcs_address = f"127.0.0.1:{gcs}"  # RAY_ADDRESS of a driver that is no submitted job
        self.environment = {
            **os.environ,
            **(environment or {}),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # A stopped job takes a checkpoint and closes its record; Ray leaves it three seconds by itself.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            # Jobs say `python`: let it be this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.environment.pop("RAY_AUTH_TOKEN", None)
        # Train's helpers look for "the" cluster of this machine; tell them which. A job sets it for itself.
        self.environment.pop("RAY_ADDRESS", None)
        self._log = self.folder / "start.log"
        options = {
            "--node-ip-address": "127.0.0.1",
            "--port": gcs,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": dashboard,
            "--ray-client-server-port": client,
            "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": agent_grpc,
            "--metrics-export-port": metrics,
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            "--include-dashboard": "true",
            "--temp-dir": self.folder / "t",
            **({"--num-cpus": num_cpus} if num_cpus else {}),
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*_ray(), "start", "--head", "--block", "--disable-usage-stats", *_flags(options)],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def session(self) -> int:
        """Session id of all of the cluster's processes."""
        return self._process.pid

    def __enter__(self) -> Self:
        request = urllib.request.Request(
            f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        deadline = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).read()
                return self
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    tail = self._log.read_text()[-2000:]
                    self.stop()
                    raise RuntimeError(f"the Ray cluster did not come up:\n{tail}") from None
                time.sleep(0.3)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def submit(self, *entrypoint: str) -> list[str]:
        """The command line that submits a job to this cluster; run it with `environment`."""
        return [*_ray(), "job", "submit", "--address", self.address, "--", *entrypoint]

    def stop(self) -> None:
        """Kill every process of the cluster: workers have groups of their own, but share its session."""
        for _ in range(10):
            alive = [pid for pid in _processes() if _session_of(pid) == self.session]
            if not alive:
                break
            for pid in alive:
                _kill(pid)
            self._process.poll()
            time.sleep(0.2)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _ray() -> list[str]:
    return [str(Path(sys.executable).parent / "ray")]


def _flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in (name, str(value))]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Run a cluster until Ctrl-C."""
    print("starting a Ray cluster ...", flush=True)
    with LocalCluster() as cluster:
        print(f"""Dashboard {cluster.address}. In another terminal, in the same folder:

  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={cluster.token} RAY_API_SERVER_ADDRESS={cluster.address}
  {_ray()[0]} job submit -- python jobs/train.py

Ctrl-C stops the cluster.""", flush=True)  # fmt: skip
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("stopping")


if __name__ == "__main__":
    main()
