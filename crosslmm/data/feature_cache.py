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
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig, Section
from crosslmm.data.frame_sampling import excerpt
from crosslmm.data.video.decode_pool import BACKENDS, Stage, Unreadable

FORMAT = 1
"""Of the files; another one is another key."""
SAID, LEDGER = "features.json", "quarantine.jsonl"
READERS = 8
"""Videos whose features are fetched at once."""
BF16 = 2
"""Bytes of a value."""
REMEDY = "python jobs/encode.py, with this run's settings, makes anew what is missing or has changed"

DType = Literal["bf16", "int8"]


class FeatureSettings(Section):
    """Where features go, and in which form."""

    folder: str | None = None
    """Path or s3:// URI; features of each encoder and frame policy get a folder of their own in it. Null: `features` in
    `storage`."""
    dtype: DType = "bf16"
    """Two bytes a value, or int8: one, scaled by each token's largest value."""
    price: Annotated[float, Field(ge=0)] = 0.023
    """Of storage, for the estimate: an example of what a cloud asks [USD a GB and month]."""


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


class FeatureRecipe(Section):
    """What features depend on beside the video itself: the key of their folder."""

    num_frames: int
    sampling: str
    fps: float
    decoder: str
    """The library, never `auto`."""
    image_size: int
    """[px]"""
    precision: str
    """In which the encoder computes."""
    patches: int
    """Of a frame."""
    width: int
    """Of a token."""
    encoder: str
    """Digest of its weights and of what else it computes with."""
    dtype: DType
    """In which the features are stored."""
    format: int = FORMAT

    @classmethod
    def of(
        cls, data: DataConfig, image_size: int, precision: str, patches: int, width: int, encoder: str, dtype: DType
    ) -> "FeatureRecipe":
        """The recipe of a run's configuration."""
        return cls(
            num_frames=data.num_frames,
            sampling=data.sampling,
            fps=data.fps,
            decoder=BACKENDS[data.decoder].__name__.removeprefix("with_"),
            image_size=image_size,
            precision=precision,
            patches=patches,
            width=width,
            encoder=encoder,
            dtype=dtype,
        )

    @property
    def key(self) -> str:
        """Name of the folder: changes with every field."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def frame_bytes(self) -> int:
        """Of one frame's features in storage."""
        return stored_bytes(self.patches, self.width, self.dtype)

    def differences(self, other: "FeatureRecipe") -> list[str]:
        """`KEY THIS and OTHER` for each field that differs."""
        ours, theirs = self.model_dump(), other.model_dump()
        return [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]


def stored_bytes(patches: int, width: int, dtype: DType) -> int:
    """One frame's features in storage [bytes]: two a value, or one a value and two a token."""
    return patches * BF16 * width if dtype == "bf16" else patches * (width + 2)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16, ties to even, as its bits: uint16, same shape."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16's bits, uint16 -> float32, same shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(x_FPD: np.ndarray, dtype: DType) -> bytes:
    """Features, float32 (frames, patches, width) -> as they are stored. int8 is scaled by each token's largest value;
    the scales, float16, stand behind the tokens.

    Raises:
        ValueError: values that are not finite, or too large.
    """
    if dtype == "bf16":
        packed, finite = to_bf16(x_FPD).tobytes(), np.isfinite(x_FPD).all()
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            scale_FP1 = (np.abs(x_FPD).max(axis=-1, keepdims=True) / 127).astype(np.float16)
            steps = x_FPD / np.where(scale_FP1 > 0, scale_FP1, 1).astype(np.float32)
            packed = np.clip(np.rint(steps), -127, 127).astype(np.int8).tobytes() + scale_FP1.tobytes()
        finite = np.isfinite(scale_FP1).all()
    if not finite:
        raise ValueError(f"the encoder gave values that {dtype} does not hold: not finite, or too large")
    return packed


def unpack(data: bytes, shape: tuple[int, ...], dtype: DType) -> np.ndarray:
    """As stored -> the bits of bfloat16, uint16 `shape` (frames, patches, width).

    int8 is multiplied out here, so that whoever reads knows one form only.
    """
    if dtype == "bf16":
        return np.frombuffer(data, np.uint16).reshape(shape)
    tokens_FPD = np.frombuffer(data, np.int8, math.prod(shape)).reshape(shape)
    scale_FP1 = np.frombuffer(data, np.float16, offset=tokens_FPD.nbytes).reshape(*shape[:-1], 1)
    return to_bf16(tokens_FPD * scale_FP1.astype(np.float32))


@dataclass(frozen=True)
class Stored:
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
    said = storage.join(place, SAID)
    if not storage.exists(said):
        storage.write_bytes(said, json.dumps(recipe.model_dump(), indent=1).encode())
    return place


def write_shard(
    folder: str, videos: Sequence[tuple[str, str | None, np.ndarray]], dtype: DType
) -> tuple[list[Stored], float, float]:
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
        stored.append(Stored(uri, version, len(x_FPD), shard, offset, len(piece), digest))
        pieces.append(piece)
        offset += len(piece)
    if pieces:
        storage.write_bytes(storage.join(folder, shard), b"".join(pieces))
    return stored, lost, whole


def write_index(folder: str, stored: Iterable[Stored]) -> None:
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
            said = json.loads(storage.read_bytes(storage.join(self.folder, SAID)))
            if said.get("format") != FORMAT:
                raise ValueError(f"its format is {said.get('format')}, and this version reads {FORMAT}")
            self.recipe = FeatureRecipe.model_validate(said)
            if self.recipe.key != self.folder.rpartition("/")[2]:
                raise ValueError(f"{SAID} is not the one that the folder is named after")
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

    def find(self, uri: str) -> Stored | None:
        """What the index says of a video."""
        places = self._table["uri"]
        low, high = 0, len(places)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if places[middle].as_py() <= uri else (low, middle)
        if not low or places[low - 1].as_py() != uri:
            return None
        return Stored(**self._table.slice(low - 1, 1).to_pylist()[0])

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
                f"{REMEDY}"
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
            raise BadFeatures(f"{uri}: {self.folder} has no features of it; {REMEDY}")
        if storage.version(excerpt(uri)[0]) != stored.version:
            raise BadFeatures(f"{uri}: has changed, or gone, since it was encoded into {self.folder}; {REMEDY}")
        if stored.reason is not None:
            return Unreadable(stored.reason, stored.stage or "decode", stored.version, stored.attempts)
        shard = storage.join(self.folder, str(stored.shard))
        try:
            data = storage.read_bytes(shard, stored.offset, stored.offset + stored.size)
        except FileNotFoundError:
            raise BadFeatures(f"{uri}: its features are gone with {shard}; {REMEDY}") from None
        whole = stored.frames * self.recipe.frame_bytes
        if len(data) != whole or hashlib.sha256(data).hexdigest() != stored.sha256:
            raise BadFeatures(f"{uri}: its features are damaged: delete {shard}; then {REMEDY}")
        return unpack(data, (stored.frames, self.recipe.patches, self.recipe.width), self.recipe.dtype)

    def _found(self, uri: str) -> Stored | None:
        """As `find`, but for a video whose shard was deleted. Asked of the object that was made, not of a copy."""
        stored = self.find(uri)
        return stored if stored and (stored.shard is None or stored.shard in self._shards) else None

    def has(self, uri: str, version: str | None) -> bool:
        """Whether a video need not be encoded; one that is unknown, was unreadable or has changed does."""
        stored = self._found(uri)
        return stored is not None and stored.reason is None and stored.version == version
