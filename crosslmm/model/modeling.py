"""The CrossLMM model: only pooled visual tokens go through the decoder, which attends to all the original ones.

Axis suffixes: B sample, M video of a sample, F frame (of all samples, concatenated), P patch, V pooled visual token,
L position in the sequence, D width, N labelled position, C H W channel, height and width of a frame.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from crosslmm.model.attention_plan import IGNORED, VideoPlan, plan_densely, plan_t2v, plan_v2v, plan_videos
from crosslmm.model.configuration import CrossLMMConfig
from crosslmm.model.cross_attention import DualCrossAttentionLayer, VisualContext
from crosslmm.model.generation import VideoGenerationMixin
from crosslmm.model.pooling import pool
from crosslmm.model.vision_encoder import build_vision_encoder, encode, in_chunks

LOSS_CHUNK = 1024
"""Labelled positions whose logits are in memory at a time: 0.6 GB in float32 with Qwen's vocabulary."""
SHARD_SIZE = "1GB"
"""Size of a file of saved weights, at most: MLflow's server holds a file twice in memory while it passes it on. One
tensor is never split."""


class Projector(nn.Sequential):
    """LayerNorm, Linear, GELU, Linear: (..., vision width) -> (..., text width)."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(
            nn.LayerNorm(vision_width),
            nn.Linear(vision_width, text_width),
            nn.GELU(),
            nn.Linear(text_width, text_width),
        )


class CrossLMMForConditionalGeneration(PreTrainedModel, VideoGenerationMixin):
    """The model of arXiv 2505.17020: SigLIP, a projector, and a decoder with a dual cross-attention every K layers.

    `language_model` is the pretrained decoder and keeps its state-dict keys. While all gates are zero the model is
    exactly that decoder, applied to [pooled visual tokens; text]. For a sample without frames it always is.
    """

    config: CrossLMMConfig
    config_class = CrossLMMConfig
    main_input_name = "input_ids"
    input_modalities = ["video", "image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"attentions": "self_attn"}  # noqa: RUF012
    _no_split_modules = ["ChunkedEncoderLayer", "DualCrossAttentionLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the decoder."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder's output projection (`lm_head`)."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's output projection (`lm_head`)."""
        self.language_model.set_output_embeddings(value)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        """Save the model as Transformers does, in files of `SHARD_SIZE` unless `max_shard_size` says otherwise."""
        super().save_pretrained(save_directory, **{"max_shard_size": SHARD_SIZE, **options})

    def encode(self, pixels_FCHW: Tensor) -> Tensor:
        """Encode frames: uint8 (F, 3, image_size, image_size) -> visual tokens (F, P, D) in the encoder's dtype."""
        side = self.config.vision_config.image_size
        if pixels_FCHW.dtype != torch.uint8 or pixels_FCHW.shape[1:] != (3, side, side):
            raise ValueError(
                f"frames are {pixels_FCHW.dtype} {tuple(pixels_FCHW.shape)}; "
                f"the encoder takes uint8 (frames, 3, {side}, {side})"
            )
        return encode(self.vision_tower, pixels_FCHW, self.config.encoder_chunk)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        num_frames: Tensor | None = None,
        plan: VideoPlan | None = None,
        frame_exchange: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        loss_rows: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | int | list[int] | None = None,
        output_attentions: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return the loss if `labels` are given, and otherwise the logits.

        Args:
            input_ids: int64 (B, L). It has `config.video_token_id` once per pooled token, frame after frame.
            pixel_values: uint8 (F, 3, H, W), the frames of all samples, concatenated. May be empty; not needed with a
                cache that already holds them.
            features: (F, P, D) in any float dtype: the output of `encode`, given instead of the frames; the encoder
                does not run. A batch without frames has F = 0, so that all ranks run the same modules.
            num_frames: int64 (B, M), frames of each video (an image is a video of one frame); zero pads samples with
                fewer videos.
            plan: attention plan of the same batch, from the processor. Without it, or if `input_ids` are longer by now,
                the model makes one, for which the host waits for `input_ids`, `attention_mask` and `num_frames`.
            frame_exchange: encodes the frames together with other ranks: called with `encode` and `pixel_values`, it
                returns what `encode` alone would. Without it, the frames are encoded here.
            attention_mask: int64 or bool (B, L or longer with a cache), zero at padding.
            position_ids: int64 (1 or B, L), rotary positions of the decoder; by default they follow those in the cache.
            past_key_values: cache of the decoder, of any class; it also remembers the videos.
            inputs_embeds: (B, L, D), instead of the embeddings of `input_ids`. With both, `input_ids` only say where
                the placeholders are; without `input_ids`, the placeholders are the positions that have the embedding of
                `video_token_id`.
            use_cache: return a cache; default: only if one is given.
            labels: int64 (B, L), -100 at positions without loss. Shifted by one here.
            loss_rows: int64 (N,), positions in the flattened batch whose next token has a label, if the host knows
                them; it waits for them otherwise.
            num_items_in_batch: divisor of the summed loss; default: the number of labels in this batch.
            logits_to_keep: compute logits for this many last positions only, or for the positions of a tensor; 0: all.
            output_hidden_states: return the hidden states before each layer and after the last; a list selects some.
            output_attentions: return the self-attention weights of the decoder; needs eager attention.
            options: `return_dict`; `shift_labels`, labels that are shifted already (sequence parallelism) and take the
                place of `labels`. Anything else is an error.

        Returns:
            With `labels`: `loss` (float32 scalar) and no logits (they are computed only at labels, in chunks).
            Without: `logits` (B, L, vocabulary).

        Raises:
            ValueError: frames and placeholders do not match, or the sequence is longer than the decoder's context.
            TypeError: an argument is unknown.
        """
        # Not a parameter: Trainer would take it for a second column of labels.
        shift_labels = options.pop("shift_labels", None)
        self._refuse_unknown(options)
        if isinstance(attention_mask, dict):  # `generate` makes one mask for each type of layer if the cache is static
            attention_mask = attention_mask["full_attention"]
        if input_ids is None and inputs_embeds is None:
            raise ValueError("give input_ids or inputs_embeds")
        if isinstance(past_key_values, EncoderDecoderCache):
            raise TypeError("past_key_values is an EncoderDecoderCache; give the decoder's cache (DynamicCache, ...)")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        frames = pixel_values if features is None else features
        length = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        if input_ids is not None and input_ids.shape[1] != length:
            raise ValueError(f"input_ids have {input_ids.shape[1]} positions, and inputs_embeds {length}")
        seen = self._seen(past_key_values, length, frames is not None)
        self._check_length(seen + length)
        is_video_BL = self._find_placeholders(input_ids, inputs_embeds, frames is not None)
        if frames is None or seen:
            if (
                length > 1 or past_key_values is None or frames is not None
            ):  # otherwise it is a generated token, which is never a placeholder
                self._refuse_placeholders(is_video_BL, frames is not None)
            x_BLD = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            tokens_FPD = visual = None
        else:
            assert is_video_BL is not None
            plan = self._plan(plan, is_video_BL, num_frames, attention_mask, frames)
            if inputs_embeds is None:
                # The id of a placeholder, whose embedding is overwritten, may lie outside the decoder's vocabulary.
                inputs_embeds = self.get_input_embeddings()(cast(Tensor, input_ids).masked_fill(is_video_BL, 0))
            if features is not None:
                features_FPD = self._cast_features(features)
            elif frame_exchange is not None:
                features_FPD = frame_exchange(self.encode, frames)
            else:
                features_FPD = self.encode(frames)
            pooled_FVD = self.projector(pool(features_FPD, self.config.pool_stride, self.config.pooling))
            x_BLD = self._place(pooled_FVD, inputs_embeds, is_video_BL, plan)
            tokens_FPD = visual = None
            if self.config.dual_layers:
                tokens_FPD = in_chunks(self.projector, features_FPD, self.config.encoder_chunk)
                visual = self._visual_context(frames.shape[0], num_frames, is_video_BL, plan)
            del features_FPD
            if plan is not None and (plan.padding == "none" or (plan.padding == "right" and past_key_values is None)):
                # Causal attention never sees what comes later, so padding on the right needs no mask.
                attention_mask = None

        # flash-attn takes no mask: Transformers would look for padding in each layer, and the host would wait.
        is_token = past_key_values is not None and length == 1 and attention_mask is not None
        text = self.config.text_config
        with _attention_by(text, "sdpa") if is_token and "flash" in text._attn_implementation else nullcontext():
            decoded = self._decode(
                x_BLD,
                attention_mask,
                position_ids,
                past_key_values,
                tokens_FPD,
                visual,
                output_hidden_states=output_hidden_states,
                output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
                return_dict=True,
            )
        loss = logits = None
        if labels is not None or shift_labels is not None:
            loss = self._loss(decoded.last_hidden_state, labels, shift_labels, loss_rows, num_items_in_batch)
        else:
            logits = self.get_output_embeddings()(slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
        )

    def _refuse_unknown(self, arguments: dict[str, Any]) -> None:
        for name, value in arguments.items():
            if value is not None and name != "return_dict":
                raise TypeError(
                    f"forward() has no argument {name}; images and videos are given to the processor, whose output is "
                    "the model's input: model(**processor(text=..., videos=...))"
                )

    def _seen(self, cache: Cache | None, length: int, has_frames: bool) -> int:
        """Return the positions in the cache; 0 for a static cache during decoding, since only the device knows."""
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(seen, Tensor):
            return 0 if torch.compiler.is_compiling() or (length == 1 and not has_frames) else int(seen)
        return seen

    def _find_placeholders(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, has_frames: bool
    ) -> Tensor | None:
        """Return bool (B, L), the video placeholders; None if there is nothing to find."""
        placeholder = self.config.video_token_id
        if placeholder is None:
            if has_frames:
                raise ValueError("the configuration has no video_token_id, so frames have no place in the text")
            return None
        if input_ids is not None:
            return input_ids.eq(placeholder)
        if not has_frames:
            return None
        embeddings = cast(Tensor, self.get_input_embeddings().weight)
        if placeholder >= len(embeddings):
            raise ValueError(
                f"inputs_embeds with frames: the placeholder {placeholder} is outside the vocabulary and has no "
                "embedding to find it by; give input_ids"
            )
        return (cast(Tensor, inputs_embeds) == embeddings[placeholder]).all(dim=-1)

    def _refuse_placeholders(self, is_video_BL: Tensor | None, has_frames: bool) -> None:
        """Raise ValueError if there are placeholders, which no frames replace."""
        if is_video_BL is None or torch.compiler.is_compiling() or not is_video_BL.any():
            return
        if has_frames:
            raise ValueError(
                "the cache is not empty, so no further video can be added; start again with the full conversation"
            )
        raise ValueError(
            f"the text has {int(is_video_BL.sum())} video placeholders, but neither pixel_values nor features are given"
        )

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

    def _plan(
        self,
        plan: VideoPlan | None,
        is_video_BL: Tensor,
        num_frames_BM: Tensor | None,
        attention_mask: Tensor | None,
        frames: Tensor,
    ) -> VideoPlan | None:
        """Return the plan of the batch on the device: the given one, or a new one; None for `torch.export`."""
        if torch.compiler.is_exporting():
            return None
        mask_BL = None
        if attention_mask is not None and attention_mask.ndim == 2:  # that of a static cache has 4 axes
            mask_BL = attention_mask[:, -is_video_BL.shape[1] :].bool()
        if plan is None or plan.shape != tuple(is_video_BL.shape):  # `generate` without a cache makes input_ids longer
            if num_frames_BM is None:
                kind = "pixel_values" if frames.dtype == torch.uint8 else "features"
                raise ValueError(f"{kind} are given without num_frames; pass the number of frames of each video")
            plan = self._make_plan(is_video_BL, num_frames_BM, mask_BL)
        if (expected := sum(plan.videos)) != len(frames):
            raise ValueError(f"num_frames adds up to {expected}, but {len(frames)} frames were given")
        plan = plan.to(is_video_BL.device, non_blocking=True)
        # The host does not wait for these.
        other = "plan is of another batch; leave it out to have it made anew"
        torch._assert_async(is_video_BL.flatten().index_select(0, plan.visual_rows_N).all(), other)
        if num_frames_BM is not None:
            torch._assert_async((num_frames_BM.sum(dim=1) == plan.num_frames_B).all(), other)
        if mask_BL is not None:
            torch._assert_async(mask_BL.sum() == plan.num_tokens, other)
        return plan

    def _make_plan(self, is_video_BL: Tensor, num_frames_BM: Tensor, mask_BL: Tensor | None) -> VideoPlan:
        if mask_BL is None:
            mask_BL = torch.ones_like(is_video_BL)
        # One copy, so that the host waits once.
        parts = [is_video_BL.flatten(), mask_BL.flatten(), num_frames_BM.flatten().to(is_video_BL.device)]
        host = torch.cat([part.long() for part in parts]).cpu().split([part.numel() for part in parts])
        is_video, mask = (part.view(is_video_BL.shape).bool() for part in host[:2])
        return plan_videos(is_video, host[2].view(num_frames_BM.shape), self.config.tokens_per_frame, mask)

    def _place(self, pooled_FVD: Tensor, embeds_BLD: Tensor, is_video_BL: Tensor, plan: VideoPlan | None) -> Tensor:
        """Return the embeddings with the pooled tokens in place of their placeholders."""
        pooled_FVD = pooled_FVD.to(embeds_BLD.dtype)
        if plan is None:
            return embeds_BLD.masked_scatter(is_video_BL[:, :, None], pooled_FVD)
        return embeds_BLD.flatten(0, 1).index_copy(0, plan.visual_rows_N, pooled_FVD.flatten(0, 1)).view_as(embeds_BLD)

    def _visual_context(
        self, frames: int, num_frames_BM: Tensor | None, is_video_BL: Tensor, plan: VideoPlan | None
    ) -> VisualContext:
        """Plan which positions attend to which visual tokens in V2V and T2V."""
        tokens, patches = self.config.tokens_per_frame, self.config.patches_per_frame
        scope, chunk = self.config.v2v_scope, self.config.encoder_chunk
        if plan is None:
            assert num_frames_BM is not None
            dense = plan_densely(is_video_BL, num_frames_BM, frames, tokens, scope)
            return VisualContext(*dense, num_frames_BM.sum(dim=1), (), chunk)
        return VisualContext(
            plan_v2v(plan, tokens, patches, scope), plan_t2v(plan, patches), plan.num_frames_B, plan.samples, chunk
        )

    @capture_outputs  # type: ignore[untyped-decorator]
    def _decode(
        self,
        x_BLD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        tokens_FPD: Tensor | None,
        visual: VisualContext | None,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool,
    ) -> BaseModelOutputWithPast:
        """Run the layers of the decoder, passing the videos to those with cross-attention.

        `capture_outputs` reads `output_attentions` and adds the weights.
        """
        decoder = self.language_model.model
        given = position_ids
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(x_BLD.shape[1], device=x_BLD.device) + seen)[None]
        attention = {
            "attention_mask": self._causal_mask(x_BLD, attention_mask, given, past_key_values),
            # Given these, flash attention looks for packed sequences in each layer, and the host waits for the result.
            "position_ids": given if past_key_values is None else None,
            "position_embeddings": decoder.rotary_emb(x_BLD, position_ids),
            "past_key_values": past_key_values,
        }
        states = []
        for layer in decoder.layers:
            states.append(x_BLD)
            if isinstance(layer, DualCrossAttentionLayer):
                x_BLD = layer(x_BLD, tokens_FPD, visual=visual, **attention)
            else:
                x_BLD = layer(x_BLD, **attention)
        x_BLD = decoder.norm(x_BLD)
        chosen = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(last_hidden_state=x_BLD, hidden_states=_select([*states, x_BLD], chosen))

    def _causal_mask(
        self, x_BLD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> Any:
        """Return what the kernels of the decoder take as their mask."""
        decoder = self.language_model.model
        is_2d = attention_mask is not None and attention_mask.ndim == 2
        if is_2d and cache is not None and x_BLD.shape[1] == 1 and decoder.config._attn_implementation == "sdpa":
            # A single query sees all that is not padding. Transformers would ask whether there is any, and wait.
            mask_BL = cast(Tensor, attention_mask)
            if not cache.is_compileable and mask_BL.shape[1] == cache.get_mask_sizes(1, 0)[0]:
                return mask_BL.bool()[:, None, None, :]
        return create_causal_mask(
            config=decoder.config,
            inputs_embeds=x_BLD,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )

    def _loss(
        self,
        x_BLD: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        loss_rows: Tensor | None,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Next-token cross-entropy in float32 over the labelled positions only, `LOSS_CHUNK` of them at a time."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(cast(Tensor, labels)[:, 1:], (0, 1), value=IGNORED)
        x_ND, targets_N = x_BLD.flatten(0, 1), shift_labels.flatten()
        total_labels = targets_N.ne(IGNORED).sum()
        if loss_rows is None:
            loss_rows = targets_N.ne(IGNORED).nonzero()[:, 0]
        x_ND, targets_N = x_ND.index_select(0, loss_rows), targets_N.index_select(0, loss_rows)
        chunks = list(zip(x_ND.split(LOSS_CHUNK), targets_N.split(LOSS_CHUNK), strict=True))
        if len(chunks) == 1:
            total = self._cross_entropy(*chunks[0])
        else:
            # Recompute the logits of each chunk in the backward pass instead of storing all of them.
            parts = [checkpoint(self._cross_entropy, x, y, use_reentrant=False) for x, y in chunks]
            total = torch.stack(parts).sum()
        return total / (total_labels.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)

    def _cross_entropy(self, x_ND: Tensor, targets_N: Tensor) -> Tensor:
        logits = self.get_output_embeddings()(x_ND).float()
        return nn.functional.cross_entropy(logits, targets_N, reduction="sum", ignore_index=IGNORED)


def _select(states: list[Tensor], chosen: Any) -> Any:
    """Return all hidden states if `chosen` is True, None if it is False, and else None for those not in the list."""
    if isinstance(chosen, bool):
        return tuple(states) if chosen else None
    indices = {i % len(states) for i in ([chosen] if isinstance(chosen, int) else chosen)}
    return tuple(state if i in indices else None for i, state in enumerate(states))


@contextmanager
def _attention_by(config: Any, implementation: str) -> Iterator[None]:
    """Let the decoder's layers use another attention implementation within the block.

    They read it from the configuration that they share, so two threads must not generate with one model at once.
    """
    usual = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = usual
