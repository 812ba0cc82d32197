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
    """Where a video stands in a message."""

    type: Literal["video"]
    video: str | None = None
    """Which one: path relative to the manifest, absolute path, or s3:// URI; none for the row's own `video`."""

    @property
    def source(self) -> str | None:
        """The place of what is shown."""
        return self.video


class ImagePart(_Strict):
    """Where an image stands in a message: a video of one frame."""

    type: Literal["image"]
    image: str

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
    video: str | None = None
    """Path relative to the manifest, absolute path, or s3:// URI; none for text alone."""
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
        return [part.source or str(self.video) for part in self.shown]

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


class BadManifest(Exception):
    """A manifest that cannot be read as one; the message names the file, the line and the reason."""


class Manifest:
    """All rows of a manifest, checked, with their videos' places resolved.

    Rows are held in memory: about 1 kB each.

    Attributes:
        uri: where it was read.
        digest: sha256 of its bytes, hex.
        rows: one dict a line, `line` (from 1) included; `videos` are the
            absolute paths or URIs of its video and image parts, in order.
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
        folder = self.uri if formats.is_folder(self.uri) else storage.parent(self.uri)
        self.rows: list[dict] = []
        reasons: list[str] = []
        first_line: dict[str, int] = {}
        for number, raw in raw_rows:
            try:
                row = Row.model_validate(formats.to_row(raw, number))
                if row.id in first_line:
                    raise ValueError(f"id {row.id!r} is also on line {first_line[row.id]}")
                first_line[row.id] = number
                videos = [storage.join(folder, video) for video in row.videos]
                for video in videos:
                    storage.scheme_of(video)
                kept = row.model_dump(include={"id", "messages", "kind"}, exclude_none=True) | {"kind": row.kind}
                self.rows.append({**kept, "videos": videos, "line": number})
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
