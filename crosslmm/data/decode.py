"""URI -> frames, in a child process that can be killed: decoders are old native code fed with foreign bytes."""

import functools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as Overtime
from dataclasses import dataclass
from types import TracebackType
from typing import Any, BinaryIO, Self

import av
import numpy as np
import pebble
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from crosslmm import storage
from crosslmm.data import sampling


@dataclass(frozen=True)
class Unreadable:
    """A video that gave no frames, and why."""

    reason: str


class UnreadableVideo(Exception):
    """A video that cannot be decoded; the message is the reason."""


class Decoder:
    """Decodes videos in one child process, each under a deadline.

    A child that spins or crashes in native code is killed and replaced; the other videos do not notice. Use as a
    context manager, or leave it to the end of the process.

    Args:
        num_frames: frames sampled evenly from a video; a shorter one gives fewer.
        image_size: side of the square that frames are resized to [px]. Aspect ratio is not kept, as in SigLIP.
        backend: "pyav" or "decord".
        timeout_s: deadline for one video [s].
    """

    def __init__(self, num_frames: int, image_size: int, backend: str = "pyav", timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self._decode = functools.partial(decode_video, num_frames=num_frames, image_size=image_size, backend=backend)
        self._pool = self._start()

    @staticmethod
    def _start() -> pebble.ProcessPool:
        # Neither threads nor readers survive a plain fork.
        return pebble.ProcessPool(max_workers=1, context=multiprocessing.get_context("forkserver"))

    def __call__(self, uris: Sequence[str]) -> list[np.ndarray | Unreadable]:
        """Decode videos, in order: uint8 (frames, image_size, image_size, 3) each, or why there is none."""
        if not self._pool.active:
            # A child that was killed between two calls, by the kernel for its memory, takes the pool with it.
            self._pool = self._start()
        futures = [self._pool.schedule(self._decode, (uri,), timeout=self.timeout_s) for uri in uris]
        return [self._result(future) for future in futures]

    def _result(self, future: pebble.ProcessFuture) -> np.ndarray | Unreadable:
        try:
            return future.result()
        except Overtime:
            return Unreadable(f"decoding took over {self.timeout_s:g} s and was killed")
        except pebble.ProcessExpired as error:
            return Unreadable(f"the decoder died (exit code {error.exitcode})")
        except UnreadableVideo as error:
            return Unreadable(str(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()


def decode_video(uri: str, num_frames: int, image_size: int, backend: str) -> np.ndarray:
    """Decode one video in this process.

    Returns:
        uint8 (up to num_frames, image_size, image_size, 3), RGB.

    Raises:
        UnreadableVideo: whatever is wrong with the file; the message is one line.
    """
    try:
        with storage.open_read(uri) as file:
            _refuse_what_is_no_video(file)
            return _BACKENDS[backend](file, num_frames, image_size)
    except UnreadableVideo:
        raise
    except FileNotFoundError:
        raise UnreadableVideo("no such file") from None
    except Exception as error:
        # What a file contains may stand in the message: ascii() keeps it to one harmless line.
        raise UnreadableVideo(f"{type(error).__name__}: {_harmless(error)}") from None


def _harmless(error: Exception) -> str:
    return ascii(str(error))[1:-1][:200]


def _refuse_what_is_no_video(file: BinaryIO) -> None:
    """Look at the first bytes before a decoder does: playlists and scripts can make it open other files and hosts."""
    head = file.read(400)
    file.seek(0)
    is_mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
    is_matroska = head[:4] == b"\x1aE\xdf\xa3"
    is_avi = head[:4] == b"RIFF" and head[8:11] == b"AVI"
    is_ts = head[:1] == b"G" and head[188:189] == b"G"
    if not head:
        raise UnreadableVideo("the file is empty")
    if not (is_mp4 or is_matroska or is_avi or is_ts):
        raise UnreadableVideo(f"not an mp4, mov, mkv, webm, avi or ts file: it begins with {head[:12]!r}")


def _with_pyav(file: BinaryIO, num_frames: int, image_size: int) -> np.ndarray:
    resize = VideoReformatter()
    images = []
    with av.open(file, "r", metadata_errors="replace") as container:
        if not container.streams.video:
            raise UnreadableVideo("the file has no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        in_stream = stream.duration and stream.time_base and float(stream.duration * stream.time_base)
        # Matroska's duration counts from zero in a recording that begins later, or does not, as its writer pleases.
        begins_late = (container.start_time or 0) > av.time_base
        in_file = 0.0 if begins_late else (container.duration or 0) / av.time_base
        wanted = sampling.uniform(in_stream or in_file or _measure(container, stream), num_frames)
        for frame in _on_screen(container.decode(stream), wanted):
            image = resize.reformat(frame, image_size, image_size, format="rgb24").to_ndarray()
            # The phone was held upright: containers store the turn, decoders do not make it.
            images.append(np.rot90(image, frame.rotation // 90))
    if not images:
        raise UnreadableVideo("the file has no frames that can be decoded")
    return np.ascontiguousarray(np.stack(images))


def _measure(container: InputContainer, stream: VideoStream) -> float:
    """Duration of a stream whose container does not say it [s], from its packets."""
    times = [(p.pts, p.pts + (p.duration or 1)) for p in container.demux(stream) if p.pts is not None]
    if not times:
        raise UnreadableVideo("the file has no frames that can be decoded")
    container.seek(0)
    begins, ends = zip(*times, strict=True)
    return float((max(ends) - min(begins)) * (stream.time_base or 0))


def _on_screen(frames: Iterator[av.VideoFrame], wanted: np.ndarray) -> Iterator[av.VideoFrame]:
    """The frames that are on screen at the wanted times [s after the first frame], each at most once.

    What the end of a truncated file lacks is left out.
    """
    shown: av.VideoFrame | None = None
    start, asked = 0.0, 0
    try:
        for frame in frames:
            time = frame.time or 0.0
            start = time if shown is None else start
            # Every wanted time before this frame begins belongs to the one before it.
            due = int(np.searchsorted(wanted, time - start, side="left"))
            if due > asked and shown is not None:
                yield shown
                asked = due
            shown = frame
            if asked >= len(wanted):
                return
    except av.error.InvalidDataError:
        if shown is None:
            raise
    if shown is not None and asked < len(wanted):
        yield shown


def _with_decord(file: BinaryIO, num_frames: int, image_size: int) -> np.ndarray:
    import decord  # x86_64 only

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(file, num_threads=1)
    times = reader.get_frame_timestamp(range(len(reader)))
    order = np.argsort(times[:, 0])
    wanted = sampling.uniform(float(times[:, 1].max() - times[:, 0].min()), num_frames)
    chosen = order[sampling.nearest(times[order, 0] - times[:, 0].min(), wanted)]
    # decord's own resize fails on some widths (48: "the size must exactly match"), so the same one as above is used.
    resize = VideoReformatter()
    frames = reader.get_batch(chosen).asnumpy()
    return np.stack(
        [
            resize.reformat(av.VideoFrame.from_ndarray(f, format="rgb24"), image_size, image_size).to_ndarray()
            for f in frames
        ]
    )


_BACKENDS: dict[str, Any] = {"pyav": _with_pyav, "decord": _with_decord}
