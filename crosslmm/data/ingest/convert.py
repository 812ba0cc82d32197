"""A manifest of any size -> a prepared one, on Ray: checked row by row, its videos probed, piece by piece.

    FOLDER/pieces/plan.json         how the manifest was cut, and what it was then
    FOLDER/part-*.parquet           the rows
    FOLDER/probes-*.parquet         what the videos' headers say
    FOLDER/waiting-*.parquet        rows whose videos cannot be read, for `requeue`; quarantine.jsonl for people
    FOLDER/pieces/00012.json        what came of a piece, written after all that it names: the piece is done
    FOLDER/_prepared.json           the seal

The driver holds counts, 16 bytes a row to find ids that come twice, and the lengths of all rows; never a row.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from crosslmm import storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.ingest import split as cutting
from crosslmm.data.ingest.ray_tasks import IngestProgress, NotPrepared, on_ray
from crosslmm.data.ingest.shard_tasks import (
    NAMED,
    Summary,
    Work,
    by_line,
    check_piece,
    convert_piece,
    drop_rows,
    inside,
    named,
    rejected_lines,
    said_twice,
)
from crosslmm.data.ingest.split import Piece
from crosslmm.data.manifest import BadManifest, base_folder
from crosslmm.data.manifest_shards import LENGTH_COLUMNS
from crosslmm.data.quarantine import ErrorBudget, to_printable

PIECE_BYTES, PROBED_PIECE_BYTES = 32 * 2**20, 4 * 2**20
"""What one task takes of a manifest, and what it takes where each row is a video to open [bytes]."""

PLAN, REJECTED, LEDGER = "pieces/plan.json", "rejected.jsonl", "quarantine.jsonl"
OURS = re.compile(
    r"_prepared\.json|pieces/.*|(part|probes|waiting|lengths)-\w+\.parquet|(rejected|quarantine)\.jsonl", re.DOTALL
)


def convert(
    manifest: str, folder: str, probe: bool, skip_bad: bool, piece_bytes: int | None, data: DataConfig, console: Console
) -> dict[str, Any]:
    """Prepare a manifest, or go on with it -> what is printed last.

    Args:
        manifest: path or URI.
        folder: where it goes: empty, or begun by an earlier call.
        probe: read the headers of its videos.
        skip_bad: leave malformed rows out; without it they are no manifest.
        piece_bytes: of the manifest in one task; None for what suits.
        data: limits of probing, and further folders that videos may lie in.
        console: for what people read.

    Raises:
        BadManifest, BadConfig: it cannot be done.
        NotPrepared, TooManyUnreadable, storage.Unavailable: it broke off.
    """
    began = time.monotonic()
    uri, target = storage.absolute(manifest.rstrip("/")), storage.absolute(folder.rstrip("/"))
    if "/working_dir_files/" in target:
        raise BadConfig(f"{folder}: lies in this job's uploaded copy of the code; give an absolute path or a URI")
    if manifest_shards.is_prepared(uri):
        raise BadManifest(f"{manifest}: is prepared already")
    old = _read_plan(target)
    if old is None and not storage.is_empty(target):
        raise BadConfig(f"{folder}: is not empty, and no earlier call began it; give another folder")
    work, todo = _plan(uri, target, old, probe, piece_bytes, data, console)
    if manifest_shards.is_prepared(target):
        table = manifest_shards.PreparedTable(target)
        console.print(f"{target}: prepared already from {uri}, which has not changed", markup=False)
        return _said(target, table.num_rows, table.about, len(table.parts), began)
    done = _summaries(target, work.plan)
    if done:
        console.print(f"going on: {len(done)} of {len(todo)} pieces are done")
    tally = ErrorBudget(data.max_bad_share, data.bad_allowed)
    with IngestProgress(console, len(todo)) as progress:
        for summary in done.values():
            _tally(tally, uri, summary, progress)
        left = {number: (work, number, piece) for number, piece in enumerate(todo) if number not in done}
        for number, summary in on_ray(convert_piece, left, progress.waited):
            done[number] = summary
            _tally(tally, uri, summary, progress)
    twice = _twice(target, done)
    if twice and skip_bad:
        calls = {number: (work, number, done[number], lines) for number, lines in twice.items()}
        done |= dict(on_ray(drop_rows, calls))
        twice = {}
    return _seal(work, [done[number] for number in range(len(todo))], twice, skip_bad, console, began)


def validate(manifest: str, probe: bool, piece_bytes: int | None, data: DataConfig, console: Console) -> Summary:
    """Check a manifest's rows, and their videos' headers where `probe` asks for it, and write nothing.

    Arguments and errors are those of `convert`.
    """
    uri = storage.absolute(manifest.rstrip("/"))
    if manifest_shards.is_prepared(uri):
        raise BadManifest(f"{manifest}: is prepared, and its rows were checked when it was")
    with named(manifest):
        work = Work(uri, "", "", probe, _with_folder(uri, data))
        pieces = (
            [Piece(uri, "whole")] if cutting.is_whole(uri) else cut_and_count(uri, piece_bytes or _piece_bytes(probe))
        )
        found, hashes, lines = Summary(), {}, {}
        with IngestProgress(console, len(pieces)) as progress:
            calls = {number: (work, piece) for number, piece in enumerate(pieces)}
            tally = ErrorBudget(data.max_bad_share, data.bad_allowed)
            for number, (summary, ids, places) in on_ray(check_piece, calls, progress.waited):
                hashes[number], lines[number] = ids, places
                found.add(summary)
                _tally(tally, uri, summary, progress)
    if not found.rows + found.rejected + found.quarantined:
        raise BadManifest(f"{manifest}: is empty")
    ordered = sorted(hashes)
    for again in _repeated([hashes[n] for n in ordered], [lines[n] for n in ordered]).values():
        found.rows -= len(again)
        found.reject(said_twice(again))
    return found


def _plan(
    uri: str,
    target: str,
    old: dict[str, Any] | None,
    probe: bool,
    piece_bytes: int | None,
    data: DataConfig,
    console: Console,
) -> tuple[Work, list[Piece]]:
    """The pieces of a manifest: those of an earlier call if nothing has changed since, or a new beginning."""
    asked: dict[str, Any] = {"manifest": uri, "probe": probe, "piece_bytes": piece_bytes or _piece_bytes(probe)}
    with named(uri):
        data = _with_folder(uri, data)
        asked["roots"] = data.roots
        stamp = cutting.stamp(uri)
        if old is None:
            # The folder is ours from now on, whatever comes between.
            storage.write_bytes(storage.join(target, PLAN), json.dumps({"key": "", "stamp": [], "asked": {}}).encode())
        if old and stamp and old["stamp"] == stamp and old["asked"] == asked:
            pieces = [Piece(**piece) for piece in old["pieces"]]
        elif cutting.is_whole(uri):
            console.print("cutting a manifest that one process has to read whole")
            ((_, pieces),) = on_ray(cutting.rewrite, {0: (uri, storage.join(target, "pieces"), asked["piece_bytes"])})
        else:
            console.print(f"cutting a manifest of {stamp[0] / 1e6:,.1f} MB and counting its lines")
            pieces = cut_and_count(uri, asked["piece_bytes"])
    if not pieces:
        raise BadManifest(f"{uri}: is empty")
    content = {"asked": asked, "pieces": [asdict(piece) for piece in pieces]}
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    if old and old["key"] not in ("", key) and old["asked"] != asked and manifest_shards.is_prepared(target):
        raise BadConfig(f"{target}: is finished, from another manifest or with other settings; give another folder")
    if old and old["key"] not in ("", key):
        what = "the manifest has" if old["asked"] == asked else "the manifest or how it is asked for has"
        console.print(f"{what} changed since {target} was begun: starting anew", markup=False)
        ours = {name for name in storage.names_in(target) if OURS.fullmatch(name)}
        ours -= {PLAN, *(inside(piece.uri, target) for piece in pieces)}
        # What names others goes before them: the seal, then the summaries.
        order = sorted(ours, key=lambda name: (name != manifest_shards.SEAL, not name.startswith("pieces/")))
        storage.remove([storage.join(target, name) for name in order])
    plan = {"key": key, "stamp": stamp, **content}
    if plan != old:
        storage.write_bytes(storage.join(target, PLAN), json.dumps(plan).encode())
    return Work(uri, target, key, probe, data), pieces


def _with_folder(uri: str, data: DataConfig) -> DataConfig:
    """The manifest's own folder is the first of its roots."""
    return data.model_copy(update={"roots": [base_folder(uri), *map(storage.absolute, data.roots)]})


