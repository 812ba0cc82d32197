"""The sample set for time: a shape flashes up once in clips of several lengths, and the question is when.

All clips have as many frames, and these are shown for one, two or three seconds each: which frame has the shape does
not tell when it is there. The same seed gives the same bytes.
"""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from crosslmm.data.samples.clips import Clip, write_split
from crosslmm.data.samples.shapes import COLOURS, SHAPES, SIDE, draw

FRAMES = 4
"""Number of frames of a clip."""
FRAME_S = (1, 2, 3)
"""How long each frame of a clip is shown; the frame rates of the clips follow [s]."""
CHANCE = 1 / len(FRAME_S)
"""Accuracy of a model that knows in which frame the shape is, and guesses how long frames are shown."""
QUESTION = "When is the shape there?"


def write_moments(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    The answer to the question is the second at which the shape appears: "6".
    """
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        write_split(folder, split, _clips(np.random.default_rng([seed, stream]), count))


def _clips(rng: np.random.Generator, count: int) -> Iterator[Clip]:
    for i in range(count):
        # Never the first frame, whose time is 0 in any clip.
        seconds, shown = FRAME_S[i % len(FRAME_S)], int(rng.integers(1, FRAMES))
        frames = np.full((FRAMES, SIDE, SIDE, 3), background := rng.uniform(115, 135), dtype=np.uint8)
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(list(SHAPES)))
        centre, size = SIDE / 2 + rng.uniform(-6, 6, 2), rng.uniform(13, 14)
        frames[shown] = draw(background, colour, shape, centre, size)
        yield Clip(frames, [(QUESTION, str(shown * seconds))], ["when"], Fraction(1, seconds))
