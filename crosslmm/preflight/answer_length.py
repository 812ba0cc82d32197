"""How long a generated answer may become, taken from the answers that it is compared with."""

from crosslmm.config import BadConfig
from crosslmm.data.manifest import Manifest
from crosslmm.model import CrossLMMProcessor
from crosslmm.scoring import MARGIN_TOKENS, questions_of

ROWS_AT_ONCE = 4096
"""Rows that are read at a time."""


def answer_limit(manifest: Manifest, processor: CrossLMMProcessor, configured: int | None = None) -> int:
    """Return the length limit of answers that are compared with those of a manifest [tokens].

    It is the longest of them and a margin, and at most half of the decoder's context: a row with a longer answer is
    left out by itself, instead of leaving no room for the prompts of all.

    Args:
        manifest: its answers are read.
        processor: counts tokens.
        configured: the limit, if somebody chose one.

    Raises:
        BadConfig: `configured` is shorter than an answer.
    """
    longest, line = 0, 0
    for start in range(0, len(manifest), ROWS_AT_ONCE):
        for row in manifest.take(range(start, min(start + ROWS_AT_ONCE, len(manifest)))):
            if (length := _longest_answer(row["messages"], processor, longest)) > longest:
                longest, line = length, row["line"]
    if configured is not None and configured < longest:
        raise BadConfig(
            f"train.max_new_tokens is {configured}, and the answer on line {line} of {manifest.uri} takes {longest} "
            "tokens, so it could never be given: leave train.max_new_tokens out, or raise it"
        )
    return min(configured or longest + MARGIN_TOKENS, processor.max_length // 2)


def _longest_answer(messages: object, processor: CrossLMMProcessor, longest: int) -> int:
    """Return the tokens of a conversation's longest answer; 0 if none can be longer than `longest`."""
    try:
        # A token has at least one byte, so most answers need not be tokenized; one more token ends an answer.
        answers = [text for _, text in questions_of(messages) if len(text.encode()) >= longest]  # type: ignore[arg-type]
        return max(map(processor.answer_length, answers), default=0)
    except (TypeError, LookupError, AttributeError, ValueError):
        return 0  # no batch can be made of this row: it is left out when it is read
