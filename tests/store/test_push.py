"""jobs/checkpoint.py push to a bucket of a real object store, from a run in the same store."""

import runpy
import sys

import pytest
import torch
import torch.distributed as dist
from s3fs import S3FileSystem
from transformers import AutoModelForImageTextToText

from crosslmm import storage
from crosslmm.cli import parse_run
from crosslmm.config import to_yaml
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.loading import build_model, build_processor
from crosslmm.model.weights_source import WEIGHTS, WeightsSource
from crosslmm.run_folder import CONFIG_FILE
from crosslmm.train.checkpoint.save import Saver
from crosslmm.train.optim import build_optimizer
from tests.support.common import ROOT
from tests.support.s3rver import running_store

RUN = "s3://models/runs/first"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, running_store("swift", tmp_path_factory.mktemp("store") / "s") as store:
        for name, value in store.environment().items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        store.make_bucket("models")
        yield store
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def model(store, tmp_path):
    """The model of a run in the store, which has one checkpoint."""
    config = parse_run([], "")
    model = build_model(config.model, build_processor(config.model), seed=3)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        saver = Saver(RUN, config, "test", dist.new_group(backend="gloo"))
        saver.save(5, model, build_optimizer(model, config.train), {"validation/accuracy": 0.5}, ["5\n"])
        saver.close()
    finally:
        dist.destroy_process_group()
    storage.write_bytes(storage.join(RUN, CONFIG_FILE), to_yaml(config).encode())
    return model


def test_a_pushed_model_loads_from_the_bucket(model, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "jobs" / "checkpoint.py"))["main"]
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "push", RUN, "s3://models/published/first"])
    assert main() == 0
    assert "s3://models/published/first: the model after step 5" in capsys.readouterr().out
    names = storage.names_in("s3://models/published/first")
    assert {"README.md", "config.json", "crosslmm_auto.py", "model.safetensors", "run.yaml"} <= set(names)
    with WeightsSource("s3://models/published/first").local(WEIGHTS) as arguments:
        loaded = AutoModelForImageTextToText.from_pretrained(**arguments, trust_remote_code=False)
    assert type(loaded) is CrossLMMForConditionalGeneration
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
