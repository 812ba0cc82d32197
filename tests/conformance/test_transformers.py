"""Transformers' own tests of a model (`make conformance`), and why some of them do not apply."""

import functools
import unittest
from typing import Any
from unittest import mock

import pytest
import torch

from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration
from crosslmm.model.generation import VideoGenerationMixin
from tests.support.common import open_gates

pytestmark = pytest.mark.conformance
common = pytest.importorskip("transformers_tests.test_modeling_common", reason="run by `make conformance`")

NOT_APPLICABLE = {
    "test_model_base_model_prefix": "there is no class without a head: the decoder is itself a model with a head",
}
"""Tests that fail, and why. One that starts to pass fails the run."""
TEXT_ONLY = {
    "test_generate_from_random_inputs_embeds",
    "test_eager_padding_matches_padding_free_with_position_ids",
    "test_sdpa_padding_matches_padding_free_with_position_ids",
}
"""Tests that drop the frames and keep the rest of the inputs. They get text, as placeholders alone are refused."""
EXPECT_A_CACHE = {"test_generate_continue_from_past_key_values", "test_generate_continue_from_inputs_embeds"}
"""Tests that skip a model whose forward pass returns no cache unasked, or whose `use_cache` is in `text_config`."""


class Tester:
    """Makes configurations and inputs. Every sample is text, a video of one frame, and text; or text after padding."""

    is_training = True
    batch_size = 7  # that of the tests that compare kernels; a smaller one they fill up with text of their own
    seq_length = 12
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    vocab_size, video_token_id = 99, 3

    def __init__(self, parent: unittest.TestCase, text_only: bool) -> None:
        self.parent, self.text_only = parent, text_only

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
        if self.text_only:
            attention_mask = torch.arange(self.seq_length) >= torch.arange(self.batch_size)[:, None]
            return config, {"input_ids": input_ids, "attention_mask": attention_mask.long()}
        input_ids[:, 2 : 2 + config.tokens_per_frame] = self.video_token_id
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.randint(0, 256, (self.batch_size, 3, 16, 16), dtype=torch.uint8),
            "num_frames": torch.ones(self.batch_size, 1, dtype=torch.int64),
        }


class OpenGates(CrossLMMForConditionalGeneration, VideoGenerationMixin):  # a test reads the names of its bases
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
        name = self._testMethodName
        self.model_tester = Tester(self, name in TEXT_ONLY)
        if name in EXPECT_A_CACHE:
            cached = functools.partialmethod(OpenGates.forward, use_cache=True)
            self.enterContext(mock.patch.object(OpenGates, "forward", cached))
            self.enterContext(mock.patch.object(CrossLMMConfig, "use_cache", True, create=True))
        if name == "test_left_padding_compatibility":
            # The test takes a model with a setting named `encoder...` for an encoder-decoder, and skips it.
            self.enterContext(mock.patch.object(CrossLMMConfig, "to_dict", _without_encoder_chunk))


def _without_encoder_chunk(config: CrossLMMConfig, to_dict: Any = CrossLMMConfig.to_dict) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key != "encoder_chunk"}


# The tests know the kind of a model by this list, to which `register` does not add.
common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["crosslmm"] = CrossLMMForConditionalGeneration.__name__
for name, reason in NOT_APPLICABLE.items():
    function = getattr(TestCrossLMM, name)
    setattr(TestCrossLMM, name, pytest.mark.xfail(strict=True, reason=reason)(function))
