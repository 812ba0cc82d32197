"""Run all preflight checks in order; each stage starts only when the stages before it have passed."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from crosslmm import ray_runtime, storage, tracking
from crosslmm.config import BadConfig, RunConfig, tracking_uri
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.doctor import all_reduce, dry_run
from crosslmm.preflight import cluster_probe, connect, findings, node_probe
from crosslmm.preflight.findings import Finding
from crosslmm.preflight.resolve import resolve_config

log = logging.getLogger(__name__)

PROBE_ENVIRONMENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""Environment variables of the probe's processes. MLflow's timeout is per request, and two are made [s]."""


def run_doctor(config: RunConfig) -> list[Finding]:
    """Check everything that the run will need.

    Args:
        config: the run's configuration.

    Returns:
        Findings, in the order of the checks. The last one is named "training" only if all others are ok.
    """
    with storage.retrying(storage.NO_RETRIES):  # report a store that is out of reach instead of waiting for it
        return _run_stages(config)


def _run_stages(config: RunConfig) -> list[Finding]:
    began = time.monotonic()
    with ExitStack() as stack:
        results, config, manifests, folder = _check_driver(config, stack)
        if refusal := _connect():
            return [*results, refusal]
        nodes = cluster_probe.alive_nodes()
        log.info("checking %s  (%.0f s)", findings.nodes_label(nodes), time.monotonic() - began)
        request = cluster_probe.probe_request(config, manifests, folder, _node_checks(config, folder))
        reports, errors = cluster_probe.probe_nodes(nodes, request, PROBE_ENVIRONMENT)
        results += findings.unreachable(errors)
        results += findings.from_reports(reports, node_probe.versions())
        results += [*_check_tokens(reports), *_check_tracking_file(config)]
        if not all(finding.ok for finding in results):
            return results
        log.info("running an all-reduce and two training steps  (%.0f s)", time.monotonic() - began)
        results += all_reduce.check_all_reduce(nodes, config.scaling.use_gpu)
        if all(finding.ok for finding in results):
            results.append(dry_run.train_two_steps(config, manifests, folder))
        return results


def _connect() -> Finding | None:
    """Connect to the cluster; return the failure, if any."""
    try:
        connect.connect()
    except connect.AccessRefused as error:
        return error.finding
    except ConnectionError as error:
        remedy = "start it (then `ray status` answers), or correct RAY_ADDRESS"
        return Finding("cluster", "driver", False, str(error), remedy)
    return None


def _check_driver(config: RunConfig, stack: ExitStack) -> tuple[list[Finding], RunConfig, list[Manifest], str]:
    """Check what the driver itself reads and writes: storage first, since sample data is written there, then the
    manifests.

    Args:
        config: the run's configuration.
        stack: removes the folder in storage when it is closed.

    Returns:
        Failures, the resolved configuration, the manifests that opened, and the folder in storage ("" if it cannot be
        written).
    """
    failures: list[Finding] = []
    try:
        config = config.model_copy(update={"storage": storage.absolute(config.storage)})
        folder = stack.enter_context(cluster_probe.probe_folder(config))
    except (OSError, storage.BadLocation) as error:
        return [_driver_failure("storage", error)], config, [], ""
    manifests: list[Manifest] = []
    try:
        config = resolve_config(config)
        manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    except BadManifest as error:
        failures.append(Finding("manifest", "driver", False, str(error), findings.remedy_of("manifest", "")))
    except BadConfig as error:
        failures.append(Finding("configuration", "driver", False, str(error), "see jobs/train.py --help"))
    except (OSError, storage.BadLocation) as error:
        failures.append(_driver_failure("storage", error))
    return failures, config, manifests, folder


def _node_checks(config: RunConfig, folder: str) -> list[str]:
    """Return the names in `node_probe.CHECKS` that this configuration needs."""
    has_manifest = config.data.manifest != "sample"  # still "sample" if the driver could not write the sample data
    needed = {
        "storage": bool(folder),
        "manifest": has_manifest,
        "decoder": True,
        "video": has_manifest,
        "MLflow": not _tracks_in_file(config),
        "GPU": config.scaling.use_gpu,
        "packages": True,
    }
    return [name for name, is_needed in needed.items() if is_needed]


def _tracks_in_file(config: RunConfig) -> bool:
    """Return whether the tracking database is a file, which only the driver writes."""
    return tracking_uri(config.tracking).startswith("sqlite:")


def _check_tracking_file(config: RunConfig) -> list[Finding]:
    """Check that the driver can open the tracking database, if it is a file. The run creates one that is missing."""
    path = Path(tracking_uri(config.tracking).removeprefix("sqlite:///"))
    if not _tracks_in_file(config) or not path.exists():
        return []
    try:
        tracking.require_answer(config.tracking)
    except BadConfig as error:
        return [Finding("MLflow", "driver", False, str(error), findings.remedy_of("MLflow", ""))]
    return [Finding("MLflow", "driver", True, f"{path} opens")]


def _check_tokens(reports: findings.Reports) -> list[Finding]:
    """Check the tokens of the nodes and of the driver. A cluster that this process has started for itself needs no
    token; if it has one, no other user may read it."""
    own_cluster = ray_runtime.on_head_node()
    checked = {name: report for name, report in reports.items() if report["token"][0] or not own_cluster}
    driver = findings.token({"driver": {"token": node_probe.token()}})
    return [*findings.token(checked), *[finding for finding in driver if not finding.ok and checked]]


def _driver_failure(name: str, error: Exception) -> Finding:
    denied = getattr(error, "errno", 0) in node_probe.PERMISSION_ERRNOS
    remedy = findings.remedy_of(name, "PermissionError" if denied else type(error).__name__)
    return Finding(name, "driver", False, str(error), remedy)
