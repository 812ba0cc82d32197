"""Videos that are lists of frame files. As an address, such a video is a compact JSON object:

    {"frames":["s3://bucket/f/0001.jpg","s3://bucket/f/0002.jpg"],"fps":2.0}
    {"frames":["/data/f/0001.jpg","/data/f/0002.jpg"],"times":[0.0,0.5]}

It stands wherever the path or URI of a video file stands, a suffix `#t=START,END` included.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crosslmm import storage
from crosslmm.data.frame_sampling import split_time_range

PREFIX = '{"frames"'
"""First characters of each such address; no absolute path and no URI begins with them."""
MAX_FRAMES = 10_000
"""Most frame files of a video."""
MAX_ADDRESS_CHARACTERS = 16 * 2**20
"""Longest address: a row of a manifest has 4 MiB, and folders are added to its names."""


class BadFrameList(ValueError):
    """A malformed list of frames; the message names the error."""


@dataclass(frozen=True)
class FrameList:
    """The frames of a video, each in an image file of its own, with either `fps` or `times`.

    Raises:
        BadFrameList: there are no frames or too many, or they have no such times.
    """

    frames: tuple[str, ...]
    """Paths or URIs of the files."""
    fps: float | None = None
    """Frame i is shown from i / fps on [frames/s]."""
    times: tuple[float, ...] | None = None
    """When each frame appears, ascending [s]. The video begins with the first one, whatever its time."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.frames) <= MAX_FRAMES:
            raise BadFrameList(f"it lists {len(self.frames)} frames, and a video has 1 to {MAX_FRAMES}")
        if not all(
            isinstance(name, str) and name and name.encode(errors="ignore").decode() == name for name in self.frames
        ):
            raise BadFrameList("a frame is the path or URI of an image file")  # half a surrogate pair is in none
        if (self.fps is None) == (self.times is None):
            raise BadFrameList("a list of frames needs fps or times, and not both")
        if self.fps is not None and not (_is_number(self.fps) and 1e-6 <= self.fps <= 1e6):
            raise BadFrameList(f"fps is {self.fps!r}, and should be between 0.000001 and 1,000,000")
        if self.times is not None:
            self._check_times(self.times)

    def _check_times(self, times: Sequence[float]) -> None:
        if len(times) != len(self.frames):
            raise BadFrameList(f"it lists {len(self.frames)} frames and {len(times)} times")
        if not all(_is_number(time) and 0 <= time <= 1e9 for time in times):
            raise BadFrameList("times are numbers of seconds, from 0 on")
        late = next((i for i in range(1, len(times)) if times[i] <= times[i - 1]), None)
        if late is not None:
            raise BadFrameList(f"times[{late}] is {times[late]:g}, which is not after times[{late - 1}]")

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """When each frame appears, counted from the first one [s], float64 (frames,)."""
        if self.times is None:
            return np.arange(len(self.frames)) / (self.fps or 1.0)
        return np.array(self.times) - self.times[0]

    @property
    def ends(self) -> np.ndarray:
        """When each frame leaves the screen, counted from the start of the first one [s], float64 (frames,)."""
        return np.append(self.starts[1:], self.duration)

    @property
    def duration(self) -> float:
        """From the start of the first frame to the end of the last [s]. The last one is shown for 1/fps, or as long as
        the one before it; one frame alone, for a second."""
        if self.fps is not None:
            return len(self.frames) / self.fps
        last = self.starts[-1] - self.starts[-2] if len(self.frames) > 1 else 1.0
        return float(self.starts[-1] + last)

    def __str__(self) -> str:
        """Return the address, which is ASCII."""
        timing = {"fps": self.fps} if self.times is None else {"times": self.times}
        return json.dumps({"frames": self.frames, **timing}, separators=(",", ":"))


def is_frame_list(video: str) -> bool:
    """Return whether the address of a video names a list of frames, and not one file."""
    return video.startswith(PREFIX)


def parse_frame_list(video: str) -> FrameList:
    """Parse the address of a list of frames, without `#t=`.

    Raises:
        BadFrameList: it is malformed.
    """
    if len(video) > MAX_ADDRESS_CHARACTERS:
        raise BadFrameList(f"it has {len(video)} characters, of at most {MAX_ADDRESS_CHARACTERS}")
    try:
        fields = storage.parse_json(video)
    except ValueError as error:
        raise BadFrameList(f"Invalid JSON: {error}") from None
    if not isinstance(fields, dict) or not fields.keys() <= {"frames", "fps", "times"}:
        raise BadFrameList('a list of frames is {"frames": [...], "fps": number} or {"frames": [...], "times": [...]}')
    frames, times = fields.get("frames"), fields.get("times")
    if not isinstance(frames, list) or not isinstance(times, list | None):
        raise BadFrameList("frames and times should be lists")
    return FrameList(tuple(frames), fields.get("fps"), None if times is None else tuple(times))


def video_files(video: str) -> tuple[str, ...]:
    """Return the files of a video: one, or its frames. `#t=` is left out.

    Raises:
        BadFrameList: the list of frames is malformed.
    """
    address = split_time_range(video)[0]
    return parse_frame_list(address).frames if is_frame_list(address) else (address,)


def map_files(video: str, change: Callable[[str], str]) -> str:
    """Return the address of a video with each of its files' names changed; `#t=` stays.

    Raises:
        BadFrameList: the list of frames is malformed.
    """
    address = split_time_range(video)[0]
    if not is_frame_list(address):
        return change(address) + video[len(address) :]
    listed = parse_frame_list(address)
    return str(replace(listed, frames=tuple(map(change, listed.frames)))) + video[len(address) :]


def first_file(video: str) -> str:
    """Return the file of a video, or the first frame of a list; the address itself if it is malformed."""
    try:
        return video_files(video)[0]
    except ValueError:
        return video


def describe_video(video: str) -> str:
    """Return a short name of a video for messages: its address, or the first frame of a list."""
    return f"{first_file(video)[:200]} and the frames after it" if is_frame_list(video) else video


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
