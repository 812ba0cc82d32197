"""Convert a manifest of any size to a prepared one, or only validate it: chunks are checked in parallel on Ray.

    FOLDER/pieces/plan.json         how the manifest is split into chunks
    FOLDER/part-*.parquet           the rows
    FOLDER/media/                   videos and images that the manifest itself holds
    FOLDER/probes-*.parquet         headers of the videos
    FOLDER/waiting-*.parquet        rows with unreadable videos, for `requeue`; quarantine.jsonl lists them for people
    FOLDER/rejected.jsonl           malformed rows
    FOLDER/pieces/00012.json        summary of a chunk, written after all files that it names: the chunk is done
    FOLDER/_prepared.json           the seal: the manifest is prepared

The driver holds counts, 16 bytes per row to find duplicate ids, and the lengths of all rows; never the rows.
"""

import contextlib
import errno
import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from crosslmm import lease, run_folder, storage
from crosslmm.config import BadConfig, DataConfig
from crosslmm.data import manifest_shards
from crosslmm.data.ingest import ray_tasks, split
from crosslmm.data.ingest.check_rows import INDEX, IngestJob, check_chunk, find_duplicates
from crosslmm.data.ingest.plan import (
    QUARANTINE_FILE,
    REJECTED_FILE,
    default_chunk_bytes,
    make_plan,
    read_plan,
    split_in_tasks,
)
from crosslmm.data.ingest.ray_tasks import IngestError
from crosslmm.data.ingest.shard_tasks import (
    WAITING,
    convert_chunk,
    drop_rows,
    duplicate_reasons,
    rejected_lines,
    sort_by_line,
)
from crosslmm.data.ingest.split import Chunk
from crosslmm.data.ingest.summary import Summary, parse_summary
from crosslmm.data.manifest import BadManifest, base_folder, manifest_errors
from crosslmm.data.manifest_shards import LENGTH_COLUMNS, read_table
from crosslmm.data.quarantine import ErrorBudget, escape_to_ascii
from crosslmm.data.rows.problems import problem_table, unused_lines
from crosslmm.progress import Progress
from crosslmm.text import first_error, printable

Duplicates = dict[int, list[tuple[int, int]]]
"""By chunk number: (line, earlier line with the same id) of each duplicate."""

LOST = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""Errors that say that one file is missing, or does not contain what an earlier call wrote."""

log = logging.getLogger(__name__)


def convert(
    manifest: str,
    folder: str,
    probe: bool,
    skip_bad: bool,
    chunk_bytes: int | None,
    data: DataConfig,
    ignored_keys: Sequence[str] = (),
) -> dict[str, Any]:
    """Prepare a manifest, or resume an earlier call; return the counts that the job prints.

    Args:
        manifest: path or URI.
        folder: path or URI of the output; empty, or started by an earlier call.
        probe: read the headers of the videos.
        skip_bad: leave malformed rows out; otherwise they are an error.
        chunk_bytes: size of a chunk of the manifest; None for the default [bytes].
        data: limits of probing, and further folders that videos may lie in.
        ignored_keys: keys of rows that are ignored.

    Raises:
        BadManifest, BadConfig: the request cannot be carried out.
        IngestError, TooManyUnreadable, storage.Unavailable: it stopped; the same call resumes.
        lease.LeaseLost: another call has taken over the folder.
    """
    began = time.monotonic()
    uri, target = storage.absolute(manifest.rstrip("/")), storage.absolute(folder.rstrip("/"))
    if "/working_dir_files/" in target:
        raise BadConfig(f"{folder}: lies in this job's uploaded copy of the code; give an absolute path or a URI")
    if manifest_shards.is_prepared(uri):
        raise BadManifest(f"{manifest}: is already prepared")
    if not run_folder.is_unused(target) and read_plan(target) is None:
        lease.claim(target, "preparation", "give another folder")  # fails, with its name, if a call has begun meanwhile
        raise BadConfig(f"{folder}: is not empty, and no earlier call started it; give another folder")
    data = _with_manifest_root(uri, data)
    settings = {
        "manifest": uri,
        "probe": probe,
        "piece_bytes": chunk_bytes or default_chunk_bytes(probe),  # a stored name
        "roots": data.roots,
        **({"ignored_keys": sorted(ignored_keys)} if ignored_keys else {}),
    }
    with lease.claim(target, "preparation", "give another folder").take() as fence:
        return _convert(IngestJob(uri, target, "", probe, data, tuple(ignored_keys), fence), settings, skip_bad, began)


def _convert(job: IngestJob, settings: dict[str, Any], skip_bad: bool, began: float) -> dict[str, Any]:
    """Make or take up the plan in the job's target, convert what is missing, and seal."""
    target = job.target
    plan = make_plan(job.manifest, target, settings, read_plan(target))
    if manifest_shards.is_prepared(target):
        table = manifest_shards.PreparedTable(target)
        log.info("%s: already prepared from %s, which has not changed", target, job.manifest)
        return _result(target, table.num_rows, table.about, len(table.parts), began)
    # Videos that the manifest itself holds are written to the target.
    data = job.data.model_copy(update={"roots": [*job.data.roots, target]})
    job = replace(job, plan=plan.key, data=data)
    with _output_errors(target):
        summaries = _convert_chunks(job, plan.chunks)
        duplicates = _find_duplicates(target, summaries)
        if duplicates and skip_bad:
            calls = {number: (job, number, summaries[number], lines) for number, lines in duplicates.items()}
            for number, summary in ray_tasks.run_tasks(drop_rows, calls):
                summaries[number] = summary
            duplicates = {}
        return _seal(job, summaries, duplicates, skip_bad, began)


