"""Fine detail: real handwritten digits, small in the frame, each on screen for a moment, some late in the clip.

The digits are the 1,797 of scikit-learn's `load_digits`, 8 x 8 pixels each. The images of the held-out clips are drawn
apart from those of the training clips. The same seed gives the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from crosslmm.data.samples.clips import Clip, write_split
from crosslmm.data.samples.shapes import COLOURS, FRAMES, SIDE

PLATES = ("red", "green", "blue", "magenta")
"""Each clip shows one digit on a plate of each of these colours, and is asked about the first: the others distract."""
CHANCE = 1 / 10
SCALE = 2
"""A plate of 16 x 16 pixels covers a sixteenth of the frame."""
CELL, RASTER = 20, 4
"""Plates stand in 3 x 3 cells, so that none hides another, and on a raster in there [px]."""
SHOWN = 2
"""A plate is on screen for so many frames."""


QUESTION = f"Which digit is {PLATES[0]}?"


@dataclass(frozen=True)
class Digits:
    """Images of handwritten digits: float64 (n, 8, 8) from 0 to 1, and what they show, int64 (n,)."""

    images: np.ndarray
    names: np.ndarray


def load_digits(seed: int = 0) -> dict[str, Digits]:
    """The digits of either split, `train` (four in five) and `held_out`. Needs scikit-learn, of the `dev` extra."""
    from sklearn import datasets

    everything = datasets.load_digits()
    order = np.random.default_rng(seed).permutation(len(everything.images))
    held_out, train = np.split(order, [len(order) // 5])
    return {
        split: Digits(everything.images[chosen] / 16, everything.target[chosen])
        for split, chosen in {"train": train, "held_out": held_out}.items()
    }


def write_digits(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    A clip is of the kind `late digit` if only its last frames show what is asked for, or else `digit`.
    """
    digits = load_digits(seed)
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        clips = _clips(np.random.default_rng([seed, stream]), count, digits[split])
        write_split(folder, split, clips, crf="12")  # fine strokes


def _clips(rng: np.random.Generator, count: int, digits: Digits) -> Iterator[Clip]:
    for _ in range(count):
        frames = empty(rng, FRAMES)
        chosen = rng.choice(len(digits.names), len(PLATES), replace=False)
        begins = rng.integers(FRAMES - SHOWN + 1, size=len(PLATES))
        for colour, digit, first, (y, x) in zip(PLATES, chosen, begins, plate_corners(rng, len(PLATES)), strict=True):
            drawn = plate(digits.images[digit], colour)
            frames[first : first + SHOWN, y : y + len(drawn), x : x + len(drawn)] = drawn
        kind = "late digit" if begins[0] == FRAMES - SHOWN else "digit"
        yield Clip(frames, [(QUESTION, str(digits.names[chosen[0]]))], kind)


def empty(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Grey frames, uint8 (frames, SIDE, SIDE, 3)."""
    return np.full((frames, SIDE, SIDE, 3), rng.uniform(115, 135), dtype=np.uint8)


def plate_corners(rng: np.random.Generator, count: int) -> np.ndarray:
    """Upper left corners of up to nine plates that do not touch, int64 (count, 2) as y, x [px]."""
    cells = np.stack(np.divmod(rng.choice(9, count, replace=False), 3), axis=1)
    return cells * CELL + rng.integers(2, size=(count, 2)) * RASTER


def plate(image: np.ndarray, colour: str) -> np.ndarray:
    """White strokes on a ground of a dark colour -> uint8 (16, 16, 3)."""
    strokes = np.kron(image, np.ones((SCALE, SCALE)))[:, :, None]
    return (255 * strokes + 0.6 * np.array(COLOURS[colour]) * (1 - strokes)).astype(np.uint8)
