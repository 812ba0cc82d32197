"""The cache of frozen-encoder features: each video's visual tokens, encoded once and read in any order.

FOLDER/KEY/features.json         the recipe that KEY is the hash of
FOLDER/KEY/shard-ID.bin          the features of some videos, concatenated
FOLDER/KEY/index-TIME-ID.parquet shard and offset of each video, with its version and digest; written after its shards
FOLDER/KEY/quarantine.jsonl      the unreadable videos

An index file never changes; the latest one that lists a video counts. So a job that is killed leaves complete videos
only, and the next one resumes where it stopped.
"""

import hashlib
import io
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data.feature_format import FORMAT, DType, FeatureRecipe, from_bf16, pack, unpack
from crosslmm.data.frame_sampling import SampledFrames
from crosslmm.data.quarantine import escape_to_ascii
from crosslmm.data.video.decode import Stage, VideoFailure, video_version
from crosslmm.data.video.frame_list import describe_video
from crosslmm.storage.parquet import ParquetFile
from crosslmm.text import first_error

RECIPE_FILE, QUARANTINE_FILE = "features.json", "quarantine.jsonl"
CONCURRENT_READS = 8
"""Videos whose features are fetched at the same time."""
MAX_INDEX_BYTES, MAX_INDICES_BYTES = 256 * 2**20, 4 * 2**30
"""Largest index file, and largest size of all in memory, 0.25 kB a video and 8 bytes a frame [bytes]."""
REENCODE_HINT = "run python jobs/encode.py with this run's settings, which encodes what is missing or has changed"

INDEX = pa.schema(
    {
        "uri": pa.string(),  # as the manifest names it, `#t=` included
        "version": pa.string(),  # of the object when it was encoded; null if there was none
        "frames": pa.int32(),  # 0 for an unreadable video
        "shard": pa.string(),
        "offset": pa.int64(),  # in the shard [bytes]
        "size": pa.int64(),  # [bytes]
        "sha256": pa.string(),  # of these bytes, hex
        "times": pa.list_(pa.float64()),  # when each frame is shown, see `SampledFrames` [s]
        "reason": pa.string(),  # this and the next two: why it is unreadable, see `VideoFailure`
        "stage": pa.string(),
        "attempts": pa.int32(),
    }
)
NEVER_NULL = ("uri", "frames", "offset", "size", "attempts")
"""Columns of `INDEX` that have a value in every row."""


class BadFeatures(Exception):
    """Features that must not be used: damaged, or of another version of the video. One line, with the remedy."""


@dataclass(frozen=True)
class IndexEntry:
    """One video in the index; see `INDEX`."""

    uri: str
    version: str | None
    frames: int
    shard: str | None = None
    offset: int = 0
    """In the shard [bytes]."""
    size: int = 0
    """In the shard [bytes]."""
    sha256: str | None = None
    times: list[float] | None = None
    """When each frame is shown [s]."""
    reason: str | None = None
    stage: Stage | None = None
    attempts: int = 1


def create_feature_folder(root: str, recipe: FeatureRecipe) -> str:
    """Create the folder of a recipe's features in `root`, if it does not exist, and return it."""
    folder = storage.join(root, recipe.key)
    recipe_file = storage.join(folder, RECIPE_FILE)
    if not storage.exists(recipe_file):
        storage.write_bytes(recipe_file, json.dumps(recipe.model_dump(), indent=1).encode())
    return folder


