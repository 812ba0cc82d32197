"""Manifests that people have -> rows in this project's form, not yet checked.

*.jsonl      one object a line: {"id", "video", "messages", "kind"}, or LLaVA's {"id", "video", "conversations"}
*.json       a list of such objects, as LLaVA's
*.parquet    the same as columns; `messages` as a list of structs whose `content` is a list, or as JSON
a folder     videos, each beside a NAME.json with `messages` or `conversations`
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

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")
PLACEHOLDER = re.compile("<video>|<image>")
"""Where LLaVA's texts say that a video or image stands; LLaVA-Video's own say image of a video."""
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row that is in none of the forms; the message says what is wrong."""


def is_folder(uri: str) -> bool:
    """Whether a manifest is a folder: of videos, or a prepared one."""
    return not uri.lower().endswith((".jsonl", ".json", ".parquet")) and storage.is_folder(uri)


def read_rows(uri: str) -> tuple[bytes, Iterator[tuple[int, str | bytes | dict[str, Any]]]]:
    """A manifest's bytes, for its digest, and its rows with their numbers from 1, as JSON or as values.

    Raises:
        OSError, ValueError: it cannot be read, or is not what its name says.
    """
    name = uri.lower()
    if is_folder(uri):
        data = _folder(uri)
        return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))
    data = storage.read_bytes(uri)
    if name.endswith(".parquet"):
        return data, parquet_rows(pyarrow.parquet.ParquetFile(io.BytesIO(data)))
    if name.endswith(".json"):
        return data, _list(data)
    return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))


def parse_row(raw: str | bytes | dict[str, Any], number: int) -> dict[str, Any]:
    """One row in our form. LLaVA's rows bring fields of their own, which are left out, and may lack an id.

    Raises:
        BadRow: not an object, or a conversation that is in neither form.
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
        # A Parquet column has one type, so that an answer is a list of parts where a question is.
        if (
            isinstance(message, dict)
            and message.get("role") == "assistant"
            and isinstance(message.get("content"), list)
        ):
            message["content"] = "".join(part.get("text", "") for part in message["content"] if isinstance(part, dict))
    if "conversations" in row and "messages" not in row:
        known = {key: row[key] for key in ("video", "kind") if row.get(key) is not None}
        images = row.get("image") or []
        shown = [{"type": "image", "image": image} for image in ([images] if isinstance(images, str) else images)]
        shown = [{"type": "video"}] if "video" in known else shown
        row = {"id": str(row.get("id", number)), **known, "messages": _messages(row["conversations"], shown)}
    return row


def numbered_lines(data: bytes, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from `first`."""
    for number, line in enumerate(data.splitlines(), start=first):
        if line.strip():
            yield number, line


def _list(data: bytes) -> Iterator[tuple[int, Any]]:
    rows = json.loads(data)
    if not isinstance(rows, list):
        raise BadRow("a .json manifest is a list of objects; one object a line is .jsonl")
    return enumerate(rows, start=1)


def parquet_rows(
    file: pyarrow.parquet.ParquetFile, groups: Sequence[int] | None = None, first: int = 1
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of these row groups, or of all, with their numbers from `first`."""
    numbers = itertools.count(first)
    for batch in file.iter_batches(batch_size=4096, row_groups=groups):
        for row in batch.to_pylist():
            yield next(numbers), _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """A struct has all fields of all its rows; those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _folder(uri: str) -> bytes:
    """A folder's videos as JSONL, by name. Videos without a sidecar are none of its rows."""
    names = storage.names_in(uri)
    sidecars = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".json")}
    lines = []
    for name in sorted(names):
        stem, ending = posixpath.splitext(name)
        if ending.lower() in VIDEOS and stem in sidecars:
            try:
                said = json.loads(storage.read_bytes(storage.join(uri, sidecars[stem])))
            except ValueError as error:
                raise BadRow(f"{sidecars[stem]}: Invalid JSON: {error}") from None
            if not isinstance(said, dict):
                raise BadRow(f"{sidecars[stem]}: a sidecar is one object, with messages or conversations")
            lines.append(json.dumps({"id": stem, "video": storage.join(uri, name), **said}))
    return "".join(f"{line}\n" for line in lines).encode()


def _messages(turns: Any, shown: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LLaVA's conversations -> messages; each placeholder is the place of the next video or image, if there is one."""
    messages: list[dict[str, Any]] = []
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or turn.get("from") not in SPEAKERS or not isinstance(turn.get("value"), str):
            raise BadRow('a turn of conversations is {"from": "human", "gpt" or "system", "value": text}')
        role, text = SPEAKERS[turn["from"]], turn["value"]
        parts: list[dict[str, Any]] = []
        while role == "user" and shown and (place := PLACEHOLDER.search(text)):
            parts += [{"type": "text", "text": text[: place.start()].strip()}, shown.pop(0)]
            text = text[place.end() :]
        if parts:
            parts.append({"type": "text", "text": text.strip()})
            messages.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
        else:
            messages.append({"role": role, "content": text})
    return messages