def cut_and_count(uri: str, piece_bytes: int) -> list[Piece]:
    """The pieces of a manifest of lines or of Parquet; lines are counted in tasks."""
    rough = cutting.cut(uri, piece_bytes)
    if not rough or rough[0].form == "parquet":
        return rough
    calls = {number: (piece, rough[-1].end) for number, piece in enumerate(rough)}
    settled = dict(on_ray(cutting.settle, calls))
    return cutting.number(settled[number] for number in range(len(rough)))


def _piece_bytes(probe: bool) -> int:
    return PROBED_PIECE_BYTES if probe else PIECE_BYTES


def _read_plan(target: str) -> dict[str, Any] | None:
    uri = storage.join(target, PLAN)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else None


def _summaries(target: str, plan: str) -> dict[int, Summary]:
    """Of the pieces that are done."""
    names = storage.names_in(storage.join(target, "pieces"))
    numbers = [int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name)]
    with ThreadPoolExecutor(manifest_shards.CONCURRENT_READS) as threads:
        read = threads.map(lambda n: storage.read_bytes(storage.join(target, f"pieces/{n:05d}.json")), numbers)
        found = {number: Summary(**json.loads(data)) for number, data in zip(numbers, read, strict=True)}
    return {number: summary for number, summary in found.items() if summary.plan == plan}


