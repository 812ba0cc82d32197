"""The Ray Data actor that asks the model about the videos of a block."""

import base64
import json
import time
from dataclasses import asdict

import numpy as np
import ray
import torch

from crosslmm.config import RunConfig
from crosslmm.data import thumbnails
from crosslmm.data.collate import Sample
from crosslmm.data.dataset import unpack_block
from crosslmm.evaluate.asking.batch_answerer import BatchAnswerer, DecodedVideos
from crosslmm.evaluate.asking.blocks import VideoRows
from crosslmm.evaluate.asking.model_files import load
from crosslmm.evaluate.questions.question import Question
from crosslmm.evaluate.scores.judging import Reply
from crosslmm.evaluate.settings import AnswerSettings


class AnswerActor:
    """Asks all questions about the videos of a block. Runs as a Ray Data actor.

    Args:
        files: the model's files in the object store.
        rows: `VideoRows` in the object store.
        block_videos: videos of a block.
        asking: how answers are made.
        config: of the evaluation.
    """

    def __init__(
        self,
        files: dict[str, ray.ObjectRef],
        rows: ray.ObjectRef,
        block_videos: int,
        asking: AnswerSettings,
        config: RunConfig,
    ) -> None:
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
        answerer = load(files, "cuda" if config.scaling.use_gpu else "cpu")
        self.answer = BatchAnswerer(answerer, asking.max_new_tokens, asking.likelihood)
        self.rows: VideoRows = ray.get(rows)
        self.block_videos = block_videos

    def _questions(self, sample: Sample) -> list[Question]:
        return [self.rows.questions[number] for number in self.rows.groups[sample.position]]

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Ask about one block and return a report, as JSON in `done`.

        The report has `block`, its number; `replies`, (question, reply) of each of its questions; `strips`, some frames
        of each video that can be read, as base64 of a JPEG; and `ended` (unix time [s]).
        """
        samples = [sample for sample in unpack_block(block) if sample.weight]
        readable = [sample for sample in samples if sample.error is None]
        asked = [(DecodedVideos.of(sample), self._questions(sample)) for sample in readable]
        replies: list[tuple[int, Reply]] = []
        for sample, of_video in zip(readable, self.answer(asked), strict=True):
            replies += zip(self.rows.groups[sample.position], of_video, strict=True)
        for sample in samples:
            if sample.error is not None:
                replies += [(i, Reply(error=sample.error)) for i in self.rows.groups[sample.position]]
        strips = {
            str(sample.position): base64.b64encode(thumbnails.strip(sample.videos)).decode()
            for sample in readable
            if sample.videos
        }
        report = {
            "block": samples[0].position // self.block_videos,
            "replies": [(i, asdict(reply)) for i, reply in sorted(replies, key=lambda pair: pair[0])],
            "strips": strips,
            "ended": time.time(),
        }
        return {"done": [json.dumps(report)]}
