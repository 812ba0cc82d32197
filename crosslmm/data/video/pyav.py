"""Decode a video with PyAV: the frames on screen at the sampled moments, from as few groups of pictures as possible."""

import contextlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
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
from crosslmm.data.video import mp4

INDEXED_FORMATS = ("mov", "matroska", "avi")
"""Formats whose index names the keyframes. A transport stream has no index and is decoded from its start."""
ROUNDING_TICKS = 1e-3
"""Added to each moment, so that rounding never puts it just before its frame [ticks of the stream's clock]."""
MAX_REORDERED = 16
"""Largest number of frames that H.264 decodes before one that is shown earlier [frames]."""
CODECS = (
    "h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video", "msmpeg4v2", "msmpeg4v3", "h263", "mjpeg",
    "prores", "dnxhd",
)  # fmt: skip
"""Codecs of videos that are decoded, by libav's names: what cameras, phones and the web make. libav has some 250 more,
most of them old formats of games, which few people test and a file could name."""


class UnreadableVideo(Exception):
    """A video that cannot be decoded; the message is the reason."""


def with_pyav(
    file: BinaryIO, format_name: str, data: DataConfig, image_size: int, start: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Decode the sampled frames of a video with PyAV.

    Args:
        file: seekable.
        format_name: libav's name of the container. Only this demuxer is used; libav never looks for playlists.
        data: frame sampling and limits.
        image_size: side of the square that frames are resized to [px].
        start, end: part of the video to sample from; None means the end of the video [s].

    Returns:
        uint8 (up to data.num_frames, image_size, image_size, 3), RGB.

    Raises:
        UnreadableVideo: something is missing from the file, or exceeds a limit.
        av.FFmpegError, OSError: from libav and the file.
    """
    with open_container(file, format_name, data) as container:
        stream = select_video_stream(container, data)
        duration = video_duration(container, stream, data)
        frames, progress = _decode_clip(container, stream, file, data, clip_bounds(start, end, duration), image_size)
        if progress < 0.5 and (measured := _measure_duration(container, stream)) < duration / 2:
            # The header claims more than twice the real duration: sample again over what the file has.
            frames, _ = _decode_clip(container, stream, file, data, clip_bounds(start, end, measured), image_size)
    if not frames:
        raise UnreadableVideo("the file has no frames that can be decoded")
    return np.ascontiguousarray(np.stack(frames))


def clip_bounds(start: float, end: float | None, duration: float) -> tuple[float, float]:
    """Return start and end of the requested part of a video of this duration [s].

    Raises:
        UnreadableVideo: the video ends before the part starts.
    """
    if start >= duration:
        raise UnreadableVideo(f"it lasts {duration:.1f} s, and the requested part starts at {start:g} s")
    return start, duration if end is None else min(end, duration)


def open_container(
    file: BinaryIO, format_name: str, data: DataConfig, codecs: Sequence[str] = CODECS
) -> InputContainer:
    """Open a file as this libav format and no other; libav may not follow playlists or open other URLs.

    libav decodes some frames to learn about the streams: only of these codecs, and with the same limits as later ones.

    Raises:
        UnreadableVideo: the header is compressed.
        av.FFmpegError, OSError: from libav and the file.
    """
    if format_name == "mov" and mp4.has_compressed_header(file):
        raise UnreadableVideo("its header is compressed (cmov); copy it into a new file")
    file.seek(0)
    options = {
        "protocol_whitelist": "none",
        "format_whitelist": format_name,
        "codec_whitelist": ",".join((*codecs, "libdav1d")),
        "max_pixels": str(data.max_frame_pixels),
    }
    return av.open(file, "r", format=format_name, options=options, metadata_errors="replace")


def select_video_stream(container: InputContainer, data: DataConfig) -> VideoStream:
    """Return the first video stream that is not a cover picture, and discard the packets of all other streams.

    Raises:
        UnreadableVideo: there is no such stream, its codec is not decoded, or its frames are too large.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise UnreadableVideo("the file has no video stream")
    selected = streams[0]
    require_codec(selected)
    require_size(selected.codec_context.width, selected.codec_context.height, data)
    for stream in container.streams:
        if stream is not selected:
            stream.discard = Discard.all
    context = selected.codec_context
    context.thread_count = 1
    context.options = {"max_pixels": str(data.max_frame_pixels)}  # frames may become larger within the stream
    return selected


def require_codec(stream: VideoStream) -> None:
    """Check the codec of a video stream.

    Raises:
        UnreadableVideo: it is not in `CODECS`.
    """
    if stream.codec_context is None:
        raise UnreadableVideo("no decoder knows its codec")
    if (codec := stream.codec_context.codec.canonical_name) not in CODECS:
        raise UnreadableVideo(f"its codec is {codec}, and only {', '.join(CODECS)} are decoded; encode it again")


def require_size(width: int, height: int, data: DataConfig, known: bool = False) -> None:
    """Check the size of a frame [px].

    Args:
        width, height: zero if unknown, as after libav has met a frame that is too large.
        data: the limit.
        known: refuse an unknown size, too.

    Raises:
        UnreadableVideo: it exceeds `data.max_frame_pixels`, or is unknown.
    """
    if known and not width * height:
        raise UnreadableVideo(
            f"its frames have no size, or more than the {data.max_frame_pixels} pixels of data.max_frame_pixels"
        )
    if width * height > data.max_frame_pixels:
        raise UnreadableVideo(
            f"its frames are {width} x {height}, and data.max_frame_pixels is {data.max_frame_pixels}"
        )


def video_duration(container: InputContainer, stream: VideoStream, data: DataConfig) -> float:
    """Return the duration that the header states, or else that of the packets [s]; loads the container's index.

    Raises:
        UnreadableVideo: the video is too long, or has no packet.
    """
    if "matroska" in container.format.name:
        _rewind(container)  # libav reads the index of a Matroska file on the first seek only
    duration = _header_duration(container, stream)
    if not 0 < duration <= data.max_video_s:
        duration = _measure_duration(container, stream)
    if duration > data.max_video_s:
        raise UnreadableVideo(f"it lasts {duration:.0f} s, and data.max_video_s is {data.max_video_s:g}")
    return duration


def frame_interval(stream: VideoStream) -> float:
    """Return the time between two frames at the stream's average rate [s]; 0 if the rate is unknown."""
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 0.0


def _header_duration(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration that the header states [s]; 0 if it states none that can be trusted."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # In a Matroska file whose recording starts late, writers disagree whether the duration counts from zero.
    starts_late = (container.start_time or 0) > av.time_base
    return 0.0 if starts_late else (container.duration or 0) / av.time_base


def _measure_duration(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration of a stream from the timestamps of its packets [s]."""
    _rewind(container)
    times = []
    with contextlib.suppress(av.error.InvalidDataError):  # packets before the damage still count
        for packet in container.demux(stream):
            if packet.pts is not None and packet.size:
                times.append((packet.pts, packet.pts + (packet.duration or 1)))
    if not times:
        raise UnreadableVideo("the file has no frames that can be decoded")
    _rewind(container)
    starts, ends = zip(*times, strict=True)
    return float((max(ends) - min(starts)) * (stream.time_base or 0))


def _rewind(container: InputContainer) -> None:
    with contextlib.suppress(av.FFmpegError):  # a file without frames cannot be rewound
        container.seek(0)


def _decode_clip(
    container: InputContainer,
    stream: VideoStream,
    file: BinaryIO,
    data: DataConfig,
    clip: tuple[float, float],
    image_size: int,
) -> tuple[list[np.ndarray], float]:
    """Decode the sampled frames of a part of a video.

    Args:
        clip: start and end of the part [s].

    Returns:
        Images, uint8 (image_size, image_size, 3) each; and how far decoding got, as a share of the way from the start
        of the part to its last sampled moment.
    """
    base = float(stream.time_base or 1)
    start = (stream.start_time or 0) + round(clip[0] / base)
    duration = clip[1] - clip[0]
    sampling = FrameSampling(data.num_frames, data.sampling, data.fps)
    moments = start + sampling.times(duration, max(duration - frame_interval(stream), 0)) / base + ROUNDING_TICKS
    segments = _group_by_keyframe(container, stream, moments)
    storage.will_read(file, _byte_ranges(stream, segments))
    resize = VideoReformatter()
    images, last_pts, reached = [], None, float(start)
    for keyframe, segment_moments in segments:
        for frame, end in _frames_at(container, stream, data, keyframe, segment_moments):
            if frame.pts == last_pts:
                continue
            last_pts, reached = frame.pts, end
            images.append(to_image(frame, resize, image_size))
    return images, (reached - start) / max(moments[-1] - start, ROUNDING_TICKS)


def to_image(frame: av.VideoFrame, resize: VideoReformatter, image_size: int) -> np.ndarray:
    """Resize a frame to a square and turn it upright: uint8 (image_size, image_size, 3), RGB."""
    image = resize.reformat(frame, image_size, image_size, format="rgb24").to_ndarray()
    # Containers store how the phone was held; decoders do not apply it.
    return np.rot90(image, frame.rotation // 90)


Segment = tuple[int | None, np.ndarray]
"""Timestamp of a keyframe in the index (None: start of the file), and the moments to decode from there [ticks]."""


def _group_by_keyframe(container: InputContainer, stream: VideoStream, moments: np.ndarray) -> list[Segment]:
    """Assign each moment to the last keyframe before it, so that decoding seeks only past a whole group of pictures."""
    index = stream.index_entries
    has_index = len(index) and any(name in container.format.name for name in INDEXED_FORMATS)
    if not has_index or (_lacks_pts(container) and stream.codec_context.has_b_frames):
        return [(None, moments)]
    delay = _presentation_delay(stream)
    entries = [index.search_timestamp(int(moment) - delay) for moment in moments]
    return [
        (index[entry].timestamp if entry > 0 else None, np.array([moment for _, moment in group]))
        for entry, group in itertools.groupby(zip(entries, moments, strict=True), key=lambda pair: max(pair[0], 0))
    ]


def _presentation_delay(stream: VideoStream) -> int:
    """Return how long after its time in the index a frame is shown [ticks]; an mp4's index has decoding times."""
    indexed = next((entry.timestamp for entry in stream.index_entries if not entry.is_discard), None)
    return 0 if indexed is None or stream.start_time is None else max(0, stream.start_time - indexed)


def _byte_ranges(stream: VideoStream, segments: list[Segment]) -> list[tuple[int, int]]:
    """Return the bytes [start, end) that decoding the segments reads; empty if the index has no positions and sizes."""
    index = stream.index_entries
    ranges = []
    for keyframe, moments in segments:
        first = 0 if keyframe is None else index.search_timestamp(keyframe)
        # One packet more: its timestamp shows that the last moment has passed.
        last = min(index.search_timestamp(int(moments[-1]), any_frame=True) + 1, len(index) - 1)
        if not 0 <= first <= last or not index[last].size:
            return []
        ranges.append((index[first].pos, index[last].pos + index[last].size))
    return sorted(ranges)


TimedFrame = tuple[av.VideoFrame, float]
"""A frame, and the time at which it leaves the screen [ticks]."""


def _frames_at(
    container: InputContainer, stream: VideoStream, data: DataConfig, keyframe: int | None, moments: np.ndarray
) -> Iterator[TimedFrame]:
    """Yield the frames on screen at these moments, each once; moments in a damaged part have none."""
    frames, from_file_start = _decode_from(container, stream, data, keyframe, moments)
    pending = 0  # index of the first moment that has no frame yet
    for number, (frame, end) in enumerate(frames):
        # Nothing is on screen before the first frame of the file, so it also serves earlier moments.
        start = -np.inf if from_file_start and number == 0 else frame.pts or 0.0
        pending = max(pending, int(np.searchsorted(moments, start, side="left")))
        next_pending = int(np.searchsorted(moments, end, side="left"))
        if next_pending > pending:
            yield frame, end
            pending = next_pending
        if pending >= len(moments):
            return


def _decode_from(
    container: InputContainer, stream: VideoStream, data: DataConfig, keyframe: int | None, moments: np.ndarray
) -> tuple[Iterator[TimedFrame], bool]:
    """Start decoding at a keyframe; return the frames up to the last moment, and whether the file's first is the first.

    Indexes can be wrong: if the frame at this position is no keyframe, or is shown after the first moment, try the
    keyframe before, and then the start of the file.
    """
    if keyframe is not None:
        for candidate in (keyframe, _keyframe_before(stream, keyframe)):
            if candidate is None:
                break
            # libav's seek takes a presentation time and compares it with the times in the index.
            _seek(container, stream, candidate + _presentation_delay(stream))
            frames = _with_end_times(stream, _decode_until(container, stream, data, moments[-1]))
            first = next(frames, None)
            if first is None:
                return frames, False
            if first[0].key_frame and (first[0].pts or 0) <= moments[0]:
                return itertools.chain([first], frames), False
        _seek(container, stream, 0)
    return _with_end_times(stream, _decode_until(container, stream, data, moments[-1])), True


def _keyframe_before(stream: VideoStream, keyframe: int) -> int | None:
    """Return the timestamp of the previous keyframe in the index; None if that is the start of the file."""
    entry = stream.index_entries.search_timestamp(keyframe - 1)
    return stream.index_entries[entry].timestamp if entry > 0 else None


def _seek(container: InputContainer, stream: VideoStream, time: int) -> None:
    with contextlib.suppress(av.FFmpegError):  # the caller checks which frame comes next
        container.seek(time, stream=stream)


def _with_end_times(stream: VideoStream, frames: Iterator[av.VideoFrame | None]) -> Iterator[TimedFrame]:
    """Pair each frame with the time of the next; before a gap (None) and at the end, with its own duration."""
    base = float(stream.time_base or 1)
    previous: av.VideoFrame | None = None
    for frame in itertools.chain(frames, [None]):
        if previous is not None:
            assert previous.pts is not None
            duration = previous.duration or frame_interval(stream) / base
            yield previous, previous.pts + duration if frame is None or frame.pts is None else frame.pts
        previous = frame if frame is not None and frame.pts is not None else None


def _decode_until(
    container: InputContainer, stream: VideoStream, data: DataConfig, until: float
) -> Iterator[av.VideoFrame | None]:
    """Decode from the current position to the frame that is shown at `until`; None stands for a damaged stretch, which
    ends at the next keyframe."""
    damaged = False
    times: list[int] | None = None
    if _lacks_pts(container):
        times, until = [], until + MAX_REORDERED
    try:
        for packet in container.demux(stream):
            # A frame is decoded before it is shown, so all later packets are shown later, too.
            if packet.dts is not None and packet.dts > until:
                break
            damaged = damaged and not packet.is_keyframe
            if damaged:
                continue
            if times is not None and packet.size and packet.dts is not None:
                heapq.heappush(times, packet.dts)
            try:
                for frame in packet.decode():
                    # libav compares `max_pixels` with the size after cropping; a frame costs its size before.
                    require_size(stream.codec_context.coded_width, stream.codec_context.coded_height, data)
                    yield _intact(frame, times)
            except av.error.InvalidDataError:
                damaged = True
            except av.error.ArgumentError:
                require_size(0, 0, data, known=True)
            if damaged or packet.is_corrupt:
                damaged = True
                yield None
    except av.error.InvalidDataError:
        pass  # nothing after this position can be demuxed
    with contextlib.suppress(av.error.EOFError, av.error.InvalidDataError):  # EOF: the demuxer has flushed the decoder
        for frame in stream.codec_context.decode(None):
            yield _intact(frame, times)


def _intact(frame: av.VideoFrame, times: list[int] | None) -> av.VideoFrame | None:
    """Return the frame, or None if it is damaged; `times` (a heap) gives it a time where its container has none."""
    if times:
        frame.pts = heapq.heappop(times)
    return None if frame.is_corrupt else frame


def _lacks_pts(container: InputContainer) -> bool:
    """Return whether the container stores no presentation times. AVI does not: the n-th frame that the decoder outputs,
    counted from the start of the file, has the n-th smallest packet time."""
    return container.format.name == "avi"
