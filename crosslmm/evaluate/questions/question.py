"""One question of a benchmark, and how its subtitles get into the prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

Messages = list[dict[str, Any]]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHORTEST_SUBTITLE_S = 1.0
"""An interleaved subtitle counts as shown for this long at least [s]."""


class BadBenchmark(ValueError):
    """Data that no benchmark can be read from; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Subtitles:
    """Subtitles of a video. Which of them the model reads depends on the times of the frames that it sees."""

    lines: tuple[tuple[float, float, str], ...]
    """Start, end [s], text; in the order of their file."""
    interleaved: bool
    """Between the frames; otherwise as a list before the question, of those that are shown at one of the frames."""
    heading: str = ""
    """Text before the list."""
    absent: str = ""
    """Text in place of the list of a video without subtitles."""


@dataclass(frozen=True)
class Question:
    """One question, as all benchmarks have it. A row of a benchmark may also be a conversation that ends in one."""

    id: str
    """Unique in its benchmark."""
    videos: tuple[str, ...]
    """Path or URI of each video part, see `Sample.videos`."""
    messages: Messages
    """The conversation up to the answer."""
    answer: str
    """The expected answer, in the form in which `Benchmark.extract` returns one."""
    options: tuple[str, ...] = ()
    """Texts of the options; empty for an open question."""
    choices: tuple[str, ...] = ()
    """Answers whose likelihoods can be compared, such as the letters of the options."""
    groups: tuple[tuple[str, str], ...] = ()
    """(key, value), such as ("duration", "long"); a key may have several values."""
    unit: str = ""
    """Questions with the same unit count as one, which is right if all of them are; empty: each counts for itself."""
    subtitles: Subtitles | None = None
    error: str | None = None
    """Why it cannot be asked; None if it can."""

    @property
    def text(self) -> str:
        """The last message, without its videos and subtitles."""
        content = self.messages[-1]["content"]
        return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def about(video: str, text: str) -> dict[str, Any]:
    """Return the arguments of `Question` for a text that asks about one video."""
    return {"videos": (video,), "messages": [{"role": "user", "content": [{"type": "video"}, _part(text)]}]}


def letters_of(options: Sequence[str]) -> tuple[str, ...]:
    """Return the letters of options: A, B, ...

    Raises:
        BadBenchmark: there are more options than letters.
    """
    if len(options) > len(LETTERS):
        raise BadBenchmark(f"has {len(options)} options, of at most {len(LETTERS)}")
    return tuple(LETTERS[: len(options)])


def letter_of(number: Any, options: Sequence[str]) -> str:
    """Return the letter of an answer that is given as the number of an option, from 0.

    Raises:
        BadBenchmark: there is no such option.
    """
    try:
        index = int(number)
    except (TypeError, ValueError):
        raise BadBenchmark(f"its answer {number!a} is not the number of an option") from None
    if not 0 <= index < len(options):
        raise BadBenchmark(f"its answer is option {index}, and it has options 0 to {len(options) - 1}")
    return letters_of(options)[index]


def clock_seconds(clock: str) -> float:
    """Return the seconds of H:MM:SS.fff, with a full stop or a comma.

    Raises:
        ValueError: it has another form.
    """
    hours, minutes, seconds = clock.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def conversation(question: Question, times: Sequence[np.ndarray]) -> tuple[Messages, list[list[int]]]:
    """Return the conversation with its subtitles in place.

    Args:
        question: the question.
        times: when each frame of each of its videos appears [s].

    Returns:
        (messages, frames): the frames of each video part, as numbers of the frames of all videos, concatenated.
    """
    counts = [len(of_video) for of_video in times]
    starts = np.cumsum([0, *counts])
    frames = [list(range(start, start + count)) for start, count in zip(starts, counts, strict=False)]
    subtitles = question.subtitles
    if subtitles is None:
        return question.messages, frames
    *before, last = question.messages
    text = last["content"][-1]["text"]
    if not subtitles.interleaved:
        content = [*last["content"][:-1], _part(f"{subtitles.heading}{_listed(subtitles, times[0])}\n{text}")]
        return [*before, last | {"content": content}], frames
    content, runs = _interleaved(subtitles, times[0])
    return [*before, last | {"content": [*content, _part(f"\n{text}")]}], runs


def _listed(subtitles: Subtitles, times: np.ndarray) -> str:
    """Return the texts of the subtitles that are on screen at one of the times [s]."""
    if not subtitles.lines:
        return subtitles.absent
    return "\n".join(text for start, end, text in subtitles.lines if ((start <= times) & (times < end)).any())


def _interleaved(subtitles: Subtitles, times: np.ndarray) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Return parts of a message, and the frames of its video parts: a subtitle stands before the first frame that is
    shown after the middle of its time. Subtitles during which no frame is shown are left out."""
    items: list[int | str] = []
    shown = 0
    for start, end, text in subtitles.lines:
        middle = (start + end) / 2
        until = max(shown, int(np.searchsorted(times, middle, side="right")))
        items += range(shown, until)
        shown = until
        if end - start < SHORTEST_SUBTITLE_S:
            start, end = middle - SHORTEST_SUBTITLE_S / 2, middle + SHORTEST_SUBTITLE_S / 2
        if ((start < times) & (times < end)).any():
            items.append(text)
    items += range(shown, len(times))
    parts: list[dict[str, Any]] = []
    runs: list[list[int]] = []
    for is_text, group in groupby(items, key=lambda item: isinstance(item, str)):
        run: list[Any] = list(group)
        parts += [_part("\n")] * bool(parts)
        parts.append(_part("\n".join(run)) if is_text else {"type": "video"})
        runs += [run] * (not is_text)
    return parts, runs


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
