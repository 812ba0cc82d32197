"""Checkpoints that two real ranks wrote: what a seal holds, what damage is found, what is kept, and the job that looks
after them."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText, AutoProcessor

from crosslmm.cli import parse_run
from crosslmm.config import to_yaml
from crosslmm.inference.answerer import CONFIG
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train import checkpoint
from crosslmm.train.optim import build_optimizer
from crosslmm.train.parallel import parallelize
from tests.support.common import ROOT, open_gates

RANKS = 2
VALUES = [0.5, 0.9, 0.7]
"""Of a metric in three validations."""
ORPHANS = ["step-00000007-killed", "step-00000008-empty", "step-00000009-broken"]


def run_config(*overrides: str):
    return parse_run(["--train.keep_checkpoints=9", *overrides], "")


class Group:
    """What one of the ranks trains with; each `run` is a run of its own with the same model."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder, self.said = rank, folder, []
        self.group = dist.new_group(backend="gloo")
        config = run_config()
        self.processor = build_processor(config.model)

        def build(weights: bool):
            model = build_model(config.model, self.processor, seed=0)
            open_gates(model, 0.3)
            return model

        self.model = parallelize(build, config.train, torch.device("cpu"))
        self.optimizer = build_optimizer(self.model, config.train)

    def saver(self, name: str, *overrides: str) -> checkpoint.Saver:
        return checkpoint.Saver(
            str(self.folder / name), run_config(*overrides), "test", self.group, lambda line: self.said.append(line)
        )

    def learn(self) -> None:
        """Every step gives other weights, and an optimizer with a past."""
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()

    def local(self) -> list[torch.Tensor]:
        """This rank's weights and moments, as they are now."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        everything = [*self.model.parameters(), *moments]
        return [t.to_local().clone() if hasattr(t, "to_local") else t.clone() for t in everything]


def save(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    ours = Group(rank, folder)
    model, optimizer = ours.model, ours.optimizer

    saver = ours.saver("run")
    for step, value in enumerate(VALUES, start=1):
        ours.learn()
        torch.manual_seed(100 * step + rank)
        torch.rand(step)  # somewhere in the sequence
        metrics = {"validation/loss": value, "validation/accuracy": value}
        saver.save(step, model, optimizer, metrics, [f"{step}\n"] if rank == 0 else [])
        if step == 2:
            drawn, second = torch.rand(5), ours.local()
    saver.close()
    checkpoint.export(folder / "run" / "model", model, ours.processor)

    for name, *overrides in [
        ("count", "--train.keep_checkpoints=2"),
        ("accuracy", "--train.keep_checkpoints=1", "--train.keep_best=validation/accuracy"),
        ("loss", "--train.keep_checkpoints=1", "--train.keep_best=validation/loss"),
    ]:
        saver = ours.saver(name, *overrides)
        for step, value in enumerate(VALUES, start=1):
            saver.save(step, model, optimizer, {"validation/loss": value, "validation/accuracy": value}, [])
        saver.close()

    if rank == 0:
        for orphan in ORPHANS:
            (folder / "orphans" / orphan).mkdir(parents=True)
        (folder / "orphans" / ORPHANS[0] / "__0_0.distcp").write_bytes(b"half")
        (folder / "orphans" / ORPHANS[2] / checkpoint.BROKEN_SEAL).write_text('{"damage": "x"}')
        # In the way of everybody's folder, and then of one file of the other rank alone.
        (folder / "blocked").mkdir()
        (folder / "blocked" / "step-00000001-test").touch()
        (folder / "blocked" / "step-00000002-test" / "__1_0.distcp").mkdir(parents=True)
    dist.barrier()
    saver = ours.saver("orphans")
    saver.save(1, model, optimizer, {}, [])
    saver.close()
    ours.said.clear()
    saver = ours.saver("blocked")
    for step in (1, 2, 3):
        saver.save(step, model, optimizer, {}, [f"{step}\n"] if rank == 0 else [])
        saver.wait()
    saver.close()
    blocked = list(ours.said)

    if rank == 0:
        shutil.copytree(folder / "run", folder / "damaged")
        newest = checkpoint.sealed(str(folder / "damaged"))[0]
        turn_a_bit(Path(newest.uri) / "__1_0.distcp")
        for later in ("step-00000004-test", "step-00000005-test"):
            (folder / "damaged" / later).mkdir()
        (folder / "damaged" / "step-00000004-test" / checkpoint.SEAL).touch()
    dist.barrier()
    ours.said.clear()
    ours.learn()
    with checkpoint.newest(str(folder / "damaged"), ours.group, ours.said.append) as found:
        checkpoint.load(found[1], found[0], model, optimizer)
        drawn_again = torch.rand(5)
        facts = {
            "blocked": blocked,
            "newest": found[0].step,
            "told": ours.said,
            "draws": torch.equal(drawn, drawn_again),
            "weights": all(map(torch.equal, ours.local(), second)),
        }
    with checkpoint.newest(str(folder / "nowhere"), ours.group, ours.said.append) as found:
        facts["nowhere"] = found
    (folder / f"facts-{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def turn_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folders of runs, and what each rank saw."""
    folder = tmp_path_factory.mktemp("saved")
    torch.multiprocessing.spawn(save, (folder,), nprocs=RANKS)
    return folder


