"""Conversations: texts with placeholders and the media that belong there become messages of parts.

Placeholders and media are counted against each other, so that no row loses a video, or keeps a `<video>` as text.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from crosslmm.data.rows.media import FRAMES, IMAGE_SUFFIXES, KINDS, Kind, Media
from crosslmm.data.rows.values import MAX_ROW_VALUES, BadRow

TOKENS: dict[str, Kind] = {
    "<video>": "video",
    "<image>": "image",
    "<|video_pad|>": "video",  # Qwen
    "<|image_pad|>": "image",
    "<|video|>": "video",  # mPLUG-Owl, Llama
    "<|image|>": "image",
    "<VideoHere>": "video",  # InternLM-XComposer
    "<ImageHere>": "image",
}
"""Placeholders of this and other projects, and what belongs there."""
PLACEHOLDER = re.compile(
    rf"(?:<\|vision_start\|>)?({'|'.join(map(re.escape, TOKENS))})(?:<\|vision_end\|>)?"  # Qwen wraps its two in these
)
LITERAL = 'to keep these characters as text, write the message as a part: {"type": "text", "text": ...}'


class Part(NamedTuple):
    """A part of a message."""

    kind: str
    """"text", "video" or "image"."""
    text: str = ""
    media: Media | None = None
    """The video or image; None for the next one that the row names outside of its messages."""


@dataclass
class Turn:
    """A message: its content is text, in which placeholders are to be replaced, or parts."""

    role: str
    content: str | list[Part]

    @property
    def parts(self) -> list[Part]:
        """The content as parts; empty text has none."""
        if isinstance(self.content, str):
            return [Part("text", self.content)] if self.content else []
        return self.content


@dataclass
class Conversation:
    """A row, whatever its form was."""

    turns: list[Turn]
    unplaced: dict[Kind, list[Media]] = field(default_factory=dict)
    """The videos and images that the row names outside of its messages."""
    id: Any = None
    kind: Any = None
    form: str = ""
    """Name of the row's form."""
    ids_repeat: bool = False
    """Whether rows of this form may share an id: that of their video, say."""
    media_first: bool = False
    """Media without any placeholder come before the text; otherwise they are an error."""
    image_means_video: bool = False
    """<image> stands for a video in a row that has videos only."""
    unused: set[str] = field(default_factory=set)
    """Keys that are known and not followed: see `forms.UNUSED`."""


def place_media(row: Conversation) -> list[Turn]:
    """Return the turns with parts in place of placeholders, each with its video or image.

    Raises:
        BadRow: there are more or fewer placeholders than media.
    """
    # Placeholders in parts of text count only if the row names media outside of its messages, and no part stands for
    # them.
    in_parts = any(row.unplaced.values()) and not any(_is_place(part) for turn in row.turns for part in turn.parts)
    turns = [turn if turn.role == "assistant" else Turn(turn.role, _split(row, turn, in_parts)) for turn in row.turns]
    for kind in KINDS:
        media = row.unplaced.get(kind, [])
        places = sum(_is_place(part) and part.kind == kind for turn in turns for part in turn.parts)
        if media and not places and row.media_first:
            _require_no_place_in_answers(kind, row.turns)
            question = next((turn for turn in turns if turn.role == "user"), turns[0])
            question.content = [Part(kind)] * len(media) + question.parts
        elif places != len(media):
            raise BadRow(_mismatch(kind, places, media))
    unplaced: dict[str, Iterator[Media]] = {kind: iter(media) for kind, media in row.unplaced.items()}
    for turn in turns:
        if isinstance(turn.content, list):
            turn.content = [
                Part(part.kind, media=next(unplaced[part.kind])) if _is_place(part) else part for part in turn.content
            ]
    return turns


def _is_place(part: Part) -> bool:
    return part.kind != "text" and part.media is None


def _split(row: Conversation, turn: Turn, in_parts: bool) -> str | list[Part]:
    """Return the content of a turn, in which placeholders have become parts without media."""
    if isinstance(turn.content, str):
        return list(_split_text(row, turn.content)) if PLACEHOLDER.search(turn.content) else turn.content
    if not in_parts:
        return turn.content
    split = [list(_split_text(row, part.text)) if part.kind == "text" else [part] for part in turn.content]
    return [part for parts in split for part in parts]


def _split_text(row: Conversation, text: str) -> Iterator[Part]:
    marks = list(itertools.islice(PLACEHOLDER.finditer(text), MAX_ROW_VALUES + 1))
    if len(marks) > MAX_ROW_VALUES:
        raise BadRow(f"has more than {MAX_ROW_VALUES} placeholders")
    ends = [0, *(mark.end() for mark in marks)]
    starts = [*(mark.start() for mark in marks), len(text)]
    for number, (end, start) in enumerate(zip(ends, starts, strict=True)):
        if between := text[end:start].strip() if marks else text:
            yield Part("text", between)
        if number < len(marks):
            means_video = row.image_means_video and row.unplaced.get("video") and not row.unplaced.get("image")
            yield Part("video" if means_video else TOKENS[marks[number][1]])


def _require_no_place_in_answers(kind: Kind, turns: list[Turn]) -> None:
    answers = [part.text for turn in turns if turn.role == "assistant" for part in turn.parts]
    if any(TOKENS[mark[1]] == kind for text in answers for mark in PLACEHOLDER.finditer(text)):
        raise BadRow(f"its {kind} stands in an answer, and an answer is text only")


def _mismatch(kind: Kind, places: int, media: list[Media]) -> str:
    counted = f"the messages have {places or 'no'} <{kind}>, and the row names {len(media) or 'no'} {kind}"
    if not media:
        return f"{counted}; {LITERAL}"
    are_frames = len(media) > 1 and all(str(name).lower().endswith(IMAGE_SUFFIXES) for name in media)
    return f"{counted}{'s' * (len(media) > 1)}{f'; {FRAMES}' if are_frames and kind == 'video' else ''}"
