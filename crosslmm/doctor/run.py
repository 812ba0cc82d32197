"""The whole preflight in its order; each part goes on only when the one before it is well."""

import logging
import time
from contextlib import ExitStack
from pathlib import Path

from crosslmm import ray_runtime, storage, tracking
from crosslmm.config import BadConfig, RunConfig, tracking_uri
from crosslmm.data.manifest import BadManifest, Manifest
from crosslmm.doctor import all_reduce, dry_run
from crosslmm.preflight import checks, findings, node_probe
from crosslmm.preflight.findings import Finding
from crosslmm.preflight.resolve import resolve_config
from crosslmm.storage import retry

log = logging.getLogger(__name__)

NODES = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""Environment of the processes that look, which have it for themselves. A server is asked twice [s]."""


def run_doctor(config: RunConfig) -> list[Finding]:
    """Look at everything that the run will need.

    Args:
        config: of the run.

    Returns:
        What was found, in order.
    """
    asks_once = retry.PATIENCE_S
    retry.PATIENCE_S = 0
    try:
        return _run(config)
    finally:
        retry.PATIENCE_S = asks_once


def _run(config: RunConfig) -> list[Finding]:
    began = time.monotonic()
    with ExitStack() as stack:
        here, config, manifests, probe = _here(config, stack)
        if entry := _enter():
            return [*here, entry]
        cluster = checks.alive()
        log.info(f"asking {findings.everywhere(cluster)}  ({time.monotonic() - began:.0f} s)")
        question = checks.question(config, manifests, probe, _tries(config, probe))
        reports, silent = checks.ask(cluster, question, NODES)
        results = [*here, *findings.answers(silent), *checks.of_nodes(reports), *_tokens(reports), *_record(config)]
        if not all(finding.ok for finding in results):
            return results
        log.info(f"summing, and training two steps  ({time.monotonic() - began:.0f} s)")
        results += all_reduce.all_reduce(cluster, config.scaling.use_gpu)
        if all(finding.ok for finding in results):
            results.append(dry_run.two_steps(config, manifests, probe))
        return results


def _enter() -> Finding | None:
    """Connect to the cluster; why it could not."""
    try:
        checks.connect()
    except checks.NoEntry as error:
        return error.finding
    except ConnectionError as error:
        return Finding(
            "cluster", "driver", False, str(error), "start it (`ray status` answers then), or mend RAY_ADDRESS"
        )
    return None


def _here(config: RunConfig, stack: ExitStack) -> tuple[list[Finding], RunConfig, list[Manifest], str]:
    """What the driver itself can do: storage first, for sample data is written there, then the manifests."""
    results: list[Finding] = []
    try:
        config = config.model_copy(update={"storage": storage.absolute(config.storage)})
        probe = stack.enter_context(checks.probing(config))
    except (OSError, storage.BadLocation) as error:
        return [_finding("storage", error)], config, [], ""
    manifests: list[Manifest] = []
    try:
        config = resolve_config(config)
        manifests = [Manifest(uri, config.data.roots) for uri in config.data.manifests]
    except BadManifest as error:
        results.append(Finding("manifest", "driver", False, str(error), findings.remedy_of("manifest", "")))
    except BadConfig as error:
        results.append(Finding("configuration", "driver", False, str(error), "see jobs/train.py --help"))
    except (OSError, storage.BadLocation) as error:
        results.append(_finding("storage", error))
    return results, config, manifests, probe


def _tries(config: RunConfig, probe: str) -> list[str]:
    """What nodes try for themselves."""
    resolved = config.data.manifest != "sample"
    tries = {
        "storage": bool(probe),
        "manifest": resolved,
        "decoder": True,
        "video": resolved,
        "MLflow": not _is_file(config),
        "GPU": config.scaling.use_gpu,
    }
    return [name for name, wanted in tries.items() if wanted]


def _is_file(config: RunConfig) -> bool:
    """Whether the record is one, which the driver alone writes."""
    return tracking_uri(config.tracking).startswith("sqlite:")


def _record(config: RunConfig) -> list[Finding]:
    """The driver's look at a record that is a file. Where there is none yet, the run makes it."""
    path = Path(tracking_uri(config.tracking).removeprefix("sqlite:///"))
    if not _is_file(config) or not path.exists():
        return []
    try:
        tracking.require_answer(config.tracking)
    except BadConfig as error:
        return [Finding("MLflow", "driver", False, str(error), findings.remedy_of("MLflow", ""))]
    return [Finding("MLflow", "driver", True, f"{path} opens")]


def _tokens(reports: findings.Reports) -> list[Finding]:
    """Of the driver and the nodes. Of a cluster that this process has started for itself only that it is private."""
    own = ray_runtime.on_head_node()
    asked = {name: report for name, report in reports.items() if report["token"][0] or not own}
    mine = findings.token({"driver": {"token": node_probe.token()}})
    return [*findings.token(asked), *[finding for finding in mine if not finding.ok and asked]]


def _finding(name: str, error: Exception) -> Finding:
    kind = "PermissionError" if getattr(error, "errno", 0) in (1, 13, 30) else type(error).__name__
    return Finding(name, "driver", False, str(error), findings.remedy_of(name, kind))
