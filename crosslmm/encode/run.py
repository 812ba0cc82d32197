"""The encoding job: runs the frozen encoder once over every video of the manifests and stores the features.

Videos that the folder already has are not encoded again, neither after an interruption nor after videos were added.
"""

import contextlib
import json
import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import ray
from ray.data import ActorPoolStrategy, Dataset
from transformers import SiglipVisionModel

from crosslmm import lease, ray_runtime, storage
from crosslmm.config import RunConfig, validate_run
from crosslmm.data.dataset import BlockLayout, build_dataset, rows_per_block
from crosslmm.data.feature_cache import RECIPE_FILE, FeatureCache, create_feature_folder
from crosslmm.data.feature_format import FeatureConfig, FeatureRecipe, bytes_per_frame
from crosslmm.data.frame_sampling import FrameSampling, split_time_range
from crosslmm.data.manifest import Manifest, Rows, VideoReference
from crosslmm.data.sampler import DeterministicSampler
from crosslmm.data.video.decode import video_version
from crosslmm.data.video.frame_list import is_frame_list
from crosslmm.encode.actor import Encode, VideoRows
from crosslmm.encode.recipe import recipe_of
from crosslmm.encode.recorder import EncodingRecorder
from crosslmm.model.loading import build_encoder, build_processor
from crosslmm.model.vision_encoder import digest
from crosslmm.planning import cost
from crosslmm.preflight import hardware, placement
from crosslmm.preflight.resolve import require_durable, resolve_config
from crosslmm.text import in_brief

log = logging.getLogger(__name__)

CONCURRENT_VERSION_REQUESTS = 32
"""Videos whose version is requested from the store at the same time."""


@dataclass(frozen=True)
class EncodingResult:
    """Result of a job; the last line of jobs/encode.py."""

    folder: str
    """Folder of the features: value for `data.features`."""
    videos: int
    """Videos encoded by this job."""
    already: int
    """Videos that the folder already had."""
    frames: int
    """Frames encoded by this job."""
    bytes: int
    """Size of their features in storage [bytes]."""
    seconds: float
    """Duration of the job, Ray's start included [s]."""
    encoding_s: float
    """Time from the start of the first block to the end of the last one, by the workers' clocks [s]: the duration
    without start-up, like a run's `train_s`."""
    quarantined: int
    """Videos that could not be read."""
    relative_error: float | None
    """Root mean square of the rounding error relative to that of the values; None if nothing was encoded."""


class EncodingFailed(Exception):
    """The job stopped before its last video; one line with the first cause."""


def run_encoding(config: RunConfig, settings: FeatureConfig) -> EncodingResult:
    """Encode every video of the manifests that the folder does not have yet.

    Raises:
        BadConfig, BadManifest: the configuration or a manifest is invalid.
        EncodingFailed: the job stopped; the same command resumes it.
        lease.LeaseLost: another job has taken over the folder of these features.
    """
    started = time.monotonic()
    root = settings.folder or storage.join(config.storage, "features")
    require_durable("features.folder", root)
    # The rules for runs that read features apply here too, such as a frozen encoder.
    validate_run(config.model_dump() | {"data": config.data.model_dump() | {"features": root}})
    # Ray Data's driver is this process: keep Ray's messages about its actors off the terminal.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    config = resolve_config(config)
    devices = hardware.detect(config)
    config = hardware.resolve_auto(config, devices)
    log.info("machine   %s", hardware.describe(config, devices))
    processor = build_processor(config.model)
    uris = [*config.data.manifests, *([config.data.validation_manifest] if config.data.validation_manifest else [])]
    rows = Rows([Manifest(uri, config.data.roots) for uri in uris])
    videos = rows.videos()
    tower = build_encoder(config.model, processor, config.seed)
    recipe = recipe_of(config, digest(tower), settings.dtype)
    folder = storage.join(storage.absolute(root), recipe.key)
    versions = _request_versions(videos, recipe.frame_sampling)
    claim = None
    if _missing_videos(folder, videos, versions):
        claim = lease.claim(folder, "encoding", "wait until it has ended")
    missing = _missing_videos(folder, videos, versions)  # another job may just have ended
    _log_estimate(config, settings, recipe, folder, missing, len(videos))
    with claim.take() if claim else contextlib.nullcontext() as fence:
        target = create_feature_folder(storage.absolute(root), recipe)
        recorder = EncodingRecorder(target, missing, config.data, *([fence.require] if fence else []))
        if missing:
            versions = {uri: versions[uri] for uri in missing}
            _encode(config, recipe, tower, VideoRows(rows, missing, versions), recorder)
    squared = recorder.squared_values
    return EncodingResult(
        folder=folder,
        videos=recorder.videos,
        already=len(videos) - len(missing),
        frames=recorder.frames,
        bytes=recorder.bytes,
        seconds=round(time.monotonic() - started, 1),
        encoding_s=round(recorder.encoding_s, 1),
        quarantined=len(recorder.quarantined),
        relative_error=(recorder.squared_error / squared) ** 0.5 if squared else None,
    )


