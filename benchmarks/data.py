"""Costs of the data path, compared with the minimum that is possible and with what users run today.

    python -m benchmarks.data --json

(a) `decode_over_needed`: CPU time of `decode_video` / of libav decoding just the frames that the wanted ones depend on.
(b) `pipeline_over_plain`: frames/s of the Ray Data pipeline after its first batch / of the same decoder in as many
    plain processes; `startup_s` is the time until that first batch.
(c) `bytes_over_needed`, `requests`: bytes received / needed for 32 frames of a 10-minute object over HTTP.
(d) `bad5_over_clean`: readable samples/s with 5 % unreadable files / without; `good_kept`: share of readable files
    that were delivered.
(e) `pipeline_over_dataloader`: frames/s of the pipeline / of a torch DataLoader with decord, after their first batch.
(f) `memory_growth_mib`: resident memory of a decoder, its child included, from a child's 100th clip to its 990th, the
    worse of two children (they are replaced after 1,000); `memory_100_mib`, `memory_1990_mib`: after 100 and 1,990.

The variants alternate, for at least three rounds; a figure is the median of the rounds' ratios.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import ray
import torch
from av.video.reformatter import VideoReformatter
from rich.table import Table

from benchmarks import report
from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import frame_sampling
from crosslmm.data.dataset import BlockLayout, build_dataset, rows_per_block, unpack_block
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.manifest import Manifest, Rows
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.video.decode import VideoFailure, decode_video
from crosslmm.data.video.decode_pool import Decoder
from tests.support.object_store import running_object_store
from tests.support.wire import Wire

FRAMES, SIDE, FPS = 32, 384, 30
SAMPLES, PROCESSES = 40, 2
LIMITS = {"decode_over_needed": "<= 1.3", "pipeline_over_plain": ">= 0.9", "bytes_over_needed": "<= 1.5",
          "bad5_over_clean": ">= 0.9", "good_kept": "= 1", "memory_growth_mib": "<= 32"}  # fmt: skip


def write_clip(path: Path, seconds: int, gop: int, size: tuple[int, int] = (640, 360)) -> None:
    """Write an H.264 .mp4 with B-frames, a keyframe every `gop` frames, and a moving, grainy picture."""
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
    """Write the clip `times` times in a row, copying its packets."""
    with av.open(str(target), "w", options={"movflags": "faststart"}) as output:
        output_stream = None
        for repetition in range(times):
            with av.open(str(source)) as container:
                stream: Any = container.streams.video[0]
                output_stream = output_stream or output.add_stream_from_template(stream)
                packet: Any
                for packet in container.demux(stream):
                    if packet.dts is not None:
                        packet.pts += repetition * stream.duration
                        packet.dts += repetition * stream.duration
                        packet.stream = output_stream
                        output.mux(packet)


class Needed:
    """The packets that the wanted frames of an .mp4 depend on: the reference, independent of the product's code.

    Attributes:
        groups: (pts of the keyframe, number of needed packets, wanted pts) of each group of pictures that has some.
        bytes: size of these packets and of everything in the file that is not a frame [bytes].
    """

    def __init__(self, path: Path, count: int) -> None:
        with av.open(str(path)) as container:
            stream: Any = container.streams.video[0]
            packets: list[Any] = [p for p in container.demux(stream) if p.size]
            wanted = frame_sampling.uniform(float(stream.duration * stream.time_base), count) / float(stream.time_base)
        all_pts = np.sort([p.pts for p in packets])
        wanted_pts = np.unique(all_pts[np.searchsorted(all_pts, wanted, side="right") - 1])
        index = {p.pts: i for i, p in enumerate(packets)}
        keys = [i for i, p in enumerate(packets) if p.is_keyframe]
        groups: dict[int, list[int]] = {}
        for pts in wanted_pts:
            key = max(k for k in keys if packets[k].pts <= pts)
            groups.setdefault(key, []).append(int(pts))
        self.groups, self.bytes = [], path.stat().st_size - sum(p.size for p in packets)
        for key, moments in groups.items():
            last = max(index[pts] for pts in moments)
            self.groups.append((packets[key].pts, last - key + 1, set(moments)))
            self.bytes += sum(p.size for p in packets[key : last + 1])

    def decode(self, path: Path) -> np.ndarray:
        """Decode just these packets, in one thread."""
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


def in_turns(rounds: int, **variants: Callable[[], float]) -> dict[str, list[float]]:
    """Measure each variant once a round; every second round runs in reverse order."""
    measured: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants) if number % 2 == 0 else list(variants)[::-1]:
            measured[name].append(variants[name]())
    return measured


def median_ratio(measured: dict[str, list[float]], over: str, under: str) -> float:
    """Return the median of the rounds' ratios of two variants."""
    return statistics.median(a / b for a, b in zip(measured[over], measured[under], strict=True))


