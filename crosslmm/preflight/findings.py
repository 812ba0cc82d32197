"""What nodes report of themselves -> findings, each failure with its remedy. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Report = Mapping[str, Any]
"""What `nodes.look` returns on one node."""
Reports = Mapping[str, Report]
"""Of each node, by its name."""

CLOCK_S = 5.0
"""So far may a node's clock be from the driver's [s]."""
LEAST_FREE = 64 * 2**20
"""With less there is no room for anything; how much a run needs is shown by its two steps [bytes]."""
RAY_WRITES_BELOW = 0.95
"""Ray spills nothing to a disk that is fuller than this share (its `local_fs_capacity_threshold`)."""

TOKEN = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (a file with the cluster's token) before the command"
SAME = "install the driver's versions on it (pip install -c constraints.txt .), and start Ray there again"
WAY = "open the way from there to it: endpoint (AWS_ENDPOINT_URL), name service, security group"
REMEDIES = {
    ("storage", "PermissionError"): "let it write there: AWS_* in its environment, its role, or the folder's owner",
    ("storage", "Unavailable"): WAY,
    ("storage", "NotShared"): "--storage takes a folder that all nodes share, or s3://",
    ("storage", ""): "give another --storage, or mend this one",
    ("manifest", "PermissionError"): "let it read there: AWS_* in its environment, or its role",
    ("manifest", "Unavailable"): WAY,
    ("manifest", ""): "upload it, or mend --data.manifest",
    ("video", "PermissionError"): "let it read there: AWS_* in its environment, or its role",
    ("video", "Unavailable"): WAY,
    ("video", ""): "upload the videos that the manifest names",
    ("decoder", ""): "pip install -c constraints.txt . on it, or another --data.decoder",
    ("MLflow", ""): "start the server, mend --tracking.uri, or open the way to it (without it the record waits in "
    "the run's folder)",
    ("MLflow", "refuses"): "put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD into its environment",
    ("GPU", ""): "look at nvidia-smi there; start Ray with as many GPUs as work, and a torch that is built for CUDA",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    name: str
    """What was looked at."""
    node: str
    ok: bool
    said: str
    remedy: str = ""
    """What to do, where it is not ok."""

    @property
    def line(self) -> str:
        """A failure in one line."""
        return f"{self.name} ({self.node}): {self.said}; {self.remedy}"


def everywhere(reports: Mapping[str, Any]) -> str:
    """How a row names all nodes."""
    return next(iter(reports)) if len(reports) == 1 else f"all {len(reports)} nodes"


def answers(silent: Mapping[str, str]) -> list[Finding]:
    """Nodes that could not be asked, and why."""
    remedy = "look at `ray status` and at /tmp/ray/session_latest/logs there; start Ray on it again, or take it away"
    return [Finding("answer", node, False, why, remedy) for node, why in silent.items()]


def versions(reports: Reports, driver: Mapping[str, str]) -> list[Finding]:
    """Whether every node has the driver's. Torch's builds for CPU and CUDA count as one."""

    def plain(version: str) -> str:
        return version.partition("+")[0]

    wrong = {
        node: [
            f"{name} {report['versions'][name]}, and the driver has {version}"
            for name, version in driver.items()
            if plain(report["versions"][name]) != plain(version)
        ]
        for node, report in reports.items()
    }
    failures = [Finding("versions", node, False, "; ".join(said), SAME) for node, said in wrong.items() if said]
    said = ", ".join(f"{name} {version}" for name, version in driver.items())
    return failures or [Finding("versions", everywhere(reports), True, said)]


def clock(reports: Reports) -> list[Finding]:
    """Whether a node told the time between the driver's question and its answer (`asked`, `answered`, `time`)."""
    failures = []
    for node, report in reports.items():
        ahead, behind = report["time"] - report["answered"], report["asked"] - report["time"]
        if max(ahead, behind) > CLOCK_S:
            said = f"{max(ahead, behind):.0f} s {'ahead of' if ahead > 0 else 'behind'} the driver's"
            failures.append(Finding("clock", node, False, said, "let chrony or systemd-timesyncd set it"))
    bound = CLOCK_S + max((report["answered"] - report["asked"] for report in reports.values()), default=0.0)
    return failures or [Finding("clock", everywhere(reports), True, f"within {bound:.0f} s of the driver's")]


def disks(reports: Reports, spilling: bool = True) -> list[Finding]:
    """Whether there is room for temporary files (checkpoints on their way among them), what Ray spills, and local
    storage.

    Args:
        reports: of the nodes.
        spilling: whether a folder that Ray would no longer spill to counts.
    """
    failures, least = [], []
    for node, report in reports.items():
        for use, (path, free, total) in report["disks"].items():
            said = f"{use}, {path}: {size(free)} of {size(total)} left"
            least.append((free, f"{said} at least"))
            if free < LEAST_FREE:
                remedy = "free some" if use == "local storage" else "free some, or point TMPDIR to a larger disk"
                failures.append(Finding("disk", node, False, said, remedy))
            elif use == "Ray's files" and spilling and free < (1 - RAY_WRITES_BELOW) * total:
                remedy = "free some: Ray spills nothing there, and fails instead; or `ray start --temp-dir` elsewhere"
                failures.append(Finding("disk", node, False, said, remedy))
    return failures or [Finding("disk", everywhere(reports), True, min(least)[1])]


def token(reports: Reports) -> list[Finding]:
    """Whether the cluster asks for a token, and nobody else on its machines can read it."""
    failures = []
    for node, report in reports.items():
        asks, path, mode = report["token"]
        if not asks:
            said = "Ray asks nobody for a token: who can reach its ports runs code here"
            remedy = (
                "`ray get-auth-token --generate`, the same file on every node, and RAY_AUTH_MODE=token for `ray start`"
            )
            failures.append(Finding("token", node, False, said, remedy))
        elif path and mode & 0o077:
            said = f"other users of the machine may read {path} (mode {mode:o})"
            failures.append(Finding("token", node, False, said, f"chmod 600 {path}"))
    return failures or [Finding("token", everywhere(reports), True, "asked for, and private")] * bool(reports)


def reached(reports: Reports) -> list[Finding]:
    """What every node tried for itself: storage, manifest, video, decoder, MLflow, GPU."""
    tried: dict[str, list[Finding]] = {}
    for node, report in reports.items():
        for name, kind, said in report["reached"]:
            tried.setdefault(name, []).append(
                Finding(name, node, not kind, said, remedy_of(name, kind) if kind else "")
            )
    findings = []
    for name, found in tried.items():
        failures = [finding for finding in found if not finding.ok]
        who = dict.fromkeys(finding.node for finding in found)
        findings += failures or [Finding(name, everywhere(who), True, found[0].said)]
    return findings


def remedy_of(name: str, kind: str) -> str:
    """What to do about it, by the class of the error."""
    return REMEDIES.get((name, kind)) or REMEDIES[name, ""]


def merged(findings: list[Finding]) -> list[Finding]:
    """Rows that say the same of several nodes become one."""
    together: dict[tuple[str, bool, str, str], list[str]] = {}
    for finding in findings:
        together.setdefault((finding.name, finding.ok, finding.said, finding.remedy), []).append(finding.node)
    return [
        Finding(name, ", ".join(dict.fromkeys(nodes)), ok, said, remedy)
        for (name, ok, said, remedy), nodes in together.items()
    ]


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"
