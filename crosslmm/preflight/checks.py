"""The checks that every run makes before it starts workers: the part of the doctor that costs next to nothing."""

from collections.abc import Sequence

from crosslmm import storage
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.manifest import Manifest
from crosslmm.preflight import cluster_probe, findings, node_probe
from crosslmm.preflight.findings import Finding

CHECKS = ("storage", "manifest", "decoder", "packages")
"""Names in `node_probe.CHECKS` of what every run checks on the other nodes."""


def require_ready(config: RunConfig, manifests: Sequence[Manifest]) -> None:
    """Check this machine (storage, disk, token) and, if the cluster has further nodes, their versions, clock, disk,
    storage, manifest, decoder and packages. Nodes that do not answer are ignored: they may be shutting down.

    Raises:
        BadConfig: the first failure, with its remedy.
        storage.Unavailable: the store is out of reach.
    """
    token = node_probe.token()
    driver = {"driver": {"disks": node_probe.disks(config.storage), "token": token}}
    results = findings.disks(driver, require_spill_space=False)
    if token[0]:
        results += findings.token(driver)
    try:
        with cluster_probe.probe_folder(config) as folder:
            results += _other_nodes(config, manifests, folder)
    except storage.Unavailable:
        raise
    except OSError as error:
        denied = error.errno in node_probe.PERMISSION_ERRNOS or isinstance(error, PermissionError)
        remedy = findings.remedy_of("storage", "PermissionError" if denied else "")
        results.append(Finding("storage", "driver", False, str(error), remedy))
    if failures := [finding for finding in results if not finding.ok]:
        more = f"; and {len(failures) - 1} more, which jobs/doctor.py shows" if len(failures) > 1 else ""
        raise BadConfig(f"{failures[0].line}{more}")


def _other_nodes(config: RunConfig, manifests: Sequence[Manifest], folder: str) -> list[Finding]:
    nodes = cluster_probe.other_nodes()
    if not nodes:
        return []
    request = cluster_probe.probe_request(config, manifests, folder, CHECKS)
    reports, _ = cluster_probe.probe_nodes(nodes, request | {"retry_storage": True}, {})
    return findings.from_reports(reports, node_probe.versions(), require_spill_space=False)
