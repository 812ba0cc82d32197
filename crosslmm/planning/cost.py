"""Count parameters and multiply-accumulates of a configuration, on the meta device (without weights)."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from crosslmm.config import BadConfig, LearningRates, ModelConfig, RunConfig
from crosslmm.model.adapters.lora import prepare_training
from crosslmm.model.loading import build_config
from crosslmm.model.modeling import CrossLMMForConditionalGeneration
from crosslmm.model.param_groups import COMPONENTS, component_of

VIDEO, TEXT = 0, 1
"""Token ids of the traced sample: video placeholder and text. Any two different ids work."""


def meta_model(config: ModelConfig) -> CrossLMMForConditionalGeneration:
    """Build the model on the meta device, without weights.

    Raises:
        BadConfig: the model cannot be built.
    """
    model_config = build_config(config, video_token_id=VIDEO)
    # flash-attn need not be installed here: SDPA's flash kernels compute and store the same.
    model_config._attn_implementation = "eager" if config.attention == "eager" else "sdpa"
    try:
        with torch.device("meta"):
            return CrossLMMForConditionalGeneration(model_config)
    except ValueError as error:
        raise BadConfig(f"model: {error}") from error


def training_model(config: RunConfig) -> CrossLMMForConditionalGeneration:
    """Build the model on the meta device as a run trains it: with its adapters, and what does not learn frozen.

    Raises:
        BadConfig: the model cannot be built.
    """
    model = meta_model(config.model)
    prepare_training(model, config.train)
    return model


def positions_of(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0) -> int:
    """Return the length of a sample in the decoder [tokens]; `stamp_tokens` are those of a frame's time."""
    return frames * (model.config.tokens_per_frame + stamp_tokens) + text_tokens


def positions(config: RunConfig, frames: int, text_tokens: int, stamp_tokens: int = 0) -> int:
    """Return the length of a sample in the decoder of a run's model [tokens], see `positions_of`.

    Raises:
        BadConfig: the model cannot be built.
    """
    return positions_of(meta_model(config.model), frames, text_tokens, stamp_tokens)


def check_lengths(
    model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0
) -> None:
    """Raise BadConfig if a sample of `frames` and `text_tokens` is empty or exceeds the decoder's context.

    Raises:
        BadConfig: `frames` or `text_tokens` is below 1, or the sample is longer than the context.
    """
    if frames < 1 or text_tokens < 1:
        raise BadConfig(f"frames is {frames} and text_tokens is {text_tokens}; each must be at least 1")
    positions = positions_of(model, frames, text_tokens, stamp_tokens)
    longest = model.config.text_config.max_position_embeddings
    if positions > longest:
        raise BadConfig(
            f"{frames} frames of {model.config.tokens_per_frame + stamp_tokens} tokens and {text_tokens} of text are "
            f"{positions} "
            f"positions, but the decoder takes {longest} (model.language.max_position_embeddings): "
            "use fewer frames or a larger model.pool_stride"
        )


def longest_sample(config: RunConfig, text_tokens: int, stamp_tokens: int) -> tuple[int, int, int]:
    """Return frames, text tokens and tokens of a frame's time of the longest sample that the decoder takes: one of
    `data.num_frames` and `text_tokens`, or less where that is longer than its context.

    Raises:
        BadConfig: the model cannot be built.
    """
    model = meta_model(config.model)
    stamp_tokens = stamp_tokens if config.data.timestamps else 0
    room, of_frame = model.config.text_config.max_position_embeddings, model.config.tokens_per_frame + stamp_tokens
    frames = max(1, min(config.data.num_frames, (room - 1) // of_frame))
    return frames, max(1, min(text_tokens, room - frames * of_frame)), stamp_tokens


def parameters(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each component; tied weights count once."""
    counts = dict.fromkeys(COMPONENTS, 0)
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def trainable(counts: dict[str, int], rates: LearningRates) -> int:
    """Count the parameters of the components whose learning rate is above zero."""
    return sum(count for component, count in counts.items() if getattr(rates, component) > 0)


def learning(config: RunConfig) -> int:
    """Count the parameters that a run trains.

    Raises:
        BadConfig: the model cannot be built.
    """
    return sum(parameter.numel() for parameter in training_model(config).parameters() if parameter.requires_grad)


@dataclass(frozen=True)
class MACs:
    """Multiply-accumulates (MACs) of the prefill of one sample, with the logits of its text positions.

    The first four are of linear layers and the patch embedding; the paper's Table 6 and Figure 4 call their sum FLOPs.
    """

    encoder: int
    projector: int
    decoder: int
    cross_attention: int
    attention_products: int
    """Score and value products of the encoder, the decoder (without savings for causality), V2V and T2V."""

    @property
    def linear(self) -> int:
        """MACs without the attention products: the paper's measure."""
        return self.encoder + self.projector + self.decoder + self.cross_attention


def macs(model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0) -> MACs:
    """Count the MACs of a prefill from the model's modules: each weight is used once per position that it processes.

    The times of frames (`stamp_tokens` each) are read by the decoder alone: no video is before them.
    Pooling, norms, activations, rotary positions and softmax are not counted: below 0.1 % of the linear layers.
    """
    linear, products = _counts(model, frames, text_tokens, stamp_tokens)
    return MACs(
        encoder=linear["vision"],
        projector=linear["projector"],
        decoder=linear["decoder"],
        cross_attention=linear["v2v"] + linear["t2v"],
        attention_products=products.total(),
    )


def encoder_macs(model: CrossLMMForConditionalGeneration, frames: int) -> int:
    """Count the MACs of the vision encoder, including its attention products."""
    linear, products = _counts(model, frames, text_tokens=1)
    return linear["vision"] + products["vision"]


def _counts(
    model: CrossLMMForConditionalGeneration, frames: int, text_tokens: int, stamp_tokens: int = 0
) -> tuple[Counter[str], Counter[str]]:
    """Count MACs by component: of linear layers (and the patch embedding), and of score and value products."""
    check_lengths(model, frames, text_tokens, stamp_tokens)
    patches, pooled = frames * model.config.patches_per_frame, frames * model.config.tokens_per_frame
    positions = positions_of(model, frames, text_tokens, stamp_tokens)
    v2v_keys = model.config.patches_per_frame if model.config.v2v_scope == "frame" else patches
    # By component: number of queries, number of keys, and number of keys that one query sees.
    sizes = {
        "vision": (patches, patches, model.config.patches_per_frame),
        "projector": (patches + pooled, 0, 0),
        "v2v": (pooled, patches, v2v_keys),
        "t2v": (text_tokens, patches, patches),
        "decoder": (positions, positions, positions),
    }
    linear: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        component, layer = component_of(name), name.rpartition(".")[2]
        queries, keys, keys_per_query = sizes[component]
        times = text_tokens if layer == "lm_head" else keys if layer in ("k_proj", "v_proj") else queries
        linear[component] += module.weight.numel() * times
        if layer == "q_proj":
            products[component] += 2 * module.weight.shape[0] * queries * keys_per_query
    return linear, products
