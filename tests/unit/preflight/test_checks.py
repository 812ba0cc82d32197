"""What the doctor makes of nodes' reports; what a node finds out without Ray; and the part that every run does."""

import json
import os
import subprocess
import sys

import pytest
import ray

from crosslmm.config import BadConfig
from crosslmm.preflight import checks, findings, node_probe
from crosslmm.preflight.findings import Finding
from crosslmm.storage import retry
from tests.support.common import ROOT

VERSIONS = {"Ray": "2.60.0", "Python": "3.11.7", "torch": "2.13.0+cu130", "crosslmm": "0.1.0 (94c6268e)"}
GB = 10**9


def report(**changed):
    well = {
        "asked": 100.0, "time": 101.0, "answered": 103.0, "versions": VERSIONS, "token": (True, "/root/token", 0o600),
        "disks": {"temporary files": ("/tmp", 50 * GB, 100 * GB), "Ray's files": ("/ray", 40 * GB, 100 * GB)},
        "reached": [("storage", "", "written to s3://b/runs")],
    }  # fmt: skip
    return well | changed


def test_what_is_well_is_one_row_for_all_nodes():
    reports = {"a": report(), "b": report(versions=VERSIONS | {"torch": "2.13.0+cpu"})}
    found = [
        findings.versions(reports, VERSIONS),
        findings.clock(reports),
        findings.disks(reports),
        findings.token(reports),
    ]
    found.append(findings.reached(reports))
    for (row,) in found:
        assert row.ok
        assert row.node == "all 2 nodes"
        assert not row.remedy
    assert found[2][0].said == "Ray's files, /ray: 40.0 GB of 100.0 GB left at least"
    (alone,) = findings.clock({"a": report()})
    assert alone.node == "a"


def test_another_version_is_named_with_the_driver_s():
    other = report(versions=VERSIONS | {"Ray": "2.59.0", "crosslmm": "is missing"})
    (row,) = findings.versions({"a": report(), "b": other}, VERSIONS)
    assert (row.ok, row.node) == (False, "b")
    assert row.said == (
        "Ray 2.59.0, and the driver has 2.60.0; crosslmm is missing, and the driver has 0.1.0 (94c6268e)"
    )


@pytest.mark.parametrize(
    ("told", "said"), [(98.0, None), (94.0, "6 s behind"), (107.0, None), (3703.0, "3600 s ahead")]
)
def test_a_clock_may_be_anywhere_between_question_and_answer(told, said):
    (row,) = findings.clock({"a": report(time=told)})
    assert row.ok is (said is None)
    assert said is None or row.said.startswith(said)


def test_a_disk_is_full_where_files_are_written():
    full = {"temporary files": ("/tmp", 8 * 10**6, 100 * GB), "local storage": ("/runs", 0, GB)}
    tmp, runs = findings.disks({"a": report(disks=full)})
    assert (tmp.said, tmp.remedy) == (
        "temporary files, /tmp: 8 MB of 100.0 GB left", "free some, or point TMPDIR to a larger disk",
    )  # fmt: skip
    assert (runs.node, runs.remedy) == ("a", "free some")
    spilling = {"a": report(disks={"Ray's files": ("/ray", 4 * GB, 100 * GB)})}
    assert not findings.disks(spilling)[0].ok
    assert findings.disks(spilling, spilling=False)[0].ok


def test_tokens():
    readable = report(token=(True, "/token", 0o644))
    unasked = report(token=(False, "", 0))
    one, two = findings.token({"a": readable, "b": report(), "c": unasked})
    assert one == Finding(
        "token", "a", False, "other users of the machine may read /token (mode 644)", "chmod 600 /token"
    )
    assert two.node == "c"
    assert "ray get-auth-token --generate" in two.remedy


def test_every_kind_of_failure_has_a_remedy():
    for name in node_probe.TRIES:
        assert findings.remedy_of(name, "SomethingElse")
    assert "AWS_*" in findings.remedy_of("storage", "PermissionError")
    assert "all nodes share" in findings.remedy_of("storage", "NotShared")
    assert "MLFLOW_TRACKING_PASSWORD" in findings.remedy_of("MLflow", "refuses")


def test_nodes_that_say_the_same_share_a_row():
    rows = [
        Finding("MLflow", "a", False, "down", "up"),
        Finding("clock", "c", True, "x"),
        Finding("MLflow", "b", False, "down", "up"),
    ]
    assert [row.node for row in findings.merged(rows)] == ["a, b", "c"]
    assert rows[0].line == "MLflow (a): down; up"


