"""One node of a Ray cluster on this machine: `ray start` in its own session, on loopback and free ports."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

ROLE_LABEL: str = yaml.safe_load((Path(__file__).parent.parent / "facts.yaml").read_text())["role_label"]
"""Label that names what a node is for, as in clouds; its values are head, decode and train."""
START_TIMEOUT_S = 240.0
"""Deadline for `ray start`, and for the dashboard to answer [s]."""
STARTED = "Ray runtime started"
"""Line that `ray start` prints when the node is up."""
SESSION_SUFFIX = ".session"
"""Suffix of the file next to a node's log that holds its session id."""
OBJECT_STORE_BYTES = 2**30
"""Object store of each node of a cluster with several: Ray's default is a third of the machine's memory for each."""


@dataclass(frozen=True)
class NodeGroup:
    """Equal nodes of a local cluster, in addition to the head."""

    role: str
    """decode or train: value of the label `ROLE_LABEL`."""
    nodes: int
    """Number of nodes; with an autoscaler the maximum."""
    cpus: int
    """CPUs that Ray assigns on each node, regardless of the machine's cores."""
    min_nodes: int = 0
    """Minimum number of nodes, with an autoscaler."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ROLE=NODESxCPUS, such as `train=2x1`.

        Raises:
            ValueError: the text has another form.
        """
        role, _, size = text.partition("=")
        nodes, _, cpus = size.partition("x")
        if role not in ("decode", "train") or not nodes.isdecimal() or not cpus.isdecimal() or not int(cpus):
            raise ValueError(f"{text}: give decode=NODESxCPUS or train=NODESxCPUS, such as train=2x1")
        return cls(role, int(nodes), int(cpus))

    @property
    def resources(self) -> dict[str, int]:
        """Ray resources of one node; the one named after the role exists in no other group."""
        return {"CPU": self.cpus, self.role: self.cpus}

    @property
    def labels(self) -> dict[str, str]:
        """Ray labels of one node."""
        return {ROLE_LABEL: self.role}


class LocalNode:
    """Starts a node as a child process; `stop` kills its session.

    Args:
        options: options of `ray start`, in addition to those that separate the node from others on this machine.
        environment: environment variables of the node's processes.
        log: file for what `ray start` prints.
    """

    def __init__(self, options: dict[str, object], environment: dict[str, str], log: Path) -> None:
        agent, agent_grpc, metrics = free_ports(3)
        options = {
            "--dashboard-agent-listen-port": agent,
            "--dashboard-agent-grpc-port": agent_grpc,
            "--metrics-export-port": metrics,
            "--min-worker-port": 0,
            "--max-worker-port": 0,
            **options,
        }
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*ray_command(), "start", "--block", "--disable-usage-stats", *_flags(options)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The cluster reads it to stop nodes that the autoscaler's process has started.
        log.with_suffix(SESSION_SUFFIX).write_text(str(self.session))

    def wait(self) -> None:
        """Wait until the node is up. Start nodes one after another: those that start at the same time on one machine
        use the same socket names.

        Raises:
            RuntimeError: it does not start; the message has the end of its log.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while STARTED not in (output := self.log.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a Ray node did not start:\n{output[-2000:]}")
            time.sleep(0.1)

    @property
    def session(self) -> int:
        """Session id of all of the node's processes."""
        return self.process.pid

    def stop(self) -> None:
        """Kill every process of the node at once, as a machine failure would."""
        kill_session(self.session)
        self.process.wait()
        self.log.with_suffix(SESSION_SUFFIX).unlink(missing_ok=True)


def kill_session(session: int) -> None:
    """Kill every process of a node: workers have their own process groups, but share its session."""
    for _ in range(10):
        alive = [pid for pid in _processes() if _session_of(pid) == session and not _is_zombie(pid)]
        if not alive:
            break
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def worker_options(gcs_address: str, resources: dict[str, int], labels: dict[str, str]) -> dict[str, object]:
    """Return the options of `ray start` for a node that joins the head at `gcs_address`; memory that is not among the
    resources [bytes] is detected."""
    custom = {kind: count for kind, count in resources.items() if kind not in ("CPU", "memory")}
    return {
        "--address": gcs_address,
        "--num-cpus": resources["CPU"],
        **({"--memory": resources["memory"]} if "memory" in resources else {}),
        "--resources": json.dumps(custom),
        "--labels": ",".join(f"{key}={value}" for key, value in labels.items()),
        "--object-store-memory": OBJECT_STORE_BYTES,
        "--include-log-monitor": "false",  # the head's is enough for one machine
    }


def ray_command() -> list[str]:
    """Return the command `ray` of this installation."""
    return [str(Path(sys.executable).parent / "ray")]


def _flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in ((name,) if value is None else (name, str(value)))]


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
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


def _is_zombie(pid: int) -> bool:
    """Return whether the process has ended, whether or not its parent has noticed."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
