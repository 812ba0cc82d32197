"""The videos and images that a row names: a path or URI, a list of frame files, or the bytes of a file."""

import hashlib
import math
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crosslmm.data.frame_sampling import TIME_RANGE
from crosslmm.data.rows.values import BadRow, shown
from crosslmm.data.video.frame_list import FrameList

Kind = Literal["video", "image"]
KINDS: tuple[Kind, ...] = ("video", "image")

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".m2v", ".vob",
    ".flv", ".wmv", ".asf", ".ogv", ".mxf", ".h264", ".264", ".hevc", ".265", ".gif", ".apng",
)  # fmt: skip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".heic")
"""What a file is by its name, where a row does not say it; a decoder looks at its bytes."""
FRAMES = 'a video as a list of frame files needs "fps": frames per second, or "times": the second at which each appears'


@dataclass(frozen=True)
class Embedded:
    """A video or image that stands in the manifest itself. `prepare.py convert` writes it to a file."""

    name: str
    """Its name there, for its suffix and for messages; may be empty."""
    size: int
    """[bytes]."""
    key: str
    """Hex digest that only the same bytes have."""
    read: Callable[[], bytes]
    """Returns its bytes."""

    @property
    def file_name(self) -> str:
        """Name of the file that it is written to, in a folder of its own."""
        suffix = posixpath.splitext(self.name)[1].lower()
        known = suffix if suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES else ""
        return f"{self.key[:2]}/{self.key}{known}"


Media = str | Embedded
"""A path, URI or the address of a `FrameList`, each perhaps with `#t=`; or the bytes of a file."""


def media_of(value: Any, kind: Kind, timing: Mapping[str, Any] | None = None) -> Media:
    """Return the video or image that a value of a row names.

    Args:
        value: path or URI; {"url": ...} as in OpenAI's API; {"bytes": ..., "path": ...} as in tables of Hugging Face's
            datasets; or, for a video, the list of its frames.
        kind: what it is.
        timing: has `fps` or `times` of such a list.

    Raises:
        BadRow: it is none of these.
    """
    if isinstance(value, dict):
        value = _from_object(value, kind)
    if isinstance(value, Embedded):
        return value
    if isinstance(value, bytes):
        return embedded_bytes(value, "")
    if isinstance(value, list) and kind == "video":
        return _frame_list(value, timing or {})
    if not isinstance(value, str) or not value:
        raise BadRow(f"the {kind} is {shown(value)}, and should be a path or URI")
    if value.startswith("data:"):
        raise BadRow(f"the {kind} is a data: URL; write its bytes to a file, and name that")
    return value


def _from_object(value: dict[str, Any], kind: Kind) -> Any:
    keys = value.keys()
    if keys <= {"bytes", "path"} and keys:
        data = value.get("bytes")
        return value.get("path") if data is None else embedded_bytes(data, value.get("path") or "")
    if "url" in keys and keys <= {"url", "detail"}:
        return value["url"]
    raise BadRow(f'the {kind} is {shown(value)}; as an object it is {{"url": path}} or {{"path": path}}')


def embedded_bytes(data: Any, name: Any) -> Embedded:
    """Return a video or image of which a row has the bytes."""
    if not isinstance(data, bytes) or not isinstance(name, str):
        raise BadRow(f"the bytes of a file are {shown(data)}, its path is {shown(name)}; they must be bytes and text")
    return Embedded(name, len(data), hashlib.sha256(data).hexdigest(), lambda: data)


def _frame_list(frames: list[Any], timing: Mapping[str, Any]) -> str:
    names = [media_of(frame, "image") for frame in frames]
    if any(isinstance(name, Embedded) for name in names):
        raise BadRow("a list of frames names files, and has no bytes of them")
    if any(str(name).lower().endswith(VIDEO_SUFFIXES) for name in names):
        raise BadRow("a list of frames names image files, and this one a video")
    times, fps = timing.get("times"), timing.get("fps", timing.get("sample_fps"))
    if times is None and fps is None:
        raise BadRow(FRAMES)
    if times is not None and not isinstance(times, list):
        raise BadRow(f"times is {shown(times)}, and should be a list of seconds")
    return str(FrameList(tuple(map(str, names)), fps, None if times is None else tuple(times)))


def with_time_range(media: Media, start: Any, end: Any) -> Media:
    """Return a video with the suffix `#t=START,END` for the part between two moments [s]; None is its start or end.

    Raises:
        BadRow: they are not moments, or the video has such a suffix already.
    """
    if start is None and end is None:
        return media
    if isinstance(media, Embedded) or TIME_RANGE.search(media):
        raise BadRow("its start and end cannot be added: the video has #t= already, or stands in the manifest itself")
    return f"{media}#t={_seconds(start)}{'' if end is None else f',{_seconds(end)}'}"


def _seconds(moment: Any) -> str:
    if moment is None:
        return ""
    if isinstance(moment, bool) or not isinstance(moment, int | float) or not 0 <= moment < math.inf:
        raise BadRow(f"the start or end of a part of a video is {shown(moment)}; it should be seconds, 0 or more")
    return f"{moment:.6f}".rstrip("0").rstrip(".")
