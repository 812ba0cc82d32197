"""Configuration -> model and processor, from random or from published weights."""

import tempfile
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from crosslmm import storage
from crosslmm.config import BadConfig, ModelConfig
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import CrossLMMProcessor, tiny_tokenizer


def build_config(config: ModelConfig, video_token_id: int | None = None) -> CrossLMMConfig:
    """The Transformers configuration of a run's model.

    Raises:
        BadConfig: fields that no such backbone has, or a stride or depth outside of what it allows.
    """
    classes = {"vision": SiglipVisionConfig, "language": CONFIG_MAPPING.get(config.language.get("model_type", ""))}
    for key, config_class in classes.items():
        fields = getattr(config_class, "__dataclass_fields__", {})
        unknown = getattr(config, key).keys() - fields.keys() - {"model_type"}
        if fields and unknown:
            raise BadConfig(f"model.{key}.{min(unknown)}: no such field of Transformers' {key} configuration")
    try:
        return CrossLMMConfig(
            vision_config=config.vision,
            text_config=config.language,
            pool_stride=config.pool_stride,
            cross_attention_every=config.cross_attention_every,
            v2v=config.v2v,
            t2v=config.t2v,
            video_token_id=video_token_id,
        )
    except Exception as error:
        raise BadConfig(f"model: {error}") from error


def build_processor(config: ModelConfig) -> CrossLMMProcessor:
    """The processor of a run's model.

    Raises:
        BadConfig: a tokenizer that cannot be loaded, or whose chat tokens the decoder has no embedding for.
    """
    model = build_config(config)
    tokenizer: Any
    if config.tokenizer == "tiny":
        tokenizer = tiny_tokenizer()
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, revision=config.language_revision)
        except (OSError, ValueError) as error:
            raise BadConfig(f"model.tokenizer: {config.tokenizer} cannot be loaded: {error}") from error
    processor = CrossLMMProcessor(
        tokenizer, image_size=model.vision_config.image_size, tokens_per_frame=model.tokens_per_frame
    )
    vocabulary = model.text_config.vocab_size
    if max(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])) >= vocabulary:
        raise BadConfig(
            f"model.tokenizer: {config.tokenizer} has chat tokens beyond model.language.vocab_size {vocabulary}"
        )
    return processor


def build_model(
    config: ModelConfig, processor: CrossLMMProcessor, seed: int, weights: bool = True
) -> CrossLMMForConditionalGeneration:
    """The model in float32, on the default device.

    New parameters start as the decoder's own do (normal, its `initializer_range`), gates at zero; an encoder without
    published weights as SigLIP does, but for its positions (normal, 1).

    Args:
        config: what to build.
        processor: whose video token the model is to know.
        seed: fixes the random weights.
        weights: load the published weights that `config` names; false where only the shapes are wanted.

    Raises:
        BadConfig: weights that cannot be loaded or do not fit.
    """
    torch.manual_seed(seed)
    model_config = build_config(config, processor.video_token_id)
    model_config._attn_implementation = config.attention
    try:
        model = CrossLMMForConditionalGeneration(model_config)
    except ValueError as error:
        raise BadConfig(f"model: {error}") from error
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if not config.vision_weights:
        # SigLIP's own 1/sqrt(width) drowns beside the patches of an untrained encoder: where things are is then learnt
        # hundreds of steps later (docs/log.md).
        nn.init.normal_(model.vision_tower.embeddings.position_embedding.weight)
    if weights and config.vision_weights:
        source = {"pretrained_model_name_or_path": config.vision_weights, "revision": config.vision_revision}
        _graft("model.vision_weights", model.vision_tower, SiglipVisionModel, source)
    if weights and config.language_weights:
        source = {"pretrained_model_name_or_path": config.language_weights, "revision": config.language_revision}
        _graft("model.language_weights", model.language_model, AutoModelForCausalLM, source)
    if weights and config.init_from:
        with tempfile.TemporaryDirectory() as folder:
            storage.download(config.init_from, folder)
            source = {"pretrained_model_name_or_path": folder}
            _graft("model.init_from", model, CrossLMMForConditionalGeneration, source, name=config.init_from)
    return model


def _graft(key: str, part: nn.Module, auto_class: Any, source: dict[str, str | None], name: str | None = None) -> None:
    """Load a checkpoint into one part of the model; cross-attentions that it has none of stay new."""
    name = name or source["pretrained_model_name_or_path"]
    try:
        theirs = auto_class.from_pretrained(**source, dtype=torch.float32).state_dict()
        ours = part.state_dict()
        missing = {k for k in ours.keys() - theirs.keys() if ".v2v." not in k and ".t2v." not in k}
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights, {min(missing)} first")
        part.load_state_dict({k: theirs[k] for k in ours.keys() & theirs.keys()}, strict=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadConfig(f"{key}: {name} cannot be loaded: {str(error)[:300]}") from error