def write_shard(
    folder: str, videos: Sequence[tuple[str, str | None, np.ndarray, Sequence[float]]], dtype: DType
) -> tuple[list[IndexEntry], float, float]:
    """Write one shard. A video whose features cannot be stored gets an entry with the reason, and costs no other.

    Args:
        folder: folder of the recipe.
        videos: (URI, version, features, times) each; features are float32 (frames, patches, width), and times say when
            each frame is shown [s].
        dtype: format that they are stored in.

    Returns:
        (entries, squared_error, squared_values): the index entries, the sum of squared rounding errors, and the sum of
        squared values.
    """
    shard = f"shard-{secrets.token_hex(8)}.bin"
    pieces: list[bytes] = []
    entries, offset, squared_error, squared_values = [], 0, 0.0, 0.0
    for uri, version, x_FPD, times in videos:
        try:
            piece = pack(x_FPD, dtype)
        except ValueError as error:
            entries.append(IndexEntry(uri, version, 0, reason=str(error), stage="process"))
            continue
        rounded = from_bf16(unpack(piece, x_FPD.shape, dtype))
        squared_error += float(np.square(rounded - x_FPD).sum())
        squared_values += float(np.square(x_FPD).sum())
        digest = hashlib.sha256(piece).hexdigest()
        entries.append(IndexEntry(uri, version, len(x_FPD), shard, offset, len(piece), digest, list(times)))
        pieces.append(piece)
        offset += len(piece)
    if pieces:
        storage.write_bytes(storage.join(folder, shard), b"".join(pieces))
    return entries, squared_error, squared_values


