"""What runs on each node. It travels there as code, and imports what it needs when it needs it: a node without the
package, or without a decoder, has to be able to say so."""

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

from crosslmm.ray_runtime import local_node, token_auth_enabled

SEEN = """\
import torch
count = torch.cuda.device_count()
for i in range(count):
    torch.ones(1, device=f"cuda:{i}").sum().item()
print(count, torch.cuda.get_device_name(0) if count else "")
"""

Try = Callable[[], str]
"""What a node tries -> what is said of it; raises what is wrong."""


class NotShared(Exception):
    """The folder that is written here is not the driver's."""


def look(asked: dict[str, Any]) -> dict[str, Any]:
    """This node as `checks` wants it.

    Args:
        asked: `node`, `probe` (folder in storage with the driver's own file), `config` of the run, plain, `tries`, the
            names of what is tried; and what these need: `manifests`, `videos` (any of which will do), `image_size`,
            `gpus` that Ray gives out here, `drives`: whether drivers may be here, `patient` with a store that is out of
            reach.
    """
    return {
        "time": time.time(),
        "versions": versions(),
        "disks": disks(asked["config"]["storage"]),
        "token": token(),
        "reached": [found for found in reach(asked) if found],
    }


def versions() -> dict[str, str]:
    """Of what has to be the same everywhere. The package's goes by its files: a working copy has no other version."""
    import ray

    return {
        "Ray": ray.__version__,
        "Python": platform.python_version(),
        "torch": _installed("torch"),
        "crosslmm": _files(),
    }


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "is missing"


def _files() -> str:
    spec = importlib.util.find_spec("crosslmm")
    if spec is None or spec.origin is None:
        return "is missing"
    folder, found = Path(spec.origin).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return f"{_installed('crosslmm')} ({found.hexdigest()[:8]})"


def disks(storage: str = "s3://") -> dict[str, tuple[str, int, int]]:
    """By what for: path, free and all bytes."""
    # tempfile would turn away from one that is full.
    places = {"temporary files": os.environ.get("TMPDIR") or tempfile.gettempdir()}
    if node := local_node():
        spilled = node._fallback_directory
        default = not spilled or spilled.startswith(node.get_session_dir_path())
        places["Ray's files"] = node.get_temp_dir_path() if default else spilled
    if "://" not in storage:
        places["local storage"] = storage
    return {use: (path, *_room(Path(path).absolute())) for use, path in places.items()}


def _room(path: Path) -> tuple[int, int]:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    found = shutil.disk_usage(there)
    return found.free, found.total


def token() -> tuple[bool, str, int]:
    """Whether Ray asks for one here; the file that it is taken from, if any; that file's mode."""
    if not token_auth_enabled():
        return False, "", 0
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or not path.exists():
        return True, "", 0
    return True, str(path), stat.S_IMODE(path.stat().st_mode)


def reach(asked: dict[str, Any]) -> list[tuple[str, str, str] | None]:
    """Name, class of the error or "", and what is said, of each that was tried. All are tried at once, for a store
    that is out of reach takes its time."""
    tries = []
    for name in asked["tries"]:
        # One after the other: imports of threads get in one another's way.
        try:
            tries.append((name, TRIES[name](asked)))
        except Exception as error:
            tries.append((name, _failing(error)))
    with ThreadPoolExecutor(max(1, len(tries))) as threads:
        return list(threads.map(_tried, *zip(*tries, strict=True))) if tries else []


def _failing(error: Exception) -> Try:
    def fail() -> str:
        raise error

    return fail


def _tried(name: str, attempt: Try | None) -> tuple[str, str, str] | None:
    if attempt is None:
        return None
    try:
        return name, "", attempt()
    except Exception as error:
        kind = "PermissionError" if getattr(error, "errno", 0) in (1, 13, 30) else type(error).__name__
        said = " ".join(str(error).split())[:300]
        if "refuses" in said and name == "MLflow":
            kind = "refuses"
        return (
            name,
            kind,
            said if kind in ("PermissionError", "Unavailable", "NotShared", "BadConfig") else f"{kind}: {said}",
        )


def _storage(asked: dict[str, Any]) -> Try:
    from crosslmm import storage

    _be_as_patient(asked)
    probe = asked["probe"]

    def write() -> str:
        storage.write_bytes(storage.join(probe, asked["node"]), b"written")
        if not storage.exists(storage.join(probe, "driver")):
            raise NotShared(f"{probe}: what the driver wrote is not there")
        return f"written to {storage.parent(probe)}"

    return write


def _be_as_patient(asked: dict[str, Any]) -> None:
    from crosslmm.storage import retry

    if not asked.get("patient"):
        retry.PATIENCE_S = 0


def _manifest(asked: dict[str, Any]) -> Try:
    from crosslmm import storage

    def read() -> str:
        for uri in asked["manifests"]:
            if not storage.is_folder(uri):
                storage.read_bytes(uri, 0, 1024)
        return ", ".join(asked["manifests"])

    return read


def _decoder(asked: dict[str, Any]) -> Try:
    from crosslmm.data.video.decode_pool import require_backend

    def load() -> str:
        require_backend(asked["config"]["data"]["decoder"])
        return f"{asked['config']['data']['decoder']} loads"

    return load


def _video(asked: dict[str, Any]) -> Try | None:
    if not asked["videos"] or importlib.util.find_spec("crosslmm") is None:
        return None
    try:
        from crosslmm.config import DataConfig
        from crosslmm.data.video.decode_pool import Unreadable, decode_video
    except ImportError:
        return None  # the decoder's row says it
    data = DataConfig.model_validate(asked["config"]["data"])

    def decode() -> str:
        why = ""
        for uri in asked["videos"]:
            found = decode_video(uri, data, asked["image_size"])
            if not isinstance(found, Unreadable):
                return f"{len(found)} frames of {uri}"
            why = why or f"{uri}: {found.reason}"
        raise ValueError(why)

    return decode


def _mlflow(asked: dict[str, Any]) -> Try | None:
    if not asked["drives"]:  # drivers alone write the record
        return None

    from crosslmm.config import TrackingConfig, tracking_uri, without_password
    from crosslmm.tracking.client import require_answer

    config = TrackingConfig.model_validate(asked["config"]["tracking"])

    def ask() -> str:
        if tracking_uri(config).startswith("sqlite:"):
            raise RuntimeError("MLFLOW_TRACKING_URI is not set here; the driver's holds a password, and stays there")
        require_answer(config)
        return f"{without_password(tracking_uri(config))} answers"

    return ask


def _gpu(asked: dict[str, Any]) -> Try | None:
    if not asked["gpus"]:
        return None

    def see() -> str:
        # Ray hides them from a task that asked for none.
        every = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
        seen = subprocess.run([sys.executable, "-c", SEEN], env=every, capture_output=True, text=True, timeout=60)
        if seen.returncode:
            raise RuntimeError(seen.stderr.strip().splitlines()[-1])
        count, _, kind = seen.stdout.strip().partition(" ")
        if int(count) < asked["gpus"]:
            raise RuntimeError(f"Ray gives out {asked['gpus']:g} GPUs here, and torch sees {count}")
        return f"{count} x {kind}"

    return see


TRIES: dict[str, Callable[[dict[str, Any]], Try | None]] = {
    "storage": _storage,
    "manifest": _manifest,
    "decoder": _decoder,
    "video": _video,
    "MLflow": _mlflow,
    "GPU": _gpu,
}
