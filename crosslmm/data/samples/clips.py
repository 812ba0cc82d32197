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
    kinds: list[str] | None = None
    """Category of each turn, which is then asked alone, in a row of its own."""
    fps: Fraction | int = FPS
    """Frame rate [1/s]."""


def write_split(folder: str, split: str, clips: Iterator[Clip], **x264: str) -> None:
    """Write `{split}/00000.mp4`, ... and, last, the manifest `{split}.jsonl` into `folder` (a path or an `s3://` URI).

    `x264` overrides options of the encoder, such as crf="12".
    """
    rows: list[dict[str, Any]] = []
    written = 0
    # x264 releases the interpreter lock, so two threads take half the time.
    with ThreadPoolExecutor(2) as threads:
        while batch := list(itertools.islice(clips, 256)):
            files = threads.map(lambda clip: encode_clip(clip.frames, clip.fps, **x264), batch)
            for clip, file in zip(batch, files, strict=True):
                name = f"{split}/{written:05d}"
                storage.write_bytes(storage.join(folder, f"{name}.mp4"), file)
                rows += _rows(name, clip)
                written += 1
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(storage.join(folder, f"{split}.jsonl"), lines.encode())


def _rows(name: str, clip: Clip) -> list[dict[str, Any]]:
    """Return the rows of the manifest about a clip."""
    if clip.kinds is None:
        return [_row(name, name, clip.turns)]
    ids = [name] if len(clip.turns) == 1 else [f"{name}-{i}" for i in range(len(clip.turns))]
    of_turns = zip(ids, clip.turns, clip.kinds, strict=True)
    return [{**_row(row_id, name, [turn]), "kind": kind} for row_id, turn, kind in of_turns]


def _row(row_id: str, name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if messages else [{"type": "video"}, text]})
        messages.append({"role": "assistant", "content": answer})
    return {"id": row_id, "video": f"{name}.mp4", "messages": messages}


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
