"""The manifest: rows, each a conversation, most of them about a video. `formats` says what it may be written in."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crosslmm import storage
from crosslmm.data import formats, manifest_shards
from crosslmm.data.frame_sampling import Sampling, excerpt
from crosslmm.data.manifest_shards import SCHEMA

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


class BadManifest(Exception):
    """A manifest that cannot be read as one; the message names the file, the line and the reason."""


MOST_UNPREPARED = 1_000_000
"""Rows of a manifest that is read and checked as a whole, in the driver: about a minute, and 0.3 to 1 kB a row."""


MOST_BYTES = 4 * 2**30
"""Of such a manifest; it is in memory twice while its lines are told apart."""
PREPARE = "make it one that is read piece by piece: python jobs/prepare.py convert {uri} FOLDER"


class Manifest:
    """The rows of a manifest, with their videos' places resolved.

    A prepared manifest (`jobs/prepare.py convert`) was checked when it was made, and its rows are read when they are
    asked for. Any other is read whole and checked now.

    Attributes:
        uri: where it was read.
        digest: sha256, hex, of its bytes, or of a prepared one's seal, which holds its parts' digests.
        roots: folders that its videos may lie in: its own, and what it was opened with.
    """

    def __init__(self, uri: str, roots: Sequence[str] = ()) -> None:
        """Open a manifest; `roots` are further folders that its videos may lie in.

        Raises:
            BadManifest: unreadable, empty, too long to be read whole, or with malformed lines; up to five of them are
                named.
        """
        self.uri = storage.absolute(uri)
        self._table: pa.Table | manifest_shards.PreparedTable
        self._folder = ""
        try:
            self._folder = folder_of(self.uri)
            self.roots = [self._folder, *map(storage.absolute, roots)]
            if manifest_shards.is_prepared(self.uri):
                self._table = manifest_shards.PreparedTable(self.uri)
                self.digest = self._table.digest
                self.take([0])  # where the others lie, as a rule
                return
            if self._folder != self.uri and (size := storage.stamp_of(self.uri)[0]) > MOST_BYTES:
                raise BadManifest(f"{uri}: has {size / 1e9:.1f} GB; {PREPARE.format(uri=uri)}")
            data, raw_rows = formats.read(self.uri)
        except (OSError, ValueError, RecursionError) as error:
            raise BadManifest(f"{uri}: cannot be read: {type(error).__name__}: {error}") from error
        self.digest = hashlib.sha256(data).hexdigest()
        records, reasons = check_rows(itertools.islice(raw_rows, MOST_UNPREPARED + 1), self.roots)
        if len(records) + len(reasons) > MOST_UNPREPARED:
            raise BadManifest(f"{uri}: has more than {MOST_UNPREPARED} rows; {PREPARE.format(uri=uri)}")
        if reasons:
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            named = "; ".join(f"line {number}: {reason}" for number, reason in reasons[:5])
            raise BadManifest(f"{uri}: {named}{more}")
        if not records:
            raise BadManifest(f"{uri}: is empty")
        self._table = pa.Table.from_pylist(records, SCHEMA)

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Some rows, by their numbers from 0: `id`, `messages`, `kind`, `line` (from 1), `manifest`, and `videos`, the
        absolute paths or URIs of its video and image parts, in order.

        Raises:
            BadManifest: a prepared row names a video outside of the roots.
        """
        rows = self._table.take(pa.array(indices, pa.int64())).select(["id", "videos", "messages", "kind", "line"])
        return [
            row
            | {
                "videos": [self._placed(video, f"line {row['line']}") for video in row["videos"]],
                "messages": json.loads(row["messages"]),
                "manifest": self.uri,
            }
            for row in rows.to_pylist()
        ]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All of them, for small manifests."""
        return self.take(np.arange(len(self)))

    def videos(self) -> Iterator[tuple[str, "Video"]]:
        """Every place that a row names, as often as it is named."""
        table = self._table.videos() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
        table = table.select(["videos", "seconds"])
        for row, record in enumerate(row for batch in table.to_batches(4096) for row in batch.to_pylist()):
            lengths = record["seconds"] or [None] * len(record["videos"])
            for place, seconds in zip(record["videos"], lengths, strict=True):
                yield self._placed(place, f"row {row + 1}"), Video(row, float("nan") if seconds is None else seconds)

    def _placed(self, video: str, where: str) -> str:
        """Where a row's video lies. What was checked when a prepared manifest was made may not hold for this one."""
        try:
            return placed(video, self.roots)
        except ValueError as error:
            raise BadManifest(f"{self.uri}: {where}: {error}") from None

    def lengths(self, sampling: Sampling, tokens_per_frame: int) -> np.ndarray:
        """About how many tokens each row is, before anything is opened: float32 (rows,). Characters count as a quarter;
        a video of unknown duration as the most frames that it may give."""
        table = self._table.lengths() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
        seconds = table["seconds"].combine_chunks()
        frames = sampling.count(np.asarray(seconds.flatten().to_numpy(zero_copy_only=False), np.float64))
        ends = np.concatenate([[0], np.cumsum(np.asarray(seconds.value_lengths().fill_null(0)))])
        summed = np.concatenate([[0], np.cumsum(frames)])[ends]
        chars = np.asarray(table["chars"].combine_chunks())
        return (chars / 4 + np.diff(summed) * tokens_per_frame).astype(np.float32)


@dataclass(frozen=True)
class Video:
    """Where a place is first named, and how long it is."""

    row: int
    """Number of the row, from 0."""
    seconds: float
    """NaN where it is not known, 0 of an image."""


class Rows:
    """The rows of several manifests, numbered one manifest behind the other, as `Order` does.

    Attributes:
        manifests: in this order.
        roots: of all of them.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.manifests = manifests
        self.roots = [root for manifest in manifests for root in manifest.roots]
        self._starts = np.cumsum([0, *map(len, manifests)])

    def take(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows of these numbers, int64 (n,), in their order; see `Manifest.take`."""
        source = np.searchsorted(self._starts, numbers, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for which in np.unique(source):
            mine = np.unique(numbers[source == which])
            found |= zip(mine.tolist(), self.manifests[which].take(mine - self._starts[which]), strict=True)
        return [found[number] for number in numbers.tolist()]

    def videos(self) -> dict[str, Video]:
        """Every place that rows name, once, in the order of the rows."""
        found: dict[str, Video] = {}
        for start, manifest in zip(self._starts.tolist(), self.manifests, strict=False):
            for place, video in manifest.videos():
                found.setdefault(place, Video(start + video.row, video.seconds))
        return found


def folder_of(uri: str) -> str:
    """What a manifest's relative places are relative to."""
    return uri if formats.is_folder(uri) else storage.parent(uri)


def check_rows(
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
    row = Row.model_validate(formats.to_row(raw, number))
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
    if not storage.within(excerpt(uri)[0], roots):
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
