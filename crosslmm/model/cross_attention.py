"""The dual cross-attention: pooled visual tokens (V2V) and text (T2V) look back at every original visual token.

Axes, as suffixes: B sample, L position in the sequence, Q position that asks, S original visual token
(all patches of all frames of a sample, padded), D width, H heads, C channels of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward


@dataclass
class Rows:
    """The positions of each sample that ask: V2V's are the pooled visual tokens, T2V's the text."""

    index_BQ: Tensor
    valid_BQ: Tensor

    @classmethod
    def where(cls, asks_BL: Tensor) -> "Rows":
        """Gather the positions that are true in `asks_BL`, padded to the longest sample.

        At least one (invalid) row is kept while gradients are wanted: under FSDP every rank has to run every
        module's backward, whatever its samples hold.
        """
        least = 1 if torch.is_grad_enabled() else 0
        length = max(int(asks_BL.sum(dim=1).max()), least)
        index_BQ = torch.argsort(~asks_BL, dim=1, stable=True)[:, :length]
        return cls(index_BQ, asks_BL.gather(1, index_BQ))


@dataclass
class VisualContext:
    """What the dual layers look at. Built once a forward pass and handed down as an argument."""

    tokens_BSD: Tensor | None
    """Projected original visual tokens; None while generating, when keys and values come from the cache."""
    visible_BS: Tensor
    """False where `tokens_BSD` is padding."""
    visual_rows: Rows
    text_rows: Rows

    def __post_init__(self) -> None:
        self.has_visual_B = self.visible_BS.any(dim=1)
        # A sample without visual tokens may look at its (zero) padding, so that no softmax runs over nothing;
        # what it sees there is dropped below.
        self.allowed_BS = self.visible_BS | ~self.has_visual_B[:, None]
        self.all_allowed = bool(self.allowed_BS.all())


class GatedCrossAttention(nn.Module):
    """One branch: x + tanh(gate) * Attention(x's chosen rows, the original visual tokens).

    The geometry is the decoder's own grouped-query attention. No positions: keys carry no time, as in the paper.
    The gate starts at zero, so a new branch changes nothing, exactly.
    """

    is_causal = False

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
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
        self, x_BLD: Tensor, rows: Rows, visual: VisualContext, cache: EncoderDecoderCache | None = None
    ) -> Tensor:
        """Add what the chosen rows see to them; every other position is returned as it came.

        With `cache`, a video's keys and values are computed at the first call and read afterwards.
        """
        if rows.index_BQ.shape[1] == 0:
            return x_BLD
        index_BQD = rows.index_BQ[:, :, None].expand(-1, -1, x_BLD.shape[-1])
        asks_BQD = x_BLD.gather(1, index_BQD)
        query_BHQC = self._heads(self.q_proj(self.query_norm(asks_BQD)))
        key_BHSC, value_BHSC = self._keys_and_values(visual, cache)
        seen_BQD = self.o_proj(self._attend(query_BHQC, key_BHSC, value_BHSC, rows, visual))
        counts_BQ = rows.valid_BQ & visual.has_visual_B[:, None]
        seen_BQD = torch.where(counts_BQ[:, :, None], torch.tanh(self.gate) * seen_BQD, 0.0)
        return x_BLD.scatter_add(1, index_BQD, seen_BQD.to(x_BLD.dtype))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return x_BLD.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, visual: VisualContext, cache: EncoderDecoderCache | None) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.is_updated.get(self.layer_idx):
            layer: Any = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        tokens_BSD = self.visual_norm(visual.tokens_BSD)
        key_BHSC, value_BHSC = self._heads(self.k_proj(tokens_BSD)), self._heads(self.v_proj(tokens_BSD))
        if cache is not None:
            cache.cross_attention_cache.update(key_BHSC, value_BHSC, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return key_BHSC, value_BHSC

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Rows, visual: VisualContext) -> Tensor:
        """Attention as configured -> (B, Q, H*C). Padding is masked, or cut out for kernels that take lengths."""
        implementation = self.config._attn_implementation
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        # is_causal must be said: without it SDPA masks the later keys in silence.
        options = {"scaling": self.head_dim**-0.5, "dropout": 0.0, "is_causal": False}
        if "flash" in implementation:
            return self._attend_packed(attention, query, key, value, rows, visual, options)
        mask = None
        if not visual.all_allowed:
            mask = visual.allowed_BS[:, None, None, :]
            if implementation == "eager":
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
        seen, _ = attention(self, query, key, value, mask, **options)
        return seen.flatten(2)

    def _attend_packed(
        self,
        attention: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Rows,
        visual: VisualContext,
        options: dict[str, Any],
    ) -> Tensor:
        """Variable lengths without padding: all samples behind one another, and where each begins."""
        batch, heads, asked, channels = query.shape
        # Every sample keeps at least one row, for a kernel takes no empty sequence; it is dropped by `forward`.
        keep_BQ = rows.valid_BQ.clone()
        keep_BQ[:, 0] = True
        lengths_q, lengths_k = keep_BQ.sum(dim=1), visual.allowed_BS.sum(dim=1)
        packed, _ = attention(
            self,
            query.transpose(1, 2)[keep_BQ].transpose(0, 1)[None],
            key.transpose(1, 2)[visual.allowed_BS].transpose(0, 1)[None],
            value.transpose(1, 2)[visual.allowed_BS].transpose(0, 1)[None],
            None,
            cu_seq_lens_q=nn.functional.pad(lengths_q.cumsum(0), (1, 0)).int(),
            cu_seq_lens_k=nn.functional.pad(lengths_k.cumsum(0), (1, 0)).int(),
            max_length_q=int(lengths_q.max()),
            max_length_k=int(lengths_k.max()),
            **options,
        )
        seen = query.new_zeros(batch, asked, heads * channels)
        return seen.masked_scatter(keep_BQ[:, :, None], packed.reshape(-1, heads * channels))


class DualCrossAttentionLayer(GradientCheckpointingLayer):
    """A pretrained decoder layer that also looks back at the video, between its self-attention and its feed-forward.

    It takes over the layer's own modules under their own names, so the pretrained state-dict keys stay as they are.

    Raises:
        ValueError: the layer is not built like Qwen2's or Llama's.
    """

    PARTS = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})

    def __init__(self, layer: nn.Module, config: Any, layer_idx: int, v2v: bool, t2v: bool) -> None:
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
        self.v2v = GatedCrossAttention(config, layer_idx) if v2v else None
        self.t2v = GatedCrossAttention(config, layer_idx) if t2v else None

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
            if self.v2v is not None and visual.tokens_BSD is not None:
                x_BLD = self.v2v(x_BLD, visual.visual_rows, visual)
            if self.t2v is not None:
                x_BLD = self.t2v(x_BLD, visual.text_rows, visual, past_key_values)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))
