"""When the frames of a video stream are shown: from its index and last packets, or from all of its packets.

What a header says is a hint. A container's duration is that of its longest stream, and writers copy, guess or forget
durations, so none is used unless the stream's own packets or index agree with it.
"""

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, frames_at
from crosslmm.data.video.container import NoFrames, UnreadableVideo, select_video_stream

INDEXED_FORMATS = ("mov", "matroska", "avi", "flv")
"""Formats whose index names the keyframes, or has them once libav has read the file."""
BYTE_FORMATS = ("mpegts", "mpeg", "h264", "hevc", "mpegvideo")
"""Formats in which libav seeks by bytes more reliably than by time, which several parts of a file may share."""
RAW_FORMATS = ("h264", "hevc", "mpegvideo")
"""Streams without a container and so without times: one frame follows the other at the rate that the stream states."""
ESTIMATED_FORMATS = ("mpegts", "mpeg", "ogg")
"""Formats whose duration can be estimated from the last time stamps, if the clock does not jump in between."""
TS_DISCONT = 0x0200
"""AVFMT_TS_DISCONT: libav's flag of formats whose clock may jump."""
JUMP_FORWARD_S, JUMP_BACK_S = 10.0, 0.1
"""Differences between two time stamps that are a jump of the clock, as ffmpeg has it (`dts_delta_threshold`) [s]."""
FAR = 2**40
"""A time after the end of every video [ticks of the stream's clock]."""
SHORT_PART_S = 60.0
"""A part of a video that ends so soon is decoded from the start of the file, without a search for its end [s]."""
ROUNDING_S = 1e-6
"""Added to each moment, so that rounding never puts it just before its frame [s]."""
TAIL_BYTES = 2**20
"""Part of the file that gives the last time stamps [bytes]."""
MIN_BYTES_PER_S = 2000
"""A duration which leaves fewer bytes for a second is not believed: the clock jumped [bytes/s]."""


@dataclass(frozen=True)
class Keyframe:
    """Where decoding can start."""

    time: int
    """When it is shown [ticks], jumps of the clock removed."""
    position: int
    """Offset of its packet in the file, or of one shortly before [bytes]."""
    shift: int = 0
    """Correction that is added to raw time stamps from here on, which removes the jumps of the clock before [ticks]."""


@dataclass
class Timeline:
    """The times of a stream's frames, in ticks of its clock."""

    start: int
    """When the first frame appears."""
    end: float
    """When the last frame leaves the screen."""
    tick: float
    """Length of a tick [s]."""
    last: float | None = None
    """When the last frame appears, if known."""
    frames: int | None = None
    """Number of frames; known if all packets were read, or if the index lists a single one."""
    keyframes: list[Keyframe] | None = None
    """Keyframes; known if all packets were read. Otherwise libav's index has them, or nothing has."""
    jumps: int = 0
    """Number of jumps of the clock that were removed."""
    without_pts: bool = False
    """Whether packets have decoding times only: then the n-th frame that the decoder outputs, counted from the start of
    the file, has the n-th smallest of these."""
    estimated: bool = False
    """Whether `start` and `end` are libav's estimate, which a jump of the clock makes wrong."""
    lists_frames: bool = False
    """Whether libav's index has all frames, and not only keyframes."""
    in_pieces: bool = False
    """Whether libav reads the index in pieces, as it seeks (fragments with a segment index)."""

    @functools.cached_property
    def keyframe_times(self) -> np.ndarray:
        """When each of `keyframes` is shown, int64 (keyframes,)."""
        return np.array([keyframe.time for keyframe in self.keyframes or ()], np.int64)

    @property
    def duration(self) -> float:
        """From the start of the first frame to the end of the last [s]."""
        return (self.end - self.start) * self.tick


