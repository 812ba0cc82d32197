"""The cache of frozen-encoder features: each video's original visual tokens, encoded once and read at random.

FOLDER/KEY/features.json         what the key is made of, and nothing else
FOLDER/KEY/shard-ID.bin          the features of some videos, one behind the other
FOLDER/KEY/index-TIME-ID.parquet which video lies where, with its version and checksum; written after its shards
FOLDER/KEY/quarantine.jsonl      what could not be read

An index is never changed: a later one has the last word about a video. So a job that was killed leaves whole videos or
none, and the next one goes on where it stopped.
"""

import hashlib
import io
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from crosslmm import storage
from crosslmm.config import BadConfig
from crosslmm.data.feature_format import (
    FORMAT,
    DType,
    FeatureRecipe,
    from_bf16,
    pack,
    unpack,
)
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.video.decode_pool import Stage, Unreadable

RECIPE_FILE, QUARANTINE_FILE = "features.json", "quarantine.jsonl"
READERS = 8
"""Videos whose features are fetched at once."""
REENCODE_HINT = "python jobs/encode.py, with this run's settings, makes anew what is missing or has changed"

INDEX = pa.schema(
    {
        "uri": pa.string(),  # as the manifest names it, `#t=` included
        "version": pa.string(),  # of the object when it was encoded; null where there was none
        "frames": pa.int32(),  # 0 of a video that could not be read
        "shard": pa.string(),
        "offset": pa.int64(),  # in the shard [bytes]
        "size": pa.int64(),  # [bytes]
        "sha256": pa.string(),  # of these bytes, hex
        "reason": pa.string(),  # why it could not be read, and what else `Unreadable` says
        "stage": pa.string(),
        "attempts": pa.int32(),
    }
)


class BadFeatures(Exception):
    """Features that must not be used: damaged, or not of the video as it is now. One line, with what helps."""


@dataclass(frozen=True)
class IndexEntry:
    """One line of the index; see `INDEX`."""

    uri: str
    version: str | None
    frames: int
    shard: str | None = None
    offset: int = 0
    size: int = 0
    """[bytes]"""
    sha256: str | None = None
    reason: str | None = None
    stage: Stage | None = None
    attempts: int = 1


def create(folder: str, recipe: FeatureRecipe) -> str:
    """The folder of a recipe's features below `folder`, made if it is not there."""
    place = storage.join(folder, recipe.key)
    said = storage.join(place, RECIPE_FILE)
    if not storage.exists(said):
        storage.write_bytes(said, json.dumps(recipe.model_dump(), indent=1).encode())
    return place


def write_shard(
    folder: str, videos: Sequence[tuple[str, str | None, np.ndarray]], dtype: DType
) -> tuple[list[IndexEntry], float, float]:
    """Write one shard.

    Args:
        folder: of the recipe.
        videos: (place, version, features) each; float32 (frames, patches, width).
        dtype: in which they are stored.

    Returns:
        (what the index is to say, lost, all): the sums of squares of what rounding took from the values, and of these.
    """
    shard = f"shard-{secrets.token_hex(8)}.bin"
    pieces: list[bytes] = []
    stored, offset, lost, whole = [], 0, 0.0, 0.0
    for uri, version, x_FPD in videos:
        piece = pack(x_FPD, dtype)
        rounded = from_bf16(unpack(piece, x_FPD.shape, dtype))
        lost += float(np.square(rounded - x_FPD).sum())
        whole += float(np.square(x_FPD).sum())
        digest = hashlib.sha256(piece).hexdigest()
        stored.append(IndexEntry(uri, version, len(x_FPD), shard, offset, len(piece), digest))
        pieces.append(piece)
        offset += len(piece)
    if pieces:
        storage.write_bytes(storage.join(folder, shard), b"".join(pieces))
    return stored, lost, whole


def write_index(folder: str, stored: Iterable[IndexEntry]) -> None:
    """Write down some videos; from now on readers find them."""
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([asdict(one) for one in stored], INDEX), buffer, compression="zstd")
    name = f"index-{time.time_ns():020d}-{secrets.token_hex(4)}.parquet"
    storage.write_bytes(storage.join(folder, name), buffer.getvalue())


