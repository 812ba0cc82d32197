"""The data path against the least that it could cost, and against what users run today.

    python -m benchmarks.data --json

(a) `decode_over_needed`: CPU time of `decode_video` / of libav decoding no frame but those that the wanted ones need.
(b) `pipeline_over_plain`: frames/s of the Ray Data pipeline after its first batch / of the same decoder in as many
    plain processes; `startup_s` is the time to that first batch.
(c) `bytes_over_needed`, `requests`: 32 frames of a 10-minute object over HTTP, counted on the wire.
(d) `bad5_over_clean`, `good_kept`: good samples/s with 5 % bad files / without, and the share of good ones delivered.
(e) `pipeline_over_dataloader`: frames/s of the pipeline / of a torch DataLoader with decord, after their first batch.

Arms take turns, three rounds at least; a figure is the median of the rounds' ratios.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from rich.table import Table

from benchmarks import report
from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import sampling
from crosslmm.data.decode import Unreadable, decode_video
from tests.object_store import running_object_store
from tests.wire import Wire

FRAMES, SIDE, FPS = 32, 384, 30
LIMITS = {"decode_over_needed": "<= 1.3", "pipeline_over_plain": ">= 0.9", "bytes_over_needed": "<= 1.5",
          "bad5_over_clean": ">= 0.9", "good_kept": "= 1"}  # fmt: skip


def write_clip(path: Path, seconds: int, gop: int, size: tuple[int, int] = (640, 360)) -> None:
    """An H.264 .mp4 with B-frames, a fixed distance between keyframes and a moving, grainy picture."""
    width, height = size
    texture = np.random.default_rng(0).integers(0, 255, (height // 4 + 64, width // 4 + 64, 3), dtype=np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    options = {"g": str(gop), "keyint_min": str(gop), "sc_threshold": "0", "preset": "veryfast", "crf": "23"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={**options, "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(seconds * FPS):
            x, y = (int(v) for v in 100 + 100 * np.array([np.cos(number / 40), np.sin(number / 55)]))
            image = np.ascontiguousarray(texture[y : y + height, x : x + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def repeat_clip(source: Path, target: Path, times: int) -> None:
    """The clip several times over, its packets copied."""
    with av.open(str(target), "w", options={"movflags": "faststart"}) as output:
        made = None
        for turn in range(times):
            with av.open(str(source)) as container:
                stream: Any = container.streams.video[0]
                made = made or output.add_stream_from_template(stream)
                packet: Any
                for packet in container.demux(stream):
                    if packet.dts is not None:
                        packet.pts += turn * stream.duration
                        packet.dts += turn * stream.duration
                        packet.stream = made
                        output.mux(packet)


class Needed:
    """What the wanted frames of an .mp4 need, found by reading all of its packets: the reference, apart from our code.

    Attributes:
        groups: for each group of pictures with wanted frames: its keyframe's pts, its needed packets, the wanted pts.
        bytes: of these packets, and of all that is no frame.
    """

    def __init__(self, path: Path, count: int) -> None:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            packets: list[Any] = [p for p in container.demux(stream) if p.size]
            wanted = sampling.uniform(float(stream.duration * stream.time_base), count) / float(stream.time_base)
        shown = np.sort([p.pts for p in packets])
        wanted_pts = np.unique(shown[np.searchsorted(shown, wanted, side="right") - 1])
        place = {p.pts: i for i, p in enumerate(packets)}
        keys = [i for i, p in enumerate(packets) if p.is_keyframe]
        groups: dict[int, list[int]] = {}
        for pts in wanted_pts:
            key = max(k for k in keys if packets[k].pts <= pts)
            groups.setdefault(key, []).append(int(pts))
        self.groups, self.bytes = [], path.stat().st_size - sum(p.size for p in packets)
        for key, moments in groups.items():
            last = max(place[pts] for pts in moments)
            self.groups.append((packets[key].pts, last - key + 1, set(moments)))
            self.bytes += sum(p.size for p in packets[key : last + 1])

    def decode(self, path: Path) -> np.ndarray:
        """Decode these packets and nothing else, one thread."""
        images, resize = [], VideoReformatter()
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for pts, count, wanted in self.groups:
                container.seek(pts, stream=stream)
                frames = []
                for _, packet in zip(range(count), container.demux(stream), strict=False):
                    frames += packet.decode()
                frames += stream.codec_context.decode(None)
                for frame in frames:
                    if frame.pts in wanted:
                        images.append(resize.reformat(frame, SIDE, SIDE, format="rgb24").to_ndarray())
        return np.stack(images)


def in_turns(rounds: int, **arms: Callable[[], float]) -> dict[str, list[float]]:
    """Measure each arm once a round, one after the other, the order turning."""
    measured: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            measured[name].append(arms[name]())
    return measured


def median_ratio(measured: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(measured[over], measured[under], strict=True))


def assert_same(ours: np.ndarray | Unreadable, theirs: np.ndarray) -> None:
    """Two arms that see different frames have nothing to compare."""
    assert isinstance(ours, np.ndarray), ours
    assert np.array_equal(ours, theirs), "the arms see different frames"


def cpu_s(work: Callable[[], Any]) -> float:
    """CPU time of this process [s]: other work on the machine is not counted."""
    began = time.process_time()
    work()
    return time.process_time() - began


def decoding(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """(a), for long and short groups of pictures; the figure is the worse of the two."""
    data, detail = DataConfig(num_frames=FRAMES), {}
    for name, gop in (("long", 225), ("short", 30)):
        path = folder / f"{name}.mp4"
        write_clip(path, 60, gop)
        needed = Needed(path, FRAMES)
        ours = functools.partial(decode_video, str(path), data, SIDE)
        least = functools.partial(needed.decode, path)
        assert_same(ours(), least())
        measured = in_turns(rounds, ours=lambda a=ours: cpu_s(a), needed=lambda a=least: cpu_s(a))  # type: ignore[misc]
        detail[f"{name}_gop"] = {
            "keyframes": 60 * FPS // gop,
            "ratio": median_ratio(measured, "ours", "needed"),
            "ours_cpu_s": statistics.median(measured["ours"]),
            "needed_cpu_s": statistics.median(measured["needed"]),
        }
    return {"decode_over_needed": max(d["ratio"] for d in detail.values())}, detail


def over_http(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """(c). Counted on the wire, headers included, by a relay in front of the store; it is the same in every round."""
    minute, whole = folder / "minute.mp4", folder / "ten_minutes.mp4"
    write_clip(minute, 60, 60, size=(960, 540))
    repeat_clip(minute, whole, 10)
    needed = Needed(whole, FRAMES)
    root = Path(__file__).parent.parent
    with (
        running_object_store(folder / "swift", venv=root / ".cache" / "swift-venv") as store,
        Wire(int(store.endpoint.rsplit(":", 1)[1])) as wire,
    ):
        store.make_bucket("videos")
        os.environ.update(store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}"})
        storage.write_bytes("s3://videos/ten_minutes.mp4", whole.read_bytes())
        data, counted = DataConfig(num_frames=FRAMES), []
        for _ in range(3):
            before = wire.received, wire.requests
            began = time.perf_counter()
            ours = decode_video("s3://videos/ten_minutes.mp4", data, SIDE)
            wall_s = time.perf_counter() - began
            counted.append((wire.received - before[0], wire.requests - before[1], wall_s))
    assert_same(ours, needed.decode(whole))
    received, requests, wall_s = (statistics.median(values) for values in zip(*counted, strict=True))
    figures = {"bytes_over_needed": received / needed.bytes, "requests": requests}
    return figures, {
        "object_mb": whole.stat().st_size / 1e6,
        "needed_mb": needed.bytes / 1e6,
        "received_mb": received / 1e6,
        "wall_s": wall_s,
    }


def main() -> None:
    """Measure the points asked for and print each figure beside its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--points", default="ac", help="which of the points, such as ac")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points: dict[str, Callable[[], tuple[dict[str, float], dict[str, Any]]]] = {
            "a": lambda: decoding(folder, arguments.rounds),
            "c": lambda: over_http(folder),
        }
        for point in arguments.points:
            found, detail[point] = points[point]()
            figures |= found
    table = Table("figure", "measured", "limit", title="data path")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.3f}", LIMITS.get(figure, ""))
    report("data", table, figures, detail, arguments.json)


if __name__ == "__main__":
    main()
