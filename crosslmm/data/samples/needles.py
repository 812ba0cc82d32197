"""The sample set of needles: clips of noise in which a frame or two have a coloured plate, and questions about them.

The same frames, in any number, are the haystack of jobs/needle.py. The same seed gives the same bytes.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from crosslmm.data.samples.clips import Clip, write_split
from crosslmm.data.samples.shapes import COLOURS

SIDE, FRAMES = 48, 8
"""Side of a frame of the sample set [px], and number of frames of a clip."""
NEEDLES = ("red", "green", "blue", "yellow")
"""Colours of plates."""
CELLS, PLATE = 6, 2
"""Cells of noise along a side of a frame, and those that a plate covers along its side."""
TINT, NOISE = (85, 165), 15
"""Range of the tint of a frame, and how far a cell may be from it, in each channel: no cell is as saturated as a plate,
but the mean of a frame says more about its tint than about a plate in it."""
MAX_HOPS = len(NEEDLES)


def haystack(seed: int, frames: Sequence[int], side: int) -> np.ndarray:
    """Generate frames of noise, uint8 (frames, side, side, 3); frame i depends on `seed` and i alone.

    Args:
        seed: of the video.
        frames: numbers of the frames.
        side: of a frame [px].
    """
    return _enlarged(np.stack([_cells(np.random.default_rng([seed, i])) for i in frames]), side)


def _cells(rng: np.random.Generator) -> np.ndarray:
    """Draw the noise of a frame, uint8 (CELLS, CELLS, 3)."""
    tint, noise = rng.integers(*TINT, 3), rng.integers(-NOISE, NOISE + 1, (CELLS, CELLS, 3))
    return (tint + noise).astype(np.uint8)


def insert(frame: np.ndarray, colour: str, rng: np.random.Generator) -> np.ndarray:
    """Return a frame, uint8 (side, side, 3), with a plate somewhere that covers a ninth of it."""
    side = len(frame)
    edges = np.arange(CELLS + 1) * side // CELLS
    y, x = rng.integers(CELLS - PLATE + 1, size=2)
    with_plate = frame.copy()
    with_plate[edges[y] : edges[y + PLATE], edges[x] : edges[x + PLATE]] = COLOURS[colour]
    return with_plate


def question(colours: Sequence[str]) -> tuple[str, str]:
    """Return the question about plates in this order, and its answer: as many hops as there are plates.

    >>> question(["red"]), question(["red", "blue", "green"])
    (('Which colour is it?', 'red'), ('Which colour is 2 after red?', 'green'))
    """
    if len(colours) == 1:
        return "Which colour is it?", colours[0]
    return f"Which colour is {len(colours) - 1} after {colours[0]}?", colours[-1]


def chance(hops: int) -> float:
    """Return the accuracy of guessing: one of the colours, and with several hops not the one that is named."""
    return 1 / (len(NEEDLES) - (hops > 1))


def write_needles(folder: str, train: int = 3000, held_out: int = 160, seed: int = 0) -> None:
    """Write clips and the manifests `train.jsonl` and `held_out.jsonl` into `folder` (a path or an `s3://` URI).

    The kind of a question is `1 hop` or `2 hops`.
    """
    for stream, (split, count) in enumerate({"train": train, "held_out": held_out}.items()):
        write_split(folder, split, _clips(np.random.default_rng([seed, stream]), count), crf="12")


def _clips(rng: np.random.Generator, count: int) -> Iterator[Clip]:
    for number in range(count):
        frames = haystack(int(rng.integers(2**31)), range(FRAMES), SIDE)
        colours = [str(colour) for colour in rng.choice(NEEDLES, 1 + number % 2, replace=False)]
        # Two frames a plate: of a clip's frames, a run may take every other one.
        places = np.sort(rng.choice(FRAMES // 2, len(colours), replace=False)) * 2
        for place, colour in zip(places, colours, strict=True):
            corner = rng.integers(2**31)
            for i in (place, place + 1):
                frames[i] = insert(frames[i], colour, np.random.default_rng(corner))
        yield Clip(frames, [question(colours)], [f"{len(colours)} hop{'s' * (len(colours) > 1)}"])


def _enlarged(cells: np.ndarray, side: int) -> np.ndarray:
    places = np.arange(side) * cells.shape[1] // side
    return cells[:, places][:, :, places]
