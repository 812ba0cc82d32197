"""Divides the questions into blocks: some videos each, with all questions about them. The division depends on nothing
else, so that every start of an evaluation, with any number of workers, has the same blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from crosslmm.config import DataConfig
from crosslmm.data.dataset import BlockLayout
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.evaluate.questions.question import Question

MAX_BLOCK_BYTES = 128 * 2**20
"""Frames of a block, at most, unless a single video has more [bytes]. A block has several videos because batches are
made of the questions of one block."""
MAX_BLOCK_VIDEOS = 32
"""Videos of a block: a killed evaluation asks about those of unfinished blocks again."""


def videos_per_block(data: DataConfig, image_size: int) -> int:
    """Return the number of videos of a block."""
    return int(np.clip(MAX_BLOCK_BYTES // (data.num_frames * image_size**2 * 3), 1, MAX_BLOCK_VIDEOS))


class VideoRows:
    """The videos that questions are about, with the interface of `Rows`: a row is one video, or several that a question
    names together.

    Attributes:
        questions: all questions.
        groups: numbers of the questions about each row's videos, in the order of their first question.
        roots: folders that the videos may lie in.
    """

    def __init__(self, questions: Sequence[Question], source: str, roots: Sequence[str]) -> None:
        self.questions, self.roots, self._source = questions, list(roots), source
        groups: dict[Any, list[int]] = {}
        for number, question in enumerate(questions):
            if question.error is None:
                # Questions without a video have nothing in common.
                groups.setdefault(question.videos or number, []).append(number)
        self.groups = list(groups.values())

    def take(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """Return the rows of these indices, int64 (n,), without messages."""
        return [self._row(self.groups[index][0]) for index in indices.tolist()]

    def _row(self, number: int) -> dict[str, Any]:
        question = self.questions[number]
        return {
            "manifest": self._source, "line": number + 1, "id": question.id, "kind": None, "messages": [],
            "videos": list(question.videos),
        }  # fmt: skip


@dataclass(frozen=True)
class PendingBlocks(BlockLayout):
    """The blocks of an evaluation that are not finished."""

    pending: tuple[int, ...] = ()
    """Numbers of these blocks."""

    @property
    def num_blocks(self) -> int:
        """Number of blocks that are pending."""
        return len(self.pending)

    def positions(self, block: int) -> np.ndarray:
        """Return the rows of the pending block at this place, int64 (rows_per_block,). The last ones of the last block
        may be fillers, of weight 0."""
        return self.pending[block] * self.rows_per_block + np.arange(self.rows_per_block)


def layout(rows: VideoRows, block_videos: int, pending: Sequence[int]) -> PendingBlocks:
    """Return the layout of the pending blocks."""
    sampler = DeterministicSampler((len(rows.groups),), block_videos, None)
    return PendingBlocks(sampler, 1, 0, sampler.steps_per_epoch, block_videos, pending=tuple(pending))


def block_sizes(rows: VideoRows, block_videos: int) -> list[int]:
    """Return the number of questions of each block."""
    starts = range(0, len(rows.groups), block_videos)
    return [sum(map(len, rows.groups[start : start + block_videos])) for start in starts]
