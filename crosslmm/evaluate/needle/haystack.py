"""The haystack: the features of the longest video, encoded once, and the same with other frames in some places."""

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.feature_format import from_bf16, to_bf16
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.samples import needles
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.frame_list import describe_video
from crosslmm.inference.answerer import Answerer

T = TypeVar("T")
PART_S = 600.0
"""Longest part of a real video that is decoded at once [s]."""
GENERATED = 256
"""Frames that are generated, or decoded, at once."""


class Haystack:
    """Frames without needles: they and their features (bf16) are in local files, since hours of video do not fit into
    memory.

    Args:
        answerer: the model.
        frames: length [frames].
        videos: files that it shows, one after the other; none: noise.
        seed: of the noise.
        scratch: local folder of the files; None: the system's temporary folder.

    Raises:
        BadConfig: a video cannot be read.
    """

    def __init__(
        self, answerer: Answerer, frames: int, videos: Sequence[str], seed: int, scratch: str | None = None
    ) -> None:
        config = answerer.model.config
        self.answerer, self.seed, self.side = answerer, seed, answerer.processor.image_size
        self._folder = tempfile.TemporaryDirectory(dir=scratch)
        shape = (config.patches_per_frame, config.vision_config.hidden_size)
        self._bits = _FrameFile(Path(self._folder.name, "features"), np.uint16, shape)
        self._pixels = _FrameFile(Path(self._folder.name, "frames"), np.uint8, (self.side, self.side, 3))
        try:
            self._require_space(frames)
            for pixels in self._read(frames, videos) if videos else self._generate(frames):
                self._pixels.append(pixels)
                self._bits.append(to_bf16(self.encode(pixels).float().numpy()))
        except BaseException:
            self.close()
            raise

    def _require_space(self, frames: int) -> None:
        needed = frames * (self._bits.frame_bytes + self._pixels.frame_bytes)
        free = shutil.disk_usage(self._folder.name).free
        if needed > free:
            raise BadConfig(
                f"--scratch: {frames:,} frames take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
            )

    def close(self) -> None:
        """Delete the files."""
        self._folder.cleanup()

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Encode frames, uint8 (frames, side, side, 3) -> (frames, patches, width), on the CPU."""
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.answerer.device)
        with torch.no_grad():
            return self.answerer.model.encode(frames).cpu()

    def with_frames(self, length: int, replaced: Mapping[int, Tensor]) -> "Spliced":
        """Return the features of the first `length` frames, some of which are replaced by others, (patches, width)."""
        return Spliced(self._bits, length, replaced)

    def frame(self, number: int) -> np.ndarray:
        """Return a frame, uint8 (side, side, 3)."""
        return self._pixels.read(number, number + 1)[0]

    def _generate(self, frames: int) -> Iterator[np.ndarray]:
        for start in range(0, frames, GENERATED):
            yield needles.haystack(self.seed, range(start, min(start + GENERATED, frames)), self.side)

    def _read(self, frames: int, videos: Sequence[str]) -> Iterator[np.ndarray]:
        """Decode as many frames, spread evenly over all videos, a few minutes and at most `GENERATED` at a time."""
        data = self.answerer.config.data
        ranges = [split_time_range(storage.absolute(video)) for video in videos]
        uris = [uri for uri, _, _ in ranges]
        with HeaderReader(data) as reader:
            headers = [_require(uri, header) for uri, header in zip(uris, reader(uris), strict=True)]
        parts = [
            part
            for (uri, start, end), header in zip(ranges, headers, strict=True)
            for part in _parts(uri, start, min(end or header.seconds, header.seconds))
        ]
        ends = np.cumsum([end - start for _, start, end in parts])
        counts = np.diff(np.round(frames * ends / ends[-1]).astype(int), prepend=0)
        for (uri, start, end), count in zip(parts, counts.tolist(), strict=True):
            pieces = -(-count // GENERATED)
            for piece in range(pieces):
                first, last = (start + (end - start) * i / pieces for i in (piece, piece + 1))
                frames_of_piece = count * (piece + 1) // pieces - count * piece // pieces
                yield self._decode(f"{uri}#t={first:.3f},{last:.3f}", frames_of_piece, data)

    def _decode(self, uri: str, count: int, data: DataConfig) -> np.ndarray:
        with Decoder(data.model_copy(update={"num_frames": count, "sampling": "uniform"}), self.side) as decoder:
            (video,) = decoder([uri])
        images = _require(uri, video).images
        # A part with fewer pictures shows some of them longer.
        return images[np.arange(count) * len(images) // count]


class Spliced:
    """Features in bf16, with other frames in some places; see `FrameFeatures`."""

    def __init__(self, bits: "_FrameFile", length: int, replaced: Mapping[int, Tensor]) -> None:
        self._bits, self._length, self._replaced = bits, length, replaced

    def __len__(self) -> int:
        """Return the number of frames."""
        return self._length

    def __getitem__(self, frames: slice) -> Tensor:
        """Return the features of some frames, float32 (F, P, D)."""
        start, stop, _ = frames.indices(self._length)
        x_FPD = torch.from_numpy(from_bf16(self._bits.read(start, stop)))
        for place, number in enumerate(range(*frames.indices(len(self)))):
            if number in self._replaced:
                x_FPD[place] = self._replaced[number]
        return x_FPD


class _FrameFile:
    """A file of arrays of one shape, one per frame. It is read a chunk at a time: mapped, it would count as memory."""

    def __init__(self, path: Path, dtype: type, shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.shape = path, np.dtype(dtype), shape
        self.frame_bytes = self.dtype.itemsize * math.prod(shape)

    def append(self, x: np.ndarray) -> None:
        """Append the arrays of further frames, (frames, *shape)."""
        with self.path.open("ab") as file:
            x.astype(self.dtype, copy=False).tofile(file)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the arrays of frames [start, stop), (frames, *shape)."""
        count = max(0, stop - start) * math.prod(self.shape)
        return np.fromfile(self.path, self.dtype, count, offset=start * self.frame_bytes).reshape(-1, *self.shape)


def _parts(uri: str, first: float, last: float) -> list[tuple[str, float, float]]:
    count = max(1, int(np.ceil((last - first) / PART_S)))
    edges = np.linspace(first, last, count + 1)
    return [(uri, float(start), float(end)) for start, end in itertools.pairwise(edges)]


def _require(uri: str, result: T | VideoFailure) -> T:
    if isinstance(result, VideoFailure):
        raise BadConfig(f"--haystack {describe_video(uri)}: {result.reason}")
    return result
