"""The arguments and outputs that programs written for Transformers use."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

from crosslmm.model import CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.loading import build_model
from tests.support.common import ROOT, conversation, open_gates, random_frames


@pytest.fixture
def model(config, processor):
    model = build_model(config.model, processor, seed=0).eval()
    open_gates(model)
    return model


@pytest.fixture
def batch(processor):
    """With labels; the second sample has no video."""
    talks = [conversation("Which shape is it?", "red circle"), conversation("Why?", "it is", video=False)]
    return processor(talks, [[random_frames(3, 1)], []])


@pytest.fixture
def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_placeholders_without_frames_are_refused(model, inputs):
    blind = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="12 video placeholders, but neither pixel_values nor features are given"):
        model(**blind)
    with pytest.raises(ValueError, match="12 video placeholders"):
        model.generate(**blind, max_new_tokens=2)
    cache = model(input_ids=torch.tensor([[20, 21]]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="4 video placeholders"):
        model(input_ids=torch.tensor([[20] + [model.config.video_token_id] * 4]), past_key_values=cache)


@pytest.mark.parametrize("name", ["images", "pixel_value", "videos", "pixel_values_videos", "cache_position"])
def test_an_unknown_argument_is_refused(model, inputs, name):
    with pytest.raises(TypeError, match=rf"no argument {name}; images and videos are given to the processor"):
        model(**inputs, **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=name):
        model.generate(**inputs, **{name: torch.zeros(1)})


@torch.no_grad()
def test_outputs_are_tuples_on_request(model, batch, inputs):
    (logits,) = model(**inputs, return_dict=False)
    assert torch.equal(logits, model(**inputs).logits)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)


@torch.no_grad()
def test_hidden_states_and_attentions(model, inputs):
    model.set_attn_implementation("eager")
    depth, length = model.config.text_config.num_hidden_layers, inputs["input_ids"].shape[1]
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in out.hidden_states] == [(2, length, 128)] * (depth + 1)
    assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    heads = model.config.text_config.num_attention_heads
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, heads, length, length)] * depth
    torch.testing.assert_close(out.attentions[0].sum(dim=-1), torch.ones(2, heads, length))
    # Each is what the layer got.
    seen = []
    model.language_model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    assert torch.equal(seen[0], out.hidden_states[1])
    some = model(**inputs, output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in some] == [True, *[False] * (depth - 1), True]


@torch.no_grad()
def test_logits_of_chosen_positions(model, inputs):
    logits = model(**inputs).logits
    assert torch.equal(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    positions = torch.tensor([1, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, logits[:, positions])
    mask = inputs["input_ids"] == model.config.video_token_id
    torch.testing.assert_close(model(**inputs, logits_to_keep=mask).logits, logits[mask])


def test_shifted_labels_take_the_place_of_labels(model, batch, inputs):
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(**inputs, shift_labels=shifted).loss, model(**batch).loss)


def test_a_resized_vocabulary_runs(model, batch, inputs):
    with torch.no_grad():
        before = model(**inputs).logits
    embeddings = model.resize_token_embeddings(before.shape[-1] + 8)
    assert model.get_input_embeddings() is embeddings
    assert model.config.text_config.vocab_size == before.shape[-1] + 8
    torch.testing.assert_close(model(**inputs).logits[..., : before.shape[-1]], before)
    model(**batch).loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_reach_every_part(config, processor, batch, reentrant):
    def gradients(checkpointing):
        model = build_model(config.model, processor, seed=0).train()
        open_gates(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batch).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"v2v_scope": "frame", "cross_attention_rotary": True}], ids=str)
def test_an_exported_program_takes_other_videos(config, processor, settings):
    """Other frames, other texts and other numbers of videos, within the shapes that it was exported with."""
    model = build_model(config.model.model_copy(update=settings), processor, seed=0).eval()
    open_gates(model)
    placeholder = model.config.video_token_id
    generator = torch.manual_seed(0)

    def made(layout, num_frames):
        ids = torch.randint(20, 200, (2, 30), generator=generator)
        for sample, start, tokens in layout:
            ids[sample, start : start + tokens] = placeholder
        pixels = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8, generator=generator)
        mask = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": pixels,
            "num_frames": torch.tensor(num_frames),
        }

    example = made([(0, 2, 4), (0, 9, 8), (1, 5, 4)], [[1, 2], [1, 0]])
    program = torch.export.export(model, (), kwargs=example, strict=False).module()
    for inputs in (example, made([(0, 1, 16)], [[4, 0], [0, 0]]), made([(0, 0, 4), (1, 4, 12)], [[1, 0], [3, 0]])):
        torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=2e-5, rtol=1e-4)


def test_the_auto_classes_load_a_saved_model(model, processor, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = model(**inputs).logits
    for auto in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is CrossLMMForConditionalGeneration
        assert torch.equal(loaded(**inputs).logits, expected)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is CrossLMMProcessor


WITHOUT_IMPORT = """
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto in (AutoProcessor, AutoModelForImageTextToText):
    try:
        print(type(auto.from_pretrained({folder!r})))
    except ValueError as error:
        print("refused:", " ".join(str(error).split()))
print(type(AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)).__name__)
"""


def test_without_the_import_nothing_else_is_loaded(model, processor, tmp_path):
    """Transformers would take the tokenizer for the processor; now it says where to look. The folder says how."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    code = WITHOUT_IMPORT.format(folder=str(tmp_path / "model"))
    environment = {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = [line[line.find("refused:") :] for line in done.stdout.splitlines() if "refused:" in line]
    assert len(lines) == 2
    assert all("contains custom code" in line and str(tmp_path / "model") in line for line in lines)
    assert done.stdout.splitlines()[-1] == "CrossLMMProcessor"
    assert "import crosslmm" in (tmp_path / "model" / "crosslmm_auto.py").read_text()


ORDERS = [
    "import crosslmm; from transformers import {name}",
    "from transformers import {name}; import crosslmm",
    "import crosslmm; from transformers import LlamaForCausalLM, {name}",
    "from crosslmm.model import CrossLMMConfig; from transformers import {name}",
]


@pytest.mark.parametrize("name", ["AutoConfig", "AutoModel", "pipeline"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_import_registers_the_model_in_any_order(order, name):
    code = f"{order.format(name=name)}; from transformers import CONFIG_MAPPING; print(CONFIG_MAPPING['crosslmm'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "CrossLMMConfig" in done.stdout, done.stderr
