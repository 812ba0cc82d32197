"""Two other users of the machine, made with `useradd`, against what this project keeps in shared places."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from crosslmm import ray_runtime
from tests.support.common import ROOT

pytestmark = [
    pytest.mark.attack,
    pytest.mark.skipif(os.getuid() != 0, reason="only root makes users"),
]

NAMES = ["crosslmm-mallory", "crosslmm-eve"]


@pytest.fixture(scope="module")
def others() -> Iterator[list[int]]:
    """Return the ids of two other users."""
    for name in NAMES:
        subprocess.run(["useradd", "--no-create-home", name], check=True)
    try:
        yield [int(subprocess.run(["id", "-u", name], capture_output=True, text=True).stdout) for name in NAMES]
    finally:
        for name in NAMES:
            subprocess.run(["userdel", name], check=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """Return a folder like /tmp: everybody may write into it, and rename only what is theirs."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def as_user(uid: int, attack: Callable[..., object], *arguments: object) -> str:
    """Return the name of the error that the attack ends with as this user, or its result as text."""
    receive, send = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=_attack, args=(uid, attack, arguments, send))
    process.start()
    process.join(30)
    return receive.recv()


def _attack(uid: int, attack: Callable[..., object], arguments: tuple, send) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    try:
        send.send(str(attack(*arguments)))
    except OSError as error:
        send.send(type(error).__name__)


def test_others_cannot_enter_the_folder_of_ray_sessions(others, shared, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(shared))
    folder = Path(ray_runtime.private_folder())
    (folder / "session").mkdir()
    for uid in others:
        assert as_user(uid, os.listdir, folder) == "PermissionError"
        assert as_user(uid, (folder / "link").symlink_to, "/etc/passwd") == "PermissionError"
        assert as_user(uid, folder.rename, shared / "mine") == "PermissionError"
    assert ray_runtime.private_folder() == str(folder)


@pytest.mark.parametrize("how", ["folder", "link"])
def test_a_planted_folder_of_ray_sessions_is_not_used(others, shared, monkeypatch, how):
    monkeypatch.setenv("RAY_TMPDIR", str(shared))
    planted = shared / f"ray-{os.getuid()}"
    bait = shared / "bait"
    as_user(others[0], (planted if how == "folder" else bait).mkdir)
    if how == "link":
        as_user(others[0], planted.symlink_to, bait)
    assert planted.exists()
    folder = Path(ray_runtime.private_folder())
    assert folder.resolve() not in (planted.resolve(), bait)
    assert folder.stat().st_uid == os.getuid()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("requested", [None, ""])
def test_the_address_of_a_cluster_that_another_user_left_is_not_followed(others, shared, requested):
    """Ray itself would connect to it, and send this user's programs there."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_TMPDIR": str(shared), "HOME": str(shared), "PYTHONPATH": str(ROOT)}
    if requested is not None:
        environment["RAY_ADDRESS"] = requested
    (shared / "ray").mkdir()
    (shared / "ray").chmod(0o777)
    as_user(others[0], (shared / "ray" / "ray_current_cluster").write_text, "127.0.0.1:9")
    code = (
        "import ray; from crosslmm.ray_runtime import start_ray; start_ray(num_cpus=1); print(ray.get(ray.put('ours')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "ours\n", done.stderr


def test_others_cannot_read_the_token_of_a_started_cluster(others, shared, monkeypatch):
    monkeypatch.setenv("HOME", str(shared))
    monkeypatch.setenv("RAY_TMPDIR", str(shared))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        environment.pop(name, None)
    # The worst umask: whatever Ray or this project creates carelessly is open to all.
    code = "import os; os.umask(0); from crosslmm.ray_runtime import start_ray; start_ray(num_cpus=1); print('up')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout == "up\n", done.stderr
    token = shared / ".ray" / "auth_token"
    assert token.exists()
    for uid in others:
        assert as_user(uid, token.read_text) == "PermissionError"
        assert as_user(uid, token.unlink) == "PermissionError"
