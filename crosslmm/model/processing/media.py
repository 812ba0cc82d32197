"""Videos and images in the forms that people have them in -> frames for the encoder."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

Kind = Literal["video", "image"]
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video file are read; the fields are those of `data.sampling`."""

    num_frames: int
    sampling: str
    fps: float


FileReader = Callable[[str, int, Sampling], np.ndarray]
"""Takes the path or s3:// URI of a video or image, the side of the frames [pixels] and the sampling. Returns uint8
(frames, side, side, 3); raises ValueError with the name and the reason if the file cannot be read."""

_file_reader: FileReader | None = None


def read_files_with(reader: FileReader) -> None:
    """Set the reader of files. It belongs to the package's data side, of which the model knows nothing."""
    global _file_reader
    _file_reader = reader


def of_part(part: dict[str, Any]) -> tuple[Any, Kind]:
    """Return the video or image of a message's part, and which of the two it is.

    Raises:
        ValueError: there is none, or it is something else.
    """
    kind = part["type"]
    if kind not in ("video", "image"):
        raise ValueError(f"a part of type {kind!a} is not supported; there are text, video and image")
    given = [part[key] for key in (kind, "url", "path") if part.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"a {kind} part has {len(given)} {kind}s; it takes one, under {kind!a}, 'url' or 'path'")
    return given[0], kind


def flat_list(given: Any, kind: Kind) -> list[Any]:
    """Return the videos or images as one list: there may be none, one, a list, or a list for each prompt."""
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        return [given]
    if kind == "video" and given and all(map(_is_frame, given)):
        return [given]  # one video, as a list of its frames
    return [one for element in given for one in flat_list(element, kind)]


def to_frames(given: Any, kind: Kind, side: int, sampling: Sampling) -> np.ndarray:
    """Return the frames of one video or image: uint8 (frames, side, side, 3), RGB.

    Frames of any size are resized as the decoder does it. All frames of an array or list are taken.

    Args:
        given: a path or s3:// URI; an array or tensor (frames, height, width, 3) or (frames, 3, height, width), or a
            single frame of it, uint8 or floats from 0 to 1; a PIL image; or a list of frames in any of these forms.
        kind: "image" takes one frame only.
        side: of the frames [pixels].
        sampling: of files.

    Raises:
        ValueError: the file cannot be read, or what is given is none of these.
    """
    if isinstance(given, str | Path):
        frames = _read(str(given), side, sampling)
    elif isinstance(given, list | tuple):
        one_each = [to_frames(frame, "image", side, sampling) for frame in given]
        frames = np.concatenate([*one_each, np.empty((0, side, side, 3), np.uint8)])
    else:
        frames = _resized(_to_array(given), side)
    if not len(frames):
        raise ValueError(f"a {kind} has no frames; remove its part from the conversation, or pass at least one frame")
    if kind == "image" and len(frames) != 1:
        raise ValueError(f"an image has {len(frames)} frames; pass it as a video")
    return frames


def _read(uri: str, side: int, sampling: Sampling) -> np.ndarray:
    scheme = SCHEME.match(uri)
    if scheme and scheme[1] not in ("file", "s3") and not Path(uri).exists():
        raise ValueError(f"{uri!a} is not fetched: download it, and pass the path or the s3:// URI of a file")
    if _file_reader is None:
        raise ValueError(f"{uri!a}: nothing is there to read files; import crosslmm")
    return _file_reader(uri, side, sampling)


def _is_frame(one: Any) -> bool:
    """Return whether this is an image in memory."""
    return hasattr(one, "convert") or getattr(one, "ndim", None) == 3


def _to_array(given: Any) -> np.ndarray:
    """Return uint8 (frames, height, width, 3)."""
    if hasattr(given, "convert"):  # PIL
        given = given.convert("RGB")
    array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and array.shape[3] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
        raise ValueError(
            f"a video or image is {type(given).__name__} {array.shape}; expected (frames, height, width, 3)"
        )
    if array.dtype.kind == "f" and (not array.size or (array.min() >= 0 and array.max() <= 1)):
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"frames are {array.dtype}; expected uint8, or floats from 0 to 1")
    return array


def _resized(frames: np.ndarray, side: int) -> np.ndarray:
    if frames.shape[1:] == (side, side, 3):
        return np.require(frames, requirements=["C", "W"])  # torch warns of arrays that are read only
    resize = VideoReformatter()
    images = [av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24") for frame in frames]
    resized = [resize.reformat(image, side, side).to_ndarray() for image in images]
    return np.stack(resized) if resized else np.empty((0, side, side, 3), np.uint8)
