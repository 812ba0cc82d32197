"""Which library decodes: right frames first, then CPU time and bytes read.

    python -m benchmarks.decoders --json

Each backend of `data.decoder` is asked for 16 frames of each kind of file (H.264 with B-frames, 640x360, half a minute
at 10 frames/s, grain over numbers that are read back from the decoded frames):

`right`: frames that are the ones on screen at the wanted moments / such frames that the file holds; `wrong`: others.
`cpu_over_pyav`: CPU time over PyAV's, one thread, in turns, median of the rounds' ratios; only where both are right,
    and give as many.
`read_over_size`: bytes asked of the file / its size.

A backend that does not load here is named and left out.
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
from crosslmm.data.video.decode_pool import BACKENDS, Decoder, Unreadable, require_backend
from tests.corrupt import zoo

FRAMES, SIDE, SIZE = 16, 384, (640, 360)
SECONDS = 30
NAMES = ("pyav", "decord", "torchcodec")


@dataclass(frozen=True)
class Kind:
    """A file, and what is to be seen in it.

    Attributes:
        content: its bytes.
        times: when its frames appear [s], those apart that were cut off; the first of them reads `first`.
        ends: when the video ends [s]. Several, all of them right: where the file leaves open how long its last frame
            lasts, and where a cut one's frames may be spread over what it was or over what is left.
        turns: quarters by which a decoded frame must be turned back for reading.
    """

    content: bytes
    times: np.ndarray
    ends: tuple[float, ...]
    first: int = 0
    turns: int = 0

    def expected(self, end: float) -> list[int]:
        """Numbers on screen in the middles of equal parts of [0, end), as far as the file goes."""
        moments = (np.arange(FRAMES) + 0.5) * end / FRAMES + 1e-6
        shown = np.searchsorted(self.times, moments[moments < max(self.times) + 1 / zoo.FPS], side="right") - 1
        return [int(number) for number in self.first + np.unique(shown)]

    def seen(self, found: np.ndarray) -> list[int | None]:
        """Numbers in decoded frames (frames, side, side, 3)."""
        return [zoo.read(frame) for frame in np.rot90(found, self.turns, axes=(1, 2))]


def grainy(number: int, width: int, height: int) -> np.ndarray:
    """A numbered frame with moving grain, as costly to decode as a real one: uint8 (height, width, 3)."""
    x, y = number * 5 % 64, number * 3 % 64
    image = zoo.draw(number, width, height) + GRAIN[y : y + height, x : x + width]
    return image.clip(0, 255).astype(np.uint8)


GRAIN = np.random.default_rng(0).integers(-30, 30, (112, 176, 3)).repeat(4, 0).repeat(4, 1)


def make_kinds() -> dict[str, Kind]:
    """The files, by name."""
    even = np.arange(SECONDS * zoo.FPS) / zoo.FPS
    uneven = np.cumsum(np.tile([0.1, 0.3, 0.05, 0.15, 0.05, 0.05, 0.2, 0.1], SECONDS)) - 0.1
    make = partial(zoo.video, frames=len(even), size=SIZE, picture=grainy, preset="veryfast", crf="23")
    # No keyframes but the regular ones.
    short, long = (make(g=str(gop), sc_threshold="0", container={"movflags": "faststart"}) for gop in (10, 75))
    varied = make(frames=len(uneven), times=uneven, g="10", sc_threshold="0")
    with av.open(io.BytesIO(short)) as container:
        frame = container.streams.video[0].index_entries[240]
        cut = short[: frame.pos + frame.size // 2]
    whole = (float(SECONDS),)
    return {
        "long groups (8 keyframes a minute)": Kind(long, even, whole),
        "short groups (60)": Kind(short, even, whole),
        "edit list from a keyframe": Kind(zoo.edited(short, 100, 200), even[:200], (20.0,), first=100),
        "edit list between keyframes": Kind(zoo.edited(short, 103, 197), even[:197], (19.7,), first=103),
        "variable frame rate": Kind(varied, uneven, (uneven[-1] + 0.1, uneven[-1] + 0.05)),
        "a quarter turned": Kind(zoo.turned(short, (0, 1, -1, 0)), even, whole, turns=1),
        "cut after 80 % of its frames": Kind(cut, even[:240], (*whole, 24.0, 24.1)),
        "transport stream": Kind(make("mpegts", g="10", sc_threshold="0"), even, whole),
    }


class Counted(io.FileIO):
    """A file that counts the bytes that are read of it."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        """As any file."""
        piece = super().read(-1 if size is None else size) or b""
        self.count += len(piece)
        return piece


def run(backend: str, path: Path, read: dict[str, int]) -> None:
    """Decode in this process; notes the bytes read."""
    with Counted(str(path)) as file:
        form = "mpegts" if file.read(1) == b"G" else "mov"
        file.seek(0)
        file.count = 0
        BACKENDS[backend](file, form, DataConfig(num_frames=FRAMES), SIDE)
        read[backend] = file.count


def main() -> None:
    """Measure and print."""
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
    table = Table("file", "decoder", "right", "wrong", "CPU s", "over PyAV", "read / size", "says", title="decoders")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        decoders = {name: stack.enter_context(in_a_child(name)) for name in loaded}
        for kind_name, kind in make_kinds().items():
            path = Path(folder) / "clip.mp4"
            path.write_bytes(kind.content)
            found = {name: decoder([str(path)])[0] for name, decoder in decoders.items()}
            judged = {name: judge(kind, one) for name, one in found.items()}
            good = [name for name, (right, wrong, wanted) in judged.items() if right == wanted and not wrong]
            read: dict[str, int] = {}
            arms = {name: partial(cpu_s, partial(run, name, path, read)) for name in good}
            measured = in_turns(arguments.rounds, **arms)
            detail[kind_name] = {name: statistics.median(values) for name, values in measured.items()}
            for name in loaded:
                right, wrong, wanted = judged[name]
                row = [f"{right} of {wanted}", f"{wrong}"]
                key = f"{name}/{kind_name}"
                figures |= {f"{key}/right": right / wanted, f"{key}/wrong": wrong}
                if name in good:
                    same = judged[name] == judged["pyav"]
                    over = median_ratio(measured, name, "pyav") if same else None
                    share = read[name] / len(kind.content)
                    row += [f"{detail[kind_name][name]:.2f}", f"{over:.2f}" if over else "", f"{share:.2f}"]
                    figures |= {f"{key}/read_over_size": share} | ({f"{key}/cpu_over_pyav": over} if over else {})
                elif isinstance(one := found[name], Unreadable):
                    row += ["", "", "", one.reason[-60:]]
                table.add_row(kind_name if name == loaded[0] else "", name, *row)
    for name, why in missing.items():
        table.add_row("", name, "", "", "", "", "", why)
    report("decoders", table, figures, detail, arguments.json)


def judge(kind: Kind, found: np.ndarray | Unreadable) -> tuple[int, int, int]:
    """Right frames, wrong ones, and how many there should be, for the end that fits best."""
    seen = [] if isinstance(found, Unreadable) else kind.seen(found)
    expected = max((kind.expected(end) for end in kind.ends), key=lambda numbers: len(set(numbers) & set(seen)))
    right = len(set(expected) & set(seen))
    return right, len(seen) - right, len(expected)


def in_a_child(backend: str) -> Decoder:
    """A decoder that may spin or crash."""
    return Decoder(DataConfig(num_frames=FRAMES, decoder=backend, decode_timeout_s=5), SIDE)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
