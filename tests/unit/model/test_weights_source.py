"""Which files of published weights are opened, and which are refused."""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from crosslmm.config import BadConfig
from crosslmm.inference.answerer import Answerer
from crosslmm.model.loading import build_config, build_model, build_processor
from crosslmm.model.weights_source import WEIGHTS, WeightsSource
from tests.support.exports import save_exported

CODE = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class Config(PreTrainedConfig):
    model_type = "strange"
class Model(PreTrainedModel):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model", "AutoProcessor": "strange.Words",
    "AutoModelForImageTextToText": "strange.Model", "AutoTokenizer": ["strange.Words", "strange.Words"],
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(config, processor, tmp_path_factory):
    """Folders as somebody might publish them: `vision`, `language` in two shards, and a whole model."""
    folder = tmp_path_factory.mktemp("published")
    model = build_model(config.model, processor, seed=7)
    model.vision_tower.save_pretrained(folder / "vision")
    model.language_model.save_pretrained(folder / "language", max_shard_size="1MB")
    processor.tokenizer.save_pretrained(folder / "language")
    save_exported(folder / "whole", model, processor, config)
    return folder


@pytest.fixture
def published(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "published")
    return tmp_path / "published"


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def language(config, folder, **more):
    """A model whose language model comes from a folder."""
    return config.model.model_copy(update={"language_weights": str(folder), **more})


def test_sharded_weights_load(config, processor, published):
    assert len(list((published / "language").glob("model-*.safetensors"))) > 1
    loaded = build_model(language(config, published / "language", cross_attention_every=0), processor, seed=0)
    theirs = build_model(config.model, processor, seed=7).language_model.state_dict()
    ours = loaded.language_model.state_dict()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


