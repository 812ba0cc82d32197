"""A Ray cluster on this machine: a head, with further nodes or an autoscaler, token authentication, on loopback."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.local.nodes import (
    OBJECT_STORE_BYTES,
    ROLE_LABEL,
    SESSION_SUFFIX,
    START_TIMEOUT_S,
    LocalNode,
    NodeGroup,
    free_ports,
    kill_session,
    ray_command,
    worker_options,
)

LIBRARY_LINE = re.compile(
    r"\w\.py:\d+(:| -- )|^Running entrypoint|\((raylet|autoscaler|gcs_server|\w+ pid=)|^\s+warnings\.warn|"
    r"^\S+ \S+ (INFO|WARNING) (mlflow|alembic)|^(Successfully registered|Created version)|^\s*$"
)
"""Matches lines of Ray and MLflow, and Python's warnings, in the output of a job."""


class JobFailed(Exception):
    """A submitted job has failed."""


class LocalCluster:
    """Starts the head, and each further node, as a child in its own session; leaving the context kills them.

    Ports are free ones and the token lies in a private folder, so several clusters of one user can run at the same
    time; `ray stop` would end all of them. In the main thread, SIGTERM and SIGHUP raise KeyboardInterrupt meanwhile.

    Args:
        num_cpus: CPUs that Ray may assign on the head; by default all of the machine's, or none if there are groups.
        environment: additional environment variables of every process of the cluster (`AWS_*`, for example).
        groups: nodes in addition to the head.
        idle_s: let an autoscaler add the groups' nodes on demand, and remove those that were idle for this long [s];
            None starts all of them at once.

    Attributes:
        nodes: nodes that were started here in addition to the head, by role.

    Raises:
        RuntimeError: the cluster does not start; the message has the end of its log.
    """

    def __init__(
        self,
        num_cpus: int | None = None,
        environment: dict[str, str] | None = None,
        groups: Sequence[NodeGroup] = (),
        idle_s: float | None = None,
    ) -> None:
        from crosslmm.ray_runtime import short_parent, short_tmpdir  # import Ray, which --help need not wait for

        # A short path, since the paths of sockets are below it; private, since Ray makes its own folders readable.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir=short_parent()))
        self._handlers = _end_on_signals()
        self.token = self.folder / "token"
        with os.fdopen(os.open(self.token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        gcs, dashboard, client = free_ports(3)
        self.address = f"http://127.0.0.1:{dashboard}"
        self.gcs_address = f"127.0.0.1:{gcs}"  # RAY_ADDRESS of a driver that is not a submitted job
        self.environment = self._environment((environment or {}) | short_tmpdir())
        self.groups, self.nodes = list(groups), dict[str, list[LocalNode]]()
        self._autoscaled = idle_s is not None
        if groups:
            num_cpus = num_cpus or 0
        options: dict[str, object] = {
            "--head": None,
            "--port": gcs,
            "--dashboard-host": "127.0.0.1",
            "--dashboard-port": dashboard,
            "--ray-client-server-port": client,
            "--include-dashboard": "true",
            "--temp-dir": self.folder / "t",
            **({"--num-cpus": num_cpus} if num_cpus is not None else {}),
        }
        if groups:
            options |= {"--labels": f"{ROLE_LABEL}=head", "--object-store-memory": OBJECT_STORE_BYTES}
            self.placement = self.folder / "placement.yaml"
            self.placement.write_text(yaml.safe_dump(self._placement(), sort_keys=False))
        head_environment = self.environment
        if idle_s is not None:
            from cluster.local import autoscaler

            config = autoscaler.config(self.gcs_address, num_cpus or 0, groups, idle_s, self.folder)
            (self.folder / "autoscaler.json").write_text(json.dumps(config))
            options["--autoscaling-config"] = self.folder / "autoscaler.json"
            head_environment = autoscaler.head_environment(self.environment)
        self._head = LocalNode(options, head_environment, self.folder / "start.log")

    def _environment(self, additional: dict[str, str]) -> dict[str, str]:
        environment = {
            **os.environ,
            **additional,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # A stopped job saves a checkpoint and closes its MLflow run; Ray's default leaves it three seconds.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            # Entrypoints say `python`: make it this one.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        # Jobs start more worker processes than a small machine has CPUs, which Ray would warn about.
        environment.setdefault("RAY_worker_maximum_startup_concurrency", "16")
        environment.pop("RAY_AUTH_TOKEN", None)
        # Ray sets the address for submitted jobs; an inherited one would lead Train's helpers to another cluster.
        environment.pop("RAY_ADDRESS", None)
        return environment

    def _placement(self) -> dict[str, Any]:
        """Return the part of a run's configuration that places it on these nodes, like cluster/run.yaml for clouds."""
        scaling: dict[str, Any] = {"drive_on": {ROLE_LABEL: "head"}, "use_gpu": False}
        for group in self.groups:
            scaling |= {f"{group.role}_on": group.labels}
            if group.role == "train":
                scaling |= {"worker_resources": {"train": 1}, "cpus_per_worker": 1}
        if self._autoscaled:
            scaling["node_types"] = [
                {"most": group.nodes, "resources": group.resources, "labels": group.labels} for group in self.groups
            ]
        return {"scaling": scaling}

    @property
    def session(self) -> int:
        """Session id of all of the head's processes."""
        return self._head.session

    def __enter__(self) -> Self:
        try:
            self._head.wait()
            deadline = time.monotonic() + START_TIMEOUT_S
            while self.get("/api/jobs/") is None:
                if time.monotonic() > deadline:
                    raise RuntimeError("the cluster's dashboard does not answer")
                time.sleep(0.3)
            for group in self.groups if not self._autoscaled else []:
                for _ in range(group.nodes):
                    self.add(group)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def add(self, group: NodeGroup) -> LocalNode:
        """Start one more node of a group."""
        options = worker_options(self.gcs_address, group.resources, group.labels)
        number = len(list(self.folder.glob(f"{group.role}-*.log")))
        node = LocalNode(options, self.environment, self.folder / f"{group.role}-{number}.log")
        self.nodes.setdefault(group.role, []).append(node)
        node.wait()
        return node

    def alive_nodes(self) -> list[dict[str, Any]]:
        """Return the living nodes as Ray's state API describes them: `node_id`, `labels`, ..."""
        response = self.get("/api/v0/nodes?limit=1000&detail=1") or {}
        nodes = response.get("data", {}).get("result", {}).get("result", [])
        return [node for node in nodes if node["state"] == "ALIVE"]

    def get(self, path: str) -> Any:
        """Return the JSON that the dashboard serves at a path; None if it does not answer."""
        request = urllib.request.Request(
            f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except (urllib.error.URLError, OSError):
            return None

    def submit(self, *entrypoint: str) -> list[str]:
        """Return the command that submits a job to this cluster; run it with `environment`."""
        return [*ray_command(), "job", "submit", "--address", self.address, "--", *entrypoint]

    def run(self, command: list[str], folder: Path) -> Iterator[str]:
        """Run a command that submits a job, and yield the lines that the job prints, without those of libraries.

        Raises:
            JobFailed: the command failed; the message has the lines of libraries, among them Ray's about the job.
        """
        library_lines = []
        with subprocess.Popen(
            command, env=self.environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout
            for line in process.stdout:
                if LIBRARY_LINE.search(line):
                    library_lines.append(line)
                else:
                    yield line
        if process.returncode:
            raise JobFailed(f"{''.join(library_lines)}error: the job ended with status {process.returncode}")

    def stop(self) -> None:
        """Kill every process of the cluster, including nodes that the autoscaler started."""
        try:
            self._head.stop()
            for file in self.folder.glob(f"*{SESSION_SUFFIX}"):
                kill_session(int(file.read_text()))
            for node in [node for nodes in self.nodes.values() for node in nodes]:
                node.process.wait()
            shutil.rmtree(self.folder, ignore_errors=True)
        finally:  # not earlier: a second signal would leave the rest of the cluster
            for number, handler in self._handlers.items():
                signal.signal(number, handler)


def _end_on_signals() -> dict[signal.Signals, Any]:
    """Let a closed terminal and `kill` act like Ctrl-C: the nodes run in their own sessions, and would outlive this
    process. Return the handlers before; empty in a thread, which cannot set any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    unhandled = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    return {number: signal.signal(number, signal.default_int_handler) for number in unhandled}
