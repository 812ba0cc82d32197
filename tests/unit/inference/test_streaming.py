"""Streamed answers are those of the whole model, and take memory for one part of the frames."""

import numpy as np
import pytest
import torch

from crosslmm.cli import parse_run
from crosslmm.inference import streaming
from crosslmm.inference.streaming import stream_answer
from crosslmm.model.generation import greedy_answers
from crosslmm.model.loading import build_model, build_processor
from tests.support.common import open_gates

FRAMES = 11
VARIANTS = {
    "video": {},
    "frame": {"model.v2v_scope": "frame"},
    "rotary": {"model.cross_attention_rotary": "true"},
    "t2v alone": {"model.v2v": "false", "train.learning_rate.v2v": "0"},
    "none": {"model.cross_attention_every": "0", "train.learning_rate.v2v": "0", "train.learning_rate.t2v": "0"},
}
ASKED = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which colour came first?"}]}]


def built(variant):
    config = parse_run([f"--{key}={value}" for key, value in VARIANTS[variant].items()], "")
    processor = build_processor(config.model)
    model = build_model(config.model, processor, seed=3).eval()
    open_gates(model, 0.8)
    return model, processor


def features_of(model, frames, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (frames, model.config.patches_per_frame, model.config.vision_config.hidden_size)
    return torch.randn(shape, generator=generator)


def whole(model, processor, features, tokens):
    """The answer of the model that has all features at once."""
    prompts = processor([ASKED], [[np.zeros((len(features), 1, 1), np.uint16)]], for_generation=True, features=(1, 1))
    prompts["features"] = features
    return greedy_answers(model, processor, prompts, tokens)[0]


@pytest.mark.parametrize("part", [1, 4, 64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_answers_are_those_of_the_whole_model(variant, part):
    model, processor = built(variant)
    answers = set()
    for seed in range(3):
        features = features_of(model, FRAMES, seed)
        answer = stream_answer(model, processor, ASKED, features, 8, part)
        assert answer == whole(model, processor, features, 8)
        answers.add(answer)
    assert len(answers) > 1 or variant == "none"  # they depend on the frames


@pytest.mark.parametrize("variant", ["video", "frame", "rotary"])
def test_streamed_logits_are_those_of_the_whole_model(variant):
    """Random weights answer alike for different logits."""
    model, processor = built(variant)
    features = features_of(model, FRAMES)
    prompts = processor([ASKED], [[np.zeros((FRAMES, 1, 1), np.uint16)]], for_generation=True, features=(1, 1))
    prompts["features"] = features
    with torch.no_grad():
        expected = model(**prompts, logits_to_keep=1).logits[0, -1]
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[-1][0, -1]))
    stream_answer(model, processor, ASKED, features, 1, chunk_frames=3)
    torch.testing.assert_close(seen[0], expected, atol=1e-4, rtol=1e-4)


def test_a_part_is_on_the_device_at_a_time(monkeypatch):
    """No tensor of the patches of all frames is ever made."""

    class WatchedFeatures:
        def __init__(self, features):
            self.features, self.largest = features, 0

        def __len__(self):
            return len(self.features)

        def __getitem__(self, frames):
            part = self.features[frames]
            self.largest = max(self.largest, len(part))
            return part

    monkeypatch.setattr(streaming, "MAX_SCORES", 4096)
    model, processor = built("video")
    features = WatchedFeatures(features_of(model, FRAMES))
    sizes = []

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(tensor.numel() for tensor in [out] if isinstance(tensor, torch.Tensor))
            return out

    with Sizes():
        stream_answer(model, processor, ASKED, features, 2, chunk_frames=2)
    assert features.largest == 2
    patches = model.config.patches_per_frame * FRAMES
    width = model.config.text_config.hidden_size
    assert max(sizes) < patches * width


def test_a_video_beyond_the_context_is_refused():
    model, processor = built("video")
    with pytest.raises(ValueError, match="positions, and the decoder has 2048"):
        stream_answer(model, processor, ASKED, features_of(model, 200), 4)


def test_answers_end_at_the_end_token(monkeypatch):
    model, processor = built("video")
    end = processor.tokenizer.eos_token_id
    monkeypatch.setattr(streaming._Decoder, "prefill", lambda self: processor.tokenizer.encode("red")[0])
    monkeypatch.setattr(streaming._Decoder, "step", lambda self, token: end)
    assert stream_answer(model, processor, ASKED, features_of(model, 2), 8) == "red"
