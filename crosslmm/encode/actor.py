"""The Ray Data actor that encodes videos, and the rows that the data pipeline reads for it."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch
from transformers import SiglipVisionModel

from crosslmm.config import RunConfig
from crosslmm.data.dataset import unpack_block
from crosslmm.data.feature_cache import IndexEntry, write_shard
from crosslmm.data.feature_format import FeatureRecipe
from crosslmm.data.manifest import Rows, VideoReference
from crosslmm.data.quarantine import QuarantineEntry
from crosslmm.data.video.decode import VideoFailure
from crosslmm.model.vision_encoder import encode


class VideoRows:
    """Rows with one video each, with the interface of `Rows`: for each video, the first row that names it.

    Attributes:
        uris: URI of each video.
        versions: version of each video's object, None if it has none.
        roots: folders that the videos may lie in.
    """

    def __init__(self, rows: Rows, videos: dict[str, VideoReference], versions: dict[str, str | None]) -> None:
        self.uris, self.versions = list(videos), list(versions.values())
        self.roots = rows.roots
        self._rows, self._row_numbers = rows, np.array([video.row for video in videos.values()])

    def take(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """Return the rows of these videos, int64 (n,), without messages."""
        rows = self._rows.take(self._row_numbers[indices])
        return [row | {"videos": [self.uris[i]], "messages": []} for row, i in zip(rows, indices.tolist(), strict=True)]


class Encode:
    """Encodes the videos of a block and writes their features into a shard. Runs as a Ray Data actor.

    Args:
        tower: the encoder, in the object store.
        rows: `VideoRows`, in the object store.
        folder: folder of the recipe's features.
        recipe: how features are made.
        config: the run.
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
        """Encode one block and return a report, as JSON in `done`.

        The report has `entries` (for the index), `quarantined` (entries for the quarantine file), `shortfalls` (lines
        for the log), `squared_error` and `squared_values` (see `write_shard`), `started` and `ended` (unix time [s]).
        """
        started = time.time()
        samples = [sample for sample in unpack_block(block) if sample.weight]
        readable = [sample for sample in samples if sample.error is None]
        features = self._encode([sample.videos[0] for sample in readable])
        videos = [
            (self.rows.uris[sample.position], self.rows.versions[sample.position], x_FPD, sample.times[0])
            for sample, x_FPD in zip(readable, features, strict=True)
        ]
        entries, squared_error, squared_values = write_shard(self.folder, videos, self.recipe.dtype)
        unstorable = [
            QuarantineEntry.from_row(vars(sample), entry.uri, VideoFailure(entry.reason, "process", entry.version))
            for sample, entry in zip(readable, entries, strict=True)
            if entry.reason is not None
        ]
        for sample in samples:
            uri, version = self.rows.uris[sample.position], self.rows.versions[sample.position]
            for failure in sample.quarantined:
                cause = {key: failure[key] for key in ("reason", "stage", "attempts")}
                entries.append(IndexEntry(uri, version, 0, **cause))
        report = {
            "entries": [asdict(entry) for entry in entries],
            "quarantined": [
                *(failure for sample in samples for failure in sample.quarantined),
                *(failure.to_dict() for failure in unstorable),
            ],
            "shortfalls": [line for sample in samples for line in sample.shortfalls],
            "squared_error": squared_error,
            "squared_values": squared_values,
            "started": started,
            "ended": time.time(),
        }
        return {"done": [json.dumps(report)]}

    def _encode(self, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode videos, uint8 (frames, side, side, 3) each, to features, float32 (frames, patches, width) each."""
        if not videos:
            return []
        pixels = torch.from_numpy(np.concatenate(videos)).permute(0, 3, 1, 2).contiguous().to(self.device)
        with torch.no_grad():
            x_FPD = encode(self.tower, pixels, self.chunk).float().cpu().numpy()
        return np.split(x_FPD, np.cumsum([len(video) for video in videos])[:-1])