@dataclass
class Clock:
    """Gives packets continuous times: removes jumps of the clock as ffmpeg does, and counts where there are no times.

    Packets pass through it in the order of the file.
    """

    container: InputContainer
    stream: VideoStream
    shift: int = 0
    """What is added to all time stamps [ticks]."""
    next_time: int | None = None
    """Decoding time that the next packet should have [ticks]."""
    jumps: int = 0
    _last: int = field(default=-FAR, init=False)
    _delay: int = field(default=0, init=False)

    def adjust(self, packet: Packet) -> None:
        """Change the time stamps of a packet."""
        dts = packet.dts if packet.dts is not None else packet.pts
        if self.container.format.name in RAW_FORMATS:
            dts = packet.dts = self.next_time or 0
            packet.pts = None
        elif dts is None:
            dts = self.next_time or 0
        elif self.container.format.flags & TS_DISCONT:
            dts += self.shift
            if self.next_time is not None and not self._continues(dts):
                self.shift += self.next_time - dts
                self.jumps += 1
                dts = self.next_time
            packet.dts = dts
            if packet.pts is not None:
                packet.pts = self._believable(packet.pts + self.shift, dts)
        self._last, self.next_time = dts, dts + (packet.duration or frame_ticks(self.stream))

    def _believable(self, pts: int, dts: int) -> int:
        """Return the presentation time of a packet. libav may take it from the packet after a jump of the clock; then
        return the decoding time plus the longest delay between decoding and presentation so far."""
        if abs(pts - dts) * float(self.stream.time_base or 1) > JUMP_FORWARD_S:
            return dts + self._delay
        self._delay = max(self._delay, pts - dts)
        return pts

    def _continues(self, dts: int) -> bool:
        tick = float(self.stream.time_base or 1)
        assert self.next_time is not None
        return (dts - self.next_time) * tick <= JUMP_FORWARD_S and (self._last - dts) * tick <= JUMP_BACK_S


def open_stream(
    file: BinaryIO, container: InputContainer, data: DataConfig, until: float = math.inf, estimate: bool = False
) -> tuple[VideoStream, Timeline]:
    """Select a video stream, and find out when its frames are shown; loads the container's index.

    It is the first that has frames: old WMV files announce a stream for each bit rate, and hold one of them.

    Args:
        file, container: just opened.
        data: limits.
        until: no frame after this time is needed if the video is longer [s].
        estimate: take an estimate of the video's end, if it can be believed.

    Raises:
        UnreadableVideo: there is no such stream, see `select_video_stream`, or the video is too long.
    """
    for number in itertools.count():
        stream = select_video_stream(container, data, number)
        if not stream:
            break
        with contextlib.suppress(NoFrames):
            timeline = (estimate_timeline(container, stream) if estimate else None) or _read_timeline(
                file, container, stream, until
            )
            require_duration(timeline.duration, data)
            return stream, timeline
    raise NoFrames


def _read_timeline(file: BinaryIO, container: InputContainer, stream: VideoStream, until: float) -> Timeline:
    if "matroska" in container.format.name:
        rewind(container)  # libav reads the index of a Matroska file on the first seek only
    timeline = _from_index(file, container, stream) if has_index(container, stream) else None
    if not timeline and until <= SHORT_PART_S:
        estimate = estimate_timeline(container, stream)
        timeline = estimate if estimate and estimate.duration > until + 1 else None
    return timeline or scan(container, stream)


def require_duration(seconds: float, data: DataConfig) -> None:
    """Raise UnreadableVideo if a video is too long [s]."""
    if seconds > data.max_video_s:
        raise UnreadableVideo(f"it lasts {seconds:.0f} s, and data.max_video_s is {data.max_video_s:g}")


def clip_bounds(start: float, end: float | None, duration: float) -> tuple[float, float]:
    """Return start and end of the requested part of a video of this duration [s].

    Raises:
        UnreadableVideo: the video ends before the part starts.
    """
    if start >= duration:
        raise UnreadableVideo(f"it lasts {duration:.1f} s, and the requested part starts at {start:g} s")
    return start, duration if end is None else min(end, duration)


