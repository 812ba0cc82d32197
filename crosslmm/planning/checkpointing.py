"""Chooses what the backward pass computes again: as little as the memory allows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from crosslmm.config import Checkpointing, Recomputed, RunConfig
from crosslmm.planning import cost
from crosslmm.planning.meta_trace import Trace

BY_COST: tuple[tuple[Recomputed, Recomputed], ...] = (
    ("none", "none"),
    ("none", "selective"),
    ("selective", "selective"),
    ("none", "full"),
    ("selective", "full"),
    ("full", "none"),
    ("full", "selective"),
    ("full", "full"),
)
"""Pairs (encoder, decoder), by how much they compute again: the encoder does most of the work."""


@dataclass(frozen=True)
class Choice:
    """A configuration that states what is computed again, and what its training step takes."""

    config: RunConfig
    traced: Trace
    memory: cost.Memory


def choose(
    config: RunConfig, frames: int, text_tokens: int, stamp_tokens: int = 0, available: float = math.inf
) -> Choice:
    """Return the configuration with `auto` replaced in train.activation_checkpointing: by the first of `BY_COST` whose
    training step fits, or by the last. Anything else stays.

    Args:
        config: the run; micro-batches are counted in samples.
        frames, text_tokens, stamp_tokens: of each sample, as for `cost.training_trace`.
        available: memory of a worker [bytes].

    Raises:
        BadConfig: see `cost.training_trace`.
    """
    for candidate in _candidates(config):
        traced = cost.training_trace(candidate, frames, text_tokens, stamp_tokens)
        choice = Choice(candidate, traced, cost.training_memory(candidate, traced))
        if choice.memory.total <= available:
            break
    return choice


def _candidates(config: RunConfig) -> Iterator[RunConfig]:
    if config.train.activation_checkpointing != "auto":
        yield config
        return
    # A frozen encoder has no backward pass.
    frozen = not config.train.learning_rate.vision
    for encoder, decoder in BY_COST:
        # A compiled block is computed again as a whole.
        compiled = config.train.compile and "selective" in (encoder, decoder)
        if not compiled and not (frozen and encoder != "none"):
            chosen = Checkpointing(encoder, decoder)._asdict()
            train = config.train.model_copy(update={"activation_checkpointing": chosen})
            yield config.model_copy(update={"train": train})


def in_samples(config: RunConfig, positions: int) -> RunConfig:
    """Return the configuration with micro-batches counted in samples, all of them assumed to have `positions` tokens
    each."""
    if not config.train.micro_batch_tokens:
        return config
    samples = config.train.micro_batch_tokens // positions
    samples = max(1, min(samples, config.train.global_batch_size // config.scaling.most_workers))
    train = config.train.model_copy(update={"micro_batch_size": samples, "micro_batch_tokens": None})
    return config.model_copy(update={"train": train})