def assert_same(ours: SampledFrames | VideoFailure, theirs: np.ndarray) -> None:
    """Check that two variants decode the same frames."""
    assert isinstance(ours, SampledFrames), ours
    assert np.array_equal(ours.images, theirs), "the variants decode different frames"


def cpu_s(work: Callable[[], Any]) -> float:
    """Return the CPU time of this process for some work [s]; other work on the machine does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def decoding(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure (a) for long and short groups of pictures; the figure is the worse of the two."""
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
    """Measure (c): a relay in front of the store counts bytes, headers included."""
    minute, video = folder / "minute.mp4", folder / "ten_minutes.mp4"
    write_clip(minute, 60, 60, size=(960, 540))
    repeat_clip(minute, video, 10)
    needed = Needed(video, FRAMES)
    root = Path(__file__).parent.parent
    with (
        running_object_store(folder / "swift", venv=root / ".cache" / "swift-venv") as store,
        Wire(int(store.endpoint.rsplit(":", 1)[1])) as wire,
    ):
        store.make_bucket("videos")
        os.environ.update(store.environment() | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}"})
        storage.write_bytes("s3://videos/ten_minutes.mp4", video.read_bytes())
        data, counted = DataConfig(num_frames=FRAMES), []
        for _ in range(3):
            before = wire.received, wire.requests
            began = time.perf_counter()
            ours = decode_video("s3://videos/ten_minutes.mp4", data, SIDE)
            wall_s = time.perf_counter() - began
            counted.append((wire.received - before[0], wire.requests - before[1], wall_s))
    assert_same(ours, needed.decode(video))
    received, requests, wall_s = (statistics.median(values) for values in zip(*counted, strict=True))
    figures = {"bytes_over_needed": received / needed.bytes, "requests": requests}
    return figures, {
        "object_mb": video.stat().st_size / 1e6,
        "needed_mb": needed.bytes / 1e6,
        "received_mb": received / 1e6,
        "wall_s": wall_s,
    }


def run_pipeline(videos: list[Path], data: DataConfig) -> dict[str, Any]:
    """Read one epoch of these videos through Ray Data as training does; rates count from the first batch on."""
    messages = [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "-"}]
    lines = [json.dumps({"id": f"{i}", "video": str(path), "messages": messages}) for i, path in enumerate(videos)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("\n".join(lines))
        rows = Rows([Manifest(f"{folder}/rows.jsonl", ["/"])])
    order = DeterministicSampler((len(videos),), 1, seed=0)
    layout = BlockLayout(order, 1, 0, order.steps_per_epoch, rows_per_block(data, SIDE))
    began = time.perf_counter()
    dataset = build_dataset(layout, ray.put(rows), data, SIDE, workers=PROCESSES, cpus_per_worker=0.5)
    samples, frames, first = [], 0, 0.0
    for block in dataset.iter_batches(batch_size=1, prefetch_batches=2):
        for sample in unpack_block(block):
            first = first or time.perf_counter()
            samples.append(sample)
            frames += sum(len(video) for video in sample.videos)
    del samples[len(videos) :]  # padding of the last block
    seconds = time.perf_counter() - first
    read_lines = {s.line for s in samples if not s.quarantined and not s.error}
    return {
        "frames_per_s": (frames - FRAMES) / seconds,
        "good_per_s": (sum(not s.error for s in samples) - 1) / seconds,
        "read_lines": read_lines,
        "startup_s": first - began,
    }


def run_plain(videos: list[Path], data: DataConfig) -> float:
    """Return the frames/s of the same decoder in as many processes that do nothing else, without start-up."""
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_count_frames, videos[:PROCESSES], [data] * PROCESSES))
        began = time.perf_counter()
        frames = sum(pool.map(_count_frames, videos, [data] * len(videos)))
        return frames / (time.perf_counter() - began)


def _count_frames(path: Path, data: DataConfig) -> int:
    return len(decode_video(str(path), data, SIDE))  # type: ignore[arg-type]


class DecordVideos(torch.utils.data.Dataset[torch.Tensor]):
    """A typical map-style dataset: decord reads frames by number and resizes while decoding."""

    def __init__(self, videos: list[Path]) -> None:
        self.videos = videos

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, number: int) -> torch.Tensor:
        import decord

        reader = decord.VideoReader(str(self.videos[number]), width=SIDE, height=SIDE, num_threads=1)
        numbers = np.linspace(0, len(reader) - 1, FRAMES).astype(int)
        return torch.from_numpy(reader.get_batch(numbers).asnumpy())


