"""The CrossLMM model as a Transformers model. Importing this package registers it with the Auto classes.

Reading order: configuration, modeling, cross_attention, attention_plan, vision_encoder, pooling; then processing (text
and frames to tensors), weights_source and loading (pretrained weights) and param_groups. Tensor names end in their axes
(`x_BLD`); each module has a legend.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import CrossLMMProcessor

__all__ = ["CrossLMMConfig", "CrossLMMForConditionalGeneration", "CrossLMMProcessor"]

AutoConfig.register(CrossLMMConfig.model_type, CrossLMMConfig)
AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration)
AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor)
