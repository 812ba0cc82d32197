"""Requests that are refused before anything starts, and the rule of promotion, with a registry on sqlite."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.data.manifest import BadManifest
from crosslmm.evaluate import record
from crosslmm.evaluate.questions.question import BadBenchmark
from crosslmm.evaluate.run import run_evaluation
from crosslmm.evaluate.scores.judging import compare
from crosslmm.evaluate.settings import parse
from crosslmm.tracking import MlflowRun, register
from crosslmm.tracking.versions import find_version
from tests.support.benchmark_folders import clip
from tests.support.common import conversation
from tests.support.evaluations import evaluated, export_model, replies, source


@pytest.fixture(scope="module")
def world(config, processor, tmp_path_factory):
    """A folder with an exported model, a manifest, and a registry of two versions, of which the first is champion."""
    folder = tmp_path_factory.mktemp("world")
    export_model(config, processor, folder / "model")
    (folder / "clip.mp4").write_bytes(clip(0))
    row = {"id": "a", "video": "clip.mp4", "messages": conversation("?", "-")}
    (folder / "good.jsonl").write_text(json.dumps(row))
    (folder / "questions.jsonl").write_text(json.dumps(row | {"messages": row["messages"][:1]}))
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", artifacts=str(folder / "artifacts"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(2):
            register(MlflowRun.create(tracking, f"seed{seed}", "a test"), str(folder / "model"), {})
    MlflowClient(tracking.uri).set_registered_model_alias("crosslmm", "champion", "1")
    return SimpleNamespace(
        folder=folder, tracking=tracking, versions=[find_version(f"models:/crosslmm/{n}", tracking) for n in (1, 2)]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--manifest={0}/good.jsonl --model=models:/crosslmm@nobody",
            "models:/crosslmm@nobody: there is no such version",
        ),
        ("--manifest={0}/good.jsonl --model=models:/crosslmm/77", "models:/crosslmm/77: there is no such version"),
        ("--manifest={0}/good.jsonl --model=models:/crosslmm", "is models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("--manifest={0}/good.jsonl --against=models:/crosslmm/77", "models:/crosslmm/77: there is no such version"),
        (
            "--manifest={0}/good.jsonl --promote=champion --against=models:/crosslmm/2",
            "models:/crosslmm/1 has this alias",
        ),
        ("--manifest={0}/good.jsonl --model={0}", "there is no run.yaml in"),
        ("--manifest={0}/good.jsonl --model={0}/nowhere", "there is no run.yaml in"),
        ("--manifest={0}/none.jsonl --model={0}/model", "none.jsonl: cannot be read"),
        ("--manifest={0}/questions.jsonl --model={0}/model", "there is no message of the assistant"),
        ("--manifest={0}/good.jsonl --only=kind=x --model={0}/model", "there is no such group; there are none at all"),
        ("--benchmark=nope --data={0} --model={0}/model", "there are videomme, videomme_w_subtitle"),
        ("--benchmark=mvbench --data={0} --model={0}/model", "there is no json/TASK.json in it"),
        ("--benchmark=mvbench --data={0}/nowhere --model={0}/model", "there is no such folder"),
        ("--manifest={0}/good.jsonl --scorer=nowhere:f --model={0}/model", "--scorer nowhere:f"),
    ],
)
def test_bad_request_is_one_line(world, arguments, message):
    given = [
        *arguments.format(world.folder).split(),
        f"--tracking.uri={world.tracking.uri}",
        f"--storage={world.folder}/runs",
    ]
    with pytest.raises((BadConfig, BadManifest, BadBenchmark)) as error:
        run_evaluation(*parse(given, ""))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def promote(world, folder, texts, champions, **changed):
    """Let version 2, with these answers, challenge the champion; return (promoted, version that is champion)."""
    data = source("videomme", folder / "data")
    one = replace(evaluated(data, folder, replies(data, texts)), version=world.versions[1], model="models:/crosslmm/2")
    rival = evaluated(data, folder, replies(data, champions, **changed), name="rival") if champions else None
    difference = compare(one.answers, rival.answers, data.benchmark) if rival else None
    settings = parse(["--benchmark=videomme", "--data=/x", "--promote=champion"], "")[0]
    promoted = record.promote(one, rival, difference, settings, world.tracking)
    client = MlflowClient(world.tracking.uri)
    champion = client.get_model_version_by_alias("crosslmm", "champion").version
    client.set_registered_model_alias("crosslmm", "champion", "1")
    return promoted, str(champion)


RIGHT = ["A", "B", "C", "D"]
"""Right answers to the made-up questions."""


def test_better_by_more_than_noise_is_promoted(world, tmp_path):
    assert promote(world, tmp_path, RIGHT, ["A", "C", "D", "B"]) == (True, "2")
    tags = MlflowClient(world.tracking.uri).get_model_version("crosslmm", "2").tags
    assert "better than models:/crosslmm/7" in json.loads(tags["promoted_as.champion"])["reason"]


@pytest.mark.parametrize("champions", [RIGHT, [*RIGHT * 5, "A", "B", "C", "A"]])
def test_equal_or_hardly_better_is_not_promoted(world, tmp_path, champions):
    assert promote(world, tmp_path, RIGHT, champions) == (False, "1")


def test_champion_without_a_score_keeps_the_alias(world, tmp_path):
    assert promote(world, tmp_path, RIGHT, ["B"], unreadable=[0]) == (False, "1")


def test_first_version_needs_nobody_to_beat(world, tmp_path):
    assert promote(world, tmp_path, RIGHT, None) == (True, "2")
