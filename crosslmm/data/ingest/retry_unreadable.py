"""Retry unreadable videos: those in a run's quarantine.jsonl, or those of the waiting rows of a prepared folder."""

import codecs
import contextlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from crosslmm import lease, run_folder, storage
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.ingest import ray_tasks, split
from crosslmm.data.ingest.check_rows import IngestJob, add_durations
from crosslmm.data.ingest.plan import QUARANTINE_FILE, split_in_tasks
from crosslmm.data.ingest.shard_tasks import WAITING, probes_table, records_table, waiting_table, write_table
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.manifest import BadManifest, manifest_errors
from crosslmm.data.manifest_shards import LENGTH_COLUMNS
from crosslmm.data.quarantine import QuarantineEntry, escape_to_ascii, parse_entry
from crosslmm.data.row_schema import resolve_video
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.probe import Probe
from crosslmm.progress import Progress
from crosslmm.text import first_error

QUARANTINE_CHUNK_BYTES = 256 * 2**10
"""Size of the part of a quarantine.jsonl that one task retries [bytes]."""
IMAGE_SIZE = 64
"""Side of the frames that are decoded to test a video [px]."""
MAX_LOGGED_ROWS = 100
"""Most rows that are logged as readable now; the others are only counted [rows]."""

log = logging.getLogger(__name__)


@dataclass
class RetryResult:
    """Result of retrying some rows."""

    readable: list[tuple[str, int, str]] = field(default_factory=list)
    """Manifest, line and id of rows that can be read now."""
    entries: bytes = b""
    """Lines of quarantine.jsonl of rows that still cannot be read."""
    unreadable: int = 0
    """Number of these rows."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Descriptions of new parts."""
    lengths: pa.Table | None = None
    """`LENGTH_COLUMNS` of the rows in new parts."""
    waiting: str | None = None
    """Name of the file with the rows that still wait, if there are any."""
    probes: list[str] = field(default_factory=list)
    """Names of new files of probes."""


def requeue(place: str, data: DataConfig) -> dict[str, Any]:
    """Retry unreadable videos; return the counts that the job prints.

    Args:
        place: quarantine.jsonl of a run, or a prepared folder.
        data: limits, and how videos are decoded.

    Raises:
        BadManifest, BadConfig: `place` is neither.
        IngestError, storage.Unavailable: it stopped; seal and quarantine.jsonl are unchanged, but attempts may be
            counted.
        lease.FolderInUse, lease.LeaseLost: a job that runs owns the folder, or has taken it over.
    """
    uri = storage.absolute(place.rstrip("/"))
    with manifest_errors(place):
        prepared = manifest_shards.is_prepared(uri)
        if not prepared and storage.is_folder(uri):
            raise BadManifest(f"{place}: is not a prepared folder; if a conversion was interrupted, run it again")
        if not prepared:
            storage.size_and_version(uri)  # raises if it is missing
        owned = uri if prepared else run_folder.owned_folder(storage.parent(uri))
        with lease.claim(owned, "requeue", "wait until it has ended").take() as fence:
            results = (_requeue_folder if prepared else _requeue_quarantine)(uri, data, fence)
    readable = [row for result in results for row in result.readable]
    for manifest, line, name in readable[:MAX_LOGGED_ROWS]:
        log.info("readable now: %s line %d (%s)", manifest, line, name)
    if len(readable) > MAX_LOGGED_ROWS:
        log.info("and %d more", len(readable) - MAX_LOGGED_ROWS)
    unreadable = sum(result.unreadable for result in results)
    return {"requeued": uri, "readable": len(readable), "unreadable": unreadable}


def _requeue_quarantine(uri: str, data: DataConfig, fence: lease.Fence) -> list[RetryResult]:
    """Decode the videos in a quarantine.jsonl, and remove the lines of those that can be read."""
    chunks = split_in_tasks([uri], QUARANTINE_CHUNK_BYTES)
    results = _run_retries(retry_entries, {number: (data, chunk) for number, chunk in enumerate(chunks)}, data)
    fence.require()
    storage.write_bytes(uri, b"".join(result.entries for result in results))
    return results


def _requeue_folder(target: str, data: DataConfig, fence: lease.Fence) -> list[RetryResult]:
    """Probe the videos of a folder's waiting rows, and seal the folder with those that can be read as new parts."""
    data = data.model_copy(update={"roots": [target, *map(storage.absolute, data.roots)]})
    table = manifest_shards.PreparedTable(target, data.roots)
    about = table.about
    numbers = [int(number) for part in table.parts for number in re.findall(r"\d{1,15}", part["name"])[:1]]
    first = max(numbers, default=0) + 1
    job = IngestJob(about["made_from"], target, "", True, data)
    names: list[str] = about["waiting"]
    results = _run_retries(retry_waiting, {n: (job, first + n, name) for n, name in enumerate(names)}, data)
    parts = [part for result in results for part in result.parts]
    fence.require()
    if parts:
        lengths = pa.concat_tables([table.lengths(), *(result.lengths for result in results if result.lengths)])
        about = about | {
            "quarantined": sum(result.unreadable for result in results),
            "waiting": [result.waiting for result in results if result.waiting],
            "probes": [*about["probes"], *(name for result in results for name in result.probes)],
        }
        manifest_shards.seal(target, [*table.parts, *parts], lengths, about)
    storage.write_chunks(storage.join(target, QUARANTINE_FILE), (result.entries for result in results))
    return results


