"""Answers with adapters, and adapters in the registry."""

import json
import logging
import runpy
import sys
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from crosslmm.config import TrackingConfig
from crosslmm.data.samples.clips import encode_clip
from crosslmm.inference.answerer import Answerer
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.adapters import lora
from crosslmm.run_folder import BASE_FILE
from crosslmm.text import printable
from crosslmm.tracking import MlflowRun, load_answerer, register
from crosslmm.tracking.client import MLFLOW_ENVIRONMENT
from tests.support.common import ROOT, random_frames
from tests.support.exports import export_adapter, export_model

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(input example|type hint):UserWarning")
QUESTIONS = ["Which shape?", "What?", "Which way does it move?"]


@pytest.fixture(scope="module")
def place(config, processor, tmp_path_factory) -> Path:
    """Return a folder with a model, two adapters of it, another model, and a clip."""
    place = tmp_path_factory.mktemp("runs")
    export_model(place / "base", config, processor)
    export_model(place / "other", config, processor, seed=1)
    for name, seed in (("sports", 7), ("cooking", 8)):
        export_adapter(place / name, place / "base", config, processor, seed)
    (place / "clips").mkdir()
    (place / "clips" / "a.mp4").write_bytes(encode_clip(np.repeat(random_frames(1, 5), 8, axis=0)))
    return place


def answers(answerer: Answerer, place: Path) -> list[str]:
    return answerer([str(place / "clips" / "a.mp4")] * len(QUESTIONS), QUESTIONS)


@pytest.fixture(scope="module")
def expected(place) -> dict[str, list[str]]:
    """Return the answers of the base, and of the base with each adapter merged into it."""
    found = {"base": answers(Answerer(place / "base", "cpu"), place)}
    for name in ("sports", "cooking"):
        merged = Answerer(place / "base", "cpu")
        merged.model = CrossLMMForConditionalGeneration.from_pretrained(place / "base").eval()
        lora.load(merged.model, place / name)
        lora.merge(merged.model)
        found[name] = answers(merged, place)
    assert len({tuple(of_one) for of_one in found.values()}) == 3
    return found


def test_an_adapter_answers_like_the_merged_model(place, expected):
    for name in ("sports", "cooking"):
        assert answers(Answerer(place / "base", "cpu", adapter=place / name), place) == expected[name]


def test_an_adapter_that_peft_alone_wrote_takes_what_it_lacks_from_the_base(place, expected, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((place / "sports" / file).read_bytes())
    assert answers(Answerer(place / "base", "cpu", adapter=tmp_path), place) == expected["sports"]


def test_an_adapter_of_another_model_is_one_line(place):
    base = json.loads((place / "sports" / BASE_FILE).read_text())
    with pytest.raises(ValueError, match=r"this adapter belongs to another model") as error:
        Answerer(place / "other", "cpu", adapter=place / "sports")
    assert str(place / "base") in str(error.value)
    assert base["sha256"][:12] in str(error.value)
    assert str(error.value).isprintable()
    with pytest.raises(ValueError, match=r"sports: is an adapter; name the model that it belongs to"):
        Answerer(place / "sports", "cpu")


@pytest.fixture(scope="module")
def registry(place, tmp_path_factory):
    """Register the model, and then each adapter; return the MLflow server, and what `register` returned."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in MLFLOW_ENVIRONMENT.items():
            patch.setenv(name, value)
        root = tmp_path_factory.mktemp("mlflow")
        tracking = TrackingConfig(uri=f"sqlite:///{root}/record.db", experiment="x", registered_model="adapted")
        client = MlflowClient(tracking.uri)
        experiment = client.create_experiment("x", f"file://{root}/artifacts")

        def registered(folder: Path, **more: str) -> str:
            run = MlflowRun(tracking.model_copy(update=more), client.create_run(experiment).info.run_id)
            return register(run, str(folder), {"data_sha256": "0"})

        uris = [registered(place / name) for name in ("base", "sports", "cooking")]
        uris.append(registered(place / "sports", registered_model="alone"))
        yield tracking, client, uris


def test_versions_that_are_adapters_name_their_base(registry):
    _, client, uris = registry
    assert uris == ["models:/adapted@candidate"] * 3 + ["models:/alone@candidate"]
    versions = {str(v.version): v.tags for v in client.search_model_versions("name = 'adapted'")}
    base, sports, cooking = (versions.pop(number) for number in "123")
    assert not versions
    assert len(base["weights_sha256"]) == 64
    assert "base" not in base
    for adapter in (sports, cooking):
        assert adapter["base"] == "models:/adapted/1"
        assert adapter["data_sha256"] == "0"
        assert "weights_sha256" not in adapter
    assert str(client.get_model_version_by_alias("adapted", "candidate").version) == "3"


def test_a_base_that_is_not_registered_becomes_a_version(registry):
    _, client, _ = registry
    versions = {str(v.version): v.tags for v in client.search_model_versions("name = 'alone'")}
    assert versions["2"]["base"] == "models:/alone/1"
    assert "weights_sha256" in versions["1"]
    assert str(client.get_model_version_by_alias("alone", "candidate").version) == "2"


def test_a_registered_adapter_answers_over_its_base(registry, place, expected):
    tracking, _, _ = registry
    names = {"models:/adapted/2": "sports", "models:/alone@candidate": "sports", "models:/adapted/3": "cooking"}
    for uri, name in names.items():
        mlflow.set_tracking_uri(tracking.uri)
        model = mlflow.pyfunc.load_model(uri, model_config={"roots": [str(place / "clips")]})
        table = model.predict(pd.DataFrame({"video": ["a.mp4"] * 3, "question": QUESTIONS}))
        assert table["answer"].tolist() == expected[name]


def test_whoever_loads_a_model_names_the_adapter(registry, place, expected):
    tracking, _, _ = registry
    for model_uri, adapter in (
        ("models:/adapted/1", str(place / "cooking")), ("models:/adapted/1", "models:/adapted/3"),
        ("models:/adapted/2", "models:/adapted/3"),
    ):  # fmt: skip
        answerer = load_answerer(model_uri, tracking, adapter)
        assert answers(answerer, place) == expected["cooking"]


def test_the_job_answers_with_an_adapter(registry, place, expected, monkeypatch, capsys):
    tracking, _, _ = registry
    log = logging.getLogger("crosslmm")  # the job sets it up for its process
    for attribute in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, attribute, getattr(log, attribute))

    def run(adapter: Path, model: str = "models:/adapted/1") -> tuple[str, str]:
        argv = ["answer.py", "--video", str(place / "clips" / "a.mp4"), "--question", QUESTIONS[0], "--model", model]
        monkeypatch.setattr(sys, "argv", [*argv, "--tracking.uri", str(tracking.uri), "--adapter", str(adapter)])
        runpy.run_path(str(ROOT / "jobs" / "answer.py"))["main"]()
        return capsys.readouterr()

    assert run(place / "sports").out == f"{printable(expected['sports'][0])}\n"
    broken = place / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "LORA", "use_dora": true}')
    for adapter, says in ((place / "nowhere", "no adapter can be read there"), (broken, "use_dora is not supported")):
        with pytest.raises(SystemExit) as left:
            run(adapter)
        assert left.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {adapter}: ")
        assert says in error
