"""The probe that runs on each node. It travels there as code and imports lazily: a node without the package, or
without a decoder, must still be able to report that."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from crosslmm.ray_runtime import spill_folder, token_auth_enabled

GPU_TEST = """\
import torch
count = torch.cuda.device_count()
for i in range(count):
    torch.ones(1, device=f"cuda:{i}").sum().item()
print(count, torch.cuda.get_device_name(0) if count else "")
"""
"""Program that computes on each GPU and prints their number and name."""
PERMISSION_ERRNOS = (1, 13, 30)
"""EPERM, EACCES and EROFS."""
NOT_INSTALLED = "not installed"

Check = Callable[[], str]
"""Checks one thing on this node and returns a message about it; raises an error that says what is wrong."""
CheckResult = tuple[str, str, str]
"""Name of a check, class of the error ("" for none), message."""


class NotShared(Exception):
    """The storage folder on this node is not the driver's."""


def probe_node(request: dict[str, Any]) -> dict[str, Any]:
    """Return this node's report.

    Args:
        request: plain values, with the keys
            `node`: name of this node;
            `folder`: folder in storage that holds the file `driver`;
            `config`: the run's configuration;
            `checks`: names in `CHECKS`;
            `manifests`, `videos` (one readable video is enough), `image_size` [pixels]: what those checks read;
            `gpus`: number of GPUs that Ray assigns on this node;
            `trains`: training workers may be placed on this node;
            `runs_drivers`: drivers may be;
            `writes_storage`: drivers or training workers may be; nodes that only decode need no right to write;
            `retry_storage`: retry a store that is out of reach (default: fail at once).
    """
    return {
        "time": time.time(),
        "versions": versions(),
        "disks": disks(request["config"]["storage"]),
        "token": token(),
        "checks": [result for result in run_checks(request) if result],
    }


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all nodes. The package's includes a digest of its files, since working
    copies share a version number."""
    import ray

    return {
        "Ray": ray.__version__,
        "Python": platform.python_version(),
        "torch": _installed_version("torch"),
        "crosslmm": _package_version(),
    }


def _installed_version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _package_version() -> str:
    spec = importlib.util.find_spec("crosslmm")
    if spec is None or spec.origin is None:
        return NOT_INSTALLED
    folder, digest = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return f"{_installed_version('crosslmm')} ({digest.hexdigest()[:8]})"


def disks(storage: str = "s3://") -> dict[str, tuple[str, int, int]]:
    """Return path, free and total space [bytes] of the folders that a run writes to, by use."""
    # TMPDIR first: `tempfile.gettempdir` silently avoids a folder on a full disk.
    folders = {"temporary files": os.environ.get("TMPDIR") or tempfile.gettempdir()}
    if spilled := spill_folder():
        folders["Ray's files"] = spilled
    if "://" not in storage:
        folders["local storage"] = storage
    return {use: (path, *_disk_space(Path(path).absolute())) for use, path in folders.items()}


def _disk_space(path: Path) -> tuple[int, int]:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    usage = shutil.disk_usage(existing)
    return usage.free, usage.total


def token() -> tuple[bool, str, int]:
    """Return whether Ray requires a token here, the path of the token file ("" if there is none), and its mode."""
    if not token_auth_enabled():
        return False, "", 0
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or not path.exists():
        return True, "", 0
    return True, str(path), stat.S_IMODE(path.stat().st_mode)


def run_checks(request: dict[str, Any]) -> list[CheckResult | None]:
    """Run the checks that the request names, all at once: each waits for the network. None for a check that does not
    apply to this node."""
    checks = []
    for name in request["checks"]:
        # Imports one after another: concurrent imports in threads can deadlock.
        try:
            checks.append((name, CHECKS[name](request)))
        except Exception as error:
            checks.append((name, _raise(error)))
    with ThreadPoolExecutor(max(1, len(checks))) as threads:
        return list(threads.map(_run_check, *zip(*checks, strict=True))) if checks else []


def _raise(error: Exception) -> Check:
    def check() -> str:
        raise error

    return check


def _run_check(name: str, check: Check | None) -> CheckResult | None:
    if check is None:
        return None
    try:
        return name, "", check()
    except Exception as error:
        message = " ".join(str(error).split())  # the driver shortens it, after credentials are removed
        kind = "PermissionError" if getattr(error, "errno", 0) in PERMISSION_ERRNOS else type(error).__name__
        if "refuses" in message and name == "MLflow":
            kind = "refuses"
        # Messages of our own errors and of the store say what failed; others are clear only with their class.
        complete = kind in ("PermissionError", "Unavailable", "NotShared", "BadConfig")
        return name, kind, message if complete else f"{kind}: {message}"


def _storage(request: dict[str, Any]) -> Check | None:
    from crosslmm import storage

    if not request["writes_storage"]:
        return None
    folder = request["folder"]

    def check() -> str:
        storage.write_bytes(storage.join(folder, request["node"]), b"written")
        if not storage.exists(storage.join(folder, "driver")):
            raise NotShared(f"{folder}: the driver's file is missing there")
        return f"written to {storage.parent(folder)}"

    return _with_retry_policy(request, check)


def _with_retry_policy(request: dict[str, Any], check: Check) -> Check:
    """Return a check that reports a store out of reach at once, unless the request wants it retried."""
    from crosslmm import storage

    def without_retries() -> str:
        with storage.retrying(storage.NO_RETRIES):
            return check()

    return check if request.get("retry_storage") else without_retries


def _manifest(request: dict[str, Any]) -> Check:
    from crosslmm import storage
    from crosslmm.data.rows.folders import manifest_files

    def check() -> str:
        for uri in request["manifests"]:
            for file in manifest_files(uri)[:1]:
                storage.read_bytes(file, 0, 1024)
        return ", ".join(request["manifests"])

    return _with_retry_policy(request, check)


def _decoder(request: dict[str, Any]) -> Check:
    from crosslmm.data.video.decode import require_backend

    def check() -> str:
        require_backend(request["config"]["data"]["decoder"])
        return f"{request['config']['data']['decoder']} loads"

    return check


def _video(request: dict[str, Any]) -> Check | None:
    if not request["videos"] or importlib.util.find_spec("crosslmm") is None:
        return None
    try:
        from crosslmm.config import DataConfig
        from crosslmm.data.video.decode import VideoFailure
        from crosslmm.data.video.decode_pool import Decoder
        from crosslmm.data.video.frame_list import describe_video
    except ImportError:
        return None  # the decoder's own check reports it
    data = DataConfig.model_validate(request["config"]["data"])

    def check() -> str:
        first_failure = ""
        with Decoder(data, request["image_size"]) as decoder:
            for uri in request["videos"]:
                (frames,) = decoder([uri])
                if not isinstance(frames, VideoFailure):
                    return f"{len(frames)} frames of {describe_video(uri)}"
                first_failure = first_failure or f"{describe_video(uri)}: {frames.reason}"
        raise ValueError(first_failure)

    return _with_retry_policy(request, check)


def _mlflow(request: dict[str, Any]) -> Check | None:
    if not request["runs_drivers"]:  # only drivers write to MLflow
        return None

    from crosslmm.config import TrackingConfig, tracking_uri
    from crosslmm.text import redacted
    from crosslmm.tracking.client import quiet_mlflow, require_answer

    quiet_mlflow()  # changes only this process, which is the probe's own
    config = TrackingConfig.model_validate(request["config"]["tracking"])

    def check() -> str:
        if tracking_uri(config).startswith("sqlite:"):
            raise RuntimeError(
                "MLFLOW_TRACKING_URI is not set here; the driver's holds a password, and is not sent to other nodes"
            )
        require_answer(config)
        return f"{redacted(tracking_uri(config))} answers"

    return check


def _gpu(request: dict[str, Any]) -> Check | None:
    if not request["gpus"]:
        return None

    def check() -> str:
        # Ray hides the GPUs from a task that reserves none.
        environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        command = [sys.executable, "-c", GPU_TEST]
        test = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        if test.returncode:
            raise RuntimeError(test.stderr.strip().splitlines()[-1])
        count, _, model = test.stdout.strip().partition(" ")
        if int(count) < request["gpus"]:
            raise RuntimeError(f"Ray assigns {request['gpus']:g} GPUs here, and torch sees {count}")
        return f"{count} x {model}"

    return check


def _packages(request: dict[str, Any]) -> Check | None:
    wanted = {
        "torchao": request["config"]["train"]["float8"] and "train.float8",
        "flash_attn": request["config"]["model"]["attention"] == "flash_attention_2" and "model.attention",
    }
    needed = {package: setting for package, setting in wanted.items() if setting}
    if not request["trains"] or not needed:
        return None

    def check() -> str:
        for package, setting in needed.items():
            # Transformers asks for the metadata, too, before it uses flash-attn.
            if importlib.util.find_spec(package) is None or _installed_version(package) == NOT_INSTALLED:
                raise RuntimeError(f"{package} is not installed, and {setting} needs it")
        return ", ".join(needed)

    return check


CHECKS: dict[str, Callable[[dict[str, Any]], Check | None]] = {
    "storage": _storage,
    "manifest": _manifest,
    "decoder": _decoder,
    "video": _video,
    "MLflow": _mlflow,
    "GPU": _gpu,
    "packages": _packages,
}
"""Prepares each check, by name: imports what it needs and returns it; None where it does not apply to this node."""
