"""Samples -> padded batches. Knows the processor only as something that can be called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Batch = Any
"""What the processor makes: a mapping of names to tensors, with `.to(device)`."""

# What stands in the place of a sample that could not be read: it keeps every rank at the same step and teaches nothing.
PLACEHOLDER_MESSAGES = [{"role": "user", "content": "-"}, {"role": "assistant", "content": "-"}]


@dataclass(frozen=True)
class Sample:
    """One row of the manifest at one place of the run, read."""

    position: int
    manifest: str
    """Path or URI of its manifest."""
    line: int
    """Line of the manifest, from 1."""
    id: str
    messages: list[dict[str, Any]]
    videos: list[np.ndarray]
    """uint8 (frames, side, side, 3) each, in the order of the conversation's video and image parts; or
    features, the bits of bfloat16, uint16 (frames, patches, width)."""
    kind: str | None
    weight: float
    """0 where the row only fills up an epoch."""
    error: str | None
    """Why its video could not be read."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    """Ledger entries of the rows that were to stand here, this one included, and could not be read."""


@dataclass
class ValidationBatch:
    """What is asked of the model in validation."""

    inputs: Batch
    """The whole conversations, with labels."""
    prompts: Batch
    """The conversations up to the last answer."""
    expected: list[str | None]
    """The last answers; None where the row has no weight."""
    kinds: list[str | None]
    """What sort of question each one is."""


def micro_batches(
    samples: list[Sample], size: int, tokens: int | None = None, length_of: Callable[[Sample], int] | None = None
) -> list[list[Sample]]:
    """Share the samples of one rank in one step out to its micro-batches.

    Args:
        samples: in any order.
        size: samples of a micro-batch, where `tokens` is None.
        tokens: the most tokens of a micro-batch, padding included: samples x the longest one's. The samples are taken
            by length, so that those of one micro-batch need little padding. A sample that is longer stands alone.
        length_of: a sample's tokens, visual ones included.
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
    """One training batch; what could not be read has no weight in it."""
    messages, videos, weights = mask_unreadable(samples)
    return processor(messages, videos, weights=weights)


def collate_for_validation(samples: list[Sample], processor: Callable[..., Batch]) -> ValidationBatch:
    """One validation batch. A video that cannot be read is left out of the score."""
    messages, videos, weights = mask_unreadable(samples)
    last = [max(i for i, m in enumerate(c) if m["role"] == "assistant") for c in messages]
    return ValidationBatch(
        inputs=processor(messages, videos, weights=weights),
        # The manifest lets no video come after the last answer, so all of them belong to the prompt.
        prompts=processor([c[:i] for c, i in zip(messages, last, strict=True)], videos, answer=True),
        expected=[c[i]["content"] if w else None for c, i, w in zip(messages, last, weights, strict=True)],
        kinds=[sample.kind for sample in samples],
    )


def mask_unreadable(samples: list[Sample]) -> tuple[list[Any], list[list[np.ndarray]], list[float]]:
    """Conversations, videos and weights as they are taught: what could not be read says nothing."""
    return (
        [PLACEHOLDER_MESSAGES if s.error else s.messages for s in samples],
        [[] if s.error else s.videos for s in samples],
        [0.0 if s.error else s.weight for s in samples],
    )
