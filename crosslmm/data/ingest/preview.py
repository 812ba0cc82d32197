"""The first rows of a manifest, short enough to be shown: what the model will see of them, and what it learns."""

import json
from collections.abc import Iterable
from typing import Any

from crosslmm.data.video.frame_list import describe_video

PREVIEWED_ROWS = 3
MAX_TEXT, MAX_NAME, MAX_MEDIA = 300, 200, 8
"""What is shown of a text and of a name [characters], and of the videos of a row."""


def add_previews(previews: list[dict[str, Any]], records: Iterable[dict[str, Any]]) -> None:
    """Add the previews of rows until there are `PREVIEWED_ROWS`."""
    for record in records:
        if len(previews) >= PREVIEWED_ROWS:
            return
        previews.append(preview(record))


def first_rows(previews: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the first previews in the order of the manifest."""
    return sorted(previews, key=lambda row: int(row["line"]))[:PREVIEWED_ROWS]


def preview(record: dict[str, Any]) -> dict[str, Any]:
    """Return what is shown of a record: `line`, `id`, `kind`, `media` (kind, name and seconds of each video and image),
    and `turns` (role and text, with <video 1> where the first video stands)."""
    kinds: list[str] = []
    turns = []
    for message in json.loads(record["messages"]):
        content = message["content"]
        texts = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                kinds.append(part["type"])
                texts.append(f"<{part['type']} {len(kinds)}>")
        turns.append([message["role"], _short(" ".join(texts), MAX_TEXT)])
    media = [
        [kind, _short(describe_video(video), MAX_NAME), seconds]
        for kind, video, seconds in zip(kinds, record["videos"], record["seconds"], strict=True)
    ]
    return {
        "line": record["line"],
        "id": _short(record["id"], MAX_NAME),
        "kind": record["kind"] and _short(record["kind"], MAX_NAME),
        "media": media[:MAX_MEDIA],
        "more_media": max(0, len(media) - MAX_MEDIA),
        "turns": turns[: 2 * MAX_MEDIA],
        "more_turns": max(0, len(turns) - 2 * MAX_MEDIA),
    }


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
