"""How this project connects to Ray, and the only module of this package that uses Ray's private APIs.

Ray changes its private modules without notice: an upgrade that breaks one of them fails here, and in
tests/unit/test_ray_runtime.py, and nowhere else. Imports are local, since helper processes start faster without them.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import stat
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from crosslmm.config import BadConfig

log = logging.getLogger(__name__)

LONGEST_PARENT = 25
"""Longest path of the folder for Ray's files that leaves room for the names of its sockets [bytes]."""
LONGEST_TMPDIR = 75
"""Longest path of the temporary folder that leaves room for the sockets of Python's multiprocessing [bytes]."""
QUIET_ENVIRONMENT = {
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # So that a relative path in a configuration means the same in every trial of a sweep.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
"""Environment of all workers: Ray logs about itself to its own files only; failures reach the terminal as one line."""


def start_ray(**options: Any) -> None:
    """Connect to an existing cluster (RAY_ADDRESS, or the one that this user started here), or start one on this
    machine, whose token, sockets and logs only this user can reach.

    Args:
        options: further arguments of `ray.init`.

    Raises:
        BadConfig: RAY_ADDRESS is auto and there is no such cluster, or Ray's token cannot be written.
    """
    if ray.is_initialized():
        return
    # Concurrent trials run more processes than the machine has cores, which Ray would warn about.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    options = {"runtime_env": {"env_vars": QUIET_ENVIRONMENT}} | options
    requested = os.environ.get("RAY_ADDRESS")
    if not requested or requested == "auto":
        if address := _address_of_own_cluster():
            options["address"] = address
        elif requested:
            raise BadConfig("RAY_ADDRESS: auto: you started no cluster here; give a cluster's HOST:PORT, or unset it")
        else:
            os.environ.pop("RAY_ADDRESS", None)
            _create_token()
            options["_temp_dir"] = private_folder()
            variables = options["runtime_env"]["env_vars"] | short_tmpdir()
            options["runtime_env"] = {**options["runtime_env"], "env_vars": variables}
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        # Ray has installed its own handler, which would kill our workers along with a cluster that Ray started here.
        signal.signal(signal.SIGTERM, handler)


def _address_of_own_cluster() -> str | None:
    """Return the address of a cluster that this user's `ray start` left on this machine; None without one.

    Ray itself would follow such an address whoever wrote it, and the folder is open to all.
    """
    from ray._common.utils import get_ray_address_file

    try:
        with os.fdopen(os.open(get_ray_address_file(None), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            own = status.st_uid == os.getuid() and stat.S_ISREG(status.st_mode)
            return file.read(300).strip() or None if own else None
    except (OSError, ValueError):
        return None


def _create_token() -> None:
    """Create the file with Ray's token if it is missing; otherwise make it private: Ray would create it readable to
    all.

    Raises:
        BadConfig: the folder cannot be written.
    """
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700)
        # Whoever may write into the folder could put another token in place of this one.
        path.parent.chmod(path.parent.stat().st_mode & ~0o022)
        # Complete before it has its name: another job that starts now must not read half of it.
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)
        path.chmod(0o600)
    except OSError as error:
        raise BadConfig(
            f"{path}: {error.strerror}; Ray keeps its token there. Set RAY_AUTH_TOKEN_PATH to a file with your token"
        ) from error


def short_parent() -> str:
    """Return the system's temporary folder, or /tmp if its path leaves no room for those of Ray's sockets."""
    from ray._common.utils import get_default_system_temp_dir

    parent = str(get_default_system_temp_dir())
    if len(os.fsencode(parent)) > LONGEST_PARENT:
        log.warning("the path %s is too long for Ray's sockets; Ray's files are in /tmp", parent)
        parent = "/tmp"
    return parent


def short_tmpdir() -> dict[str, str]:
    """Return the environment of processes that make sockets in their temporary folder: TMPDIR, if its path is too long.
    Ray's dashboard and decoders do, and fail or hang otherwise."""
    parent = os.environ.get("TMPDIR", "")
    return {"TMPDIR": "/tmp"} if len(os.fsencode(parent)) > LONGEST_TMPDIR else {}


def private_folder() -> str:
    """Return a folder for the sessions of Ray that no other user can read or write.

    Its path is short, since those of sockets are below it and Linux allows 107 bytes. The name is the same each time,
    so that logs of earlier sessions are found; a folder of this name that somebody else made is not used.
    """
    folder = Path(short_parent()) / f"ray-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        return tempfile.mkdtemp(prefix="ray-", dir=folder.parent)
    folder.chmod(0o700)
    return str(folder)


def token_auth_enabled() -> bool:
    """Return whether Ray authenticates with a token in this process's environment."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    return bool(is_token_auth_enabled())


def token_available() -> bool:
    """Return whether a token exists that Ray could use, even if RAY_AUTH_MODE does not ask for one."""
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    return bool(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def ping_gcs(address: str, timeout_s: float) -> None:
    """Ask a cluster's control store for its id, with this process's token.

    Args:
        address: HOST:PORT of the control store (GCS).
        timeout_s: deadline of the call [s].

    Raises:
        grpc.RpcError: no answer, or UNAUTHENTICATED.
    """
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(init_grpc_channel(address))
    stub.GetClusterId(gcs_service_pb2.GetClusterIdRequest(), timeout=timeout_s)  # type: ignore[attr-defined]


def on_head_node() -> bool:
    """Return whether this driver runs on the head node."""
    return bool(_local_node().is_head())


def spill_folder() -> str | None:
    """Return the folder that Ray spills objects to on this node; None in a process outside of any cluster."""
    node = _local_node()
    if node is None:
        return None
    folder = node._fallback_directory
    # By default Ray spills to a session's folder, whose name changes: name its parent.
    default = not folder or folder.startswith(node.get_session_dir_path())
    return str(node.get_temp_dir_path() if default else folder)


def current_job() -> tuple[str, str]:
    """Return the id of the cluster that this process is connected to, and of its job there; empty outside of any."""
    if not ray.is_initialized():
        return "", ""
    return _local_node().cluster_id.hex(), ray.get_runtime_context().get_job_id()


def job_has_ended(cluster: str, job: str) -> bool:
    """Return whether a job of the connected cluster is known to have ended; False for a job of another one.

    Args:
        cluster, job: as `current_job` returned them there.
    """
    from ray._private.state import jobs

    if not job or cluster != current_job()[0]:
        return False
    return any(entry["JobID"] == job and entry["IsDead"] for entry in jobs())


def submission_id() -> str:
    """Return the id under which this process was submitted (`ray job submit`); empty if it was not."""
    from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

    job = json.loads(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}"))
    return str(job.get("metadata", {}).get("job_submission_id", ""))


def _local_node() -> Any:
    """Return Ray's object for the node this process started or joined; None if there is none."""
    import ray._private.worker

    return ray._private.worker._global_node


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    from ray._common.network_utils import find_free_port

    return int(find_free_port())


def worker_group_errors() -> tuple[type[Exception], type[Exception]]:
    """Return Ray Train's exceptions for "no room for the workers" and "a worker's process has died"."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

    return WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError


def torch_backend() -> Any:
    """Return Ray Train's class that starts torch.distributed on its workers."""
    from ray.train.torch.config import _TorchBackend

    return _TorchBackend


def set_rank_variables() -> None:
    """Set the variables by which torch and Accelerate know a worker's rank and GPU; runs in the worker."""
    from ray.train.torch.config import _set_torch_distributed_env_vars

    _set_torch_distributed_env_vars()
