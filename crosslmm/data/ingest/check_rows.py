"""Check the rows of one chunk, and probe their videos, in a task; and compare the ids of all chunks."""

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from crosslmm.config import DataConfig
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.ingest import split
from crosslmm.data.ingest.media_files import MediaWriter
from crosslmm.data.ingest.preview import add_previews
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.ingest.summary import Summary
from crosslmm.data.manifest import manifest_errors
from crosslmm.data.manifest_shards import LENGTH_COLUMNS, SCHEMA
from crosslmm.data.quarantine import QuarantineEntry, escape_to_ascii
from crosslmm.data.row_schema import parse_rows
from crosslmm.data.rows.media import Embedded
from crosslmm.data.video.container import UnreadableVideo
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import HeaderReader
from crosslmm.data.video.probe import Probe
from crosslmm.data.video.timeline import clip_bounds
from crosslmm.lease import Fence

BATCH_ROWS = 4096
"""Rows that are checked together [rows]."""
INDEX = pa.schema(
    {"id": pa.uint64(), "line": pa.int64(), "kept": pa.bool_()}
    | {name: SCHEMA.field(name).type for name in LENGTH_COLUMNS}
)
"""Columns of a chunk's index: hash of the row's id, its line, whether a part contains it, and its `LENGTH_COLUMNS`."""

IN_MANIFEST = "in the manifest: "
"""Prefix of the name that stands for an embedded video while rows are only checked, so that no file is written. No
absolute path or URI begins with it."""

Waiting = tuple[dict[str, Any], QuarantineEntry]
"""A row with an unreadable video, and why the video is unreadable. `requeue` tries it again."""


@dataclass(frozen=True)
class IngestJob:
    """Settings that all tasks of a manifest share."""

    manifest: str
    """URI of the manifest."""
    target: str
    """Folder to write to; empty if rows are only checked."""
    plan: str
    """Key of the plan; summaries of other plans are ignored."""
    probe: bool
    """Whether to probe videos."""
    data: DataConfig
    """Limits of probing, and the roots that videos may lie in, the manifest's folder first."""
    ignored_keys: tuple[str, ...] = ()
    """Keys of rows that are ignored."""
    fence: Fence | None = None
    """Tells, before a write, whether the driver still owns the target; None if rows are only checked."""

    @property
    def memory_gib(self) -> float:
        """Memory that the processes of a task which reads videos may take together; 0 if it reads none [GiB]."""
        return self.data.decode_memory_gib if self.probe else 0.0


@dataclass
class CheckedBatch:
    """Rows of a chunk after the check."""

    records: list[dict[str, Any]]
    """Good rows, with the columns of `SCHEMA`."""
    rejected: list[tuple[int, str]]
    """(line, reason) of malformed rows."""
    waiting: list[Waiting]
    """Rows with an unreadable video."""
    probes: dict[str, Probe]
    """Headers of the videos that no earlier batch had, by URI."""


def check_chunk(job: IngestJob, chunk: Chunk) -> tuple[Summary, np.ndarray, np.ndarray]:
    """Check a chunk; return its counts, the hashes of its ids, uint64 (rows,), and their lines, int64 (rows,)."""
    summary, index = Summary(job.plan), [INDEX.empty_table()]
    for batch in check_batches(job, chunk):
        count_batch(summary, batch)
        add_previews(summary.previews, batch.records)
        index.append(index_of(batch))
    table = pa.concat_tables(index)
    return summary, table["id"].to_numpy(), table["line"].to_numpy()


def check_batches(job: IngestJob, chunk: Chunk, batch_rows: int = BATCH_ROWS) -> Iterator[CheckedBatch]:
    """Check the rows of a chunk and, if the job asks for it, probe their videos.

    Raises:
        BadManifest: the chunk cannot be read.
        storage.Unavailable: the store cannot be used.
    """
    first_line: dict[str, int] = {}
    probed: dict[str, Probe | VideoFailure] = {}
    store = MediaWriter(job.target) if job.target else _name_in_manifest
    with contextlib.ExitStack() as stack:
        header_reader = stack.enter_context(HeaderReader(job.data)) if job.probe else None
        for rows in _row_batches(job, chunk, batch_rows):
            records, rejected = parse_rows(
                rows, job.data.roots, first_line, manifest=job.manifest, ignored=job.ignored_keys, store=store
            )
            batch = CheckedBatch(records, [(line, escape_to_ascii(reason)) for line, reason in rejected], [], {})
            if header_reader:
                uris = dict.fromkeys(split_time_range(uri)[0] for record in records for uri in record["videos"])
                new = [uri for uri in uris if uri not in probed and not uri.startswith(IN_MANIFEST)]
                results = dict(zip(new, header_reader(new), strict=True))
                probed |= results
                batch.probes = {uri: result for uri, result in results.items() if isinstance(result, Probe)}
                batch.records, batch.waiting = add_durations(records, probed, job.manifest)
            yield batch


