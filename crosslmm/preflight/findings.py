"""Turn the nodes' reports into findings, each failure with its remedy. Pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crosslmm.text import in_brief

Report = Mapping[str, Any]
"""Report of one node: the result of `node_probe.probe_node`, `sent_at` and `received_at`."""
Reports = Mapping[str, Report]
"""Reports by node."""

MAX_CLOCK_OFFSET_S = 5.0
"""Largest accepted difference between a node's clock and the driver's [s]."""
MIN_FREE_BYTES = 64 * 2**20
"""Free space below which a disk counts as full; the doctor's two training steps show how much a run needs [bytes]."""
MAX_SPILL_DISK_USAGE = 0.95
"""Share of a disk above which Ray no longer spills to it (Ray's `local_fs_capacity_threshold`)."""

TOKEN = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file with the cluster's token) before the command"
SAME_VERSIONS = "install the driver's versions on it (pip install -c constraints.txt .), and restart Ray there"
STORE_UNREACHABLE = "make the store reachable from there: endpoint (AWS_ENDPOINT_URL), DNS, security group"
NO_READ_PERMISSION = "grant read access there: AWS_* in its environment, or its role"
REMEDIES = {
    ("storage", "PermissionError"): "grant write access there: AWS_* in its environment, its role, or the folder's "
    "owner",
    ("storage", "Unavailable"): STORE_UNREACHABLE,
    ("storage", "NotShared"): "--storage takes a folder that all nodes share, or s3://",
    ("storage", ""): "use another --storage, or repair this one",
    ("manifest", "PermissionError"): NO_READ_PERMISSION,
    ("manifest", "Unavailable"): STORE_UNREACHABLE,
    ("manifest", ""): "upload it, or correct --data.manifest",
    ("video", "PermissionError"): NO_READ_PERMISSION,
    ("video", "Unavailable"): STORE_UNREACHABLE,
    ("video", ""): "upload the videos that the manifest names",
    ("decoder", ""): "pip install -c constraints.txt . on it, or another --data.decoder",
    ("MLflow", ""): "start the server, correct --tracking.uri, or open the network to it (without it the record stays "
    "in the run's folder)",
    ("MLflow", "refuses"): "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in its environment",
    ("packages", ""): "pip install it there (extras fp8 and flash of pyproject.toml), or do without the setting",
    ("GPU", ""): "check nvidia-smi there; start Ray with as many GPUs as work, and install a CUDA build of torch",
}  # fmt: skip
"""Remedies by check and class of the error; the class "" stands for all other errors."""


@dataclass(frozen=True)
class Finding:
    """Result of one check on one node: a row of the doctor's table."""

    name: str
    """What was checked."""
    node: str
    """Node, or nodes, that the result holds for."""
    ok: bool
    message: str
    """What the check saw."""
    remedy: str = ""
    """What to do about a failure."""

    @property
    def line(self) -> str:
        """The failure and its remedy in one line."""
        return f"{self.name} ({self.node}): {self.message}; {self.remedy}"


def from_reports(
    reports: Reports, driver_versions: Mapping[str, str], require_spill_space: bool = True
) -> list[Finding]:
    """Return all findings about nodes that follow from their reports, except those about tokens.

    Args:
        reports: the nodes' reports.
        driver_versions: `node_probe.versions()` of the driver.
        require_spill_space: as for `disks`.
    """
    if not reports:
        return []
    return [
        *versions(reports, driver_versions),
        *clock(reports),
        *disks(reports, require_spill_space),
        *node_checks(reports),
    ]


def nodes_label(nodes: Mapping[str, Any]) -> str:
    """Return how a row names all of these nodes: the name of a single one, else their number."""
    return next(iter(nodes)) if len(nodes) == 1 else f"all {len(nodes)} nodes"


def unreachable(errors: Mapping[str, str]) -> list[Finding]:
    """Return a failure for each node that sent no report.

    Args:
        errors: reason by node.
    """
    remedy = "check `ray status` and the logs of Ray's session there; restart Ray on it, or remove the node"
    return [Finding("report", node, False, error, remedy) for node, error in errors.items()]


def versions(reports: Reports, driver: Mapping[str, str]) -> list[Finding]:
    """Compare each node's versions with the driver's. CPU and CUDA builds of the same torch count as equal."""

    def without_build(version: str) -> str:
        return version.partition("+")[0]

    failures = []
    for node, report in reports.items():
        differences = [
            f"{name} {report['versions'][name]}, driver has {version}"
            for name, version in driver.items()
            if without_build(report["versions"][name]) != without_build(version)
        ]
        if differences:
            failures.append(Finding("versions", node, False, "; ".join(differences), SAME_VERSIONS))
    message = ", ".join(f"{name} {version}" for name, version in driver.items())
    return failures or [Finding("versions", nodes_label(reports), True, message)]