def run_dataloader(videos: list[Path]) -> float:
    """Return the frames/s of a torch DataLoader with as many workers, from the first batch on."""
    frames, first = 0, 0.0
    for batch in torch.utils.data.DataLoader(DecordVideos(videos), batch_size=1, num_workers=PROCESSES):
        first = first or time.perf_counter()
        frames += batch.shape[1]
    return (frames - FRAMES) / (time.perf_counter() - first)


def pipeline(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure (b) and (e), on clips with a keyframe a second."""
    path = folder / "pipeline.mp4"
    write_clip(path, 60, 30)
    videos, data, startup_s = [path] * SAMPLES, DataConfig(num_frames=FRAMES), []

    def ours() -> float:
        measured = run_pipeline(videos, data)
        startup_s.append(measured["startup_s"])
        return measured["frames_per_s"]

    start_ray()
    measured = in_turns(
        rounds, ours=ours, plain=lambda: run_plain(videos, data), dataloader=lambda: run_dataloader(videos)
    )
    figures = {
        "pipeline_over_plain": median_ratio(measured, "ours", "plain"),
        "pipeline_over_dataloader": median_ratio(measured, "ours", "dataloader"),
        "startup_s": statistics.median(startup_s),
    }
    return figures, {"frames_per_s": measured, "samples": SAMPLES, "processes": PROCESSES}


def with_bad_files(folder: Path, rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure (d). One file in twenty is unreadable: truncated before its index, empty, no video, or missing."""
    path = folder / "good.mp4"
    write_clip(path, 60, 30)
    kinds = {"cut.mp4": path.read_bytes()[:1_000_000], "empty.mp4": b"", "text.mp4": b"no video" * 100}
    for name, content in kinds.items():
        (folder / name).write_bytes(content)
    bad = [folder / name for name in (*kinds, "missing.mp4")]
    clean = [path] * SAMPLES
    mixed = [bad[i // 20 % len(bad)] if i % 20 == 7 else path for i in range(SAMPLES)]
    good = {i + 1 for i, video in enumerate(mixed) if video == path}
    data, shares = DataConfig(num_frames=FRAMES), []

    def with_bad() -> float:
        measured = run_pipeline(mixed, data)
        shares.append(len(measured["read_lines"] & good) / len(good))
        return measured["good_per_s"]

    start_ray()
    measured = in_turns(rounds, bad5=with_bad, clean=lambda: run_pipeline(clean, data)["good_per_s"])
    figures = {"bad5_over_clean": median_ratio(measured, "bad5", "clean"), "good_kept": min(shares)}
    return figures, {"good_per_s": measured, "samples": SAMPLES, "bad": SAMPLES - len(good)}


def memory(folder: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """Measure (f), on short clips."""
    path = folder / "short_clip.mp4"
    write_clip(path, 2, 30)
    resident_mib = {}
    with Decoder(DataConfig(num_frames=8), SIDE) as decoder:
        done = 0
        for count in (100, 990, 1100, 1990):
            for _ in range((count - done) // 10):
                decoder([str(path)] * 10)
            done = count
            resident_mib[count] = _resident_mib()
    growth = max(resident_mib[990] - resident_mib[100], resident_mib[1990] - resident_mib[1100])
    figures = {"memory_growth_mib": growth, "memory_100_mib": resident_mib[100], "memory_1990_mib": resident_mib[1990]}
    return figures, {"resident_mib": resident_mib}


def _resident_mib() -> float:
    """Return the resident memory of this process and its children [MiB]."""
    process = psutil.Process()
    return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]) / 2**20


def start_ray() -> None:
    """Start a Ray cluster on this machine, unless there is one, with little logging."""
    if not ray.is_initialized():
        ray.init(address="local", logging_level=logging.ERROR, log_to_driver=False)
        ray.data.DataContext.get_current().execution_options.preserve_order = True


def main() -> None:
    """Measure the selected points and print each figure next to its limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--points",
        default="abcdf",
        help="points to measure, of abcdf; b includes e (default: all, which takes 15 minutes)",
    )
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points: dict[str, Callable[[], tuple[dict[str, float], dict[str, Any]]]] = {
            "a": lambda: decoding(folder, arguments.rounds),
            "b": lambda: pipeline(folder, arguments.rounds),  # and e
            "c": lambda: over_http(folder),
            "d": lambda: with_bad_files(folder, arguments.rounds),
            "f": lambda: memory(folder),
        }
        for point in arguments.points:
            measured, detail[point] = points[point]()
            figures |= measured
            print(f"({point}) {measured}", file=sys.stderr, flush=True)
    table = Table("figure", "measured", "limit", title="data path")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:.3f}", LIMITS.get(figure, ""))
    report("data", table, figures, detail, arguments.json)


if __name__ == "__main__":
    main()
