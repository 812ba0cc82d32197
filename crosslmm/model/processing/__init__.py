"""The processor: chat messages, videos and images -> the tensors that the model takes.

Reading order: chat (messages to tokens), media (videos and images to frames), processor.
"""

from crosslmm.model.processing.chat import CHAT_TEMPLATE, END_TOKEN, START_TOKEN, VIDEO_TOKEN
from crosslmm.model.processing.processor import IGNORED, CrossLMMProcessor

__all__ = ["CHAT_TEMPLATE", "END_TOKEN", "IGNORED", "START_TOKEN", "VIDEO_TOKEN", "CrossLMMProcessor"]
