"""Checkpoints written by two real ranks: seals, damage, retention, and jobs/checkpoint.py."""

import contextlib
import json
import logging
import os
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

from crosslmm import lease, run_folder
from crosslmm.cli import parse_run
from crosslmm.config import to_yaml
from crosslmm.lease import LeaseLost
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train.checkpoint import seals
from crosslmm.train.checkpoint.export import export
from crosslmm.train.checkpoint.read import read_newest
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.checkpoint.state import load_state
from crosslmm.train.distributed.parallel import parallelize
from crosslmm.train.optim import build_optimizer
from tests.support.common import ROOT, open_gates
from tests.support.hub import running_hub

RANKS = 2
VALUES = [0.5, 0.9, 0.7]
"""Values of a metric in three validations."""
PRUNE = seals.prune
ORPHANS = ["step-00000007-killed", "step-00000008-empty", "step-00000009-broken"]


def run_config(*overrides: str):
    return parse_run(["--train.keep_checkpoints=9", *overrides], "")


class Group:
    """Model and optimizer of one rank, saved in several runs; its log lines are in `messages`."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder, self.messages = rank, folder, []
        handler = logging.Handler()
        handler.emit = lambda record: self.messages.append(record.getMessage())
        logging.getLogger("crosslmm").addHandler(handler)
        self.group = dist.new_group(backend="gloo")
        config = run_config()
        self.processor = build_processor(config.model, config.data)

        def build(weights: bool):
            model = build_model(config.model, self.processor, seed=0)
            open_gates(model, 0.3)
            return model

        self.model = parallelize(build, config.train, torch.device("cpu"))
        self.optimizer = build_optimizer(self.model, config.train)

    def saver(self, name: str, *overrides: str) -> Saver:
        return Saver(str(self.folder / name), run_config(*overrides), "test", self.group)

    def learn(self) -> None:
        """Take a step, so that weights and moments change."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def local(self) -> list[torch.Tensor]:
        """Return copies of this rank's weights and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        everything = [*self.model.parameters(), *moments]
        return [t.to_local().clone() if hasattr(t, "to_local") else t.clone() for t in everything]


def slow_retain(*arguments) -> None:
    time.sleep(0.2)
    PRUNE(*arguments)


def save(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    ours = Group(rank, folder)
    model, optimizer = ours.model, ours.optimizer

    saver = ours.saver("run")
    for step, value in enumerate(VALUES, start=1):
        ours.learn()
        metrics = {"validation/loss": value, "validation/accuracy": value}
        saver.save(step, model, optimizer, metrics, [f"{step}\n"] if rank == 0 else [])
        if step == 2:
            second = ours.local()
    saver.close()
    export(folder / "run" / "model", model, ours.processor)

    for name, *overrides in [
        ("count", "--train.keep_checkpoints=2"),
        ("accuracy", "--train.keep_checkpoints=1", "--train.keep_best=validation/accuracy"),
        ("loss", "--train.keep_checkpoints=1", "--train.keep_best=validation/loss"),
    ]:
        saver = ours.saver(name, *overrides)
        seals.prune = slow_retain  # the other rank must not begin the next checkpoint before it ends
        for step, value in enumerate(VALUES, start=1):
            saver.save(step, model, optimizer, {"validation/loss": value, "validation/accuracy": value}, [])
        saver.close()

    if rank == 0:
        for orphan in ORPHANS:
            (folder / "orphans" / orphan).mkdir(parents=True)
        (folder / "orphans" / ORPHANS[0] / "rank-00000.safetensors").write_bytes(b"half")
        (folder / "orphans" / ORPHANS[2] / run_folder.BROKEN_SEAL_FILE).write_text('{"damage": "x"}')
        # Blocks the folder of all ranks, and then one file of the other rank.
        (folder / "blocked").mkdir()
        (folder / "blocked" / "step-00000001-test").touch()
        (folder / "blocked" / "step-00000002-test" / "rank-00001.safetensors").mkdir(parents=True)
    dist.barrier()
    saver = ours.saver("orphans")
    saver.save(1, model, optimizer, {}, [])
    saver.close()
    ours.messages.clear()
    saver = ours.saver("blocked")
    for step in (1, 2, 3):
        saver.save(step, model, optimizer, {}, [f"{step}\n"] if rank == 0 else [])
        saver.wait()
    saver.close()
    blocked = list(ours.messages)

    lost: list[str] = []

    def require_owner() -> None:
        if lost:
            raise LeaseLost("taken over")

    saver = Saver(str(folder / "lost"), run_config(), "test", ours.group, require_owner=require_owner)
    for step in (1, 2):
        saver.save(step, model, optimizer, {}, [f"{step}\n"] if rank == 0 else [])
        with contextlib.suppress(LeaseLost):
            saver.wait()
        lost.append("from now on")

    if rank == 0:
        shutil.copytree(folder / "run", folder / "damaged")
        damaged = seals.list_sealed(str(folder / "damaged"))[0]
        flip_a_bit(Path(damaged.uri) / "rank-00001.safetensors")
        for unfinished in ("step-00000004-test", "step-00000005-test"):
            (folder / "damaged" / unfinished).mkdir()
        (folder / "damaged" / "step-00000004-test" / run_folder.SEAL_FILE).touch()
    dist.barrier()
    ours.messages.clear()
    ours.learn()
    newest, state = read_newest(str(folder / "damaged"), ours.group)
    load_state(state, model, optimizer)
    facts = {
        "blocked": blocked,
        "newest": newest.step,
        "messages": list(ours.messages),
        "weights": all(map(torch.equal, ours.local(), second)),
        "nowhere": read_newest(str(folder / "nowhere"), ours.group),
    }
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Return the folder of all runs, and of what each rank saw."""
    folder = tmp_path_factory.mktemp("saved")
    torch.multiprocessing.spawn(save, (folder,), nprocs=RANKS)
    return folder


