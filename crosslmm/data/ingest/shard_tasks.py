"""What the tasks of `prepare` do with the rows of one piece: check, probe, write, drop, try again."""

import contextlib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import split_time_range
from crosslmm.data.ingest import split
from crosslmm.data.ingest.split import Piece
from crosslmm.data.manifest import BadManifest
from crosslmm.data.manifest_shards import LENGTH_COLUMNS, SCHEMA
from crosslmm.data.quarantine import QuarantineEntry, to_printable
from crosslmm.data.row_schema import parse_rows
from crosslmm.data.video.decode import VideoFailure
from crosslmm.data.video.decode_pool import HeaderReader
from crosslmm.data.video.probe import Probe
from crosslmm.data.video.pyav import UnreadableVideo, clip_bounds

BATCH_ROWS = 4096
PART_ROWS = 65_536
PARTS_OF_A_PIECE = 1000
"""Parts are numbered by their piece, so that it is seen where they come from; half are for what is written anew."""
NAMED = 5
"""Malformed rows that a message names; the rest are counted."""
PARTICULARS = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")
"""What differs between reasons of one sort: names and numbers."""
SORTS, OTHERS = 200, "others"
"""Sorts of a thing that are counted apart."""

INDEX = pa.schema(
    {"id": pa.uint64(), "line": pa.int64(), "kept": pa.bool_()}
    | {name: SCHEMA.field(name).type for name in LENGTH_COLUMNS}
)
"""A row of a piece, for the driver: hash of its id, and whether it is in a part."""
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
WAITING = SCHEMA.append(pa.field("entry", pa.string()))
"""A row that is left out, with its line of the ledger."""


@dataclass(frozen=True)
class Work:
    """What the tasks of a manifest have to know. Travels to all of them."""

    manifest: str
    """Its URI; its relative places are relative to the folder that it lies in."""
    target: str
    """Folder that is written to; none where rows are only checked."""
    plan: str
    """Key of the plan: summaries of another one do not count."""
    probe: bool
    data: DataConfig
    """Limits of probing; the roots that videos may lie in, the manifest's folder first."""


@dataclass
class Batch:
    """Some rows of a piece, judged."""

    records: list[dict[str, Any]]
    """Of `SCHEMA`."""
    rejected: list[tuple[int, str]]
    """(line, reason) of the malformed ones."""
    waiting: list[tuple[dict[str, Any], QuarantineEntry]]
    """Those whose video cannot be read."""
    probes: dict[str, Probe]
    """What videos that are new in this batch say, by their places."""


@dataclass
class Summary:
    """What came of one piece, or of several: counts, and the names of files."""

    plan: str = ""
    rows: int = 0
    rejected: int = 0
    quarantined: int = 0
    videos: int = 0
    """Probed; one that stands in several pieces counts in each."""
    seconds: float = 0.0
    """Duration of these videos."""
    named: list[list[Any]] = field(default_factory=list)
    """The first malformed rows, [line, reason] each."""
    reasons: dict[str, list[Any]] = field(default_factory=dict)
    """Malformed rows by sort of reason: how many, first lines, the first one's reason."""
    unreadable: dict[str, int] = field(default_factory=dict)
    """Rows left out by stage and reason."""
    codecs: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    """As the seal names them."""
    files: dict[str, str] = field(default_factory=dict)
    """Names of the piece's index, rejected lines, probes and waiting rows, where it has such."""

    def reject(self, lines: Iterable[tuple[int, str]]) -> None:
        """Count malformed rows."""
        for line, reason in lines:
            self.rejected += 1
            self.named = sorted([*self.named, [line, reason]])[:NAMED]
            sort = PARTICULARS.sub("...", reason)[:160]
            sort = sort if sort in self.reasons or len(self.reasons) < SORTS else OTHERS
            known = self.reasons.setdefault(sort, [0, [], reason])
            known[0] += 1
            known[1] = sorted([*known[1], line])[:NAMED]

    def add(self, other: "Summary") -> None:
        """Count another piece's rows too; its files and parts are not taken over."""
        self.rows += other.rows
        self.rejected += other.rejected
        self.quarantined += other.quarantined
        self.videos += other.videos
        self.seconds += other.seconds
        self.named = sorted([*self.named, *other.named])[:NAMED]
        for sort, (count, lines, reason) in other.reasons.items():
            mine = self.reasons.setdefault(sort, [0, [], reason])
            mine[0] += count
            mine[1] = sorted([*mine[1], *lines])[:NAMED]
        for name in ("unreadable", "codecs", "sizes"):
            self.tally(name, getattr(other, name))

    def tally(self, name: str, more: dict[str, int]) -> None:
        """Add to one of the counters, which has the most frequent sorts, and the rest as one."""
        counter = Counter(getattr(self, name)) + Counter(more)
        most = dict(counter.most_common(SORTS))
        rest = counter.total() - sum(most.values())
        setattr(self, name, most | ({OTHERS: most.get(OTHERS, 0) + rest} if rest else {}))


