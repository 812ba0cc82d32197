"""NExT-QA, multiple choice.

MC/test-*.parquet        video, question, a0 to a4, answer (number of the option), qid, type
NExTVideo/VIDEO.mp4      or .MP4
"""

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import NOTHING, staged_letters
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text
from crosslmm.evaluate.questions.question import Question, about, letter_of, letters_of


def read(folder: Folder) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        video, options = text(row, "video"), [text(row, f"a{i}").strip() for i in range(5)]
        letters = letters_of(options)
        listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        return Question(
            id=f"{video}/{row.get('qid', number)}",
            **about(
                folder.video(f"NExTVideo/{video}.mp4", f"NExTVideo/{video}.MP4"),
                "\n".join([text(row, "question").strip(), *listed]),
            ),
            answer=letter_of(row["answer"], options),
            options=tuple(options),
            choices=letters,
            groups=groups(row, "type"),
        )

    return questions_of("NExT-QA", folder.rows("MC/test-*.parquet", "test-*.parquet"), make)


def extract(answer: str, question: Question) -> str:
    """Return the letter that is mentioned last in the first of these forms that occurs: (A), A and a space, A and a
    full stop, the option's text."""
    letters = letters_of(question.options)
    text, matches = staged_letters(answer, question.options, letters)
    lower, option_of = text.lower(), dict(zip(letters, question.options, strict=True))
    place = {
        "bracket": lambda x: text.rfind(f"({x})"),
        "space": lambda x: text.rfind(f" {x} "),
        "stop": lambda x: text.rfind(f" {x} "),  # lmms-eval looks for " A " here, too
        "content": lambda x: lower.rfind(option_of[x].lower()),
    }
    for stage, at in place.items():
        if matches[stage]:
            return max(matches[stage], key=at)
    return NOTHING


BENCHMARKS = [Benchmark("nextqa_mc_test", read, extract, max_new_tokens=128)]
