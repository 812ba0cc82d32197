"""The tracking server of cluster/mlflow on this machine, for tests: PostgreSQL, S3 over HTTP, users and passwords.

Command line, environment and users' file are those of cluster/mlflow/compose.yaml. What differs is where: the database,
the object store and the server are on loopback, at ports that are free.

    with object_store_in_use(...) as store, running_mlflow_server(store) as server:
        os.environ.update(server.login())
        MlflowClient().search_experiments()
"""

import itertools
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from tests.support.object_store import DIE_WITH_PARENT, ObjectStore

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
PROGRAMS = Path("/usr/lib/postgresql")
USER = "postgres"
START_SECONDS = 120.0
SERVICES = yaml.safe_load((CLUSTER / "mlflow" / "compose.yaml").read_text())["services"]


@dataclass(frozen=True)
class MlflowServer:
    """Where a running server is, and how to get in."""

    port: int
    password: str
    log: Path
    environment: dict[str, str]
    """The server's own: of its database, its artifacts, its users."""

    @property
    def uri(self) -> str:
        """By one of the names that it answers to."""
        return f"http://localhost:{self.port}"

    def login(self, password: str | None = None) -> dict[str, str]:
        """Variables with which MLflow's clients find it."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password or self.password,
        }

    def query(self, sql: str) -> list[Any]:
        """What its database says, or does."""
        given = self.environment
        where = {"host": given["PGHOST"], "port": int(given["PGPORT"]), "user": given["PGUSER"]}
        name = SERVICES["postgres"]["environment"]["POSTGRES_DB"]
        with psycopg.connect(**where, password=given["PGPASSWORD"], dbname=name) as connection:
            asked = connection.execute(sql)
            return asked.fetchall() if asked.description else []

    def run(self, service: str) -> str:
        """`docker compose run --rm SERVICE` -> what it printed."""
        own = _environment(service, self.environment, self.port) | {"PGHOST": self.environment["PGHOST"]}
        done = subprocess.run(
            _here(SERVICES[service]["command"], self.port),
            env=self.environment | own,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def running_mlflow_server(store: ObjectStore) -> Iterator[MlflowServer]:
    """Run one until the block is left. Its artifacts lie in the bucket that cluster/facts.yaml names, which is made."""
    programs = _postgres()
    # Not below pytest's folders, into which another user may not look.
    root = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    ports = _free_ports(2)
    said = {name: secrets.token_hex(16) for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD")}
    said |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start_database(programs, root, ports[0], said["PGPASSWORD"]))
        ini = root / "basic_auth.ini"
        shutil.copy(CLUSTER / "mlflow" / ini.name, ini)
        where = {"PGHOST": "127.0.0.1", "PGPORT": str(ports[0]), "MLFLOW_AUTH_CONFIG_PATH": str(ini)}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PG"))}
        environment = clean | store.environment() | _environment("mlflow", said, ports[1]) | where
        environment["AWS_DEFAULT_REGION"] = store.environment()["AWS_DEFAULT_REGION"]
        store.make_bucket(environment["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2])
        server = MlflowServer(ports[1], said["MLFLOW_AUTH_ADMIN_PASSWORD"], root / "server.log", environment)
        line = [sys.executable, "-c", DIE_WITH_PARENT, *_here(SERVICES["mlflow"]["command"], server.port)]
        started.append(_start(line, root, server.log, env=environment))
        _await(started[-1], server)
        yield server
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if process is started[0] else signal.SIGKILL)
            process.wait()
        shutil.rmtree(root)


def _here(command: Sequence[str], port: int) -> list[str]:
    """A rendered command line, at home: only on loopback, at this port, by this Python."""
    assert command[0] == "mlflow"
    given = dict(itertools.pairwise(command))
    there = {"--host": ("0.0.0.0", "127.0.0.1"), "--port": ("5000", str(port))}
    line = [sys.executable, "-m", *command]
    for flag, (rendered, own) in there.items():
        if flag in given:
            assert given[flag] == rendered
            line[line.index(flag) + 1] = own
    return line


def _environment(service: str, secret: dict[str, str], port: int) -> dict[str, str]:
    """What compose.yaml gives a service, with these secrets and this port."""

    def own(value: str) -> str:
        value = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secret[found[1]], value)
        return value.replace("http://mlflow:5000", f"http://localhost:{port}").replace(":5000", f":{port}")

    return {name: own(value) for name, value in SERVICES[service]["environment"].items()}


def _postgres() -> Path:
    """The folder of Debian's newest PostgreSQL."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.fail(f"no PostgreSQL in {PROGRAMS}: apt-get install --no-install-recommends postgresql", pytrace=False)
    return found[-1].parent


def _start_database(programs: Path, root: Path, port: int, password: str) -> subprocess.Popen[bytes]:
    """A new database in this folder. PostgreSQL refuses root, so then it is its own user's."""
    # SIGINT ends it at once, with all its processes.
    become = ["setpriv", "--pdeathsig", "INT"]
    if os.getuid() == 0:
        become += ["--reuid", USER, "--regid", USER, "--clear-groups"]
        shutil.chown(root, USER, USER)
    data, key = root / "data", root / "password"
    key.write_text(password)
    if os.getuid() == 0:
        shutil.chown(key, USER, USER)
    owner, name = (SERVICES["postgres"]["environment"][f"POSTGRES_{what}"] for what in ("USER", "DB"))
    initdb = [programs / "initdb", "--no-sync", "--auth=scram-sha-256", f"--username={owner}", f"--pwfile={key}", data]
    subprocess.run([*become, *initdb], check=True, cwd=root, stdout=subprocess.DEVNULL)
    settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={root}", "fsync=off"]
    line = [*become, programs / "postgres", "-D", data, *(part for one in settings for part in ("-c", one))]
    log = root / "postgres.log"
    server = _start(line, root, log)
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            place = {"host": "127.0.0.1", "port": port, "user": owner, "password": password}
            with psycopg.connect(**place, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            return server
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < until, log.read_text()  # noqa: PT018
            time.sleep(0.1)


def _start(line: list[str | Path], root: Path, log: Path, **options: Any) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(line, cwd=root, stdout=file, stderr=file, start_new_session=True, **options)


def _await(process: subprocess.Popen[bytes], server: MlflowServer) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{server.uri}/health", timeout=5).close()
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < until, server.log.read_text()  # noqa: PT018
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
