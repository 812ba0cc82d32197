"""The manifest: one conversation per row, usually about a video.

`formats` reads the file formats, `row_schema` checks rows, `manifest_shards` reads prepared manifests.
"""

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from crosslmm import storage
from crosslmm.data import formats, manifest_shards
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest_shards import SCHEMA
from crosslmm.data.row_schema import parse_rows, resolve_video
from crosslmm.text import printable

MAX_UNPREPARED_ROWS = 1_000_000
"""Largest manifest that the driver reads and checks in one piece [rows]: about a minute, and 0.3 to 1 kB a row."""


class BadManifest(Exception):
    """A manifest that cannot be read; the message names the file, the line and the reason."""


@contextlib.contextmanager
def manifest_errors(manifest: str) -> Iterator[None]:
    """Context manager: turns errors of reading a manifest into `BadManifest`, which names it."""
    try:
        yield
    except storage.Unavailable:
        raise
    except (OSError, ValueError, RecursionError) as error:
        remedy = ", or add its target to --data.roots" if isinstance(error, storage.LeadsOut) else ""
        reason = f"{type(error).__name__}: {printable(str(error))}"
        raise BadManifest(f"{manifest}: cannot be read: {reason}{remedy}") from error


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
                the message names up to five.
        """
        self.uri = storage.absolute(uri)
        self._table: pa.Table | manifest_shards.PreparedTable
        self._folder = ""
        with manifest_errors(uri):
            self._folder = base_folder(self.uri)
            self.roots = [self._folder, *map(storage.absolute, roots)]
            if manifest_shards.is_prepared(self.uri):
                self._table = manifest_shards.PreparedTable(self.uri, self.roots)
                self.digest = self._table.digest
                self.take([0])  # fails if the first row's videos lie outside of the roots; usually so do all others
                return
            data, raw_rows = formats.read_rows(self.uri, self.roots)
            records, reasons = parse_rows(itertools.islice(raw_rows, max_rows + 1), self.roots)
        self.digest = hashlib.sha256(data).hexdigest()
        if len(records) + len(reasons) > max_rows:
            raise BadManifest(f"{uri}: has more than {max_rows} rows; {formats.PREPARE_HINT.format(uri=uri)}")
        if reasons:
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            first_five = "; ".join(f"line {number}: {reason}" for number, reason in reasons[:5])
            raise BadManifest(f"{uri}: {first_five}{more}")
        if not records:
            raise BadManifest(f"{uri}: is empty")
        self._table = pa.Table.from_pylist(records, SCHEMA)

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
            for row, record in enumerate(row for batch in table.to_batches(4096) for row in batch.to_pylist()):
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


def base_folder(uri: str) -> str:
    """Return the folder that a manifest's relative paths start from."""
    return uri if formats.is_folder(uri) else storage.parent(uri)
