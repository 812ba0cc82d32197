"""Exact match: how answers are scored in validation, sweeps, jobs/answer.py, and jobs/evaluate.py with a manifest.

The model is asked for each answer of a conversation, given the row's own messages before it. A greedy answer is right
if it equals the row's answer, apart from white space and the composition of Unicode characters. Questions that cannot
be asked, because their video cannot be read, are neither right nor wrong; their count is reported beside the accuracy.
"""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

ACCURACY, COUNT, UNREADABLE = "validation/accuracy", "validation/count", "validation/unreadable"
"""Metrics of a score. `ACCURACY/KIND` and `COUNT/KIND` are those of one kind of question."""
MARGIN_TOKENS = 8
"""How much longer than the longest reference an answer may become [tokens]: the model may spell the
same text with more tokens than the tokenizer uses, and an answer that is longer still is a different answer."""

Outcome = tuple[str | None, bool | None]
"""Kind of a question, None without one; and whether its answer is right, None if it could not be asked."""


def questions_of(messages: list[dict[str, Any]]) -> Iterator[tuple[list[dict[str, Any]], str]]:
    """Yield (prompt, reference) for each answer of a conversation: the messages before it, and its text."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield messages[:i], message["content"]


def question_text(prompt: list[dict[str, Any]]) -> str:
    """Return the text of the last message of a prompt, without its videos."""
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def is_right(answer: str, reference: str) -> bool:
    """Return whether an answer equals the reference.

    >>> is_right(" A dog\\njumps.", "A dog jumps. "), is_right("a dog jumps.", "A dog jumps.")
    (True, False)
    """
    return _normalized(answer) == _normalized(reference)


def _normalized(text: str) -> str:
    # Tokenizers such as Qwen's compose characters, so the model never learns another form.
    return " ".join(unicodedata.normalize("NFC", text).split())


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, with the number of questions that it is a share of."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Share of right answers, 0 to 1; NaN if nothing was asked."""
        return self.right / self.asked if self.asked else math.nan

    def __str__(self) -> str:
        return f"{self.share:.3f} of {self.asked}"


@dataclass(frozen=True)
class Score:
    """The score of a model on a manifest."""

    overall: Accuracy
    by_kind: dict[str, Accuracy]
    """The same for each `kind`, sorted; questions without one count only in `overall`."""
    unreadable: int
    """Questions that could not be asked."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the score, without an accuracy if no question could be asked."""
        accuracies = {"": self.overall} | {f"/{kind}": accuracy for kind, accuracy in self.by_kind.items()}
        return {
            **{f"{ACCURACY}{end}": accuracy.share for end, accuracy in accuracies.items() if accuracy.asked},
            **{f"{COUNT}{end}": float(accuracy.asked) for end, accuracy in accuracies.items()},
            UNREADABLE: float(self.unreadable),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the score as a job prints it."""
        return {
            "accuracy": round(self.overall.share, 4) if self.overall.asked else None,
            "count": self.overall.asked,
            "accuracy_by_kind": {kind: round(accuracy.share, 4) for kind, accuracy in self.by_kind.items()},
            "count_by_kind": {kind: accuracy.asked for kind, accuracy in self.by_kind.items()},
            "unreadable": self.unreadable,
        }


def score(outcomes: Iterable[Outcome]) -> Score:
    """Count outcomes.

    >>> score([("colour", True), ("colour", False), (None, True), ("shape", None)]).metrics()["validation/accuracy"]
    0.6666666666666666
    """
    every: list[bool] = []
    by_kind: dict[str, list[bool]] = defaultdict(list)
    unreadable = 0
    for kind, right in outcomes:
        if right is None:
            unreadable += 1
            continue
        every.append(right)
        if kind is not None:
            by_kind[kind].append(right)
    return Score(
        overall=Accuracy(sum(every), len(every)),
        by_kind={kind: Accuracy(sum(rights), len(rights)) for kind, rights in sorted(by_kind.items())},
        unreadable=unreadable,
    )
