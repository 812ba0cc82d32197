"""Findings from the nodes' reports."""

import pytest

from crosslmm.preflight import findings, node_probe
from crosslmm.preflight.findings import Finding

VERSIONS = {"Ray": "2.60.0", "Python": "3.11.7", "torch": "2.13.0+cu130", "crosslmm": "0.1.0 (94c6268e)"}
GB = 10**9


def report(**changed):
    healthy = {
        "sent_at": 100.0, "time": 101.0, "received_at": 103.0, "versions": VERSIONS,
        "token": (True, "/root/token", 0o600),
        "disks": {"temporary files": ("/tmp", 50 * GB, 100 * GB), "Ray's files": ("/ray", 40 * GB, 100 * GB)},
        "checks": [("storage", "", "written to s3://b/runs")],
    }  # fmt: skip
    return healthy | changed


def test_healthy_nodes_share_one_row_per_check():
    reports = {"a": report(), "b": report(versions=VERSIONS | {"torch": "2.13.0+cpu"})}
    rows = [*findings.from_reports(reports, VERSIONS), *findings.token(reports)]
    assert [row.name for row in rows] == ["versions", "clock", "disk", "storage", "token"]
    for row in rows:
        assert row.ok
        assert row.node == "all 2 nodes"
        assert not row.remedy
    assert rows[2].message == "least free space: Ray's files, /ray: 40.0 GB of 100.0 GB free"
    (single,) = findings.clock({"a": report()})
    assert single.node == "a"


def test_no_reports_give_no_findings():
    assert findings.from_reports({}, VERSIONS) == []


def test_a_different_version_is_named_with_the_drivers():
    other = report(versions=VERSIONS | {"Ray": "2.59.0", "crosslmm": "not installed"})
    (row,) = findings.versions({"a": report(), "b": other}, VERSIONS)
    assert (row.ok, row.node) == (False, "b")
    assert row.message == "Ray 2.59.0, driver has 2.60.0; crosslmm not installed, driver has 0.1.0 (94c6268e)"


@pytest.mark.parametrize(
    ("time", "message"), [(98.0, None), (94.0, "6 s behind"), (107.0, None), (3703.0, "3600 s ahead")]
)
def test_a_clock_may_be_anywhere_between_request_and_report(time, message):
    (row,) = findings.clock({"a": report(time=time)})
    assert row.ok is (message is None)
    assert message is None or row.message.startswith(message)


def test_a_full_disk_fails_where_files_are_written():
    full = {"temporary files": ("/tmp", 8 * 10**6, 100 * GB), "local storage": ("/runs", 0, GB)}
    tmp, runs = findings.disks({"a": report(disks=full)})
    assert (tmp.message, tmp.remedy) == (
        "temporary files, /tmp: 8 MB of 100.0 GB free", "free some space, or point TMPDIR to a larger disk",
    )  # fmt: skip
    assert (runs.node, runs.remedy) == ("a", "free some space")
    spilling = {"a": report(disks={"Ray's files": ("/ray", 4 * GB, 100 * GB)})}
    assert not findings.disks(spilling)[0].ok
    assert findings.disks(spilling, require_spill_space=False)[0].ok


def test_a_readable_token_and_a_missing_one_fail():
    readable = report(token=(True, "/token", 0o644))
    not_required = report(token=(False, "", 0))
    one, two = findings.token({"a": readable, "b": report(), "c": not_required})
    assert one == Finding(
        "token", "a", False, "other users of the machine may read /token (mode 644)", "chmod 600 /token"
    )
    assert two.node == "c"
    assert "ray get-auth-token --generate" in two.remedy


def test_every_failure_has_a_remedy():
    for name in node_probe.CHECKS:
        assert findings.remedy_of(name, "SomethingElse")
    assert "AWS_*" in findings.remedy_of("storage", "PermissionError")
    assert "all nodes share" in findings.remedy_of("storage", "NotShared")
    assert "MLFLOW_TRACKING_PASSWORD" in findings.remedy_of("MLflow", "refuses")


def test_equal_findings_of_several_nodes_share_a_row():
    rows = [
        Finding("MLflow", "a", False, "down", "start it"),
        Finding("clock", "c", True, "x"),
        Finding("MLflow", "b", False, "down", "start it"),
    ]
    assert [row.node for row in findings.merge_nodes(rows)] == ["a, b", "c"]
    assert rows[0].line == "MLflow (a): down; start it"
