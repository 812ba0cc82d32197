"""The sample set: short H.264 clips of moving shapes, with questions that need colour, form, motion and order.

Two kinds of clip. In a *motion* clip one shape crosses the frame; in a *sequence* clip three shapes stand one after
another. The same seed gives the same bytes.
"""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np

from crosslmm import storage

SIDE, FRAMES, FPS = 64, 8, 4
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "magenta": (215, 60, 215),
    "white": (240, 240, 240),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
QUESTIONS = {
    "colour": "What colour is the shape?",
    "shape": "Which shape is it?",
    "direction": "Which way does it move?",
    "first": "Which colour came first?",
}
# What guessing gets: one of the colours, shapes or directions there are; one of the three colours that a clip shows.
CHANCE = {"colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4, "first": 1 / 3}

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Inside] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1),
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (abs(x) <= 0.22) & (abs(y) <= 1) | (abs(y) <= 0.22) & (abs(x) <= 1),
}


def sample_manifests(folder: str) -> dict[str, str]:
    """The sample set in `folder`, written if it is not there -> the manifests, by their names in the configuration."""
    manifests = {
        "manifest": storage.join(folder, "train.jsonl"),
        "validation_manifest": storage.join(folder, "held_out.jsonl"),
    }
    # The manifests are written last, so a folder that has both is whole.
    if not all(storage.exists(uri) for uri in manifests.values()):
        write_sample_set(folder)
    return manifests


def write_sample_set(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    A training clip's questions are asked in one conversation, in random order; a held-out clip is asked one question,
    the kinds in equal shares. Held-out clips are drawn apart from the training clips.

    """
    # x264 lets go of the interpreter, so two threads encode in half of the time.
    with ThreadPoolExecutor(2) as threads:
        for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
            rows: list[dict[str, Any]] = []
            clips = _clips(np.random.default_rng([seed, stream]), count)
            while part := list(itertools.islice(clips, 256)):
                videos = [f"{split}/{len(rows) + i:05d}.mp4" for i in range(len(part))]
                written = threads.map(
                    lambda video, clip: storage.write_bytes(storage.join(folder, video), encode_clip(clip[2])),
                    videos,
                    part,
                )
                rows += [_row(split, video, *clip[:2]) for video, clip, _ in zip(videos, part, written, strict=True)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_bytes(storage.join(folder, f"{split}.jsonl"), lines.encode())


def _row(split: str, video: str, kinds: list[str], answers: dict[str, str]) -> dict[str, Any]:
    """One line of the manifest. A held-out clip asks one of its questions, the kinds taking turns."""
    number = int(video[-9:-4])
    if split == "train":
        return {"id": video[:-4], "video": video, "messages": _conversation(kinds, answers)}
    kind = list(QUESTIONS)[number % len(QUESTIONS)]
    return {"id": video[:-4], "video": video, "messages": _conversation([kind], answers), "kind": kind}


def _clips(rng: np.random.Generator, count: int) -> Iterator[tuple[list[str], dict[str, str], np.ndarray]]:
    """Draw clips: the kinds of question in the order in which they are asked, all answers, the frames."""
    for i in range(count):
        if i % 4 == 3:
            colours = [str(c) for c in rng.choice(list(COLOURS), 3, replace=False)]
            yield ["first"], {"first": colours[0]}, _sequence(rng, colours)
        else:
            colour, shape, direction = (str(rng.choice(list(d))) for d in (COLOURS, SHAPES, DIRECTIONS))
            kinds = [str(k) for k in rng.permutation(["colour", "shape", "direction"])]
            answers = {"colour": colour, "shape": shape, "direction": direction}
            yield kinds, answers, _motion(rng, colour, shape, direction)


def _conversation(kinds: list[str], answers: dict[str, str]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for kind in kinds:
        text = {"type": "text", "text": QUESTIONS[kind]}
        messages.append({"role": "user", "content": [text] if messages else [{"type": "video"}, text]})
        messages.append({"role": "assistant", "content": answers[kind]})
    return messages


def _motion(rng: np.random.Generator, colour: str, shape: str, direction: str) -> np.ndarray:
    """One shape that crosses the middle of the frame at an even speed."""
    ground, size, speed = rng.uniform(115, 135), rng.uniform(13, 14), rng.uniform(4.6, 4.9)
    step = np.array(DIRECTIONS[direction])
    middle = SIDE / 2 + rng.uniform(-1.5, 1.5, 2) * (1 - abs(step))
    centres = [middle + step * speed * (t - (FRAMES - 1) / 2) for t in range(FRAMES)]
    return np.stack([_draw(ground, colour, shape, centre, size) for centre in centres])


def _sequence(rng: np.random.Generator, colours: list[str]) -> np.ndarray:
    """One standing shape after the other, each for a third of the clip."""
    ground = rng.uniform(115, 135)
    objects = [
        (colour, str(rng.choice(list(SHAPES))), SIDE / 2 + rng.uniform(-6, 6, 2), rng.uniform(13, 14))
        for colour in colours
    ]
    return np.stack([_draw(ground, *objects[t * len(objects) // FRAMES]) for t in range(FRAMES)])


def _draw(ground: float, colour: str, shape: str, centre: np.ndarray, size: float) -> np.ndarray:
    """A shape of half-width `size` pixels around `centre` on a grey ground -> uint8 (SIDE, SIDE, 3)."""
    frame = np.full((SIDE, SIDE, 3), ground, dtype=np.uint8)
    y, x = np.ogrid[:SIDE, :SIDE]
    frame[SHAPES[shape]((x - centre[0]) / size, (y - centre[1]) / size)] = COLOURS[colour]
    return frame


def encode_clip(frames: np.ndarray) -> bytes:
    """uint8 (frames, height, width, 3) -> an H.264 .mp4. One thread, so that the same frames give the same bytes."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20", "preset": "veryfast", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
