"""Which positions of a batch attend to which original visual tokens: index arithmetic, done once per forward pass.

A conversation may hold several videos (an image is a video of one frame), with text before, between and after them.
A pooled visual token attends to its own video, or only to its own frame. A text token attends to every video before
it, so an answer never depends on a later video, and a cache stays valid when the conversation goes on. Text inside a
video, the times of its frames, attends to the videos before this one: were it to attend to the frames before it, each
time would need keys of its own.

Axis suffixes: B sample, M video of a sample, F frame (of all samples, concatenated), L position in the sequence,
G group of queries that see the same keys, Q query in a group, O key sequence (of one video, frame or sample),
S original visual token, C channel, N any row.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class AttentionPlan:
    """The queries of one branch (V2V or T2V) and the keys that each may see.

    Queries are grouped by the keys they see, so no tensor of size queries x keys is ever needed.
    """

    rows_GQ: Tensor
    """int64: positions of the queries, as indices into the flattened batch (B*L); 0 where padding."""
    valid_GQ: Tensor
    """bool: False where `rows_GQ` is padding."""
    frame_GQ: Tensor
    """int64: frame index of each query, for rotary positions."""
    key_index: list[int]
    """Index on axis O of the key sequence that each group attends to."""
    num_visible: list[int]
    """How many keys of that sequence the group sees, counted from its start [tokens]."""
    key_lengths: list[int]
    """Length of each key sequence, in the order of the batch's frames [tokens]."""

    @property
    def is_empty(self) -> bool:
        """True if there are no queries."""
        return not self.key_index

    def pad_keys(self, x_SC: Tensor) -> Tensor:
        """Split the concatenated tokens of all frames into key sequences: (S, C) -> (O, longest, C), zero-padded."""
        if not x_SC.shape[0]:
            # Under FSDP every rank must run the backward of every module, even without frames: add one dummy key.
            return torch.cat([x_SC, x_SC.new_zeros(1, x_SC.shape[1])])[None]
        if len(set(self.key_lengths)) == 1:
            return x_SC.unflatten(0, (len(self.key_lengths), -1))
        return pad_sequence(list(x_SC.split(self.key_lengths)), batch_first=True)

    @cached_property
    def sequence_mask_OS(self) -> Tensor | None:  # noqa: N802
        """bool (O, longest): False at padding of a key sequence; None if all are equally long."""
        if len(set(self.key_lengths)) == 1:
            return None
        device = self.rows_GQ.device
        positions = torch.arange(max(self.key_lengths), device=device)
        return positions < torch.tensor(self.key_lengths, device=device)[:, None]

    @cached_property
    def key_mask_GS(self) -> Tensor | None:  # noqa: N802
        """bool (G, longest): False at keys that a group may not see; None if every group sees every key."""
        longest = max([1, *self.key_lengths])
        if set(self.num_visible) == {longest}:
            return None
        device = self.rows_GQ.device
        return torch.arange(longest, device=device) < torch.tensor(self.num_visible, device=device)[:, None]

    def with_dummy_query(self) -> "AttentionPlan":
        """Return this plan, or if it is empty one with a single invalid query (for FSDP, see `pad_keys`)."""
        if not self.is_empty:
            return self
        zero = self.rows_GQ.new_zeros(1, 1)
        return AttentionPlan(zero, zero.bool(), zero, key_index=[0], num_visible=[1], key_lengths=self.key_lengths)


