"""Generated clips -> H.264 files and the manifest that names them. The same clips give the same bytes."""

import io
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from crosslmm import storage

FPS = 4


@dataclass(frozen=True)
class Clip:
    """A generated video and what is asked about it."""

    frames: np.ndarray
    """uint8 (frames, height, width, 3), RGB."""
    asked: list[tuple[str, str]]
    """Questions with their answers, one turn of the conversation each."""
    kind: str | None = None
    """What sort of question it is, where a clip asks just one."""


def write_split(folder: str, split: str, clips: Iterator[Clip], **x264: str) -> None:
    """Write `{split}/00000.mp4`, ... and, last, the manifest `{split}.jsonl` into `folder` (a path or an `s3://` URI).

    `x264` overrides the options of the encoder.
    """
    rows: list[dict[str, Any]] = []
    # x264 lets go of the interpreter, so two threads encode in half of the time.
    with ThreadPoolExecutor(2) as threads:
        while part := list(itertools.islice(clips, 256)):
            new = [_row(f"{split}/{len(rows) + i:05d}", clip) for i, clip in enumerate(part)]
            files = threads.map(lambda clip: encode_clip(clip.frames, **x264), part)
            for row, file in zip(new, files, strict=True):
                storage.write_bytes(storage.join(folder, row["video"]), file)
            rows += new
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    storage.write_bytes(storage.join(folder, f"{split}.jsonl"), lines.encode())


def _row(name: str, clip: Clip) -> dict[str, Any]:
    """One line of the manifest."""
    messages: list[dict[str, Any]] = []
    for question, answer in clip.asked:
        text = {"type": "text", "text": question}
        messages.append({"role": "user", "content": [text] if messages else [{"type": "video"}, text]})
        messages.append({"role": "assistant", "content": answer})
    row = {"id": name, "video": f"{name}.mp4", "messages": messages}
    return row if clip.kind is None else {**row, "kind": clip.kind}


def encode_clip(frames: np.ndarray, **x264: str) -> bytes:
    """uint8 (frames, height, width, 3) -> an H.264 .mp4; the same frames give the same bytes."""
    # With threads, or with B-frames, x264 gives the same frames other bytes now and then.
    options = {"crf": "18", "preset": "veryfast", "threads": "1", "bf": "0", **x264}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
