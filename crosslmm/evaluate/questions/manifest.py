"""The questions of a manifest of one's own, as validation in training asks them; scored by exact match."""

import numpy as np

from crosslmm import scoring
from crosslmm.data.manifest import Manifest
from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.question import Messages, Question

MANIFEST = Benchmark("manifest", extract=None, max_new_tokens=None)
"""How its answers are scored."""
CHUNK = 1_000
"""Rows that are read together."""


def read_manifest(manifest: Manifest, most: int | None = None) -> list[Question]:
    """Return a question for each answer of each row: the conversation up to there, with its videos.

    Args:
        manifest: the rows.
        most: return only so many questions, the first ones.
    """
    questions: list[Question] = []
    for start in range(0, len(manifest), CHUNK):
        if most is not None and len(questions) >= most:
            break
        for row in manifest.take(np.arange(start, min(start + CHUNK, len(manifest)))):
            of_row = list(scoring.questions_of(row["messages"]))
            for turn, (messages, answer) in enumerate(of_row, start=1):
                questions.append(
                    Question(
                        id=row["id"] if len(of_row) == 1 else f"{row['id']}#{turn}",
                        videos=tuple(row["videos"][: _video_parts(messages)]),
                        messages=messages,
                        answer=answer,
                        groups=() if row["kind"] is None else (("kind", row["kind"]),),
                    )
                )
    return questions[:most]


def _video_parts(messages: Messages) -> int:
    return sum(
        part["type"] in ("video", "image")
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
    )