@pytest.fixture
def facts(saved) -> list[dict]:
    return [json.loads((saved / f"facts-{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy of a run with three checkpoints and its exported model, to do harm to."""
    return Path(shutil.copytree(saved / "run", tmp_path / "run"))


def steps(run: Path) -> list[int]:
    return [one.step for one in checkpoint.sealed(str(run))]


def test_a_seal_names_every_file_and_who_wrote_them(saved):
    newest = checkpoint.sealed(str(saved / "run"))[0]
    folder = Path(newest.uri)
    assert (newest.step, newest.world_size) == (3, RANKS)
    assert newest.metrics == {"validation/loss": 0.7, "validation/accuracy": 0.7}
    assert newest.files.keys() == {path.name for path in folder.iterdir()} - {checkpoint.SEAL}
    assert newest.files.keys() >= {"__0_0.distcp", "__1_0.distcp", ".metadata", checkpoint.CONFIG}
    assert newest.size == sum(path.stat().st_size for path in folder.iterdir() if path.name != checkpoint.SEAL)
    assert (folder / checkpoint.CONFIG).read_text() == to_yaml(run_config())
    assert [checkpoint.damage(newest, name) for name in newest.files] == [None] * len(newest.files)
    history = sorted((saved / "run" / "history").iterdir())
    assert [path.read_text() for path in history] == ["1\n", "2\n", "3\n"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (truncate, "{name} has {less} bytes instead of {size}"),
        (turn_a_bit, "{name} is not what was written (sha256)"),
        (lambda path: path.write_bytes(b""), "{name} has 0 bytes instead of {size}"),
        (Path.unlink, "{name} is missing"),
        (replace_by_folder, "{name} cannot be read: Is a directory"),
    ],
    ids=["truncated", "bit turned", "emptied", "missing", "a folder"],
)
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_damage_names_the_file_and_what_is_wrong_with_it(run, harm, says, name):
    newest = checkpoint.sealed(str(run))[0]
    harm(Path(newest.uri) / name)
    size = newest.files[name][0]
    found = {file: checkpoint.damage(newest, file) for file in newest.files}
    assert found.pop(name) == says.format(name=name, size=size, less=size - 10)
    assert set(found.values()) == {None}


def test_of_a_damaged_newest_checkpoint_the_seal_is_broken_and_the_one_before_is_taken(saved, facts):
    assert [fact["newest"] for fact in facts] == [2, 2]
    assert steps(saved / "damaged") == [2, 1]
    uri, emptied, begun = (str(saved / "damaged" / f"step-0000000{step}-test") for step in (3, 4, 5))
    wrong = "__1_0.distcp is not what was written (sha256)"
    *left_out, damaged = facts[0]["told"]
    assert damaged == f"checkpoint {uri} is damaged: {wrong}; the one before it is taken"
    assert sorted(left_out) == [
        f"checkpoint {emptied} is left out: its seal.json cannot be read",
        f"checkpoint {begun} is left out: it was never finished",
    ]
    assert facts[1]["told"] == []
    found = checkpoint.unsealed(str(saved / "damaged"), checkpoint.sealed(str(saved / "damaged")))
    assert sorted(found) == [uri, emptied, begun]
    assert checkpoint.why_unsealed(uri) == wrong
    assert [fact["nowhere"] for fact in facts] == [None, None]


def test_weights_moments_and_random_states_come_back_on_every_rank(facts):
    assert [fact["weights"] for fact in facts] == [True, True]
    assert [fact["draws"] for fact in facts] == [True, True]


@pytest.mark.parametrize(("name", "kept"), [("count", [3, 2]), ("accuracy", [3, 2]), ("loss", [3, 1])])
def test_the_newest_and_the_best_are_kept(saved, name, kept):
    assert steps(saved / name) == kept
    assert len([path for path in (saved / name).iterdir() if path.name.startswith("step-")]) == len(kept)


def test_what_another_start_left_goes_when_the_next_checkpoint_is_sealed(saved):
    assert [path.name for path in (saved / "orphans").iterdir()] == ["step-00000001-test"]


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_is(saved, facts):
    """Of the first, no rank has a folder; of the second, one rank alone cannot write its file."""
    first, second = facts[0]["blocked"][:2]
    assert first.startswith("checkpoint after step 1 was not saved: ")
    assert "File exists" in first
    assert second.startswith("checkpoint after step 2 was not saved: ")
    assert "Is a directory" in second
    assert all(line.endswith("; the next one is tried again") and "\n" not in line for line in (first, second))
    assert facts[1]["blocked"] == []
    assert steps(saved / "blocked") == [3]
    (history,) = (saved / "blocked" / "history").iterdir()
    assert history.read_text() == "1\n2\n3\n"


def test_a_seal_that_cannot_be_read_seals_nothing(run):
    uri = run / "step-00000003-test"
    (uri / checkpoint.SEAL).write_text("{")
    assert steps(run) == [2, 1]
    assert checkpoint.unsealed(str(run), checkpoint.sealed(str(run))) == [str(uri)]
    assert checkpoint.why_unsealed(str(uri)) == "its seal.json cannot be read"


@pytest.fixture
def job(monkeypatch, capsys):
    """Runs jobs/checkpoint.py here -> exit status, what it printed, what it complained of."""
    main = runpy.run_path(str(ROOT / "jobs" / "checkpoint.py"))["main"]

    def call(*argv: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, argv)])
        try:
            status = main()
        except SystemExit as left:
            status = left.code
        return status, *capsys.readouterr()

    return call


