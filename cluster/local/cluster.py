"""A Ray cluster on this machine: a head, and nodes or an autoscaler beside it, with tokens, on loopback."""

import json
import os
import secrets
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

from cluster.local.nodes import (
    OBJECT_STORE_BYTES,
    ROLE_LABEL,
    SESSION,
    START_DEADLINE_S,
    Group,
    LocalNode,
    free_ports,
    kill_session,
    ray,
    worker_options,
)


class LocalCluster:
    """Starts the head as a child in a session of its own, and so each other node; leaving the context kills them.

    Ports are free ones and the token lies in a private folder of this cluster alone, so that it can live beside other
    clusters of the same user; `ray stop` would end those too.

    Args:
        num_cpus: CPUs that Ray may hand out on the head; default all, and with groups none.
        environment: added to what every process of the cluster inherits (`AWS_*`, say).
        groups: nodes beside the head.
        idle_s: an autoscaler adds the nodes of the groups, and takes away those that have been idle for so long [s];
            None starts them all at once, for good.

    Attributes:
        nodes: those beside the head that were started here, by role.

    Raises:
        RuntimeError: it does not come up; with the end of its log.
    """

    def __init__(
        self,
        num_cpus: int | None = None,
        environment: dict[str, str] | None = None,
        groups: Sequence[Group] = (),
        idle_s: float | None = None,
    ) -> None:
        # Short, for sockets live below it; private, for Ray makes its own folders readable to all.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        self.token = self.folder / "token"
        with os.fdopen(os.open(self.token, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        gcs, dashboard, client = free_ports(3)
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
        self.groups, self.nodes = list(groups), dict[str, list[LocalNode]]()
        self._autoscaled = idle_s is not None
        if groups:
            num_cpus = num_cpus or 0
            # More processes than the few CPUs of a node, on which Ray remarks.
            self.environment.setdefault("RAY_worker_maximum_startup_concurrency", "16")
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

            scales = autoscaler.config(self.gcs_address, num_cpus or 0, groups, idle_s, self.folder)
            (self.folder / "autoscaler.json").write_text(json.dumps(scales))
            options["--autoscaling-config"] = self.folder / "autoscaler.json"
            head_environment = autoscaler.head_environment(self.environment)
        self._head = LocalNode(options, head_environment, self.folder / "start.log")

    def _placement(self) -> dict[str, Any]:
        """A run's configuration: where its parts belong, as cluster/run.yaml says it of clouds."""
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
            deadline = time.monotonic() + START_DEADLINE_S
            while self.ask("/api/jobs/") is None:
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

    def add(self, group: Group) -> LocalNode:
        """Start one more node of a group."""
        options = worker_options(self.gcs_address, group.resources, group.labels)
        number = len(list(self.folder.glob(f"{group.role}-*.log")))
        node = LocalNode(options, self.environment, self.folder / f"{group.role}-{number}.log")
        self.nodes.setdefault(group.role, []).append(node)
        node.wait()
        return node

    def alive(self) -> list[dict[str, Any]]:
        """The nodes that are there, as Ray's state API tells of them: `node_id`, `labels`, ..."""
        answer = self.ask("/api/v0/nodes?limit=1000&detail=1") or {}
        nodes = answer.get("data", {}).get("result", {}).get("result", [])
        return [node for node in nodes if node["state"] == "ALIVE"]

    def ask(self, path: str) -> Any:
        """What the dashboard answers; None if it does not."""
        request = urllib.request.Request(
            f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token.read_text()}"}
        )
        try:
            return json.load(urllib.request.urlopen(request, timeout=30))
        except (urllib.error.URLError, OSError):
            return None

    def submit(self, *entrypoint: str) -> list[str]:
        """The command line that submits a job to this cluster; run it with `environment`."""
        return [*ray(), "job", "submit", "--address", self.address, "--", *entrypoint]

    def stop(self) -> None:
        """Kill every process of the cluster, those of the autoscaler's nodes too."""
        self._head.stop()
        for file in self.folder.glob(f"*{SESSION}"):
            kill_session(int(file.read_text()))
        for node in [node for nodes in self.nodes.values() for node in nodes]:
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
