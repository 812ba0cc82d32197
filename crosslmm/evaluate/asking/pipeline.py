"""Asks a model the questions that have no reply yet, on Ray, and writes the replies block by block."""

import base64
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy, Dataset

from crosslmm.config import RunConfig
from crosslmm.data.dataset import build_dataset
from crosslmm.data.quarantine import escape_to_ascii
from crosslmm.evaluate.asking import model_files
from crosslmm.evaluate.asking.actor import AnswerActor
from crosslmm.evaluate.asking.blocks import VideoRows, block_sizes, layout, videos_per_block
from crosslmm.evaluate.asking.model_files import ModelFiles
from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.questions.question import Question
from crosslmm.evaluate.scores.judging import Reply
from crosslmm.evaluate.settings import AnswerSettings
from crosslmm.preflight import placement
from crosslmm.progress import Progress
from crosslmm.text import in_brief

log = logging.getLogger(__name__)

MAX_LOGGED = 20
"""Questions that cannot be asked and are logged one by one; the others are counted."""


class EvaluationFailed(Exception):
    """The evaluation did not end; one line with the first cause. What it has done is kept."""


@dataclass(frozen=True)
class Job:
    """What is asked of which model."""

    model: ModelFiles
    questions: Sequence[Question]
    source: str
    """Folder or manifest of the questions, for messages."""
    asking: AnswerSettings
    config: RunConfig
    folder: EvaluationFolder

    @property
    def block_videos(self) -> int:
        """Videos of a block, if the evaluation begins now."""
        return videos_per_block(self.config.data, self.model.image_size)


@dataclass(frozen=True)
class Replies:
    """Replies to all questions."""

    replies: list[Reply]
    asked_now: int
    """Questions that this start has asked; earlier starts asked the others."""
    questions_per_s: float | None
    """Rate without start-up: questions of all this start's blocks except the first, divided by the time from the end of
    the first block to the end of the last [1/s]; None with fewer than two blocks."""


def ask_all(job: Job, block_videos: int) -> Replies:
    """Ask all questions that the folder has no reply to.

    Args:
        job: the questions.
        block_videos: videos of a block.

    Raises:
        BadConfig: the cluster has no room.
        EvaluationFailed: the job stopped; another start resumes it.
    """
    rows = VideoRows(job.questions, job.source, job.config.data.roots)
    sizes = block_sizes(rows, block_videos)
    done = job.folder.done(sizes)
    pending = [block for block in range(len(sizes)) if block not in done]
    replies = {number: Reply(error=q.error) for number, q in enumerate(job.questions) if q.error is not None}
    replies |= {number: reply for block in done.values() for number, reply in block}
    known, rate = len(replies), None
    if pending:
        # Actors are added where there is room; only Ray Train takes all of it.
        scaling = job.config.scaling.model_copy(update={"num_workers": job.config.scaling.least_workers})
        placement.check_placement(job.config.model_copy(update={"scaling": scaling}))
        if done:
            log.info("resumed   %s of %s questions have been asked", f"{known:,}", f"{len(job.questions):,}")
        new, rate = _ask(job, rows, block_videos, pending, known)
        replies |= new
    _log_unreadable(job, replies)
    return Replies([replies[number] for number in range(len(job.questions))], len(replies) - known, rate)


def _ask(
    job: Job, rows: VideoRows, block_videos: int, pending: Sequence[int], known: int
) -> tuple[dict[int, Reply], float | None]:
    """Ask the questions of the pending blocks, and write each block when it is done; return the replies and the rate,
    see `Replies`."""
    replies: dict[int, Reply] = {}
    ends: list[tuple[float, int]] = []
    began = time.monotonic()
    with Progress(log, "asking", len(job.questions), "question") as progress:
        try:
            for row in _build_dataset(job, rows, block_videos, pending).iter_rows():
                report = json.loads(row["done"])
                block = [(number, Reply(**reply)) for number, reply in report["replies"]]
                strips = {key: base64.b64decode(jpeg) for key, jpeg in report["strips"].items()}
                job.folder.write_block(report["block"], block, strips)
                replies |= dict(block)
                ends.append((report["ended"], len(block)))
                rate = len(replies) / (time.monotonic() - began)
                progress.update(known + len(replies), f"{rate:.1f} questions/s")
        except Exception as error:
            raise EvaluationFailed(f"{_first_cause(error)}; run the same command again to resume") from error
    (first, of_first), *_, (last, _) = [*sorted(ends), (0.0, 0)] if len(ends) < 2 else sorted(ends)
    return replies, (len(replies) - of_first) / (last - first) if last > first else None


def _build_dataset(job: Job, rows: VideoRows, block_videos: int, pending: Sequence[int]) -> Dataset:
    """Build the dataset: videos in blocks, decoded, asked about; each block ends as one row, see `AnswerActor`."""
    config, reference = job.config, ray.put(rows)
    scaling = config.scaling
    decoded = build_dataset(
        layout(rows, block_videos, pending),
        reference,
        config.data,
        job.model.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        decode_on=scaling.decode_on,
    )
    # EvaluationFailed reports the first cause in one line; Ray Data would log its tracebacks as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return decoded.map_batches(
        AnswerActor,
        batch_size=None,
        compute=ActorPoolStrategy(min_size=scaling.least_workers, max_size=scaling.most_workers),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else None,
        resources=dict(scaling.worker_resources) or None,
        label_selector=dict(scaling.train_on) or None,
        fn_constructor_kwargs={
            "files": model_files.put(job.model.files), "rows": reference, "block_videos": block_videos,
            "asking": job.asking, "config": config,
        },
    )  # fmt: skip


def _log_unreadable(job: Job, replies: dict[int, Reply]) -> None:
    failed = [(number, reply.error) for number, reply in sorted(replies.items()) if reply.error is not None]
    for number, error in failed[:MAX_LOGGED]:
        question = job.questions[number]
        videos = ", ".join(escape_to_ascii(video)[:200] for video in question.videos)
        log.warning("not asked: %s (%s): %s", escape_to_ascii(question.id), videos, error)
    if len(failed) > MAX_LOGGED:
        log.warning("not asked: %s more questions", f"{len(failed) - MAX_LOGGED:,}")


def _first_cause(error: BaseException) -> str:
    """Return the error that an actor raised, without the errors that Ray wraps it in."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__}: {in_brief(cause, 500)}"
