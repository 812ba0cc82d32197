"""What `train.activation_checkpointing: auto` stands for: as little recomputation as the memory allows."""

from collections.abc import Iterator
from typing import NamedTuple

from crosslmm.config import Checkpointing, Recomputed, RunConfig
from crosslmm.planning import cost, peak_memory
from crosslmm.planning.assumptions import Assumptions

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
"""Pairs (encoder, decoder), by how much they recompute: the encoder does most of the work."""
LONG_TEXT = 512
"""Text of the samples with which memory is planned: more than most data sets have, because a step that runs out of
memory ends the run [tokens]."""


class Choice(NamedTuple):
    """What replaces `auto`."""

    config: RunConfig
    """The run, with its choice in train.activation_checkpointing."""
    needed_bytes: int
    """Peak memory of a training step."""


def choose(config: RunConfig, available: float) -> Choice:
    """Replace `auto` in train.activation_checkpointing by the first of `BY_COST` whose training step fits, or by the
    last; runs, sweeps and plans choose alike.

    A step has samples of `data.num_frames` frames and `LONG_TEXT` of text, as far as the decoder's context allows, and
    the fewest workers that the run may have.

    Args:
        config: a run with `auto`.
        available: memory of a worker [bytes]; infinite where it is not known.

    Raises:
        BadConfig: the model cannot be built.
    """
    sample = cost.longest_sample(config, LONG_TEXT, Assumptions().stamp_tokens)
    scaling = config.scaling.model_copy(update={"num_workers": config.scaling.least_workers})
    fewest = in_samples(config.model_copy(update={"scaling": scaling}), cost.positions(config, *sample))
    for pair in _pairs(config):
        planned = _with(fewest, pair)
        traced = peak_memory.training_trace(planned, *sample)
        needed = peak_memory.training_memory(planned, traced).total
        if needed <= available:
            break
    return Choice(_with(config, pair), needed)


def _pairs(config: RunConfig) -> Iterator[Checkpointing]:
    """Yield the pairs of `BY_COST` that make a difference for a run."""
    frozen = not config.train.learning_rate.vision
    for encoder, decoder in BY_COST:
        # A compiled block is recomputed as a whole; a frozen encoder has no backward pass.
        refused = config.train.compile and "selective" in (encoder, decoder)
        if not refused and not (frozen and encoder != "none"):
            yield Checkpointing(encoder, decoder)


def _with(config: RunConfig, chosen: Checkpointing) -> RunConfig:
    train = config.train.model_copy(update={"activation_checkpointing": chosen._asdict()})
    return config.model_copy(update={"train": train})


def in_samples(config: RunConfig, positions: int) -> RunConfig:
    """Return the configuration with micro-batches counted in samples, all of them assumed to have `positions` tokens
    each."""
    if not config.train.micro_batch_tokens:
        return config
    samples = config.train.micro_batch_tokens // positions
    samples = max(1, min(samples, -(-config.train.global_batch_size // config.scaling.least_workers)))
    train = config.train.model_copy(update={"micro_batch_size": samples, "micro_batch_tokens": None})
    return config.model_copy(update={"train": train})
