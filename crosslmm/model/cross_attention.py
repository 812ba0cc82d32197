"""The dual cross-attention: pooled visual tokens (V2V) and text (T2V) attend to the original visual tokens.

Axis suffixes: B sample, L position in the sequence, F frame, P patch, D width, H head, C channel of one head, N any
row; and of an `AttentionPlan`: G group of queries that see the same keys, Q query in a group, S original
visual token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward, rotate_half

from crosslmm.model.attention_plan import AttentionPlan, DensePlan
from crosslmm.model.cache import CachedVideos, recall, remember
from crosslmm.model.vision_encoder import in_chunks

ROTARY_BASE = 10_000.0
"""Base of the rotary frequencies over frames, as in RoPE for text."""


@dataclass(frozen=True)
class VisualContext:
    """How the positions of a batch attend to its frames: built once per forward pass, passed to every dual layer."""

    v2v: AttentionPlan | DensePlan
    t2v: AttentionPlan | DensePlan
    num_frames_B: Tensor
    """int64: frames of each sample."""
    samples: tuple[int, ...]
    """The same as Python numbers; empty with a `DensePlan`."""
    chunk: int
    """Frames projected to keys and values at a time, when no gradients are needed."""


class GatedCrossAttention(nn.Module):
    """One branch (V2V or T2V): x + tanh(gate) * Attention(query rows of x, original visual tokens).

    Heads, key-value heads and head size are those of the decoder's grouped-query attention. As in the paper, keys have
    no temporal position; with `cross_attention_rotary` queries and keys are rotated by their frame index. The gate
    starts at zero, so a new branch leaves the decoder's output exactly unchanged.
    """

    is_causal = False
    left_out = False
    """Whether the layer leaves this branch out: one with a gate at zero that does not learn adds nothing."""

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
        self,
        x_BLD: Tensor,
        plan: AttentionPlan | DensePlan | None,
        tokens_FPD: Tensor | None,
        visual: VisualContext | None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Add the gated attention output at the query rows of `plan`; return all other positions unchanged.

        With `cache`, the keys and values of the videos are computed when these are new, and reused afterwards.

        Args:
            x_BLD: hidden states (B, L, D).
            plan: the queries of this branch, and the keys that each sees; None if no video is new: then all positions
                attend to the videos in the cache, if there are any.
            tokens_FPD: projected original visual tokens of all frames, concatenated.
            visual: what else belongs to the new videos.
            cache: of the decoder; remembers the videos of the conversation.
        """
        if plan is None or tokens_FPD is None or visual is None:
            videos = recall(cache, self.layer_idx)
            return x_BLD if videos is None else self._attend_to_seen(x_BLD, videos)
        if isinstance(plan, DensePlan):
            return self._attend_densely(x_BLD, plan, tokens_FPD, visual, cache)
        key_SHC, value_SHC = self._keys_and_values(plan, tokens_FPD, visual.chunk)
        if cache is not None:
            remember(cache, self.layer_idx, self._seen(key_SHC, value_SHC, tokens_FPD.shape[1], visual))
        queries_1ND = x_BLD.flatten(0, 1).index_select(0, plan.rows_N)[None]
        query_NHC = self._query(queries_1ND, plan.frame_N[None])[0].transpose(0, 1)
        attended_ND = self.o_proj(self._attend(query_NHC, key_SHC, value_SHC, plan))
        added_ND = (torch.tanh(self.gate) * attended_ND).to(x_BLD.dtype)
        out_BLD = x_BLD.clone()  # not a view: FSDP registers a hook on the returned tensor
        out_BLD.flatten(0, 1).index_add_(0, plan.rows_N, added_ND)
        return out_BLD

    def _attend_to_seen(self, x_BLD: Tensor, videos: CachedVideos) -> Tensor:
        """Let every position attend to all cached videos of its sample; no shape depends on the data."""
        frames_BL = videos.num_frames_B[:, None].expand(x_BLD.shape[:2])
        query_BHLC = self._query(x_BLD, frames_BL)
        mask = videos.mask_BS[:, None, None, :] if videos.mask_BS is not None else None
        attended_BLC = self._run_kernel(query_BHLC, videos.key_BHSC, videos.value_BHSC, mask)
        return self._add(x_BLD, attended_BLC, frames_BL > 0)

    def _attend_densely(
        self, x_BLD: Tensor, plan: DensePlan, tokens_FPD: Tensor, visual: VisualContext, cache: Cache | None
    ) -> Tensor:
        """Let every position attend to the frames of all samples that it may see."""
        samples, patches = len(x_BLD), tokens_FPD.shape[1]
        key_1SC, value_1SC = self._project(tokens_FPD).flatten(0, 1)[None].chunk(2, dim=-1)
        key_1HSC, value_1HSC = self._heads(key_1SC), self._heads(value_1SC)
        if self.rotary:
            key_1HSC = _rotate(key_1HSC, plan.key_frame_F.repeat_interleave(patches)[None])
        key_BHSC, value_BHSC = (x.expand(samples, -1, -1, -1) for x in (key_1HSC, value_1HSC))
        if cache is not None:
            sample_B = torch.arange(samples, device=x_BLD.device)
            own_BS = (plan.sample_F == sample_B[:, None]).repeat_interleave(patches, dim=1)
            remember(cache, self.layer_idx, CachedVideos(key_BHSC, value_BHSC, own_BS, visual.num_frames_B))
        mask = plan.visible_BLF.repeat_interleave(patches, dim=2)[:, None]
        attended_BLC = self._run_kernel(self._query(x_BLD, plan.query_frame_BL), key_BHSC, value_BHSC, mask)
        return self._add(x_BLD, attended_BLC, plan.visible_BLF.any(dim=2))

    def _add(self, x_BLD: Tensor, attended_BLC: Tensor, valid_BL: Tensor) -> Tensor:
        added_BLD = torch.tanh(self.gate) * self.o_proj(attended_BLC)
        return x_BLD + torch.where(valid_BL[:, :, None], added_BLD, 0.0).to(x_BLD.dtype)

    def _query(self, x_GQD: Tensor, frame_GQ: Tensor) -> Tensor:
        query_GHQC = self._heads(self.q_proj(self.query_norm(x_GQD)))
        return _rotate(query_GHQC, frame_GQ) if self.rotary else query_GHQC

    def _heads(self, x_GQC: Tensor) -> Tensor:
        return x_GQC.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _keys_and_values(self, plan: AttentionPlan, tokens_FPD: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all frames, concatenated: (S, H, C) each."""
        key_SC, value_SC = in_chunks(self._project, tokens_FPD, chunk).flatten(0, 1).chunk(2, dim=-1)
        key_SHC, value_SHC = (x.unflatten(-1, (-1, self.head_dim)) for x in (key_SC, value_SC))
        if self.rotary:
            frame_S = plan.key_frame_F.repeat_interleave(tokens_FPD.shape[1])
            key_SHC = _rotate(key_SHC.transpose(0, 1)[None], frame_S[None])[0].transpose(0, 1)
        return key_SHC, value_SHC

    def _seen(self, key_SHC: Tensor, value_SHC: Tensor, patches: int, visual: VisualContext) -> CachedVideos | None:
        """Return the videos of each sample, padded to the longest; None if there are none."""
        lengths = [frames * patches for frames in visual.samples]
        if not sum(lengths):
            return None
        if len(set(lengths)) == 1:
            key_BSHC, value_BSHC = (x.unflatten(0, (len(lengths), -1)) for x in (key_SHC, value_SHC))
            mask_BS = None
        else:
            key_BSHC, value_BSHC = (pad_sequence(list(x.split(lengths)), True) for x in (key_SHC, value_SHC))
            positions_S = torch.arange(max(lengths), device=key_SHC.device)
            mask_BS = positions_S < visual.num_frames_B[:, None] * patches
        # Contiguous for each head: every generated token reads all of them, and strided ones are read more slowly.
        key_BHSC, value_BHSC = (x.transpose(1, 2).contiguous() for x in (key_BSHC, value_BSHC))
        return CachedVideos(key_BHSC, value_BHSC, mask_BS, visual.num_frames_B)

    def _project(self, tokens_FPD: Tensor) -> Tensor:
        """Keys and values, concatenated along the channels."""
        normed_FPD = self.visual_norm(tokens_FPD)
        return torch.cat([self.k_proj(normed_FPD), self.v_proj(normed_FPD)], dim=-1)

    def _attend(self, query_NHC: Tensor, key_SHC: Tensor, value_SHC: Tensor, plan: AttentionPlan) -> Tensor:
        """Attend group by group, or at once if the groups are alike -> (N, H*C). There is no mask and no padding."""
        if not plan.groups:
            # Under FSDP every rank must run the backward of every module: keep keys and values in the graph.
            return (query_NHC + (key_SHC[:0].sum() + value_SHC[:0].sum())).flatten(1)
        if plan.is_uniform:
            count, keys = len(plan.groups), plan.groups[0].keys
            query_GHQC = query_NHC.unflatten(0, (count, -1)).transpose(1, 2)
            key_GHSC, value_GHSC = (
                x[: count * keys].unflatten(0, (count, keys)).transpose(1, 2) for x in (key_SHC, value_SHC)
            )
            return self._run_kernel(query_GHQC, key_GHSC, value_GHSC, None).flatten(0, 1)
        attended = []
        for query_QHC, group in zip(query_NHC.split([g.queries for g in plan.groups]), plan.groups, strict=True):
            seen = slice(group.first_key, group.first_key + group.keys)
            query_1HQC, key_1HSC, value_1HSC = (
                x.transpose(0, 1)[None] for x in (query_QHC, key_SHC[seen], value_SHC[seen])
            )
            attended.append(self._run_kernel(query_1HQC, key_1HSC, value_1HSC, None)[0])
        return torch.cat(attended)

    @property
    def _options(self) -> dict[str, Any]:
        # Pass is_causal explicitly: without it SDPA silently masks the later keys.
        return {"scaling": self.head_dim**-0.5, "dropout": 0.0, "is_causal": False}

    def _run_kernel(self, query_GHQC: Tensor, key_GHSC: Tensor, value_GHSC: Tensor, mask: Tensor | None) -> Tensor:
        """Run the configured kernel -> (G, Q, H*C). `mask`: bool, (G, 1, 1 or Q, S), False at invisible keys."""
        implementation = self.config._attn_implementation
        if mask is not None and "flash" in implementation:
            implementation = "sdpa"  # it takes masks; a generated token is one query, for which flash gains nothing
        if mask is not None and implementation == "eager":
            mask = torch.zeros_like(mask, dtype=query_GHQC.dtype).masked_fill(~mask, torch.finfo(query_GHQC.dtype).min)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attended_GQHC, _ = attention(self, query_GHQC, key_GHSC, value_GHSC, mask, **self._options)
        return attended_GQHC.flatten(2)


def _rotate(x_GHQC: Tensor, frame_GQ: Tensor) -> Tensor:
    """Apply rotary positions (RoPE) over frames: rotate channel pair i by frame * base^(-2i/C)."""
    channels = x_GHQC.shape[-1]
    frequencies = ROTARY_BASE ** (-torch.arange(0, channels, 2, device=x_GHQC.device).float() / channels)
    angles = (frame_GQ[:, None, :, None] * frequencies).repeat(1, 1, 1, 2)
    return x_GHQC * angles.cos().to(x_GHQC.dtype) + rotate_half(x_GHQC) * angles.sin().to(x_GHQC.dtype)


class DualCrossAttentionLayer(GradientCheckpointingLayer):
    """A pretrained decoder layer with V2V and T2V between its self-attention and its feed-forward.

    It keeps the modules of the pretrained layer under their names, so the state-dict keys do not change.

    Raises:
        ValueError: the submodules of `layer` are not those of a Qwen2 or Llama layer.
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
        tokens_FPD: Tensor | None = None,
        visual: VisualContext | None = None,
        past_key_values: Cache | None = None,
        **attention: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L, D). Without videos, new or in the cache, this is the pretrained layer.

        Args:
            hidden_states: (B, L, D).
            tokens_FPD: projected original visual tokens of new videos. Positional, as is `hidden_states`: reentrant
                checkpointing gives no gradients to other arguments.
            visual: how the positions attend to these videos.
            past_key_values: cache of the decoder.
            attention: arguments of the self-attention.
        """
        x_BLD = self._attend_to_itself(hidden_states, past_key_values=past_key_values, **attention)
        # The branches do not affect each other: V2V writes to visual positions only, T2V to text positions only.
        # V2V needs no cache: visual positions are processed once.
        if self.v2v is not None and not self.v2v.left_out and visual is not None:
            x_BLD = self.v2v(x_BLD, visual.v2v, tokens_FPD, visual)
        # Called without videos too: under FSDP every rank must run every module.
        if self.t2v is not None and not self.t2v.left_out:
            x_BLD = self.t2v(x_BLD, visual.t2v if visual is not None else None, tokens_FPD, visual, past_key_values)
        return self._feed_forward(x_BLD)

    def _attend_to_itself(self, x_BLD: Tensor, **attention: Any) -> Tensor:
        return x_BLD + self.self_attn(self.input_layernorm(x_BLD), **attention)[0]

    def _feed_forward(self, x_BLD: Tensor) -> Tensor:
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


@torch.no_grad()
def leave_out_closed_branches(model: nn.Module) -> None:
    """Leave out each cross-attention that adds nothing and never will: its gate is zero, and nothing in it learns, as
    in T2V during stage 1.

    Args:
        model: with its final weights; if sharded, all processes call this. On the meta device, gates count as zero,
            where they begin.
    """
    for branch in model.modules():
        if isinstance(branch, GatedCrossAttention):
            learns = any(parameter.requires_grad for parameter in branch.parameters())
            gate = branch.gate.full_tensor() if isinstance(branch.gate, DTensor) else branch.gate
            branch.left_out = not learns and (gate.is_meta or not gate.any())