def judged(work: Work, piece: Piece) -> Iterator[Batch]:
    """The rows of a piece, checked and, where that is wanted, their videos probed.

    Raises:
        storage.Unavailable: the store cannot be used.
    """
    first_line: dict[str, int] = {}
    known: dict[str, Probe | VideoFailure] = {}
    with contextlib.ExitStack() as stack:
        prober = stack.enter_context(HeaderReader(work.data)) if work.probe else None
        for some in _batches(work, piece):
            records, rejected = parse_rows(some, work.data.roots, first_line)
            batch = Batch(records, [(line, to_printable(reason)) for line, reason in rejected], [], {})
            if prober:
                places = dict.fromkeys(split_time_range(uri)[0] for record in records for uri in record["videos"])
                new = [place for place in places if place not in known]
                found = dict(zip(new, prober(new), strict=True))
                known |= found
                batch.probes = {place: probe for place, probe in found.items() if isinstance(probe, Probe)}
                batch.records, batch.waiting = timed(records, known, work.manifest)
            yield batch


def _batches(work: Work, piece: Piece) -> Iterator[list[tuple[int, Any]]]:
    rows = split.rows_of(piece)
    while True:
        with named(work.manifest):
            some = list(itertools.islice(rows, BATCH_ROWS))
        if not some:
            return
        yield some


def timed(
    records: list[dict[str, Any]], known: dict[str, Probe | VideoFailure], manifest: str
) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], QuarantineEntry]]]:
    """Records with the durations of their videos, and those one of whose videos cannot be read."""
    readable, waiting = [], []
    for record in records:
        seconds = {uri: _seconds(uri, known) for uri in record["videos"]}
        bad = next(((uri, why) for uri, why in seconds.items() if isinstance(why, VideoFailure)), None)
        if bad:
            row = {"manifest": manifest, "line": record["line"], "id": record["id"]}
            waiting.append((record, QuarantineEntry.from_row(row, *bad)))
        else:
            readable.append({**record, "seconds": [seconds[uri] for uri in record["videos"]]})
    return readable, waiting


def _seconds(uri: str, known: dict[str, Probe | VideoFailure]) -> float | VideoFailure:
    """How long what is shown of a video lasts, 0 of an image [s]; or why it cannot be."""
    place, begin, end = split_time_range(uri)
    found = known[place]
    if isinstance(found, VideoFailure):
        return found
    try:
        first, last = clip_bounds(begin, end, found.seconds) if found.seconds else (0.0, 0.0)
    except UnreadableVideo as error:
        return VideoFailure(str(error), "check", found.version)
    return last - first


def check_piece(work: Work, piece: Piece) -> tuple[Summary, np.ndarray, np.ndarray]:
    """Judge a piece and write nothing -> counts; hashes of the ids, uint64 (rows,); their lines, int64 (rows,)."""
    summary, index = Summary(work.plan), []
    for batch in judged(work, piece):
        _count(summary, batch)
        index.append(_index(batch))
    table = pa.concat_tables([INDEX.empty_table(), *index])
    return summary, table["id"].to_numpy(), table["line"].to_numpy()


