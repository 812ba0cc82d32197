"""The MLflow server of cluster/mlflow on this machine, for tests: PostgreSQL, S3 over HTTP, users and passwords.

Command line, environment and user file are those of cluster/mlflow/compose.yaml, but the database, the object store and
the server listen on free ports of loopback.

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
    """Address and login of a running server."""

    port: int
    password: str
    log: Path
    environment: dict[str, str]
    """Environment of the server: database, artifacts, users."""

    @property
    def uri(self) -> str:
        """URI with one of the host names that the server accepts."""
        return f"http://localhost:{self.port}"

    def login(self, password: str | None = None) -> dict[str, str]:
        """Return the environment variables for MLflow's clients."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": password or self.password,
        }

    def query(self, sql: str) -> list[Any]:
        """Run an SQL statement in the server's database and return its rows."""
        environment = self.environment
        address = {"host": environment["PGHOST"], "port": int(environment["PGPORT"]), "user": environment["PGUSER"]}
        name = SERVICES["postgres"]["environment"]["POSTGRES_DB"]
        with psycopg.connect(**address, password=environment["PGPASSWORD"], dbname=name) as connection:
            cursor = connection.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def run(self, service: str) -> str:
        """Run what `docker compose run --rm SERVICE` would; return its output."""
        environment = _environment(service, self.environment, self.port) | {"PGHOST": self.environment["PGHOST"]}
        done = subprocess.run(
            _local_command(SERVICES[service]["command"], self.port),
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def running_mlflow_server(store: ObjectStore) -> Iterator[MlflowServer]:
    """Context manager: runs a server. Creates the bucket for artifacts that cluster/facts.yaml names."""
    programs = _postgres()
    # Not below pytest's folders, which another user cannot read.
    root = Path(tempfile.mkdtemp(prefix="mlflow-server-"))
    ports = _free_ports(2)
    secret = {name: secrets.token_hex(16) for name in ("PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD")}
    secret |= {"MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16)}
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.append(_start_database(programs, root, ports[0], secret["PGPASSWORD"]))
        ini = root / "basic_auth.ini"
        shutil.copy(CLUSTER / "mlflow" / ini.name, ini)
        local = {"PGHOST": "127.0.0.1", "PGPORT": str(ports[0]), "MLFLOW_AUTH_CONFIG_PATH": str(ini)}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PG"))}
        environment = clean | store.environment() | _environment("mlflow", secret, ports[1]) | local
        environment["AWS_DEFAULT_REGION"] = store.environment()["AWS_DEFAULT_REGION"]
        store.make_bucket(environment["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2])
        server = MlflowServer(ports[1], secret["MLFLOW_AUTH_ADMIN_PASSWORD"], root / "server.log", environment)
        line = [sys.executable, "-c", DIE_WITH_PARENT, *_local_command(SERVICES["mlflow"]["command"], server.port)]
        started.append(_start(line, root, server.log, env=environment))
        _await(started[-1], server)
        yield server
    finally:
        for process in reversed(started):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if process is started[0] else signal.SIGKILL)
            process.wait()
        shutil.rmtree(root)


def _local_command(command: Sequence[str], port: int) -> list[str]:
    """Change a rendered command line: listen on loopback at `port`, run by this Python."""
    assert command[0] == "mlflow"
    options = dict(itertools.pairwise(command))
    replacements = {"--host": ("0.0.0.0", "127.0.0.1"), "--port": ("5000", str(port))}
    line = [sys.executable, "-m", *command]
    for flag, (rendered, local) in replacements.items():
        if flag in options:
            assert options[flag] == rendered
            line[line.index(flag) + 1] = local
    return line


def _environment(service: str, secret: dict[str, str], port: int) -> dict[str, str]:
    """Return the environment that compose.yaml gives a service, with these secrets and this port."""

    def local(value: str) -> str:
        value = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: secret[match[1]], value)
        return value.replace("http://mlflow:5000", f"http://localhost:{port}").replace(":5000", f":{port}")

    return {name: local(value) for name, value in SERVICES[service]["environment"].items()}


def _postgres() -> Path:
    """Return the folder of the newest installed PostgreSQL."""
    programs = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not programs:
        pytest.fail(f"no PostgreSQL in {PROGRAMS}: apt-get install --no-install-recommends postgresql", pytrace=False)
    return programs[-1].parent


def _start_database(programs: Path, root: Path, port: int, password: str) -> subprocess.Popen[bytes]:
    """Start a new database in this folder, as user postgres if this process is root, which PostgreSQL refuses."""
    # SIGINT stops PostgreSQL at once, with all its processes.
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
