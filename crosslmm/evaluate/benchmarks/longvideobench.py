"""LongVideoBench, its validation split: the video alone, or its frames with the subtitles between them.

validation-*.parquet   id, question, option0 to option4 ("N/A" if absent), correct_choice, video_path,
  or lvb_val.json      subtitle_path, duration, starting_timestamp_for_subtitles, duration_group, question_category;
                       lvb_val.json has `candidates` instead of the options
videos/VIDEO_PATH, subtitles/SUBTITLE_PATH
"""

from functools import partial
from typing import Any

from crosslmm import storage
from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import first_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import (
    BadBenchmark,
    Question,
    Subtitles,
    about,
    clock_seconds,
    letter_of,
    letters_of,
)

ENDING = "Answer with the option's letter from the given choices directly.\n"
ABSENT = "N/A"
ANNOUNCEMENTS = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
"""Phrases that are removed before a letter is looked for: they contain capital letters themselves."""


def read(folder: Folder, with_subtitles: bool) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        options = _options(row)
        letters = letters_of(options)
        listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        prompt = "\n".join([text(row, "question"), *listed, ENDING])
        return Question(
            id=text(row, "id"),
            **about(folder.video(f"videos/{text(row, 'video_path')}"), prompt),
            answer=letter_of(row["correct_choice"], options),
            options=tuple(options),
            choices=letters,
            groups=groups(row, "duration_group", "question_category"),
            subtitles=_subtitles(folder, row) if with_subtitles else None,
        )

    tables = ("validation-*.parquet", "data/validation-*.parquet", "lvb_val.json")
    return questions_of("LongVideoBench", folder.rows(*tables), make)


def extract(answer: str, question: Question) -> str:
    """Return the first capital A to E, without the phrases that announce an answer."""
    for phrase in ANNOUNCEMENTS:
        answer = answer.replace(phrase, "")
    return first_letter(answer, "([A-E])")


def _options(row: dict) -> list[str]:
    if "candidates" in row:
        return texts(row, "candidates")
    return [text(row, f"option{i}") for i in range(5) if row.get(f"option{i}", ABSENT) != ABSENT]


def _subtitles(folder: Folder, row: dict) -> Subtitles:
    data = folder.read(f"subtitles/{text(row, 'subtitle_path')}")
    if data is None:
        raise BadBenchmark(f"there is no subtitles/{text(row, 'subtitle_path')}")
    try:
        first = float(row["starting_timestamp_for_subtitles"])
        lines = [_line(entry, first, float(row["duration"])) for entry in storage.parse_json(data)]
    except (TypeError, ValueError, LookupError, AttributeError):
        raise BadBenchmark(f"subtitles/{text(row, 'subtitle_path')} are not a list of texts with times") from None
    return Subtitles(tuple(lines), interleaved=True)


def _line(entry: dict[str, Any], first: float, duration: float) -> tuple[float, float, str]:
    """Return start and end from the start of the video [s], and the text, of either of the two forms of subtitles."""
    if "timestamp" in entry:
        start, end = entry["timestamp"]
        # Where the end is not a time, the subtitle stays to the end of the video.
        return float(start) - first, (end if isinstance(end, float) else duration) - first, str(entry["text"])
    return clock_seconds(entry["start"]) - first, clock_seconds(entry["end"]) - first, str(entry["line"])


BENCHMARKS = [
    Benchmark("longvideobench_val_v", partial(read, with_subtitles=False), extract, max_new_tokens=32),
    Benchmark("longvideobench_val_i", partial(read, with_subtitles=True), extract, max_new_tokens=32),
]
