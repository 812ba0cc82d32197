"""Readers of the manifest formats. They return rows in one common form, which `row_schema` checks.

*.jsonl      one object a line: {"id", "video", "messages", "kind"}, or LLaVA's {"id", "video", "conversations"}
*.json       a list of such objects, as LLaVA publishes them
*.parquet    the same as columns; `messages` as a list of structs whose `content` is a list, or as JSON
a folder     videos, each with a sidecar NAME.json that has `messages` or `conversations`
"""

import codecs
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from crosslmm import storage
from crosslmm.storage.parquet import OBJECT_BYTES, BadParquet, ParquetFile, string_bytes, unpacked_limit

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts")
PLACEHOLDER = re.compile("<video>|<image>")
"""Marks a video or image in LLaVA's texts; LLaVA-Video writes <image> for videos too."""
MAX_ROW_BYTES = 4 * 2**20
"""Longest row as JSON: a line, or the sidecar of a video [bytes]."""
MAX_ROW_VALUES = 10_000
"""Most values of a row: texts, numbers, objects and lists. Each can be an error to report, of a kilobyte."""
MAX_FILE_BYTES = 4 * 2**30
"""Largest file that is read in one piece [bytes]; it is in memory twice while it is split into rows."""
BATCH_ROWS, BATCH_BYTES = 1024, 64 * 2**20
"""Rows of a Parquet file that become Python objects together, and their size [rows], [bytes]."""
PREPARE_HINT = "convert it to one that is read in pieces: python jobs/prepare.py convert {uri} FOLDER"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row or manifest in none of these formats; the message names the error."""


def is_folder(uri: str) -> bool:
    """Return whether a manifest is a folder: of videos with sidecars, or a prepared manifest."""
    return not uri.lower().endswith((".jsonl", ".json", ".parquet")) and storage.is_folder(uri)


def read_rows(
    uri: str, roots: Sequence[str] = ()
) -> tuple[bytes, Iterator[tuple[int, str | bytes | dict[str, Any] | BadRow]]]:
    """Read a manifest.

    Args:
        uri: path or URI.
        roots: further folders that links in a folder may lead to.

    Returns:
        (data, rows): the bytes that its digest covers, and (number from 1, JSON or parsed object) of each row, or why
        it cannot be read.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or does not have the format that its name promises.
    """
    name = uri.lower()
    if is_folder(uri):
        data = _folder_as_jsonl(uri, roots)
        return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))
    if (size := storage.stamp_of(uri)[0]) > MAX_FILE_BYTES:
        first = "write its rows one a line, as .jsonl, and " if name.endswith(".json") else ""
        raise BadRow(f"has {size / 1e9:.1f} GB; {first}{PREPARE_HINT.format(uri=uri)}")
    data = storage.read_bytes(uri)
    if name.endswith(".parquet"):
        file = ParquetFile.from_bytes(data)
        return data, parquet_rows(file, range(file.footer.num_row_groups))
    if name.endswith(".json"):
        return data, _json_list(data)
    return data, numbered_lines(data.removeprefix(codecs.BOM_UTF8))


def parse_row(raw: str | bytes | dict[str, Any] | BadRow, number: int) -> dict[str, Any]:
    """Convert one row to this project's form. In LLaVA's rows, unknown fields are dropped, and a missing id becomes
    `number`.

    Raises:
        BadRow: it is not an object, or its conversation has neither of the two forms.
    """
    if isinstance(raw, BadRow):
        raise raw
    row = _parse_json(raw) if isinstance(raw, str | bytes) else _require_few_values(raw)
    if not isinstance(row, dict):
        raise BadRow("Input should be an object")
    if isinstance(row.get("messages"), str):
        row["messages"] = _parse_json(row["messages"], "messages: ")
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


def _parse_json(text: str | bytes, prefix: str = "") -> Any:
    if len(text) > MAX_ROW_BYTES:
        raise BadRow(f"{prefix}has {len(text)} bytes, of at most {MAX_ROW_BYTES}")
    try:
        value = storage.parse_json(text)
    except ValueError as error:
        raise BadRow(f"{prefix}Invalid JSON: {error}") from None
    return value if len(text) <= MAX_ROW_VALUES else _require_few_values(value)


def _require_few_values(row: Any) -> Any:
    pending, count = [row], 0
    while pending:
        value = pending.pop()
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += len(items)
        if count > MAX_ROW_VALUES:
            raise BadRow(f"has more than {MAX_ROW_VALUES} values")
        pending.extend(items)
    return row


def numbered_lines(data: bytes, first: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield the lines that are not blank, with their numbers; the first line has number `first`."""
    for number, line in enumerate(data.splitlines(), start=first):
        if line.strip():
            yield number, line


