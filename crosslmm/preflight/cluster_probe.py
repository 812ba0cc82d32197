"""Run the node probe on every node of the cluster and collect the reports."""

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from crosslmm import ray_runtime, storage
from crosslmm.config import RunConfig, tracking_uri
from crosslmm.data.manifest import Manifest
from crosslmm.model.loading import build_config
from crosslmm.preflight import node_probe
from crosslmm.text import holds_credentials, in_brief

PROBE_TIMEOUT_S = 60.0
"""Deadline for a node's report, the start of its worker process included [s]."""
SAMPLE_VIDEOS = 3
"""Number of videos that a node tries until it can read one: a single video may be damaged."""
SAMPLE_ROWS = 50
"""Number of manifest rows in which the driver looks for those videos."""

Nodes = Mapping[str, Mapping[str, Any]]
"""Nodes as `ray.nodes()` describes them, by a name that is unique in the cluster."""


def alive_nodes() -> Nodes:
    """Return the cluster's living nodes, by unique name."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    names = [node["NodeName"] for node in nodes]
    return {
        name if names.count(name) == 1 else f"{name} ({node['NodeID'][:6]})": node
        for name, node in zip(names, nodes, strict=True)
    }


def other_nodes() -> Nodes:
    """Return the nodes that can run workers, without the driver's own node."""
    driver_node = ray.get_runtime_context().get_node_id()
    return {
        name: node
        for name, node in alive_nodes().items()
        if node["NodeID"] != driver_node and node["Resources"].get("CPU")
    }


def probe_nodes(
    nodes: Nodes, request: dict[str, Any], environment: dict[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run the probe on every node at once.

    Args:
        nodes: nodes to probe, by name.
        request: argument of `node_probe.probe_node`, without the fields that differ between nodes.
        environment: additional environment variables of the probe's processes.

    Returns:
        Reports by node, and for each node without a report the reason.
    """
    # The probe travels as code: a node without the package, or with another version, can still run it.
    ray.cloudpickle.register_pickle_by_value(node_probe)
    ray.cloudpickle.register_pickle_by_value(ray_runtime)
    probe = ray.remote(num_cpus=0, max_retries=0)(node_probe.probe_node)
    runtime_env = {"runtime_env": {"env_vars": environment}} if environment else {}
    sent_at, pending = time.time(), {}
    for name, node in nodes.items():
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = probe.options(scheduling_strategy=on_node, **runtime_env).remote(
            request | node_fields(name, node, request)
        )
        pending[task] = name
    reports, errors = {}, {}
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    while pending and (remaining_s := deadline - time.monotonic()) > 0:
        for task in ray.wait(list(pending), timeout=remaining_s)[0]:
            name = pending.pop(task)
            try:
                report: Any = ray.get(task)
                reports[name] = {"sent_at": sent_at, "received_at": time.time(), **report}
            except RayError as error:
                errors[name] = f"{type(error).__name__}: {_last_line(error)}"
    for task, name in pending.items():
        ray.cancel(task, force=True)
        errors[name] = f"no report within {PROBE_TIMEOUT_S:g} s"
    return {name: reports[name] for name in nodes if name in reports}, errors


def node_fields(name: str, node: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a probe's request that differ between nodes."""
    scaling = request["config"]["scaling"]
    runs_drivers, may_train = (scaling[key].items() <= node["Labels"].items() for key in ("drive_on", "train_on"))
    gpus = node["Resources"].get("GPU", 0) if scaling["use_gpu"] else 0
    return {
        "node": name,
        "gpus": gpus,
        "trains": may_train and (gpus > 0 or not scaling["use_gpu"]),
        "runs_drivers": runs_drivers,
        "writes_storage": runs_drivers or may_train,
    }


def _last_line(error: Exception) -> str:
    """Return the last line of a task's error, whose text is a traceback."""
    return in_brief(str(error).strip().splitlines()[-1])


def probe_request(
    config: RunConfig, manifests: Sequence[Manifest], folder: str, checks: Iterable[str]
) -> dict[str, Any]:
    """Return the argument of `node_probe.probe_node`, without the fields that differ between nodes.

    Args:
        config: the run's configuration.
        manifests: training manifests that the driver could open.
        folder: folder in storage that holds a file of the driver's.
        checks: names in `node_probe.CHECKS`.
    """
    videos: list[str] = []
    for manifest in manifests if config.data.features is None else []:
        for row in manifest.take(range(min(SAMPLE_ROWS, len(manifest)))):
            videos += row["videos"]
    # The environment of a node may not name the MLflow server, so the driver's URI is sent, unless it holds a password.
    uri = tracking_uri(config.tracking)
    if not holds_credentials(uri):
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": uri})})
    return {
        "config": config.model_dump(mode="json"),
        "folder": folder,
        "checks": list(checks),
        "manifests": [storage.absolute(uri) for uri in config.data.manifests],
        "videos": videos[:SAMPLE_VIDEOS],
        "image_size": build_config(config.model).vision_config.image_size,
    }


@contextlib.contextmanager
def probe_folder(config: RunConfig) -> Iterator[str]:
    """Create a folder in storage with a file of the driver's, and remove it at the end. No run can have its name.

    Raises:
        OSError: storage is not writable.
    """
    folder = storage.join(config.storage, f".doctor-{secrets.token_hex(4)}")
    storage.write_bytes(storage.join(folder, "driver"), b"written")
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            storage.remove_folder(folder)
