"""Perception Test, multiple choice of its validation split.

mc_question_val/validation-*.parquet   video_name, question, question_id, options, answer_id, area, reasoning, tag
videos/VIDEO_NAME.mp4                  or .MP4
"""

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import first_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import Question, about, letter_of, letters_of

ENDING = "\nAnswer with the option's letter from the given choices directly."
SHOWN = "ABC"
"""Letters in the prompt. Questions have three options; lmms-eval calls each further one C, too."""


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        video, options = text(row, "video_name"), texts(row, "options")
        listed = [f"{SHOWN[min(i, 2)]}. {option}" for i, option in enumerate(options)]
        return Question(
            id=f"{video}/{row.get('question_id', number)}",
            **about(
                folder.video(f"videos/{video}.mp4", f"videos/{video}.MP4"),
                "\n".join([text(row, "question"), *listed]) + ENDING,
            ),
            answer=letter_of(row["answer_id"], options),
            options=tuple(options),
            choices=letters_of(options),
            groups=groups(row, "area", "reasoning", "tag"),
        )

    tables = ("mc_question_val/validation-*.parquet", "validation-*.parquet")
    return questions_of("Perception Test", folder.rows(*tables), make)


def extract(answer: str, question: Question) -> str:
    """Return the first capital A to D that stands alone."""
    return first_letter(answer, r"\b([A-D])\b")


BENCHMARKS = [Benchmark("perceptiontest_val_mc", read, extract, max_new_tokens=128)]
