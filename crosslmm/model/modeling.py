"""The CrossLMM model: only pooled visual tokens go through the decoder, which attends to all the original ones.

Axis suffixes: B sample, M video of a sample, F frame (of all samples, concatenated), P patch, V pooled visual token,
L position in the sequence, D width, N labelled position, C H W channel, height and width of a frame.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from crosslmm.model.attention_plan import plan_t2v, plan_v2v
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.cross_attention import DualCrossAttentionLayer, VisualContext
from crosslmm.model.pooling import pool
from crosslmm.model.vision_encoder import build_vision_encoder, encode, in_chunks

LOSS_CHUNK = 1024
"""Labelled positions whose logits are in memory at a time: 0.6 GB in float32 with Qwen's vocabulary."""


class Projector(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear: (..., vision width) -> (..., text width)."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(
            nn.LayerNorm(vision_width),
            nn.Linear(vision_width, text_width),
            nn.GELU(),
            nn.Linear(text_width, text_width),
        )


class CrossLMMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model of arXiv 2505.17020: SigLIP, a projector, and a decoder with a dual cross-attention every K layers.

    `language_model` is the pretrained decoder and keeps its state-dict keys. While all gates are zero the model is
    exactly that decoder, applied to [pooled visual tokens; text]. For a sample without frames it always is.
    """

    config: CrossLMMConfig
    config_class = CrossLMMConfig
    main_input_name = "input_ids"
    input_modalities = ["video", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CrossLMMConfig) -> None:
        super().__init__(config)
        text = config.text_config
        if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ValueError(f"{text.model_type} with sliding attention: only full attention is supported")
        self.vision_tower = build_vision_encoder(config.vision_config, config.encoder_chunk)
        self.projector = Projector(config.vision_config.hidden_size, text.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
        layers = self.language_model.model.layers
        for i in config.dual_layers:
            layers[i] = DualCrossAttentionLayer(
                layers[i], text, i, v2v=config.v2v, t2v=config.t2v, rotary=config.cross_attention_rotary
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the decoder."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's output projection (`lm_head`)."""
        return self.language_model.get_output_embeddings()

    def encode(self, pixels_FCHW: Tensor) -> Tensor:
        """Encode frames: uint8 (F, 3, image_size, image_size) -> visual tokens (F, P, D) in the encoder's dtype."""
        side = self.config.vision_config.image_size
        if pixels_FCHW.dtype != torch.uint8 or pixels_FCHW.shape[1:] != (3, side, side):
            raise ValueError(
                f"frames are {pixels_FCHW.dtype} {tuple(pixels_FCHW.shape)}; "
                f"the encoder takes uint8 (frames, 3, {side}, {side})"
            )
        return encode(self.vision_tower, pixels_FCHW, self.config.encoder_chunk)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        num_frames: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss if `labels` are given, and otherwise the logits.

        Args:
            input_ids: int64 (B, L). It has `config.video_token_id` once per pooled token, frame after frame.
            pixel_values: uint8 (F, 3, H, W), the frames of all samples, concatenated. May be empty; may be None with
                a cache that already holds them.
            features: (F, P, D) in any float dtype: the output of `encode`, given instead of the frames; the encoder
                does not run. A batch without frames has F = 0, so that all ranks run the same modules.
            num_frames: int64 (B, M), frames of each video (an image is a video of one frame); zero pads samples with
                fewer videos. With a cache, of the full conversation.
            attention_mask: int64 or bool (B, L or longer with a cache), zero at padding.
            past_key_values: cache of the decoder and of the videos' keys and values; `generate` creates it.
            labels: int64 (B, L), -100 at positions without loss. Shifted by one here.
            num_items_in_batch: divisor of the summed loss; default: the number of labels in this batch.
            logits_to_keep: compute logits for this many last positions only; 0 for all.

        Returns:
            With `labels`: `loss` (float32 scalar) and no logits (they are computed only at labels, in chunks).
            Without: `logits` (B, L, vocabulary).

        Raises:
            ValueError: frames and placeholders do not match, or the sequence is longer than the decoder's context.
        """
        if past_key_values is None and use_cache:
            past_key_values = self._new_cache()
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        self._check_length(seen + input_ids.shape[1])
        is_video_BL = input_ids.eq(cast(int, self.config.video_token_id))
        if seen:
            if (pixel_values is not None or features is not None) and is_video_BL.any():
                raise ValueError(
                    "the cache is not empty, so no further video can be added; start again with the full conversation"
                )
            pixel_values = features = None
        # The embedding of a placeholder is overwritten, and its id may lie outside the decoder's vocabulary.
        x_BLD = self.get_input_embeddings()(input_ids.masked_fill(is_video_BL, 0))

        tokens_FPD = None
        frames_or_features = pixel_values if features is None else features
        if frames_or_features is not None:
            if num_frames is None:
                kind = "pixel_values" if features is None else "features"
                raise ValueError(f"{kind} are given without num_frames; pass the number of frames of each video")
            self._check_frames(is_video_BL, num_frames, frames_or_features.shape[0])
            features_FPD = (
                self.encode(frames_or_features) if features is None else self._cast_features(frames_or_features)
            )
            pooled_FVD = self.projector(pool(features_FPD, self.config.pool_stride, self.config.pooling))
            x_BLD = x_BLD.masked_scatter(is_video_BL[:, :, None], pooled_FVD.to(x_BLD.dtype))
            if self.config.dual_layers:
                tokens_FPD = in_chunks(self.projector, features_FPD, self.config.encoder_chunk)
            del features_FPD
        visual = None
        if num_frames is not None and self.config.dual_layers:
            visual = self._visual_context(tokens_FPD, num_frames, is_video_BL, attention_mask)

        x_BLD = self._decode(x_BLD, attention_mask, position_ids, past_key_values, visual)
        loss = logits = None
        if labels is not None:
            loss = self._loss(x_BLD, labels, num_items_in_batch)
        else:
            logits = self.get_output_embeddings()(x_BLD[:, -logits_to_keep:])
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _cast_features(self, features_FPD: Tensor) -> Tensor:
        """Check the shape of precomputed features and cast them to the dtype of the projector."""
        per_frame = (self.config.patches_per_frame, self.config.vision_config.hidden_size)
        if not features_FPD.is_floating_point() or features_FPD.shape[1:] != per_frame:
            raise ValueError(
                f"features are {features_FPD.dtype} {tuple(features_FPD.shape)}; "
                f"the encoder gives floats (frames, {per_frame[0]}, {per_frame[1]})"
            )
        return features_FPD.to(next(self.projector.parameters()).dtype)

    def _check_length(self, length: int) -> None:
        limit = self.config.text_config.max_position_embeddings
        if length > limit:
            raise ValueError(
                f"the sequence has {length} positions, but the decoder takes {limit} (max_position_embeddings): "
                f"use less text, fewer frames or a larger pool_stride (now {self.config.tokens_per_frame} tokens/frame)"
            )

    def _check_frames(self, is_video_BL: Tensor, num_frames_BM: Tensor, num_given: int) -> None:
        tokens = self.config.tokens_per_frame
        if (expected := int(num_frames_BM.sum())) != num_given:
            raise ValueError(f"num_frames adds up to {expected}, but {num_given} frames were given")
        placeholders_B, expected_B = is_video_BL.sum(dim=1), num_frames_BM.sum(dim=1) * tokens
        if not torch.equal(placeholders_B, expected_B):
            b = int((placeholders_B != expected_B).nonzero()[0])
            raise ValueError(
                f"sample {b}: the text has {int(placeholders_B[b])} video placeholders, "
                f"but {int(num_frames_BM[b].sum())} frames of {tokens} tokens need {int(expected_B[b])}"
            )

    def _visual_context(
        self, tokens_FPD: Tensor | None, num_frames_BM: Tensor, is_video_BL: Tensor, attention_mask: Tensor | None
    ) -> VisualContext:
        """Plan which positions attend to which visual tokens in V2V and T2V."""
        is_text_BL = ~is_video_BL
        if attention_mask is not None:
            is_text_BL &= attention_mask[:, -is_text_BL.shape[1] :].bool()
        per_frame = (self.config.tokens_per_frame, self.config.patches_per_frame)
        return VisualContext(
            tokens_FPD,
            self.config.encoder_chunk,
            # Once the videos are cached the sequence has no placeholders, and V2V no queries.
            plan_v2v(is_video_BL, num_frames_BM * (tokens_FPD is not None), *per_frame, self.config.v2v_scope),
            plan_t2v(is_video_BL, is_text_BL, num_frames_BM, *per_frame),
        )

    def _decode(
        self,
        x_BLD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: EncoderDecoderCache | None,
        visual: VisualContext | None,
    ) -> Tensor:
        """Run the layers of the decoder, passing the visual context to those with cross-attention."""
        decoder = self.language_model.model
        self_attention_cache = past_key_values.self_attention_cache if past_key_values is not None else None
        if position_ids is None:
            seen = self_attention_cache.get_seq_length() if self_attention_cache is not None else 0
            position_ids = torch.arange(seen, seen + x_BLD.shape[1], device=x_BLD.device)[None]
        attention = {
            "attention_mask": create_causal_mask(
                config=decoder.config,
                inputs_embeds=x_BLD,
                attention_mask=attention_mask,
                past_key_values=self_attention_cache,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "position_embeddings": decoder.rotary_emb(x_BLD, position_ids),
        }
        for layer in decoder.layers:
            if isinstance(layer, DualCrossAttentionLayer):
                x_BLD = layer(x_BLD, visual=visual, past_key_values=past_key_values, **attention)
            else:
                x_BLD = layer(x_BLD, past_key_values=self_attention_cache, **attention)
        return decoder.norm(x_BLD)

    def _loss(self, x_BLD: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Next-token cross-entropy in float32 over the labelled positions only, `LOSS_CHUNK` of them at a time."""
        targets = labels[:, 1:]
        has_label = targets != -100
        chunks = list(
            zip(x_BLD[:, :-1][has_label].split(LOSS_CHUNK), targets[has_label].split(LOSS_CHUNK), strict=True)
        )
        if len(chunks) == 1:
            total = self._cross_entropy(*chunks[0])
        else:
            # Recompute the logits of each chunk in the backward pass instead of storing all of them.
            parts = [checkpoint(self._cross_entropy, x, y, use_reentrant=False) for x, y in chunks]
            total = torch.stack(parts).sum()
        return total / (has_label.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _cross_entropy(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(x_ND).float()
        return nn.functional.cross_entropy(logits, targets_N, reduction="sum")

    def _new_cache(self) -> EncoderDecoderCache:
        return EncoderDecoderCache(DynamicCache(config=self.config.text_config), DynamicCache())

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """`GenerationMixin.generate`, with a cache for the decoder and for the keys and values of the videos.

        Raises:
            ValueError: `num_beams` or `num_return_sequences` is above 1.
        """
        given = [vars(kwargs.get("generation_config") or self.generation_config), kwargs]
        if max(options.get(key) or 1 for options in given for key in ("num_beams", "num_return_sequences")) > 1:
            raise ValueError("num_beams and num_return_sequences above 1 are not supported: frames are not repeated")
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache", True):
            kwargs["past_key_values"] = self._new_cache()
        return super().generate(inputs, **kwargs)  # type: ignore[misc]
