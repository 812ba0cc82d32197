"""Configuration -> model and processor, from random or from published weights."""

import contextlib
import functools
import posixpath
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from crosslmm import storage
from crosslmm.config import BadConfig, ModelConfig
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.processing import CrossLMMProcessor, tiny_tokenizer
from crosslmm.model.vision_encoder import build_tower


@dataclass(frozen=True)
class WeightsSource:
    """Published weights somewhere: a hub name, a local directory, an s3:// folder, or a GGUF file (path or s3://)."""

    uri: str
    revision: str | None = None

    @contextlib.contextmanager
    def local(self) -> Iterator[dict[str, Any]]:
        """The arguments under which `from_pretrained` finds it, for as long as the context lasts."""
        folder, name = self.uri, None
        if self.uri.endswith(".gguf"):
            folder, name = storage.parent(self.uri) or ".", posixpath.basename(self.uri)
        with tempfile.TemporaryDirectory() as fetched:
            if "://" in folder:
                if name:
                    storage.download_file(self.uri, f"{fetched}/{name}")
                else:
                    storage.download(folder, fetched)
                folder = fetched
            arguments: dict[str, Any] = {"pretrained_model_name_or_path": folder}
            if name:
                arguments["gguf_file"] = name
            elif self.revision:
                arguments["revision"] = self.revision
            yield arguments


def build_config(config: ModelConfig, video_token_id: int | None = None) -> CrossLMMConfig:
    """The Transformers configuration of a run's model.

    Raises:
        BadConfig: fields that no such backbone has, or a stride or depth outside of what it allows.
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
    """The fields of a checkpoint's own configuration; a SigLIP of both towers gives its vision tower's."""
    try:
        with WeightsSource(uri, revision).local() as arguments:
            published = AutoConfig.from_pretrained(**arguments)
    except Exception as error:  # a broken file makes its reader raise anything
        raise BadConfig(f"model.{part}_weights: {uri} cannot be read: {_first_line(error)}") from error
    return (
        published.vision_config if part == "vision" and hasattr(published, "vision_config") else published
    ).to_dict()


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
            with WeightsSource(config.tokenizer, config.language_revision).local() as arguments:
                tokenizer = AutoTokenizer.from_pretrained(**arguments)
        except Exception as error:  # a broken file makes its reader raise anything
            raise BadConfig(f"model.tokenizer: {config.tokenizer} cannot be loaded: {_first_line(error)}") from error
    processor = CrossLMMProcessor(
        tokenizer,
        image_size=model.vision_config.image_size,
        tokens_per_frame=model.tokens_per_frame,
        max_length=model.text_config.max_position_embeddings,
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
    except (ValueError, ImportError) as error:  # flash-attn may not be installed
        raise BadConfig(f"model: {_first_line(error)}") from error
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    if not config.vision_weights:
        model.vision_tower.load_state_dict(_random_tower(model_config, seed).state_dict())
    if weights and config.vision_weights:
        source = WeightsSource(config.vision_weights, config.vision_revision)
        _graft("model.vision_weights", model.vision_tower, SiglipVisionModel, source)
    if weights and config.language_weights:
        source = WeightsSource(config.language_weights, config.language_revision)
        _graft("model.language_weights", model.language_model, AutoModelForCausalLM, source)
    if weights and config.init_from:
        _graft("model.init_from", model, CrossLMMForConditionalGeneration, WeightsSource(config.init_from))
    return model


def build_encoder(config: ModelConfig, processor: CrossLMMProcessor, seed: int) -> SiglipVisionModel:
    """The vision tower of `build_model`, in float32, frozen.

    Raises:
        BadConfig: weights that cannot be loaded or do not fit.
    """
    model_config = build_config(config, processor.video_token_id)
    model_config._attn_implementation = config.attention
    if config.init_from:
        tower = build_model(config, processor, seed).vision_tower
    elif config.vision_weights:
        tower = build_tower(model_config.vision_config, config.encoder_chunk)
        source = WeightsSource(config.vision_weights, config.vision_revision)
        _graft("model.vision_weights", tower, SiglipVisionModel, source)
    else:
        tower = _random_tower(model_config, seed)
    return tower.requires_grad_(False).eval()


def _random_tower(config: CrossLMMConfig, seed: int) -> SiglipVisionModel:
    """An encoder without published weights. It depends on nothing but its own shape and the seed: trials of a sweep,
    which differ in what lies behind it, start from the same one, and can read the same features."""
    torch.manual_seed(seed)
    tower = build_tower(config.vision_config, config.encoder_chunk)
    # SigLIP's own 1/sqrt(width) drowns beside the patches of an untrained encoder: where things are is then learnt
    # hundreds of steps later (docs/log.md).
    nn.init.normal_(tower.embeddings.position_embedding.weight)
    return tower


def _graft(key: str, part: nn.Module, auto_class: Any, source: WeightsSource) -> None:
    """Load a checkpoint into one part of the model; a branch of cross-attentions that it has none of stays new."""
    try:
        with source.local() as arguments:
            # Foreign weights are never a pickle (pytorch_model.bin).
            safe = "gguf_file" not in arguments
            theirs = auto_class.from_pretrained(**arguments, dtype=torch.float32, use_safetensors=safe).state_dict()
        # SigLIP's attention-pooling head is never asked.
        theirs = {name: weight for name, weight in theirs.items() if not name.startswith("head.")}
        ours = part.state_dict()
        missing, beyond = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
        for branch in (".v2v.", ".t2v."):
            # A branch that the checkpoint has in no layer starts new.
            if not any(branch in name for name in theirs):
                missing = {name for name in missing if branch not in name}
        if missing:
            raise ValueError(f"it lacks {len(missing)} weights, {min(missing)} first")
        if beyond:
            raise ValueError(
                f"it has {len(beyond)} weights that the configuration has no place for, {min(beyond)} first"
            )
        for name in sorted(ours.keys() & theirs.keys()):
            if theirs[name].shape != ours[name].shape:
                raise ValueError(
                    f"its {name} is {tuple(theirs[name].shape)}, "
                    f"and the configuration asks for {tuple(ours[name].shape)}"
                )
        part.load_state_dict({k: theirs[k] for k in ours.keys() & theirs.keys()}, strict=False)
    except Exception as error:  # a broken file makes its reader raise anything
        raise BadConfig(f"{key}: {source.uri} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
