"""MLVU, its dev split: seven tasks of multiple choice, whose accuracies are averaged.

*.parquet     video_name, question (with its options), answer, task_type
VIDEO_NAME    videos, relative to the folder
"""

import re

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import strongest_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text
from crosslmm.evaluate.questions.question import Question, about

ENDING = "\nOnly give the best option.\nBest option: ("
OPTION = re.compile(r"^\(([A-H])\) (.*)$", re.MULTILINE)


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        question = text(row, "question")
        options = OPTION.findall(question)
        return Question(
            id=str(number),
            **about(folder.video(text(row, "video_name")), f"{question}{ENDING}"),
            answer=text(row, "answer"),
            options=tuple(option for _, option in options),
            choices=tuple(letter for letter, _ in options),
            groups=groups(row, task="task_type"),
        )

    return questions_of("MLVU", folder.rows("data/test-*.parquet", "test-*.parquet", "*.parquet"), make)


def extract(answer: str, question: Question) -> str:
    """Return the chosen letter."""
    return strongest_letter(answer, "ABCD")


BENCHMARKS = [Benchmark("mlvu_dev", read, extract, mean_of="task")]
