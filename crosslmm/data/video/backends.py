"""The decoders that are not the default, under the contract of `frames.with_pyav`: decord and torchcodec.

`python -m benchmarks.decoders` has the reasons; neither is imported before it is asked for.
"""

import ctypes
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import FrameSampling, frames_at
from crosslmm.data.video.pyav import UnreadableVideo, choose_stream, gap_of, open_container, part_of


def with_decord(
    file: BinaryIO, form: str, data: DataConfig, image_size: int, begin: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Decode with decord, which reads the whole file into memory. Like `with_pyav`; errors are decord's own."""
    import decord  # x86_64 only

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(file, num_threads=1)
    height, width = reader[0].shape[:2]
    if width * height > data.max_frame_pixels:
        raise UnreadableVideo(
            f"its frames are {width} x {height}, and data.max_frame_pixels is {data.max_frame_pixels}"
        )
    times = reader.get_frame_timestamp(range(len(reader)))
    order = np.argsort(times[:, 0])
    begins = times[order, 0] - times[:, 0].min()
    duration = float(times[:, 1].max() - times[:, 0].min())
    if duration > data.max_video_s:
        raise UnreadableVideo(f"it lasts {duration:.0f} s, and data.max_video_s is {data.max_video_s:g}")
    first, last = part_of(begin, end, duration)
    latest = float(begins[np.searchsorted(begins, last) - 1])  # of the part's frames
    wanted = first + FrameSampling(data.num_frames, data.sampling, data.fps).times(last - first, max(latest - first, 0))
    # decord's own resize fails on some widths (48: "the size must exactly match"), so the same one as above is used.
    resize = VideoReformatter()
    frames = reader.get_batch(order[frames_at(begins, wanted + 1e-6)]).asnumpy()
    return np.stack(
        [
            resize.reformat(av.VideoFrame.from_ndarray(f, format="rgb24"), image_size, image_size).to_ndarray()
            for f in frames
        ]
    )


def with_torchcodec(
    file: BinaryIO, form: str, data: DataConfig, image_size: int, begin: float = 0.0, end: float | None = None
) -> np.ndarray:
    """Decode with torchcodec, which reads the whole file for its frames' times. Like `with_pyav`; errors are its own.

    Its FFmpeg guesses the container and opens whatever a playlist names; neither can be forbidden. So that FFmpeg is
    asked first what it would guess, and a file that it takes for anything but `form` is refused. A stream that grows on
    its way is held by the process's memory alone, not by `max_frame_pixels`.
    """
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    with open_container(file, form) as container:
        stream = choose_stream(container, data)
        number, gap = stream.index, gap_of(stream)
    guess = _guessed_by_torchcodec(file)
    if form not in guess.split(","):
        raise UnreadableVideo(f"it begins as {form}, and torchcodec takes it for {guess or 'nothing that it knows'}")
    file.seek(0)
    decoder = VideoDecoder(  # one thread; it turns a phone's video upright, and resizes by the same filter as above
        file,
        stream_index=number,
        dimension_order="NHWC",
        device="cpu",
        transforms=[Resize((image_size, image_size))],
    )
    opens, closes = decoder.metadata.begin_stream_seconds, decoder.metadata.end_stream_seconds
    if not len(decoder):
        raise UnreadableVideo("the file has no frames that can be decoded")
    if closes - opens > data.max_video_s:
        raise UnreadableVideo(f"it lasts {closes - opens:.0f} s, and data.max_video_s is {data.max_video_s:g}")
    first, last = part_of(begin, end, closes - opens)
    times = FrameSampling(data.num_frames, data.sampling, data.fps).times(last - first, max(last - first - gap, 0))
    wanted = np.minimum(opens + first + times + 1e-6, np.nextafter(closes, opens))
    found = decoder.get_frames_played_at(wanted.tolist())
    shown = found.pts_seconds.numpy()
    if (shown > wanted).any():
        # In transport streams, and before the first keyframe of an edit list, it lands behind and says nothing.
        raise UnreadableVideo("torchcodec finds no way back to the frames before a keyframe")
    _, once = np.unique(shown, return_index=True)
    return np.ascontiguousarray(found.data.numpy()[once])


class _Probed(ctypes.Structure):
    """libav's AVProbeData."""

    _fields_ = (
        ("filename", ctypes.c_char_p),
        ("bytes", ctypes.c_char_p),
        ("size", ctypes.c_int),
        ("mime_type", ctypes.c_char_p),
    )


def _guessed_by_torchcodec(file: BinaryIO) -> str:
    """What torchcodec's FFmpeg takes a file for, as libav names it ("mov,mp4,m4a,..."); empty: it does not know.

    As in libav's own opening, the first guess from 2 KiB or twice, four times, ... as much is taken that is no weak one
    (AVPROBE_SCORE_RETRY), and any from 1 MiB.
    """
    import torchcodec

    guess = ctypes.CDLL(torchcodec.core_library_path).av_probe_input_format2
    guess.restype = ctypes.POINTER(ctypes.c_char_p)  # AVInputFormat begins with its names
    file.seek(0)
    head = b""
    for size in (2**power for power in range(11, 21)):
        while len(head) < size and (piece := file.read(size - len(head))):
            head += piece
        probed = _Probed(b"", head + bytes(32), len(head), None)  # AVPROBE_PADDING_SIZE
        score = ctypes.c_int(25 if size < 2**20 else 0)
        found = guess(ctypes.byref(probed), 1, ctypes.byref(score))
        if found:
            return (found.contents.value or b"").decode()
    return ""
