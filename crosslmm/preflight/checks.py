"""Asking the nodes, and the part of it that every run does before it starts workers."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grpc
import ray
from ray.exceptions import AuthenticationError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crosslmm import ray_runtime, storage
from crosslmm.config import BadConfig, RunConfig, tracking_uri, without_password
from crosslmm.data.manifest import Manifest
from crosslmm.model.loading import build_config
from crosslmm.preflight import findings, node_probe
from crosslmm.preflight.findings import Finding

ANSWER_WITHIN_S = 60.0
"""A node that has not answered for so long, the start of its process included, is not well [s]."""
GCS_ANSWERS_WITHIN_S = 5.0
VIDEOS = 3
"""So many are tried until one is read: single ones may be bad."""
ROWS = 50
"""They are looked for in so many rows."""

# The functions themselves travel: a node that lacks the package can then say so.
ray.cloudpickle.register_pickle_by_value(node_probe)
ray.cloudpickle.register_pickle_by_value(ray_runtime)


class NoEntry(Exception):
    """The cluster does not let us in; `finding` says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.line)
        self.finding = finding


def require_entry() -> None:
    """Whether the cluster that RAY_ADDRESS names takes our token: Ray itself would knock for twenty seconds, and not
    say why nobody opens.

    Raises:
        NoEntry: it does not, or there is no token.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if ":" not in address or "://" in address:
        return
    try:
        ray_runtime.ping_gcs(address, GCS_ANSWERS_WITHIN_S)
    except grpc.RpcError as error:
        unset = "RAY_AUTH_MODE" not in os.environ and ray_runtime.token_available()
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED or unset:  # Ray will find it
            return
        said = f"the cluster at {address} asks for a token, and " + (
            "refuses the one that is given" if ray_runtime.token_auth_enabled() else "none is given"
        )
        raise NoEntry(Finding("token", "driver", False, said, findings.TOKEN)) from error


def connect() -> None:
    """Connect to the cluster at hand, or start one on this machine.

    Raises:
        NoEntry: it does not let us in.
        ConnectionError: it does not answer.
    """
    try:
        require_entry()
        ray_runtime.start_ray()
    except AuthenticationError as error:
        raise NoEntry(Finding("token", "driver", False, str(error).partition(". ")[0], findings.TOKEN)) from error
    except RuntimeError as error:
        if "Version mismatch" not in str(error):
            raise
        raise NoEntry(Finding("versions", "driver", False, " ".join(str(error).split()), findings.SAME)) from error


def enter() -> None:
    """`connect`, for runs.

    Raises:
        BadConfig: the cluster does not let us in; with what to do.
        ConnectionError: it does not answer.
    """
    try:
        connect()
    except NoEntry as error:
        raise BadConfig(str(error)) from error


def alive() -> dict[str, dict[str, Any]]:
    """Nodes of the cluster, by names that tell them apart."""
    found = [node for node in ray.nodes() if node["Alive"]]
    names = [node["NodeName"] for node in found]
    return {
        name if names.count(name) == 1 else f"{name} ({node['NodeID'][:6]})": node
        for name, node in zip(names, found, strict=True)
    }


def ask(
    cluster: dict[str, dict[str, Any]], asked: dict[str, Any], environment: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Let every node look at itself -> their reports, and why the others gave none.

    Args:
        cluster: the nodes, by name.
        asked: what `nodes.look` is told, but for what is a node's own.
        environment: variables of the processes that look.
    """
    look = ray.remote(num_cpus=0, max_retries=0)(node_probe.look)
    runtime_env = {"runtime_env": {"env_vars": environment}} if environment else {}
    at, running = time.time(), {}
    for name, node in cluster.items():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = look.options(scheduling_strategy=there, **runtime_env).remote(asked | _own(name, node, asked))
        running[task] = name
    reports, silent = {}, {}
    until = time.monotonic() + ANSWER_WITHIN_S
    while running and (left := until - time.monotonic()) > 0:
        for task in ray.wait(list(running), timeout=left)[0]:
            name = running.pop(task)
            try:
                report: Any = ray.get(task)
                reports[name] = {"asked": at, "answered": time.time(), **report}
            except RayError as error:
                silent[name] = f"{type(error).__name__}: {_last_line(error)}"
    for task, name in running.items():
        ray.cancel(task, force=True)
        silent[name] = f"nothing heard for {ANSWER_WITHIN_S:g} s"
    return {name: reports[name] for name in cluster if name in reports}, silent


