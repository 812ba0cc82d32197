"""The schema of a manifest's rows, and their validation."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosslmm import storage
from crosslmm.data import formats
from crosslmm.data.frame_sampling import split_time_range

RESERVED = ("<|im_start|>", "<|im_end|>", "<|video_pad|>")
"""Tokens of the chat format: written out in a text they would break out of their message."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


Place = Annotated[str, Field(min_length=1)]


class VideoPart(_Strict):
    """Where a video stands in a message."""

    type: Literal["video"]
    video: Place | None = None
    """Which one: path relative to the manifest, absolute path, or s3:// URI, `#t=START,END` [s] behind it for a part of
    it; none for the row's own `video`."""

    @property
    def source(self) -> str | None:
        """The place of what is shown."""
        return self.video


class ImagePart(_Strict):
    """Where an image stands in a message: a video of one frame."""

    type: Literal["image"]
    image: Place

    @property
    def source(self) -> str | None:
        """The place of what is shown."""
        return self.image


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


Part = Annotated[VideoPart | ImagePart | TextPart, Field(discriminator="type")]


class UserMessage(_Strict):
    """What the user, or the system prompt, says."""

    role: Literal["system", "user"]
    content: str | list[Part]


class AssistantMessage(_Strict):
    """What the model is to say: the loss is taken of these words alone."""

    role: Literal["assistant"]
    content: str


class Row(_Strict):
    """One sample."""

    id: Annotated[str, Field(min_length=1)]
    video: Place | None = None
    """Path relative to the manifest, absolute path, or s3:// URI, `#t=START,END` [s] behind it for a part of it; none
    for text alone."""
    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]], Field(min_length=1)
    ]
    kind: str | None = None
    """What sort of question it is; validation reports accuracy for each."""

    @property
    def shown(self) -> list[VideoPart | ImagePart]:
        """The video and image parts, in the order of the conversation."""
        parts = [p for m in self.messages if isinstance(m.content, list) for p in m.content]
        return [part for part in parts if not isinstance(part, TextPart)]

    @property
    def videos(self) -> list[str]:
        """What each of them shows."""
        return [str(self.video) if part.source is None else part.source for part in self.shown]

    @model_validator(mode="after")
    def _videos_have_their_places(self) -> "Row":
        unnamed = sum(part.source is None for part in self.shown)
        if unnamed != (self.video is not None):
            raise ValueError(
                f"{'a' if self.video else 'no'} video is given, but the messages have {unnamed} video parts"
                f"{' without a place of their own' if len(self.shown) > unnamed else ''}"
            )
        return self

    @model_validator(mode="after")
    def _conversation_can_be_learnt(self) -> "Row":
        said = [i for i, m in enumerate(self.messages) if isinstance(m, AssistantMessage)]
        parts = [p for m in self.messages if isinstance(m.content, list) for p in m.content]
        if not said:
            raise ValueError("no message is the assistant's, so there is nothing to learn or to compare with")
        if said[0] == 0:
            raise ValueError("the assistant speaks first, and there is no question to answer")
        after = [p for m in self.messages[said[-1] :] if isinstance(m.content, list) for p in m.content]
        if any(not isinstance(part, TextPart) for part in after):
            raise ValueError("a video comes after the last answer")
        texts = [m.content if isinstance(m.content, str) else "" for m in self.messages]
        texts += [part.text for part in parts if isinstance(part, TextPart)]
        if any(token in text for text in texts for token in RESERVED):
            raise ValueError(f"text holds one of the chat's own tokens, {', '.join(RESERVED)}")
        return self


def parse_rows(
    raw_rows: Iterable[tuple[int, Any]], roots: Sequence[str], first_line: dict[str, int] | None = None
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Rows as `formats` reads them -> records of `SCHEMA`, and (line, reason) of each malformed row. `first_line` knows
    the ids of the rows before these, and learns theirs; for `roots` see `placed`."""
    records: list[dict[str, Any]] = []
    reasons: list[tuple[int, str]] = []
    first_line = {} if first_line is None else first_line
    for number, raw in raw_rows:
        try:
            record = to_record(raw, number, roots)
            before = first_line.setdefault(record["id"], number)
            if before != number:
                raise ValueError(f"id {record['id']!r} is also on line {before}")
            records.append(record)
        except (ValueError, TypeError, RecursionError) as error:  # foreign JSON is of any shape
            reasons.append((number, reason_of(error)))
    return records, reasons


def to_record(raw: Any, number: int, roots: Sequence[str]) -> dict[str, Any]:
    """One row as `formats` reads it -> a record of `SCHEMA`, its videos' places resolved.

    Raises:
        ValueError: it is malformed; `reason_of` says why in one line.
    """
    row = Row.model_validate(formats.parse_row(raw, number))
    videos = [placed(video, roots) for video in row.videos]
    messages = row.model_dump(include={"messages"}, exclude_none=True)["messages"]
    # Half a surrogate pair is valid JSON, and no text that can be written or tokenized.
    json.dumps([row.id, row.kind, videos, messages], ensure_ascii=False).encode()
    return {
        "id": row.id,
        "videos": videos,
        "messages": json.dumps(messages),
        "kind": row.kind,
        "line": number,
        "chars": sum(len(m.content) if isinstance(m.content, str) else _letters(m.content) for m in row.messages),
        "seconds": [0.0 if isinstance(part, ImagePart) else None for part in row.shown],
    }


def placed(video: str, roots: Sequence[str]) -> str:
    """The absolute path or URI of a row's video, which must lie in one of `roots`, the manifest's own folder first, by
    its name: links are followed when it is opened.

    Raises:
        ValueError: it does not, or names no part of a video.
    """
    uri = storage.join(roots[0], video)
    if not storage.within(split_time_range(uri)[0], roots):
        raise ValueError(f"{uri!a} lies outside of {roots[0]}; add its folder to --data.roots")
    return uri


def _letters(parts: Sequence[VideoPart | ImagePart | TextPart]) -> int:
    return sum(len(part.text) for part in parts if isinstance(part, TextPart))


def reason_of(error: Exception) -> str:
    """Why a row is malformed, in one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    # A key is foreign text too: ascii() keeps it to one harmless line.
    return f"{ascii(where)[1:-1]}: {message}" if where else message