def _tally(tally: ErrorBudget, uri: str, summary: Summary, progress: IngestProgress) -> None:
    source = to_printable(uri)
    tally.samples[source] += summary.rows + summary.quarantined
    tally.reasons[source].update(summary.unreadable)
    progress.seen(summary.rows, summary.rejected, summary.quarantined)
    tally.record([], [])


def _indices(target: str, done: dict[int, Summary]) -> Iterator[pa.Table]:
    """Those of the pieces, in order."""
    names = [done[number].files["index"] for number in sorted(done)]
    with ThreadPoolExecutor(manifest_shards.CONCURRENT_READS) as threads:
        for some in range(0, len(names), manifest_shards.CONCURRENT_READS):
            uris = [storage.join(target, name) for name in names[some : some + manifest_shards.CONCURRENT_READS]]
            for data in threads.map(storage.read_bytes, uris):
                yield pq.read_table(pa.BufferReader(data))


def _twice(target: str, done: dict[int, Summary]) -> dict[int, list[tuple[int, int]]]:
    """Rows of each piece whose ids earlier pieces have: line and earlier line."""
    hashes, lines = [], []
    for table in _indices(target, done):
        hashes.append(table["id"].to_numpy())
        lines.append(table["line"].to_numpy())
    return {sorted(done)[place]: found for place, found in _repeated(hashes, lines).items()}


