"""Prepared manifests: checked rows in Parquet files with small row groups, read on demand.

A prepared manifest is a folder of `part-00000.parquet`, ..., `lengths-....parquet` and `_prepared.json`, the seal. The
seal is written last: a folder without one is incomplete. Reading a row costs one request for its row group, so no
process ever holds a whole manifest. Files that a seal names never change; a later seal names other files.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from crosslmm import storage

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
SEAL = "_prepared.json"
"""Name of the seal: lists the parts, with their sizes and digests."""
GROUP_ROWS = 512
"""Size of a row group [rows]; 50 to 100 kB on the wire."""
CONCURRENT_READS = 8
"""Row groups or files that are fetched at the same time."""


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

    def __init__(self, folder: str) -> None:
        data = storage.read_bytes(storage.join(folder, SEAL))
        self.folder = folder
        self.digest = hashlib.sha256(data).hexdigest()
        content = json.loads(data)
        self.num_rows = int(content["rows"])
        self.about: dict[str, Any] = content["about"]
        self._group_rows = int(content["group_rows"])
        self._lengths: str = content["lengths"]
        self.parts: list[dict[str, Any]] = content["parts"]
        self._ends = np.cumsum([part["rows"] for part in self.parts])
        self._footers: dict[int, pq.FileMetaData] = {}

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
        """Read the `LENGTH_COLUMNS` of all rows."""
        return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.folder, self._lengths))))

    def videos(self) -> pa.Table:
        """Read the columns `videos` and `seconds` of all rows, but not their conversations."""

        def read(part: dict[str, Any]) -> pa.Table:
            with storage.open_read(storage.join(self.folder, part["name"])) as file:
                return pq.read_table(file, columns=["videos", "seconds"])

        with ThreadPoolExecutor(CONCURRENT_READS) as threads:
            return pa.concat_tables(threads.map(read, self.parts))

    def _read_group(self, key: tuple[int, int]) -> pa.Table:
        """Read row group (part, group) by one request for its bytes."""
        number, group = key
        part = self.parts[number]
        uri = storage.join(self.folder, part["name"])
        if number not in self._footers:
            tail = storage.read_bytes(uri, part["bytes"] - part["footer"], part["bytes"])
            self._footers[number] = pq.read_metadata(io.BytesIO(tail))
        footer = self._footers[number]
        chunks = [footer.row_group(group).column(i) for i in range(footer.num_columns)]
        begins = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        end = max(b + chunk.total_compressed_size for b, chunk in zip(begins, chunks, strict=True))
        window = _Window(storage.read_bytes(uri, min(begins), end), min(begins), part["bytes"])
        return pq.ParquetFile(window, metadata=footer).read_row_group(group, use_threads=False)


class _Window(io.RawIOBase):
    """A file of `size` bytes of which only `data`, from offset `start` on, can be read."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        super().__init__()
        self._data, self._start, self._size, self._offset = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        return self._offset

    def read(self, count: int | None = -1) -> bytes:
        begin = self._offset - self._start
        assert begin >= 0, "only the bytes of one row group were fetched"
        data = self._data[begin:] if count is None or count < 0 else self._data[begin : begin + count]
        self._offset += len(data)
        return data
