"""Collates samples into padded batches. The processor is passed in as a callable."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from crosslmm.data.quarantine import QuarantineEntry, to_printable
from crosslmm.data.video.decode import VideoFailure

Batch = Any
"""Return value of the processor: a mapping of names to tensors, with `.to(device)`."""

PLACEHOLDER_MESSAGES = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]
"""Conversation that replaces an unreadable sample, with weight 0, so that all ranks stay at the same step."""


@dataclass(frozen=True)
class Sample:
    """The row at one position of the run, with its decoded videos or features."""

    position: int
    """Position in the run, see `DeterministicSampler`."""
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
    """Weight of its loss; 0 for rows that pad an epoch."""
    error: str | None
    """Why its video is unreadable, or why no batch can be made of the row; None if all is well."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Quarantine entries of the unreadable rows at this position: those that were replaced, or this one."""


@dataclass
class ValidationBatch:
    """One batch of validation: inputs for the loss, and prompts with the expected answers."""

    inputs: Batch
    """The conversations, with labels."""
    prompts: Batch
    """The conversations up to the last answer."""
    expected: list[str | None]
    """The last answers; None for rows of weight 0."""
    kinds: list[str | None]
    """Category of each question."""


Made = TypeVar("Made")


def make_batch(samples: list[Sample], make: Callable[[list[Sample]], Made]) -> tuple[list[Sample], Made]:
    """Return the samples, and the batch that `make` makes of them.

    Whatever `make` raises for a sample belongs to that row, and a restart would meet it again: the row gets an `error`
    and an entry in `quarantined`, so that it counts like an unreadable one. This is the only place for such errors.
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
        reason = to_printable(text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}")[:300]
        entry = QuarantineEntry.from_row(vars(sample), "", VideoFailure(reason, "process"))
        return replace(sample, error=reason, quarantined=[*sample.quarantined, entry.to_dict()])


def micro_batches(
    samples: list[Sample], size: int, tokens: int | None = None, length_of: Callable[[Sample], int] | None = None
) -> list[list[Sample]]:
    """Divide the samples of one rank and step into micro-batches.

    Args:
        samples: in any order.
        size: samples of a micro-batch; ignored if `tokens` is given.
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
    messages, videos, weights = mask_unreadable(samples)
    return processor(messages, videos, weights=weights)


def collate_for_validation(samples: list[Sample], processor: Callable[..., Batch]) -> ValidationBatch:
    """Collate one validation batch; unreadable samples do not count in the score."""
    messages, videos, weights = mask_unreadable(samples)
    last = [max(i for i, m in enumerate(c) if m["role"] == "assistant") for c in messages]
    return ValidationBatch(
        inputs=processor(messages, videos, weights=weights),
        # All videos belong to the prompt: manifests allow none after the last answer.
        prompts=processor([c[:i] for c, i in zip(messages, last, strict=True)], videos, answer=True),
        expected=[c[i]["content"] if w else None for c, i, w in zip(messages, last, weights, strict=True)],
        kinds=[sample.kind for sample in samples],
    )


def mask_unreadable(samples: list[Sample]) -> tuple[list[Any], list[list[np.ndarray]], list[float]]:
    """Return conversations, videos and weights, with `PLACEHOLDER_MESSAGES` of weight 0 for unreadable samples."""
    return (
        [PLACEHOLDER_MESSAGES if s.error else s.messages for s in samples],
        [[] if s.error else s.videos for s in samples],
        [0.0 if s.error else s.weight for s in samples],
    )
