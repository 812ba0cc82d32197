"""Alternative decoders with the contract of `pyav.with_pyav`: decord and torchcodec.

Neither is imported before it is used. `python -m benchmarks.decoders` compares them with the default.
"""

import ctypes
import io
from typing import BinaryIO

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, SampledFrames, describe_shortfall
from crosslmm.data.video.container import (
    NoFrames,
    UnreadableVideo,
    open_container,
    require_codec,
    require_size,
)
from crosslmm.data.video.timeline import (
    ROUNDING_S,
    choose_frames,
    clip_bounds,
    frame_ticks,
    open_stream,
    require_duration,
)


def with_decord(
    file: BinaryIO, format_name: str, data: DataConfig, image_size: int, start: float = 0.0, end: float | None = None
) -> SampledFrames:
    """Decode like `with_pyav`, with decord, which reads the whole file into memory and raises its own errors.

    Its FFmpeg is guarded like torchcodec's, see `with_torchcodec`.
    """
    import decord  # x86_64 only

    decord.logging.set_level(decord.logging.QUIET)
    file.seek(0)
    content = io.BytesIO(file.read())  # read once: the file could change between the check and the decoding
    with open_container(content, format_name, data) as container:
        _require_all_allowed(container, data)
        open_stream(content, container, data, until=0.0)
    _require_guess(content, format_name, "decord", decord._ffi.libinfo.find_lib_path()[0])
    content.seek(0)
    reader = decord.VideoReader(content, num_threads=1)
    height, width = reader[0].shape[:2]
    require_size(width, height, data)
    times = reader.get_frame_timestamp(range(len(reader))).astype(np.float64)
    order = np.argsort(times[:, 0])
    starts = times[order, 0] - times[:, 0].min()
    duration = float(times[:, 1].max() - times[:, 0].min())
    require_duration(duration, data)
    moments, chosen = choose_frames(starts, duration, FrameSampling.of(data), start, end)
    # decord's own resize fails on some widths (48: "the size must exactly match"), so use the default decoder's.
    resize = VideoReformatter()
    frames = reader.get_batch(order[chosen]).asnumpy()
    images = [
        resize.reformat(av.VideoFrame.from_ndarray(f, format="rgb24"), image_size, image_size).to_ndarray()
        for f in frames
    ]
    ends = np.append(starts[1:], duration)
    return SampledFrames(np.stack(images), starts[chosen], describe_shortfall(moments, starts[chosen], ends[chosen]))


def with_torchcodec(
    file: BinaryIO, format_name: str, data: DataConfig, image_size: int, start: float = 0.0, end: float | None = None
) -> SampledFrames:
    """Decode like `with_pyav`, with torchcodec, which scans the whole file for frame times and raises its own
    errors.

    Its FFmpeg guesses the container and opens every file that a playlist names, and neither can be turned off. So this
    function first opens the file as `with_pyav` does, then asks that FFmpeg for its guess, and refuses a file unless
    the guess is `format_name`. Frames that become larger within the stream are limited by the memory of the process
    alone, not by `max_frame_pixels`.
    """
    import torchcodec
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    with open_container(file, format_name, data) as container:
        _require_all_allowed(container, data)
        stream, _ = open_stream(file, container, data, until=0.0)
        stream_index, interval = stream.index, frame_ticks(stream) * float(stream.time_base or 1)
    _require_guess(file, format_name, "torchcodec", torchcodec.core_library_path)
    file.seek(0)
    # One thread. torchcodec applies a phone's rotation itself, and resizes with the same filter as `with_pyav`.
    decoder = VideoDecoder(
        file,
        stream_index=stream_index,
        dimension_order="NHWC",
        device="cpu",
        transforms=[Resize((image_size, image_size))],
    )
    stream_start, stream_end = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    if not len(decoder):
        raise NoFrames
    duration = stream_end - stream_start
    require_duration(duration, data)
    first, last = clip_bounds(start, end, duration)
    times = FrameSampling.of(data).times(last - first, max(last - first - interval, 0))
    moments = np.minimum(stream_start + first + times + ROUNDING_S, np.nextafter(stream_end, stream_start))
    batch = decoder.get_frames_played_at(moments.tolist())
    shown_at = batch.pts_seconds.numpy()
    if (shown_at > moments).any():
        # In transport streams, and before the first keyframe of an edit list, it silently returns a later frame.
        raise UnreadableVideo("torchcodec cannot seek to the frames before a keyframe")
    starts, distinct = np.unique(shown_at, return_index=True)
    ends = starts + batch.duration_seconds.numpy()[distinct]
    shortfall = describe_shortfall(moments, starts, np.maximum(ends, np.append(starts[1:], 0)))
    images = np.ascontiguousarray(batch.data.numpy()[distinct])
    return SampledFrames(images, starts - stream_start, shortfall)


class _ProbeData(ctypes.Structure):
    """libav's AVProbeData."""

    _fields_ = (
        ("filename", ctypes.c_char_p),
        ("bytes", ctypes.c_char_p),
        ("size", ctypes.c_int),
        ("mime_type", ctypes.c_char_p),
    )


def _require_all_allowed(container: InputContainer, data: DataConfig) -> None:
    """Check codec and size of every video stream, cover pictures included: other libraries' FFmpeg decodes some frames
    of each to learn about it, and decord selects a stream by itself."""
    for stream in container.streams.video:
        require_codec(stream)
        require_size(stream.codec_context.width, stream.codec_context.height, data, known=True)


def _require_guess(file: BinaryIO, format_name: str, decoder: str, library: str) -> None:
    """Check that a decoder's own FFmpeg takes a file for the container that its first bytes name.

    Args:
        file: seekable.
        format_name: libav's name of that container.
        decoder: name of the decoder, for the message.
        library: path of a library that is linked with the decoder's FFmpeg.

    Raises:
        UnreadableVideo: it would open the file as another format.
    """
    guess = _guess_format(ctypes.CDLL(library), file)
    if format_name not in guess.split(","):
        raise UnreadableVideo(f"it starts as {format_name}, but {decoder} takes it for {guess or 'no known format'}")


def _guess_format(library: ctypes.CDLL, file: BinaryIO) -> str:
    """Return the format that an FFmpeg guesses, as libav names it ("mov,mp4,m4a,..."); empty if it has none.

    Repeats what libav does when it opens a file: from the first 2 KiB, 4 KiB, ... accept a guess unless it is weak
    (AVPROBE_SCORE_RETRY), and from 1 MiB accept any.
    """
    guess = library.av_probe_input_format2
    guess.restype = ctypes.POINTER(ctypes.c_char_p)  # the first field of AVInputFormat is its name
    file.seek(0)
    head = b""
    for size in (2**power for power in range(11, 21)):
        while len(head) < size and (data := file.read(size - len(head))):
            head += data
        probe_data = _ProbeData(b"", head + bytes(32), len(head), None)  # 32: AVPROBE_PADDING_SIZE
        score = ctypes.c_int(25 if size < 2**20 else 0)
        result = guess(ctypes.byref(probe_data), 1, ctypes.byref(score))
        if result:
            return (result.contents.value or b"").decode()
    return ""
