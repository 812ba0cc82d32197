"""Build the model and the processor from a run's configuration, with random or pretrained weights."""

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from crosslmm.config import BadConfig, DataConfig, ModelConfig
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import END_TOKEN, START_TOKEN, VIDEO_TOKEN, CrossLMMProcessor
from crosslmm.model.vision_encoder import build_vision_encoder
from crosslmm.model.weights_source import CONFIG, TOKENIZER, WEIGHTS, WeightsSource
from crosslmm.text import in_brief


def build_config(config: ModelConfig, video_token_id: int | None = None) -> CrossLMMConfig:
    """Return the Transformers configuration of a run's model.

    Raises:
        BadConfig: a field is unknown to the encoder or decoder, or a value does not fit them.
    """
    vision = config.vision or _published_config("vision", config.vision_weights, config.vision_revision)
    language = config.language or _published_config("language", config.language_weights, config.language_revision)
    classes = {"vision": SiglipVisionConfig, "language": CONFIG_MAPPING.get(language.get("model_type", ""))}
    for key, config_class in classes.items():
        fields = getattr(config_class, "__dataclass_fields__", {})
        unknown = (getattr(config, key) or {}).keys() - fields.keys() - {"model_type"}
        if fields and unknown:
            raise BadConfig(f"model.{key}.{min(unknown)}: no such field of Transformers' {key} configuration")
    try:
        return CrossLMMConfig(
            vision_config=vision,
            text_config=language,
            pool_stride=config.pool_stride,
            pooling=config.pooling,
            cross_attention_every=config.cross_attention_every,
            cross_attention_layers=config.cross_attention_layers,
            v2v=config.v2v,
            t2v=config.t2v,
            v2v_scope=config.v2v_scope,
            cross_attention_rotary=config.cross_attention_rotary,
            encoder_chunk=config.encoder_chunk,
            video_token_id=video_token_id,
        )
    except Exception as error:
        raise BadConfig(f"model: {error}") from error


@functools.cache
def _published_config(part: str, uri: str, revision: str | None) -> dict[str, Any]:
    """Return the configuration stored with pretrained weights; for a two-tower SigLIP, its vision part."""
    try:
        with WeightsSource(uri, revision).local(CONFIG) as arguments:
            published = AutoConfig.from_pretrained(**arguments, trust_remote_code=False)
    except Exception as error:  # a broken file can make its reader raise anything
        raise BadConfig(f"model.{part}_weights: {uri} cannot be read: {in_brief(error)}") from error
    return (
        published.vision_config if part == "vision" and hasattr(published, "vision_config") else published
    ).to_dict()


