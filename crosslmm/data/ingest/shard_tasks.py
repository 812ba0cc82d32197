"""Write the checked rows of one chunk; the functions run in Ray tasks.

A chunk's summary is written last, after all files that it names: a task that is killed starts over.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from crosslmm import storage
from crosslmm.data import manifest_shards
from crosslmm.data.ingest.check_rows import (
    BATCH_ROWS,
    INDEX,
    IngestJob,
    Waiting,
    check_batches,
    count_batch,
    index_of,
)
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.ingest.summary import Summary
from crosslmm.data.manifest_shards import SCHEMA
from crosslmm.data.video.frame_list import map_files
from crosslmm.data.video.probe import Probe

PART_ROWS = 65_536
"""Size of a part [rows]."""
PARTS_PER_CHUNK = 1000
"""Part numbers reserved for each chunk, so that a name shows its chunk; the upper half is for rewritten parts."""

PROBES = pa.schema(
    {
        "video": pa.string(),  # as in the rows
        "seconds": pa.float64(),
        "frames": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "codec": pa.string(),
        "rotation": pa.int32(),
        "keyframes": pa.int64(),
        "bytes": pa.int64(),
        "version": pa.string(),
    }
)
"""Columns of probes-*.parquet: `Probe` of each video."""
WAITING = SCHEMA.append(pa.field("entry", pa.string()))
"""Columns of waiting-*.parquet: a row with an unreadable video, and its line of quarantine.jsonl."""


def convert_chunk(
    job: IngestJob, number: int, chunk: Chunk, part_rows: int = PART_ROWS, batch_rows: int = BATCH_ROWS
) -> Summary:
    """Check a chunk and write its files, the summary last.

    Args:
        job: settings.
        number: number of the chunk.
        chunk: its rows.
        part_rows: largest part [rows].
        batch_rows: rows that are checked together [rows].
    """
    target, summary = job.target, Summary(job.plan)
    index, rejected, waiting, probes = [INDEX.empty_table()], bytearray(), [], []
    writer = _PartWriter(target, number * PARTS_PER_CHUNK, part_rows)
    for batch in check_batches(job, chunk, batch_rows):
        count_batch(summary, batch)
        index.append(index_of(batch))
        rejected += rejected_lines(batch.rejected)
        writer.add(records_table(batch.records, target))
        probes.append(probes_table(batch.probes, target))
        waiting.append(waiting_table(batch.waiting, target))
    summary.parts = writer.finish()
    summary.files = {"index": f"pieces/{number:05d}.parquet"}
    write_table(target, summary.files["index"], pa.concat_tables(index))
    if rejected:
        summary.files["rejected"] = f"pieces/{number:05d}.rejected.jsonl"
        storage.write_bytes(storage.join(target, summary.files["rejected"]), bytes(rejected))
    if summary.videos:
        summary.files["probes"] = f"probes-{number:05d}.parquet"
        write_table(target, summary.files["probes"], pa.concat_tables(probes))
    if summary.quarantined:
        summary.files["waiting"] = f"waiting-{number:05d}.parquet"
        write_table(target, summary.files["waiting"], pa.concat_tables(waiting))
    _write_summary(job, number, summary)
    return summary


def drop_rows(job: IngestJob, number: int, summary: Summary, duplicates: list[tuple[int, int]]) -> Summary:
    """Remove from a chunk the rows whose ids an earlier chunk has.

    The new files have new names, so that a killed task leaves the old ones intact.

    Args:
        job: settings.
        number: number of the chunk.
        summary: summary of the chunk before the removal.
        duplicates: (line, earlier line with the same id) of each row to remove.
    """
    target = job.target
    lines = pa.array([line for line, _ in duplicates], pa.int64())

    def remaining_rows(name: str, schema: pa.Schema) -> pa.Table:
        table = manifest_shards.read_table(target, name, schema)
        return table.filter(pc.invert(pc.is_in(table["line"], lines)))

    writer = _PartWriter(target, number * PARTS_PER_CHUNK + PARTS_PER_CHUNK // 2, PART_ROWS)
    for part in summary.parts:
        writer.add(remaining_rows(part["name"], SCHEMA))
    rejected = duplicate_reasons(duplicates)
    result = replace(summary, parts=writer.finish(), files=dict(summary.files))
    result.reject(rejected)
    result.rows = sum(part["rows"] for part in result.parts)
    result.files["index"] = f"pieces/{number:05d}-1.parquet"
    write_table(target, result.files["index"], remaining_rows(summary.files["index"], INDEX))
    if name := result.files.pop("waiting", None):
        waiting = remaining_rows(name, WAITING)
        result.quarantined = waiting.num_rows
        if waiting.num_rows:
            result.files["waiting"] = f"waiting-{number:05d}_1.parquet"
            write_table(target, result.files["waiting"], waiting)
    before = storage.read_bytes(storage.safe_join(target, summary.files["rejected"])) if summary.rejected else b""
    result.files["rejected"] = f"pieces/{number:05d}-1.rejected.jsonl"
    data = sort_by_line(before + rejected_lines(rejected))
    storage.write_bytes(storage.join(target, result.files["rejected"]), data)
    _write_summary(job, number, result)
    return result


class _PartWriter:
    """Writes records as parts of up to `part_rows` rows, numbered from `first`."""

    def __init__(self, target: str, first: int, part_rows: int) -> None:
        self.target, self.next, self.part_rows = target, first, part_rows
        self.parts: list[dict[str, Any]] = []
        self._table = SCHEMA.empty_table()

    def add(self, table: pa.Table) -> None:
        self._table = pa.concat_tables([self._table, table])
        while self._table.num_rows >= self.part_rows:
            self._write(self._table.slice(0, self.part_rows))
            self._table = self._table.slice(self.part_rows)

    def finish(self) -> list[dict[str, Any]]:
        if self._table.num_rows:
            self._write(self._table)
        return self.parts

    def _write(self, table: pa.Table) -> None:
        self.parts.append(manifest_shards.write_part(self.target, self.next, table))
        self.next += 1


def records_table(records: Sequence[dict[str, Any]], target: str) -> pa.Table:
    """Return records as a table of `SCHEMA`, with URIs of videos relative to `target`."""
    relative = [{**record, "videos": [relative_to(video, target) for video in record["videos"]]} for record in records]
    return pa.Table.from_pylist(relative, SCHEMA)


def probes_table(probes: dict[str, Probe], target: str) -> pa.Table:
    """Return the headers of videos as a table of `PROBES`, with URIs relative to `target`."""
    rows = [{"video": relative_to(uri, target), **asdict(probe)} for uri, probe in probes.items()]
    return pa.Table.from_pylist(rows, PROBES)


def waiting_table(rows: Sequence[Waiting], target: str) -> pa.Table:
    """Return rows with an unreadable video as a table of `WAITING`."""
    entries = pa.array([json.dumps(entry.to_dict()) for _, entry in rows], pa.string())
    return records_table([record for record, _ in rows], target).append_column("entry", entries).cast(WAITING)


def write_table(target: str, name: str, table: pa.Table) -> None:
    """Write a table as the Parquet file `name` of the folder `target`."""
    storage.write_bytes(storage.safe_join(target, name), manifest_shards.to_bytes(table))


def relative_to(video: str, folder: str) -> str:
    """Return a video's address with its files relative to a folder if they lie in it, so that both can be moved
    together; other files as they are."""
    return map_files(video, lambda file: _relative_file(file, folder))


def _relative_file(uri: str, folder: str) -> str:
    relative = uri.removeprefix(f"{folder}/")
    return relative if storage.resolve(folder, relative) == uri else uri


def duplicate_reasons(duplicates: list[tuple[int, int]]) -> list[tuple[int, str]]:
    """Return (line, reason) of rows that have the id of an earlier one, from (line, earlier line)."""
    return [(line, f"its id is also on line {earlier}") for line, earlier in duplicates]


def rejected_lines(rejected: Iterable[tuple[int, str]]) -> bytes:
    """Return malformed rows, (line, reason) each, as lines of rejected.jsonl."""
    return b"".join(json.dumps({"line": line, "reason": reason}).encode() + b"\n" for line, reason in rejected)


def sort_by_line(lines: bytes) -> bytes:
    """Return lines of rejected.jsonl sorted by line number."""
    return b"".join(sorted(lines.splitlines(keepends=True), key=lambda line: int(json.loads(bytes(line))["line"])))


def _write_summary(job: IngestJob, number: int, summary: Summary) -> None:
    """Write the summary of a chunk, which makes its files count."""
    if job.fence:
        job.fence.require()
    storage.write_bytes(storage.join(job.target, f"pieces/{number:05d}.json"), json.dumps(asdict(summary)).encode())