def convert_piece(work: Work, number: int, piece: Piece) -> Summary:
    """Judge a piece and write what comes of it, the summary last. Killed before, it is begun anew."""
    summary, index, rejected, waiting, probes = Summary(work.plan), [], bytearray(), [], []
    writer = _Parts(work.target, number * PARTS_OF_A_PIECE)
    for batch in judged(work, piece):
        _count(summary, batch)
        index.append(_index(batch))
        rejected += rejected_lines(batch.rejected)
        writer.add(table_of(batch.records, work.target))
        probes += [{"video": inside(place, work.target), **asdict(probe)} for place, probe in batch.probes.items()]
        waiting.append(waiting_of(batch.waiting, work.target))
    summary.parts = writer.finish()
    summary.files = {"index": f"pieces/{number:05d}.parquet"}
    storage.write_bytes(
        storage.join(work.target, summary.files["index"]),
        manifest_shards.to_bytes(pa.concat_tables([INDEX.empty_table(), *index])),
    )
    if rejected:
        summary.files["rejected"] = f"pieces/{number:05d}.rejected.jsonl"
        storage.write_bytes(storage.join(work.target, summary.files["rejected"]), bytes(rejected))
    if probes:
        summary.files["probes"] = f"probes-{number:05d}.parquet"
        table = pa.Table.from_pylist(probes, PROBES)
        storage.write_bytes(storage.join(work.target, summary.files["probes"]), manifest_shards.to_bytes(table))
    if summary.quarantined:
        summary.files["waiting"] = f"waiting-{number:05d}.parquet"
        table = pa.concat_tables(waiting)
        storage.write_bytes(storage.join(work.target, summary.files["waiting"]), manifest_shards.to_bytes(table))
    _write_summary(work.target, number, summary)
    return summary