def _own(name: str, node: dict[str, Any], asked: dict[str, Any]) -> dict[str, Any]:
    """What a node is told of itself."""
    scaling = asked["config"]["scaling"]
    return {
        "node": name,
        "gpus": node["Resources"].get("GPU", 0) if scaling["use_gpu"] else 0,
        "drives": scaling["drive_on"].items() <= node["Labels"].items(),
    }


def _last_line(error: Exception) -> str:
    """A task's error is its traceback."""
    return str(error).strip().splitlines()[-1].strip()[:300]


def question(config: RunConfig, manifests: Sequence[Manifest], probe: str, tries: Iterable[str]) -> dict[str, Any]:
    """What nodes are told to look at.

    Args:
        config: of the run.
        manifests: of training, those that could be opened.
        probe: folder in storage with a file of the driver's.
        tries: names in `nodes.TRIES`.
    """
    videos: list[str] = []
    for manifest in manifests if config.data.features is None else []:
        for row in manifest.take(range(min(ROWS, len(manifest)))):
            videos += row["videos"]
    # Nodes have an environment of their own, which may not say where the record is; but a password is theirs to have.
    uri = tracking_uri(config.tracking)
    if uri == without_password(uri):
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    return {
        "config": config.model_dump(mode="json"),
        "probe": probe,
        "tries": list(tries),
        "manifests": [storage.absolute(uri) for uri in config.data.manifests],
        "videos": videos[:VIDEOS],
        "image_size": build_config(config.model).vision_config.image_size,
    }


@contextlib.contextmanager
def probing(config: RunConfig) -> Iterator[str]:
    """A folder in storage with a file of this process, removed at the end; no run can have its name.

    Raises:
        OSError: nothing can be written there.
    """
    probe = storage.join(config.storage, f".doctor-{secrets.token_hex(4)}")
    storage.write_bytes(storage.join(probe, "driver"), b"written")
    try:
        yield probe
    finally:
        with contextlib.suppress(OSError):
            storage.remove_folder(probe)


def require_ready(config: RunConfig, manifests: Sequence[Manifest]) -> None:
    """What of the doctor's costs next to nothing, before workers are started: here, a file in storage, the disk, the
    token; of other nodes, if there are some, versions, clock, disk, storage, manifest and decoder as well. A node that
    does not answer is none: it may be on its way out.

    Raises:
        BadConfig: the first failure, with what to do.
        storage.Unavailable: the store is out of reach.
    """
    here = {"driver": {"disks": node_probe.disks(config.storage), "token": (token := node_probe.token())}}
    results = findings.disks(here, spilling=False) + (findings.token(here) if token[0] else [])
    try:
        with probing(config) as probe:
            if others := _others():
                asked = question(config, manifests, probe, ("storage", "manifest", "decoder"))
                reports, _ = ask(others, asked | {"patient": True}, {})
                results += of_nodes(reports, spilling=False)
    except storage.Unavailable:
        raise
    except OSError as error:
        kind = "PermissionError" if error.errno in (1, 13, 30) or isinstance(error, PermissionError) else ""
        results.append(Finding("storage", "driver", False, str(error), findings.remedy_of("storage", kind)))
    if failures := [finding for finding in results if not finding.ok]:
        more = f"; and {len(failures) - 1} more, which jobs/doctor.py shows" if len(failures) > 1 else ""
        raise BadConfig(f"{failures[0].line}{more}")


def _others() -> dict[str, dict[str, Any]]:
    """Nodes, but for this one, that have anything to do in a run."""
    mine = ray.get_runtime_context().get_node_id()
    return {name: node for name, node in alive().items() if node["NodeID"] != mine and node["Resources"].get("CPU")}


def of_nodes(reports: findings.Reports, spilling: bool = True) -> list[Finding]:
    """All that can be said of nodes from their reports, but for tokens."""
    if not reports:
        return []
    return [
        *findings.versions(reports, node_probe.versions()),
        *findings.clock(reports),
        *findings.disks(reports, spilling),
        *findings.reached(reports),
    ]