@pytest.fixture
def facts(saved) -> list[dict]:
    return [json.loads((saved / f"facts-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """Return a copy of a run with three checkpoints and its exported model, which a test may damage."""
    return Path(shutil.copytree(saved / "run", tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [one.step for one in seals.list_sealed(str(run))]


def test_a_seal_names_every_file_and_the_world_size(saved):
    newest = seals.list_sealed(str(saved / "run"))[0]
    folder = Path(newest.uri)
    assert (newest.step, newest.world_size) == (3, RANKS)
    assert newest.metrics == {"validation/loss": 0.7, "validation/accuracy": 0.7}
    assert newest.files.keys() == {path.name for path in folder.iterdir()} - {run_folder.SEAL_FILE}
    assert newest.files.keys() >= {
        "rank-00000.safetensors",
        "rank-00001.safetensors",
        "index.json",
        run_folder.CONFIG_FILE,
    }
    assert newest.size == sum(path.stat().st_size for path in folder.iterdir() if path.name != run_folder.SEAL_FILE)
    assert (folder / run_folder.CONFIG_FILE).read_text() == to_yaml(run_config())
    assert [seals.verify_file(newest, name) for name in newest.files] == [None] * len(newest.files)
    history = sorted((saved / "run" / "history").iterdir())
    assert [path.read_text() for path in history] == ["1\n", "2\n", "3\n"]


def test_nothing_is_sealed_in_a_folder_that_has_another_owner(saved):
    assert steps(saved / "lost") == [1]
    assert [path.name for path in (saved / "lost" / "history").iterdir()] == ["step-00000001.jsonl"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "{name} has {less} bytes instead of {size}"),
        (flip_a_bit, "{name} is not what was written (sha256)"),
        (lambda path: path.write_bytes(b""), "{name} has 0 bytes instead of {size}"),
        (Path.unlink, "{name} is missing"),
        (replace_by_folder, "{name} cannot be read: Is a directory"),
    ],
    ids=["truncated", "bit flipped", "emptied", "missing", "a folder"],
)
@pytest.mark.parametrize("name", ["rank-00001.safetensors", "index.json"])
def test_verify_names_the_file_and_its_damage(run, harm, message, name):
    newest = seals.list_sealed(str(run))[0]
    harm(Path(newest.uri) / name)
    size = newest.files[name][0]
    damage = {file: seals.verify_file(newest, file) for file in newest.files}
    assert damage.pop(name) == message.format(name=name, size=size, less=size - 10)
    assert set(damage.values()) == {None}


def test_a_damaged_newest_checkpoint_falls_back_to_the_previous(saved, facts):
    assert [fact["newest"] for fact in facts] == [2, 2]
    assert steps(saved / "damaged") == [2, 1]
    uri, emptied, begun = (str(saved / "damaged" / f"step-0000000{step}-test") for step in (3, 4, 5))
    wrong = "rank-00001.safetensors is not what was written (sha256)"
    *skipped, damaged = facts[0]["messages"]
    assert damaged == f"checkpoint {uri} is damaged: {wrong}; trying the one before it"
    assert sorted(skipped) == [
        f"checkpoint {emptied} is skipped: its seal.json cannot be read",
        f"checkpoint {begun} is skipped: it was never finished",
    ]
    assert facts[1]["messages"] == []
    unsealed = seals.list_unsealed(str(saved / "damaged"), seals.list_sealed(str(saved / "damaged")))
    assert sorted(unsealed) == [uri, emptied, begun]
    assert seals.unsealed_reason(uri) == wrong
    assert [fact["nowhere"] for fact in facts] == [None, None]


def test_load_restores_weights_and_moments(facts):
    assert [fact["weights"] for fact in facts] == [True, True]


@pytest.mark.parametrize(("name", "retained"), [("count", [3, 2]), ("accuracy", [3, 2]), ("loss", [3, 1])])
def test_retention_keeps_the_newest_and_the_best(saved, name, retained):
    assert steps(saved / name) == retained
    assert len([path for path in (saved / name).iterdir() if path.name.startswith("step-")]) == len(retained)


def test_sealing_removes_what_earlier_attempts_left(saved):
    assert [path.name for path in (saved / "orphans").iterdir()] == ["step-00000001-test"]


def test_a_failed_write_costs_only_that_checkpoint(saved, facts):
    """The first has no folder on any rank; in the second only one rank cannot write its file."""
    first, second = facts[0]["blocked"][:2]
    assert first.startswith("checkpoint after step 1 was not saved: ")
    assert "File exists" in first
    assert second.startswith("checkpoint after step 2 was not saved: ")
    assert "Is a directory" in second
    assert all(
        line.endswith("; training goes on, and the next one is saved as usual") and "\n" not in line
        for line in (first, second)
    )
    assert facts[1]["blocked"] == []
    assert steps(saved / "blocked") == [3]
    (history,) = (saved / "blocked" / "history").iterdir()
    assert history.read_text() == "1\n2\n3\n"


def test_an_unreadable_seal_seals_nothing(run):
    uri = run / "step-00000003-test"
    (uri / run_folder.SEAL_FILE).write_text("{")
    assert steps(run) == [2, 1]
    assert seals.list_unsealed(str(run), seals.list_sealed(str(run))) == [str(uri)]
    assert seals.unsealed_reason(str(uri)) == "its seal.json cannot be read"


@pytest.fixture
def job(monkeypatch, capsys):
    """Return a function that runs jobs/checkpoint.py in this process -> (exit status, stdout, stderr)."""
    main = runpy.run_path(str(ROOT / "jobs" / "checkpoint.py"))["main"]
    log = logging.getLogger("crosslmm")  # the job sets it up for its process
    for attribute in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, attribute, getattr(log, attribute))

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, argv)])
        try:
            status = main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return call


def test_help_names_every_command(job):
    status, out, err = job("--help")
    assert (status, err) == (0, "")
    overview = out
    for verb in ("list", "verify", "repair", "export", "push"):
        assert f"\n    {verb} " in overview
        status, out, err = job(verb, "--help")
        assert (status, err) == (0, "")
        assert "folder of the run, path or s3:// URI" in out


def test_list_shows_what_is_sealed_and_what_is_not(job, run):
    (run / "step-00000001-test" / run_folder.SEAL_FILE).unlink()
    seals.break_seal(seals.list_sealed(str(run))[0], "it was dropped")
    status, out, err = job("list", run)
    assert (status, err) == (0, "")
    (row,) = [line for line in out.splitlines() if "loss" in line]
    assert [cell.strip() for cell in row.split("│")][1::2] == ["2", "2", "loss 0.9"]
    assert f"not sealed: {run}/step-00000001-test: unfinished" in out
    assert f"not sealed: {run}/step-00000003-test: it was dropped" in out

    status, out, _ = job("list", run, "--json")
    listing = json.loads(out)
    assert status == 0
    (one,) = listing["checkpoints"]
    assert (one["step"], one["world_size"], one["metrics"]["validation/loss"]) == (2, 2, 0.9)
    assert one["size"] == seals.list_sealed(str(run))[0].size
    assert list(listing["unsealed"].values()) == ["unfinished", "it was dropped"]


def test_verify_names_the_damage_and_the_remedy(job, run):
    status, out, err = job("verify", run)
    assert (status, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["step 3", "step 2", "step 1"]
    flip_a_bit(run / "step-00000002-test" / "index.json")
    status, _, err = job("verify", run)
    assert status == 1
    assert err == (
        f"error: {run}/step-00000002-test is damaged: index.json is not what was written (sha256); "
        f"repair it with python jobs/checkpoint.py repair {run}\n"
    )
    assert job("verify", run, "--step", 3)[0] == 0
    assert steps(run) == [3, 2, 1]


def test_repair_leaves_what_a_run_resumes_from(job, run):
    truncate(run / "step-00000003-test" / "rank-00000.safetensors")
    (run / "step-00000009-killed").mkdir()
    (run / "step-00000009-killed" / "rank-00000.safetensors").write_bytes(b"half")
    snapshots = [run / "checkpoint_manager_snapshot.json", run / "ray" / "start-1" / "checkpoint_manager_snapshot.json"]
    snapshots[1].parent.mkdir(parents=True)
    for path in snapshots:
        path.write_text('{"checkpoint_results": [{"chec')
    status, out, err = job("repair", run)
    assert (status, err) == (0, "")
    assert f"{run}/step-00000003-test is damaged: rank-00000.safetensors has " in out
    assert f"{run}/step-00000009-killed was never finished; it is removed" in out
    assert all(f"{path} is removed; nothing reads it" in out for path in snapshots)
    assert out.endswith("the run will resume from step 2\n")
    assert steps(run) == [2, 1]
    assert not (run / "step-00000009-killed").exists()
    assert (run / "step-00000003-test" / run_folder.BROKEN_SEAL_FILE).exists()
    assert not any(path.exists() for path in snapshots)

    status, out, _ = job("repair", run)
    untrusted, last = out.splitlines()
    assert untrusted.startswith(
        f"{run}/step-00000003-test stays until the next checkpoint is sealed, and is not used: "
    )
    assert (status, last) == (0, "the run will resume from step 2")


def test_a_run_that_is_running_is_not_repaired(job, run):
    with lease.claim(str(run), "training", "wait").take():
        (run / "step-00000009-test").mkdir()  # a checkpoint that is being written
        status, _, err = job("repair", run)
    assert status == 2
    assert err.startswith(f"error: {run}: belongs to the training of ")
    assert (run / "step-00000009-test").exists()


def test_a_trial_whose_sweep_is_running_is_not_repaired(job, run):
    (run.parent / "sweep.json").write_text("{}")
    try:
        with lease.claim(str(run.parent), "sweep", "wait").take():
            status, _, err = job("repair", run)
    finally:
        (run.parent / "sweep.json").unlink()
    assert status == 2
    assert err.startswith(f"error: {run.parent}: belongs to the sweep of ")


def test_repair_changes_nothing_in_an_intact_run(job, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert job("repair", run) == (0, "the run will resume from step 3\n", "")
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if "owners" not in path.parts}
    assert after == before


def test_export_equals_the_run_s_own_byte_for_byte(job, run, tmp_path):
    status, out, err = job("export", run, tmp_path / "made")
    assert (status, out, err) == (0, f"{tmp_path}/made: the model after step 3\n", "")
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert made.pop(run_folder.MODEL_CONFIG_FILE) == (run / "step-00000003-test" / run_folder.CONFIG_FILE).read_bytes()
    assert b"after 3 training steps" in made.pop("README.md")
    theirs = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert "model.safetensors" in theirs
    assert made == theirs
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    fresh = build_model(run_config().model, build_processor(run_config().model), seed=0)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert AutoProcessor.from_pretrained(tmp_path / "made").image_size == 48


LOAD = """
import crosslmm
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("someone/model")
processor = AutoProcessor.from_pretrained("someone/model")
inputs = processor.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=True, return_dict=True)
print("answer", model.generate(**inputs, max_new_tokens=2).shape)
"""


def test_push_to_a_hub(run, tmp_path):
    """By the command, as a person runs it, to a stand-in; the model loads from there."""
    secret = {"AWS_NOTHING": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def python(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True,
            env=os.environ | secret | environment,
        )  # fmt: skip

    push = [ROOT / "jobs" / "checkpoint.py", "push", run, "someone/model"]
    with running_hub() as hub:
        done = python(*push, "--step", "2", **hub.environment())
        assert done.returncode == 0, done.stderr
        assert "someone/model" in done.stdout.splitlines()[-1]
        files = hub.files["someone/model"]
        assert hub.private == {"someone/model": True}
        assert {"README.md", "config.json", "crosslmm_auto.py", "model.safetensors", "run.yaml"} <= files.keys()
        assert b"after 2 training steps" in files["README.md"]
        assert str(tmp_path).encode() not in files["README.md"] + files["run.yaml"]
        loaded = python("-c", LOAD, **hub.environment())
        assert "answer torch.Size([1, " in loaded.stdout, loaded.stderr
        refused = python(*push, **hub.environment() | {"HF_TOKEN": "hf_wrong"})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "error: someone/model: the hub refuses it: " in refused.stderr
    assert "hf auth login" in refused.stderr
    gone = python(*push, **hub.environment())
    assert (gone.returncode, gone.stderr.count("\n")) == (1, 1)
    assert f"someone/model: {hub.endpoint} does not answer" in gone.stderr


def test_push_takes_hub_names_and_buckets(job, run, tmp_path):
    status, out, err = job("push", run, tmp_path / "folder")
    assert (status, out) == (2, "")
    assert "is neither a hub name (owner/name) nor an s3:// URI; `export` writes folders" in err


def test_export_takes_the_newest_intact_checkpoint(job, run, tmp_path):
    flip_a_bit(run / "step-00000003-test" / "rank-00001.safetensors", place=0.2)  # in the weights
    status, out, err = job("export", run, tmp_path / "made")
    assert (status, out) == (0, f"{tmp_path}/made: the model after step 2\n")
    assert f"{run}/step-00000003-test is damaged: rank-00001.safetensors is not what was written" in err
    weights = [AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (tmp_path / "made", run / "model")]
    assert all(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert job("export", run, tmp_path / "requested", "--step", 3)[0] == 1
    assert not (tmp_path / "requested").exists()
    assert job("export", run, tmp_path / "requested", "--step", 1)[0] == 0
    assert steps(run) == [3, 2, 1]


def test_a_bad_request_is_one_line_and_status_2(job, run, tmp_path):
    bare, full = tmp_path / "bare", tmp_path / "full"
    bare.mkdir()
    full.mkdir()
    (full / "something").touch()
    no_run = f"error: {bare}: no such run; give a run's folder, which is --storage/--name of its training\n"
    for verb in (["list", bare], ["verify", bare], ["repair", bare], ["export", bare, tmp_path / "made"]):
        assert job(*verb) == (2, "", no_run)
    assert job("list", tmp_path / "nowhere")[0] == 2
    (bare / "run.json").touch()
    for verb in (["list", bare], ["verify", bare], ["export", bare, tmp_path / "made"]):
        status, out, err = job(*verb)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{bare}: has no checkpoint" in err
    assert job("repair", bare) == (0, "the run will resume from the beginning\n", "")
    for verb in (["verify", run], ["export", run, tmp_path / "made"]):
        wrong = f"error: --step 7: {run} has no such checkpoint; it has 1, 2, 3\n"
        assert job(*verb, "--step", 7) == (2, "", wrong)
    assert job("export", run, full) == (2, "", f"error: {full}: is not empty; give another folder, or empty it\n")
    status, out, err = job("export", run, tmp_path / "made", "--merge")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "has the whole model and no adapters; leave --merge out" in err
    assert not (tmp_path / "made").exists()