@pytest.mark.parametrize("load", ["vision_weights", "language_weights", "init_from", "tokenizer", "answer"])
def test_code_of_published_weights_never_runs(config, processor, published, tmp_path, monkeypatch, load):
    """Even where somebody at the terminal would answer yes to Transformers' question."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    mark = tmp_path / "mark"
    folder = published / {"vision_weights": "vision", "language_weights": "language"}.get(load, "whole")
    (folder / "strange.py").write_text(CODE.format(mark=str(mark)))
    changed(folder / "config.json", model_type="strange", auto_map=AUTO_MAP)
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (folder / name).exists():
            changed(folder / name, auto_map=AUTO_MAP, tokenizer_class="Words", processor_class="Words")
    changes = {load: str(folder)} | {load.removesuffix("_weights"): None if load.endswith("_weights") else str(folder)}

    def load_it():
        if load == "answer":
            Answerer(folder, device="cpu")
        elif load == "tokenizer":
            build_processor(config.model.model_copy(update=changes))
        else:
            build_model(config.model.model_copy(update=changes), processor, seed=0)

    with contextlib.suppress(BadConfig, ValueError):
        load_it()
    assert not mark.exists()


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


NO_SHARDS = [
    "pytorch_model.bin", "../outside/model.safetensors", "sub/model.safetensors", "{outside}/model.safetensors",
    ".hidden.safetensors", "model.safetensors\n", "", 5, None, ["model.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("shard", NO_SHARDS)
def test_an_index_names_only_safetensors_of_its_folder(config, processor, published, tmp_path, monkeypatch, shard):
    """The named file exists, and would load or run."""
    outside, folder = published / "outside", published / "vision"
    shutil.copytree(folder, outside)
    shutil.copytree(folder, folder / "sub")
    shard = shard.format(outside=outside) if isinstance(shard, str) else shard
    weights = torch.load
    unpickled = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: unpickled.append(args) or weights(*args, **options))
    names = build_model(config.model, processor, seed=7).vision_tower.state_dict()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "mark")))
    (folder / "model.safetensors").rename(folder / ".hidden.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadConfig, match=r"model\.vision_weights: .*: model\.safetensors\.index\.json (names|cannot)"):
        build_model(config.model.model_copy(update={"vision_weights": str(folder)}), processor, seed=0)
    assert not unpickled


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 5}', "[" * 100_000, '{"weight_map": {"a": "b.bin"}}'])
def test_a_broken_index_is_one_line(config, processor, published, content):
    (published / "vision/model.safetensors").unlink()
    (published / "vision/model.safetensors.index.json").write_text(content)
    with pytest.raises(BadConfig, match=r"model\.vision_weights: .*model\.safetensors\.index\.json (names|cannot)"):
        build_model(config.model.model_copy(update={"vision_weights": str(published / "vision")}), processor, seed=0)


def test_a_shard_that_is_missing_is_named(config, processor, published):
    next((published / "language").glob("model-00002*")).unlink()
    with pytest.raises(BadConfig, match=r"there is no file named model-00002-of-.*, which model\.safetensors\.index"):
        build_model(language(config, published / "language", cross_attention_every=0), processor, seed=0)


def test_a_configuration_does_not_choose_the_weights_file(config, processor, published, tmp_path):
    """Transformers would unpickle `adapter_model.bin`, since `config.json` says so."""
    folder = published / "vision"
    torch.save(build_model(config.model, processor, seed=7).vision_tower.state_dict(), folder / "adapter_model.bin")
    changed(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(BadConfig, match=r"model\.vision_weights: .*adapter_model\.bin"):
        build_model(config.model.model_copy(update={"vision_weights": str(folder)}), processor, seed=0)


def test_a_configuration_does_not_choose_attention_kernels(config, processor, published):
    """They would come from the hub, as code."""
    changed(published / "vision/config.json", attn_implementation="somebody/kernel")
    build_model(config.model.model_copy(update={"vision_weights": str(published / "vision")}), processor, seed=0)


def test_a_tokenizer_configuration_does_not_lead_out_of_its_folder(config, published):
    (published / "language/tokenizer.json").rename(published / "tokenizer.4.0.0.json")
    changed(published / "language/tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    with pytest.raises(BadConfig, match=r"model\.tokenizer: .*tokenizer_config\.json names '\.\./tokenizer\.4\.0\.0"):
        build_processor(language(config, published / "language", tokenizer=str(published / "language")))


def test_a_tokenizer_of_another_version_is_found(config, published):
    (published / "language/tokenizer.json").rename(published / "language/tokenizer.4.0.0.json")
    changed(published / "language/tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.0.json"])
    loaded = build_processor(config.model.model_copy(update={"tokenizer": str(published / "language")}))
    assert (
        loaded.tokenizer("What is red?")["input_ids"]
        == build_processor(config.model).tokenizer("What is red?")["input_ids"]
    )


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "run.yaml"])
def test_links_out_of_a_folder_are_refused(config, processor, published, tmp_path, name):
    folder = published / "whole"
    (tmp_path / "secret").mkdir()
    (folder / name).rename(tmp_path / "secret" / name)
    (folder / name).symlink_to(tmp_path / "secret" / name)
    with pytest.raises(ValueError, match=f"{name} is a link that leads out of the folder"):
        Answerer(folder, device="cpu")
    if name == "tokenizer.json":
        with pytest.raises(BadConfig, match=r"model\.tokenizer: .*tokenizer\.json is a link"):
            build_processor(config.model.model_copy(update={"tokenizer": str(folder)}))
    elif name != "run.yaml":
        with pytest.raises(BadConfig, match=rf"model\.init_from: .*{name} is a link"):
            build_model(config.model.model_copy(update={"init_from": str(folder)}), processor, seed=0)


def test_a_link_within_the_folder_is_followed(config, processor, published):
    (published / "vision/model.safetensors").rename(published / "vision/real.safetensors")
    (published / "vision/model.safetensors").symlink_to("real.safetensors")
    (published / "way").symlink_to("vision")
    build_model(config.model.model_copy(update={"vision_weights": str(published / "way")}), processor, seed=0)


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """The hub's cache on this machine with the weights `org/vision`, whose files are links to blobs; no network."""
    commit = "0" * 40
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--vision"
    shutil.copytree(published / "vision", repository / "blobs")
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for blob in (repository / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_weights_of_the_hub_load_by_name_and_from_its_cache(config, processor, hub):
    theirs = build_model(config.model, processor, seed=7).vision_tower.state_dict()
    for source in ({"vision_weights": "org/vision", "vision_revision": hub.name}, {"vision_weights": str(hub)}):
        built = build_model(config.model.model_copy(update={"vision": None, **source}), processor, seed=0)
        assert all(torch.equal(theirs[name], weight) for name, weight in built.vision_tower.state_dict().items())
    with pytest.raises(BadConfig, match=r"model\.vision_weights: org/nothing cannot be (read|loaded)"):
        build_config(config.model.model_copy(update={"vision": None, "vision_weights": "org/nothing"}))


def test_an_index_of_the_hub_names_only_safetensors(config, processor, hub, tmp_path):
    blobs = hub.parent.parent / "blobs"
    (blobs / "model.safetensors").rename(tmp_path / "model.safetensors")
    (hub / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": f"../../../../../{tmp_path.name}/model.safetensors"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    for source in ({"vision_weights": "org/vision", "vision_revision": hub.name}, {"vision_weights": str(hub)}):
        with pytest.raises(BadConfig, match=r"model\.safetensors\.index\.json names"):
            build_model(config.model.model_copy(update=source), processor, seed=0)


def test_a_folder_that_only_looks_like_the_hub_s_cache(config, processor, hub, tmp_path):
    blobs = hub.parent.parent / "blobs"
    blobs.rename(tmp_path / "secret")
    blobs.symlink_to(tmp_path / "secret")
    with pytest.raises(BadConfig, match="is a link that leads out of the folder"):
        build_model(config.model.model_copy(update={"vision_weights": str(hub)}), processor, seed=0)


def test_a_gguf_file_may_be_a_link_and_comes_alone(tmp_path):
    (tmp_path / "stored").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "newest.gguf").symlink_to("stored")
    with WeightsSource(str(tmp_path / "newest.gguf")).local(WEIGHTS) as arguments:
        assert arguments["gguf_file"] == "newest.gguf"
        (only,) = Path(arguments["pretrained_model_name_or_path"]).iterdir()
        assert (only.name, only.read_bytes()) == ("newest.gguf", b"GGUF")
