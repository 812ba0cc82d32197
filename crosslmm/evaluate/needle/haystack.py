"""The haystack: the features of the longest video, encoded once, and the same with other frames in some places."""

import itertools
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
from crosslmm.data.samples import needles
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.frame_list import describe_video
from crosslmm.inference.answerer import Answerer

T = TypeVar("T")
PART_S = 600.0
"""Longest part of a real video that is decoded at once [s]."""
GENERATED = 256
"""Frames that are generated at once."""


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
        shape = (frames, config.patches_per_frame, config.vision_config.hidden_size)
        self._bits = np.memmap(Path(self._folder.name, "features"), np.uint16, "w+", shape=shape)
        pixels_shape = (frames, self.side, self.side, 3)
        self._pixels = np.memmap(Path(self._folder.name, "frames"), np.uint8, "w+", shape=pixels_shape)
        done = 0
        for pixels in self._read(frames, videos) if videos else self._generate(frames):
            part = slice(done, done + len(pixels))
            self._pixels[part], self._bits[part] = pixels, to_bf16(self.encode(pixels).float().numpy())
            done += len(pixels)

    def close(self) -> None:
        """Delete the files."""
        del self._bits, self._pixels
        self._folder.cleanup()

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Encode frames, uint8 (frames, side, side, 3) -> (frames, patches, width), on the CPU."""
        frames = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.answerer.device)
        with torch.no_grad():
            return self.answerer.model.encode(frames).cpu()

    def with_frames(self, length: int, replaced: Mapping[int, Tensor]) -> "Spliced":
        """Return the features of the first `length` frames, some of which are replaced by others, (patches, width)."""
        return Spliced(self._bits[:length], replaced)

    def frame(self, number: int) -> np.ndarray:
        """Return a frame, uint8 (side, side, 3)."""
        return np.array(self._pixels[number])

    def _generate(self, frames: int) -> Iterator[np.ndarray]:
        for start in range(0, frames, GENERATED):
            yield needles.haystack(self.seed, range(start, min(start + GENERATED, frames)), self.side)

    def _read(self, frames: int, videos: Sequence[str]) -> Iterator[np.ndarray]:
        """Decode as many frames, spread evenly over all videos, a few minutes at a time."""
        data = self.answerer.config.data
        uris = [storage.absolute(video) for video in videos]
        with HeaderReader(data) as reader:
            headers = [_require(uri, header) for uri, header in zip(uris, reader(uris), strict=True)]
        parts = [part for uri, header in zip(uris, headers, strict=True) for part in _parts(uri, header.seconds)]
        ends = np.cumsum([end - start for _, start, end in parts])
        counts = np.diff(np.round(frames * ends / ends[-1]).astype(int), prepend=0)
        for (uri, start, end), count in zip(parts, counts.tolist(), strict=True):
            if count:
                yield self._decode(f"{uri}#t={start:.3f},{end:.3f}", count, data)

    def _decode(self, uri: str, count: int, data: DataConfig) -> np.ndarray:
        with Decoder(data.model_copy(update={"num_frames": count, "sampling": "uniform"}), self.side) as decoder:
            (video,) = decoder([uri])
        images = _require(uri, video).images
        # A part with fewer pictures shows some of them longer.
        return images[np.arange(count) * len(images) // count]


class Spliced:
    """Features in bf16, with other frames in some places; see `FrameFeatures`."""

    def __init__(self, bits_FPD: np.ndarray, replaced: Mapping[int, Tensor]) -> None:
        self._bits_FPD, self._replaced = bits_FPD, replaced

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self._bits_FPD)

    def __getitem__(self, frames: slice) -> Tensor:
        """Return the features of some frames, float32 (F, P, D)."""
        x_FPD = torch.from_numpy(from_bf16(np.asarray(self._bits_FPD[frames])))
        for place, number in enumerate(range(*frames.indices(len(self)))):
            if number in self._replaced:
                x_FPD[place] = self._replaced[number]
        return x_FPD


def _parts(uri: str, duration: float) -> list[tuple[str, float, float]]:
    count = max(1, int(np.ceil(duration / PART_S)))
    edges = np.linspace(0, duration, count + 1)
    return [(uri, float(start), float(end)) for start, end in itertools.pairwise(edges)]


def _require(uri: str, result: T | VideoFailure) -> T:
    if isinstance(result, VideoFailure):
        raise BadConfig(f"--haystack {describe_video(uri)}: {result.reason}")
    return result
