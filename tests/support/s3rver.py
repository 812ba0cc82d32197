"""A second S3 server of another make: s3rver, from npm. Code that is tuned to one server's answers fails on the other.

It is a fake for tests: it keeps objects as files, checks no version 4 signature, and knows a user by the key's name
alone. Where a test needs more, it says so and uses Swift.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from tests.support.common import ROOT
from tests.support.object_store import DIE_WITH_PARENT, ObjectStore, running_object_store

STORES = ("swift", "s3rver")
REQUIREMENT = "s3rver@3.7.1"

# The key pair is this store's own: a client that reaches another session's store by mistake is refused.
SERVER = """\
const { DUMMY_ACCOUNT } = require('s3rver/lib/models/account');
DUMMY_ACCOUNT.createKeyPair(process.env.STORE_USER, process.env.STORE_SECRET);
DUMMY_ACCOUNT.revokeAccessKey('S3RVER');
const S3rver = require('s3rver');
new S3rver({ address: '127.0.0.1', port: 0, directory: process.env.STORE_DATA, silent: true, vhostBuckets: false })
  .run().then(({ port }) => console.log(port));
"""


@contextmanager
def running_s3rver(root: Path, *, cache: Path) -> Iterator[ObjectStore]:
    """Context manager: runs a store with its data in the new folder ``root``; installs s3rver into ``cache`` on first
    use."""
    root, modules = root.resolve(), _installed(cache.resolve())
    (root / "data").mkdir(parents=True)
    store = ObjectStore("", user=f"user-{os.getpid()}-{time.time_ns()}", make="s3rver")
    environment = {"STORE_USER": store.user, "STORE_SECRET": store.secret, "STORE_DATA": str(root / "data")}
    server = [shutil.which("node") or "node", "-e", SERVER]
    with (
        (root / "server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", DIE_WITH_PARENT, *server],
            cwd=modules,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # only the tests get Ctrl-C, and stop the server
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            port = process.stdout.readline().strip()
            if not port:
                raise RuntimeError(
                    f"s3rver did not start:\n{(root / 'server.log').read_text(errors='replace')[-2000:]}"
                )
            S3FileSystem.clear_instance_cache()
            yield replace(store, endpoint=f"http://127.0.0.1:{port}")
        finally:
            process.kill()


@contextmanager
def running_store(make: str, root: Path) -> Iterator[ObjectStore]:
    """Context manager: runs one of `STORES` with its data in the new folder ``root``."""
    cache = ROOT / ".cache"
    of_make = {
        "swift": lambda: running_object_store(root, venv=cache / "swift-venv"),
        "s3rver": lambda: running_s3rver(root, cache=cache / "s3rver"),
    }
    with of_make[make]() as store:
        yield store


def _installed(cache: Path) -> Path:
    """Install s3rver into ``cache`` unless its stamp, which is written last, shows that it is there."""
    if missing := [name for name in ("node", "npm") if shutil.which(name) is None]:
        pytest.fail(f"no {' and no '.join(missing)}: apt-get install nodejs npm", pytrace=False)
    cache.mkdir(parents=True, exist_ok=True)
    stamp = cache / "complete"
    with cache.with_name(f"{cache.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second session waits until it is there
        if not stamp.exists() or stamp.read_text() != REQUIREMENT:
            npm = ["npm", "install", "--prefix", str(cache), "--ignore-scripts", "--no-audit", "--no-fund"]
            subprocess.run([*npm, "--loglevel=error", REQUIREMENT], check=True, stdin=subprocess.DEVNULL)
            stamp.write_text(REQUIREMENT)
    return cache
