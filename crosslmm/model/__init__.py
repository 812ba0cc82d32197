"""The model, as Transformers knows it. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import CrossLMMProcessor

__all__ = ["CrossLMMConfig", "CrossLMMForConditionalGeneration", "CrossLMMProcessor"]

AutoConfig.register(CrossLMMConfig.model_type, CrossLMMConfig)
AutoModelForImageTextToText.register(CrossLMMConfig, CrossLMMForConditionalGeneration)
AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor)