def test_help_teaches_every_verb(job):
    status, said, complained = job("--help")
    assert (status, complained) == (0, "")
    for verb in ("list", "verify", "repair", "export"):
        assert f"\n    {verb} " in said
        status, own, complained = job(verb, "--help")
        assert (status, complained) == (0, "")
        assert "folder of the run, path or s3:// URI" in own


def test_list_shows_what_is_sealed_and_what_is_not(job, run):
    (run / "step-00000001-test" / checkpoint.SEAL).unlink()
    checkpoint.break_seal(checkpoint.sealed(str(run))[0], "it was dropped")
    status, said, complained = job("list", run)
    assert (status, complained) == (0, "")
    (row,) = [line for line in said.splitlines() if "loss" in line]
    assert [cell.strip() for cell in row.split("│")][1::2] == ["2", "2", "loss 0.9"]
    assert f"not sealed: {run}/step-00000001-test: unfinished" in said
    assert f"not sealed: {run}/step-00000003-test: it was dropped" in said

    status, said, _ = job("list", run, "--json")
    said = json.loads(said)
    assert status == 0
    (one,) = said["checkpoints"]
    assert (one["step"], one["world_size"], one["metrics"]["validation/loss"]) == (2, 2, 0.9)
    assert one["size"] == checkpoint.sealed(str(run))[0].size
    assert list(said["unsealed"].values()) == ["unfinished", "it was dropped"]


def test_verify_names_the_damage_and_the_remedy(job, run):
    status, said, complained = job("verify", run)
    assert (status, complained) == (0, "")
    assert [line.split(":")[0] for line in said.splitlines()] == ["step 3", "step 2", "step 1"]
    turn_a_bit(run / "step-00000002-test" / ".metadata")
    status, _, complained = job("verify", run)
    assert status == 1
    assert complained == (
        f"error: {run}/step-00000002-test: .metadata is not what was written (sha256); "
        f"mend it with python jobs/checkpoint.py repair {run}\n"
    )
    assert job("verify", run, "--step", 3)[0] == 0
    assert steps(run) == [3, 2, 1]


