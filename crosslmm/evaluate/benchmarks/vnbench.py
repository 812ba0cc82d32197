"""VNBench: needles in videos. A sample is asked four times with its options in other places, and counts as right only
if all four answers are. lmms-eval has no such task: the prompt and the rule are those of its authors' scripts.

    VNBench-main-4try.json    video, question, options, gt_option, type, length, try
    VNBench_new/VIDEO.mp4     or video/, videos/
"""

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import NOTHING
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import Question, about, letters_of

ENDING = "Answer with the option's letter from the given choices directly."
FOLDERS = ("VNBench_new", "video", "videos", "VNBench")


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        path, options = text(row, "video").lstrip("/"), texts(row, "options")
        name, letters = path.rpartition("/")[2], letters_of(options)
        listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        return Question(
            id=str(number),
            **about(
                folder.video(path, *(f"{parent}/{name}" for parent in FOLDERS)),
                "\n".join([text(row, "question"), *listed, ENDING]),
            ),
            answer=text(row, "gt_option"),
            options=tuple(options),
            choices=letters,
            groups=groups(row, "length", task="type"),
            unit=f"{text(row, 'type')}/{name}",
        )

    return questions_of("VNBench", folder.rows("VNBench-main-4try.json", "*/VNBench-main-4try.json"), make)


def extract(answer: str, question: Question) -> str:
    """Return the first of A, B, C, D that occurs before the first full stop, in the order of the alphabet."""
    beginning = answer.split(".")[0]
    return next((letter for letter in "ABCD" if letter in beginning), NOTHING)


BENCHMARKS = [Benchmark("vnbench", read, extract, mean_of="task", tries=4)]
