"""TempCompass: multiple choice, yes or no, and the choice of a caption. Free captions need a judge and are left out.

    multi-choice/, yes_no/ and caption_matching/test-*.parquet    video_id, question (with its options), answer, dim
    videos/VIDEO_ID.mp4

lmms-eval asks an online model about answers that match no rule; here these are unparsable, and wrong.
"""

import re

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import NOTHING, first_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text
from crosslmm.evaluate.questions.question import BadBenchmark, Question, about

ENDINGS = {
    "multi-choice": "\nPlease directly give the best option:",
    "yes_no": "\nPlease answer yes or no:",
    "caption_matching": "\nPlease directly give the best option:",
}
"""End of the prompt of each task."""
LETTERED = re.compile(r"([A-D])(?:[.)].*)?", re.DOTALL)


def read(folder: Folder) -> list[Question]:
    """Read the questions of all tasks that the folder has."""
    tables = {task: f"{task}/test-*.parquet" for task in ENDINGS}
    present = [task for task in ENDINGS if any(name.startswith(f"{task}/") for name in folder.names)]
    if not present:
        raise BadBenchmark(f"{folder.uri}: there is no {' and no '.join(tables.values())} in it")
    return [question for task in present for question in _read_task(folder, task, tables[task])]


def extract(answer: str, question: Question) -> str:
    """Return the chosen option: its letter, yes or no, or the name of a caption."""
    task = dict(question.groups)["task"]
    if task == "yes_no":
        return first_letter(answer.lower(), r"\A(yes|no)")
    if task == "multi-choice":
        match = LETTERED.fullmatch(answer)
        return match[1] if match else answer[0] if answer in question.options else NOTHING
    return _caption(answer, question)


def _read_task(folder: Folder, task: str, table: str) -> list[Question]:
    def make(number: int, row: dict) -> Question:
        question, answer = text(row, "question"), text(row, "answer")
        options, choices = _options(task, question)
        return Question(
            id=f"{task}/{number}",
            **about(folder.video(f"videos/{text(row, 'video_id')}.mp4"), f"{question}{ENDINGS[task]}"),
            answer=_canonical(task, answer),
            options=options,
            choices=choices,
            groups=(("task", task), *groups(row, "dim")),
        )

    return questions_of(task, folder.rows(table), make)


def _canonical(task: str, answer: str) -> str:
    """Return the expected answer as `extract` returns it."""
    if task == "multi-choice":
        return answer[:1]
    return answer.split(":")[0] if task == "caption_matching" else answer


def _options(task: str, question: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the options of a question, as its lines have them, and the answers whose likelihoods can be compared."""
    if task == "yes_no":
        return ("yes", "no"), ("yes", "no")
    options = tuple(line for line in question.split("\n")[1:] if line)
    return options, tuple(option[0] for option in options) if task == "multi-choice" else ()


def _caption(answer: str, question: Question) -> str:
    """Return the name of the caption that the answer repeats: its line, its text, or its name, with or without the
    first word. If several captions match, the expected one wins."""
    chosen = NOTHING
    bare = answer.split(") ")[1] if ") " in answer else answer
    for line in sorted(question.options, key=lambda line: line.split(": ")[0] == question.answer):
        name, text, *_ = [*line.split(": "), ""]
        short = re.sub("Sentence |Option |Caption ", "", name)
        if answer == line or (text and text in (answer, bare)) or {answer, answer.replace(".", "")} & {name, short}:
            chosen = name
    return chosen


BENCHMARKS = [Benchmark("tempcompass", read, extract, max_new_tokens=128)]
