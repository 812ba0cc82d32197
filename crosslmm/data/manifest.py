"""The manifest: rows, each a conversation, most of them about a video. `formats` says what it may be written in."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from crosslmm import storage
from crosslmm.data import formats, manifest_shards
from crosslmm.data.frame_sampling import FrameSampling
from crosslmm.data.manifest_shards import SCHEMA
from crosslmm.data.row_schema import parse_rows, placed


class BadManifest(Exception):
    """A manifest that cannot be read as one; the message names the file, the line and the reason."""


MAX_UNPREPARED_ROWS = 1_000_000
"""Rows of a manifest that is read and checked as a whole, in the driver: about a minute, and 0.3 to 1 kB a row."""


MOST_BYTES = 4 * 2**30
"""Of such a manifest; it is in memory twice while its lines are told apart."""
PREPARE = "make it one that is read piece by piece: python jobs/prepare.py convert {uri} FOLDER"


class Manifest:
    """The rows of a manifest, with their videos' places resolved.

    A prepared manifest (`jobs/prepare.py convert`) was checked when it was made, and its rows are read when they are
    asked for. Any other is read whole and checked now.

    Attributes:
        uri: where it was read.
        digest: sha256, hex, of its bytes, or of a prepared one's seal, which holds its parts' digests.
        roots: folders that its videos may lie in: its own, and what it was opened with.
    """

    def __init__(self, uri: str, roots: Sequence[str] = ()) -> None:
        """Open a manifest; `roots` are further folders that its videos may lie in.

        Raises:
            BadManifest: unreadable, empty, too long to be read whole, or with malformed lines; up to five of them are
                named.
        """
        self.uri = storage.absolute(uri)
        self._table: pa.Table | manifest_shards.PreparedTable
        self._folder = ""
        try:
            self._folder = base_folder(self.uri)
            self.roots = [self._folder, *map(storage.absolute, roots)]
            if manifest_shards.is_prepared(self.uri):
                self._table = manifest_shards.PreparedTable(self.uri)
                self.digest = self._table.digest
                self.take([0])  # where the others lie, as a rule
                return
            if self._folder != self.uri and (size := storage.stamp_of(self.uri)[0]) > MOST_BYTES:
                raise BadManifest(f"{uri}: has {size / 1e9:.1f} GB; {PREPARE.format(uri=uri)}")
            data, raw_rows = formats.read_rows(self.uri)
        except (OSError, ValueError, RecursionError) as error:
            raise BadManifest(f"{uri}: cannot be read: {type(error).__name__}: {error}") from error
        self.digest = hashlib.sha256(data).hexdigest()
        records, reasons = parse_rows(itertools.islice(raw_rows, MAX_UNPREPARED_ROWS + 1), self.roots)
        if len(records) + len(reasons) > MAX_UNPREPARED_ROWS:
            raise BadManifest(f"{uri}: has more than {MAX_UNPREPARED_ROWS} rows; {PREPARE.format(uri=uri)}")
        if reasons:
            more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
            named = "; ".join(f"line {number}: {reason}" for number, reason in reasons[:5])
            raise BadManifest(f"{uri}: {named}{more}")
        if not records:
            raise BadManifest(f"{uri}: is empty")
        self._table = pa.Table.from_pylist(records, SCHEMA)

    def __len__(self) -> int:
        return self._table.num_rows

    def take(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Some rows, by their numbers from 0: `id`, `messages`, `kind`, `line` (from 1), `manifest`, and `videos`, the
        absolute paths or URIs of its video and image parts, in order.

        Raises:
            BadManifest: a prepared row names a video outside of the roots.
        """
        rows = self._table.take(pa.array(indices, pa.int64())).select(["id", "videos", "messages", "kind", "line"])
        return [
            row
            | {
                "videos": [self._placed(video, f"line {row['line']}") for video in row["videos"]],
                "messages": json.loads(row["messages"]),
                "manifest": self.uri,
            }
            for row in rows.to_pylist()
        ]

    @functools.cached_property
    def rows(self) -> list[dict[str, Any]]:
        """All of them, for small manifests."""
        return self.take(np.arange(len(self)))

    def videos(self) -> Iterator[tuple[str, "Video"]]:
        """Every place that a row names, as often as it is named."""
        table = self._table.videos() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
        table = table.select(["videos", "seconds"])
        for row, record in enumerate(row for batch in table.to_batches(4096) for row in batch.to_pylist()):
            lengths = record["seconds"] or [None] * len(record["videos"])
            for place, seconds in zip(record["videos"], lengths, strict=True):
                yield self._placed(place, f"row {row + 1}"), Video(row, float("nan") if seconds is None else seconds)

    def _placed(self, video: str, where: str) -> str:
        """Where a row's video lies. What was checked when a prepared manifest was made may not hold for this one."""
        try:
            return placed(video, self.roots)
        except ValueError as error:
            raise BadManifest(f"{self.uri}: {where}: {error}") from None

    def estimate_tokens(self, sampling: FrameSampling, tokens_per_frame: int) -> np.ndarray:
        """About how many tokens each row is, before anything is opened: float32 (rows,). Characters count as a quarter;
        a video of unknown duration as the most frames that it may give."""
        table = self._table.lengths() if isinstance(self._table, manifest_shards.PreparedTable) else self._table
        seconds = table["seconds"].combine_chunks()
        frames = sampling.count(np.asarray(seconds.flatten().to_numpy(zero_copy_only=False), np.float64))
        ends = np.concatenate([[0], np.cumsum(np.asarray(seconds.value_lengths().fill_null(0)))])
        summed = np.concatenate([[0], np.cumsum(frames)])[ends]
        chars = np.asarray(table["chars"].combine_chunks())
        return (chars / 4 + np.diff(summed) * tokens_per_frame).astype(np.float32)


@dataclass(frozen=True)
class Video:
    """Where a place is first named, and how long it is."""

    row: int
    """Number of the row, from 0."""
    seconds: float
    """NaN where it is not known, 0 of an image."""


class Rows:
    """The rows of several manifests, numbered one manifest behind the other, as `Order` does.

    Attributes:
        manifests: in this order.
        roots: of all of them.
    """

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self.manifests = manifests
        self.roots = [root for manifest in manifests for root in manifest.roots]
        self._starts = np.cumsum([0, *map(len, manifests)])

    def take(self, numbers: np.ndarray) -> list[dict[str, Any]]:
        """The rows of these numbers, int64 (n,), in their order; see `Manifest.take`."""
        source = np.searchsorted(self._starts, numbers, side="right") - 1
        found: dict[int, dict[str, Any]] = {}
        for which in np.unique(source):
            mine = np.unique(numbers[source == which])
            found |= zip(mine.tolist(), self.manifests[which].take(mine - self._starts[which]), strict=True)
        return [found[number] for number in numbers.tolist()]

    def videos(self) -> dict[str, Video]:
        """Every place that rows name, once, in the order of the rows."""
        found: dict[str, Video] = {}
        for start, manifest in zip(self._starts.tolist(), self.manifests, strict=False):
            for place, video in manifest.videos():
                found.setdefault(place, Video(start + video.row, video.seconds))
        return found


def base_folder(uri: str) -> str:
    """What a manifest's relative places are relative to."""
    return uri if formats.is_folder(uri) else storage.parent(uri)