class FeatureCache:
    """The features in a folder. What was written later than this was made is not seen.

    Attributes:
        folder: of the recipe.
        recipe: how they were made.
    """

    def __init__(self, folder: str) -> None:
        """Open a folder that `create` made.

        Raises:
            BadConfig: there are no features in it, or none that this version reads.
        """
        self.folder = storage.absolute(folder).rstrip("/")
        try:
            said = json.loads(storage.read_bytes(storage.join(self.folder, RECIPE_FILE)))
            if said.get("format") != FORMAT:
                raise ValueError(f"its format is {said.get('format')}, and this version reads {FORMAT}")
            self.recipe = FeatureRecipe.model_validate(said)
            if self.recipe.key != self.folder.rpartition("/")[2]:
                raise ValueError(f"{RECIPE_FILE} is not the one that the folder is named after")
            names = storage.names_in(self.folder)
            indices = [name for name in names if name.startswith("index-")]
            with ThreadPoolExecutor(READERS) as threads:
                tables = list(threads.map(self._read_index, indices))
        except (OSError, ValueError, ValidationError, AttributeError) as error:
            why = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise BadConfig(
                f"data.features: {folder}: no features can be read there: {why}; give the folder that jobs/encode.py "
                "printed"
            ) from error
        self._shards = {name for name in names if name.startswith("shard-")}
        table = pa.concat_tables([*tables, INDEX.empty_table()])
        # By place, and of one place the latest last: a search needs no memory of its own, in no process.
        self._table = table.take(pc.sort_indices(table, [("uri", "ascending")])).combine_chunks()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": set()}

    def _read_index(self, name: str) -> pa.Table:
        return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.folder, name)))).cast(INDEX)

    def find(self, uri: str) -> IndexEntry | None:
        """What the index says of a video."""
        places = self._table["uri"]
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if places[middle].as_py() <= uri else (low, middle)
        if not low or places[low - 1].as_py() != uri:
            return None
        return IndexEntry(**self._table.slice(low - 1, 1).to_pylist()[0])

    def require(self, recipe: FeatureRecipe, uris: Iterable[str]) -> None:
        """Refuse features of another recipe, and such that lack some videos.

        Args:
            recipe: of the run; which encoder it has is not known yet, nor does it matter in which dtype they lie.
            uris: the videos that it will read.

        Raises:
            BadConfig: naming what differs, or how many are missing.
        """
        asked = recipe.model_copy(update={"encoder": self.recipe.encoder, "dtype": self.recipe.dtype})
        if different := self.recipe.differences(asked):
            raise BadConfig(
                f"data.features: {self.folder} and this run differ: {'; '.join(different)}; change the run, or make "
                "features for it with jobs/encode.py"
            )
        missing = [uri for uri in uris if self._found(uri) is None]
        if missing:
            raise BadConfig(
                f"data.features: {self.folder} lacks {len(missing)} videos of the manifests, {missing[0]} first; "
                f"{REENCODE_HINT}"
            )

    def __call__(self, uris: Sequence[str]) -> list[np.ndarray | Unreadable]:
        """Read features, in order: the bits of bfloat16, uint16 (frames, patches, width) each, or why there are none.

        Raises:
            BadFeatures: they must not be used.
            storage.Unavailable: the store cannot be used.
        """
        with ThreadPoolExecutor(READERS) as threads:
            return list(threads.map(self.read, uris))

    def read(self, uri: str) -> np.ndarray | Unreadable:
        """Read the features of one video, by one request for its version and one for its bytes.

        Raises:
            BadFeatures: there are none, they are damaged, or the video is another one now.
            storage.Unavailable: the store cannot be used.
        """
        stored = self.find(uri)
        if stored is None:
            raise BadFeatures(f"{uri}: {self.folder} has no features of it; {REENCODE_HINT}")
        if storage.version(split_time_range(uri)[0]) != stored.version:
            raise BadFeatures(f"{uri}: has changed, or gone, since it was encoded into {self.folder}; {REENCODE_HINT}")
        if stored.reason is not None:
            return Unreadable(stored.reason, stored.stage or "decode", stored.version, stored.attempts)
        shard = storage.join(self.folder, str(stored.shard))
        try:
            data = storage.read_bytes(shard, stored.offset, stored.offset + stored.size)
        except FileNotFoundError:
            raise BadFeatures(f"{uri}: its features are gone with {shard}; {REENCODE_HINT}") from None
        whole = stored.frames * self.recipe.frame_bytes
        if len(data) != whole or hashlib.sha256(data).hexdigest() != stored.sha256:
            raise BadFeatures(f"{uri}: its features are damaged: delete {shard}; then {REENCODE_HINT}")
        return unpack(data, (stored.frames, self.recipe.patches, self.recipe.width), self.recipe.dtype)

    def _found(self, uri: str) -> IndexEntry | None:
        """As `find`, but for a video whose shard was deleted. Asked of the object that was made, not of a copy."""
        stored = self.find(uri)
        return stored if stored and (stored.shard is None or stored.shard in self._shards) else None

    def has(self, uri: str, version: str | None) -> bool:
        """Whether a video need not be encoded; one that is unknown, was unreadable or has changed does."""
        stored = self._found(uri)
        return stored is not None and stored.reason is None and stored.version == version
