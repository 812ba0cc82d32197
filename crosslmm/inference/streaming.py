"""Answer about videos of any length: the frames' features stay where they are (host memory or a file), and every
cross-attention reads them a chunk of frames at a time, with its keys and values made for that chunk only.

On the device are the pooled tokens of all frames, as in every answer, and the patches of one chunk. The arithmetic is
that of `crosslmm.model.cross_attention`; the softmax over all patches is put together from those of the chunks. Axis
suffixes: B sample (one), L position, F frame, P patch, V pooled token, D width, H head, C channel of a head, Q query,
S patch of a chunk.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from crosslmm.model.cross_attention import DualCrossAttentionLayer, _rotate
from crosslmm.model.pooling import pool
from crosslmm.model.processing import CrossLMMProcessor

MAX_SCORES = 2**24
"""Scores of queries and keys that are in memory at once."""


class FrameFeatures(Protocol):
    """The encoder's output for the frames of a video, wherever it is."""

    def __len__(self) -> int:
        """Return the number of frames."""

    def __getitem__(self, frames: slice) -> Tensor:
        """Return the features of some frames, (F, P, D) in any float dtype, on any device."""


class StreamedVideo:
    """One video, whose features are read a chunk of frames at a time.

    Args:
        model: in eval mode.
        features: of its frames.
        chunk_frames: frames that are read at once [frames].
    """

    def __init__(self, model: Any, features: FrameFeatures, chunk_frames: int) -> None:
        self.model, self.features, self.chunk_frames = model, features, chunk_frames
        parameter = next(model.projector.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first frame of each chunk, and its features (F, P, D) on the device."""
        for start in range(0, len(self.features), self.chunk_frames):
            yield start, self.features[start : start + self.chunk_frames].to(self.device, self.dtype)

    def pooled(self) -> Tensor:
        """Return the pooled tokens of all frames, (F * V, D)."""
        config = self.model.config
        chunks = [self.model.projector(pool(x, config.pool_stride, config.pooling)) for _, x in self._chunks()]
        return torch.cat(chunks).flatten(0, 1)

    def projected(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first frame of each chunk, and its projected patches (F, P, D)."""
        for start, x_FPD in self._chunks():
            yield start, self.model.projector(x_FPD)


@torch.no_grad()
def stream_answer(
    model: Any,
    processor: CrossLMMProcessor,
    messages: list[dict[str, Any]],
    features: FrameFeatures,
    max_new_tokens: int,
    chunk_frames: int = 64,
) -> str:
    """Return the greedy answer to a conversation with one video, as `greedy_answers` would, with the patches of
    `chunk_frames` frames on the device at a time. Pooled tokens and the cache still grow with the video.

    Args:
        model: in eval mode.
        processor: its processor.
        messages: the conversation, with one video part.
        features: of the video's frames.
        max_new_tokens: length limit of the answer [tokens].
        chunk_frames: frames whose patches are on the device at once [frames].

    Raises:
        ValueError: the conversation is longer than the decoder's context.
    """
    frames = [[np.zeros((len(features), 1, 1), np.uint16)]]  # the processor counts them
    ids = processor([messages], frames, for_generation=True, features=(1, 1))["input_ids"]
    limit = model.config.text_config.max_position_embeddings
    if ids.shape[1] + max_new_tokens - 1 > limit:
        raise ValueError(f"{len(features)} frames take {ids.shape[1]} positions, and the decoder has {limit}")
    video = StreamedVideo(model, features, chunk_frames)
    decoder = _Decoder(model, video, ids.to(video.device))
    ends = {processor.tokenizer.eos_token_id, *_as_list(model.generation_config.eos_token_id)}
    answer: list[int] = []
    token = decoder.prefill()
    while token not in ends:
        answer.append(token)
        if len(answer) == max_new_tokens:
            break
        token = decoder.step(token)
    return processor.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


class _Decoder:
    """The decoder over a conversation with one video."""

    def __init__(self, model: Any, video: StreamedVideo, ids: Tensor) -> None:
        self.model, self.video, self.ids = model, video, ids
        self.cache = DynamicCache(config=model.config.text_config)

    def prefill(self) -> int:
        """Read the conversation; return the first token of the answer."""
        is_video_L = self.ids[0] == self.model.config.video_token_id
        embedded = self.model.get_input_embeddings()(self.ids.masked_fill(is_video_L[None], 0))
        pooled = self.video.pooled().to(embedded.dtype)
        x_BLD = embedded.masked_scatter(is_video_L[None, :, None], pooled)
        after_L = ~is_video_L & (is_video_L.cumsum(0) > 0)
        return self._run(x_BLD, is_video_L.nonzero()[:, 0], after_L.nonzero()[:, 0])

    def step(self, token: int) -> int:
        """Read a token of the answer; return the next one."""
        x_BLD = self.model.get_input_embeddings()(self.ids.new_tensor([[token]]))
        nothing = self.ids.new_empty(0)
        return self._run(x_BLD, nothing, self.ids.new_zeros(1))

    def _run(self, x_BLD: Tensor, visual_rows: Tensor, text_rows: Tensor) -> int:
        """Run all layers over new positions; return the most likely next token.

        Args:
            x_BLD: embeddings of the new positions.
            visual_rows: those of pooled tokens, int64.
            text_rows: those of text after the video, int64.
        """
        decoder = self.model.language_model.model
        position_ids = (torch.arange(x_BLD.shape[1], device=x_BLD.device) + self.cache.get_seq_length())[None]
        attention = {
            "attention_mask": create_causal_mask(
                config=decoder.config,
                inputs_embeds=x_BLD,
                attention_mask=None,
                past_key_values=self.cache,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "position_embeddings": decoder.rotary_emb(x_BLD, position_ids),
            "past_key_values": self.cache,
        }
        for layer in decoder.layers:
            if isinstance(layer, DualCrossAttentionLayer):
                x_BLD = self._run_dual(layer, x_BLD, visual_rows, text_rows, attention)
            else:
                x_BLD = layer(x_BLD, **attention)
        return int(self.model.get_output_embeddings()(decoder.norm(x_BLD[:, -1:]))[0, -1].argmax())

    def _run_dual(
        self, layer: Any, x_BLD: Tensor, visual_rows: Tensor, text_rows: Tensor, attention: dict[str, Any]
    ) -> Tensor:
        """Run a layer with cross-attention, see `DualCrossAttentionLayer.forward`."""
        x_BLD = x_BLD + layer.self_attn(hidden_states=layer.input_layernorm(x_BLD), **attention)[0]
        for branch, rows in ((layer.v2v, visual_rows), (layer.t2v, text_rows)):
            if branch is not None and len(rows):
                by_frame = branch is layer.v2v and self.model.config.v2v_scope == "frame"
                attend = self._attend_by_frame if by_frame else self._attend
                attended_QC = attend(branch, x_BLD[0, rows], branch is layer.v2v)
                x_BLD = x_BLD.index_add(1, rows, (torch.tanh(branch.gate) * branch.o_proj(attended_QC))[None])
        return x_BLD + layer.mlp(layer.post_attention_layernorm(x_BLD))

    def _attend(self, branch: Any, x_QD: Tensor, visual: bool) -> Tensor:
        """Let queries attend to the patches of all frames: (Q, D) -> (Q, H * C)."""
        frames = len(self.video.features)
        at = torch.arange(frames, device=x_QD.device).repeat_interleave(self.model.config.tokens_per_frame)
        query_HQC = branch._query(x_QD[None], (at if visual else at.new_full((len(x_QD),), frames))[None])[0].float()
        softmax = _OnlineSoftmax(query_HQC * branch.head_dim**-0.5)
        for key_HSC, value_HSC in self._keys_and_values(branch):
            softmax.add(key_HSC, value_HSC)
        return softmax.mean_HQC().to(x_QD.dtype).transpose(0, 1).flatten(1)

    def _attend_by_frame(self, branch: Any, x_QD: Tensor, visual: bool) -> Tensor:
        """Let the pooled tokens of each frame attend to its own patches: (Q, D) -> (Q, H * C)."""
        attended_chunks = []
        tokens = self.model.config.tokens_per_frame
        for start, x_FPD in self.video.projected():
            queries_FVD = x_QD[start * tokens : (start + len(x_FPD)) * tokens].unflatten(0, (-1, tokens))
            query_FHVC = branch._query(queries_FVD, queries_FVD.new_zeros(queries_FVD.shape[:2]))
            key_FHSC, value_FHSC = (branch._heads(x) for x in branch._project(x_FPD).chunk(2, dim=-1))
            groups = branch.num_key_value_groups
            key_FHSC, value_FHSC = (x.repeat_interleave(groups, dim=1) for x in (key_FHSC, value_FHSC))
            attended = nn.functional.scaled_dot_product_attention(query_FHVC, key_FHSC, value_FHSC)
            attended_chunks.append(attended.transpose(1, 2).flatten(0, 1).flatten(1))
        return torch.cat(attended_chunks)

    def _keys_and_values(self, branch: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values of the patches of each chunk, float32 (H, S, C), H that of the queries."""
        for start, x_FPD in self.video.projected():
            key_1SC, value_1SC = branch._project(x_FPD).flatten(0, 1)[None].chunk(2, dim=-1)
            key_1HSC, value_1HSC = branch._heads(key_1SC), branch._heads(value_1SC)
            if branch.rotary:
                frames = torch.arange(start, start + len(x_FPD), device=x_FPD.device)
                key_1HSC = _rotate(key_1HSC, frames.repeat_interleave(x_FPD.shape[1])[None])
            groups = branch.num_key_value_groups
            yield (
                key_1HSC[0].repeat_interleave(groups, dim=0).float(),
                value_1HSC[0].repeat_interleave(groups, dim=0).float(),
            )


class _OnlineSoftmax:
    """Softmax attention over keys that come in chunks (Milakov and Gimelshein, 2018).

    Args:
        query_HQC: scaled queries, float32.
    """

    def __init__(self, query_HQC: Tensor) -> None:
        self.query_HQC, self.sum_HQC = query_HQC, torch.zeros_like(query_HQC)
        self.largest_HQ1 = query_HQC.new_full((*query_HQC.shape[:2], 1), -torch.inf)
        self.total_HQ1 = torch.zeros_like(self.largest_HQ1)

    def add(self, key_HSC: Tensor, value_HSC: Tensor) -> None:
        """Add a chunk of the keys, float32, for some queries at a time: not all scores fit into memory."""
        heads, patches = key_HSC.shape[:2]
        at_once = max(1, MAX_SCORES // (heads * patches))
        for start in range(0, self.query_HQC.shape[1], at_once):
            queries = slice(start, start + at_once)
            scores_HQS = self.query_HQC[:, queries] @ key_HSC.mT
            largest_HQ1 = torch.maximum(self.largest_HQ1[:, queries], scores_HQS.amax(dim=-1, keepdim=True))
            weights_HQS = scores_HQS.sub_(largest_HQ1).exp_()
            rescale_HQ1 = (self.largest_HQ1[:, queries] - largest_HQ1).exp()
            total_HQ1 = self.total_HQ1[:, queries] * rescale_HQ1
            self.total_HQ1[:, queries] = total_HQ1 + weights_HQS.sum(dim=-1, keepdim=True)
            self.sum_HQC[:, queries] = self.sum_HQC[:, queries] * rescale_HQ1 + weights_HQS @ value_HSC
            self.largest_HQ1[:, queries] = largest_HQ1

    def mean_HQC(self) -> Tensor:  # noqa: N802
        """Return the mean of all values so far, weighted by the softmax of their scores."""
        return self.sum_HQC / self.total_HQ1


def _as_list(value: Any) -> Sequence[int]:
    return value if isinstance(value, list) else [value] if value is not None else []
