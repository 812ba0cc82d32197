"""Prepared manifests: checked rows in Parquet files with small row groups, read on demand.

A prepared manifest is a folder of `part-00000.parquet`, ..., `lengths-....parquet` and `_prepared.json`, the seal. The
seal is written last: a folder without one is incomplete. Reading a row costs one request for its row group, so no
process ever holds a whole manifest. Parts and lengths that a seal names never change; a later seal names other files.
"""

import functools
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from crosslmm import storage
from crosslmm.storage.parquet import MAX_FILE_BYTES, BadParquet, ParquetFile
from crosslmm.text import first_error

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "videos": pa.list_(pa.string()),  # relative to the manifest's folder if they lie in it
        "messages": pa.large_string(),  # JSON; large, so that a million conversations are one array
        "kind": pa.string(),
        "line": pa.int64(),  # line of the manifest that it was made from, from 1
        "chars": pa.int32(),  # characters of all messages' texts
        "seconds": pa.list_(pa.float32()),  # duration of each video [s]; 0 for an image, null if unknown
    }
)
LENGTH_COLUMNS = ["chars", "seconds"]
"""Columns that a row's number of tokens is estimated from; one file has those of all rows."""
REQUIRED_COLUMNS = {"id", "videos", "messages", "line", "chars", "kept", "entry"}
"""Columns without nulls, wherever they occur."""
SEAL = "_prepared.json"
"""Name of the seal: lists the parts, with their sizes and digests."""
GROUP_ROWS = 512
"""Size of a row group [rows]; 50 to 100 kB on the wire."""
CONCURRENT_READS = 8
"""Row groups or files that are fetched at the same time."""
MAX_SEAL_BYTES = 16 * 2**20
"""Largest seal [bytes]: 80,000 parts."""

Count = Annotated[int, Field(ge=0, le=2**48)]


class BadSeal(ValueError):
    """A seal that does not describe its folder; one line, with the remedy."""


class Part(BaseModel):
    """A part as the seal describes it: name, rows, size of the file and of its footer [bytes], SHA-256."""

    name: str
    rows: Annotated[Count, Field(ge=1)]
    bytes: Count
    footer: Count
    sha256: str


class _About(BaseModel):
    """How a manifest was made: the fields that are read here."""

    model_config = ConfigDict(extra="allow")

    made_from: str = ""
    plan: str = ""
    probed: bool = False
    rejected: Count = 0
    quarantined: Count = 0
    videos: Count = 0
    hours: float = 0.0
    codecs: dict[str, int] = {}
    sizes: dict[str, int] = {}
    waiting: list[str] = []
    probes: list[str] = []


class _Seal(BaseModel):
    """The content of a seal."""

    rows: Count
    group_rows: Annotated[Count, Field(ge=1)]
    lengths: str
    about: _About
    parts: Annotated[list[Part], Field(min_length=1)]


def is_prepared(uri: str) -> bool:
    """Return whether `uri` is a complete prepared manifest."""
    return storage.is_folder(uri) and storage.exists(storage.join(uri, SEAL))


