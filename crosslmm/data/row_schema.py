"""The schema of a manifest's rows, and their validation."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from crosslmm import storage
from crosslmm.data import formats
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.text import first_error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MediaUri = Annotated[str, Field(min_length=1)]
"""Path relative to the manifest, absolute path, or s3:// URI; a suffix `#t=START,END` selects a part of a video [s]."""


class VideoPart(_Strict):
    """A video in a message."""

    type: Literal["video"]
    video: MediaUri | None = None
    """Its URI; None for the row's `video`."""

    @property
    def uri(self) -> str | None:
        """URI of the video; None for the row's `video`."""
        return self.video


class ImagePart(_Strict):
    """An image in a message; the model sees it as a video of one frame."""

    type: Literal["image"]
    image: MediaUri

    @property
    def uri(self) -> str | None:
        """URI of the image."""
        return self.image


class TextPart(_Strict):
    """Text in a message."""

    type: Literal["text"]
    text: str


ContentPart = Annotated[VideoPart | ImagePart | TextPart, Field(discriminator="type")]


class UserMessage(_Strict):
    """A message of the user, or the system prompt."""

    role: Literal["system", "user"]
    content: str | list[ContentPart]


class AssistantMessage(_Strict):
    """An answer; the loss is taken over these tokens only."""

    role: Literal["assistant"]
    content: str


class Row(_Strict):
    """One sample of a manifest."""

    id: Annotated[str, Field(min_length=1)]
    video: MediaUri | None = None
    """URI for the one video part without a URI of its own; None if there is no such part."""
    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1),
    ]
    kind: str | None = None
    """Category of the question; validation reports accuracy for each."""

    @property
    def media_parts(self) -> list[VideoPart | ImagePart]:
        """The video and image parts, in the order of the conversation."""
        return [part for part in self._parts() if not isinstance(part, TextPart)]

    @property
    def videos(self) -> list[str]:
        """The URIs of `media_parts`."""
        return [str(self.video) if part.uri is None else part.uri for part in self.media_parts]

    def _parts(self, start: int = 0) -> list[VideoPart | ImagePart | TextPart]:
        """Return the parts of the messages from number `start` on."""
        return [part for m in self.messages[start:] if isinstance(m.content, list) for part in m.content]

    @model_validator(mode="after")
    def _check_media(self) -> "Row":
        without_uri = sum(part.uri is None for part in self.media_parts)
        if without_uri != (self.video is not None):
            raise ValueError(
                f"{'a' if self.video else 'no'} video is given, but the messages have {without_uri} video parts"
                f"{' without a URI' if len(self.media_parts) > without_uri else ''}"
            )
        return self

    @model_validator(mode="after")
    def _check_conversation(self) -> "Row":
        answers = [i for i, m in enumerate(self.messages) if isinstance(m, AssistantMessage)]
        if not answers:
            raise ValueError("there is no message of the assistant, so there is nothing to learn or to compare with")
        if answers[0] == 0:
            raise ValueError("the assistant speaks first, so there is no question to answer")
        if any(not isinstance(part, TextPart) for part in self._parts(answers[-1])):
            raise ValueError("a video comes after the last answer")
        return self


def parse_rows(
    raw_rows: Iterable[tuple[int, Any]], roots: Sequence[str], first_line: dict[str, int] | None = None
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Check rows and convert them to records of `manifest_shards.SCHEMA`.

    Args:
        raw_rows: (line, row) as `formats` reads them.
        roots: folders that videos may lie in, see `resolve_video`.
        first_line: line of each row id that earlier calls have seen; this call adds its own. Default: none.

    Returns:
        (records, malformed): `malformed` has (line, reason) of each row that is left out.
    """
    records: list[dict[str, Any]] = []
    malformed: list[tuple[int, str]] = []
    first_line = {} if first_line is None else first_line
    for line, raw in raw_rows:
        try:
            record = to_record(raw, line, roots)
            earlier = first_line.setdefault(record["id"], line)
            if earlier != line:
                raise ValueError(f"id {record['id']!r} is also on line {earlier}")
            records.append(record)
        except (ValueError, TypeError, RecursionError) as error:  # JSON from outside can have any shape
            malformed.append((line, first_error(error)))
    return records, malformed


def to_record(raw: Any, line: int, roots: Sequence[str]) -> dict[str, Any]:
    """Convert one row, as `formats` reads it, to a record of `manifest_shards.SCHEMA`.

    Raises:
        ValueError: the row is malformed.
    """
    row = Row.model_validate(formats.parse_row(raw, line))
    videos = [resolve_video(video, roots) for video in row.videos]
    messages = row.model_dump(include={"messages"}, exclude_none=True)["messages"]
    # JSON may contain half a surrogate pair, which can be neither written as UTF-8 nor tokenized: encode() raises.
    json.dumps([row.id, row.kind, videos, messages], ensure_ascii=False).encode()
    return {
        "id": row.id,
        "videos": videos,
        "messages": json.dumps(messages),
        "kind": row.kind,
        "line": line,
        "chars": sum(len(m.content) if isinstance(m.content, str) else _characters(m.content) for m in row.messages),
        "seconds": [0.0 if isinstance(part, ImagePart) else None for part in row.media_parts],
    }


def resolve_video(video: str, roots: Sequence[str]) -> str:
    """Return the absolute path or URI of a row's video.

    Args:
        video: as the row names it.
        roots: folders that it may lie in, the manifest's folder first. Only the name is checked here; links are
            followed when the video is opened.

    Raises:
        ValueError: it lies in none of them, or its `#t=` ends before it begins.
    """
    uri = storage.resolve(roots[0], video)
    if "\0" in uri:
        raise ValueError(f"{uri!a} has a zero byte, as no file's name can")
    if not storage.within(split_time_range(uri)[0], roots):
        raise ValueError(f"{uri!a} lies outside of {roots[0]}; add its folder to --data.roots")
    return uri


def _characters(parts: Sequence[VideoPart | ImagePart | TextPart]) -> int:
    return sum(len(part.text) for part in parts if isinstance(part, TextPart))
