"""The dual cross-attention: pooled visual tokens (V2V) and text (T2V) look back at the original visual tokens.

Axes, as suffixes: B sample, L position in the sequence, F frame, P patch, D width, H heads, C channels of one head; and
of a `Lookup`: G group of positions that see the same, Q position in a group, O owner of keys, S original visual token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward, rotate_half

from crosslmm.model.attention_plan import Lookup
from crosslmm.model.vision_encoder import in_chunks

ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class VisualContext:
    """What the dual layers look at. Built once a forward pass and handed down as an argument."""

    tokens_FPD: Tensor | None
    """Projected original visual tokens of all frames, one behind the other; None once keys and values are cached."""
    chunk: int
    """Frames that are normalised at a time, without gradients."""
    v2v: Lookup
    t2v: Lookup


class GatedCrossAttention(nn.Module):
    """One branch: x + tanh(gate) * Attention(x's asking rows, the original visual tokens).

    The geometry is the decoder's own grouped-query attention. Keys carry no time, as in the paper, unless
    `cross_attention_rotary` turns queries and keys by the number of their frame. The gate starts at zero, so a new
    branch changes nothing, exactly.
    """

    is_causal = False

    def __init__(self, config: Any, layer_idx: int, rotary: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.rotary = rotary
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or width // heads
        self.num_key_value_groups = heads // kv_heads
        self.query_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.visual_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, heads * self.head_dim)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, x_BLD: Tensor, lookup: Lookup, visual: VisualContext, cache: EncoderDecoderCache | None = None
    ) -> Tensor:
        """Add what the asking rows see to them; every other position is returned as it came.

        With `cache`, the videos' keys and values are computed at the first call and read afterwards.
        """
        if torch.is_grad_enabled():
            lookup = lookup.or_one()
        if lookup.is_empty and (cache is None or visual.tokens_FPD is None):
            return x_BLD
        key_OHSC, value_OHSC = self._keys_and_values(lookup, visual, cache)
        if lookup.is_empty:
            return x_BLD
        rows_N = lookup.rows_GQ.flatten()
        asks_GQD = x_BLD.flatten(0, 1).index_select(0, rows_N).unflatten(0, lookup.rows_GQ.shape)
        query_GHQC = self._heads(self.q_proj(self.query_norm(asks_GQD)))
        if self.rotary:
            query_GHQC = _turn(query_GHQC, lookup.time_GQ)
        seen_GQD = self.o_proj(self._attend(query_GHQC, key_OHSC, value_OHSC, lookup))
        seen_GQD = torch.where(lookup.valid_GQ[:, :, None], torch.tanh(self.gate) * seen_GQD, 0.0)
        out_BLD = x_BLD.clone()  # no view is returned: FSDP hangs its hook on the tensor
        out_BLD.flatten(0, 1).index_add_(0, rows_N, seen_GQD.flatten(0, 1).to(x_BLD.dtype))
        return out_BLD

    def _heads(self, x_GQC: Tensor) -> Tensor:
        return x_GQC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(
        self, lookup: Lookup, visual: VisualContext, cache: EncoderDecoderCache | None
    ) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        assert visual.tokens_FPD is not None
        both_FPC = in_chunks(self._project, visual.tokens_FPD, visual.chunk)
        key_SC, value_SC = both_FPC.flatten(0, 1).chunk(2, dim=-1)
        key_OHSC, value_OHSC = self._heads(lookup.keys(key_SC)), self._heads(lookup.keys(value_SC))
        if self.rotary:
            time_S = torch.arange(key_OHSC.shape[2], device=key_OHSC.device) // visual.tokens_FPD.shape[1]
            key_OHSC = _turn(key_OHSC, time_S[None])
        if cache is not None:
            cache.cross_attention_cache.update(key_OHSC, value_OHSC, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key_OHSC, value_OHSC

    def _project(self, tokens_FPD: Tensor) -> Tensor:
        """Keys and values side by side."""
        normed_FPD = self.visual_norm(tokens_FPD)
        return torch.cat([self.k_proj(normed_FPD), self.v_proj(normed_FPD)], dim=-1)

    def _attend(self, query_GHQC: Tensor, key_OHSC: Tensor, value_OHSC: Tensor, lookup: Lookup) -> Tensor:
        """Attention as configured -> (G, Q, H*C). Padding is masked, or cut out for kernels that take lengths."""
        if lookup.owners != list(range(key_OHSC.shape[0])):
            owners = torch.tensor(lookup.owners, device=key_OHSC.device)
            key_OHSC, value_OHSC = key_OHSC.index_select(0, owners), value_OHSC.index_select(0, owners)
        mask_GS = lookup.visible_GS
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # is_causal must be said: without it SDPA masks the later keys in silence.
        options = {"scaling": self.head_dim**-0.5, "dropout": 0.0, "is_causal": False}
        if "flash" in implementation:
            if mask_GS is None:
                mask_GS = torch.ones(key_OHSC.shape[0], key_OHSC.shape[2], dtype=torch.bool, device=key_OHSC.device)
            return self._attend_packed(attention, query_GHQC, key_OHSC, value_OHSC, lookup, mask_GS, options)
        mask = mask_GS[:, None, None, :] if mask_GS is not None else None
        if mask is not None and implementation == "eager":
            mask = torch.zeros_like(mask, dtype=query_GHQC.dtype).masked_fill(~mask, torch.finfo(query_GHQC.dtype).min)
        seen, _ = attention(self, query_GHQC, key_OHSC, value_OHSC, mask, **options)
        return seen.flatten(2)

    def _attend_packed(
        self,
        attention: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lookup: Lookup,
        mask_GS: Tensor,
        options: dict[str, Any],
    ) -> Tensor:
        """Variable lengths without padding: all groups behind one another, and where each begins."""
        groups, heads, asked, channels = query.shape
        # Every group keeps at least one row, for a kernel takes no empty sequence; it is dropped by `forward`.
        keep_GQ = lookup.valid_GQ.clone()
        keep_GQ[:, 0] = True
        lengths_q, lengths_k = keep_GQ.sum(dim=1), mask_GS.sum(dim=1)
        packed, _ = attention(
            self,
            query.transpose(1, 2)[keep_GQ].transpose(0, 1)[None],
            key.transpose(1, 2)[mask_GS].transpose(0, 1)[None],
            value.transpose(1, 2)[mask_GS].transpose(0, 1)[None],
            None,
            cu_seq_lens_q=nn.functional.pad(lengths_q.cumsum(0), (1, 0)).int(),
            cu_seq_lens_k=nn.functional.pad(lengths_k.cumsum(0), (1, 0)).int(),
            max_length_q=int(lengths_q.max()),
            max_length_k=int(lengths_k.max()),
            **options,
        )
        seen = query.new_zeros(groups, asked, heads * channels)
        return seen.masked_scatter(keep_GQ[:, :, None], packed.reshape(-1, heads * channels))


def _turn(x_GHQC: Tensor, time_GQ: Tensor) -> Tensor:
    """Rotary positions (RoPE) over frames: channel pair i is turned by time * base^(-2i/C)."""
    channels = x_GHQC.shape[-1]
    speeds = ROTARY_BASE ** (-torch.arange(0, channels, 2, device=x_GHQC.device).float() / channels)
    angles = (time_GQ[:, None, :, None] * speeds).repeat(1, 1, 1, 2)
    return x_GHQC * angles.cos().to(x_GHQC.dtype) + rotate_half(x_GHQC) * angles.sin().to(x_GHQC.dtype)


class DualCrossAttentionLayer(GradientCheckpointingLayer):
    """A pretrained decoder layer that also looks back at the video, between its self-attention and its feed-forward.

    It takes over the layer's own modules under their own names, so the pretrained state-dict keys stay as they are.

    Raises:
        ValueError: the layer is not built like Qwen2's or Llama's.
    """

    PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})

    def __init__(self, layer: nn.Module, config: Any, layer_idx: int, v2v: bool, t2v: bool, rotary: bool) -> None:
        super().__init__()
        parts = dict(layer.named_children())
        if parts.keys() != self.PARTS:
            raise ValueError(
                f"{type(layer).__name__} has the parts {', '.join(sorted(parts))}; "
                f"the dual cross-attention fits layers with exactly {', '.join(sorted(self.PARTS))}"
            )
        self.self_attn = parts["self_attn"]
        self.mlp = parts["mlp"]
        self.input_layernorm = parts["input_layernorm"]
        self.post_attention_layernorm = parts["post_attention_layernorm"]
        self.v2v = GatedCrossAttention(config, layer_idx, rotary) if v2v else None
        self.t2v = GatedCrossAttention(config, layer_idx, rotary) if t2v else None

    def forward(
        self,
        hidden_states: Tensor,
        visual: VisualContext | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        **attention: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D). Without `visual` this is the pretrained layer."""
        own_cache: Cache | None = past_key_values.self_attention_cache if past_key_values is not None else None
        x_BLD, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), past_key_values=own_cache, **attention
        )
        x_BLD = hidden_states + x_BLD
        if visual is not None:
            # Both branches ask about the same state: each writes to positions that the other leaves alone.
            # V2V needs no cache, for a video's own positions pass by once.
            if self.v2v is not None and visual.tokens_FPD is not None:
                x_BLD = self.v2v(x_BLD, visual.v2v, visual)
            if self.t2v is not None:
                x_BLD = self.t2v(x_BLD, visual.t2v, visual, past_key_values)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
