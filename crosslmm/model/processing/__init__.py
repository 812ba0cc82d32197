"""The processor: chat messages, videos and images -> the tensors that the model takes.

Reading order: chat (messages to tokens), media (videos and images to frames), frame_tokens (placeholders to the tokens
of frames), batch (samples to padded tensors), processor.
"""

from crosslmm.model.attention_plan import IGNORED
from crosslmm.model.processing.chat import CHAT_TEMPLATE, END_TOKEN, START_TOKEN, VIDEO_TOKEN
from crosslmm.model.processing.processor import CrossLMMProcessor

__all__ = ["CHAT_TEMPLATE", "END_TOKEN", "IGNORED", "START_TOKEN", "VIDEO_TOKEN", "CrossLMMProcessor"]
