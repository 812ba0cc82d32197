"""Video-MME, with and without subtitles.

videomme/test-*.parquet   videoID, question_id, question, options, answer, duration, domain, sub_category, task_type
data/ID.mp4               or .MP4, .mkv
subtitle/ID.srt           a video may have none
"""

import re
from collections.abc import Iterator
from functools import partial

from crosslmm.evaluate.questions.benchmark import Benchmark
from crosslmm.evaluate.questions.extraction import strongest_letter
from crosslmm.evaluate.questions.folder import Folder, groups, questions_of, text, texts
from crosslmm.evaluate.questions.question import Question, Subtitles, about, clock_seconds, letters_of

TABLES = ("videomme/test-*.parquet", "test-*.parquet", "*.parquet")
INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
ENDING = "\nAnswer with the option's letter from the given choices directly."
ENDING_WITH_SUBTITLES = "The best answer is:"
HEADING, ABSENT = "This video's subtitles are listed below: \n", "No subtitles available"
SPOKEN = re.compile(r'<font color="white" size=".72c">(.*?)</font>')
"""What is said; other lines are the names of songs and the like."""
TIMES = re.compile(r"(\d+:\d+:\d+,\d+) --> (\d+:\d+:\d+,\d+)")


def read(folder: Folder, with_subtitles: bool) -> list[Question]:
    """Read the questions."""

    def make(number: int, row: dict) -> Question:
        video, options = text(row, "videoID"), texts(row, "options")
        ending = ENDING_WITH_SUBTITLES if with_subtitles else ENDING
        prompt = "\n".join([INSTRUCTION, text(row, "question"), *options, ending])
        return Question(
            id=text(row, "question_id"),
            **about(folder.video(f"data/{video}.mp4", f"data/{video}.MP4", f"data/{video}.mkv"), prompt),
            answer=text(row, "answer"),
            options=tuple(options),
            choices=letters_of(options),
            groups=groups(row, "duration", "domain", "sub_category", "task_type"),
            subtitles=_subtitles(folder, video) if with_subtitles else None,
        )

    return questions_of("Video-MME", folder.rows(*TABLES), make)


def extract(answer: str, question: Question) -> str:
    """Return the chosen letter."""
    return strongest_letter(answer, "ABCD")


def _subtitles(folder: Folder, video: str) -> Subtitles:
    data = folder.read(f"subtitle/{video}.srt")
    lines = _spoken_lines((data or b"").decode(errors="replace").replace("\r\n", "\n"))
    # Subtitles without a spoken line make an empty list; only a missing file is called absent.
    return Subtitles(tuple(lines), interleaved=False, heading=HEADING, absent=ABSENT if data is None else "")


def _spoken_lines(srt: str) -> Iterator[tuple[float, float, str]]:
    """Yield start and end [s] and text of what is said in an .srt file."""
    for block in srt.split("\n\n"):
        _, times, *lines = [*block.strip("\n").split("\n"), ""]
        span, spoken = TIMES.fullmatch(times), SPOKEN.search(" ".join(lines))
        if span and spoken:
            yield clock_seconds(span[1]), clock_seconds(span[2]), spoken[1]


BENCHMARKS = [
    Benchmark("videomme", partial(read, with_subtitles=False), extract),
    Benchmark("videomme_w_subtitle", partial(read, with_subtitles=True), extract),
]
