"""Retry unreadable videos: those in a run's quarantine.jsonl, or those of the waiting rows of a prepared folder."""

import codecs
import contextlib
import json
import logging
import re
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.ingest import ray_tasks, split
from crosslmm.data.ingest.check_rows import IngestJob, add_durations, manifest_errors
from crosslmm.data.ingest.plan import QUARANTINE_FILE, split_in_tasks
from crosslmm.data.ingest.shard_tasks import probes_table, records_table, waiting_table, write_table
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.manifest import BadManifest
from crosslmm.data.manifest_shards import LENGTH_COLUMNS
from crosslmm.data.quarantine import QuarantineEntry, to_printable
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.probe import Probe
from crosslmm.progress import Progress

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
        IngestError, storage.Unavailable: it stopped; nothing was changed.
    """
    uri = storage.absolute(place.rstrip("/"))
    with manifest_errors(place):
        if manifest_shards.is_prepared(uri):
            results = _requeue_folder(uri, data)
        elif storage.is_folder(uri):
            raise BadManifest(f"{place}: is a folder that is not prepared; convert finishes it")
        else:
            results = _requeue_quarantine(uri, data)
    readable = [row for result in results for row in result.readable]
    for manifest, line, name in readable[:MAX_LOGGED_ROWS]:
        log.info("readable now: %s line %d (%s)", manifest, line, name)
    if len(readable) > MAX_LOGGED_ROWS:
        log.info("and %d more", len(readable) - MAX_LOGGED_ROWS)
    unreadable = sum(result.unreadable for result in results)
    return {"requeued": uri, "readable": len(readable), "unreadable": unreadable}


def _requeue_quarantine(uri: str, data: DataConfig) -> list[RetryResult]:
    """Decode the videos in a quarantine.jsonl, and remove the lines of those that can be read."""
    storage.stamp_of(uri)  # raises if it is missing
    chunks = split_in_tasks(uri, QUARANTINE_CHUNK_BYTES)
    results = _run_retries(retry_entries, {number: (data, chunk) for number, chunk in enumerate(chunks)}, data)
    storage.write_bytes(uri, b"".join(result.entries for result in results))
    return results


def _requeue_folder(target: str, data: DataConfig) -> list[RetryResult]:
    """Probe the videos of a folder's waiting rows, and seal the folder with those that can be read as new parts."""
    table = manifest_shards.PreparedTable(target)
    about = table.about
    numbers = [int(re.findall(r"\d+", part["name"])[0]) for part in table.parts]
    first = max(numbers, default=0) + 1
    job = IngestJob(about["made_from"], target, "", True, data)
    names: list[str] = about.get("waiting", [])
    results = _run_retries(retry_waiting, {n: (job, first + n, name) for n, name in enumerate(names)}, data)
    parts = [part for result in results for part in result.parts]
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
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(target, name)))).to_pylist()
    attempts = {entry["line"]: entry["attempts"] for entry in (json.loads(row.pop("entry")) for row in rows)}
    records = [{**row, "videos": [storage.join(target, video) for video in row["videos"]]} for row in rows]
    uris = list(dict.fromkeys(split_time_range(uri)[0] for record in records for uri in record["videos"]))
    with HeaderReader(job.data) as header_reader:
        probed = dict(zip(uris, header_reader(uris), strict=True))
    readable, waiting = add_durations(records, probed, job.manifest)
    waiting = [(row, replace(entry, attempts=entry.attempts + attempts[entry.line])) for row, entry in waiting]
    result = RetryResult(
        readable=[(to_printable(job.manifest), record["line"], to_printable(record["id"])) for record in readable],
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


def retry_entries(data: DataConfig, chunk: Chunk) -> RetryResult:
    """Decode the videos that some lines of a run's quarantine.jsonl name.

    Raises:
        BadManifest: a line does not belong in a quarantine.jsonl.
    """
    result, remaining = RetryResult(), []
    with Decoder(data, IMAGE_SIZE) as decoder:
        for number, line in split.read_rows(chunk):
            try:
                entry = json.loads(line)
                row = {"manifest": entry["manifest"], "line": entry["line"], "id": entry["id"]}
                uri, attempts, stage = str(entry["uri"]), int(entry["attempts"]), entry["stage"]
            except (ValueError, TypeError, KeyError) as error:
                raise BadManifest(
                    f"{chunk.uri}: line {number} is not a line of a quarantine.jsonl: {type(error).__name__}"
                ) from None
            if stage == "process":  # not its video is at fault
                remaining.append(line.rstrip(b"\n") + b"\n")
                continue
            video = decoder([uri])[0]
            if isinstance(video, VideoFailure) and video.stage == "read" and "\\" in uri:
                # In quarantine.jsonl, names that are not printable ASCII are escaped.
                with contextlib.suppress(ValueError):
                    video = decoder([codecs.decode(uri, "unicode_escape")])[0]
            if isinstance(video, VideoFailure):
                failure = replace(video, attempts=attempts + video.attempts)
                updated = {**entry, **QuarantineEntry.from_row(row, uri, failure).to_dict()}
                remaining.append(json.dumps(updated).encode() + b"\n")
            else:
                result.readable.append((to_printable(str(row["manifest"])), row["line"], to_printable(str(row["id"]))))
    result.entries, result.unreadable = b"".join(remaining), len(remaining)
    return result
