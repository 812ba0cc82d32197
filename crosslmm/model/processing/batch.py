"""Tokens, frames and features of several samples -> the padded tensors of a batch."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence


def pad_tokens(ids: list[torch.Tensor], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` (B, L), padded on a side: "left" or "right"."""
    return {
        "input_ids": pad_sequence(ids, True, pad_id, side),
        "attention_mask": pad_sequence([torch.ones_like(tokens) for tokens in ids], True, 0, side),
    }


def count_frames(videos: Sequence[Sequence[np.ndarray]]) -> torch.Tensor:
    """Return `num_frames` (B, M): the frames of each sample's videos, with zeros where it has fewer than M."""
    return pad_sequence([torch.tensor([len(v) for v in sample], dtype=torch.int64) for sample in videos], True)


def stack_frames(
    videos: Sequence[Sequence[np.ndarray]], side: int, features: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Return `pixel_values` or `features` of all videos; empty if there are none, so that all ranks run the same
    modules."""
    arrays = [torch.from_numpy(video) for sample in videos for video in sample]
    if features is None:
        none = torch.empty(0, side, side, 3, dtype=torch.uint8)
        return {"pixel_values": torch.cat([*arrays, none]).permute(0, 3, 1, 2).contiguous()}
    none = torch.empty(0, *features, dtype=torch.bfloat16)
    return {"features": torch.cat([*(bits.view(torch.bfloat16) for bits in arrays), none])}


def require_frames(video: np.ndarray, side: int, features: tuple[int, int] | None) -> None:
    """Raise ValueError unless these are frames of `side` pixels, or features (patches, width), at least one."""
    if features is not None:
        if video.dtype != np.uint16 or video.shape[1:] != features:
            raise ValueError(
                f"features are {video.dtype} {video.shape}; expected uint16 (frames, {features[0]}, "
                f"{features[1]}), the bits of bfloat16"
            )
    elif video.dtype != np.uint8 or video.shape[1:] != (side, side, 3):
        raise ValueError(f"frames are {video.dtype} {video.shape}; the encoder takes uint8 (frames, {side}, {side}, 3)")
    if not len(video):
        raise ValueError("a video has no frames; remove its part from the conversation, or pass at least one frame")
