"""Readers of the manifest formats. They return rows in one common form, which `row_schema` checks.

*.jsonl      one object a line: {"id", "video", "messages", "kind"}, or LLaVA's {"id", "video", "conversations"}
*.json       a list of such objects, as LLaVA publishes them
*.parquet    the same as columns; `messages` as a list of structs whose `content` is a list, or as JSON
a folder     videos, each with a sidecar NAME.json that has `messages` or `conversations`
"""

import codecs
import io
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet

from crosslmm import storage

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")
PLACEHOLDER = re.compile("<video>|<image>")
"""Marks a video or image in LLaVA's texts; LLaVA-Video writes <image> for videos too."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row or manifest in none of these formats; the message names the error."""


def is_folder(uri: str) -> bool:
    """Return whether a manifest is a folder: of videos with sidecars, or a prepared manifest."""
    return not uri.lower().endswith((".jsonl", ".json", ".parquet")) and storage.is_folder(uri)


def read_rows(uri: str) -> tuple[bytes, Iterator[tuple[int, str | bytes | dict[str, Any]]]]:
    """Read a manifest.

    Returns:
        (data, rows): the bytes that its digest covers, and (number from 1, JSON or parsed object) of each row.

    Raises:
        OSError, ValueError: it cannot be read, or does not have the format that its name promises.
    """
    name = uri.lower()
    if is_folder(uri):
        data = _folder_as_jsonl(uri)
        return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))
    data = storage.read_bytes(uri)
    if name.endswith(".parquet"):
        return data, parquet_rows(pyarrow.parquet.ParquetFile(io.BytesIO(data)))
    if name.endswith(".json"):
        return data, _json_list(data)
    return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))


def parse_row(raw: str | bytes | dict[str, Any], number: int) -> dict[str, Any]:
    """Convert one row to this project's form. In LLaVA's rows, unknown fields are dropped, and a missing id becomes
    `number`.

    Raises:
        BadRow: it is not an object, or its conversation has neither of the two forms.
    """
    try:
        row = json.loads(raw) if isinstance(raw, str | bytes) else raw
    except ValueError as error:
        raise BadRow(f"Invalid JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow("Input should be an object")
    if isinstance(row.get("messages"), str):
        try:
            row["messages"] = json.loads(row["messages"])
        except ValueError as error:
            raise BadRow(f"messages: Invalid JSON: {error}") from None
    for message in row["messages"] if isinstance(row.get("messages"), list) else []:
        # A Parquet column has one type: where questions are lists of parts, answers are too.
        if (
            isinstance(message, dict)
            and message.get("role") == "assistant"
            and isinstance(message.get("content"), list)
        ):
            message["content"] = "".join(part.get("text", "") for part in message["content"] if isinstance(part, dict))
    if "conversations" in row and "messages" not in row:
        known = {key: row[key] for key in ("video", "kind") if row.get(key) is not None}
        images = row.get("image") or []
        media = [{"type": "image", "image": image} for image in ([images] if isinstance(images, str) else images)]
        media = [{"type": "video"}] if "video" in known else media
        row = {"id": str(row.get("id", number)), **known, "messages": _messages(row["conversations"], media)}
    return row


def numbered_lines(data: bytes, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers; the first line has number `first`."""
    for number, line in enumerate(data.splitlines(), start=first):
        if line.strip():
            yield number, line


def _json_list(data: bytes) -> Iterator[tuple[int, Any]]:
    rows = json.loads(data)
    if not isinstance(rows, list):
        raise BadRow("a .json manifest is a list of objects; one object a line is .jsonl")
    return enumerate(rows, start=1)


def parquet_rows(
    file: pyarrow.parquet.ParquetFile, groups: Sequence[int] | None = None, first: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of these row groups (default: all), with their numbers from `first` on."""
    numbers = itertools.count(first)
    for batch in file.iter_batches(batch_size=4096, row_groups=groups):
        for row in batch.to_pylist():
            yield next(numbers), _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Drop nulls: a Parquet struct has the fields of all rows, and those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _folder_as_jsonl(uri: str) -> bytes:
    """Return the videos of a folder as JSONL, in the order of their names. Videos without a sidecar are left out."""
    names = storage.names_in(uri)
    sidecars = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".json")}
    lines = []
    for name in sorted(names):
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in VIDEO_SUFFIXES and stem in sidecars:
            try:
                sidecar = json.loads(storage.read_bytes(storage.join(uri, sidecars[stem])))
            except ValueError as error:
                raise BadRow(f"{sidecars[stem]}: Invalid JSON: {error}") from None
            if not isinstance(sidecar, dict):
                raise BadRow(f"{sidecars[stem]}: a sidecar is one object, with messages or conversations")
            lines.append(json.dumps({"id": stem, "video": storage.join(uri, name), **sidecar}))
    return "".join(f"{line}\n" for line in lines).encode()


def _messages(turns: Any, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert LLaVA's conversations to messages. The next of `media` replaces each placeholder, until none is left."""
    messages: list[dict[str, Any]] = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise BadRow('a turn of conversations is {"from": "human", "gpt" or "system", "value": text}')
        role, text = ROLES[turn["from"]], turn["value"]
        parts: list[dict[str, Any]] = []
        while role == "user" and media and (mark := PLACEHOLDER.search(text)):
            parts += [{"type": "text", "text": text[: mark.start()].strip()}, media.pop(0)]
            text = text[mark.end() :]
        if parts:
            parts.append({"type": "text", "text": text.strip()})
            messages.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
        else:
            messages.append({"role": role, "content": text})
    return messages