def test_repair_leaves_what_a_run_goes_on_from(job, run):
    truncate(run / "step-00000003-test" / "__0_0.distcp")
    (run / "step-00000009-killed").mkdir()
    (run / "step-00000009-killed" / "__0_0.distcp").write_bytes(b"half")
    snapshots = [run / "checkpoint_manager_snapshot.json", run / "ray" / "start-1" / "checkpoint_manager_snapshot.json"]
    snapshots[1].parent.mkdir(parents=True)
    for path in snapshots:
        path.write_text('{"checkpoint_results": [{"chec')
    status, said, complained = job("repair", run)
    assert (status, complained) == (0, "")
    assert f"{run}/step-00000003-test is damaged: __0_0.distcp has " in said
    assert f"{run}/step-00000009-killed was never finished; it is removed" in said
    assert all(f"{path}, which nothing reads any more, is removed" in said for path in snapshots)
    assert said.endswith("the run will go on from step 2\n")
    assert steps(run) == [2, 1]
    assert not (run / "step-00000009-killed").exists()
    assert (run / "step-00000003-test" / checkpoint.BROKEN_SEAL).exists()
    assert not any(path.exists() for path in snapshots)

    status, said, _ = job("repair", run)
    kept, last = said.splitlines()
    assert kept.startswith(f"{run}/step-00000003-test stays until the next checkpoint is sealed, and counts as none: ")
    assert (status, last) == (0, "the run will go on from step 2")


def test_repair_touches_no_good_run(job, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert job("repair", run) == (0, "the run will go on from step 3\n", "")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_export_is_the_run_s_own_byte_for_byte(job, run, tmp_path):
    status, said, complained = job("export", run, tmp_path / "made")
    assert (status, said, complained) == (0, f"{tmp_path}/made: the model after step 3\n", "")
    made = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    assert made.pop(CONFIG) == (run / "step-00000003-test" / checkpoint.CONFIG).read_bytes()
    theirs = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert "model.safetensors" in theirs
    assert made == theirs
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "made")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    fresh = build_model(run_config().model, build_processor(run_config().model), seed=0)
    for name, buffer in fresh.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert AutoProcessor.from_pretrained(tmp_path / "made").image_size == 48


def test_export_takes_the_newest_that_is_whole(job, run, tmp_path):
    turn_a_bit(run / "step-00000003-test" / "__1_0.distcp")
    status, said, complained = job("export", run, tmp_path / "made")
    assert (status, said) == (0, f"{tmp_path}/made: the model after step 2\n")
    assert f"{run}/step-00000003-test is damaged: __1_0.distcp is not what was written" in complained
    weights = [AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (tmp_path / "made", run / "model")]
    assert all(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert job("export", run, tmp_path / "asked", "--step", 3)[0] == 1
    assert not (tmp_path / "asked").exists()
    assert job("export", run, tmp_path / "asked", "--step", 1)[0] == 0
    assert steps(run) == [3, 2, 1]


def test_a_refusal_is_one_line_and_status_2(job, run, tmp_path):
    bare, full = tmp_path / "bare", tmp_path / "full"
    bare.mkdir()
    full.mkdir()
    (full / "something").touch()
    no_run = f"error: {bare}: no such run; give the folder of one, which is --storage/--name of its training\n"
    for verb in (["list", bare], ["verify", bare], ["repair", bare], ["export", bare, tmp_path / "made"]):
        assert job(*verb) == (2, "", no_run)
    assert job("list", tmp_path / "nowhere")[0] == 2
    (bare / "run.json").touch()
    for verb in (["list", bare], ["verify", bare], ["export", bare, tmp_path / "made"]):
        status, said, complained = job(*verb)
        assert (status, said, complained.count("\n")) == (2, "", 1)
        assert f"{bare}: has no checkpoint" in complained
    assert job("repair", bare) == (0, "the run will go on from the beginning\n", "")
    for verb in (["verify", run], ["export", run, tmp_path / "made"]):
        wrong = f"error: --step 7: {run} has no such checkpoint; there are 1, 2, 3\n"
        assert job(*verb, "--step", 7) == (2, "", wrong)
    assert job("export", run, full) == (2, "", f"error: {full}: is not empty; give another folder, or empty it\n")
    assert not (tmp_path / "made").exists()
