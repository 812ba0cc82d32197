"""Seals of checkpoints that somebody else wrote."""

import json

import pytest

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.run_folder import steps_after
from crosslmm.train.checkpoint import seals

SEAL = {
    "format": seals.FORMAT,
    "step": 3,
    "world_size": 1,
    "sealed_at": 1.0,
    "metrics": {"loss": 0.5},
    "files": {"a": [1, "0" * 64]},
}


@pytest.fixture
def seal(tmp_path):
    def write(**changes):
        path = tmp_path / "run/step-00000003-test/seal.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(SEAL | changes))
        return str(tmp_path / "run")

    return write


def test_a_seal_is_read(seal):
    (checkpoint,) = seals.list_sealed(seal())
    assert (checkpoint.step, checkpoint.files) == (3, {"a": (1, "0" * 64)})


@pytest.mark.parametrize("name", ["/etc/passwd", "../../run.json", "a/../../x", "", ".", "..", "C:/x"])
def test_a_seal_that_names_files_elsewhere_does_not_count(seal, name):
    run = seal(files={"a": [1, "0" * 64], name: [1, "0" * 64]})
    assert seals.list_sealed(run) == []
    (uri,) = seals.list_unsealed(run, [])
    assert seals.unsealed_reason(uri) == "its seal.json cannot be read"


@pytest.mark.parametrize(
    "changes",
    [{"step": "many"}, {"step": None}, {"metrics": []}, {"files": {"a": [float("inf"), ""]}}, {"files": []},
     {"sealed_at": "x"}, {"world_size": {}}, {"files": {"a": 3}}, {"format": "\0"}, {"format": None}],
)  # fmt: skip
def test_a_seal_of_other_types_does_not_count(seal, changes):
    assert seals.list_sealed(seal(**changes)) == []


def test_a_seal_that_is_no_object_or_links_out_does_not_count(seal, tmp_path):
    run = seal()
    path = tmp_path / "run/step-00000003-test/seal.json"
    for text in ("[" * 100_000, "[]", "3", "", "x" * (storage.MAX_JSON_BYTES + 1)):
        path.write_text(text)
        assert seals.list_sealed(run) == []
    path.unlink()
    (tmp_path / "seal.json").write_text(json.dumps(SEAL))
    path.symlink_to(tmp_path / "seal.json")
    assert seals.list_sealed(run) == []


def test_a_checkpoint_of_an_earlier_format_stops_the_run_and_stays(seal, tmp_path):
    """Were it taken for unfinished, the next checkpoint would remove it."""
    run = seal(format=1)
    with pytest.raises(
        BadConfig, match=r"step-00000003-test: its format is version 1, .* start it again under another"
    ):
        seals.list_sealed(run)
    assert (tmp_path / "run/step-00000003-test/seal.json").exists()


def test_what_a_link_in_a_checkpoint_leads_to_is_not_removed(seal, tmp_path):
    run = seal()
    folder = tmp_path / "run/step-00000003-test"
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "file").touch()
    (precious / "checkpoint_manager_snapshot.json").touch()
    (folder / "sub").symlink_to(precious)
    seals.remove(str(folder))
    assert not folder.exists()
    (tmp_path / "run/link").symlink_to(precious)
    with pytest.raises(storage.BadLocation, match="a link leads out of its folder"):
        list(seals.repair(run))
    (tmp_path / "run/step-00000004-test").symlink_to(precious)
    seals.remove(f"{run}/step-00000004-test")
    assert not (tmp_path / "run/step-00000004-test").is_symlink()
    assert sorted(path.name for path in precious.iterdir()) == ["checkpoint_manager_snapshot.json", "file"]


def test_a_seal_with_names_that_would_forge_lines_does_not_count(seal):
    assert seals.list_sealed(seal(files={"x\x1b]0;owned\x07\nnot sealed: FORGED": [1, "0" * 64]})) == []


def test_what_a_link_in_a_run_leads_to_is_not_recorded(tmp_path):
    (tmp_path / "secret").write_text('{"step": 1, "time": 1.0, "metrics": {}}')
    (tmp_path / "run/history").mkdir(parents=True)
    (tmp_path / "run/history/step-00000001.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(storage.BadLocation, match="a link leads out of its folder"):
        list(steps_after(str(tmp_path / "run"), 0))
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model/model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(storage.BadLocation, match="a link leads out of its folder"):
        storage.download(str(tmp_path / "run/model"), str(tmp_path / "copy"))
    assert not (tmp_path / "copy/model.safetensors").exists()