@contextlib.contextmanager
def _output_errors(target: str) -> Iterator[None]:
    """Context manager: turns errors about files of an earlier call that are lost or damaged into `BadConfig`."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not isinstance(error, LOST) and getattr(error, "errno", None) != errno.ELOOP:
            raise
        reason = printable(f"{type(error).__name__}: {error}")
        raise BadConfig(
            f"{target}: a file of an earlier call is lost or damaged: {reason}; give another folder"
        ) from error


def validate(
    manifest: str, probe: bool, chunk_bytes: int | None, data: DataConfig, ignored_keys: Sequence[str] = ()
) -> Summary:
    """Check the rows of a manifest, and the headers of its videos if `probe` is true; write nothing.

    Arguments and errors are those of `convert`.
    """
    uri = storage.absolute(manifest.rstrip("/"))
    if manifest_shards.is_prepared(uri):
        raise BadManifest(f"{manifest}: is already prepared, so its rows have been checked")
    job = IngestJob(uri, "", "", probe, _with_manifest_root(uri, data), tuple(ignored_keys))
    hashes, lines = {}, {}
    with manifest_errors(manifest):
        files = split.files_to_split(uri, job.data.roots)
        chunk_bytes = chunk_bytes or default_chunk_bytes(probe)
        chunks = split_in_tasks(files, chunk_bytes) if files else [Chunk(uri, "whole")]
        with _ChunkMonitor("validating", uri, len(chunks), data) as monitor:
            calls = {number: (job, chunk) for number, chunk in enumerate(chunks)}
            for number, (summary, chunk_hashes, chunk_lines) in ray_tasks.run_tasks(check_chunk, calls, job.memory_gib):
                hashes[number], lines[number] = chunk_hashes, chunk_lines
                monitor.add(summary)
    total = monitor.total
    if total.is_empty:
        raise BadManifest(f"{manifest}: is empty")
    ordered = sorted(hashes)
    for duplicates in find_duplicates([hashes[n] for n in ordered], [lines[n] for n in ordered]).values():
        total.rows -= len(duplicates)
        total.reject(duplicate_reasons(duplicates))
    return total


def _with_manifest_root(uri: str, data: DataConfig) -> DataConfig:
    """Return the configuration with absolute roots, the manifest's folder first."""
    with manifest_errors(uri):
        return data.model_copy(update={"roots": [base_folder(uri), *map(storage.absolute, data.roots)]})


class _ChunkMonitor:
    """Shows progress over chunks, and stops the job when too many videos are unreadable.

    Attributes:
        total: counts of all chunks so far.
    """

    def __init__(self, description: str, uri: str, chunks: int, data: DataConfig) -> None:
        self.total = Summary()
        self._source = escape_to_ascii(uri)
        self._completed = 0
        self._budget = ErrorBudget(data.max_bad_share, data.bad_allowed)
        self._progress = Progress(log, description, chunks, "chunk")

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, tb)

    def add(self, summary: Summary) -> None:
        """Count a finished chunk.

        Raises:
            TooManyUnreadable: see `ErrorBudget`.
        """
        total = self.total
        total.add(summary)
        self._completed += 1
        counts = f"{total.rows:,} rows  {total.rejected:,} malformed  {total.quarantined:,} unreadable"
        self._progress.update(self._completed, counts)
        self._budget.samples[self._source] += summary.rows + summary.quarantined
        self._budget.reasons[self._source].update(summary.unreadable)
        self._budget.record([], [])


def _convert_chunks(job: IngestJob, chunks: list[Chunk]) -> list[Summary]:
    """Convert all chunks that no earlier call has finished; return the summaries of all, in order."""
    done = _read_summaries(job.target, job.plan)
    if done:
        log.info("resuming: %d of %d chunks are done", len(done), len(chunks))
    with _ChunkMonitor("converting", job.manifest, len(chunks), job.data) as monitor:
        for summary in done.values():
            monitor.add(summary)
        remaining = {number: (job, number, chunk) for number, chunk in enumerate(chunks) if number not in done}
        for number, summary in ray_tasks.run_tasks(convert_chunk, remaining, job.memory_gib):
            done[number] = summary
            monitor.add(summary)
    return [done[number] for number in range(len(chunks))]