def choose_frames(
    starts: np.ndarray, duration: float, sampling: FrameSampling, start: float, end: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Choose from frames whose times are all known.

    Args:
        starts: when each frame appears, ascending from 0, float64 (frames,) [s].
        duration: of the video [s].
        sampling: the policy.
        start, end: part of the video to sample from; None means the end of the video [s].

    Returns:
        (moments, chosen): the sampled moments [s], and the indices of the frames that are on screen then, each once.

    Raises:
        UnreadableVideo: the video ends before the part starts.
    """
    first, last = clip_bounds(start, end, duration)
    latest = float(starts[np.searchsorted(starts, last) - 1])
    moments = first + sampling.times(last - first, max(latest - first, 0)) + ROUNDING_S
    return moments, frames_at(starts, moments)


def estimate_timeline(container: InputContainer, stream: VideoStream) -> Timeline | None:
    """Return the times that the end of the file gives; None if they cannot be believed, or the format has an index."""
    if container.format.name not in ESTIMATED_FORMATS or stream.start_time is None:
        return None
    end: float | None = None if stream.duration is None else stream.start_time + stream.duration
    if container.format.name in BYTE_FORMATS:
        with contextlib.suppress(av.FFmpegError):
            container.seek(max(0, container.size - TAIL_BYTES), stream=stream, unsupported_byte_offset=True)
        tail = _read_packets(container, stream)
        rewind(container)
        end = tail.end if tail else None
    if end is None:
        return None
    estimate = Timeline(stream.start_time, end, float(stream.time_base or 1), estimated=True)
    return estimate if 0 < estimate.duration * MIN_BYTES_PER_S <= container.size else None


def scan(container: InputContainer, stream: VideoStream) -> Timeline:
    """Read all packets of a stream, and decode none.

    Raises:
        NoFrames: there are none.
    """
    rewind(container)
    timeline = _read_packets(container, stream, Clock(container, stream))
    if not timeline:
        raise NoFrames
    return timeline


def index_of(stream: VideoStream) -> Any:
    """Return libav's index of a stream; empty with an older PyAV, such as that of lmms-eval, which does not show it."""
    return getattr(stream, "index_entries", ())


def has_index(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether libav's index names the keyframes of a stream."""
    return len(index_of(stream)) > 0 and any(name in container.format.name for name in INDEXED_FORMATS)


def frame_ticks(stream: VideoStream) -> int:
    """Return the time between two frames at the stream's average rate [ticks], at least 1."""
    rate = stream.average_rate or stream.guessed_rate
    return max(1, round(1 / (rate * stream.time_base))) if rate and stream.time_base else 1


def rewind(container: InputContainer) -> None:
    """Go to the start of the file."""
    by_bytes = [True] if container.format.name in BYTE_FORMATS else [False, True]  # by time, a search in the file
    for how in by_bytes:
        with contextlib.suppress(av.FFmpegError):  # no frame at 0, or no frames
            container.seek(0, unsupported_byte_offset=how)
            return


def _from_index(file: BinaryIO, container: InputContainer, stream: VideoStream) -> Timeline | None:
    """Return the times that index and last packets give; None if no packet follows the last keyframe."""
    index, tick, entries = index_of(stream), float(stream.time_base or 1), len(index_of(stream))
    start = index[0].timestamp if stream.start_time is None else stream.start_time
    without_pts = container.format.name == "avi"
    lists_all = without_pts or "mov" in container.format.name  # all frames, and not only keyframes
    only = 1 if lists_all and entries == 1 else None
    if lists_all and stream.duration and not index[0].is_discard:
        # The header's duration counts if it leaves the last frame about as long on screen as the others.
        tail = stream.duration - (index[entries - 1].timestamp - index[0].timestamp)
        if 0 < tail <= 2 * frame_ticks(stream):
            end = start + stream.duration
            return Timeline(start, end, tick, frames=only, without_pts=without_pts, lists_frames=True)
    if not lists_all:
        storage.will_read(file, [(index[entries - 1].pos, container.size)])  # libav reads it twice
    with contextlib.suppress(av.FFmpegError):
        container.seek(FAR, stream=stream)  # to the last keyframe
    packets = _read_packets(container, stream)
    return packets and Timeline(
        start,
        packets.end,
        tick,
        packets.last,
        only,
        without_pts=without_pts,
        lists_frames=lists_all,
        in_pieces=lists_all and len(index_of(stream)) > entries,
    )


def _read_packets(container: InputContainer, stream: VideoStream, clock: Clock | None = None) -> Timeline | None:
    """Read the packets from here to the end of the file; return their times, or None without packets."""
    keyframes: list[Keyframe] = []
    position = frames = 0
    first, last, end, without_pts = math.inf, -math.inf, -math.inf, False
    with contextlib.suppress(av.error.InvalidDataError):  # packets before the damage still count
        for packet in container.demux(stream):
            if clock and packet.size:
                clock.adjust(packet)
            time = packet.dts if packet.pts is None else packet.pts
            if time is None or not packet.size or packet.is_discard:
                continue
            position = position if packet.pos is None else packet.pos
            without_pts |= packet.pts is None
            if packet.is_keyframe:
                keyframes.append(Keyframe(time, position, clock.shift if clock else 0))
            frames += 1
            first, last = min(first, time), max(last, time)
            end = max(end, time + (packet.duration or frame_ticks(stream)))
    if not frames:
        return None
    start = keyframes[0].time if keyframes else int(first)  # frames before the first keyframe cannot be decoded
    jumps = clock.jumps if clock else 0
    return Timeline(start, end, float(stream.time_base or 1), last, frames, keyframes, jumps, without_pts=without_pts)
