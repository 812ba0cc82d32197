"""Transformers' own tests of a model (`make conformance`), and why some of them do not apply."""

import unittest

import pytest
import torch

from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration
from tests.support.common import open_gates

pytestmark = pytest.mark.conformance
common = pytest.importorskip("transformers_tests.test_modeling_common", reason="run by `make conformance`")

NOT_APPLICABLE = {
    "test_model_base_model_prefix": "there is no class without a head: the decoder is itself a model with a head",
}
"""Tests that fail, and why. One that starts to pass fails the run."""


class Tester:
    """Makes configurations and inputs. Every sample is text, a video of one frame, and text."""

    is_training = True
    batch_size = 7  # that of the tests that compare kernels; a smaller one they fill up with text of their own
    seq_length = 12
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size, video_token_id = 99, 3

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> CrossLMMConfig:
        return CrossLMMConfig(
            vision_config={
                "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
                "image_size": 16, "patch_size": 4,
            },
            text_config={
                "model_type": "qwen2", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
                "intermediate_size": 37, "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads, "num_key_value_heads": 2,
                "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
            },
            pool_stride=2,
            cross_attention_every=2,
            video_token_id=self.video_token_id,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = torch.randint(self.video_token_id + 1, self.vocab_size, (self.batch_size, self.seq_length))
        input_ids[:, 2 : 2 + config.tokens_per_frame] = self.video_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randint(0, 256, (self.batch_size, 3, 16, 16), dtype=torch.uint8),
            "num_frames": torch.ones(self.batch_size, 1, dtype=torch.int64),
        }


class OpenGates(CrossLMMForConditionalGeneration):
    """With gates at zero the cross-attentions would add nothing, and these tests could not see them fail."""

    def __init__(self, config):
        super().__init__(config)
        open_gates(self)


OpenGates.__name__ = CrossLMMForConditionalGeneration.__name__


class TestCrossLMM(common.ModelTesterMixin, common.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (OpenGates,)
    additional_model_inputs = ("pixel_values", "num_frames")
    _is_composite = True

    def setUp(self) -> None:
        self.model_tester = Tester(self)


# The tests know the kind of a model by this list, to which `register` does not add.
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["crosslmm"] = CrossLMMForConditionalGeneration.__name__
for name, reason in NOT_APPLICABLE.items():
    function = getattr(TestCrossLMM, name)
    setattr(TestCrossLMM, name, pytest.mark.xfail(strict=True, reason=reason)(function))
