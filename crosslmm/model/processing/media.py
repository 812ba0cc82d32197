"""Videos and images in the forms that people have them in -> frames for the encoder."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
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
    """Which frames of a video file are read; the fields are those of `data.num_frames`, `data.sampling` and
    `data.fps`."""

    num_frames: int
    sampling: str
    fps: float


def take_sampling(options: dict[str, Any], defaults: Any) -> Sampling:
    """Take from a call's options how video files are sampled; any other option must be one without effect here.

    Raises:
        ValueError: another type of tensors is asked for.
        TypeError: an option is unknown.
    """
    for nested in ("videos_kwargs", "images_kwargs", "text_kwargs"):
        options |= options.pop(nested, None) or {}
    chosen = {field.name: options.pop(field.name, None) for field in fields(Sampling)}
    if options.pop("return_tensors", None) not in (None, "pt", "auto"):
        raise ValueError('return_tensors: this processor returns PyTorch tensors, "pt"')
    for name, value in options.items():
        if name not in ("padding", "do_sample_frames", "add_special_tokens") and value:
            raise TypeError(f"{name} is not an option of this processor; it has num_frames, sampling and fps")
    return Sampling(**{name: getattr(defaults, name) if value is None else value for name, value in chosen.items()})


@dataclass(frozen=True)
class Frames:
    """The frames of a video or image."""

    images: np.ndarray
    """uint8 (frames, side, side, 3), RGB."""
    times: Sequence[float] | None = None
    """When each is shown, counted from the beginning of the video [s]; None if nobody says so."""

    def __len__(self) -> int:
        return len(self.images)


FileReader = Callable[[str, int, Sampling], Frames]
"""Takes the path or s3:// URI of a video or image, the side of the frames [pixels] and the sampling; raises ValueError
with the name and the reason if the file cannot be read."""

_file_reader: FileReader | None = None


def set_file_reader(reader: FileReader) -> None:
    """Set the reader of files. It belongs to the package's data side, of which the model knows nothing."""
    global _file_reader
    _file_reader = reader


def visual_of_part(part: dict[str, Any]) -> tuple[Any, Kind]:
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


def times_of_part(part: dict[str, Any], frames: int) -> list[float] | None:
    """Return the times that a message's part gives: `times` [s], or `fps` (`sample_fps`), the rate of its frames [1/s].

    Raises:
        ValueError: these are not numbers.
    """
    times, fps = part.get("times"), part.get("fps", part.get("sample_fps"))
    try:
        if times is not None:
            return [float(time) for time in times]
        return None if fps is None else [i / float(fps) for i in range(frames)]
    except (TypeError, ValueError, ZeroDivisionError):
        raise ValueError("times is a list of seconds, and fps a number of frames per second") from None


def times_of_videos(times: Any, num_frames: Sequence[int]) -> list[Any]:
    """Return the times of each video, if any are given: a list of seconds for each, or one such list.

    Raises:
        ValueError: they are given for another number of videos.
    """
    if times is None:
        return [None] * len(num_frames)
    of_videos = [times] if len(times) and isinstance(times[0], int | float | np.number) else list(times)
    if len(of_videos) != len(num_frames):
        raise ValueError(f"times are given for {len(of_videos)} videos, and there are {len(num_frames)}")
    return of_videos


def with_times(video: Frames, times: Sequence[float] | None) -> Frames:
    """Return the frames with the times that are stated for them, if any.

    Raises:
        ValueError: they are those of a file, which has its own.
    """
    if times is None:
        return video
    if video.times is not None:
        raise ValueError(
            "times and fps of a part say when frames in memory are shown, and a file says that itself; to choose "
            "which of its frames are taken, give num_frames=, sampling= or fps= to the call"
        )
    return replace(video, times=times)


def to_frames(given: Any, kind: Kind, side: int, sampling: Sampling) -> Frames:
    """Return the frames of one video or image; they have times only if they come from a file.

    Frames of any size are resized as the video decoder does it. All frames of an array or list are taken.

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
        one_each = [to_frames(frame, "image", side, sampling).images for frame in given]
        frames = Frames(np.concatenate([*one_each, np.empty((0, side, side, 3), np.uint8)]))
    else:
        frames = Frames(_resized(_to_array(given), side))
    if not len(frames):
        raise ValueError(f"a {kind} has no frames; remove its part from the conversation, or pass at least one frame")
    if kind == "image" and len(frames) != 1:
        raise ValueError(f"an image has {len(frames)} frames; pass it as a video")
    return frames


def _read(uri: str, side: int, sampling: Sampling) -> Frames:
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