def _json_list(data: bytes) -> Iterator[tuple[int, Any]]:
    rows = storage.parse_json(data)
    if not isinstance(rows, list):
        raise BadRow("a .json manifest is a list of objects; one object a line is .jsonl")
    return enumerate(rows, start=1)


def parquet_rows(
    file: ParquetFile, groups: Sequence[int], first: int = 1
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yield the rows of these row groups, with their numbers from `first` on.

    Raises:
        BadParquet: the file is damaged, or its rows together are far larger than the file.
    """
    if file.footer.num_rows > file.size:  # every row has an id of its own
        raise BadParquet(f"it claims {file.footer.num_rows} rows in {file.size} bytes")
    numbers, text = itertools.count(first), 0
    for group in groups:
        for batch in file.batches(group, BATCH_ROWS):
            text += string_bytes(batch)
            if text > unpacked_limit(file.size):
                raise BadParquet(f"{file.size} bytes unpack to more than {unpacked_limit(file.size)} bytes of text")
            for row in _batch_rows(batch):
                yield next(numbers), row


def _batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    """Yield the rows of a batch; those that take too much memory stay unpacked."""
    size = string_bytes(batch, OBJECT_BYTES)
    if size <= BATCH_BYTES:
        yield from map(_without_nulls, batch.to_pylist())
    elif batch.num_rows == 1:
        yield BadRow(f"takes {size} bytes of memory, of at most {BATCH_BYTES}")
    else:
        half = batch.num_rows // 2
        yield from _batch_rows(batch.slice(0, half))
        yield from _batch_rows(batch.slice(half))


def _without_nulls(value: Any) -> Any:
    """Drop nulls: a Parquet struct has the fields of all rows, and those that a row lacks are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _folder_as_jsonl(uri: str, roots: Sequence[str]) -> bytes:
    """Return the videos of a folder as JSONL, in the order of their names. Videos without a sidecar are left out."""
    names = storage.names_in(uri, roots)
    sidecars = {posixpath.splitext(name)[0]: name for name in names if name.endswith(".json")}
    lines = []
    for name in names:
        stem, suffix = posixpath.splitext(name)
        if suffix.lower() in VIDEO_SUFFIXES and stem in sidecars:
            sidecar = _read_sidecar(uri, sidecars[stem], roots)
            lines.append(json.dumps({"id": stem, "video": storage.join(uri, name), **sidecar}))
    return "".join(f"{line}\n" for line in lines).encode()


def _read_sidecar(folder: str, name: str, roots: Sequence[str]) -> dict[str, Any]:
    try:
        sidecar = storage.read_json(storage.inside(folder, name, roots), MAX_ROW_BYTES)
    except storage.BadLocation:
        raise
    except ValueError as error:
        raise BadRow(f"{name}: Invalid JSON: {error}") from None
    if not isinstance(sidecar, dict):
        raise BadRow(f"{name}: a sidecar is one object, with messages or conversations")
    return sidecar


def _messages(turns: Any, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert LLaVA's conversations to messages. The next of `media` replaces each placeholder, until none is left."""
    messages: list[dict[str, Any]] = []
    unplaced = iter(media)
    for turn in turns if isinstance(turns, list) else []:
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            raise BadRow('a turn of conversations is {"from": "human", "gpt" or "system", "value": text}')
        role, text = ROLES[turn["from"]], turn["value"]
        parts: list[dict[str, Any]] = []
        end = 0
        for mark, part in zip(PLACEHOLDER.finditer(text) if role == "user" else (), unplaced, strict=False):
            parts += [{"type": "text", "text": text[end : mark.start()].strip()}, part]
            end = mark.end()
        if parts:
            parts.append({"type": "text", "text": text[end:].strip()})
            messages.append({"role": role, "content": [part for part in parts if part.get("text") != ""]})
        else:
            messages.append({"role": role, "content": text})
    return messages
