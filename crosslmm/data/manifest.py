"""The manifest: one conversation per row, usually about a video.

`rows` reads files and forms of rows, `row_schema` checks them, `manifest_shards` reads prepared manifests.
"""

import contextlib
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from crosslmm import storage
from crosslmm.data import manifest_shards
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest_shards import SCHEMA
from crosslmm.data.row_schema import parse_rows, resolve_video
from crosslmm.data.rows.files import PREPARE_HINT, read_rows
from crosslmm.data.rows.folders import is_folder
from crosslmm.data.rows.problems import Reasons, count_reason, problem_table, unused_lines
from crosslmm.data.rows.values import BadRow
from crosslmm.text import printable

MAX_UNPREPARED_ROWS = 1_000_000
"""Largest manifest that the driver reads and checks in one piece [rows]: about a minute, and 0.3 to 1 kB a row."""
BATCH_ROWS = 4096
"""Rows that are checked together [rows]."""

log = logging.getLogger(__name__)


class BadManifest(Exception):
    """A manifest that cannot be read; the message names the file, the line and the reason.

    Attributes:
        details: lines of text that say more, a table of all malformed rows for instance; may be empty.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


@contextlib.contextmanager
def manifest_errors(manifest: str) -> Iterator[None]:
    """Context manager: turns errors of reading a manifest into `BadManifest`, which names it."""
    try:
        yield
    except storage.Unavailable:
        raise
    except (OSError, ValueError, RecursionError) as error:
        remedy = ", or add its target to --data.roots" if isinstance(error, storage.LeadsOut) else ""
        kind = "" if isinstance(error, BadRow) else f"{type(error).__name__}: "
        raise BadManifest(f"{manifest}: cannot be read: {kind}{printable(str(error))}{remedy}") from error


class Manifest:
    """The rows of a manifest, with absolute paths or URIs of their videos.

    A prepared manifest (`jobs/prepare.py convert`) was checked when it was made, and its rows are read on demand. Any
    other manifest is read and checked in one piece when it is opened.

    Attributes:
        uri: absolute path or URI of the manifest.
        digest: SHA-256 [hex] of the file, or of a prepared manifest's seal, which contains the digests of its parts.
        roots: folders that its videos may lie in: the manifest's own folder first, then those it was opened with.
    """

    def __init__(self, uri: str, roots: Sequence[str] = (), max_rows: int = MAX_UNPREPARED_ROWS) -> None:
        """Open a manifest.

        Args:
            uri: path or URI of a file or folder.
            roots: further folders that its videos may lie in.
            max_rows: most rows of a manifest that is not prepared.

        Raises:
            BadManifest: it is unreadable, empty, too large to be read in one piece, or has malformed lines, of which
                the message names the first, and its `details` are a table.
        """
        self.uri = storage.absolute(uri)
        self._table: pa.Table | manifest_shards.PreparedTable
        with manifest_errors(uri):
            self.roots = [base_folder(self.uri), *map(storage.absolute, roots)]
            if manifest_shards.is_prepared(self.uri):
                self._table = manifest_shards.PreparedTable(self.uri, self.roots)
                self.digest = self._table.digest
                self.take([0])  # fails if the first row's videos lie outside of the roots; usually so do all others
                return
            self.digest, raw_rows = read_rows(self.uri, self.roots)
            self._table = self._check(uri, itertools.islice(raw_rows, max_rows + 1))
        if self._table.num_rows > max_rows:
            raise BadManifest(f"{uri}: has more than {max_rows} rows; {PREPARE_HINT.format(uri=uri)}")
        if not self._table.num_rows:
            raise BadManifest(f"{uri}: is empty")

    def _check(self, uri: str, raw_rows: Iterator[tuple[int, Any]]) -> pa.Table:
        """Return the records of all rows.

        Raises:
            BadManifest: some are malformed.
        """
        tables, first_line = [SCHEMA.empty_table()], dict[str, int]()
        malformed: list[tuple[int, str]] = []
        reasons: Reasons = {}
        unused: Counter[str] = Counter()
        while rows := list(itertools.islice(raw_rows, BATCH_ROWS)):
            records, rejected = parse_rows(rows, self.roots, first_line, manifest=self.uri)
            tables.append(pa.Table.from_pylist(records, SCHEMA))
            malformed = malformed or rejected[:1]
            unused.update(key for record in records for key in sorted(record["unused"]))
            for number, reason in rejected:
                count_reason(reasons, number, reason)
        if malformed:
            raise _malformed(uri, malformed[0], reasons, sum(table.num_rows for table in tables))
        for line in unused_lines(unused):
            log.warning("%s: %s", uri, line)
        return pa.concat_tables(tables).combine_chunks()

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Return the rows of these indices (from 0), in this order.

        A row has `id`, `messages`, `kind`, `line` (from 1), `manifest`, and `videos`: the absolute paths or URIs of its
        video and image parts, in the order of the conversation.

        Raises:
            BadManifest: a file of a prepared manifest is damaged, or a row names a video outside of the roots or has
                messages that are not JSON.
        """
        with manifest_errors(self.uri):
            rows = self._table.take(pa.array(indices, pa.int64())).select(["id", "videos", "messages", "kind", "line"])
            return [
                row
                | {
                    "videos": [self._resolve(video, f"line {row['line']}") for video in row["videos"]],
                    "messages": self._messages(row),
                    "manifest": self.uri,
                }
                for row in rows.to_pylist()
            ]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, see `take`; for small manifests."""
        return self.take(np.arange(len(self)))

    def videos(self) -> Iterator[tuple[str, "VideoReference"]]:
        """Yield (URI, row and duration) of each video and image part of each row, repetitions included."""
        with manifest_errors(self.uri):
            table = self._table.videos() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
            table = table.select(["videos", "seconds"])
            for row, record in enumerate(row for batch in table.to_batches(BATCH_ROWS) for row in batch.to_pylist()):
                durations = record["seconds"] or [None] * len(record["videos"])
                for video, seconds in zip(record["videos"], durations, strict=True):
                    reference = VideoReference(row, float("nan") if seconds is None else seconds)
                    yield self._resolve(video, f"row {row + 1}"), reference

    def _resolve(self, video: str, location: str) -> str:
        """Return a video's absolute URI. A prepared manifest was checked against the roots of the job that made it,
        which may differ from these."""
        try:
            return resolve_video(video, self.roots)
        except ValueError as error:
            raise BadManifest(f"{self.uri}: {location}: {error}") from None

    def _messages(self, row: dict[str, Any]) -> Any:
        """Return a row's messages."""
        try:
            return storage.parse_json(row["messages"])
        except ValueError as error:
            raise BadManifest(f"{self.uri}: line {row['line']}: messages: {printable(str(error))}") from None

    def estimate_tokens(self, sampling: FrameSampling, tokens_per_frame: int) -> np.ndarray:
        """Estimate the tokens of each row without opening a video: float32 (rows,).

        Four characters count as one token; a video of unknown duration counts as the most frames that the policy
        gives.
        """
        with manifest_errors(self.uri):
            table = self._table.lengths() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
        seconds = table["seconds"].combine_chunks()
        frames = sampling.count(np.asarray(seconds.flatten().to_numpy(zero_copy_only=False), np.float64))
        ends = np.concatenate([[0], np.cumsum(np.asarray(seconds.value_lengths().fill_null(0)))])
        frames_before = np.concatenate([[0], np.cumsum(frames)])[ends]
        chars = np.asarray(table["chars"].combine_chunks())
        return (chars / 4 + np.diff(frames_before) * tokens_per_frame).astype(np.float32)


