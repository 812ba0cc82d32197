"""Which positions of a batch attend to which original visual tokens: index arithmetic on the host, done once per batch.

A conversation may hold several videos (an image is a video of one frame), with text before, between and after them.
A pooled visual token attends to its own video, or only to its own frame. A text token attends to every video before
it, so an answer never depends on a later video, and a cache stays valid when the conversation goes on. Text inside a
video, the times of its frames, attends to the videos before this one: if it attended to the frames before it, too, each
time would be a group of its own.

The lengths are Python numbers and the indices travel with the batch, so that a forward pass never waits for a value
that a GPU has to compute first.

Axis suffixes: B sample, M video of a sample, F frame (of all samples, concatenated), L position in the sequence,
N any row, Q query.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORED = -100
"""Label of a position without loss."""
Padding = Literal["none", "left", "right"]


class TextGroup(NamedTuple):
    """Consecutive text of a sample, with the same videos before all of it."""

    sample: int
    rows: int
    """Number of positions."""
    frames: int
    """Frames before it in its sample, at least 1."""


@dataclass(frozen=True)
class VideoPlan:
    """Where the videos of a batch are, made by `plan_videos`; part of what the processor returns, as `plan`."""

    shape: tuple[int, int]
    """Of the batch: samples, positions."""
    videos: tuple[int, ...]
    """Frames of each video of the batch; none is empty."""
    samples: tuple[int, ...]
    """Frames of each sample."""
    texts: tuple[TextGroup, ...]
    """Text after a video, in the order of the rows."""
    padding: Padding
    """On which side samples are padded."""
    num_tokens: int
    """Positions that are not padding."""
    indices_N: Tensor
    """int64: all indices in one tensor, which is copied to a device at once; read them by the properties."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "VideoPlan":
        """Return the plan with its indices on a device."""
        return replace(self, indices_N=self.indices_N.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "VideoPlan":
        """Return the plan with its indices in pinned memory."""
        return replace(self, indices_N=self.indices_N.pin_memory())

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        frames, texts = sum(self.videos), sum(group.rows for group in self.texts)
        sizes = [texts, texts, frames, frames, len(self.samples)]
        return self.indices_N.split([len(self.indices_N) - sum(sizes), *sizes])

    @property
    def visual_rows_N(self) -> Tensor:  # noqa: N802
        """Positions of the pooled tokens in the flattened batch (B*L), frame after frame."""
        return self._parts[0]

    @property
    def text_rows_N(self) -> Tensor:  # noqa: N802
        """Positions of the text after a video, in the flattened batch."""
        return self._parts[1]

    @property
    def frames_before_N(self) -> Tensor:  # noqa: N802
        """Frames before each of `text_rows_N` in its sample."""
        return self._parts[2]

    @property
    def frame_in_video_F(self) -> Tensor:  # noqa: N802
        """Number of each frame in its video, from 0."""
        return self._parts[3]

    @property
    def frame_in_sample_F(self) -> Tensor:  # noqa: N802
        """Number of each frame in its sample, from 0."""
        return self._parts[4]

    @property
    def num_frames_B(self) -> Tensor:  # noqa: N802
        """Frames of each sample."""
        return self._parts[5]


def plan_videos(
    is_video_BL: Tensor, num_frames_BM: Tensor, tokens: int, attention_mask: Tensor | None = None
) -> VideoPlan:
    """Return the plan of a batch. All tensors are in CPU memory.

    Args:
        is_video_BL: bool, the video placeholders, frame after frame.
        num_frames_BM: int64, frames of each video; zero pads samples with fewer videos.
        tokens: pooled tokens per frame.
        attention_mask: (B, L), zero at padding; None if there is none.

    Raises:
        ValueError: the placeholders of a sample are not as many as its frames need.
    """
    num_frames_B = num_frames_BM.sum(dim=1)
    _check_placeholders(is_video_BL.sum(dim=1), num_frames_B, tokens)
    is_real_BL = torch.ones_like(is_video_BL) if attention_mask is None else attention_mask.bool()
    frames_before_BL = _whole_videos(is_video_BL.cumsum(dim=1) // tokens, num_frames_BM)
    is_text_BL = is_real_BL & ~is_video_BL & (frames_before_BL > 0)
    text_rows_N = is_text_BL.flatten().nonzero()[:, 0]
    frames_before_N = frames_before_BL.flatten()[text_rows_N]
    # One number for each pair (sample, frames before), so that consecutive rows with equal numbers form a group.
    base = int(num_frames_B.max()) + 1
    group_N = (text_rows_N // is_video_BL.shape[1]) * base + frames_before_N
    groups, sizes = group_N.unique_consecutive(return_counts=True)
    videos, samples = num_frames_BM[num_frames_BM > 0].tolist(), num_frames_B.tolist()
    return VideoPlan(
        shape=(is_video_BL.shape[0], is_video_BL.shape[1]),
        videos=tuple(videos),
        samples=tuple(samples),
        texts=tuple(
            TextGroup(group // base, rows, group % base)
            for group, rows in zip(groups.tolist(), sizes.tolist(), strict=True)
        ),
        padding=_padding(is_real_BL),
        num_tokens=int(is_real_BL.sum()),
        indices_N=torch.cat([
            is_video_BL.flatten().nonzero()[:, 0], text_rows_N, frames_before_N,
            _count_up(videos), _count_up(samples), num_frames_B,
        ]),
    )  # fmt: skip


def _check_placeholders(placeholders_B: Tensor, num_frames_B: Tensor, tokens: int) -> None:
    for b, (given, frames) in enumerate(zip(placeholders_B.tolist(), num_frames_B.tolist(), strict=True)):
        if given != frames * tokens:
            raise ValueError(
                f"sample {b}: the text has {given} video placeholders, "
                f"but {frames} frames of {tokens} tokens need {frames * tokens}"
            )


def _whole_videos(frames_before_BL: Tensor, num_frames_BM: Tensor) -> Tensor:
    """Return how many of the frames before each position belong to videos that end before it, int64 (B, L)."""
    ends_BM = num_frames_BM.cumsum(dim=1)
    ended_BL = torch.searchsorted(ends_BM, frames_before_BL.contiguous(), right=True)
    return pad(ends_BM, (1, 0)).gather(1, ended_BL)


def _padding(is_real_BL: Tensor) -> Padding:
    if is_real_BL.all():
        return "none"
    # A padded position before a real one makes it "left", wherever it is: the mask is then needed.
    return "left" if (is_real_BL[:, 1:] & ~is_real_BL[:, :-1]).any() else "right"


def _count_up(lengths: Sequence[int]) -> Tensor:
    """Return 0, 1, ... for each length, concatenated."""
    return torch.cat([torch.arange(length) for length in lengths] or [torch.empty(0, dtype=torch.int64)])


class Group(NamedTuple):
    """Queries that see the same keys; both are consecutive."""

    queries: int
    first_key: int
    """Position among the original visual tokens of all frames."""
    keys: int


@dataclass(frozen=True)
class AttentionPlan:
    """The queries of one branch (V2V or T2V) and the keys that each sees.

    Queries are grouped by the keys that they see, so no tensor of size queries x keys is ever needed, and the keys of a
    group are a slice, so none is copied.
    """

    rows_N: Tensor
    """int64: positions of the queries in the flattened batch (B*L)."""
    frame_N: Tensor
    """int64: frame of each query, for rotary positions."""
    key_frame_F: Tensor
    """int64 (F,): number of each frame, which is the rotary position of all its patches."""
    groups: list[Group]
    """In the order of `rows_N`."""

    @property
    def is_uniform(self) -> bool:
        """Whether the groups are equally large and have the keys to themselves, so that one call serves all."""
        queries, _, keys = self.groups[0] if self.groups else (0, 0, 0)
        return all(group == (queries, i * keys, keys) for i, group in enumerate(self.groups))


def plan_v2v(plan: VideoPlan, tokens: int, patches: int, scope: str) -> AttentionPlan:
    """Plan V2V: each pooled visual token attends to the patches of its video or of its frame.

    Args:
        plan: of the batch.
        tokens: pooled tokens per frame.
        patches: original visual tokens per frame.
        scope: "video" or "frame", see `CrossLMMConfig.v2v_scope`.
    """
    videos = list(plan.videos) if scope == "video" else [1] * sum(plan.videos)
    firsts = itertools.accumulate(videos, initial=0)
    frame_F = plan.frame_in_video_F if scope == "video" else torch.zeros_like(plan.frame_in_video_F)
    return AttentionPlan(
        plan.visual_rows_N,
        frame_F.repeat_interleave(tokens),
        frame_F,
        [Group(n * tokens, first * patches, n * patches) for n, first in zip(videos, firsts, strict=False)],
    )


def plan_t2v(plan: VideoPlan, patches: int) -> AttentionPlan:
    """Plan T2V: each text token attends to the patches of all videos before it; text before any video has no query."""
    firsts = list(itertools.accumulate(plan.samples, initial=0))
    return AttentionPlan(
        plan.text_rows_N,
        plan.frames_before_N,
        plan.frame_in_sample_F,
        [Group(text.rows, firsts[text.sample] * patches, text.frames * patches) for text in plan.texts],
    )


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
    """Plan V2V and T2V for `torch.export`; the arguments are those of `plan_videos` and `plan_v2v`, and
    F = `num_frames`."""
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
