"""Ray's private parts still exist as crosslmm/ray_runtime.py expects them, and no other module uses any."""

import ast
import os
import re
import socket
import subprocess
import sys

import grpc
import pytest
import ray._private.worker
from ray.exceptions import RayError

from crosslmm import ray_runtime
from crosslmm.config import BadConfig
from tests.support.common import ROOT

PRIVATE = re.compile(r"\b_(private|internal|raylet)\b")


@pytest.mark.parametrize(
    ("settings", "enabled", "available"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, False, False),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "0" * 64}, False, True),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, True, True),
    ],
)
def test_token_settings_are_read_from_the_environment(settings, enabled, available, tmp_path):
    """In a new process: Ray caches mode and token."""
    code = "from crosslmm import ray_runtime as r; print(r.token_auth_enabled(), r.token_available())"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | settings
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(enabled), str(available)]


def test_ping_raises_where_no_cluster_answers():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(grpc.RpcError) as error:
        ray_runtime.ping_gcs(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
    assert error.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


def test_rays_node_has_the_attributes_that_are_read():
    from ray._private.node import Node

    for name in ("is_head", "get_session_dir_path", "get_temp_dir_path"):
        assert callable(getattr(Node, name))
    assert "_fallback_directory" in Node.__init__.__code__.co_names


@pytest.mark.parametrize(
    ("fallback", "folder"),
    [(None, "/tmp/ray"), ("/tmp/ray/session_1/spill", "/tmp/ray"), ("/big/spill", "/big/spill")],
)
def test_the_default_spill_folder_is_named_by_its_parent(fallback, folder, monkeypatch):
    class Node:
        _fallback_directory = fallback

        def get_session_dir_path(self):
            return "/tmp/ray/session_1"

        def get_temp_dir_path(self):
            return "/tmp/ray"

    monkeypatch.setattr(ray._private.worker, "_global_node", Node())
    assert ray_runtime.spill_folder() == folder


def test_a_process_outside_of_a_cluster_has_no_spill_folder(monkeypatch):
    monkeypatch.setattr(ray._private.worker, "_global_node", None)
    assert ray_runtime.spill_folder() is None


def test_a_free_port_can_be_listened_on():
    socket.create_server(("", ray_runtime.free_port())).close()


def test_worker_group_errors_are_exceptions_of_ray_train():
    no_room, worker_died = ray_runtime.worker_group_errors()
    assert issubclass(no_room, Exception)
    assert issubclass(worker_died, Exception)
    assert no_room is not worker_died
    assert not issubclass(no_room, RayError)


def test_only_ray_runtime_uses_private_parts_of_ray():
    users = []
    for path in (ROOT / "crosslmm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if any(re.match(r"ray\b.*\._", name) for name in names):
                users.append(path.name)
        if PRIVATE.search(path.read_text()):
            users.append(path.name)
    assert set(users) == {"ray_runtime.py"}


def test_ray_address_auto_finds_only_a_cluster_of_this_user(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(BadConfig, match=r"^RAY_ADDRESS: auto: you started no cluster here"):
        ray_runtime.start_ray()
    (tmp_path / "ray").mkdir()
    (tmp_path / "elsewhere").write_text("127.0.0.1:9")
    (tmp_path / "ray" / "ray_current_cluster").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadConfig, match="you started no cluster"):
        ray_runtime.start_ray()


def test_a_home_that_cannot_hold_the_token_is_named(monkeypatch, tmp_path):
    (tmp_path / ".ray").write_text("a file")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadConfig, match=r"\.ray/auth_token: .* Set RAY_AUTH_TOKEN_PATH"):
        ray_runtime.start_ray()


@pytest.mark.parametrize(("length", "expected"), [(75, {}), (76, {"TMPDIR": "/tmp"})])
def test_a_temporary_folder_leaves_room_for_the_sockets_in_it(length, expected, monkeypatch):
    """Python's multiprocessing adds 32 bytes, and Linux allows 107: beyond, a run waited for its decoders for ever."""
    monkeypatch.setenv("TMPDIR", "/" + "x" * (length - 1))
    assert ray_runtime.short_tmpdir() == expected
