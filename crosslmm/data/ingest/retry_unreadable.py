"""Another try for what could not be read: the lines of a run's ledger, or the rows that wait in a prepared folder."""

import codecs
import contextlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.ingest import split
from crosslmm.data.ingest.convert import LEDGER, cut_and_count
from crosslmm.data.ingest.ray_tasks import IngestProgress, on_ray
from crosslmm.data.ingest.shard_tasks import PROBES, Work, inside, named, table_of, timed, waiting_of
from crosslmm.data.ingest.split import Piece
from crosslmm.data.manifest import BadManifest
from crosslmm.data.manifest_shards import LENGTH_COLUMNS
from crosslmm.data.quarantine import QuarantineEntry, to_printable
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import Decoder, HeaderReader
from crosslmm.data.video.probe import Probe

LEDGER_PIECE_BYTES = 256 * 2**10
"""What one task takes of a ledger [bytes]."""
SIDE = 64
"""Of the frames that are decoded to see whether a video can be [px]."""


def requeue(place: str, data: DataConfig, console: Console) -> dict[str, Any]:
    """Try again what could not be read -> what is printed last.

    Args:
        place: a run's ledger, or a prepared folder.
        data: limits, and frames that are decoded.
        console: for what people read.

    Raises:
        BadManifest, BadConfig: it is neither.
        NotPrepared, storage.Unavailable: it broke off, and no row has changed its place.
    """
    uri = storage.absolute(place.rstrip("/"))
    with named(place):
        if manifest_shards.is_prepared(uri):
            readable, left = _requeue_folder(uri, data, console)
        elif storage.is_folder(uri):
            raise BadManifest(f"{place}: is a folder that is not prepared; convert finishes it")
        else:
            readable, left = _requeue_ledger(uri, data, console)
    for manifest, line, name in readable[:100]:
        console.print(f"readable now: {manifest} line {line} ({name})", markup=False)
    if len(readable) > 100:
        console.print(f"and {len(readable) - 100} more")
    return {"requeued": uri, "readable": len(readable), "unreadable": left}


def _requeue_ledger(uri: str, data: DataConfig, console: Console) -> tuple[list[tuple[str, int, str]], int]:
    storage.stamp_of(uri)
    pieces = cut_and_count(uri, LEDGER_PIECE_BYTES)
    results: dict[int, Retried] = {}
    with IngestProgress(console, len(pieces)) as progress:
        for number, result in on_ray(
            retry_entries, {n: (data, piece) for n, piece in enumerate(pieces)}, progress.waited
        ):
            results[number] = result
            progress.seen(len(result.readable), 0, result.left)
    ordered = [results[number] for number in sorted(results)]
    storage.write_bytes(uri, b"".join(result.entries for result in ordered))
    return [row for result in ordered for row in result.readable], sum(result.left for result in ordered)


def _requeue_folder(target: str, data: DataConfig, console: Console) -> tuple[list[tuple[str, int, str]], int]:
    table = manifest_shards.PreparedTable(target)
    about = table.about
    names: list[str] = about.get("waiting", [])
    numbers = [int(re.findall(r"\d+", part["name"])[0]) for part in table.parts]
    work = Work(about["made_from"], target, "", True, data)
    results: dict[int, Retried] = {}
    calls = {n: (work, max(numbers, default=0) + 1 + n, name) for n, name in enumerate(names)}
    with IngestProgress(console, len(names)) as progress:
        for number, result in on_ray(retry_waiting, calls, progress.waited):
            results[number] = result
            progress.seen(len(result.readable), 0, result.left)
    ordered = [results[number] for number in sorted(results)]
    left = sum(result.left for result in ordered)
    new = [part for result in ordered for part in result.parts]
    if new:
        lengths = pa.concat_tables([table.lengths(), *(result.lengths for result in ordered if result.lengths)])
        about = about | {
            "quarantined": left,
            "waiting": [result.waiting for result in ordered if result.waiting],
            "probes": [*about["probes"], *(name for result in ordered for name in result.probes)],
        }
        manifest_shards.seal(target, [*table.parts, *new], lengths, about)
    storage.write_chunks(storage.join(target, LEDGER), (result.entries for result in ordered))
    return [row for result in ordered for row in result.readable], left


