"""The manifest: rows, each a conversation, most of them about a video. `formats` says what it may be written in."""

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosslmm import storage
from crosslmm.data import formats

RESERVED = ("<|im_start|>", "<|im_end|>", "<|video_pad|>")
"""Tokens of the chat format: written out in a text they would break out of their message."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VideoPart(_Strict):
    """Where the video stands in a message."""

    type: Literal["video"]


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


Part = Annotated[VideoPart | TextPart, Field(discriminator="type")]


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
    video: str | None = None
    """Path relative to the manifest, absolute path, or s3:// URI; none for text alone."""
    messages: Annotated[
        list[Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]], Field(min_length=1)
    ]
    kind: str | None = None
    """What sort of question it is; validation reports accuracy for each."""

    @model_validator(mode="after")
    def _video_has_its_place(self) -> "Row":
        parts = [p for m in self.messages if isinstance(m.content, list) for p in m.content]
        places = sum(isinstance(part, VideoPart) for part in parts)
        if places != (self.video is not None):
            raise ValueError(
                f"{'a' if self.video else 'no'} video is given, but the messages have {places} video parts"
            )
        said = [i for i, m in enumerate(self.messages) if isinstance(m, AssistantMessage)]
        shown = [
            i
            for i, m in enumerate(self.messages)
            if isinstance(m.content, list) and VideoPart(type="video") in m.content
        ]
        if said and said[0] == 0:
            raise ValueError("the assistant speaks first, and there is no question to answer")
        if said and shown and shown[0] > said[-1]:
            raise ValueError("the video comes after the last answer")
        texts = [m.content if isinstance(m.content, str) else "" for m in self.messages]
        texts += [part.text for part in parts if isinstance(part, TextPart)]
        if any(token in text for text in texts for token in RESERVED):
            raise ValueError(f"text holds one of the chat's own tokens, {', '.join(RESERVED)}")
        if not any(isinstance(m, AssistantMessage) for m in self.messages):
            raise ValueError("no message is the assistant's, so there is nothing to learn or to compare with")
        return self


class BadManifest(Exception):
    """A manifest that cannot be read as one; the message names the file, the line and the reason."""


class Manifest:
    """All rows of a manifest, checked, with their videos' places resolved.

    Rows are held in memory: about 1 kB each.

    Attributes:
        uri: where it was read.
        digest: sha256 of its bytes, hex.
        rows: one dict a line, `line` (from 1) included; `video` is absolute or a URI.
    """

    def __init__(self, uri: str) -> None:
        """Read and check the whole manifest.

        Raises:
            BadManifest: unreadable, empty, or with malformed lines; up to five of them are named.
        """
        self.uri = storage.absolute(uri)
        try:
            data, raw_rows = formats.read(self.uri)
        except (OSError, ValueError) as error:
            raise BadManifest(f"{uri}: cannot be read: {type(error).__name__}: {error}") from error
        self.digest = hashlib.sha256(data).hexdigest()
        self.rows: list[dict] = []
        reasons: list[str] = []
        first_line: dict[str, int] = {}
        for number, raw in raw_rows:
            try:
                row = Row.model_validate(formats.to_row(raw, number))
                if row.id in first_line:
                    raise ValueError(f"id {row.id!r} is also on line {first_line[row.id]}")
                first_line[row.id] = number
                video = row.video and storage.join(storage.parent(self.uri), row.video)
                if video:
                    storage.scheme_of(video)
                self.rows.append({**row.model_dump(), "video": video, "line": number})
            except (ValidationError, ValueError) as error:
                reasons.append(f"line {number}: {_reason(error)}")
        if reasons:
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            raise BadManifest(f"{uri}: {'; '.join(reasons[:5])}{more}")
        if not self.rows:
            raise BadManifest(f"{uri}: is empty")

    def __len__(self) -> int:
        return len(self.rows)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    # A key is foreign text too: ascii() keeps it to one harmless line.
    return f"{ascii(where)[1:-1]}: {message}" if where else message
