"""The sample set: short H.264 clips of shapes, with questions about colour, form, motion and order.

In a *motion* clip one shape crosses the frame; in a *sequence* clip three shapes appear one after another, without
moving. The same seed gives the same bytes.
"""

from collections.abc import Callable, Iterator

import numpy as np

from crosslmm import storage
from crosslmm.data.samples.clips import Clip, write_split

SIDE, FRAMES = 64, 8
"""Side of a frame [px], and number of frames of a clip."""
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
CHANCE = {"colour": 1 / 6, "shape": 1 / 4, "direction": 1 / 4, "first": 1 / 3}
"""Accuracy of guessing; for `first`: one of the three colours in the clip."""

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
SHAPES: dict[str, Inside] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: (abs(x) <= 1) & (abs(y) <= 1),
    "triangle": lambda x, y: (abs(x) <= (y + 1) / 2) & (y <= 1),
    "cross": lambda x, y: (abs(x) <= 0.22) & (abs(y) <= 1) | (abs(y) <= 0.22) & (abs(x) <= 1),
}


def sample_manifests(folder: str) -> dict[str, str]:
    """Write the sample set into `folder`, unless it is complete, and return its manifests by their keys in `data`."""
    manifests = {
        "manifest": storage.join(folder, "train.jsonl"),
        "validation_manifest": storage.join(folder, "held_out.jsonl"),
    }
    # Manifests are written last, so a folder that has both is complete.
    if not all(storage.exists(uri) for uri in manifests.values()):
        write_sample_set(folder)
    return manifests


def write_sample_set(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    A training clip has all its questions in one conversation, in random order. A held-out clip has one question; each
    kind has the same number of clips. The two splits use separate random streams.
    """
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        write_split(folder, split, _clips(np.random.default_rng([seed, stream]), count, one_each=split == "held_out"))


def _clips(rng: np.random.Generator, count: int, one_each: bool) -> Iterator[Clip]:
    """Draw clips. With `one_each` each clip has one question, and the kinds alternate."""
    for i in range(count):
        if i % 4 == 3:
            colours = [str(c) for c in rng.choice(list(COLOURS), 3, replace=False)]
            kinds, answers = ["first"], {"first": colours[0]}
            frames = _sequence(rng, colours)
        else:
            colour, shape, direction = (str(rng.choice(list(d))) for d in (COLOURS, SHAPES, DIRECTIONS))
            kinds = [str(k) for k in rng.permutation(["colour", "shape", "direction"])]
            answers = {"colour": colour, "shape": shape, "direction": direction}
            frames = motion(rng, colour, shape, direction)
        kind = list(QUESTIONS)[i % len(QUESTIONS)] if one_each else None
        yield Clip(frames, [(QUESTIONS[k], answers[k]) for k in ([kind] if kind else kinds)], [kind] if kind else None)


def motion(rng: np.random.Generator, colour: str, shape: str, direction: str) -> np.ndarray:
    """Draw one shape that crosses the middle of the frame at constant speed."""
    background, size, speed = rng.uniform(115, 135), rng.uniform(13, 14), rng.uniform(4.6, 4.9)
    step = np.array(DIRECTIONS[direction])
    middle = SIDE / 2 + rng.uniform(-1.5, 1.5, 2) * (1 - abs(step))
    centres = [middle + step * speed * (t - (FRAMES - 1) / 2) for t in range(FRAMES)]
    return np.stack([draw(background, colour, shape, centre, size) for centre in centres])


def _sequence(rng: np.random.Generator, colours: list[str]) -> np.ndarray:
    """Draw one static shape after the other, each for a third of the clip."""
    background = rng.uniform(115, 135)
    objects = [
        (colour, str(rng.choice(list(SHAPES))), SIDE / 2 + rng.uniform(-6, 6, 2), rng.uniform(13, 14))
        for colour in colours
    ]
    return np.stack([draw(background, *objects[t * len(objects) // FRAMES]) for t in range(FRAMES)])


def draw(background: float, colour: str, shape: str, centre: np.ndarray, size: float) -> np.ndarray:
    """Draw a shape of half-width `size` [px] at `centre` on a grey background: uint8 (SIDE, SIDE, 3)."""
    frame = np.full((SIDE, SIDE, 3), background, dtype=np.uint8)
    y, x = np.ogrid[:SIDE, :SIDE]
    frame[SHAPES[shape]((x - centre[0]) / size, (y - centre[1]) / size)] = COLOURS[colour]
    return frame