def clock(reports: Reports) -> list[Finding]:
    """Check that each node's clock (`time`) lies between the driver's request and the receipt of the report."""
    failures = []
    for node, report in reports.items():
        ahead_s, behind_s = report["time"] - report["received_at"], report["sent_at"] - report["time"]
        if max(ahead_s, behind_s) > MAX_CLOCK_OFFSET_S:
            message = f"{max(ahead_s, behind_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the driver's"
            remedy = "synchronise it with chrony or systemd-timesyncd"
            failures.append(Finding("clock", node, False, message, remedy))
    slowest_s = max((report["received_at"] - report["sent_at"] for report in reports.values()), default=0.0)
    message = f"within {MAX_CLOCK_OFFSET_S + slowest_s:.0f} s of the driver's"
    return failures or [Finding("clock", nodes_label(reports), True, message)]


def disks(reports: Reports, require_spill_space: bool = True) -> list[Finding]:
    """Check the free space for temporary files (checkpoints in transit among them), Ray's spilled objects, and local
    storage.

    Args:
        reports: the nodes' reports.
        require_spill_space: fail a node whose disk is too full for Ray to spill to it.
    """
    failures, free_spaces = [], []
    for node, report in reports.items():
        for use, (path, free, total) in report["disks"].items():
            message = f"{use}, {path}: {format_bytes(free)} of {format_bytes(total)} free"
            free_spaces.append((free, message))
            if free < MIN_FREE_BYTES:
                remedy = "free some space" + ("" if use == "local storage" else ", or point TMPDIR to a larger disk")
                failures.append(Finding("disk", node, False, message, remedy))
            elif use == "Ray's files" and require_spill_space and free < (1 - MAX_SPILL_DISK_USAGE) * total:
                remedy = (
                    "free some space: Ray fails instead of spilling to a disk this full; or `ray start --temp-dir` "
                    "elsewhere"
                )
                failures.append(Finding("disk", node, False, message, remedy))
    return failures or [Finding("disk", nodes_label(reports), True, f"least free space: {min(free_spaces)[1]}")]


def token(reports: Reports) -> list[Finding]:
    """Check that Ray requires a token, and that no other user of the machine can read the token file."""
    failures = []
    for node, report in reports.items():
        required, path, mode = report["token"]
        if not required:
            message = "Ray requires no token: whoever reaches its ports can run code here"
            remedy = (
                "`ray get-auth-token --generate`, the same file on every node, and RAY_AUTH_MODE=token for `ray start`"
            )
            failures.append(Finding("token", node, False, message, remedy))
        elif path and mode & 0o077:
            message = f"other users of the machine may read {path} (mode {mode:o})"
            failures.append(Finding("token", node, False, message, f"chmod 600 {path}"))
    return failures or [Finding("token", nodes_label(reports), True, "required, and private")] * bool(reports)


def node_checks(reports: Reports) -> list[Finding]:
    """Return the results of the nodes' own checks: storage, manifest, video, decoder, MLflow, GPU,
    packages."""
    by_check: dict[str, list[Finding]] = {}
    for node, report in reports.items():
        for name, error, message in report["checks"]:
            remedy = remedy_of(name, error) if error else ""
            by_check.setdefault(name, []).append(Finding(name, node, not error, in_brief(message), remedy))
    findings = []
    for name, results in by_check.items():
        failures = [finding for finding in results if not finding.ok]
        nodes = dict.fromkeys(finding.node for finding in results)
        findings += failures or [Finding(name, nodes_label(nodes), True, results[0].message)]
    return findings


def remedy_of(name: str, error: str) -> str:
    """Return the remedy for a failed check.

    Args:
        name: of the check.
        error: class of the error.
    """
    return REMEDIES.get((name, error)) or REMEDIES[name, ""]


def merge_nodes(findings: list[Finding]) -> list[Finding]:
    """Merge equal findings about several nodes into one row each."""
    nodes: dict[tuple[str, bool, str, str], list[str]] = {}
    for finding in findings:
        nodes.setdefault((finding.name, finding.ok, finding.message, finding.remedy), []).append(finding.node)
    return [
        Finding(name, ", ".join(dict.fromkeys(names)), ok, message, remedy)
        for (name, ok, message, remedy), names in nodes.items()
    ]


def format_bytes(count: float) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
