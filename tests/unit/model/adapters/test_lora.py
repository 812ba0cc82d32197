"""Adapters: what learns, PEFT's files in both directions, and adapters of strangers."""

import json
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from crosslmm.cli import parse_run
from crosslmm.config import BadConfig, RunConfig
from crosslmm.data.feature_format import to_bf16
from crosslmm.model import CrossLMMForConditionalGeneration
from crosslmm.model.adapters import lora
from crosslmm.model.adapters.base import Base, open_base, require_no_adapter, weights_digest
from crosslmm.model.loading import build_model
from crosslmm.model.param_groups import component_of, is_of_adapter
from crosslmm.run_folder import ADAPTER_CONFIG_FILE, ADAPTER_FILE, BASE_FILE, BASE_FOLDER
from tests.support.common import ROOT, conversation, open_gates, random_frames

# PEFT 0.21 asks Transformers 5.23 by a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ALL = ["vision", "v2v", "t2v", "decoder"]


def with_adapters(config: RunConfig, targets: list[str], **more) -> RunConfig:
    """Return a run with adapters in these components; those of encoder and decoder that have none are frozen."""
    rates = {part: 0 for part in ("vision", "decoder") if part not in targets}
    train = config.train.model_copy(
        update={
            "lora": config.train.lora.model_copy(update={"rank": 4, "targets": targets, **more}),
            "learning_rate": config.train.learning_rate.model_copy(update=rates),
        }
    )
    return config.model_copy(update={"train": train})


@pytest.fixture
def base(config, processor) -> CrossLMMForConditionalGeneration:
    """Return a model with open gates."""
    model = build_model(config.model, processor, seed=1).eval()
    open_gates(model, 0.4)
    return model


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """Return the folder of the base."""
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def fresh(folder: Path) -> CrossLMMForConditionalGeneration:
    return CrossLMMForConditionalGeneration.from_pretrained(folder).eval()


def learn(model: nn.Module) -> dict[str, torch.Tensor]:
    """Change everything that learns; return it by name."""
    torch.manual_seed(3)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in learning.values():
            parameter += 0.05 * torch.randn_like(parameter)
    return {name: parameter.detach() for name, parameter in learning.items()}


def batch(processor, features: tuple[int, int] | None = None) -> dict:
    videos = [[random_frames(3)], []]
    if features:
        videos = [[to_bf16(np.random.default_rng(0).normal(0, 1, (3, *features)))], []]
    talks = [conversation("Which shape is it?", "red"), conversation("Why?", "so", video=False)]
    inputs = processor(talks, videos, **({"features": features} if features else {}))
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).logits


def trained(base, config, folder: Path, targets: list[str]) -> Path:
    """Train adapters in the base, which it changes, and save them; return their folder."""
    run = with_adapters(config, targets)
    lora.prepare_training(base, run.train)
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    lora.save(adapter, learn(base), run.train.lora, Base(str(folder), weights_digest(folder)))
    return adapter


