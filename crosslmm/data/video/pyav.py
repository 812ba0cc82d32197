"""Decode a video with PyAV: the frames on screen at the sampled moments, from as few groups of pictures as possible."""

import contextlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, SampledFrames, describe_shortfall
from crosslmm.data.video.container import (
    NoFrames,
    open_container,
    require_animation_size,
    require_size,
)
from crosslmm.data.video.timeline import (
    BYTE_FORMATS,
    Clock,
    Keyframe,
    Timeline,
    clip_bounds,
    frame_ticks,
    has_index,
    index_of,
    open_stream,
    rewind,
    scan,
)

ROUNDING_TICKS = 1e-3
"""Added to each moment, so that rounding never puts it just before its frame [ticks of the stream's clock]."""
MAX_REORDERED = 16
"""Largest number of frames that H.264 decodes before one that is shown earlier [frames]."""
RESYNC_BYTES = 64 * 2**10
"""Reading of a program stream begins at a keyframe that is at least this far before the wanted one [bytes]."""
ANIMATIONS = ("gif", "apng")
"""Formats whose frames are drawn over the frame before, so that decoding always starts at the first."""


def with_pyav(
    file: BinaryIO, format_name: str, data: DataConfig, image_size: int, start: float = 0.0, end: float | None = None
) -> SampledFrames:
    """Decode the sampled frames of a video with PyAV.

    Args:
        file: seekable.
        format_name: libav's name of the container. Only this demuxer is used; libav never looks for playlists.
        data: frame sampling and limits.
        image_size: side of the square that frames are resized to [px].
        start, end: part of the video to sample from; None means the end of the video [s].

    Returns:
        Up to data.num_frames frames.

    Raises:
        UnreadableVideo: something is missing from the file, or exceeds a limit.
        av.FFmpegError, OSError: from libav and the file.
    """
    sampling = FrameSampling.of(data)
    with open_container(file, format_name, data) as container:
        stream, timeline = open_stream(file, container, data, sampling.last_moment(start, end))
        if format_name in ANIMATIONS:
            require_animation_size(stream.codec_context.width, stream.codec_context.height, timeline.frames or 0)
        source = _Source(file, container, stream, timeline, data)
        frames, progress = source.decode(sampling, start, end, image_size)
        if frames.shortfall and (timeline.estimated or progress < 0.5):
            # The estimate may be wrong, or the file lack most of what its index lists: sample what it has.
            measured = scan(container, stream)
            is_cut = measured.duration < timeline.duration / 2
            if timeline.estimated or is_cut:
                frames, _ = replace(source, timeline=measured).decode(sampling, start, end, image_size)
            if is_cut and not timeline.estimated:
                frames = frames.with_shortfall(
                    f"the file has {measured.duration:.1f} s of its {timeline.duration:.1f} s"
                )
    if not len(frames):
        raise NoFrames
    return replace(frames, shortfall=None) if timeline.frames == 1 else frames  # a file of one frame is an image


