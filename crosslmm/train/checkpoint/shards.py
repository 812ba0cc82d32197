"""The tensors of a checkpoint in storage: one safetensors file per rank, and an index of all of them.

    rank-00000.safetensors      rows of every sharded tensor that rank 0 saves, and all others
    rank-00001.safetensors      rows of every sharded tensor that rank 1 saves
    index.json                  type and shape of each tensor; file, rows, position and sha256 of each of its chunks

All of it is plain data, so reading a checkpoint runs no code. Each chunk is verified in the memory from which it is
loaded. Tensors are sharded along their first dimension, as FSDP2 does it. With hybrid sharding, the replicas of a shard
save a part of it each. So any number of ranks can read what any other number has written, with any number of shards.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any

import torch
from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from crosslmm import storage
from crosslmm.run_folder import CHECKPOINT_INDEX_FILE, SHARD_FILE
from crosslmm.train.checkpoint.seals import BAD_FILE_ERRNOS, Checkpoint
from crosslmm.train.distributed.parallel import shard_rows

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types by their names in safetensors."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ_THREADS = 16
"""Chunks that a rank reads at the same time; most are small, and a store takes tens of milliseconds for each."""
MAX_SMALL_FILE_BYTES = 2**30
"""Largest index or configuration that is read [bytes]; an index takes about 150 bytes for each chunk."""
PIECE_BYTES = 2**24
"""A chunk is written, read and hashed in pieces of this size [bytes]."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one rank writes of a tensor."""

    rows: torch.Tensor
    """The rows, in CPU memory and contiguous; a tensor without dimensions counts as one row."""
    first_row: int
    """Position of the first one in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    sharded: bool
    """Whether its rows are spread over the ranks; otherwise rank 0 writes all of them."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a tensor in a file."""

    file: str
    first_row: NonNegativeInt
    rows: NonNegativeInt
    offset: NonNegativeInt
    """Position of the first byte in the file."""
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A tensor in the index."""

    dtype: str
    """Name in safetensors."""
    shape: tuple[NonNegativeInt, ...]
    sharded: bool
    chunks: list[Chunk]

    @property
    def rows(self) -> int:
        """Number of rows; a tensor without dimensions has one."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Size of a row [bytes]."""
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


Index = dict[str, Entry]
"""Entries by the tensors' names."""
_INDEX = TypeAdapter(Index)


class Damaged(Exception):
    """A checkpoint is not what was written; the message names the file."""


def write_shard(uri: str, rank: int, parts: Mapping[str, Part]) -> tuple[tuple[int, str], Index]:
    """Write a rank's file.

    Args:
        uri: folder of the checkpoint.
        rank: this rank's.
        parts: its parts of the tensors, by name; those without rows are left out.

    Returns:
        Size [bytes] and sha256 of the file, and index entries that have the rank's chunks alone.

    Raises:
        OSError: the file cannot be written.
    """
    parts = {name: part for name, part in parts.items() if part.rows.numel()}
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, part in parts.items():
        end = offset + part.rows.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[part.rows.dtype],
            "shape": list(part.rows.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data
    start = 8 + len(text)
    name_of_file, of_file, index = SHARD_FILE.format(rank), hashlib.sha256(), {}
    size = start + offset

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name, part in parts.items():
            of_chunk = hashlib.sha256()
            for piece in _pieces(part.rows):
                of_chunk.update(piece)
                yield piece
            rows = len(part.rows) if part.rows.ndim else 1
            position = start + header[name]["data_offsets"][0]
            chunk = Chunk(name_of_file, part.first_row, rows, position, of_chunk.hexdigest())
            index[name] = Entry(DTYPE_NAMES[part.rows.dtype], part.shape, part.sharded, [chunk])

    def hashed() -> Iterator[bytes]:
        for piece in pieces():
            of_file.update(piece)
            yield piece

    storage.write_chunks(storage.join(uri, name_of_file), hashed())
    return (size, of_file.hexdigest()), index


def _pieces(tensor: torch.Tensor) -> Iterator[bytes]:
    """Yield the bytes of a tensor."""
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES].tobytes()


def write_index(uri: str, indexes: list[Index]) -> tuple[int, str]:
    """Write the index of a checkpoint.

    Args:
        uri: folder of the checkpoint.
        indexes: what `write_shard` returned, by rank.

    Returns:
        Size [bytes] and sha256 of the file.

    Raises:
        OSError: the file cannot be written.
    """
    merged: Index = {}
    for index in indexes:
        for name, entry in index.items():
            merged.setdefault(name, Entry(entry.dtype, entry.shape, entry.sharded, [])).chunks.extend(entry.chunks)
    data = _INDEX.dump_json(merged)
    storage.write_bytes(storage.join(uri, CHECKPOINT_INDEX_FILE), data)
    return len(data), hashlib.sha256(data).hexdigest()


def index_to_json(index: Index) -> object:
    """Return the index as plain data for `gather_json`."""
    return _INDEX.dump_python(index, mode="json")


def index_from_json(data: object) -> Index:
    """Return the index that `index_to_json` made into plain data."""
    return _INDEX.validate_python(data)