@pytest.mark.parametrize("targets", [["decoder"], ["vision"], ["v2v", "t2v"], ALL], ids="+".join)
def test_adapters_learn_in_place_of_their_component(config, processor, base, targets):
    run = with_adapters(config, targets)
    inputs = batch(processor)
    before = logits(base, inputs)
    lora.prepare_training(base, run.train)
    assert torch.equal(logits(base, inputs), before)
    rates, adapted = run.train.learning_rate.model_dump(), set()
    for name, parameter in base.named_parameters():
        component = component_of(name)
        if is_of_adapter(name):
            adapted.add(component)
        learns = is_of_adapter(name) if component in targets else rates[component] > 0
        assert parameter.requires_grad == learns, name
        assert not (component == "decoder" and ".layers." not in name and is_of_adapter(name)), name
    assert adapted == set(targets)
    loss = base.train()(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    learning = [(name, parameter) for name, parameter in base.named_parameters() if parameter.requires_grad]
    # The gradient of A is zero while B is.
    assert all(p.grad is not None and (".lora_A." in name or p.grad.any()) for name, p in learning)


def test_the_meta_device_has_the_same_parameters(config, processor, base):
    run = with_adapters(config, ALL)
    with torch.device("meta"):
        empty = build_model(config.model, processor, seed=0, weights=False)
    for model in (base, empty):
        lora.prepare_training(model, run.train)
    shapes = [{name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} for model in (base, empty)]
    assert shapes[0] == shapes[1]
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_dropout_drops_in_training_alone(config, processor, base):
    run = with_adapters(config, ["decoder"], dropout=0.5)
    lora.prepare_training(base, run.train)
    learn(base)
    inputs = batch(processor)
    assert torch.equal(logits(base, inputs), logits(base, inputs))
    base.train()
    with torch.no_grad():
        assert not torch.equal(base(**inputs).logits, base(**inputs).logits)


@pytest.mark.parametrize("targets", [["decoder"], ALL, ["decoder", "v2v"]], ids="+".join)
@pytest.mark.parametrize("from_features", [False, True], ids=["frames", "features"])
def test_peft_alone_loads_what_we_save(config, processor, base, folder, targets, from_features):
    adapter = trained(base, config, folder, targets)
    encoder = base.config
    size = (encoder.patches_per_frame, encoder.vision_config.hidden_size) if from_features else None
    inputs = batch(processor, size)
    expected = logits(base, inputs)
    assert (logits(fresh(folder), inputs) - expected).abs().max() > 0.1
    model = PeftModel.from_pretrained(fresh(folder), adapter)
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-6, rtol=1e-6)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-5, rtol=1e-5)
    whole = {"projector", "v2v", "t2v"} - set(targets)
    assert set(json.loads((adapter / ADAPTER_CONFIG_FILE).read_text())["modules_to_save"]) == whole


def test_the_lines_in_the_docs_load_an_adapter(config, base, folder, monkeypatch):
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "lora.md").read_text(), re.MULTILINE | re.DOTALL)
    adapter = trained(base, config, folder, ["decoder"])
    for name, target in (("captions", folder), ("sports", adapter)):
        (folder.parent / "runs" / name).mkdir(parents=True)
        (folder.parent / "runs" / name / "model").symlink_to(target)
    monkeypatch.chdir(folder.parent)
    names: dict = {}
    exec(lines, names)
    assert isinstance(names["model"], PeftModel)