def build_processor(config: ModelConfig, data: DataConfig | None = None) -> CrossLMMProcessor:
    """Return the processor of a run's model.

    Args:
        config: the `model` section of the run.
        data: its `data` section: video files that the processor reads are sampled as in the run, and frames have times
            in the prompt if they have them there.

    Raises:
        BadConfig: the tokenizer cannot be loaded, or the decoder has no embeddings for its chat tokens.
    """
    model = build_config(config)
    tokenizer: Any
    if config.tokenizer == "tiny":
        tokenizer = tiny_tokenizer()
    else:
        try:
            with WeightsSource(config.tokenizer, config.language_revision).local(TOKENIZER) as arguments:
                tokenizer = AutoTokenizer.from_pretrained(**arguments, trust_remote_code=False)
        except Exception as error:  # a broken file can make its reader raise anything
            raise BadConfig(f"model.tokenizer: {config.tokenizer} cannot be loaded: {in_brief(error)}") from error
    processor = CrossLMMProcessor(
        tokenizer,
        image_size=model.vision_config.image_size,
        tokens_per_frame=model.tokens_per_frame,
        max_length=model.text_config.max_position_embeddings,
        **(data.model_dump(include={"num_frames", "sampling", "fps", "timestamps"}) if data else {}),
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
    """Build the model in float32 on the default device.

    New parameters are initialised like the decoder (normal, its `initializer_range`), gates to zero. An encoder
    without pretrained weights is initialised like SigLIP, except its position embeddings (normal, deviation 1).

    Args:
        config: the `model` section of the run.
        processor: supplies the id of the video placeholder.
        seed: seed of the random weights.
        weights: load the pretrained weights that `config` names; False if only the shapes are needed.

    Raises:
        BadConfig: weights cannot be loaded or do not fit the configuration.
    """
    torch.manual_seed(seed)
    model_config = build_config(config, processor.video_token_id)
    model_config._attn_implementation = config.attention
    try:
        model = CrossLMMForConditionalGeneration(model_config)
    except (ValueError, ImportError) as error:  # flash-attn may not be installed
        raise BadConfig(f"model: {in_brief(error)}") from error
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if not config.vision_weights:
        model.vision_tower.load_state_dict(_random_encoder(model_config, seed).state_dict())
    if weights and config.init_from:  # it has the weights of both parts
        _load_weights("model.init_from", model, CrossLMMForConditionalGeneration, WeightsSource(config.init_from))
        return model
    if weights and config.vision_weights:
        source = WeightsSource(config.vision_weights, config.vision_revision)
        _load_weights("model.vision_weights", model.vision_tower, SiglipVisionModel, source)
    if weights and config.language_weights:
        source = WeightsSource(config.language_weights, config.language_revision)
        _load_weights("model.language_weights", model.language_model, AutoModelForCausalLM, source)
    return model


def build_encoder(config: ModelConfig, processor: CrossLMMProcessor, seed: int) -> SiglipVisionModel:
    """Build the vision encoder of `build_model` alone, in float32, frozen and in eval mode.

    Raises:
        BadConfig: weights cannot be loaded or do not fit the configuration.
    """
    model_config = build_config(config, processor.video_token_id)
    model_config._attn_implementation = config.attention
    if config.init_from:
        tower = build_model(config, processor, seed).vision_tower
    elif config.vision_weights:
        tower = build_vision_encoder(model_config.vision_config, config.encoder_chunk)
        source = WeightsSource(config.vision_weights, config.vision_revision)
        _load_weights("model.vision_weights", tower, SiglipVisionModel, source)
    else:
        tower = _random_encoder(model_config, seed)
    return tower.requires_grad_(False).eval()


def _random_encoder(config: CrossLMMConfig, seed: int) -> SiglipVisionModel:
    """Build an encoder with random weights that depend only on its configuration and the seed.

    So trials of a sweep with different decoders start from the same encoder and can share cached features.
    """
    torch.manual_seed(seed)
    tower = build_vision_encoder(config.vision_config, config.encoder_chunk)
    # SigLIP's own 1/sqrt(width) is too small beside the patch embeddings of an untrained encoder: positions are then
    # learnt hundreds of steps later (docs/log.md).
    nn.init.normal_(tower.embeddings.position_embedding.weight)
    return tower


def _load_weights(key: str, part: nn.Module, auto_class: Any, source: WeightsSource) -> None:
    """Load pretrained weights into `part`; a cross-attention branch that they lack keeps its initial weights.

    Raises:
        BadConfig: weights cannot be loaded, are missing, are left over, or have another shape. Starts with `key`.
    """
    try:
        with source.local(WEIGHTS) as arguments:
            pretrained = auto_class.from_pretrained(
                **arguments,
                dtype=torch.float32,
                attn_implementation="eager",  # the one in their configuration may name code on the hub
                trust_remote_code=False,
                use_safetensors="gguf_file" not in arguments,
            ).state_dict()
        # The attention-pooling head of SigLIP is not used.
        pretrained = {name: weight for name, weight in pretrained.items() if not name.startswith("head.")}
        expected = part.state_dict()
        missing, unexpected = expected.keys() - pretrained.keys(), pretrained.keys() - expected.keys()
        for branch in (".v2v.", ".t2v."):
            # A branch that is missing from every layer was not trained yet; it may start from its initial weights.
            if not any(branch in name for name in pretrained):
                missing = {name for name in missing if branch not in name}
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights, {min(missing)} first")
        if unexpected:
            raise ValueError(
                f"it has {len(unexpected)} weights that the configuration has no place for, {min(unexpected)} first"
            )
        for name in sorted(expected.keys() & pretrained.keys()):
            if pretrained[name].shape != expected[name].shape:
                raise ValueError(
                    f"its {name} is {tuple(pretrained[name].shape)}, "
                    f"and the configuration asks for {tuple(expected[name].shape)}"
                )
        part.load_state_dict({k: pretrained[k] for k in expected.keys() & pretrained.keys()}, strict=False)
    except Exception as error:  # a broken file can make its reader raise anything
        raise BadConfig(f"{key}: {source.uri} cannot be loaded: {in_brief(error)}") from error


# Text from which the BPE of the tiny preset learns the words of the sample set; other text needs more tokens.
TINY_CORPUS = """
What colour is the shape? Which shape is it? Which way does it move? Which colour came first? What happens in the video?
red green blue yellow cyan magenta white black circle square triangle cross left right up down first second then
user assistant system the a an is are does do it in on of to and or which what who where when how
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on `TINY_CORPUS`: deterministic, encodes any text, needs no download."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", START_TOKEN, END_TOKEN, VIDEO_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Repeat each word with and without a leading space, so that it becomes one token.
    words = TINY_CORPUS.split()
    tokenizer.train_from_iterator([f"{word} {word} {word}\n" for word in words] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, pad_token="<|endoftext|>")
