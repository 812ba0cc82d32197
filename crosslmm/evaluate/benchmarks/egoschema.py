"""EgoSchema, the subset whose answers are public.

Subset/test-*.parquet   video_idx, question, option (five, each with its letter), answer (number of the option)
videos/VIDEO_IDX.mp4    or .MP4
"""

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import NOTHING, staged_letters
from crosslmm.evaluate.questions.folder import Folder, questions_of, text, texts
from crosslmm.evaluate.questions.question import Question, about, letter_of, letters_of

ENDING = "\nAnswer with the option's letter from the given choices directly."


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        video, options = text(row, "video_idx"), texts(row, "option")
        return Question(
            id=f"{video}/{row.get('question_idx', number)}",
            **about(
                folder.video(f"videos/{video}.mp4", f"videos/{video}.MP4"),
                "\n".join([text(row, "question"), *options]) + ENDING,
            ),
            answer=letter_of(row["answer"], options),
            options=tuple(options),
            choices=letters_of(options),
        )

    return questions_of("EgoSchema", folder.rows("Subset/test-*.parquet", "test-*.parquet"), make)


def extract(answer: str, question: Question) -> str:
    """Take the last mention of each letter, in each way of writing it, and return the letter of the earliest of these.
    If no letter is mentioned, do the same with the options' texts."""
    letters = letters_of(question.options)
    text, matches = staged_letters(answer, [option.strip() for option in question.options], letters)
    shapes = {"bracket": "({})", "space": "{} ", "stop": "{}."}
    mentions = [(text.rfind(shape.format(x)), x) for name, shape in shapes.items() for x in matches[name]]
    if not mentions:
        lower, option_of = text.lower(), dict(zip(letters, question.options, strict=True))
        mentions = [(lower.rfind(option_of[x].strip().lower()), x) for x in matches["content"]]
    return min(mentions, key=lambda mention: mention[0])[1] if mentions else NOTHING


BENCHMARKS = [Benchmark("egoschema_subset", read, extract)]