def drop_rows(work: Work, number: int, summary: Summary, twice: list[tuple[int, int]]) -> Summary:
    """Take rows out of a piece whose ids an earlier piece has, (line, earlier line) each. Files get new names: a kill
    leaves the old ones whole."""
    lines = pa.array([line for line, _ in twice], pa.int64())

    def without(name: str) -> pa.Table:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(work.target, name))))
        return table.filter(pc.invert(pc.is_in(table["line"], lines)))

    def write(name: str, table: pa.Table) -> str:
        storage.write_bytes(storage.join(work.target, name), manifest_shards.to_bytes(table))
        return name

    writer = _Parts(work.target, number * PARTS_OF_A_PIECE + PARTS_OF_A_PIECE // 2)
    for part in summary.parts:
        writer.add(without(part["name"]))
    reasons = said_twice(twice)
    dropped = replace(summary, parts=writer.finish(), files=dict(summary.files))
    dropped.reject(reasons)
    dropped.rows = sum(part["rows"] for part in dropped.parts)
    dropped.files["index"] = write(f"pieces/{number:05d}-1.parquet", without(summary.files["index"]))
    if name := summary.files.get("waiting"):
        left = without(name)
        dropped.quarantined = left.num_rows
        del dropped.files["waiting"]
        if left.num_rows:
            dropped.files["waiting"] = write(f"waiting-{number:05d}_1.parquet", left)
    before = storage.read_bytes(storage.join(work.target, summary.files["rejected"])) if summary.rejected else b""
    dropped.files["rejected"] = f"pieces/{number:05d}-1.rejected.jsonl"
    storage.write_bytes(storage.join(work.target, dropped.files["rejected"]), by_line(before + rejected_lines(reasons)))
    _write_summary(work.target, number, dropped)
    return dropped


class _Parts:
    """Writes records as parts of up to `PART_ROWS`."""

    def __init__(self, target: str, first: int) -> None:
        self.target, self.next = target, first
        self.parts: list[dict[str, Any]] = []
        self._table = SCHEMA.empty_table()

    def add(self, table: pa.Table) -> None:
        self._table = pa.concat_tables([self._table, table])
        while self._table.num_rows >= PART_ROWS:
            self._write(self._table.slice(0, PART_ROWS))
            self._table = self._table.slice(PART_ROWS)

    def finish(self) -> list[dict[str, Any]]:
        if self._table.num_rows:
            self._write(self._table)
        return self.parts

    def _write(self, table: pa.Table) -> None:
        self.parts.append(manifest_shards.write_part(self.target, self.next, table))
        self.next += 1


def _count(summary: Summary, batch: Batch) -> None:
    summary.rows += len(batch.records)
    summary.reject(batch.rejected)
    summary.quarantined += len(batch.waiting)
    summary.videos += len(batch.probes)
    summary.seconds += sum(probe.seconds for probe in batch.probes.values())
    summary.tally("unreadable", Counter(f"{entry.stage}: {entry.reason}" for _, entry in batch.waiting))
    summary.tally("codecs", Counter(probe.codec for probe in batch.probes.values()))
    summary.tally("sizes", Counter(f"{probe.width}x{probe.height}" for probe in batch.probes.values()))


def _index(batch: Batch) -> pa.Table:
    rows = [(record, True) for record in batch.records] + [(record, False) for record, _ in batch.waiting]
    rows.sort(key=lambda row: row[0]["line"])
    return pa.Table.from_pylist(
        [
            {**{name: row[name] for name in ("line", *LENGTH_COLUMNS)}, "id": _hash(row["id"]), "kept": kept}
            for row, kept in rows
        ],
        INDEX,
    )


def _hash(name: str) -> int:
    # Two of 20 million ids share one with odds of 1 : 100,000.
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def table_of(records: Sequence[dict[str, Any]], target: str) -> pa.Table:
    """Records as they are written into `target`, their places relative to it."""
    placed = [{**record, "videos": [inside(video, target) for video in record["videos"]]} for record in records]
    return pa.Table.from_pylist(placed, SCHEMA)


def waiting_of(rows: Sequence[tuple[dict[str, Any], QuarantineEntry]], target: str) -> pa.Table:
    """Rows that are left out, as `WAITING`."""
    entries = pa.array([json.dumps(entry.to_dict()) for _, entry in rows], pa.string())
    return table_of([record for record, _ in rows], target).append_column("entry", entries).cast(WAITING)


def inside(place: str, folder: str) -> str:
    """A place relative to a folder if it lies in it, so that both can be moved together."""
    within = place.removeprefix(f"{folder}/")
    return within if storage.join(folder, within) == place else place


def said_twice(twice: list[tuple[int, int]]) -> list[tuple[int, str]]:
    """(line, reason) of rows that have the id of an earlier one, from (line, earlier line)."""
    return [(line, f"its id is also on line {before}") for line, before in twice]


def rejected_lines(rejected: Iterable[tuple[int, str]]) -> bytes:
    """Malformed rows as lines of rejected.jsonl."""
    return b"".join(json.dumps({"line": line, "reason": reason}).encode() + b"\n" for line, reason in rejected)


def by_line(lines: bytes) -> bytes:
    """These, sorted."""
    return b"".join(sorted(lines.splitlines(keepends=True), key=lambda line: int(json.loads(bytes(line))["line"])))


def _write_summary(target: str, number: int, summary: Summary) -> None:
    storage.write_bytes(storage.join(target, f"pieces/{number:05d}.json"), json.dumps(asdict(summary)).encode())


@contextlib.contextmanager
def named(manifest: str) -> Iterator[None]:
    """What is wrong with a manifest as a whole is said with its name."""
    try:
        yield
    except (storage.Unavailable, storage.BadLocation):
        raise
    except (OSError, ValueError) as error:
        raise BadManifest(f"{manifest}: cannot be read: {type(error).__name__}: {error}") from error