def write_part(folder: str, number: int, records: pa.Table) -> dict[str, Any]:
    """Write part number `number`, a table of `SCHEMA`, and return its description for the seal."""
    name = f"part-{number:05d}.parquet"
    data = to_bytes(records.cast(SCHEMA), GROUP_ROWS)
    storage.write_bytes(storage.join(folder, name), data)
    return {
        "name": name,
        "rows": records.num_rows,
        "bytes": len(data),
        "footer": int.from_bytes(data[-8:-4], "little") + 8,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def seal(folder: str, parts: Sequence[dict[str, Any]], lengths: pa.Table, about: dict[str, Any]) -> None:
    """Write the lengths and the seal: now the folder is a prepared manifest.

    Args:
        folder: folder of the parts.
        parts: what `write_part` returned for each, in order.
        lengths: the `LENGTH_COLUMNS` of all rows.
        about: how the manifest was made, and which rows were left out.
    """
    data = to_bytes(lengths.select(LENGTH_COLUMNS))
    name = f"lengths-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.write_bytes(storage.join(folder, name), data)
    content = {
        "rows": sum(part["rows"] for part in parts),
        "group_rows": GROUP_ROWS,
        "lengths": name,
        "about": about,
        "parts": list(parts),
    }
    storage.write_bytes(storage.join(folder, SEAL), json.dumps(content, indent=1).encode())


def to_bytes(table: pa.Table, group_rows: int | None = None) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    # Statistics would make up most of a footer, and no reader uses them.
    pq.write_table(table, buffer, row_group_size=group_rows, compression="zstd", write_statistics=False)
    return buffer.getvalue()


class PreparedTable:
    """The rows of a prepared manifest, read on demand.

    Attributes:
        num_rows: number of rows of all parts.
        digest: SHA-256 of the seal [hex].
        about: how the manifest was made, and which rows were left out.
        parts: what `write_part` returned for each part, in order.
    """

    def __init__(self, folder: str, roots: Sequence[str] = ()) -> None:
        """Read the seal.

        Args:
            folder: path or URI.
            roots: further folders that links may lead to.

        Raises:
            BadSeal: it is damaged, or names files outside of the folder.
            OSError: it cannot be read.
        """
        data = storage.read_at_most(storage.safe_join(folder, SEAL, roots), MAX_SEAL_BYTES)
        content = _parse_seal(data)
        self.folder, self._roots = folder, roots
        self.digest = hashlib.sha256(data).hexdigest()
        self.num_rows = content.rows
        self.about: dict[str, Any] = content.about.model_dump()
        self.parts: list[dict[str, Any]] = [part.model_dump() for part in content.parts]
        self._group_rows = content.group_rows
        self._lengths = content.lengths
        self._ends = np.cumsum([part["rows"] for part in self.parts])
        self._footers: dict[int, ParquetFile] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_footers": {}}

    def take(self, indices: pa.Array) -> pa.Table:
        """Return the rows of these indices (from 0), in this order; each row group is fetched once."""
        wanted = np.asarray(indices)
        part = np.searchsorted(self._ends, wanted, side="right")
        group, row = np.divmod(wanted - np.concatenate([[0], self._ends])[part], self._group_rows)
        positions: dict[tuple[int, int], list[int]] = {}  # (part, group) -> positions in `indices`
        for position, key in enumerate(zip(part.tolist(), group.tolist(), strict=True)):
            positions.setdefault(key, []).append(position)
        with ThreadPoolExecutor(min(CONCURRENT_READS, max(len(positions), 1))) as threads:
            groups = list(threads.map(self._read_group, positions))
        taken = [table.take(pa.array(row[at])) for table, at in zip(groups, positions.values(), strict=True)]
        order = np.argsort(np.concatenate([np.array(at, np.int64) for at in positions.values()]))
        return pa.concat_tables(taken).take(pa.array(order))

    def lengths(self) -> pa.Table:
        """Read the `LENGTH_COLUMNS` of all rows.

        Raises:
            BadParquet: the file is damaged, or is not about these rows.
        """
        schema = pa.schema([SCHEMA.field(name) for name in LENGTH_COLUMNS])
        table = read_table(self.folder, self._lengths, schema, self._roots)
        if table.num_rows != self.num_rows:
            raise BadParquet(f"{self._lengths} is not about the {self.num_rows} rows of the seal")
        return table

    def videos(self) -> pa.Table:
        """Read the columns `videos` and `seconds` of all rows, but not their conversations."""
        schema = pa.schema([SCHEMA.field(name) for name in ("videos", "seconds")])

        def read(part: dict[str, Any]) -> pa.Table:
            # A buffered reader reads on until it has all bytes that it is asked for.
            with io.BufferedReader(storage.open_read(self._address(part))) as file:  # type: ignore[type-var]
                return _require_values(ParquetFile(functools.partial(_read_range, file), part["bytes"]).read(schema))

        with ThreadPoolExecutor(CONCURRENT_READS) as threads:
            return pa.concat_tables(threads.map(read, self.parts))

    def _read_group(self, key: tuple[int, int]) -> pa.Table:
        """Read row group (part, group) by one request for its bytes."""
        number, group = key
        part = self.parts[number]
        uri = self._address(part)
        if number not in self._footers:
            self._footers[number] = ParquetFile.from_uri(uri, part["bytes"], part["footer"])
        file = self._footers[number]
        expected = min(self._group_rows, part["rows"] - group * self._group_rows)
        if file.rows(group) != expected:
            raise BadParquet(f"{part['name']} has other rows than the seal says")
        return _require_values(file.read(SCHEMA, [group]))

    def _address(self, part: dict[str, Any]) -> str:
        return storage.safe_join(self.folder, part["name"], self._roots)


def read_table(folder: str, name: str, schema: pa.Schema, roots: Sequence[str] = ()) -> pa.Table:
    """Read the columns of `schema` of a Parquet file in a folder, in one piece.

    Raises:
        BadParquet: it is damaged or too large.
        BadLocation: the name leads out of the folder.
        OSError: it cannot be read.
    """
    data = storage.read_at_most(storage.safe_join(folder, name, roots), MAX_FILE_BYTES)
    try:
        return _require_values(ParquetFile.from_bytes(data).read(schema))
    except BadParquet as error:
        raise BadParquet(f"{name}: {error}") from None


def _parse_seal(data: bytes) -> _Seal:
    try:
        seal = _Seal.model_validate(storage.parse_json(data))
        for name in [seal.lengths, *(part.name for part in seal.parts), *seal.about.waiting, *seal.about.probes]:
            storage.join("its folder", name)
        if seal.rows != sum(part.rows for part in seal.parts):
            raise ValueError(f"its parts do not have {seal.rows} rows")
    except ValueError as error:
        raise BadSeal(f"{SEAL} cannot be used: {first_error(error)}; convert the manifest again") from None
    return seal


def _require_values(table: pa.Table) -> pa.Table:
    """Return the table. Raise BadParquet if a column of `REQUIRED_COLUMNS` that it has contains nulls."""
    for name in REQUIRED_COLUMNS.intersection(table.column_names):
        column = table[name]
        if column.null_count or (name == "videos" and pc.list_flatten(column).null_count):
            raise BadParquet(f"its column {name} has nulls")
    return table


def _read_range(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)