def _read_summaries(target: str, plan: str) -> dict[int, Summary]:
    """Read the summaries of the chunks that are done, by number."""
    names = storage.names_in(storage.join(target, "pieces"))
    names = [f"pieces/{name}" for name in names if re.fullmatch(r"\d+\.json", name)]
    with ThreadPoolExecutor(manifest_shards.CONCURRENT_READS) as threads:
        summaries = dict(zip(names, threads.map(functools.partial(_read_summary, target), names), strict=True))
    return {int(name[7:-5]): summary for name, summary in summaries.items() if summary and summary.plan == plan}


def _read_summary(target: str, name: str) -> Summary | None:
    """Read the summary of a chunk; None if it cannot be used, so that its chunk is converted again."""
    try:
        return parse_summary(storage.read_at_most(storage.safe_join(target, name), storage.MAX_JSON_BYTES), target)
    except storage.Unavailable:
        raise
    except (OSError, ValueError) as error:
        log.warning("%s/%s is ignored: %s", target, name, first_error(error))
        return None


def _read_indices(target: str, summaries: list[Summary]) -> Iterator[pa.Table]:
    """Read the index of each chunk, in order."""
    names = [summary.files["index"] for summary in summaries]
    batch = manifest_shards.CONCURRENT_READS
    with ThreadPoolExecutor(batch) as threads:
        for start in range(0, len(names), batch):
            yield from threads.map(lambda name: read_table(target, name, INDEX), names[start : start + batch])


def _find_duplicates(target: str, summaries: list[Summary]) -> Duplicates:
    hashes, lines = [], []
    for table in _read_indices(target, summaries):
        hashes.append(table["id"].to_numpy())
        lines.append(table["line"].to_numpy())
    return find_duplicates(hashes, lines)


def _seal(
    job: IngestJob, summaries: list[Summary], duplicates: Duplicates, skip_bad: bool, began: float
) -> dict[str, Any]:
    """Write rejected.jsonl and quarantine.jsonl, then the seal; malformed rows prevent it unless `skip_bad` is true."""
    target, total = job.target, Summary()
    for number, summary in enumerate(summaries):
        total.add(summary)
        total.reject(duplicate_reasons(duplicates.get(number, [])))
    if total.is_empty:
        raise BadManifest(f"{job.manifest}: is empty")
    waiting = [summary.files["waiting"] for summary in summaries if "waiting" in summary.files]
    _require_owner(job)
    storage.write_chunks(storage.join(target, REJECTED_FILE), _rejected_lines(target, summaries, duplicates))
    storage.write_chunks(storage.join(target, QUARANTINE_FILE), _quarantine_lines(target, waiting))
    if total.rejected and not skip_bad:
        raise IngestError(
            f"{total.describe_malformed(job.manifest)}; all are in {storage.join(target, REJECTED_FILE)}; "
            "--skip_bad true leaves them out",
            problem_table(total.reasons) if total.rejected > 1 else "",
        )
    for line in unused_lines(total.unused):
        log.warning("%s: %s", job.manifest, line)
    if not total.rows:
        raise IngestError(
            f"{job.manifest}: no row is left: {total.rejected} are malformed, and the videos of {total.quarantined} "
            "cannot be read",
            problem_table(total.reasons) if total.rejected else "",
        )
    lengths = [table.filter(table["kept"]).select(LENGTH_COLUMNS) for table in _read_indices(target, summaries)]
    about = {
        "made_from": job.manifest,
        "plan": job.plan,
        "probed": job.probe,
        "rejected": total.rejected,
        "quarantined": total.quarantined,
        "videos": total.videos,
        "hours": round(total.seconds / 3600, 3),
        "codecs": total.codecs,
        "sizes": dict(Counter(total.sizes).most_common(20)),
        "waiting": waiting,
        "probes": [summary.files["probes"] for summary in summaries if "probes" in summary.files],
    }
    parts = [part for summary in summaries for part in summary.parts]
    _require_owner(job)
    manifest_shards.seal(target, parts, pa.concat_tables(lengths), about)
    return _result(target, total.rows, about, len(parts), began)


def _require_owner(job: IngestJob) -> None:
    assert job.fence, "convert owns the folder"
    job.fence.require()


def _rejected_lines(target: str, summaries: list[Summary], duplicates: Duplicates) -> Iterator[bytes]:
    for number, summary in enumerate(summaries):
        name = summary.files.get("rejected")
        lines = storage.read_bytes(storage.safe_join(target, name)) if name else b""
        reasons = duplicate_reasons(duplicates.get(number, []))
        yield sort_by_line(lines + rejected_lines(reasons)) if reasons else lines


def _quarantine_lines(target: str, waiting: list[str]) -> Iterator[bytes]:
    for name in waiting:
        for entry in read_table(target, name, pa.schema([WAITING.field("entry")]))["entry"].to_pylist():
            yield entry.encode() + b"\n"


def _result(target: str, rows: int, about: dict[str, Any], parts: int, began: float) -> dict[str, Any]:
    keys = ("made_from", "probed", "rejected", "quarantined", "videos", "hours", "codecs", "sizes")
    seconds = round(time.monotonic() - began, 1)
    return {"prepared": target, "rows": rows, "parts": parts, **{key: about[key] for key in keys}, "took_s": seconds}