def test_a_node_without_the_package_can_say_so(tmp_path):
    """The probe travels as code: it runs in a process that cannot import crosslmm."""
    (tmp_path / "probe").write_bytes(ray.cloudpickle.dumps((node_probe._files, node_probe.reach)))
    code = f"""\
import json, pickle, sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
files, reach = pickle.load(open("probe", "rb"))
print(json.dumps([files(), reach({{"tries": ["storage", "decoder", "video"], "videos": ["a.mp4"]}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    files, reached = json.loads(done.stdout)
    assert files == "is missing"
    assert reached[0][:2] == ["storage", "ModuleNotFoundError"]
    assert reached[1][:2] == ["decoder", "ModuleNotFoundError"]


@pytest.mark.parametrize(
    ("uri", "told"),
    [("http://mlflow:5000", "http://mlflow:5000"), ("http://me:secret@mlflow:5000", None)],
)
def test_nodes_are_told_where_the_driver_s_record_is_and_nobody_s_password(uri, told, config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert checks.question(config, [], "", ["MLflow"])["config"]["tracking"]["uri"] == told


def test_drivers_may_be_on_nodes_with_all_their_labels():
    def drives(drive_on, **labels):
        asked = {"config": {"scaling": {"use_gpu": False, "drive_on": drive_on}}}
        return checks._own("a", {"Resources": {"CPU": 1}, "Labels": labels}, asked)["drives"]

    assert drives({}, role="train")
    assert drives({"role": "head"}, role="head", zone="a")
    assert not drives({"role": "head"}, role="train")
    assert not drives({"role": "head", "zone": "b"}, role="head", zone="a")


def test_a_node_that_does_not_know_the_record_makes_none_of_its_own(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = {"tries": ["MLflow"], "config": config.model_dump(mode="json"), "drives": True, "probe": ""}
    ((name, kind, said),) = node_probe.reach(asked)
    assert (name, kind) == ("MLflow", "RuntimeError")
    assert "MLFLOW_TRACKING_URI is not set here" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("drives", [True, False])
def test_only_where_drivers_may_be_is_the_record_asked_for(drives, config):
    nobody = config.model_dump(mode="json") | {"tracking": {"uri": "http://127.0.0.1:9"}}
    found = node_probe.reach({"tries": ["MLflow"], "config": nobody, "drives": drives, "probe": ""})
    assert [row and row[:2] for row in found] == ([("MLflow", "BadConfig")] if drives else [None])


def test_what_a_node_tries_by_itself(tmp_path, monkeypatch, config):
    monkeypatch.setattr(retry, "PATIENCE_S", retry.PATIENCE_S)  # put back what `reach` sets
    probe = tmp_path / "runs" / ".doctor-1"
    (tmp_path / "rows.jsonl").write_text("{}")
    asked = {
        "node": "a", "probe": str(probe), "tries": ["storage", "manifest", "decoder", "video"], "gpus": 0,
        "config": config.model_dump(mode="json"), "manifests": [f"{tmp_path}/rows.jsonl"],
        "videos": [f"{tmp_path}/nothing.mp4"], "image_size": 48,
    }  # fmt: skip
    storage, manifest, decoder, video = node_probe.reach(asked)
    assert storage[:2] == ("storage", "NotShared")
    assert manifest == ("manifest", "", f"{tmp_path}/rows.jsonl")
    assert decoder == ("decoder", "", "auto loads")
    assert video == ("video", "ValueError", f"ValueError: {tmp_path}/nothing.mp4: no such file")
    (probe / "driver").write_bytes(b"")
    assert node_probe.reach(asked)[0] == ("storage", "", f"written to {tmp_path}/runs")


def test_a_full_folder_for_temporary_files_is_looked_at_although_python_avoids_it(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm/nothing/here")
    path, free, total = node_probe.disks()["temporary files"]
    assert path == "/dev/shm/nothing/here"
    there = os.statvfs("/dev/shm")
    assert total == there.f_frsize * there.f_blocks
    assert 0 < free <= total


def test_a_run_is_refused_in_the_doctor_s_words(tmp_path, monkeypatch, config):
    """On one node all of it happens in this process, and leaves nothing."""
    monkeypatch.setattr(checks, "_others", dict)
    config = config.model_copy(update={"storage": str(tmp_path / "runs")})
    token = tmp_path / "token"
    token.write_text("0" * 64)
    monkeypatch.setattr(node_probe, "token", lambda: (True, str(token), 0o600))
    checks.require_ready(config, [])
    assert list((tmp_path / "runs").iterdir()) == []

    monkeypatch.setattr(node_probe, "token", lambda: (True, str(token), 0o644))
    with pytest.raises(BadConfig, match=r"token \(driver\): other users of the machine may read .*; chmod 600 /"):
        checks.require_ready(config, [])
    (tmp_path / "file").touch()
    below = config.model_copy(update={"storage": str(tmp_path / "file" / "runs")})
    with pytest.raises(BadConfig, match=r"chmod 600 .*; and 1 more, which jobs/doctor\.py shows"):
        checks.require_ready(below, [])
