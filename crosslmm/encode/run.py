"""The frozen encoder over the data street: every video of the manifests once, its features into storage.

What the folder has already is not encoded again, so a job that was stopped, or one with more videos, goes on there.
"""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import SiglipVisionModel

from crosslmm import ray_runtime, storage
from crosslmm.config import DataConfig, RunConfig, validate_run
from crosslmm.data.dataset import BlockLayout, build_dataset, rows_per_block, unpack_block
from crosslmm.data.feature_cache import (
    QUARANTINE_FILE,
    RECIPE_FILE,
    FeatureCache,
    IndexEntry,
    create,
    write_index,
    write_shard,
)
from crosslmm.data.feature_format import FeatureConfig, FeatureRecipe, bytes_per_frame
from crosslmm.data.frame_sampling import FrameSampling, split_time_range
from crosslmm.data.manifest import Manifest, Rows, Video
from crosslmm.data.quarantine import ErrorBudget, to_printable
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.encode.recipe import recipe_of
from crosslmm.model.loading import build_encoder, build_processor
from crosslmm.model.vision_encoder import digest, encode
from crosslmm.planning import cost
from crosslmm.preflight import hardware, placement
from crosslmm.preflight.resolve import require_durable, resolve_config
from crosslmm.progress import PLAIN_INTERVAL_S

INDEX_EVERY_S = 5.0
"""So much work is lost at most when the job is killed; an index is a request for each reader."""
ASKED_AT_ONCE = 32
"""Videos whose versions the store is asked for."""


@dataclass(frozen=True)
class EncodingResult:
    """What a job did."""

    folder: str
    """What `data.features` is to be."""
    videos: int
    """Encoded now."""
    already: int
    """That were there before."""
    frames: int
    bytes: int
    """Written now."""
    seconds: float
    """The whole job, Ray's start included [s]."""
    encoding_s: float
    """From the start of the first block of decoded videos to the end of the last one, by its workers' clocks: what is
    left when start-up is taken off, as in a run's `train_s` [s]."""
    quarantined: int
    """Videos that could not be read."""
    relative_error: float | None
    """Root mean square of what rounding to `dtype` took, over that of the values; None where nothing was encoded."""


class EncodingFailed(Exception):
    """The job ended before its last video; one line with the first cause."""