def plan_v2v(is_video_BL: Tensor, num_frames_BM: Tensor, tokens: int, patches: int, scope: str) -> AttentionPlan:
    """Plan V2V: each pooled visual token attends to the patches of its video or of its frame.

    Args:
        is_video_BL: bool, the video placeholders, frame after frame, as many as `num_frames_BM` implies.
        num_frames_BM: int64, frames of each video; zero pads samples with fewer videos.
        tokens: pooled tokens per frame.
        patches: original visual tokens per frame.
        scope: "video" or "frame", see `CrossLMMConfig.v2v_scope`.
    """
    frames = [n for n in num_frames_BM.flatten().tolist() if n]
    if scope == "frame":
        frames = [1] * sum(frames)
    rows_N = is_video_BL.flatten().nonzero()[:, 0]
    rows_GQ, valid_GQ = _pad_groups(rows_N, [n * tokens for n in frames])
    frame_GQ = (torch.arange(rows_GQ.shape[1], device=rows_N.device) // tokens).expand_as(rows_GQ)
    lengths = [n * patches for n in frames]
    return AttentionPlan(
        rows_GQ, valid_GQ, frame_GQ, key_index=list(range(len(frames))), num_visible=lengths, key_lengths=lengths
    )


def plan_t2v(
    is_video_BL: Tensor, is_text_BL: Tensor, num_frames_BM: Tensor, tokens: int, patches: int
) -> AttentionPlan:
    """Plan T2V: each text token attends to the patches of all videos before it; text before any video has no query.

    A group is the text from the end of one video to the end of the next: its tokens have the same videos before them.

    Args:
        is_video_BL: bool, the video placeholders. With a cache, L covers the new positions only.
        is_text_BL: bool, positions that are neither placeholders nor padding.
        num_frames_BM: int64, frames of each video of the full conversation, cached videos included.
        tokens: pooled tokens per frame.
        patches: original visual tokens per frame.
    """
    total_frames_B = num_frames_BM.sum(dim=1)
    # Count from the end, because with a cache the earlier placeholders are not in `is_video_BL`.
    frames_from_here_BL = is_video_BL.flip(1).cumsum(dim=1).flip(1) // tokens
    frames_before_BL = _whole_videos(total_frames_B[:, None] - frames_from_here_BL, num_frames_BM)
    rows_N = (is_text_BL & (frames_before_BL > 0)).flatten().nonzero()[:, 0]

    # One number for each pair (sample, frames before), so that consecutive rows with equal numbers form a group.
    base = int(total_frames_B.max()) + 1
    sample_B = torch.arange(len(total_frames_B), device=total_frames_B.device)
    group_id_BL = sample_B[:, None] * base + frames_before_BL
    group_id_G, group_sizes_G = group_id_BL.flatten()[rows_N].unique_consecutive(return_counts=True)
    sample_G, frames_before_G = group_id_G // base, group_id_G % base

    rows_GQ, valid_GQ = _pad_groups(rows_N, group_sizes_G.tolist())
    return AttentionPlan(
        rows_GQ,
        valid_GQ,
        frames_before_G[:, None].expand_as(rows_GQ),
        key_index=sample_G.tolist(),
        num_visible=(frames_before_G * patches).tolist(),
        key_lengths=(total_frames_B * patches).tolist(),
    )


def _whole_videos(frames_before_BL: Tensor, num_frames_BM: Tensor) -> Tensor:
    """Return how many of the frames before each position belong to videos that end before it, int64 (B, L)."""
    ends_BM = num_frames_BM.cumsum(dim=1)
    ended_BL = torch.searchsorted(ends_BM, frames_before_BL.contiguous(), right=True)
    return pad(ends_BM, (1, 0)).gather(1, ended_BL)


def _pad_groups(rows_N: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Split concatenated rows into groups: (N,) -> zero-padded (G, longest), and a mask, False at padding."""
    if not sizes:
        empty = rows_N.view(0, 0)
        return empty, empty.bool()
    rows_GQ = pad_sequence(list(rows_N.split(sizes)), batch_first=True)
    valid_GQ = torch.arange(rows_GQ.shape[1], device=rows_N.device) < torch.tensor(sizes, device=rows_N.device)[:, None]
    return rows_GQ, valid_GQ


@dataclass(frozen=True)
class DensePlan:
    """The same as an `AttentionPlan`, without a shape that depends on the data: every position is a query, every frame
    a key. For `torch.export`; its masks grow with positions x frames."""

    visible_BLF: Tensor
    """bool: the frames that each position attends to."""
    query_frame_BL: Tensor
    """int64: frame index of each query, for rotary positions."""
    key_frame_F: Tensor
    """int64: frame index of each key, for rotary positions."""
    sample_F: Tensor
    """int64: the sample that each frame belongs to."""


def plan_densely(
    is_video_BL: Tensor, num_frames_BM: Tensor, num_frames: int, tokens: int, scope: str
) -> tuple[DensePlan, DensePlan]:
    """Plan V2V and T2V for `torch.export`; the arguments are those of `plan_v2v`, and F = `num_frames`."""
    videos = num_frames_BM.shape[1]
    ends = num_frames_BM.flatten().cumsum(0)
    frame_F = torch.arange(num_frames, device=ends.device)
    video_F = torch.searchsorted(ends, frame_F, right=True)
    sample_F = video_F // videos
    in_video_F = frame_F - (ends - num_frames_BM.flatten())[video_F]
    first_B = num_frames_BM.sum(dim=1).cumsum(0) - num_frames_BM.sum(dim=1)
    in_sample_F = frame_F - first_B[sample_F]

    placeholders_BL = is_video_BL.cumsum(dim=1)
    # The frame of a placeholder, counted over the batch; anything at other positions.
    own_BL = (first_B[:, None] + (placeholders_BL - 1).clamp(min=0) // tokens).clamp(max=num_frames - 1)
    same_BLF = own_BL[:, :, None] == frame_F if scope == "frame" else video_F[own_BL][:, :, None] == video_F
    before_BL = _whole_videos(placeholders_BL // tokens, num_frames_BM)
    sample_B = torch.arange(len(first_B), device=ends.device)
    earlier_BLF = (sample_F == sample_B[:, None, None]) & (in_sample_F < before_BL[:, :, None])
    zero_F = torch.zeros_like(frame_F)
    within_F = zero_F if scope == "frame" else in_video_F
    return (
        DensePlan(same_BLF & is_video_BL[:, :, None], within_F[own_BL], within_F, sample_F),
        DensePlan(earlier_BLF & ~is_video_BL[:, :, None], before_BL, in_sample_F, sample_F),
    )
