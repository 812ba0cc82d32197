"""The probe of a node, without Ray; and what the driver sends to it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import ray

from crosslmm.preflight import cluster_probe, node_probe
from tests.support.common import ROOT


def test_a_node_without_the_package_reports_it(tmp_path):
    """The probe travels as code: it runs in a process that cannot import crosslmm."""
    ray.cloudpickle.register_pickle_by_value(node_probe)
    (tmp_path / "probe").write_bytes(ray.cloudpickle.dumps((node_probe.versions, node_probe.run_checks)))
    code = f"""\
import json, pickle, sys
sys.path[:] = [path for path in sys.path if path != {str(ROOT)!r}]
versions, run_checks = pickle.load(open("probe", "rb"))
request = {{"checks": ["storage", "decoder", "video"], "videos": ["a.mp4"], "writes_storage": True}}
print(json.dumps([versions()["crosslmm"], run_checks(request)]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    version, results = json.loads(done.stdout)
    assert version == "not installed"
    assert results[0][:2] == ["storage", "ModuleNotFoundError"]
    assert results[1][:2] == ["decoder", "ModuleNotFoundError"]


@pytest.mark.parametrize(
    ("uri", "sent"),
    [("http://mlflow:5000", "http://mlflow:5000"), ("http://me:secret@mlflow:5000", None)],
)
def test_nodes_get_the_drivers_tracking_uri_without_a_password(uri, sent, config, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert cluster_probe.probe_request(config, [], "", ["MLflow"])["config"]["tracking"]["uri"] == sent


def test_drivers_may_run_on_nodes_with_all_required_labels():
    def runs_drivers(drive_on, **labels):
        request = {"config": {"scaling": {"use_gpu": False, "drive_on": drive_on, "train_on": {}}}}
        return cluster_probe.node_fields("a", {"Resources": {"CPU": 1}, "Labels": labels}, request)["runs_drivers"]

    assert runs_drivers({}, role="train")
    assert runs_drivers({"role": "head"}, role="head", zone="a")
    assert not runs_drivers({"role": "head"}, role="train")
    assert not runs_drivers({"role": "head", "zone": "b"}, role="head", zone="a")


def test_nodes_that_only_decode_write_nothing(tmp_path, config):
    """The files of cluster/ give decoders no right to write."""

    def writes(scaling, **labels):
        request = {"config": {"scaling": {"use_gpu": False, "drive_on": {}, "train_on": {}} | scaling}}
        return cluster_probe.node_fields("a", {"Resources": {"CPU": 1}, "Labels": labels}, request)["writes_storage"]

    placed = {"drive_on": {"role": "head"}, "train_on": {"role": "train"}}
    assert [writes(placed, role=role) for role in ("head", "train", "decode")] == [True, True, False]
    assert writes({}, role="decode")  # nothing is placed: it may run anything
    assert writes({"drive_on": {"role": "head"}}, role="decode")

    request = {"node": "a", "folder": str(tmp_path / "runs/.doctor-1"), "checks": ["storage"], "writes_storage": False}
    assert node_probe.run_checks(request | {"config": config.model_dump(mode="json")}) == [None]
    assert not list(tmp_path.iterdir())


def test_a_node_without_tracking_uri_creates_no_database(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    request = {"checks": ["MLflow"], "config": config.model_dump(mode="json"), "runs_drivers": True}
    ((name, error, message),) = node_probe.run_checks(request)
    assert (name, error) == ("MLflow", "RuntimeError")
    assert "MLFLOW_TRACKING_URI is not set here" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("runs_drivers", [True, False])
def test_only_nodes_that_run_drivers_check_mlflow(runs_drivers, config):
    unreachable = config.model_dump(mode="json") | {"tracking": {"uri": "http://127.0.0.1:9"}}
    request = {"checks": ["MLflow"], "config": unreachable, "runs_drivers": runs_drivers}
    results = node_probe.run_checks(request)
    assert [row and row[:2] for row in results] == ([("MLflow", "BadConfig")] if runs_drivers else [None])


@pytest.mark.parametrize(
    ("use_gpu", "label", "gpus", "trains"),
    [(True, "train", 8, True), (True, "train", 0, False), (True, "head", 8, False), (False, "train", 0, True)],
)
def test_only_nodes_that_train_need_the_packages_of_settings(use_gpu, label, gpus, trains, config, monkeypatch):
    """A head without a GPU has neither torchao nor flash-attn."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    values = config.model_dump(mode="json")
    values["scaling"] |= {"use_gpu": use_gpu, "train_on": {"role": "train"}}

    def results(float8):
        values["train"]["float8"] = float8
        node = {"Resources": {"CPU": 1, "GPU": gpus}, "Labels": {"role": label}}
        fields = cluster_probe.node_fields("a", node, {"config": values})
        return node_probe.run_checks({"checks": ["packages"], "config": values} | fields)

    missing = ("packages", "RuntimeError", "RuntimeError: torchao is not installed, and train.float8 needs it")
    assert results(float8=True) == [missing if trains else None]
    assert results(float8=False) == [None]


def test_the_probe_checks_storage_manifest_decoder_and_video(tmp_path, config):
    folder = tmp_path / "runs" / ".doctor-1"
    (tmp_path / "rows.jsonl").write_text("{}")
    request = {
        "node": "a", "folder": str(folder), "checks": ["storage", "manifest", "decoder", "video"], "gpus": 0,
        "writes_storage": True,
        "config": config.model_dump(mode="json"), "manifests": [f"{tmp_path}/rows.jsonl", f"{tmp_path}/r*.jsonl"],
        "videos": [f"{tmp_path}/nothing.mp4"], "image_size": 48,
    }  # fmt: skip
    storage, manifest, decoder, video = node_probe.run_checks(request)
    assert storage[:2] == ("storage", "NotShared")
    assert manifest == ("manifest", "", f"{tmp_path}/rows.jsonl, {tmp_path}/r*.jsonl")
    assert decoder == ("decoder", "", "auto loads")
    assert video == ("video", "ValueError", f"ValueError: {tmp_path}/nothing.mp4: no such file")
    (folder / "driver").write_bytes(b"")
    assert node_probe.run_checks(request)[0] == ("storage", "", f"written to {tmp_path}/runs")


def test_disks_include_a_tmpdir_that_python_avoids(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm/nothing/here")
    path, free, total = node_probe.disks()["temporary files"]
    assert path == "/dev/shm/nothing/here"
    expected = os.statvfs("/dev/shm")
    assert total == expected.f_frsize * expected.f_blocks
    assert 0 < free <= total