def _request_versions(videos: dict[str, VideoReference], sampling: FrameSampling) -> dict[str, str | None]:
    """Return the version of each video's object, or that of the frames that are sampled from a list.

    Versions are requested before the videos are read: if one changes in between, its next reader notices.
    """
    files = {uri: uri if is_frame_list(uri) else split_time_range(uri)[0] for uri in videos}
    distinct = list(set(files.values()))
    with ThreadPoolExecutor(CONCURRENT_VERSION_REQUESTS) as threads:
        versions = dict(zip(distinct, threads.map(lambda file: video_version(file, sampling), distinct), strict=True))
    return {uri: versions[file] for uri, file in files.items()}


def _missing_videos(
    folder: str, videos: dict[str, VideoReference], versions: dict[str, str | None]
) -> dict[str, VideoReference]:
    """Return the videos whose current version is not in the folder."""
    if not storage.exists(storage.join(folder, RECIPE_FILE)):
        return videos
    cache = FeatureCache(folder)
    return {uri: video for uri, video in videos.items() if not cache.is_current(uri, versions[uri])}


def _log_estimate(
    config: RunConfig,
    settings: FeatureConfig,
    recipe: FeatureRecipe,
    folder: str,
    missing: dict[str, VideoReference],
    videos: int,
) -> None:
    """Log folder, number of videos, computation, size and price before the job begins."""
    sampling = FrameSampling.of(config.data)
    frames = int(sampling.count(np.array([video.seconds for video in missing.values()])).sum()) if missing else 0
    macs = cost.macs(cost.meta_model(config.model), 1, 1).encoder * frames
    sizes = {dtype: frames * bytes_per_frame(recipe.patches, recipe.width, dtype) for dtype in ("bf16", "int8")}
    log.info("features  %s (%s)", folder, settings.dtype)
    log.info("videos    %s, %s of them already encoded", f"{videos:,}", f"{videos - len(missing):,}")
    log.info(
        "to do     %s videos, %s frames at most, %s T encoder MACs",
        f"{len(missing):,}", f"{frames:,}", f"{macs / 1e12:,.3f}",
    )  # fmt: skip
    for dtype, size in sizes.items():
        price = size / 1e9 * settings.price
        log.info("  %s    %s GB at most, %s USD a month", dtype, f"{size / 1e9:,.3f}", f"{price:,.2f}")
    log.info("assumed   --features.price %g USD per GB and month", settings.price)


def _encode(
    config: RunConfig, recipe: FeatureRecipe, tower: SiglipVisionModel, videos: VideoRows, recorder: EncodingRecorder
) -> None:
    """Encode videos on the cluster and record them.

    Raises:
        EncodingFailed: the job stopped.
    """
    ray_runtime.start_ray()
    # This job does not validate: without a validation manifest, no decoders are reserved for that.
    config = config.model_copy(update={"data": config.data.model_copy(update={"validation_manifest": None})})
    placement.check_placement(config)
    with recorder:
        try:
            for row in _build_dataset(config, recipe, recorder.folder, tower, videos).iter_rows():
                recorder.add(json.loads(row["done"]))
        except lease.LeaseLost:
            raise
        except Exception as error:
            raise EncodingFailed(f"{_first_cause(error)}; run the same command again to resume") from error


def _build_dataset(
    config: RunConfig, recipe: FeatureRecipe, folder: str, tower: SiglipVisionModel, videos: VideoRows
) -> Dataset:
    """Build the dataset: videos in blocks, decoded, encoded, stored; each block ends as one row, see `Encode`."""
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
    # EncodingFailed reports the first cause in one line; Ray Data would log its tracebacks as well.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
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
    """Return the error that an actor raised, without the errors that Ray wraps it in."""
    cause = error
    while (inner := getattr(cause, "cause", None) or cause.__cause__) is not None:
        cause = inner
    return f"{type(cause).__name__}: {in_brief(cause, 500)}"
