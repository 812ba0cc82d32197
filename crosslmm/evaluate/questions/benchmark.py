"""What a benchmark is: data and two functions. `crosslmm.evaluate.benchmarks` has them."""

from collections.abc import Callable
from dataclasses import dataclass

from crosslmm.evaluate.questions.folder import Folder
from crosslmm.evaluate.questions.question import Question

ReadQuestions = Callable[[Folder], list[Question]]
"""Reads the questions of a folder; raises `BadBenchmark`, see there."""
Extract = Callable[[str, Question], str]
"""Finds the answer in the model's words; returns "" if there is none."""


def no_folder(folder: Folder) -> list[Question]:
    """Read no questions: those of a manifest come from elsewhere."""
    return []


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its folder is read, how its answers are extracted and added up."""

    name: str
    """Name for `--benchmark`; that of lmms-eval's task, if there is one."""
    read: ReadQuestions = no_folder
    extract: Extract | None = None
    """None for open answers, which are compared with the expected ones."""
    max_new_tokens: int | None = 16
    """Length limit of an answer; None takes it from the longest expected one [tokens]."""
    mean_of: str | None = None
    """Key of groups whose accuracies are averaged for the score, each with the same weight; None: all questions have
    the same weight."""
    tries: int = 1
    """Questions of a unit, which is right if all of them are answered rightly; see `Question.unit`."""
