import numpy as np
import pytest
import torch
from transformers import SiglipVisionModel

from benchmarks import ablation
from crosslmm.data.samples import digits, shapes
from crosslmm.model.loading import build_model, build_processor
from crosslmm.train.optim import component_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the benchmark's clips, and an encoder of a few steps."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "ENCODER_STEPS", 2)
        digits.write_digits(str(folder), train=64, held_out=12)
        ablation.train_encoder(folder)
    return folder


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_arms_differ_only_in_cross_attention(arm):
    config = ablation.configure(arm, seed=0)
    model = build_model(config.model, build_processor(config.model), seed=0)
    bare = ablation.configure("none", seed=0)
    assert model.config.tokens_per_frame == 1
    assert {component_of(name) for name, _ in model.named_parameters()} & {"v2v", "t2v"} == set(ablation.ARMS[arm])
    assert config.train.model_dump(exclude={"learning_rate"}) == bare.train.model_dump(exclude={"learning_rate"})
    assert config.data == bare.data


def test_arm_trains_all_but_the_stored_encoder(folder, monkeypatch):
    trained = []
    monkeypatch.setattr(ablation, "ARM_STEPS", 2)
    monkeypatch.setattr(ablation, "score", lambda model, *_: trained.append(model) or {})
    result = ablation.train_arm(folder, "both", seed=0)
    (model,) = trained
    encoder = SiglipVisionModel.from_pretrained(folder / "encoder").state_dict()
    assert all(torch.equal(weight, encoder[name]) for name, weight in model.vision_tower.state_dict().items())
    assert len(result["gates"]) == 4
    assert all(result["gates"].values())


def test_greedy_answers_are_scored_by_exact_match(folder, monkeypatch):
    config = ablation.configure("none", seed=0)
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=0).eval()
    rows = ablation.clips(folder, "held_out", config.data.num_frames)[0]
    expected = [row["messages"][-1]["content"] for row in rows]
    answers = [" " + answer if i % 3 else "no" for i, answer in enumerate(expected)]
    monkeypatch.setattr(processor, "batch_decode", lambda *_, **__: answers)
    scored = ablation.score(model, processor, folder, config)
    assert scored["accuracy"] == pytest.approx(8 / 12)
    late = [i % 3 > 0 for i, row in enumerate(rows) if row["kind"] == "late digit"]
    assert scored["late"] == pytest.approx(np.mean(late))


def test_labels_of_stills_match_their_patches():
    pixels, digit, colour = ablation.stills(np.random.default_rng(0), digits.load_digits()["train"], 16)
    patches = pixels.float().unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(2).transpose(1, 2)
    # Ground is grey; whatever a digit hides of it, a plate is not.
    spread = (patches.amax(-1) - patches.amin(-1)).reshape(digit.shape)
    assert (spread[digit == 10] == 0).all()
    assert (spread[(digit >= 0) & (digit < 10)] > 5).float().mean() > 0.95
    assert torch.equal(digit == 10, colour == len(digits.PLATES))
    for i, name in enumerate(digits.PLATES):
        channel = int(np.argmax(shapes.COLOURS[name]))
        assert (patches[colour == i].argmax(-1) == channel).float().mean() > 0.9 or name == "magenta"


def test_stored_result_is_not_measured_again(tmp_path):
    calls = []

    def measure(value):
        calls.append(value)
        return {"accuracy": value}

    for _ in range(2):
        assert ablation.load_or_measure(tmp_path / "both-0.json", measure, 0.5) == {"accuracy": 0.5}
    assert calls == [0.5]