class VideoRows:
    """Rows as `Rows` gives them, with one video each: that of its first row in the manifests.

    Attributes:
        uris: of the videos.
        versions: of their objects, None where there is none.
        roots: folders that they may lie in.
    """

    def __init__(self, rows: Rows, videos: dict[str, Video], versions: dict[str, str | None]) -> None:
        self.uris, self.versions = list(videos), list(versions.values())
        self.roots = rows.roots
        self._rows, self._numbers = rows, np.array([video.row for video in videos.values()])

    def take(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows of these videos, int64 (n,), without what is said in them."""
        rows = self._rows.take(self._numbers[numbers])
        return [row | {"videos": [self.uris[n]], "messages": []} for row, n in zip(rows, numbers.tolist(), strict=True)]


class Encode:
    """A block of videos -> a shard in storage, and what the index is to say of it. Runs as a Ray Data actor.

    Args:
        tower: the encoder, in the object store.
        rows: `VideoRows`, in the object store.
        folder: of the recipe.
        recipe: how features are made.
        config: of the run.
    """

    def __init__(
        self, tower: ray.ObjectRef, rows: ray.ObjectRef, folder: str, recipe: FeatureRecipe, config: RunConfig
    ) -> None:
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
        self.device = torch.device("cuda" if config.scaling.use_gpu else "cpu")
        dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.tower: SiglipVisionModel = ray.get(tower).to(self.device, dtype)
        self.rows: VideoRows = ray.get(rows)
        self.folder, self.recipe, self.chunk = folder, recipe, config.model.encoder_chunk

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """One row of JSON: `stored`, `bad` (entries of the ledger), `write_shard`'s sums of squares, and its start and
        end (`began` and `ended`, unix time [s])."""
        began = time.time()
        samples = [sample for sample in unpack_block(block) if sample.weight]
        readable = [sample for sample in samples if sample.error is None]
        features = self._features([sample.videos[0] for sample in readable])
        named = [(self.rows.uris[sample.position], self.rows.versions[sample.position]) for sample in readable]
        videos = [(uri, version, x_FPD) for (uri, version), x_FPD in zip(named, features, strict=True)]
        stored, lost, whole = write_shard(self.folder, videos, self.recipe.dtype)
        for sample in samples:
            for entry in sample.quarantined:
                why = {key: entry[key] for key in ("reason", "stage", "attempts")}
                stored.append(
                    IndexEntry(self.rows.uris[sample.position], self.rows.versions[sample.position], 0, **why)
                )
        bad = [entry for sample in samples for entry in sample.quarantined]
        done = {"stored": [asdict(one) for one in stored], "bad": bad, "lost": lost, "whole": whole}
        return {"done": [json.dumps(done | {"began": began, "ended": time.time()})]}

    def _features(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """uint8 (frames, side, side, 3) each -> float32 (frames, patches, width) each."""
        if not videos:
            return []
        pixels = torch.from_numpy(np.concatenate(videos)).permute(0, 3, 1, 2).contiguous().to(self.device)
        with torch.no_grad():
            x_FPD = encode(self.tower, pixels, self.chunk).float().cpu().numpy()
        return np.split(x_FPD, np.cumsum([len(video) for video in videos])[:-1])


def run_encoding(config: RunConfig, settings: FeatureConfig) -> EncodingResult:
    """Encode every video of the manifests that is not in the folder yet.

    Raises:
        BadConfig, BadManifest: the request cannot be carried out.
        EncodingFailed: the job broke off; the same command goes on where it stopped.
    """
    began = time.monotonic()
    console = Console(highlight=False, soft_wrap=True)
    root = settings.folder or storage.join(config.storage, "features")
    require_durable("features.folder", root)
    # The rules of a run that reads features: a frozen encoder, among them.
    validate_run(config.model_dump() | {"data": config.data.model_dump() | {"features": root}})
    # A graph runs in this process, whose terminal is no place for Ray's remarks about its actors.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    config = resolve_config(config)
    computes_on = hardware.detect(config)
    config = hardware.resolve_auto(config, computes_on)
    console.print(f"machine   {hardware.describe(config, computes_on)}")
    processor = build_processor(config.model)
    uris = [*config.data.manifests, *([config.data.validation_manifest] if config.data.validation_manifest else [])]
    rows = Rows([Manifest(uri, config.data.roots) for uri in uris])
    videos = rows.videos()
    tower = build_encoder(config.model, processor, config.seed)
    recipe = recipe_of(config, digest(tower), settings.dtype)
    folder = storage.join(storage.absolute(root), recipe.key)
    versions = _versions(videos)
    if storage.exists(storage.join(folder, RECIPE_FILE)):
        known = FeatureCache(folder)
        missing = {uri: video for uri, video in videos.items() if not known.has(uri, versions[uri])}
    else:
        missing = videos
    _announce(console, config, settings, recipe, folder, missing, len(videos))
    record = _Record(create(storage.absolute(root), recipe), missing, config.data, console)
    if missing:
        ray_runtime.start_ray()
        # Nothing is validated, and so nothing decoded beside.
        data = config.data.model_copy(update={"validation_manifest": None})
        config = config.model_copy(update={"data": data})
        placement.check_placement(config)
        asked = VideoRows(rows, missing, {uri: versions[uri] for uri in missing})
        with record:
            try:
                for row in _dataset(config, recipe, folder, tower, asked).iter_rows():
                    record.take(json.loads(row["done"]))
            except Exception as error:
                raise EncodingFailed(f"{_first_cause(error)}; the same command goes on where it stopped") from error
    return EncodingResult(
        folder=folder,
        videos=record.videos,
        already=len(videos) - len(missing),
        frames=record.frames,
        bytes=record.bytes,
        seconds=round(time.monotonic() - began, 1),
        encoding_s=round(record.encoding_s, 1),
        quarantined=len(record.bad),
        relative_error=(record.lost / record.whole) ** 0.5 if record.whole else None,
    )


def _versions(videos: dict[str, Video]) -> dict[str, str | None]:
    """Of each video's object, asked before it is read: one that changes meanwhile is noticed when it is next used."""
    places = list({split_time_range(uri)[0] for uri in videos})
    with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        found = dict(zip(places, threads.map(storage.version, places), strict=True))
    return {uri: found[split_time_range(uri)[0]] for uri in videos}


def _announce(
    console: Console,
    config: RunConfig,
    settings: FeatureConfig,
    recipe: FeatureRecipe,
    folder: str,
    missing: dict[str, Video],
    videos: int,
) -> None:
    """What it will take, before it begins."""
    sampling = FrameSampling(config.data.num_frames, config.data.sampling, config.data.fps)
    frames = int(sampling.count(np.array([video.seconds for video in missing.values()])).sum()) if missing else 0
    macs = cost.macs(cost.empty_model(config.model), 1, 1).encoder * frames
    sizes = {dtype: frames * bytes_per_frame(recipe.patches, recipe.width, dtype) for dtype in ("bf16", "int8")}
    console.print(f"features  {folder} ({settings.dtype})")
    console.print(f"videos    {videos:,}, {videos - len(missing):,} of them there already")
    console.print(f"to do     {len(missing):,} videos, {frames:,} frames at most, {macs / 1e12:,.3f} T encoder MACs")
    for dtype, size in sizes.items():
        price = size / 1e9 * settings.price
        console.print(f"  {dtype}    {size / 1e9:,.3f} GB at most, {price:,.2f} USD a month")
    console.print(f"assumed   --features.price {settings.price:g} USD a GB and month")


def _dataset(
    config: RunConfig, recipe: FeatureRecipe, folder: str, tower: SiglipVisionModel, videos: VideoRows
) -> Dataset:
    """Videos in blocks, decoded, encoded, stored; one row of JSON for each block."""
    scaling, rows = config.scaling, ray.put(videos)
    size = rows_per_block(config.data, recipe.image_size)
    order = DeterministicSampler((len(videos.uris),), size, None)
    decoded = build_dataset(
        BlockLayout(order, 1, 0, order.steps_per_epoch, size),
        rows,
        config.data,
        recipe.image_size,
        scaling.decode_workers,
        scaling.cpus_per_decode_worker,
        decode_on=scaling.decode_on,
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the first cause reaches the terminal as our one line
    return decoded.map_batches(
        Encode,
        batch_size=None,
        compute=ActorPoolStrategy(size=scaling.most_workers),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else None,
        resources=dict(scaling.worker_resources) or None,
        label_selector=dict(scaling.train_on) or None,
        fn_constructor_kwargs={
            "tower": ray.put(tower), "rows": rows, "folder": folder, "recipe": recipe, "config": config,
        },
    )  # fmt: skip


def _first_cause(error: BaseException) -> str:
    """The error that an actor raised, under those that Ray put around it."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}"


class _Record:
    """Writes index and ledger as blocks are finished, and shows how far it is. Leaving the context writes what is left.

    A person at a terminal sees one live line; a log file gets a plain line every ten seconds.
    """

    def __init__(self, folder: str, missing: dict[str, Video], data: DataConfig, console: Console) -> None:
        self.folder, self.console = folder, console
        self.videos = self.frames = self.bytes = 0
        self.lost = self.whole = 0.0
        self.bad: list[dict[str, Any]] = []
        self._first, self._last = math.inf, -math.inf
        self._due = len(missing)
        self._waiting: list[IndexEntry] = []
        self._written = 0.0
        self._began = self._last_line = time.monotonic()
        # What is tried again is named again, or has become readable.
        ledger, tried = storage.join(folder, QUARANTINE_FILE), {to_printable(uri) for uri in missing}
        before = storage.read_bytes(ledger).splitlines() if storage.exists(ledger) else []
        self._tally = ErrorBudget(data.max_bad_share, data.bad_allowed)
        self._others = [entry for entry in map(json.loads, before) if entry["uri"] not in tried]
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task("encoding", total=self._due, news="")

    def __enter__(self) -> "_Record":
        self._progress.start()
        if not self.console.is_terminal:
            self.console.print("encoding")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._write()
        if self.bad:
            self.console.print(f"{len(self.bad)} videos could not be read: {QUARANTINE_FILE} in {self.folder}")

    @property
    def encoding_s(self) -> float:
        """From the first block's start to the last one's end [s]; 0 before there is one."""
        return max(0.0, self._last - self._first)

    def take(self, done: dict[str, Any]) -> None:
        """Take note of a block."""
        self._first, self._last = min(self._first, done["began"]), max(self._last, done["ended"])
        stored = [IndexEntry(**one) for one in done["stored"]]
        self._waiting += stored
        self.videos += sum(one.frames > 0 for one in stored)
        self.frames += sum(one.frames for one in stored)
        self.bytes += sum(one.size for one in stored)
        self.lost += done["lost"]
        self.whole += done["whole"]
        for entry in done["bad"]:
            self.bad.append(entry)
            line = f"left out: {entry['manifest']} line {entry['line']} ({entry['id']}): {entry['reason']}"
            self.console.print(line, markup=False)
        now = time.monotonic()
        if now - self._written >= INDEX_EVERY_S:
            self._write()
        # Of all manifests together: a block does not say which one a good video is of.
        named = [entry | {"manifest": "the videos"} for entry in done["bad"]]
        self._tally.record(["the videos"] * len(stored), named)
        finished = self.videos + len(self.bad)
        news = f"{self.frames / (now - self._began):.0f} frames/s  {self.bytes / 1e9:.3f} GB"
        self._progress.update(self._task, completed=finished, news=news)
        if not self.console.is_terminal and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            self.console.print(f"video {finished}/{self._due}  {news}")

    def _write(self) -> None:
        """Ledger first: what the index says is not tried before the next job."""
        self._written = time.monotonic()
        entries = sorted([*self._others, *self.bad], key=lambda entry: (entry["manifest"], entry["line"], entry["uri"]))
        if entries or storage.exists(storage.join(self.folder, QUARANTINE_FILE)):
            lines = "".join(json.dumps(entry) + "\n" for entry in entries)
            storage.write_bytes(storage.join(self.folder, QUARANTINE_FILE), lines.encode())
        if self._waiting:
            write_index(self.folder, self._waiting)
            self._waiting = []
