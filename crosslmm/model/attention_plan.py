"""Which positions of a batch look back at which original visual tokens. Index arithmetic only, once a forward pass.

A conversation may hold several videos (an image is a video of one frame), with text before, between and after them.
A pooled token looks at its own video, or only at its own frame; a word looks at every video that came before it, so
that an answer never depends on what is shown later, and a cache that is asked a further question stays right.

Axes, as suffixes: B sample, M video of a sample, L position in the sequence, G group of positions that see the same,
Q position in a group, O owner of keys (a video, a frame, or a sample), S original visual token, C channels.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Lookup:
    """One branch's questions and what each of them may see. No tensor of size queries x keys is ever made of it."""

    rows_GQ: Tensor
    """int64: the positions that ask, as indices into the batch's B*L; 0 where padding."""
    valid_GQ: Tensor
    """bool: False where `rows_GQ` is padding."""
    time_GQ: Tensor
    """int64: each question's own place in time, for rotary positions [frames]."""
    owners: list[int]
    """Who of O owns the keys that each group looks at."""
    visible: list[int]
    """How many of them it sees, from the first on [tokens]."""
    lengths: list[int]
    """Keys of each owner, in the order of the batch's frames [tokens]."""

    @property
    def is_empty(self) -> bool:
        """Nobody asks."""
        return not self.owners

    def keys(self, x_SC: Tensor) -> Tensor:
        """Values of all frames' tokens, one behind the other -> (O, longest, C), zero behind each owner's last."""
        if not x_SC.shape[0]:
            # Under FSDP every rank runs every module's backward, whatever its samples hold: one key that nobody counts.
            return torch.cat([x_SC, x_SC.new_zeros(1, x_SC.shape[1])])[None]
        if len(set(self.lengths)) == 1:
            return x_SC.unflatten(0, (len(self.lengths), -1))
        return pad_sequence(list(x_SC.split(self.lengths)), batch_first=True)

    @cached_property
    def visible_GS(self) -> Tensor | None:  # noqa: N802
        """bool, False at keys that a group may not see; None where every group sees all."""
        longest = max([1, *self.lengths])
        if set(self.visible) == {longest}:
            return None
        device = self.rows_GQ.device
        return torch.arange(longest, device=device) < torch.tensor(self.visible, device=device)[:, None]

    def or_one(self) -> "Lookup":
        """At least one question, which does not count: see `keys`."""
        if not self.is_empty:
            return self
        nought = self.rows_GQ.new_zeros(1, 1)
        return Lookup(nought, nought.bool(), nought, owners=[0], visible=[1], lengths=self.lengths)


def visual_lookup(is_video_BL: Tensor, num_frames_BM: Tensor, tokens: int, patches: int, scope: str) -> Lookup:
    """V2V: every pooled visual token, in groups of one video or of one frame, and that video's or frame's patches.

    Args:
        is_video_BL: bool, the placeholders; frame after frame, as many as `num_frames_BM` says.
        num_frames_BM: int64, frames of each sample's videos, zero where it has fewer.
        tokens: pooled tokens a frame.
        patches: original tokens a frame.
        scope: "video" or "frame".
    """
    frames = [n for n in num_frames_BM.flatten().tolist() if n]
    if scope == "frame":
        frames = [1] * sum(frames)
    rows_N = is_video_BL.flatten().nonzero()[:, 0]
    rows_GQ, valid_GQ = _grouped(rows_N, [n * tokens for n in frames])
    time_GQ = (torch.arange(rows_GQ.shape[1], device=rows_N.device) // tokens).expand_as(rows_GQ)
    lengths = [n * patches for n in frames]
    return Lookup(rows_GQ, valid_GQ, time_GQ, owners=list(range(len(frames))), visible=lengths, lengths=lengths)


def text_lookup(is_video_BL: Tensor, is_text_BL: Tensor, num_frames_BM: Tensor, tokens: int, patches: int) -> Lookup:
    """T2V: every word that has a video before it, in groups of one stretch of text, and the patches before it.

    Args:
        is_video_BL: as for `visual_lookup`. With a cache, the new positions only.
        is_text_BL: bool, positions that are neither placeholders nor padding.
        num_frames_BM: int64, of the whole conversation, cached videos included.
        tokens: pooled tokens a frame.
        patches: original tokens a frame.
    """
    frames_B = num_frames_BM.sum(dim=1)
    still_to_come_BL = is_video_BL.flip(1).cumsum(dim=1).flip(1) // tokens
    before_BL = frames_B[:, None] - still_to_come_BL
    rows_N = (is_text_BL & (before_BL > 0)).flatten().nonzero()[:, 0]
    stretch_BL = before_BL + torch.arange(len(frames_B), device=frames_B.device)[:, None] * (int(frames_B.max()) + 1)
    stretches, counts = stretch_BL.flatten()[rows_N].unique_consecutive(return_counts=True)
    rows_GQ, valid_GQ = _grouped(rows_N, counts.tolist())
    owners, before = (stretches // (int(frames_B.max()) + 1)), stretches % (int(frames_B.max()) + 1)
    return Lookup(
        rows_GQ,
        valid_GQ,
        before[:, None].expand_as(rows_GQ),
        owners=owners.tolist(),
        visible=(before * patches).tolist(),
        lengths=(frames_B * patches).tolist(),
    )


def _grouped(rows_N: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Rows one group behind the other -> (G, longest), padded with zero, and where it is no padding."""
    if not counts:
        empty = rows_N.view(0, 0)
        return empty, empty.bool()
    rows_GQ = pad_sequence(list(rows_N.split(counts)), batch_first=True)
    valid_GQ = (
        torch.arange(rows_GQ.shape[1], device=rows_N.device) < torch.tensor(counts, device=rows_N.device)[:, None]
    )
    return rows_GQ, valid_GQ