@dataclass(frozen=True)
class VideoReference:
    """A row that names a video (the first one, in `Rows.videos`), and the video's duration."""

    row: int
    """Index of the row, from 0."""
    seconds: float
    """Duration [s]; NaN if unknown, 0 for an image."""


class Rows:
    """The rows of several manifests, numbered in the order of the manifests, as in `DeterministicSampler`.

    Attributes:
        manifests: the manifests, in this order.
        roots: folders that the videos of any of them may lie in.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.manifests = manifests
        self.roots = [root for manifest in manifests for root in manifest.roots]
        self._starts = np.cumsum([0, *map(len, manifests)])

    def take(self, indices: np.ndarray) -> list[dict[str, Any]]:
        """Return the rows of these indices, int64 (n,), in this order; see `Manifest.take`."""
        manifest_of = np.searchsorted(self._starts, indices, side="right") - 1
        rows: dict[int, dict[str, Any]] = {}
        for number in np.unique(manifest_of):
            wanted = np.unique(indices[manifest_of == number])
            rows |= zip(wanted.tolist(), self.manifests[number].take(wanted - self._starts[number]), strict=True)
        return [rows[index] for index in indices.tolist()]

    def videos(self) -> dict[str, VideoReference]:
        """Return each video URI of the rows once, in the order of its first row."""
        references: dict[str, VideoReference] = {}
        for start, manifest in zip(self._starts.tolist(), self.manifests, strict=False):
            for uri, video in manifest.videos():
                references.setdefault(uri, VideoReference(start + video.row, video.seconds))
        return references


def _malformed(uri: str, first: tuple[int, str], reasons: Reasons, good: int) -> BadManifest:
    """Return the error about malformed rows; the first one is given as (line, reason)."""
    message = f"{uri}: line {first[0]}: {first[1]}"
    count = sum(entry[0] for entry in reasons.values())
    if count == 1:
        return BadManifest(message)
    return BadManifest(f"{message}; {count:,} of {good + count:,} rows are malformed", problem_table(reasons))


def base_folder(uri: str) -> str:
    """Return the folder that a manifest's relative paths start from."""
    return uri if is_folder(uri) else storage.parent(uri)
