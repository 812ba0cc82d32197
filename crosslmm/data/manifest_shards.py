"""Prepared manifests: rows that were checked once, in Parquet files of small row groups, read when they are asked for.

A folder with `part-00000.parquet`, ..., `lengths-....parquet`, and `_prepared.json`, the seal, which is written last: a
folder without it is not finished. A row costs one request for its group, so that no process ever holds a manifest. What
a seal names never changes; a later seal names other files.
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
        "videos": pa.list_(pa.string()),  # relative to the manifest's folder where they lie in it
        "messages": pa.large_string(),  # JSON; large, so that a million conversations are one array
        "kind": pa.string(),
        "line": pa.int64(),  # of the manifest that it was made from, from 1
        "chars": pa.int32(),  # of all messages' texts
        "seconds": pa.list_(pa.float32()),  # duration of each video [s], 0 of an image, null where it is not known
    }
)
LENGTH_COLUMNS = ["chars", "seconds"]
"""Columns that say about how many tokens a row is; one file has those of all rows."""
SEAL = "_prepared.json"
GROUP_ROWS = 512
"""Rows of a row group: 50 to 100 kB on the wire."""
READERS = 8
"""Row groups that are fetched at once."""


def is_prepared(uri: str) -> bool:
    """Whether there is a sealed folder."""
    return storage.is_folder(uri) and storage.exists(storage.join(uri, SEAL))


def write_part(folder: str, number: int, records: pa.Table) -> dict[str, Any]:
    """Write one part, a table of `SCHEMA` -> what the seal says of it."""
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
    """Write what makes the parts a manifest.

    Args:
        folder: of the parts.
        parts: as `write_part` returned them, in order.
        lengths: the `LENGTH_COLUMNS` of all rows.
        about: how it was made, and what was left out.
    """
    data = to_bytes(lengths.select(LENGTH_COLUMNS))
    name = f"lengths-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.write_bytes(storage.join(folder, name), data)
    said = {
        "rows": sum(part["rows"] for part in parts),
        "group_rows": GROUP_ROWS,
        "lengths": name,
        "about": about,
        "parts": list(parts),
    }
    storage.write_bytes(storage.join(folder, SEAL), json.dumps(said, indent=1).encode())


def to_bytes(table: pa.Table, group_rows: int | None = None) -> bytes:
    """A table as a Parquet file."""
    buffer = io.BytesIO()
    # Statistics would be most of the footers, and nobody asks them.
    pq.write_table(table, buffer, row_group_size=group_rows, compression="zstd", write_statistics=False)
    return buffer.getvalue()


class PreparedTable:
    """The rows of a prepared manifest, read when they are asked for.

    Attributes:
        num_rows: of all parts.
        digest: sha256 of the seal, hex.
        about: how it was made, and what was left out.
        parts: what `write_part` returned for each, in order.
    """

    def __init__(self, folder: str) -> None:
        data = storage.read_bytes(storage.join(folder, SEAL))
        self.folder = folder
        self.digest = hashlib.sha256(data).hexdigest()
        said = json.loads(data)
        self.num_rows = int(said["rows"])
        self.about: dict[str, Any] = said["about"]
        self._group_rows = int(said["group_rows"])
        self._lengths: str = said["lengths"]
        self.parts: list[dict[str, Any]] = said["parts"]
        self._ends = np.cumsum([part["rows"] for part in self.parts])
        self._footers: dict[int, pq.FileMetaData] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_footers": {}}

    def take(self, indices: pa.Array) -> pa.Table:
        """Rows by their numbers from 0, in that order."""
        wanted = np.asarray(indices)
        part = np.searchsorted(self._ends, wanted, side="right")
        group, row = np.divmod(wanted - np.concatenate([[0], self._ends])[part], self._group_rows)
        places: dict[tuple[int, int], list[int]] = {}
        for place, key in enumerate(zip(part.tolist(), group.tolist(), strict=True)):
            places.setdefault(key, []).append(place)
        with ThreadPoolExecutor(min(READERS, max(len(places), 1))) as threads:
            groups = list(threads.map(self._group, places))
        taken = [found.take(pa.array(row[mine])) for found, mine in zip(groups, places.values(), strict=True)]
        order = np.argsort(np.concatenate([np.array(mine, np.int64) for mine in places.values()]))
        return pa.concat_tables(taken).take(pa.array(order))

    def lengths(self) -> pa.Table:
        """The `LENGTH_COLUMNS` of all rows."""
        return pq.read_table(io.BytesIO(storage.read_bytes(storage.join(self.folder, self._lengths))))

    def videos(self) -> pa.Table:
        """Which videos each row has, and how long they are; the conversations stay where they are."""

        def read(part: dict[str, Any]) -> pa.Table:
            with storage.open_read(storage.join(self.folder, part["name"])) as file:
                return pq.read_table(file, columns=["videos", "seconds"])

        with ThreadPoolExecutor(READERS) as threads:
            return pa.concat_tables(threads.map(read, self.parts))

    def _group(self, key: tuple[int, int]) -> pa.Table:
        """One row group, by one request for its bytes."""
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
    """The bytes of a file from `start` on, at their places in it."""

    def __init__(self, data: bytes, start: int, size: int) -> None:
        super().__init__()
        self._data, self._start, self._size, self._at = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int | None = -1) -> bytes:
        begin = self._at - self._start
        assert begin >= 0, "only one row group's bytes are here"
        found = self._data[begin:] if count is None or count < 0 else self._data[begin : begin + count]
        self._at += len(found)
        return found