def _repeated(hashes: list[np.ndarray], lines: list[np.ndarray]) -> dict[int, list[tuple[int, int]]]:
    """By place of the piece, (line, first line with that id) of each row whose id came before.

    Args:
        hashes: uint64 (rows,) of each piece.
        lines: int64 (rows,) of each piece.
    """
    if not any(map(len, hashes)):
        return {}
    ends, ids, line = np.cumsum([len(some) for some in hashes]), np.concatenate(hashes), np.concatenate(lines)
    order = np.argsort(ids, kind="stable")
    begins = np.concatenate([[True], np.diff(ids[order]) != 0])
    first = order[begins][np.cumsum(begins) - 1]
    found: dict[int, list[tuple[int, int]]] = {}
    for row, before in sorted(zip(order[~begins].tolist(), first[~begins].tolist(), strict=True)):
        piece = int(np.searchsorted(ends, row, side="right"))
        found.setdefault(piece, []).append((int(line[row]), int(line[before])))
    return found


def _seal(
    work: Work,
    done: list[Summary],
    twice: dict[int, list[tuple[int, int]]],
    skip_bad: bool,
    console: Console,
    began: float,
) -> dict[str, Any]:
    """Write what all pieces come to, and the seal if they are a manifest."""
    target, total = work.target, Summary()
    for number, summary in enumerate(done):
        total.add(summary)
        total.reject(said_twice(twice.get(number, [])))

    def rejected() -> Iterator[bytes]:
        for number, summary in enumerate(done):
            name = summary.files.get("rejected")
            lines = storage.read_bytes(storage.join(target, name)) if name else b""
            again = said_twice(twice.get(number, []))
            yield by_line(lines + rejected_lines(again)) if again else lines

    waiting = [summary.files["waiting"] for summary in done if "waiting" in summary.files]

    def quarantine() -> Iterator[bytes]:
        for name in waiting:
            data = storage.read_bytes(storage.join(target, name))
            for entry in pq.read_table(pa.BufferReader(data), columns=["entry"])["entry"].to_pylist():
                yield entry.encode() + b"\n"

    if not total.rows + total.rejected + total.quarantined:
        raise BadManifest(f"{work.manifest}: is empty")
    storage.write_chunks(storage.join(target, REJECTED), rejected())
    storage.write_chunks(storage.join(target, LEDGER), quarantine())
    if total.rejected and not skip_bad:
        raise NotPrepared(f"{malformed(work.manifest, total)}; all are in {storage.join(target, REJECTED)}; --skip_bad "
                          "true leaves them out")  # fmt: skip
    if not total.rows:
        raise NotPrepared(
            f"{work.manifest}: no row is left: {total.rejected} are malformed, and the videos of {total.quarantined} "
            "cannot be read"
        )
    lengths = [table.filter(table["kept"]).select(LENGTH_COLUMNS) for table in _indices(target, dict(enumerate(done)))]
    about = {
        "made_from": work.manifest,
        "plan": work.plan,
        "probed": work.probe,
        "rejected": total.rejected,
        "quarantined": total.quarantined,
        "videos": total.videos,
        "hours": round(total.seconds / 3600, 3),
        "codecs": total.codecs,
        "sizes": dict(Counter(total.sizes).most_common(20)),
        "waiting": waiting,
        "probes": [summary.files["probes"] for summary in done if "probes" in summary.files],
    }
    parts = [part for summary in done for part in summary.parts]
    manifest_shards.seal(target, parts, pa.concat_tables(lengths), about)
    return _said(target, total.rows, about, len(parts), began)


def _said(target: str, rows: int, about: dict[str, Any], parts: int, began: float) -> dict[str, Any]:
    told = ("made_from", "probed", "rejected", "quarantined", "videos", "hours", "codecs", "sizes")
    seconds = round(time.monotonic() - began, 1)
    return {"prepared": target, "rows": rows, "parts": parts, **{key: about[key] for key in told}, "took_s": seconds}


def malformed(manifest: str, found: Summary) -> str:
    """How many rows are, and the first of them, in one line."""
    named = "; ".join(f"line {line}: {reason}" for line, reason in found.named)
    more = f"; and {found.rejected - NAMED} more" if found.rejected > NAMED else ""
    return f"{to_printable(manifest)}: {found.rejected} rows are malformed: {named}{more}"
