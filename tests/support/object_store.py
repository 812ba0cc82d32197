"""A real S3 object store on this machine, for tests: OpenStack Swift with its S3 API.

Unlike an emulator, Swift is used in production: it checks signatures, keeps objects on disk and assembles multipart
uploads. It needs neither root nor system packages, only Linux and a file system with extended attributes.

    with running_object_store(tmp_path / "store", venv=Path(".cache/swift-venv")) as store:
        os.environ.update(store.environment())  # before the first client, which keeps its settings
        store.make_bucket("runs")
"""

import fcntl
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from s3fs import S3FileSystem

REQUIREMENTS = ("swift==2.38.3", "setuptools<81")  # Swift imports pkg_resources, gone in 81
SERVERS = ("account", "container", "object", "proxy")
USER = "test:tester"
READER = "test:reader"  # has no rights until `let_read`
REGION = "us-east-1"
START_SECONDS = 60.0

# One process per server (workers = 0), so that killing it leaves no children. Long timeouts: with the default of one
# second, a loaded machine would defer an object's update of its listing to a background daemon, and none runs here.
CONFIG = """\
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
bind_timeout = 5
workers = 0
user = {user}
swift_dir = {root}
devices = {root}/devices
recon_cache_path = {root}
mount_check = false
log_level = WARNING
conn_timeout = 30
node_timeout = 60
container_update_timeout = 60
error_suppression_limit = 1000000
[pipeline:main]
pipeline = {filters} {name}-server
[app:{name}-server]
use = egg:swift#{name}
account_autocreate = true
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin
user_test_reader = {secret}
[filter:slo]
use = egg:swift#slo
"""

# The rings say where everything lies: on one device. `swift-ring-builder` takes nine processes.
BUILD_RINGS = """\
import sys
from swift.common.ring import RingBuilder
for name, port in zip(sys.argv[1::2], sys.argv[2::2]):
    ring = RingBuilder(part_power=4, replicas=1, min_part_hours=1)
    place = {"region": 1, "zone": 1, "device": "d1", "weight": 1.0}
    ring.add_dev({"ip": "127.0.0.1", "port": int(port), **place})
    ring.rebalance()
    ring.get_ring().save(f"{name}.ring.gz")
"""

# Asks the kernel for SIGKILL (9) when the parent dies (PR_SET_PDEATHSIG, 1), then becomes the
# server. It holds however the tests end and, unlike `preexec_fn`, is safe beside their threads.
DIE_WITH_PARENT = """\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class ObjectStore:
    """Address and login of a running store."""

    endpoint: str
    # A secret per store: a client that reaches another session's store by mistake is refused.
    secret: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    user: str = USER
    make: str = "swift"

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which boto3, s3fs, Arrow and MLflow use this store only.

        `pyarrow.fs.S3FileSystem()` reads all but the endpoint: give it `endpoint_override`.
        """
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.user,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": REGION,
            # Ignore the developer's AWS settings, and do not wait for the metadata of a cloud machine.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """Return a boto3 client."""
        return boto3.Session(self.user, self.secret, region_name=REGION).client("s3", endpoint_url=self.endpoint)

    def make_bucket(self, name: str) -> None:
        """Create a bucket; the code under test never does."""
        self.client().create_bucket(Bucket=name)

    def let_read(self, name: str) -> None:
        """Let all users list and read a bucket, among them `READER`, who has the same secret."""
        self.client().put_bucket_acl(Bucket=name, ACL="public-read")


@contextmanager
def running_object_store(root: Path, *, venv: Path) -> Iterator[ObjectStore]:
    """Context manager: runs a store with its data and logs in the new folder ``root``.

    Swift brings eventlet, so it lives in an environment of its own, ``venv``: built on first use,
    shared by later sessions.
    """
    root, bin_dir = root.resolve(), _installed_swift(venv.resolve()) / "bin"
    ports = _free_ports()
    store = ObjectStore(f"http://127.0.0.1:{ports['proxy']}")
    _configure(root, bin_dir, ports, store.secret)
    with ExitStack() as stack:
        servers: dict[str, subprocess.Popen[bytes]] = {}
        for name in SERVERS:
            servers[name] = stack.enter_context(_start_server(root, bin_dir, name))
            stack.callback(servers[name].kill)
        deadline = time.monotonic() + START_SECONDS
        for name, server in servers.items():
            _await_health(server, ports[name], root / f"{name}.log", deadline)
        # fsspec caches clients, perhaps one of another store.
        S3FileSystem.clear_instance_cache()
        yield store


@contextmanager
def object_store_in_use(root: Path, *, venv: Path, bucket: str) -> Iterator[ObjectStore]:
    """`running_object_store` with a bucket, set up in the environment of this process."""
    with running_object_store(root, venv=venv) as store, pytest.MonkeyPatch.context() as patch:
        store.make_bucket(bucket)
        for name, value in store.environment().items():
            patch.setenv(name, value)
        yield store


def _installed_swift(venv: Path) -> Path:
    """Build ``venv`` unless its stamp, which is written last, shows that it is complete."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = venv / "complete", "\n".join(REQUIREMENTS)
    with venv.with_name(f"{venv.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second session waits until it is built
        if not stamp.exists() or stamp.read_text() != wanted:
            shutil.rmtree(venv, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", venv], check=True)
            pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, *REQUIREMENTS], check=True)
            stamp.write_text(wanted)
    return venv


def _free_ports() -> dict[str, int]:
    """Return a free port per server; all stay open until the last is chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in SERVERS}
        for sock in sockets.values():
            sock.bind(("127.0.0.1", 0))
        return {name: sock.getsockname()[1] for name, sock in sockets.items()}


def _configure(root: Path, bin_dir: Path, ports: dict[str, int], secret: str) -> None:
    """Create the device, the configuration and the rings."""
    (root / "devices" / "d1").mkdir(parents=True)
    hashing = "[swift-hash]\nswift_hash_path_prefix = p\nswift_hash_path_suffix = s\n"
    (root / "swift.conf").write_text(hashing)
    user = pwd.getpwuid(os.getuid()).pw_name
    for name, port in ports.items():
        filters = "healthcheck s3api tempauth slo" if name == "proxy" else "healthcheck"
        settings = {"root": root, "user": user, "secret": secret, "filters": filters}
        (root / f"{name}.conf").write_text(CONFIG.format(name=name, port=port, **settings))
    rings = [word for name in SERVERS[:-1] for word in (name, str(ports[name]))]
    subprocess.run([bin_dir / "python", "-c", BUILD_RINGS, *rings], cwd=root, check=True)


def _start_server(root: Path, bin_dir: Path, name: str) -> subprocess.Popen[bytes]:
    """Start one server; it ends with the thread that starts it, at the latest."""
    server = [str(bin_dir / f"swift-{name}-server"), f"{name}.conf", "--verbose"]
    with (root / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, *server],
            cwd=root,
            env=os.environ | {"SWIFT_DIR": str(root)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # only the tests get Ctrl-C, and stop the servers
        )


def _await_health(server: subprocess.Popen[bytes], port: int, log: Path, deadline: float) -> None:
    """Wait until the server answers; raise an error with the end of its log if it does not."""
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=2).close()
            return
        except OSError:
            time.sleep(0.1)
    state = "did not answer" if server.returncode is None else f"exited with {server.returncode}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
    raise RuntimeError(f"Swift's {log.stem} server {state}; the end of {log}:\n{tail}")
