"""The rows of manifests, checked: conversations of any form become records of `manifest_shards.SCHEMA`."""

import hashlib
import json
import posixpath
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from crosslmm import storage
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.rows.conversation import Part, Turn, place_media
from crosslmm.data.rows.forms import conversation_of
from crosslmm.data.rows.media import Embedded, Media
from crosslmm.data.rows.values import BadRow, shown
from crosslmm.data.video.frame_list import is_frame_list, map_files, parse_frame_list
from crosslmm.text import first_error

StoreMedia = Callable[[Embedded], str]
"""Writes a video or image that stands in the manifest to a file, and returns its absolute path or URI."""


def parse_rows(
    raw_rows: Iterable[tuple[int, Any]],
    roots: Sequence[str],
    first_line: dict[str, int] | None = None,
    manifest: str = "",
    ignored: Collection[str] = (),
    store: StoreMedia | None = None,
) -> tuple[list[dict[str, Any]], list[tuple[int, str]]]:
    """Check rows and convert them to records.

    Args:
        raw_rows: (line, row) as `rows.files` reads them.
        roots: folders that videos may lie in, see `resolve_video`.
        first_line: line of each row id that earlier calls have seen; this call adds its own. Default: none.
        manifest: path or URI of the manifest, for rows without an id.
        ignored: keys of rows that are to be ignored.
        store: see `to_record`.

    Returns:
        (records, malformed): the rows as `to_record` returns them; and (line, reason) of each one that is left out.
    """
    records: list[dict[str, Any]] = []
    malformed: list[tuple[int, str]] = []
    first_line = {} if first_line is None else first_line
    for line, raw in raw_rows:
        try:
            record = to_record(raw, line, roots, manifest, ignored, store)
            earlier = first_line.setdefault(record["id"], line)
            if earlier != line and not record["ids_repeat"]:
                raise ValueError(f"id {record['id']!r} is also on line {earlier}")
            records.append(record)
        except (ValueError, TypeError, RecursionError) as error:  # JSON from outside can have any shape
            malformed.append((line, first_error(error)))
    return records, malformed


def to_record(
    raw: Any,
    line: int,
    roots: Sequence[str],
    manifest: str = "",
    ignored: Collection[str] = (),
    store: StoreMedia | None = None,
) -> dict[str, Any]:
    """Convert one row to a record.

    Args:
        raw: the row, as `rows.files` reads it.
        line: its line.
        roots: folders that its videos may lie in, see `resolve_video`.
        manifest: path or URI of the manifest, for a row without an id.
        ignored: keys that are to be ignored.
        store: is given each video that stands in the row itself, once the row is known to be good; None refuses them.

    Returns:
        The columns of `manifest_shards.SCHEMA`, and besides them `form` (its name), `ids_repeat` (whether other rows
        may have the same id) and `unused` (keys that are not followed, see `forms.UNUSED`).

    Raises:
        ValueError: the row is malformed.
    """
    row = conversation_of(raw, ignored)
    turns = place_media(row)
    _check_order(turns)
    media = [part for turn in turns for part in turn.parts if part.kind != "text"]
    videos = [_resolve(part.media, roots) for part in media]
    record: dict[str, Any] = {
        "id": _made_id(manifest, line) if row.id is None else _id(row.id),
        "messages": json.dumps([_message(turn) for turn in turns]),
        "kind": _kind(row.kind),
        "line": line,
        "chars": sum(len(part.text) for turn in turns for part in turn.parts),
        "seconds": [_known_seconds(part) for part in media],
        "form": row.form,
        "ids_repeat": row.ids_repeat,
        "unused": row.unused,
    }
    # JSON may contain half a surrogate pair, which can be neither written as UTF-8 nor tokenized: encode() raises.
    texts = [part.text for turn in turns for part in turn.parts]
    "".join([record["id"], row.kind or "", *map(str, videos), *texts]).encode()
    record["videos"] = [_store(video, store) if isinstance(video, Embedded) else video for video in videos]
    return record


def _check_order(turns: Sequence[Turn]) -> None:
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise BadRow("there is no message of the assistant, so there is nothing to learn or to compare with")
    if answers[0] == 0:
        raise BadRow("the assistant speaks first, so there is no question to answer")
    if any(part.kind != "text" for turn in turns[answers[-1] :] for part in turn.parts):
        raise BadRow("a video comes after the last answer")


def _message(turn: Turn) -> dict[str, Any]:
    """Return a turn as it is stored: its videos and images are in the record's `videos`, in the same order."""
    if isinstance(turn.content, str):
        return {"role": turn.role, "content": turn.content}
    parts = [
        {"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind} for part in turn.content
    ]
    return {"role": turn.role, "content": parts}


def _id(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with holes
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise BadRow(f"id is {shown(value)}, and should be text or a whole number")
    return str(value)


def _made_id(manifest: str, line: int) -> str:
    """Return an id for a row without one: it differs from those of all other manifests, also of the same name."""
    folder, name = posixpath.split(manifest)
    return f"{hashlib.sha256(folder.encode()).hexdigest()[:8]}/{name}:{line}"


def _kind(value: Any) -> str | None:
    if not isinstance(value, str | None):
        raise BadRow(f"kind is {shown(value)}, and should be text")
    return value


def _known_seconds(part: Part) -> float | None:
    """Return the duration of a video, 0 for an image, as far as the row says it [s]."""
    if part.kind == "image":
        return 0.0
    whole = isinstance(part.media, str) and is_frame_list(part.media) and split_time_range(part.media)[0] == part.media
    return parse_frame_list(str(part.media)).duration if whole else None


def _resolve(media: Media | None, roots: Sequence[str]) -> Media:
    return media if isinstance(media, Embedded) else resolve_video(str(media), roots)


def _store(media: Embedded, store: StoreMedia | None) -> str:
    if store is None:
        raise BadRow(
            "the row holds its video itself; python jobs/prepare.py convert MANIFEST FOLDER writes it to a file"
        )
    return store(media)


def resolve_video(video: str, roots: Sequence[str]) -> str:
    """Return the absolute path or URI of a row's video; of a list of frames, its address with those of all frames.

    Args:
        video: as the row names it.
        roots: folders that it may lie in, the manifest's folder first. Only the name is checked here; links are
            followed when the video is opened.

    Raises:
        ValueError: it lies in none of them, or its `#t=` ends before it begins.
    """
    return map_files(video, lambda file: _resolve_file(file, roots))


def _resolve_file(file: str, roots: Sequence[str]) -> str:
    uri = storage.resolve(roots[0], file)
    if "\0" in uri:
        raise ValueError(f"{uri!a} has a zero byte, as no file's name can")
    if not storage.within(uri, roots):
        raise ValueError(f"{uri!a} lies outside of {roots[0]}; add its folder to --data.roots")
    return uri
