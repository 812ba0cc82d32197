"""Adapters: the files of one, and of the model that it belongs to, make the model that answers."""

import warnings

import pytest
import torch

from crosslmm.config import BadConfig, TrackingConfig
from crosslmm.evaluate.asking.model_files import fetch_model, open_files
from crosslmm.inference.answerer import Answerer
from crosslmm.tracking import MlflowRun, register
from tests.support.exports import export_adapter, export_model


@pytest.fixture(scope="module")
def folders(config, processor, tmp_path_factory):
    """An exported model, and an adapter of it."""
    folder = tmp_path_factory.mktemp("adapters")
    base = export_model(folder / "base", config, processor)
    return base, export_adapter(folder / "adapter", base, config, processor, seed=1)


def weights(answerer):
    return answerer.model.state_dict()


def assert_same(answerer, expected):
    theirs = weights(expected)
    assert weights(answerer).keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in weights(answerer).items())
    assert answerer.config == expected.config


def test_folder_of_an_adapter(folders):
    base, adapter = folders
    files = fetch_model(str(adapter), TrackingConfig())
    assert files.config.train.lora.rank == 4
    assert_same(open_files(files.files, "cpu"), Answerer(base, "cpu", adapter))
    assert files.digest != fetch_model(str(base), TrackingConfig()).digest


def test_version_that_is_an_adapter(folders, tmp_path):
    base, adapter = folders
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", artifacts=str(tmp_path / "artifacts"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        uri = register(MlflowRun.create(tracking, "adapted", "a test"), str(adapter), {})
    files = fetch_model(uri, tracking)
    assert files.version.base == "models:/crosslmm/1"
    assert_same(open_files(files.files, "cpu"), Answerer(base, "cpu", adapter))


def test_an_adapter_without_its_model_is_refused(folders, tmp_path):
    _, adapter = folders
    for file in adapter.iterdir():
        if file.is_file() and file.name != "base.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadConfig, match="is an adapter that names no model"):
        fetch_model(str(tmp_path), TrackingConfig())