def test_we_load_and_merge_what_we_save(config, processor, base, folder):
    adapter = trained(base, config, folder, ALL)
    expected = logits(base, batch(processor))
    model = fresh(folder)
    lora.load(model, adapter)
    assert torch.equal(logits(model, batch(processor)), expected)
    lora.merge(model)
    torch.testing.assert_close(logits(model, batch(processor)), expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == fresh(folder).state_dict().keys()
    half = fresh(folder).bfloat16()
    lora.load(half, adapter)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_saving_writes_the_same_bytes_again(config, base, folder, tmp_path):
    adapter = trained(base, config, folder, ["decoder"])
    weights = {name: p.detach() for name, p in base.named_parameters() if p.requires_grad}
    (tmp_path / "again").mkdir()
    lora.save(tmp_path / "again", weights, with_adapters(config, ["decoder"]).train.lora, Base(str(folder), "0"))
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (adapter / name).read_bytes()


@pytest.mark.parametrize("modules", [["q_proj", "v_proj"], "all-linear"], ids=["two", "all"])
def test_we_load_what_peft_alone_has_trained(processor, base, folder, tmp_path, modules):
    theirs = LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, modules_to_save=["v2v"] if modules != "all-linear" else None,
        use_rslora=True, lora_dropout=0.1,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a base without an address, among others
        model = get_peft_model(fresh(folder), theirs)
        learn(model)
        model.save_pretrained(tmp_path / "theirs")
    ours = fresh(folder)
    lora.load(ours, tmp_path / "theirs")
    expected = logits(model, batch(processor))
    torch.testing.assert_close(logits(ours, batch(processor)), expected, atol=1e-6, rtol=1e-6)
    assert (logits(base, batch(processor)) - expected).abs().max() > 0.05


SETTINGS = [
    ({"peft_type": "IA3"}, "not an adapter of the type LORA"),
    ({"peft_type": None}, "not an adapter of the type LORA"),
    ({"use_dora": True}, "use_dora is not supported"),
    ({"rank_pattern": {"(a+)+$": 5}}, "rank_pattern is not supported"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
    ({"eva_config": {"rho": 2}}, "eva_config is not supported"),
    ({"megatron_config": {"x": 1}}, "megatron_config is not supported"),
    ({"layer_replication": [[0, 4]]}, "layer_replication is not supported"),
    ({"new\n\x1b[2J": 1}, "is not supported; only plain LoRA is"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights changed the base"),
    ({"r": 2**40}, "r, lora_alpha or use_rslora"),
    ({"r": 0}, "r, lora_alpha or use_rslora"),
    ({"r": True}, "r, lora_alpha or use_rslora"),
    ({"r": 2**30}, r"is \(4, \d+\), and the model has \(1073741824, \d+\)"),
    ({"lora_alpha": float("nan")}, "r, lora_alpha or use_rslora"),
    ({"lora_alpha": "1"}, "r, lora_alpha or use_rslora"),
    ({"target_modules": "(a+)+$"}, "target_modules is not a list of names"),
    ({"target_modules": [5]}, "target_modules is not a list of names"),
    ({"target_modules": ["x"] * 10_001}, "target_modules is not a list of names"),
    ({"target_modules": ["nonesuch"]}, "the model has none of the layers"),
    ({"target_modules": ["q_proj"]}, "its weights are not those of the model's layers"),
    ({"modules_to_save": ["projector", "v2v"]}, "its weights are not those of the model's layers"),
    ({"modules_to_save": "projector"}, "modules_to_save is not a list of names"),
]


def test_a_setting_beyond_plain_lora_is_one_line(config, base, folder):
    adapter = trained(base, config, folder, ["decoder", "v2v", "t2v"])
    file = adapter / ADAPTER_CONFIG_FILE
    whole = json.loads(file.read_text())
    for change, says in SETTINGS:
        file.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=says) as error:
            lora.load(fresh(folder), adapter)
        assert str(error.value).isprintable()


def test_damaged_files_of_an_adapter_are_one_line(config, base, folder):
    adapter = trained(base, config, folder, ["decoder"])
    config_file, weights_file = adapter / ADAPTER_CONFIG_FILE, adapter / ADAPTER_FILE
    whole, weights = config_file.read_text(), load_file(weights_file)
    for text in ("", "[]", "null", "[" * 100_000, whole[:50]):
        config_file.write_text(text)
        with pytest.raises(ValueError, match=ADAPTER_CONFIG_FILE):
            lora.load(fresh(folder), adapter)
    config_file.write_text(whole)
    for name in ("base_model.model.lm_head.weight", "base_model.model.x\x1b[2J"):
        save_file({**weights, name: torch.ones(2)}, weights_file)
        with pytest.raises(ValueError, match="its weights are not those") as error:
            lora.load(fresh(folder), adapter)
        assert str(error.value).isprintable()
    weights_file.write_bytes(pickle.dumps(weights))
    with pytest.raises(ValueError, match=f"{ADAPTER_FILE} cannot be read"):
        lora.load(fresh(folder), adapter)
    weights_file.unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(weights))
    with pytest.raises(ValueError, match=f"{ADAPTER_FILE} cannot be read"):
        lora.load(fresh(folder), adapter)


def test_an_adapter_behind_a_closed_gate_is_refused(config, processor, base):
    run = with_adapters(config, ["decoder", "t2v"])
    lora.require_open_gates(base, run.train)
    closed = build_model(config.model, processor, seed=0)
    with pytest.raises(BadConfig, match=r"train\.lora\.targets: t2v was never trained, its gates are zero"):
        lora.require_open_gates(closed, run.train)
    lora.require_open_gates(closed, with_adapters(config, ["decoder"]).train)


def test_a_digest_is_that_of_the_weights_however_they_lie(base, folder, tmp_path):
    digest = weights_digest(folder)
    base.save_pretrained(tmp_path / "parts", max_shard_size="1MB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert weights_digest(tmp_path / "parts") == digest
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    changes = {"value": weights[name] + 1e-3, "type": weights[name].bfloat16(), "shape": weights[name].flatten()}
    for change in changes.values():
        save_file({**weights, name: change}, folder / "model.safetensors")
        assert weights_digest(folder) != digest
    save_file({**{k: v for k, v in weights.items() if k != name}, "x": weights[name]}, folder / "model.safetensors")
    assert weights_digest(folder) != digest


def opened(config, run: Path, processor, recorded: Base | None = None) -> tuple[Base, str]:
    with open_base(config, str(run), processor, recorded) as (base, model):
        return base, str(model.init_from)


def from_base(config: RunConfig, folder: Path, **more) -> RunConfig:
    run = with_adapters(config, ["decoder"])
    return run.model_copy(update={"model": run.model.model_copy(update={"init_from": str(folder), **more})})


def test_the_base_is_the_model_that_a_run_starts_from(config, processor, base, folder, tmp_path):
    run = tmp_path / "run"
    # Neither decides what the model computes.
    free = from_base(config, folder, encoder_chunk=1, attention="eager")
    assert opened(free, run, processor) == (Base(str(folder), weights_digest(folder)), str(folder))
    assert not run.exists()


def test_a_run_that_starts_from_no_such_model_writes_its_base(config, processor, base, folder, tmp_path):
    run = tmp_path / "run"
    for number, changed in enumerate([with_adapters(config, ["decoder"]), from_base(config, folder, pool_stride=2)]):
        place = run / str(number)
        found, uri = opened(changed, place, processor)
        assert (found.uri, uri) == (BASE_FOLDER, str(place / BASE_FOLDER))
        assert found.located(str(place)).uri == uri
        expected = build_model(changed.model, processor, config.seed).state_dict()
        written = fresh(place / BASE_FOLDER)
        assert all(torch.equal(value, expected[name]) for name, value in written.state_dict().items())
        assert written.config.pool_stride == changed.model.pool_stride
        assert opened(changed, place, processor, found) == (found, uri)
    file = place / BASE_FOLDER / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert opened(changed, place, processor, found) == (found, uri)
        assert file.read_bytes() == whole


def test_another_base_than_that_of_the_checkpoint_is_refused(config, processor, base, folder, tmp_path):
    run = from_base(config, folder)
    recorded, _ = opened(run, tmp_path / "run", processor)
    with torch.no_grad():
        base.projector[1].weight += 1
    base.save_pretrained(folder)
    with pytest.raises(BadConfig, match=rf"model\.init_from: {folder} is not the model .* {recorded.sha256[:12]}"):
        opened(run, tmp_path / "run", processor, recorded)
    nowhere = from_base(config, tmp_path / "nowhere")
    with pytest.raises(BadConfig, match=r"model\.init_from: .*nowhere cannot be loaded"):
        opened(nowhere, tmp_path / "run", processor, recorded)


def test_weights_to_start_from_are_no_adapter(config, base, folder):
    adapter = trained(base, config, folder, ["decoder"])
    for good in (None, str(folder), "some/name-on-the-hub"):
        require_no_adapter(config.model.model_copy(update={"init_from": good}))
    with pytest.raises(BadConfig, match=r"model\.init_from: .*adapter is an adapter; .*export RUN FOLDER --merge"):
        require_no_adapter(config.model.model_copy(update={"init_from": str(adapter)}))


@pytest.mark.parametrize("text", ["", "[]", '{"uri": "x"}', '{"uri": 1, "sha256": "x"}', "[" * 100_000])
def test_a_broken_base_file_is_refused(text):
    with pytest.raises(ValueError, match=rf"^{BASE_FILE} cannot be read: .+"):
        Base.from_json(text.encode())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--train.lora.rank=0", r"train\.lora\.rank.*greater than or equal to 1"),
        ("--train.lora.rank=4 --train.lora.targets=[decoder,nonsense]", r"train\.lora\.targets.*nonsense"),
        ("--train.lora.rank=4 --train.lora.targets=[]", r"train\.lora\.targets: name at least one component"),
        (
            "--train.lora.rank=4",
            r"train\.lora\.targets: vision would train all of.*train\.learning_rate\.vision to 0",
        ),
        (
            "--train.lora.rank=4 --train.learning_rate.decoder=0 --train.learning_rate.vision=0",
            r"train\.lora\.targets: decoder is frozen; set train\.learning_rate\.decoder",
        ),
        ("--train.lora.rank=4 --train.lora.alpha=0", r"train\.lora\.alpha.*greater than 0"),
        ("--train.lora.dropout=1", r"train\.lora\.dropout.*less than 1"),
    ],
)
def test_impossible_adapters_are_one_line(argv, says):
    with pytest.raises(BadConfig, match=says) as error:
        parse_run(argv.split(), "a test")
    assert "\n" not in str(error.value)