def read(
    checkpoint: Checkpoint, shard: int, shards: int, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, torch.Tensor]:
    """Read a shard's rows of the tensors, and verify every chunk they are in.

    Args:
        checkpoint: from `seals`, written by any number of ranks.
        shard: whose rows to read.
        shards: number of shards into which the rows are split now.
        wanted: tells by name which tensors to read.

    Returns:
        Tensors in CPU memory, by name: the shard's rows of the sharded ones, and the others whole.

    Raises:
        Damaged: something is not what was written.
        storage.Unavailable: the store does not answer.
    """
    tensors: dict[str, torch.Tensor] = {}
    index = read_index(checkpoint)
    with ThreadPoolExecutor(READ_THREADS) as threads:
        reads: list[Future[None]] = []
        for name, entry in index.items():
            if not wanted(name):
                continue
            first, end = shard_rows(entry.rows, shard, shards) if entry.sharded else (0, entry.rows)
            shape = (end - first, *entry.shape[1:]) if entry.shape else ()
            tensors[name] = torch.empty(shape, dtype=DTYPES[entry.dtype])
            target = tensors[name].reshape(-1).view(torch.uint8)
            for chunk in entry.chunks:
                if chunk.first_row < end and first < chunk.first_row + chunk.rows:
                    shift = (chunk.first_row - first) * entry.row_bytes
                    read_chunk = storage.keep_policy(_read_chunk)
                    reads.append(threads.submit(read_chunk, checkpoint, chunk, entry.row_bytes, target, shift))
        try:
            for one in reads:
                one.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    return tensors


def _read_chunk(checkpoint: Checkpoint, chunk: Chunk, row_bytes: int, target: torch.Tensor, shift: int) -> None:
    """Verify a chunk, and copy its bytes to `target`, where its first one has the position `shift`.

    Positions before the start and after the end of `target` belong to other shards.
    """
    digest, size = hashlib.sha256(), chunk.rows * row_bytes
    for start in range(0, size, PIECE_BYTES):
        stop = min(start + PIECE_BYTES, size)
        data = _read_file(checkpoint, chunk.file, chunk.offset + start, chunk.offset + stop)
        digest.update(data)
        low, high = max(shift + start, 0), min(shift + start + len(data), len(target))
        if low < high:
            source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            target[low:high] = source[low - shift - start : high - shift - start]
    if digest.hexdigest() != chunk.sha256:
        raise Damaged(f"{chunk.file} is not what was written (sha256)")


def read_index(checkpoint: Checkpoint) -> Index:
    """Read, verify and check the index of a checkpoint.

    Raises:
        Damaged: it is not what was written, or does not describe the files that the seal names.
        storage.Unavailable: the store does not answer.
    """
    data = read_verified(checkpoint, CHECKPOINT_INDEX_FILE)
    try:
        index = _INDEX.validate_json(data)
    except ValidationError as error:
        raise Damaged(f"{CHECKPOINT_INDEX_FILE}: {error.errors()[0]['msg']}") from None
    for name, entry in index.items():
        if entry.dtype not in DTYPES:
            raise Damaged(f"{CHECKPOINT_INDEX_FILE}: {name!a} has the unknown type {entry.dtype!a}")
        # A tensor without rows still has strides.
        if prod(max(side, 1) for side in entry.shape) * DTYPES[entry.dtype].itemsize > checkpoint.size:
            raise Damaged(f"{CHECKPOINT_INDEX_FILE}: {name!a} is larger than the files")
        row = 0
        for chunk in sorted(entry.chunks, key=lambda chunk: chunk.first_row):
            size, _ = checkpoint.files.get(chunk.file, (0, ""))
            if chunk.first_row != row or chunk.offset + chunk.rows * entry.row_bytes > size:
                raise Damaged(f"{CHECKPOINT_INDEX_FILE}: the chunks of {name!a} are not those of its files")
            row += chunk.rows
        if row != entry.rows:
            raise Damaged(f"{CHECKPOINT_INDEX_FILE}: the chunks of {name!a} are not those of its files")
    return index


def read_verified(checkpoint: Checkpoint, name: str) -> bytes:
    """Read a whole small file of a checkpoint, and compare it with the seal.

    Raises:
        Damaged: it is not what was written.
        storage.Unavailable: the store does not answer.
    """
    size, sha256 = checkpoint.files.get(name, (0, ""))
    if size > MAX_SMALL_FILE_BYTES:
        raise Damaged(f"{name} has {size} bytes, of at most {MAX_SMALL_FILE_BYTES}")
    data = _read_file(checkpoint, name, 0, size)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Damaged(f"{name} is not what was written (sha256)")
    return data


def _read_file(checkpoint: Checkpoint, name: str, start: int, end: int) -> bytes:
    """Read bytes [start, end) of a file of the checkpoint; fewer if the file ends before."""
    try:
        return storage.read_bytes(storage.safe_join(checkpoint.uri, name), start, end)
    except storage.BadLocation as error:
        raise Damaged(str(error)) from None
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        if error.errno not in BAD_FILE_ERRNOS:
            raise
        raise Damaged(f"{name} cannot be read: {error.strerror}") from error
