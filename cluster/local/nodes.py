"""One node of a Ray cluster on this machine: `ray start` in a session of its own, on loopback and free ports."""

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

import yaml

ROLE_LABEL: str = yaml.safe_load((Path(__file__).parent.parent / "facts.yaml").read_text())["role_label"]
"""By which nodes in clouds say what they are for; its values are head, decode and train."""
START_DEADLINE_S = 240.0
STARTED = "Ray runtime started"
"""What `ray start` says then."""
SESSION = ".session"
"""Of the file beside a node's log that holds its session id."""
OBJECT_STORE_BYTES = 2**30
"""Of each of several nodes: by itself each would take a third of the machine's memory."""


@dataclass(frozen=True)
class Group:
    """Equal nodes beside the head."""

    role: str
    nodes: int
    """So many of them; with an autoscaler at most."""
    cpus: int
    """Of each of them, whatever the machine has [cores]."""
    least: int = 0
    """With an autoscaler: that are always there."""

    @property
    def resources(self) -> dict[str, int]:
        """Of a node; those of its role's name no other group has."""
        return {"CPU": self.cpus, self.role: self.cpus}

    @property
    def labels(self) -> dict[str, str]:
        """Of a node."""
        return {ROLE_LABEL: self.role}


class LocalNode:
    """Starts a node as a child; `stop` kills its session.

    Args:
        options: of `ray start`, beside those that keep it apart from other nodes.
        environment: what its processes inherit.
        log: what `ray start` prints.
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
                [*ray(), "start", "--block", "--disable-usage-stats", *_flags(options)],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # For who did not start it: an autoscaler's nodes end with their cluster.
        log.with_suffix(SESSION).write_text(str(self.session))

    def wait(self) -> None:
        """Until it is there. Nodes that start at the same time on one machine take each other's names of sockets.

        Raises:
            RuntimeError: it does not come up; with the end of its log.
        """
        deadline = time.monotonic() + START_DEADLINE_S
        while STARTED not in (said := self.log.read_text()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node of Ray did not come up:\n{said[-2000:]}")
            time.sleep(0.1)

    @property
    def session(self) -> int:
        """Session id of all of its processes."""
        return self.process.pid

    def stop(self) -> None:
        """Kill every process of the node, without a word."""
        kill_session(self.session)
        self.process.wait()
        self.log.with_suffix(SESSION).unlink(missing_ok=True)


def kill_session(session: int) -> None:
    """Kill every process of a node: workers have groups of their own, but share its session."""
    for _ in range(10):
        alive = [pid for pid in _processes() if _session_of(pid) == session and not _ended(pid)]
        if not alive:
            break
        for pid in alive:
            _kill(pid)
        time.sleep(0.2)


def worker_options(gcs_address: str, resources: dict[str, int], labels: dict[str, str]) -> dict[str, object]:
    """Of `ray start`, for a node beside the head."""
    own = {kind: count for kind, count in resources.items() if kind != "CPU"}
    return {
        "--address": gcs_address,
        "--num-cpus": resources["CPU"],
        "--resources": json.dumps(own),
        "--labels": ",".join(f"{key}={value}" for key, value in labels.items()),
        "--object-store-memory": OBJECT_STORE_BYTES,
        "--include-log-monitor": "false",  # the head's is enough for one machine
    }


def ray() -> list[str]:
    """The command line tool of this installation."""
    return [str(Path(sys.executable).parent / "ray")]


def _flags(options: dict[str, object]) -> list[str]:
    return [part for name, value in options.items() for part in ((name,) if value is None else (name, str(value)))]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
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


def _ended(pid: int) -> bool:
    """Whether it only waits for its parent to notice."""
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