def to_image(frame: av.VideoFrame, resize: VideoReformatter, image_size: int) -> np.ndarray:
    """Resize a frame to a square and turn it upright: uint8 (image_size, image_size, 3), RGB."""
    image = resize.reformat(frame, image_size, image_size, format="rgb24").to_ndarray()
    # Containers store how the phone was held; decoders do not apply it.
    return np.rot90(image, frame.rotation // 90)


Segment = tuple[Keyframe | None, np.ndarray]
"""Keyframe to start from (None: the start of the file), and the moments to decode from there [ticks]."""
TimedFrame = tuple[av.VideoFrame, float, float]
"""A frame, and when it appears and leaves the screen [ticks]; the first frame of the file is there from -inf on."""


@dataclass(frozen=True)
class _Source:
    """An open video stream, and the times of its frames."""

    file: BinaryIO
    container: InputContainer
    stream: VideoStream
    timeline: Timeline
    data: DataConfig

    def decode(
        self, sampling: FrameSampling, start: float, end: float | None, image_size: int
    ) -> tuple[SampledFrames, float]:
        """Decode the sampled frames of the part from `start` to `end` [s].

        Returns:
            The frames, possibly none; and how far decoding got, as a share of the way from the first sampled moment to
            the last.
        """
        timeline = self.timeline
        first, last = clip_bounds(start, end, timeline.duration)
        interval = frame_ticks(self.stream) * timeline.tick
        latest = last - interval
        if timeline.last is not None:
            latest = min(latest, (timeline.last - timeline.start) * timeline.tick)
        moments = first + sampling.times(last - first, max(latest - first, 0))
        moments = timeline.start + moments / timeline.tick + ROUNDING_TICKS
        segments = self._group_by_keyframe(moments)
        storage.will_read(self.file, self._byte_ranges(segments))
        resize = VideoReformatter()
        images: list[np.ndarray] = []
        starts: list[float] = []
        ends: list[float] = []
        times: list[float] = []
        for keyframe, segment_moments in segments:
            for frame, appears, leaves in self._frames_at(keyframe, segment_moments):
                time = float(frame.pts or 0)
                if times and time <= times[-1]:  # shown already; or a damaged index led back
                    continue
                images.append(to_image(frame, resize, image_size))
                times.append(time)
                starts.append(appears)
                ends.append(leaves)
        frames = SampledFrames(
            np.stack(images) if images else np.empty((0, image_size, image_size, 3), np.uint8),
            self._seconds(times).clip(min=0),
            describe_shortfall(self._seconds(moments), self._seconds(starts), self._seconds(ends)),
        )
        reached = ends[-1] if ends else moments[0]
        return frames, (reached - moments[0]) / max(moments[-1] - moments[0], ROUNDING_TICKS)

    def _seconds(self, ticks: Sequence[float] | np.ndarray) -> np.ndarray:
        """Convert times on the stream's clock to times from the first frame on [s]."""
        return (np.asarray(ticks, np.float64) - self.timeline.start) * self.timeline.tick

    def _group_by_keyframe(self, moments: np.ndarray) -> list[Segment]:
        """Assign each moment to the last keyframe before it, so that decoding seeks only past a whole group of
        pictures."""
        if not self._can_seek():
            return [(None, moments)]
        if self.timeline.in_pieces:
            for moment in moments:
                self._seek_to_time(int(moment))
        found = [self._keyframe_at(float(moment)) for moment in moments]
        return [
            (keyframe, np.array([moment for _, moment in group]))
            for keyframe, group in itertools.groupby(zip(found, moments, strict=True), key=lambda pair: pair[0])
        ]

    def _can_seek(self) -> bool:
        container, timeline = self.container, self.timeline
        if timeline.without_pts and self.stream.codec_context.has_b_frames:
            return False
        if timeline.keyframes is None:
            return has_index(container, self.stream)
        # After a jump, a time may stand for several places in the file.
        by_bytes = container.format.name in BYTE_FORMATS
        return container.format.name not in ANIMATIONS and (by_bytes or not timeline.jumps)

    def _keyframe_at(self, moment: float) -> Keyframe | None:
        """Return the last keyframe that is shown at a moment or before it [ticks]; None for the first in the file."""
        if self.timeline.keyframes is not None:
            number = int(np.searchsorted(self.timeline.keyframe_times, moment, "right")) - 1
            return self.timeline.keyframes[number] if number > 0 else None
        index, delay = index_of(self.stream), self._presentation_delay()
        number = index.search_timestamp(int(moment) - delay)
        return Keyframe(index[number].timestamp + delay, index[number].pos) if number > 0 else None

    def _presentation_delay(self) -> int:
        """Return how long after its time in the index a frame is shown [ticks]; an mp4's index has decoding times."""
        stream = self.stream
        indexed = next((entry.timestamp for entry in index_of(stream) if not entry.is_discard), None)
        return 0 if indexed is None or stream.start_time is None else max(0, stream.start_time - indexed)

    def _byte_ranges(self, segments: list[Segment]) -> list[tuple[int, int]]:
        """Return the bytes [start, end) that decoding the segments reads; empty if the index has no positions and
        sizes."""
        index, delay = index_of(self.stream), self._presentation_delay()
        if self.timeline.keyframes is not None or not has_index(self.container, self.stream):
            return []
        ranges = []
        for keyframe, moments in segments:
            first = 0 if keyframe is None else index.search_timestamp(keyframe.time - delay)
            # One packet more: its timestamp shows that the last moment has passed.
            last = min(index.search_timestamp(int(moments[-1]), any_frame=True) + 1, len(index) - 1)
            if not 0 <= first <= last or not index[last].size:
                return []
            ranges.append((index[first].pos, index[last].pos + index[last].size))
        return sorted(ranges)

    def _frames_at(self, keyframe: Keyframe | None, moments: np.ndarray) -> Iterator[TimedFrame]:
        """Yield the frames on screen at these moments, each once; moments in a damaged part have none."""
        frames, from_file_start = self._decode_from(keyframe, moments)
        pending = 0  # index of the first moment that has no frame yet
        for number, (frame, start, end) in enumerate(frames):
            # Nothing is on screen before the first frame of the file, so it also serves earlier moments.
            start = -np.inf if from_file_start and number == 0 else start
            pending = max(pending, int(np.searchsorted(moments, start, side="left")))
            next_pending = int(np.searchsorted(moments, end, side="left"))
            if next_pending > pending:
                yield frame, start, end
                pending = next_pending
            if pending >= len(moments):
                return

    def _decode_from(self, keyframe: Keyframe | None, moments: np.ndarray) -> tuple[Iterator[TimedFrame], bool]:
        """Start decoding at a keyframe; return the frames up to the last moment, and whether they begin with the first
        frame of the file.

        Indexes can be wrong: if the frame at this position is not a keyframe, or comes after the first moment, try the
        keyframe before, and then the start of the file.
        """
        for candidate in (keyframe, keyframe and self._keyframe_at(keyframe.time - 1)):
            if candidate is None:
                break
            frames = self._with_end_times(self._decode_until(moments[-1], candidate))
            first = next(frames, None)
            if first is None and self.container.format.name not in BYTE_FORMATS:
                return frames, False
            if first and first[0].key_frame and first[1] <= moments[0]:
                return itertools.chain([first], frames), False
        return self._with_end_times(self._decode_until(moments[-1], None)), True

    def _seek(self, keyframe: Keyframe | None) -> Clock:
        """Go to a keyframe, or to the start of the file; return the clock of the packets from there on."""
        if keyframe and self.container.format.name == "mpeg":
            # The first time stamps after a seek may be given to other frames than theirs.
            earlier = [k for k in self.timeline.keyframes or () if k.position < keyframe.position - RESYNC_BYTES]
            keyframe = earlier[-1] if earlier else None
        if keyframe is None:
            rewind(self.container)
            return Clock(self.container, self.stream)
        if self.container.format.name in BYTE_FORMATS:
            with contextlib.suppress(av.FFmpegError):  # the caller checks which frame comes next
                self.container.seek(keyframe.position, stream=self.stream, unsupported_byte_offset=True)
        else:
            self._seek_to_time(keyframe.time)
        return Clock(self.container, self.stream, keyframe.shift, keyframe.time)

    def _seek_to_time(self, time: int) -> None:
        # libav's seek takes a presentation time and compares it with the times in the index.
        with contextlib.suppress(av.FFmpegError):
            self.container.seek(time, stream=self.stream)

    def _with_end_times(self, frames: Iterator[av.VideoFrame | int | None]) -> Iterator[TimedFrame]:
        """Pair each frame with the time of the next; before a gap (None) and at the end, with its own duration."""
        previous: av.VideoFrame | None = None
        for frame in itertools.chain(frames, [None]):
            time = frame.pts if isinstance(frame, av.VideoFrame) else frame
            if previous is not None:
                assert previous.pts is not None
                end = previous.pts + (previous.duration or frame_ticks(self.stream))
                yield previous, previous.pts, end if time is None else time
            previous = frame if isinstance(frame, av.VideoFrame) and time is not None else None

    def _decode_until(self, until: float, keyframe: Keyframe | None) -> Iterator[av.VideoFrame | int | None]:
        """Decode from a keyframe, or the start of the file, to the frame that is shown at `until` [ticks].

        Yields:
            Frames; None for a damaged stretch, which ends at the next keyframe; at the end, a time before which no
            other frame appears.
        """
        stream, data = self.stream, self.data
        clock = self._seek(keyframe)
        # A stream may begin between two keyframes, and a position in bytes may be that of an earlier packet.
        by_bytes = self.container.format.name in BYTE_FORMATS
        damaged, awaited = by_bytes and self.timeline.keyframes != [], keyframe.time if by_bytes and keyframe else None
        broken, next_time = False, None
        times: list[int] | None = None
        if self.timeline.without_pts:
            times, until = [], until + MAX_REORDERED * frame_ticks(stream)
        try:
            for packet in self.container.demux(stream):
                if packet.size:
                    clock.adjust(packet)
                # A frame is decoded before it is shown, so all later packets are shown later, too.
                if packet.dts is not None and packet.dts > until:
                    next_time = packet.dts
                    break
                if awaited in (None, packet.dts if packet.pts is None else packet.pts):
                    damaged, awaited = damaged and not packet.is_keyframe, None
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
                broken = damaged
                if damaged or packet.is_corrupt:
                    damaged = True
                    yield None
        except av.error.InvalidDataError:
            pass  # nothing after this position can be demuxed
        with contextlib.suppress(av.error.EOFError, av.error.InvalidDataError):  # EOF: the demuxer flushed the decoder
            for frame in stream.codec_context.decode(None):
                yield _intact(frame, times)
        if not broken:
            yield next_time


def _intact(frame: av.VideoFrame, times: list[int] | None) -> av.VideoFrame | None:
    """Return the frame, or None if it is damaged; `times` (a heap) gives it a time where its container has none."""
    if times:
        frame.pts = heapq.heappop(times)
    return None if frame.is_corrupt else frame
