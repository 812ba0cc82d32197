"""Retention of runs over sqlite and local folders."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import save

from crosslmm import run_folder, storage, tracking
from crosslmm.cli import parse_run
from crosslmm.model.adapters.base import Base, weights_digest
from crosslmm.tracking import retention
from crosslmm.tracking.retention import DAY_S
from tests.support.common import ROOT

# MLflow's warnings about a model without type hints and input example; it gets a signature.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(input example|type hint):UserWarning")


class Laboratory:
    """Runs of one storage folder and one experiment."""

    def __init__(self, root: Path, uri: str) -> None:
        self.runs, self.artifacts, self.uri, self.name = root / "runs", root / "artifacts", uri, root.name
        self.client = MlflowClient(self.uri)

    def config(self, name: str, *more: str):
        return parse_run(
            [f"--name={name}", f"--storage={self.runs}", f"--tracking.uri={self.uri}",
             f"--tracking.artifacts={self.artifacts}", f"--tracking.experiment={self.name}",
             f"--tracking.registered_model={self.name}", *more], "a test",
        )  # fmt: skip

    def run(
        self, name: str, days: float, *more: str, status: str | None = "FINISHED", model: bool = False,
        base: Path | None = None,
    ) -> str:  # fmt: skip
        """Create a run that ended `days` ago, with a model, or with an adapter of `base` -> id of its MLflow run."""
        config, folder = self.config(name, *more), str(self.runs / name)
        run_folder.begin_run(config, folder, {"manifest": []}, [])
        (Path(folder) / "step-00000001-x").mkdir()
        (Path(folder) / "step-00000001-x" / "weights").write_text("0")
        (Path(folder) / "quarantine.jsonl").write_text("{}\n")
        run_file = run_folder.read_run(folder)
        ended = time.time() - days * DAY_S
        run_file |= {"start_time": ended - 60, "status": status, "end_time": ended}
        if model:
            storage.write_bytes(f"{folder}/model/model.safetensors", save({name: torch.zeros(1)}))
            run_file["lineage"] = {"data_sha256": "0"}
        if base:
            storage.write_bytes(f"{folder}/model/base.json", Base(str(base), weights_digest(base)).to_json())
        run_folder.write_run(folder, run_file)
        done = tracking.replay(folder)
        run_folder.write_run(folder, run_file | {"run_id": done.run_id})
        return done.run_id

    def decisions(self, older_than: float = 30, keep: int = 0) -> dict[str, tuple[bool, str]]:
        retention = tracking.Retention(str(self.runs), self.config("x").tracking)
        return {one.tree.name: (one.remove, one.reason) for one in retention.decide(older_than, keep)}

    def prune(self) -> list[bool]:
        retention = tracking.Retention(str(self.runs), self.config("x").tracking)
        return [retention.remove(one.tree) for one in retention.decide(30, 0) if one.remove]

    def left_of(self, name: str, run_id: str) -> list[str]:
        """List everything that exists of a run, anywhere."""
        experiment = self.client.get_experiment_by_name(self.name).experiment_id
        left = [str(path) for path in self.runs.rglob("*") if path.relative_to(self.runs).parts[0] == name]
        left += [str(path) for path in self.artifacts.rglob("*") if path.is_file() and run_id in path.parts]
        models = self.client.search_logged_models([experiment])
        known = {model.model_id for model in models}
        left += [
            str(path) for path in self.artifacts.glob("models/*") if path.name not in known and any(path.rglob("*"))
        ]
        left += [model.model_id for model in models if model.source_run_id == run_id]
        left += [one.version for one in self.client.search_model_versions(f"run_id='{run_id}'")]
        return left + [run.info.run_id for run in self.client.search_runs([experiment]) if run.info.run_id == run_id]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/record.db"


@pytest.fixture
def lab(tmp_path, uri):
    return Laboratory(tmp_path, uri)


def test_old_runs_are_removed_and_kept_ones_have_a_reason(lab):
    lab.run("old", 40)
    lab.run("base", 50)
    lab.run("grown", 45, f"--model.init_from={lab.runs}/base/model")
    lab.run("young", 20, f"--model.init_from={lab.runs}/grown/model")
    lab.run("killed", 60, status=None)
    lab.run("resumed", 70)
    run_folder.begin_run(lab.config("resumed"), str(lab.runs / "resumed"), {}, [])
    assert lab.decisions() == {
        "young": (False, "younger than 30 days"),
        "grown": (False, "young started from it"),
        "base": (False, "grown started from it"),
        "old": (True, "old, and nothing depends on it"),
        "killed": (False, "killed is RUNNING in MLflow"),
        "resumed": (False, "resumed has not ended according to its folder"),
    }
    assert {name for name, (goes, _) in lab.decisions(older_than=0).items() if goes} == {
        "young",
        "grown",
        "base",
        "old",
    }
    assert lab.decisions(keep=4)["old"] == (False, "one of the 4 newest")


def test_a_model_is_kept_as_long_as_an_adapter_of_it(lab, tmp_path):
    lab.run("base", 60, model=True)
    copied = tmp_path / "elsewhere"
    shutil.copytree(lab.runs / "base" / "model", copied)
    adapter = lab.run("adapter", 50, model=True, base=copied)
    base_reason = (False, "adapter started from it")
    assert lab.decisions() == {"adapter": (False, f"its model is {lab.name}@candidate"), "base": base_reason}
    (version,) = lab.client.search_model_versions(f"run_id='{adapter}'")
    assert version.tags["base"] == f"models:/{lab.name}/1"
    lab.client.delete_registered_model_alias(lab.name, "candidate")
    assert {remove for remove, _ in lab.decisions().values()} == {True}


@pytest.mark.parametrize("way", ["{runs}/base/model", "{runs}//base/model/", "{runs}/base", "runs/base/model"])
def test_init_weights_are_kept_however_they_are_named(lab, way):
    lab.run("base", 50)
    lab.run("grown", 20, f"--model.init_from={way.format(runs=lab.runs)}")
    assert lab.decisions()["base"] == (False, "grown started from it")


def test_runs_unknown_to_mlflow_keep_their_init_weights(lab):
    lab.run("base", 50)
    config = lab.config("waits", f"--model.init_from={lab.runs}/base/model")
    run_folder.begin_run(config, str(lab.runs / "waits"), {}, [])
    assert lab.decisions() == {"base": (False, "waits, which MLflow does not have yet, started from it")}


def test_only_models_without_an_alias_are_removed(lab):
    first = lab.run("first", 50, model=True)
    second = lab.run("second", 40, model=True)
    assert lab.decisions() == {
        "second": (False, f"its model is {lab.name}@candidate"),
        "first": (True, "old, and nothing depends on it"),
    }
    assert len(lab.left_of("first", first)) > 5
    assert lab.prune() == [True]
    assert lab.left_of("first", first) == []
    assert len(lab.left_of("second", second)) > 5


@pytest.mark.parametrize("at", ["delete_model_version", "artifacts", "delete_logged_model", "file", "delete_run"])
def test_the_next_call_finishes_an_interrupted_removal(lab, at, monkeypatch):
    run_id = lab.run("old", 40, model=True)
    lab.client.delete_registered_model_alias(lab.name, "candidate")
    young = lab.run("old-too", 10)
    places = {"artifacts": (retention.Retention, "_remove_artifacts"), "file": (storage, "remove")}
    owner, name = places.get(at, (MlflowClient, at))
    real = getattr(owner, name)

    def interrupted(*arguments, **options):
        if at == "file":
            real(arguments[0][:1])
        else:
            real(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            lab.prune()
    assert lab.prune() == ([] if at == "delete_run" else [True])
    assert lab.left_of("old", run_id) == []
    assert len(lab.left_of("old-too", young)) > 3


def test_a_newer_run_of_the_same_name_keeps_its_folder(lab):
    old = lab.run("again", 40)
    storage.remove_folder(str(lab.runs / "again"))
    new = lab.run("again", 1)
    assert new != old
    assert lab.prune() == [True]
    left = lab.left_of("again", new)
    assert new in left
    assert str(lab.runs / "again" / "run.json") in left


def test_a_run_that_resumes_meanwhile_is_kept(lab):
    lab.run("old", 40)
    retention = tracking.Retention(str(lab.runs), lab.config("x").tracking)
    (decision,) = retention.decide(30, 0)
    assert decision.remove
    run_folder.begin_run(lab.config("old"), str(lab.runs / "old"), {}, [])
    assert not retention.remove(decision.tree)
    assert (lab.runs / "old" / "step-00000001-x" / "weights").exists()


def test_runs_in_another_storage_folder_are_ignored(lab, tmp_path):
    lab.run("old", 40)
    elsewhere = tracking.Retention(str(tmp_path / "elsewhere"), lab.config("x").tracking)
    assert elsewhere.decide(0, 0) == []


@pytest.mark.parametrize("name", ["../victim", "{root}/victim", "", "a/../../victim"])
def test_a_record_names_no_folder_outside_of_storage(lab, tmp_path, name):
    lab.run("old", 40)
    storage.write_bytes(f"{tmp_path}/victim/run.json", json.dumps({"key": "k", "status": "FINISHED"}).encode())
    experiment = lab.client.get_experiment_by_name(lab.name).experiment_id
    run_id = lab.client.create_run(experiment, 0, {retention.KEY: "k"}).info.run_id
    lab.client.log_param(run_id, "storage", str(lab.runs))
    lab.client.log_param(run_id, "name", name.format(root=tmp_path))
    lab.client.set_terminated(run_id, end_time=1)
    assert lab.prune() == [True]
    assert not (lab.runs / "old").exists()
    assert (tmp_path / "victim/run.json").exists()


def test_prune_lists_runs_and_removes_them_on_delete(lab):
    run_id = lab.run("old", 40)
    lab.run("new", 1)
    command = [sys.executable, "jobs/track.py", "prune", "--storage", str(lab.runs), "--tracking.uri", lab.uri]
    command += ["--keep", "1", "--tracking.experiment"]

    def output(*more, status=0):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    dry = output(lab.name)
    assert "1 of 2 would be removed" in dry
    assert run_id in dry
    assert len(lab.left_of("old", run_id)) > 3
    assert "old is removed" in output(lab.name, "--delete=true")
    assert lab.left_of("old", run_id) == []
    wrong = output("other", status=2)
    assert wrong.splitlines() == [f"error: --tracking.experiment other: no such experiment on {lab.uri}"]


def test_a_server_that_is_away_is_a_one_line_error(tmp_path):
    config = parse_run(["--tracking.uri=http://127.0.0.1:9"], "a test")
    with pytest.raises(ConnectionError, match=r"tracking.uri: http://127.0.0.1:9 does not answer"):
        tracking.Retention(str(tmp_path), config.tracking)
