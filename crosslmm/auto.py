"""Registers the model with Transformers' Auto classes, and lets its processor read files. Imported by the package."""

import functools
from dataclasses import asdict

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto import modeling_auto

from crosslmm.config import DataConfig
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.model import CrossLMMConfig, CrossLMMForConditionalGeneration, CrossLMMProcessor
from crosslmm.model.configuration import AUTO_MODEL_CLASSES
from crosslmm.model.processing.media import Frames, Sampling, set_file_reader

AutoConfig.register(CrossLMMConfig.model_type, CrossLMMConfig)
AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor)
for name in AUTO_MODEL_CLASSES:
    getattr(modeling_auto, name).register(CrossLMMConfig, CrossLMMForConditionalGeneration)


@functools.cache
def _decoder(side: int, sampling: Sampling) -> Decoder:
    return Decoder(DataConfig.model_validate(asdict(sampling)), side)


def _read_file(uri: str, side: int, sampling: Sampling) -> Frames:
    (video,) = _decoder(side, sampling)([uri])
    if isinstance(video, VideoFailure):
        raise ValueError(f"{uri}: {video.reason}")
    return Frames(video.images, video.times.tolist())


set_file_reader(_read_file)