def _name_in_manifest(media: Embedded) -> str:
    return f"{IN_MANIFEST}{media.name}, {media.size:,} bytes"


def _row_batches(job: IngestJob, chunk: Chunk, batch_rows: int) -> Iterator[list[tuple[int, Any]]]:
    rows = split.read_rows(chunk, job.data.roots)
    while True:
        with manifest_errors(job.manifest):
            batch = list(itertools.islice(rows, batch_rows))
        if not batch:
            return
        yield batch


def add_durations(
    records: list[dict[str, Any]], probed: dict[str, Probe | VideoFailure], manifest: str
) -> tuple[list[dict[str, Any]], list[Waiting]]:
    """Add the durations of their videos to records; return these, and the rows with an unreadable video."""
    readable, waiting = [], []
    for record in records:
        seconds = {uri: _clip_seconds(uri, probed) for uri in record["videos"]}
        failure = next(((uri, result) for uri, result in seconds.items() if isinstance(result, VideoFailure)), None)
        if failure:
            row = {"manifest": manifest, "line": record["line"], "id": record["id"]}
            waiting.append((record, QuarantineEntry.from_row(row, *failure)))
        else:
            readable.append({**record, "seconds": [seconds[uri] for uri in record["videos"]]})
    return readable, waiting


def _clip_seconds(uri: str, probed: dict[str, Probe | VideoFailure]) -> float | VideoFailure | None:
    """Return the duration of the part of a video that `uri` names, 0 for an image [s]; None if it was not probed; or
    why it is unreadable."""
    file_uri, start, end = split_time_range(uri)
    if file_uri.startswith(IN_MANIFEST):
        return None
    result = probed[file_uri]
    if isinstance(result, VideoFailure):
        return result
    try:
        first, last = clip_bounds(start, end, result.seconds) if result.seconds else (0.0, 0.0)
    except UnreadableVideo as error:
        return VideoFailure(str(error), "check", result.version)
    return last - first


def count_batch(summary: Summary, batch: CheckedBatch) -> None:
    """Add a batch to the counts of its chunk."""
    summary.rows += len(batch.records)
    summary.reject(batch.rejected)
    summary.quarantined += len(batch.waiting)
    summary.videos += len(batch.probes)
    summary.seconds += sum(probe.seconds for probe in batch.probes.values())
    summary.count("unreadable", Counter(f"{entry.stage}: {entry.reason}" for _, entry in batch.waiting))
    summary.count("codecs", Counter(probe.codec for probe in batch.probes.values()))
    summary.count("sizes", Counter(f"{probe.width}x{probe.height}" for probe in batch.probes.values()))
    rows = [*batch.records, *(record for record, _ in batch.waiting)]
    summary.count("forms", Counter(record["form"] for record in rows))
    summary.count("unused", Counter(key for record in rows for key in sorted(record["unused"])))


def index_of(batch: CheckedBatch) -> pa.Table:
    """Return the rows of the chunk's index for a batch, ordered by line."""
    rows = [(record, True) for record in batch.records] + [(record, False) for record, _ in batch.waiting]
    rows.sort(key=lambda row: row[0]["line"])
    return pa.Table.from_pylist(
        [
            {**{name: row[name] for name in ("line", *LENGTH_COLUMNS)}, "id": _hash_id(row), "kept": kept}
            for row, kept in rows
        ],
        INDEX,
    )


def _hash_id(row: dict[str, Any]) -> int:
    """Return a number that rows with the same id share; a row of a form whose ids repeat shares it with none."""
    name = f"{row['id']}\0{row['line']}" if row["ids_repeat"] else row["id"]
    # The odds that any two of 20 million ids share a hash are 1 : 100,000.
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def find_duplicates(hashes: list[np.ndarray], lines: list[np.ndarray]) -> dict[int, list[tuple[int, int]]]:
    """Return, by chunk number, (line, first line with the same id) of each row whose id appeared before.

    Args:
        hashes: hashes of the ids of each chunk, uint64 (rows,).
        lines: lines of the rows of each chunk, int64 (rows,).
    """
    if not any(map(len, hashes)):
        return {}
    ends, ids, line = np.cumsum([len(chunk) for chunk in hashes]), np.concatenate(hashes), np.concatenate(lines)
    order = np.argsort(ids, kind="stable")
    is_first = np.concatenate([[True], np.diff(ids[order]) != 0])
    first = order[is_first][np.cumsum(is_first) - 1]
    duplicates: dict[int, list[tuple[int, int]]] = {}
    for row, earlier in sorted(zip(order[~is_first].tolist(), first[~is_first].tolist(), strict=True)):
        chunk = int(np.searchsorted(ends, row, side="right"))
        duplicates.setdefault(chunk, []).append((int(line[row]), int(line[earlier])))
    return duplicates
