"""Ask an exported model all questions of a manifest, as validation in training asks them, and score its answers."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from crosslmm import scoring
from crosslmm.data.collate import Sample, collate_questions, make_batch, unreadable_questions
from crosslmm.data.manifest import Manifest
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder
from crosslmm.data.video.frame_list import describe_video
from crosslmm.inference.answerer import Answerer
from crosslmm.model.generation import greedy_answers
from crosslmm.preflight.answer_length import answer_limit
from crosslmm.progress import Progress
from crosslmm.scoring import Score

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The answer to one question of a manifest."""

    id: str
    """Id of the row."""
    videos: list[str]
    """Absolute paths or URIs of its videos and images."""
    question: str | None
    """Text of the question; None if its row cannot be asked."""
    answer: str | None
    """The model's greedy answer; None if its row cannot be asked."""
    expected: str | None
    """The answer that the row has."""
    error: str | None = None
    """Why the row cannot be asked."""


@dataclass(frozen=True)
class Evaluation:
    """All answers of a model to the questions of a manifest, and their score."""

    score: Score
    answers: list[Answer]


def evaluate(answerer: Answerer, manifest: Manifest, rows: int | None = None, batch_size: int = 16) -> Evaluation:
    """Ask all questions of a manifest and score the answers.

    Args:
        answerer: the model.
        manifest: its rows; those that cannot be asked do not count, and are logged.
        rows: only so many rows, the first ones; default: all.
        batch_size: rows, and questions, that are processed at once.

    Raises:
        ValueError: no row can be asked.
        storage.Unavailable: the store of the videos cannot be used.
    """
    count = min(rows or len(manifest), len(manifest))
    outcomes: list[scoring.Outcome] = []
    answers: list[Answer] = []
    short: set[str] = set()
    limit = answer_limit(manifest, answerer.processor)
    data = answerer.config.data.model_copy(update={"roots": manifest.roots})
    with Decoder(data, answerer.processor.image_size) as decoder, Progress(log, "asking", count, "row") as progress:
        for start in range(0, count, batch_size):
            batch = manifest.take(range(start, min(start + batch_size, count)))
            for answer, new_outcomes in _ask(answerer, batch, _read(decoder, batch, short), limit):
                answers += answer
                outcomes += new_outcomes
            progress.update(start + len(batch))
    score = scoring.score(outcomes)
    failed = [answer for answer in answers if answer.error]
    if not score.overall.asked:
        raise ValueError(f"{manifest.uri}: no row could be asked; {failed[0].id!a}: {failed[0].error}")
    if failed:
        first = f"{failed[0].id!a}: {failed[0].error}"
        log.warning("%d of %d rows could not be asked and do not count; %s", len(failed), count, first)
    return Evaluation(score, answers)


def _read(decoder: Decoder, rows: list[dict[str, Any]], short: set[str]) -> list[Sample]:
    """Return the rows with their decoded videos, or with the reason why one of them is unreadable.

    Videos with fewer frames than asked are added to `short`; those that were not in it yet are logged.
    """
    decoded = iter(decoder([uri for row in rows for uri in row["videos"]]))
    samples = []
    for position, row in enumerate(rows):
        error, videos, times, shortfalls = None, [], [], []
        for uri in row["videos"]:
            video = next(decoded)
            if isinstance(video, VideoFailure):
                error = error or f"{describe_video(uri)}: {video.reason}"
                continue
            videos.append(video.images)
            times.append(video.times.tolist())
            if video.shortfall:
                shortfalls.append(f"{describe_video(uri)}: {video.shortfall}")
        if new := [shortfall for shortfall in shortfalls if shortfall not in short]:
            log.warning("%a: %s", row["id"], "; ".join(new))
        short.update(shortfalls)
        fields = {key: row[key] for key in ("manifest", "line", "id", "messages", "kind")}
        samples.append(
            Sample(position, videos=videos, weight=1.0, error=error, times=times, shortfalls=shortfalls, **fields)
        )
    return samples


def _ask(
    answerer: Answerer, rows: list[dict[str, Any]], samples: list[Sample], limit: int
) -> Iterator[tuple[list[Answer], list[scoring.Outcome]]]:
    """Yield answers and outcomes of the questions of some rows, a part at a time."""
    processor = answerer.processor
    require_room = partial(processor.require_room, new_tokens=limit)
    samples, parts = make_batch(samples, partial(collate_questions, processor=processor, require_room=require_room))
    for part in parts:
        texts = greedy_answers(answerer.model, processor, part.prompts(), limit)
        yield (
            [
                Answer(rows[q.position]["id"], rows[q.position]["videos"], q.text, text, q.reference)
                for q, text in zip(part.asked, texts, strict=True)
            ],
            part.outcomes(texts),
        )
    unreadable = [sample for sample in samples if sample.error]
    yield (
        [Answer(sample.id, rows[sample.position]["videos"], None, None, None, sample.error) for sample in unreadable],
        unreadable_questions(unreadable),
    )
