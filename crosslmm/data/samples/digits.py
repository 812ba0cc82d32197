"""The sample set for fine detail: small handwritten digits, each on screen for a moment, some at the end of the clip.

The digits are the 1,797 of scikit-learn's `load_digits`, 8 x 8 pixels each. Training clips and held-out clips share no
image. The same seed gives the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crosslmm.data.samples.clips import Clip, write_split
from crosslmm.data.samples.shapes import COLOURS, FRAMES, SIDE

PLATES = ("red", "green", "blue", "magenta")
"""Colours of the plates of a clip, one digit each; the question is about the first, the others distract."""
CHANCE = 1 / 10
"""Accuracy of guessing."""
SCALE = 2
"""Enlargement of a digit; its plate of 16 x 16 pixels covers a sixteenth of the frame."""
CELL, RASTER = 20, 4
"""Size of each of the 3 x 3 cells, which keep plates from overlapping, and of the raster within a cell [px]."""
PLATE_FRAMES = 2
"""Time that a plate is on screen [frames]."""

QUESTION = f"Which digit is {PLATES[0]}?"


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits with their labels."""

    images: np.ndarray
    """float64 (n, 8, 8), from 0 to 1."""
    labels: np.ndarray
    """int64 (n,), from 0 to 9."""


def load_digits(seed: int = 0) -> dict[str, Digits]:
    """Load the digits of the splits `train` (four in five) and `held_out`. Needs scikit-learn, from the `dev` extra."""
    from sklearn import datasets

    dataset = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(dataset.images))
    held_out, train = np.split(order, [len(order) // 5])
    return {
        split: Digits(dataset.images[chosen] / 16, dataset.target[chosen])
        for split, chosen in {"train": train, "held_out": held_out}.items()
    }


def write_digits(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    The kind of a clip is `late digit` if the digit in question is in its last frames only, else `digit`.
    """
    digits = load_digits(seed)
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        clips = _clips(np.random.default_rng([seed, stream]), count, digits[split])
        write_split(folder, split, clips, crf="12")  # a higher value blurs the strokes


def _clips(rng: np.random.Generator, count: int, digits: Digits) -> Iterator[Clip]:
    for _ in range(count):
        frames = empty(rng, FRAMES)
        chosen = rng.choice(len(digits.labels), len(PLATES), replace=False)
        begins = rng.integers(FRAMES - PLATE_FRAMES + 1, size=len(PLATES))
        for colour, digit, first, (y, x) in zip(PLATES, chosen, begins, plate_corners(rng, len(PLATES)), strict=True):
            drawn = plate(digits.images[digit], colour)
            frames[first : first + PLATE_FRAMES, y : y + len(drawn), x : x + len(drawn)] = drawn
        kind = "late digit" if begins[0] == FRAMES - PLATE_FRAMES else "digit"
        yield Clip(frames, [(QUESTION, str(digits.labels[chosen[0]]))], [kind])


def empty(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Return grey frames, uint8 (frames, SIDE, SIDE, 3)."""
    return np.full((frames, SIDE, SIDE, 3), rng.uniform(115, 135), dtype=np.uint8)


def plate_corners(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw the upper left corners of up to nine plates that do not touch: int64 (count, 2) as y, x [px]."""
    cells = np.stack(np.divmod(rng.choice(9, count, replace=False), 3), axis=1)
    return cells * CELL + rng.integers(2, size=(count, 2)) * RASTER


def plate(image: np.ndarray, colour: str) -> np.ndarray:
    """Draw a digit, float64 (8, 8), in white on a plate of a dark colour: uint8 (16, 16, 3)."""
    strokes = np.kron(image, np.ones((SCALE, SCALE)))[:, :, None]
    return (255 * strokes + 0.6 * np.array(COLOURS[colour]) * (1 - strokes)).astype(np.uint8)
