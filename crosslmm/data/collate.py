"""Collates samples into padded batches. The processor is passed in as a callable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from crosslmm import scoring
from crosslmm.data.quarantine import QuarantineEntry, escape_to_ascii
from crosslmm.data.sampler import PADDING
from crosslmm.data.video.decode import VideoFailure

Batch = Any
"""Return value of the processor: a mapping of names to tensors, with `.to(device)`."""
RequireRoom = Callable[..., None]
"""Checks that an answer as long as the reference fits the token limits; raises ValueError if it does not. Takes the
prompt, the number of frames of each of its videos, the reference, and, as `times`, when each frame is shown [s]."""

PLACEHOLDER_MESSAGES = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
"""Conversation that replaces an unreadable sample, with weight 0, so that all ranks stay at the same step."""


@dataclass(frozen=True)
class Sample:
    """The row at one position of the run, with its decoded videos or features."""

    position: int
    """Position in the run, see `DeterministicSampler`; `PADDING` for no sample."""
    manifest: str
    """Path or URI of its manifest."""
    line: int
    """Line of the manifest, from 1."""
    id: str
    messages: list[dict[str, Any]]
    videos: list[np.ndarray]
    """The conversation's video and image parts, in order: uint8 (frames, side, side, 3) each; or their features as
    the bits of bfloat16, uint16 (frames, patches, width)."""
    kind: str | None
    """Category of the question."""
    weight: float
    """Weight of its loss; 0 for rows that pad an epoch, and for no sample."""
    error: str | None
    """Why its video is unreadable, or why no batch can be made of the row; None if all is well."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Quarantine entries of the unreadable rows at this position: those that were replaced, or this one."""
    times: list[list[float]] = field(default_factory=list)
    """When each frame of each video appears, counted from the video's first frame [s]."""
    shortfalls: list[str] = field(default_factory=list)
    """Which of its videos gave fewer frames than asked, and why."""

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to see: it is not a sample, or an unreadable one."""
        return self.position == PADDING or self.error is not None


@dataclass(frozen=True)
class Question:
    """One answer of a conversation that the model is asked for."""

    position: int
    """Position of its sample."""
    kind: str | None
    """Category of the question."""
    text: str
    """The question, without its videos."""
    reference: str
    """The answer that the row has."""
    videos: Sequence[np.ndarray] = field(default=(), repr=False, compare=False)
    """What the model sees: frames of each video and image, uint8 (frames, side, side, 3), or their features."""


@dataclass(frozen=True)
class Questions:
    """Questions that are asked together."""

    asked: list[Question]
    prompts: Callable[[], Batch]
    """Makes the prompts, the conversations up to the answers; called when they are asked, since each prompt has a copy
    of its frames."""

    def outcomes(self, answers: list[str]) -> list[scoring.Outcome]:
        """Return the outcomes of the answers to the prompts."""
        return [(q.kind, scoring.is_right(answer, q.reference)) for q, answer in zip(self.asked, answers, strict=False)]


@dataclass(frozen=True)
class ValidationBatch:
    """One batch of validation: inputs for the loss, and the questions."""

    inputs: Batch
    """The conversations, with labels."""
    questions: list[Questions]
    """All questions of the conversations, in groups no larger than the number of samples."""
    idle: Questions
    """A prompt that counts as no question: a rank generates for it while others still have questions, because FSDP
    needs every rank in every forward pass."""
    unreadable: list[scoring.Outcome]
    """Outcomes of the questions that cannot be asked."""


Made = TypeVar("Made")


def make_batch(samples: list[Sample], make: Callable[[list[Sample]], Made]) -> tuple[list[Sample], Made]:
    """Return the samples, and the batch that `make` makes of them.

    An exception that `make` raises for a sample is a defect of that row, which a restart would meet again: the row gets
    an `error` and an entry in `quarantined`, so that it counts like an unreadable one. No other code handles such
    exceptions.
    """
    try:
        return samples, make(samples)
    except Exception:
        samples = [sample if sample.error else _quarantined_if_bad(sample, make) for sample in samples]
        return samples, make(samples)


def _quarantined_if_bad(sample: Sample, make: Callable[[list[Sample]], Any]) -> Sample:
    """Return the sample; with an error and a quarantine entry, if no batch can be made of it alone."""
    try:
        make([sample])
        return sample
    except MemoryError:  # the machine's, not the row's
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        reason = escape_to_ascii(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:300]
        entry = QuarantineEntry.from_row(vars(sample), "", VideoFailure(reason, "process"))
        return replace(sample, error=reason, quarantined=[*sample.quarantined, entry.to_dict()])


def micro_batches(
    samples: list[Sample], size: int, tokens: int | None = None, length_of: Callable[[Sample], int] | None = None
) -> list[list[Sample]]:
    """Divide the samples of one rank and step into micro-batches.

    Args:
        samples: in any order.
        size: samples of a micro-batch; used if `tokens` is None.
        tokens: token limit of a micro-batch, padding included: number of samples x length of the longest. Samples are
            sorted by length, so micro-batches need little padding. A longer sample gets a micro-batch of its own.
        length_of: returns a sample's tokens, visual ones included.
    """
    if tokens is None or length_of is None:
        return [samples[i : i + size] for i in range(0, len(samples), size)]
    longest_first = sorted((-length_of(sample), i) for i, sample in enumerate(samples))
    batches: list[list[Sample]] = []
    longest = 0
    for minus_length, i in longest_first:
        if not batches or (len(batches[-1]) + 1) * longest > tokens:
            batches.append([])
            longest = -minus_length
        batches[-1].append(samples[i])
    return batches


def collate(samples: list[Sample], processor: Callable[..., Batch]) -> Batch:
    """Collate one training batch; unreadable samples get weight 0."""
    messages, videos, times, weights = mask_blank(samples)
    return processor(messages, videos, weights=weights, times=times)


def collate_for_validation(
    samples: list[Sample], processor: Callable[..., Batch], require_room: RequireRoom
) -> ValidationBatch:
    """Collate one validation batch; questions about unreadable samples count apart."""
    messages, videos, times, weights = mask_blank(samples)
    return ValidationBatch(
        inputs=processor(messages, videos, weights=weights, times=times),
        questions=collate_questions(samples, processor, require_room),
        idle=Questions([], partial(processor, [PLACEHOLDER_MESSAGES[:1]], [[]], for_generation=True)),
        unreadable=unreadable_questions(samples),
    )


def collate_questions(
    samples: list[Sample], processor: Callable[..., Batch], require_room: RequireRoom
) -> list[Questions]:
    """Collate the questions of readable samples, in groups no larger than the number of samples.

    Raises:
        ValueError: a sample has no answer to compare with, or one that could not be generated to its end.
    """
    asked: list[Question] = []
    prompts, videos, times = [], [], []
    for sample in samples:
        if sample.error or not sample.weight:
            continue
        before = len(asked)
        for prompt, reference in scoring.questions_of(sample.messages):
            parts = _media_parts(prompt)
            seen, shown = sample.videos[:parts], sample.times[:parts]
            require_room(prompt, [len(video) for video in seen], reference, times=shown)
            asked.append(Question(sample.position, sample.kind, scoring.question_text(prompt), reference, seen))
            prompts.append(prompt)
            videos.append(seen)
            times.append(shown)
        if len(asked) == before:
            raise ValueError("the conversation has no answer to compare with")
    slices = [slice(i, i + len(samples)) for i in range(0, len(asked), len(samples))]
    return [
        Questions(asked[some], partial(processor, prompts[some], videos[some], times=times[some], for_generation=True))
        for some in slices
    ]


def unreadable_questions(samples: list[Sample]) -> list[scoring.Outcome]:
    """Return the outcomes of the questions about unreadable samples."""
    unreadable = [sample for sample in samples if sample.error and sample.weight]
    return [(sample.kind, None) for sample in unreadable for _ in range(_count_questions(sample.messages))]


def _media_parts(messages: list[dict[str, Any]]) -> int:
    """Return the number of video and image parts."""
    return sum(part["type"] != "text" for m in messages if isinstance(m["content"], list) for part in m["content"])


def _count_questions(messages: Any) -> int:
    """Return the number of questions of a conversation; at least 1: the question may be what cannot be read."""
    try:
        return len(list(scoring.questions_of(messages))) or 1
    except (TypeError, LookupError, AttributeError):
        return 1


def mask_blank(
    samples: list[Sample],
) -> tuple[list[Any], list[list[np.ndarray]], list[list[list[float]]], list[float]]:
    """Return conversations, videos, times of their frames, and weights, with `PLACEHOLDER_MESSAGES` of weight 0 for
    blank samples."""
    return (
        [PLACEHOLDER_MESSAGES if s.is_blank else s.messages for s in samples],
        [[] if s.is_blank else s.videos for s in samples],
        [[] if s.is_blank else s.times for s in samples],
        [0.0 if s.is_blank else s.weight for s in samples],
    )
