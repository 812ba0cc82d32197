"""Compare video decoders: correct frames first, then CPU time and bytes read.

    python -m benchmarks.decoders --json

Each backend of `data.decoder` decodes 16 frames of each kind of file (H.264 with B-frames, 640x360, half a minute at
10 frames/s; each frame shows its number, under grain, which is read back from the decoded frame):

`right`: decoded frames that are on screen at the requested times / such frames in the file; `wrong`: all others.
`cpu_over_pyav`: CPU time over that of PyAV, one thread, alternating, median of the ratios; only if both are right
    and return equally many frames.
`read_over_size`: bytes read from the file / its size.

A backend that cannot be loaded is reported and skipped.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.table import Table

from benchmarks import report
from benchmarks.data import cpu_s, in_turns, median_ratio
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.video.decode import BACKENDS, VideoFailure, require_backend
from crosslmm.data.video.decode_pool import Decoder
from tests.support import zoo

FRAMES, SIDE, SIZE = 16, 384, (640, 360)
SECONDS = 30
NAMES = ("pyav", "decord", "torchcodec")


@dataclass(frozen=True)
class Kind:
    """A test file and the frames it shows.

    Attributes:
        content: its bytes.
        times: when its frames appear [s], without truncated ones; the first one shows the number `first`.
        ends: when the video ends [s]. Several if all are correct: the file does not say how long its last frame lasts,
            or it is truncated and frames may be sampled over its original or its remaining length.
        turns: quarter turns that bring a decoded frame upright.
    """

    content: bytes
    times: np.ndarray
    ends: tuple[float, ...]
    first: int = 0
    turns: int = 0

    def expected(self, end: float) -> list[int]:
        """Return the numbers on screen in the middle of equal parts of [0, end), up to the last frame of the file."""
        moments = (np.arange(FRAMES) + 0.5) * end / FRAMES + 1e-6
        shown = np.searchsorted(self.times, moments[moments < max(self.times) + 1 / zoo.FPS], side="right") - 1
        return [int(number) for number in self.first + np.unique(shown)]

    def numbers(self, frames: np.ndarray) -> list[int | None]:
        """Read the numbers shown in decoded frames, uint8 (frames, side, side, 3)."""
        return [zoo.read_number(frame) for frame in np.rot90(frames, self.turns, axes=(1, 2))]


def grainy(number: int, width: int, height: int) -> np.ndarray:
    """Draw a numbered frame with moving grain, as expensive to decode as a real one: uint8 (height, width, 3)."""
    x, y = number * 5 % 64, number * 3 % 64
    image = zoo.draw(number, width, height) + GRAIN[y : y + height, x : x + width]
    return image.clip(0, 255).astype(np.uint8)


GRAIN = np.random.default_rng(0).integers(-30, 30, (112, 176, 3)).repeat(4, 0).repeat(4, 1)


def make_kinds() -> dict[str, Kind]:
    """Return the test files by name."""
    even = np.arange(SECONDS * zoo.FPS) / zoo.FPS
    uneven = np.cumsum(np.tile([0.1, 0.3, 0.05, 0.15, 0.05, 0.05, 0.2, 0.1], SECONDS)) - 0.1
    make = partial(zoo.video, frames=len(even), size=SIZE, picture=grainy, preset="veryfast", crf="23")
    # Only regular keyframes.
    short, long = (make(g=str(gop), sc_threshold="0", container={"movflags": "faststart"}) for gop in (10, 75))
    varied = make(frames=len(uneven), times=uneven, g="10", sc_threshold="0")
    with av.open(io.BytesIO(short)) as container:
        frame = container.streams.video[0].index_entries[240]
        cut = short[: frame.pos + frame.size // 2]
    full = (float(SECONDS),)
    return {
        "long groups (8 keyframes a minute)": Kind(long, even, full),
        "short groups (60)": Kind(short, even, full),
        "edit list from a keyframe": Kind(zoo.with_edit_list(short, 100, 200), even[:200], (20.0,), first=100),
        "edit list between keyframes": Kind(zoo.with_edit_list(short, 103, 197), even[:197], (19.7,), first=103),
        "variable frame rate": Kind(varied, uneven, (uneven[-1] + 0.1, uneven[-1] + 0.05)),
        "a quarter turned": Kind(zoo.with_rotation(short, (0, 1, -1, 0)), even, full, turns=1),
        "cut after 80 % of its frames": Kind(cut, even[:240], (*full, 24.0, 24.1)),
        "transport stream": Kind(make("mpegts", g="10", sc_threshold="0"), even, full),
    }


class Counted(io.FileIO):
    """A file that counts the bytes read from it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like any file, and count the bytes."""
        piece = super().read(-1 if size is None else size) or b""
        self.count += len(piece)
        return piece


def run(backend: str, path: Path, read: dict[str, int]) -> None:
    """Decode in this process; store the number of bytes read in `read`."""
    with Counted(str(path)) as file:
        form = "mpegts" if file.read(1) == b"G" else "mov"
        file.seek(0)
        file.count = 0
        BACKENDS[backend](file, form, DataConfig(num_frames=FRAMES), SIDE)
        read[backend] = file.count


def main() -> None:
    """Measure and print the comparison."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    loaded, missing = [], {}
    for name in NAMES:
        try:
            require_backend(name)
            loaded.append(name)
        except BadConfig as error:
            missing[name] = str(error)
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {"missing": missing, "frames": FRAMES, "side_px": SIDE}
    table = Table("file", "decoder", "right", "wrong", "CPU s", "over PyAV", "read / size", "error", title="decoders")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        decoders = {name: stack.enter_context(in_a_child(name)) for name in loaded}
        for kind_name, kind in make_kinds().items():
            path = Path(folder) / "clip.mp4"
            path.write_bytes(kind.content)
            results = {name: decoder([str(path)])[0] for name, decoder in decoders.items()}
            judged = {name: judge(kind, one) for name, one in results.items()}
            good = [name for name, (right, wrong, expected) in judged.items() if right == expected and not wrong]
            read: dict[str, int] = {}
            arms = {name: partial(cpu_s, partial(run, name, path, read)) for name in good}
            measured = in_turns(arguments.rounds, **arms)
            detail[kind_name] = {name: statistics.median(values) for name, values in measured.items()}
            for name in loaded:
                right, wrong, expected = judged[name]
                row = [f"{right} of {expected}", f"{wrong}"]
                key = f"{name}/{kind_name}"
                figures |= {f"{key}/right": right / expected, f"{key}/wrong": wrong}
                if name in good:
                    same = judged[name] == judged["pyav"]
                    over = median_ratio(measured, name, "pyav") if same else None
                    share = read[name] / len(kind.content)
                    row += [f"{detail[kind_name][name]:.2f}", f"{over:.2f}" if over else "", f"{share:.2f}"]
                    figures |= {f"{key}/read_over_size": share} | ({f"{key}/cpu_over_pyav": over} if over else {})
                elif isinstance(one := results[name], VideoFailure):
                    row += ["", "", "", one.reason[-60:]]
                table.add_row(kind_name if name == loaded[0] else "", name, *row)
    for name, why in missing.items():
        table.add_row("", name, "", "", "", "", "", why)
    report("decoders", table, figures, detail, arguments.json)


def judge(kind: Kind, result: SampledFrames | VideoFailure) -> tuple[int, int, int]:
    """Return the numbers of right, wrong and expected frames, for the end of the video that fits best."""
    numbers = [] if isinstance(result, VideoFailure) else kind.numbers(result.images)
    expected = max((kind.expected(end) for end in kind.ends), key=lambda shown: len(set(shown) & set(numbers)))
    right = len(set(expected) & set(numbers))
    return right, len(numbers) - right, len(expected)


def in_a_child(backend: str) -> Decoder:
    """Return a decoder that runs in a child process, since backends may hang or crash."""
    return Decoder(DataConfig(num_frames=FRAMES, decoder=backend, decode_timeout_s=5), SIDE)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