@dataclass
class Retried:
    """What came of rows that were tried again."""

    readable: list[tuple[str, int, str]] = field(default_factory=list)
    """Manifest, line and id of those that can be read now."""
    entries: bytes = b""
    """Lines of the ledger: those that still cannot."""
    left: int = 0
    """How many these are."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    lengths: pa.Table | None = None
    waiting: str | None = None
    """Name of the rows that still wait, if there are any."""
    probes: list[str] = field(default_factory=list)


def retry_waiting(work: Work, number: int, name: str) -> Retried:
    """Probe again the rows of a prepared folder that wait in the file of this name. Those that can be read become part
    `number`."""
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(work.target, name)))).to_pylist()
    entries = [json.loads(row.pop("entry")) for row in rows]
    records = [{**row, "videos": [storage.join(work.target, video) for video in row["videos"]]} for row in rows]
    places = list(dict.fromkeys(split_time_range(uri)[0] for record in records for uri in record["videos"]))
    with HeaderReader(work.data) as prober:
        known = dict(zip(places, prober(places), strict=True))
    readable, waiting = timed(records, known, work.manifest)
    tried = {entry["line"]: entry["attempts"] for entry in entries}
    waiting = [(row, replace(entry, attempts=entry.attempts + tried[entry.line])) for row, entry in waiting]
    result = Retried([(to_printable(work.manifest), record["line"], to_printable(record["id"])) for record in readable])
    result.left = len(waiting)
    result.entries = b"".join(json.dumps(entry.to_dict()).encode() + b"\n" for _, entry in waiting)
    if readable:
        table = table_of(readable, work.target)
        result.parts = [manifest_shards.write_part(work.target, number, table)]
        result.lengths = table.select(LENGTH_COLUMNS)
        found = [
            {"video": inside(place, work.target), **asdict(one)}
            for place, one in known.items()
            if isinstance(one, Probe)
        ]
        result.probes = [f"probes-{number:05d}_1.parquet"]
        data = manifest_shards.to_bytes(pa.Table.from_pylist(found, PROBES))
        storage.write_bytes(storage.join(work.target, result.probes[0]), data)
    if waiting:
        # Under a new name where rows have left, for the seal that is in force still names the old one.
        result.waiting = f"waiting-{number:05d}_2.parquet" if readable else name
        data = manifest_shards.to_bytes(waiting_of(waiting, work.target))
        storage.write_bytes(storage.join(work.target, result.waiting), data)
    return result


def retry_entries(data: DataConfig, piece: Piece) -> Retried:
    """Decode again what some lines of a run's ledger name.

    Raises:
        BadManifest: a line is none of a ledger.
    """
    result, left = Retried(), []
    with Decoder(data, SIDE) as decoder:
        for number, line in split.rows_of(piece):
            try:
                entry = json.loads(line)
                row = {"manifest": entry["manifest"], "line": entry["line"], "id": entry["id"]}
                place, attempts = str(entry["uri"]), int(entry["attempts"])
            except (ValueError, TypeError, KeyError) as error:
                raise BadManifest(f"{piece.uri}: line {number} is none of a ledger: {type(error).__name__}") from None
            found = decoder([place])[0]
            if isinstance(found, VideoFailure) and found.stage == "read" and "\\" in place:
                # A name that is not plain ASCII stands escaped in the ledger.
                with contextlib.suppress(ValueError):
                    found = decoder([codecs.decode(place, "unicode_escape")])[0]
            if isinstance(found, VideoFailure):
                tried = replace(found, attempts=attempts + found.attempts)
                left.append(
                    json.dumps({**entry, **QuarantineEntry.from_row(row, place, tried).to_dict()}).encode() + b"\n"
                )
            else:
                result.readable.append((to_printable(str(row["manifest"])), row["line"], to_printable(str(row["id"]))))
    result.entries, result.left = b"".join(left), len(left)
    return result
