"""The CrossLMM model as a Transformers model; `crosslmm.auto` registers it with the Auto classes.

Reading order: configuration, modeling, cross_attention, attention_plan, vision_encoder, pooling; cache and generation;
then processing (text and frames to tensors), weights_source and loading (pretrained weights), param_groups,
compilation, and adapters. Tensor names end in their axes (`x_BLD`); each module has a legend.
"""

from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import CrossLMMProcessor

__all__ = ["CrossLMMConfig", "CrossLMMForConditionalGeneration", "CrossLMMProcessor"]
