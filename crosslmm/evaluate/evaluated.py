"""What one model has answered, and what it scores."""

from dataclasses import dataclass
from typing import Any

from crosslmm.evaluate.evaluation_folder import EvaluationFolder
from crosslmm.evaluate.scores.judging import Answer, Score
from crosslmm.tracking.versions import Version


@dataclass(frozen=True)
class ModelEvaluation:
    """The answers of one model to all questions."""

    model: str
    """Address of the version, or of the folder."""
    version: Version | None
    """The registered version; None for a folder."""
    folder: EvaluationFolder
    begun: dict[str, Any]
    """Content of the folder's evaluation.json."""
    answers: list[Answer]
    score: Score
    reliable: bool
    """Whether enough questions could be asked for the score to mean something, see `max_unreadable`."""
    asked: int
    """Questions that this start has asked; earlier starts asked the others."""
    questions_per_s: float | None = None
    """Rate of this start, without its start-up [1/s]."""
