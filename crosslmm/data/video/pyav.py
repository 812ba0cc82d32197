"""An open file -> the frames on screen at the wanted moments, decoding no more groups of pictures than hold them."""

import contextlib
import heapq
import itertools
from collections.abc import Iterator
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.stream import Discard, Disposition
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling

# Demuxers whose index names the keyframes. A transport stream has none, and is decoded from its start.
INDEXED = ("mov", "matroska", "avi")
# A moment that rounding has put a hair before its frame belongs to that frame [ticks of the stream's clock].
ROUNDING = 1e-3
# H.264 lets so many frames be decoded before one that is shown earlier.
MOST_REORDERED = 16


class UnreadableVideo(Exception):
    """A video that cannot be decoded; the message is the reason."""


def with_pyav(
    file: BinaryIO, form: str, data: DataConfig, image_size: int, begin: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Decode with PyAV.

    Args:
        file: seekable.
        form: libav's name of its container. Only that demuxer is used: playlists are never looked for.
        data: which frames, limits.
        image_size: side of the square that frames are resized to [px].
        begin, end: the part of the video that is looked at; None goes to its end [s].

    Returns:
        uint8 (up to data.num_frames, image_size, image_size, 3), RGB.

    Raises:
        UnreadableVideo: naming what is missing or beyond a limit.
        av.FFmpegError, OSError: as they come.
    """
    with open_container(file, form) as container:
        stream = choose_stream(container, data)
        duration = duration_of(container, stream, data)
        found, reached = _frames_within(container, stream, file, data, part_of(begin, end, duration), image_size)
        if reached < 0.5 and (measured := _measure(container, stream)) < duration / 2:
            # The header promises more than twice of what there is.
            found, _ = _frames_within(container, stream, file, data, part_of(begin, end, measured), image_size)
    if not found:
        raise UnreadableVideo("the file has no frames that can be decoded")
    return np.ascontiguousarray(np.stack(found))


def part_of(begin: float, end: float | None, duration: float) -> tuple[float, float]:
    """The part of a video of this duration that is looked at [s].

    Raises:
        UnreadableVideo: the video ends before it.
    """
    if begin >= duration:
        raise UnreadableVideo(f"it lasts {duration:.1f} s, and the part that is wanted begins at {begin:g} s")
    return begin, duration if end is None else min(end, duration)


def open_container(file: BinaryIO, form: str) -> InputContainer:
    """Open a file as libav's `form` and as nothing else; playlists are never looked for."""
    options = {"protocol_whitelist": "none", "format_whitelist": form}
    return av.open(file, "r", format=form, options=options, metadata_errors="replace")


def choose_stream(container: InputContainer, data: DataConfig) -> VideoStream:
    """The first video stream that is no cover picture; no other stream's bytes are read."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        raise UnreadableVideo("the file has no video stream")
    stream = videos[0]
    context = stream.codec_context
    if context is None:
        raise UnreadableVideo("no decoder knows its codec")
    if context.width * context.height > data.max_frame_pixels:
        raise UnreadableVideo(
            f"its frames are {context.width} x {context.height}, and data.max_frame_pixels is {data.max_frame_pixels}"
        )
    for other in container.streams:
        if other is not stream:
            other.discard = Discard.all
    context.thread_count = 1
    context.options = {"max_pixels": str(data.max_frame_pixels)}  # a stream may change its size
    return stream


def duration_of(container: InputContainer, stream: VideoStream, data: DataConfig) -> float:
    """What the header says, or else what the packets do [s]; the index is read on the way.

    Raises:
        UnreadableVideo: too long, or without a packet.
    """
    if "matroska" in container.format.name:
        _rewind(container)  # only a seek makes it read its index
    duration = _claimed_duration(container, stream)
    if not 0 < duration <= data.max_video_s:
        duration = _measure(container, stream)
    if duration > data.max_video_s:
        raise UnreadableVideo(f"it lasts {duration:.0f} s, and data.max_video_s is {data.max_video_s:g}")
    return duration


def _claimed_duration(container: InputContainer, stream: VideoStream) -> float:
    """What the header says [s]; 0 where it says nothing that can be believed."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Matroska's duration counts from zero in a recording that begins later, or does not, as its writer pleases.
    begins_late = (container.start_time or 0) > av.time_base
    return 0.0 if begins_late else (container.duration or 0) / av.time_base


def _rewind(container: InputContainer) -> None:
    with contextlib.suppress(av.FFmpegError):  # a file without frames has nowhere to go back to
        container.seek(0)


def _jump(container: InputContainer, stream: VideoStream, time: int) -> None:
    with contextlib.suppress(av.FFmpegError):  # the caller looks where it has landed
        container.seek(time, stream=stream)


def _measure(container: InputContainer, stream: VideoStream) -> float:
    """Duration of a stream whose container does not say it, or not rightly [s], from its packets."""
    _rewind(container)
    times = []
    with contextlib.suppress(av.error.InvalidDataError):  # what comes before the damage counts
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                times.append((packet.pts, packet.pts + (packet.duration or 1)))
    if not times:
        raise UnreadableVideo("the file has no frames that can be decoded")
    _rewind(container)
    begins, ends = zip(*times, strict=True)
    return float((max(ends) - min(begins)) * (stream.time_base or 0))


def _frames_within(
    container: InputContainer,
    stream: VideoStream,
    file: BinaryIO,
    data: DataConfig,
    part: tuple[float, float],
    image_size: int,
) -> tuple[list[np.ndarray], float]:
    """Images of the frames that the policy wants of this part [s], and which share of the way to the last wanted one
    was reached."""
    base = float(stream.time_base or 1)
    begin, finish = part
    start = (stream.start_time or 0) + round(begin / base)
    duration = finish - begin
    times = FrameSampling(data.num_frames, data.sampling, data.fps).times(duration, max(duration - gap_of(stream), 0))
    wanted = start + times / base + ROUNDING
    visits = _visits(container, stream, wanted)
    storage.will_read(file, _ranges(container, stream, visits))
    resize = VideoReformatter()
    images, last, end = [], None, float(start)
    for key, moments in visits:
        for frame, until in _visit(container, stream, key, moments):
            if frame.pts == last:
                continue
            last, end = frame.pts, until
            image = resize.reformat(frame, image_size, image_size, format="rgb24").to_ndarray()
            # The phone was held upright: containers store the turn, decoders do not make it.
            images.append(np.rot90(image, frame.rotation // 90))
    return images, (end - start) / max(wanted[-1] - start, ROUNDING)


Visit = tuple[int | None, np.ndarray]
"""A keyframe's timestamp in the index (None: the file's beginning), and the moments that are decoded from there."""


def _visits(container: InputContainer, stream: VideoStream, wanted: np.ndarray) -> list[Visit]:
    """Share the moments out to the keyframes they are decoded from: a jump only where a later keyframe exists."""
    index = stream.index_entries
    indexed = len(index) and any(name in container.format.name for name in INDEXED)
    if not indexed or (_untimed(container) and stream.codec_context.has_b_frames):
        return [(None, wanted)]
    lag = _lag(stream)
    keys = [index.search_timestamp(int(moment) - lag) for moment in wanted]
    return [
        (index[key].timestamp if key > 0 else None, np.array([moment for _, moment in group]))
        for key, group in itertools.groupby(zip(keys, wanted, strict=True), key=lambda pair: max(pair[0], 0))
    ]


def _lag(stream: VideoStream) -> int:
    """How far a frame is shown after its time in the index, which in mp4 is the time of its decoding."""
    shown = next((entry.timestamp for entry in stream.index_entries if not entry.is_discard), None)
    return 0 if shown is None or stream.start_time is None else max(0, stream.start_time - shown)


def _ranges(container: InputContainer, stream: VideoStream, visits: list[Visit]) -> list[tuple[int, int]]:
    """The bytes [start, end) that visits read, where the index tells each frame's place and size."""
    index = stream.index_entries
    ranges = []
    for key, moments in visits:
        first = 0 if key is None else index.search_timestamp(key)
        # One packet further: its time says that the last moment has been passed.
        last = min(index.search_timestamp(int(moments[-1]), any_frame=True) + 1, len(index) - 1)
        if not 0 <= first <= last or not index[last].size:
            return []
        ranges.append((index[first].pos, index[last].pos + index[last].size))
    return sorted(ranges)


def _visit(
    container: InputContainer, stream: VideoStream, key: int | None, moments: np.ndarray
) -> Iterator[tuple[av.VideoFrame, float]]:
    """The frames on screen at these moments, each with its end; a moment in a damaged part has none.

    An index may lie: where its keyframe turns out to be none, or to come too late, the one before it is tried, and then
    the file's beginning.
    """
    for attempt in range(3):
        if key is not None or attempt:
            # libav takes the time for one of showing, and finds the keyframe by the time in its index.
            _jump(container, stream, 0 if key is None else key + _lag(stream))
        shown = _shown(stream, _decoded(container, stream, moments[-1]))
        first = next(shown, None)
        if key is None or first is None or (first[0].key_frame and (first[0].pts or 0) <= moments[0]):
            break
        before = stream.index_entries.search_timestamp(key - 1)
        key = stream.index_entries[before].timestamp if before > 0 and attempt == 0 else None
    asked = 0
    for frame, end in itertools.chain([first] if first else [], shown):
        begin = frame.pts or 0.0
        if key is None and first is not None and frame is first[0]:
            begin = -np.inf  # nothing was on screen before it
        asked = max(asked, int(np.searchsorted(moments, begin, side="left")))
        due = int(np.searchsorted(moments, end, side="left"))
        if due > asked:
            yield frame, end
            asked = due
        if asked >= len(moments):
            return


def _shown(stream: VideoStream, frames: Iterator[av.VideoFrame | None]) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames, each with the time at which it leaves the screen. Before a gap (None) and at the end: by its duration."""
    base = float(stream.time_base or 1)
    before: av.VideoFrame | None = None
    for frame in itertools.chain(frames, [None]):
        if before is not None:
            assert before.pts is not None
            lasts = before.duration or gap_of(stream) / base
            yield before, before.pts + lasts if frame is None or frame.pts is None else frame.pts
        before = frame if frame is not None and frame.pts is not None else None


def _decoded(container: InputContainer, stream: VideoStream, until: float) -> Iterator[av.VideoFrame | None]:
    """Frames from here to the one shown at `until`. None stands for a damaged stretch, up to the next keyframe."""
    broken = False
    untimed: list[int] | None = None
    if _untimed(container):
        untimed, until = [], until + MOST_REORDERED
    try:
        for packet in container.demux(stream):
            # Frames are decoded before they are shown, so all that follow are shown later still.
            if packet.dts is not None and packet.dts > until:
                break
            broken = broken and not packet.is_keyframe
            if broken:
                continue
            if untimed is not None and packet.size and packet.dts is not None:
                heapq.heappush(untimed, packet.dts)
            try:
                for frame in packet.decode():
                    yield _checked(frame, untimed)
            except av.error.InvalidDataError:
                broken = True
            if broken or packet.is_corrupt:
                broken = True
                yield None
    except av.error.InvalidDataError:
        pass  # the file ends here, or might as well
    with contextlib.suppress(av.error.EOFError, av.error.InvalidDataError):  # the file's end empties the decoder itself
        for frame in stream.codec_context.decode(None):
            yield _checked(frame, untimed)


def _checked(frame: av.VideoFrame, untimed: list[int] | None) -> av.VideoFrame | None:
    if untimed:
        frame.pts = heapq.heappop(untimed)
    return None if frame.is_corrupt else frame


def _untimed(container: InputContainer) -> bool:
    """AVI stores no times of showing: as they come out, from the file's beginning, frames have the packets', sorted."""
    return container.format.name == "avi"


def gap_of(stream: VideoStream) -> float:
    """From one frame to the next where they come regularly [s]."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 0.0
