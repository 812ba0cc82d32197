"""Writes generated clips as H.264 files, with their manifest. The same clips give the same bytes."""

import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from crosslmm import storage

FPS = 4
"""Frame rate of clips that state no other [1/s]."""


@dataclass(frozen=True)
class Clip:
    """A generated video with its questions and answers."""

    frames: np.ndarray
    """uint8 (frames, height, width, 3), RGB."""
    turns: list[tuple[str, str]]
    """(question, answer) of each turn of the conversation."""
    kind: str | None = None
    """Category of the question, if the clip asks a single one."""
    fps: Fraction | int = FPS
    """Frame rate [1/s]."""


def write_split(folder: str, split: str, clips: Iterator[Clip], **x264: str) -> None:
    """Write `{split}/00000.mp4`, ... and, last, the manifest `{split}.jsonl` into `folder` (a path or an `s3://` URI).

    `x264` overrides options of the encoder, such as crf="12".
    """
    rows: list[dict[str, Any]] = []
    # x264 releases the interpreter lock, so two threads take half the time.
    with ThreadPoolExecutor(2) as threads:
        while batch := list(itertools.islice(clips, 256)):
            new = [_row(f"{split}/{len(rows) + i:05d}", clip) for i, clip in enumerate(batch)]
            files = threads.map(lambda clip: encode_clip(clip.frames, clip.fps, **x264), batch)
            for row, file in zip(new, files, strict=True):
                storage.write_bytes(storage.join(folder, row["video"]), file)
            rows += new
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(storage.join(folder, f"{split}.jsonl"), lines.encode())


def _row(name: str, clip: Clip) -> dict[str, Any]:
    """Return one row of the manifest."""
    messages: list[dict[str, Any]] = []
    for question, answer in clip.turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if messages else [{"type": "video"}, text]})
        messages.append({"role": "assistant", "content": answer})
    row = {"id": name, "video": f"{name}.mp4", "messages": messages}
    return row if clip.kind is None else {**row, "kind": clip.kind}


def encode_clip(frames: np.ndarray, fps: Fraction | int = FPS, **x264: str) -> bytes:
    """Encode frames, uint8 (frames, height, width, 3), as an H.264 .mp4; the same frames give the same bytes."""
    # With threads or B-frames, x264 is not always deterministic.
    options = {"crf": "18", "preset": "veryfast", "threads": "1", "bf": "0", **x264}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