def write_index(folder: str, entries: Iterable[IndexEntry]) -> None:
    """Write an index file; from now on new readers see these videos."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in entries], INDEX), buffer, compression="zstd")
    name = f"index-{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
    storage.write_bytes(storage.join(folder, name), buffer.getvalue())


class FeatureCache:
    """The features in a folder, as of the time when it was opened.

    Attributes:
        folder: folder of the recipe.
        recipe: how the features were made.
    """

    def __init__(self, folder: str) -> None:
        """Open a folder that `create_feature_folder` made.

        Raises:
            BadConfig: it contains no features, or none that this version can read.
        """
        self.folder = storage.absolute(folder).rstrip("/")
        try:
            recipe = storage.read_json(storage.safe_join(self.folder, RECIPE_FILE))
            if recipe.get("format") != FORMAT:
                raise ValueError(f"its format is {recipe.get('format')}, and this version reads {FORMAT}")
            self.recipe = FeatureRecipe.model_validate(recipe)
            if self.recipe.key != self.folder.rpartition("/")[2]:
                raise ValueError(f"{RECIPE_FILE} does not match the folder's name")
            names = storage.names_in(self.folder)
            indices = [name for name in names if name.startswith("index-")]
            tables = self._read_indices(indices)
        except (OSError, ValueError, AttributeError) as error:
            reason = (
                first_error(error) if type(error) is ValueError else f"{type(error).__name__}: {first_error(error)}"
            )
            raise BadConfig(
                f"data.features: {folder}: no features can be read there: {reason}; give the folder that "
                "jobs/encode.py printed"
            ) from error
        self._shards = {name for name in names if name.startswith("shard-")}
        table = pa.concat_tables(tables)
        # Sorted by URI, the latest entry of a URI last: a binary search finds it, so no process needs a dictionary.
        self._table = table.take(pc.sort_indices(table, [("uri", "ascending")])).combine_chunks()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": set()}

    def _read_indices(self, names: Sequence[str]) -> list[pa.Table]:
        tables, size = [INDEX.empty_table()], 0
        with ThreadPoolExecutor(CONCURRENT_READS) as threads:
            for table in threads.map(self._read_index, names):
                size += table.nbytes
                if size > MAX_INDICES_BYTES:
                    raise ValueError(f"its indices take more than {MAX_INDICES_BYTES} bytes")
                tables.append(table)
        return tables

    def _read_index(self, name: str) -> pa.Table:
        data = storage.read_at_most(storage.safe_join(self.folder, name), MAX_INDEX_BYTES)
        table = ParquetFile.from_bytes(data).read(INDEX)
        if missing := [column for column in NEVER_NULL if table[column].null_count]:
            raise ValueError(f"{name} has no {missing[0]} in some row")
        for shard in table["shard"].unique().drop_null().to_pylist():
            storage.join(self.folder, shard)
        return table

    def find(self, uri: str) -> IndexEntry | None:
        """Return the latest index entry of a video, or None."""
        uris = self._table["uri"]
        low, high = 0, len(uris)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if uris[middle].as_py() <= uri else (low, middle)
        if not low or uris[low - 1].as_py() != uri:
            return None
        return IndexEntry(**self._table.slice(low - 1, 1).to_pylist()[0])

    def require(self, recipe: FeatureRecipe, uris: Iterable[str]) -> None:
        """Check that the features were made by this recipe and contain these videos.

        Args:
            recipe: recipe of the run. Its encoder is not compared, since the run has not loaded it yet; its dtype is
                not compared, since any can be read.
            uris: videos that the run will read.

        Raises:
            BadConfig: the recipes differ, or videos are missing.
        """
        expected = recipe.model_copy(update={"encoder": self.recipe.encoder, "dtype": self.recipe.dtype})
        if differences := self.recipe.differences(expected):
            raise BadConfig(
                f"data.features: {self.folder} and this run differ: {'; '.join(differences)}; change the run, or "
                "encode features for it with jobs/encode.py"
            )
        missing = [uri for uri in uris if self._find_stored(uri) is None]
        if missing:
            raise BadConfig(
                f"data.features: {self.folder} lacks {len(missing)} videos of the manifests, "
                f"{describe_video(missing[0])} first; "
                f"{REENCODE_HINT}"
            )

    def __call__(self, uris: Sequence[str]) -> list[SampledFrames | VideoFailure]:
        """Read the features of some videos, in order, in place of their frames.

        Raises:
            BadFeatures: there are none, they are damaged, or the video has changed.
            storage.Unavailable: the store cannot be used.
        """
        with ThreadPoolExecutor(CONCURRENT_READS) as threads:
            return list(threads.map(self.read, uris))

    def read(self, uri: str) -> SampledFrames | VideoFailure:
        """Read the features of one video, by one request for its version (for a list of frames, one per frame) and one
        for its bytes; see `__call__`.

        Returns `VideoFailure` if the video could not be encoded.
        """
        name, entry = describe_video(uri), self.find(uri)
        if entry is None:
            raise BadFeatures(f"{name}: {self.folder} has no features of it; {REENCODE_HINT}")
        if video_version(uri, self.recipe.frame_sampling) != entry.version:
            raise BadFeatures(
                f"{name}: has changed or disappeared since it was encoded into {self.folder}; {REENCODE_HINT}"
            )
        if entry.reason is not None:
            stage: Stage = entry.stage if entry.stage in get_args(Stage) else "decode"  # type: ignore[assignment]
            return VideoFailure(escape_to_ascii(entry.reason), stage, entry.version, entry.attempts)
        size = entry.frames * self.recipe.frame_bytes
        times = np.array(entry.times or [], np.float64)
        are_times = len(times) == entry.frames and (np.isfinite(times) & (times >= 0)).all()
        is_place = entry.size == size and entry.offset >= 0 and entry.shard
        if not 0 < entry.frames <= self.recipe.num_frames or not is_place or not are_times:
            raise BadFeatures(
                f"{name}: its entry in the index is damaged; delete {self.folder}/index-*; then {REENCODE_HINT}"
            )
        try:
            shard = storage.safe_join(self.folder, str(entry.shard))
            data = storage.read_bytes(shard, entry.offset, entry.offset + size)
        except FileNotFoundError:
            raise BadFeatures(
                f"{name}: its features are lost: {self.folder}/{entry.shard} is missing; {REENCODE_HINT}"
            ) from None
        except storage.Unavailable:
            raise
        except (OSError, storage.BadLocation) as error:
            raise BadFeatures(f"{name}: its features cannot be read: {error}; {REENCODE_HINT}") from None
        if len(data) != size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BadFeatures(
                f"{name}: its features are damaged: delete {self.folder}/{entry.shard}; then {REENCODE_HINT}"
            )
        shape = (entry.frames, self.recipe.patches, self.recipe.width)
        return SampledFrames(unpack(data, shape, self.recipe.dtype), times)

    def _find_stored(self, uri: str) -> IndexEntry | None:
        """Like `find`, but None if the shard was deleted. Only for the process that opened the folder: a pickled copy
        knows no shards, and takes all of them for deleted."""
        entry = self.find(uri)
        return entry if entry and (entry.shard is None or entry.shard in self._shards) else None

    def is_current(self, uri: str, version: str | None) -> bool:
        """Return whether a video's features are stored and of this version; unreadable videos are not current."""
        entry = self._find_stored(uri)
        return entry is not None and entry.reason is None and entry.version == version