def _run_retries(function: Any, calls: dict[int, tuple[Any, ...]], data: DataConfig) -> list[RetryResult]:
    """Run `function` over the calls in tasks; return the results in order."""
    results: dict[int, RetryResult] = {}
    readable = unreadable = 0
    with Progress(log, "retrying", len(calls), "chunk") as progress:
        for number, result in ray_tasks.run_tasks(function, calls, data.decode_memory_gib):
            results[number] = result
            readable, unreadable = readable + len(result.readable), unreadable + result.unreadable
            progress.update(len(results), f"{readable:,} readable now  {unreadable:,} unreadable")
    return [results[number] for number in sorted(results)]


def retry_waiting(job: IngestJob, number: int, name: str) -> RetryResult:
    """Probe the videos of the waiting rows in the file `name`, and write rows that can be read as part `number`."""
    target = job.target
    data = job.data.model_copy(update={"roots": [target, *job.data.roots]})
    records, attempts = _read_waiting(target, name, data.roots)
    uris = list(dict.fromkeys(split_time_range(uri)[0] for record in records for uri in record["videos"]))
    with HeaderReader(data) as header_reader:
        probed = dict(zip(uris, header_reader(uris), strict=True))
    readable, waiting = add_durations(records, probed, job.manifest)
    waiting = [(row, replace(entry, attempts=entry.attempts + attempts.get(entry.line, 0))) for row, entry in waiting]
    result = RetryResult(
        readable=[
            (escape_to_ascii(job.manifest), record["line"], escape_to_ascii(record["id"])) for record in readable
        ],
        entries=b"".join(json.dumps(entry.to_dict()).encode() + b"\n" for _, entry in waiting),
        unreadable=len(waiting),
    )
    if readable:
        table = records_table(readable, target)
        result.parts = [manifest_shards.write_part(target, number, table)]
        result.lengths = table.select(LENGTH_COLUMNS)
        probes = {uri: probe for uri, probe in probed.items() if isinstance(probe, Probe)}
        result.probes = [f"probes-{number:05d}_1.parquet"]
        write_table(target, result.probes[0], probes_table(probes, target))
    if waiting:
        # A new name if rows have left the file, because the current seal still names the old one.
        result.waiting = f"waiting-{number:05d}_2.parquet" if readable else name
        write_table(target, result.waiting, waiting_table(waiting, target))
    return result


def _read_waiting(target: str, name: str, roots: Sequence[str]) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """Return the waiting rows in the file `name`, with absolute URIs of their videos, and the attempts by line.

    Raises:
        BadManifest: a row names a video outside of the roots, or its entry is damaged.
    """
    records: list[dict[str, Any]] = []
    attempts: dict[int, int] = {}
    for row in manifest_shards.read_table(target, name, WAITING, roots).to_pylist():
        try:
            attempts[row["line"]] = parse_entry(row.pop("entry"))["attempts"]
            records.append({**row, "videos": [resolve_video(video, roots) for video in row["videos"]]})
        except ValueError as error:
            raise BadManifest(f"{target}: {name}: row {len(records) + 1}: {first_error(error)}") from None
    return records, attempts


def retry_entries(data: DataConfig, chunk: Chunk) -> RetryResult:
    """Decode the videos that some lines of a run's quarantine.jsonl name.

    Args:
        data: limits, and further folders that the videos may lie in besides the file's own.
        chunk: lines of the file.

    Raises:
        BadManifest: a line does not belong in a quarantine.jsonl, or names a video outside of the roots.
    """
    result, remaining = RetryResult(), []
    roots = [storage.parent(chunk.uri), *map(storage.absolute, data.roots)]
    with Decoder(data.model_copy(update={"roots": roots}), IMAGE_SIZE) as decoder:
        for number, line in split.read_rows(chunk):
            try:
                entry = parse_entry(line)
            except ValueError as error:
                reason = f"is not a line of a quarantine.jsonl: {first_error(error)}"
                raise BadManifest(f"{chunk.uri}: line {number} {reason}") from None
            if entry["stage"] == "process":  # the row is at fault, not its video
                remaining.append(line.rstrip(b"\n") + b"\n")
                continue
            try:
                uri = resolve_video(entry["uri"], roots)
            except ValueError as error:
                raise BadManifest(f"{chunk.uri}: line {number}: {error}") from None
            row = {"manifest": entry["manifest"], "line": entry["line"], "id": entry["id"]}
            video = decoder([uri])[0]
            if isinstance(video, VideoFailure) and video.stage == "read" and "\\" in uri:
                # In quarantine.jsonl, names that are not printable ASCII are escaped.
                with contextlib.suppress(ValueError):
                    video = decoder([resolve_video(codecs.decode(uri, "unicode_escape"), roots)])[0]
            if isinstance(video, VideoFailure):
                failure = replace(video, attempts=entry["attempts"] + video.attempts)
                updated = {**entry, **QuarantineEntry.from_row(row, entry["uri"], failure).to_dict()}
                remaining.append(json.dumps(updated).encode() + b"\n")
            else:
                result.readable.append(
                    (escape_to_ascii(str(row["manifest"])), row["line"], escape_to_ascii(str(row["id"])))
                )
    result.entries, result.unreadable = b"".join(remaining), len(remaining)
    return result
