"""LVBench.

*.parquet     video_path, question, options, answer; uid and question_type, where it has them
VIDEO_PATH    videos, relative to the folder
"""

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import strongest_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import Question, about, letters_of

ENDING = "\nAnswer the question with the option letter"


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        options = texts(row, "options") if "options" in row else []
        letters = letters_of(options)
        listed = [f"({letter}) {option}" for letter, option in zip(letters, options, strict=True)]
        return Question(
            id=str(number),
            **about(folder.video(text(row, "video_path")), "\n".join([text(row, "question"), *listed]) + ENDING),
            answer=text(row, "answer"),
            options=tuple(options),
            # Without a column of options, the question has them: four.
            choices=letters or tuple("ABCD"),
            groups=groups(row, "question_type", "type"),
        )

    return questions_of("LVBench", folder.rows("data/train-*.parquet", "train-*.parquet", "*.parquet"), make)


def extract(answer: str, question: Question) -> str:
    """Return the chosen letter."""
    return strongest_letter(answer, "ABCD")


BENCHMARKS = [Benchmark("lvbench", read, extract)]
