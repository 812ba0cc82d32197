"""Writes the index and the quarantine file as blocks finish, and shows the progress of the job."""

import json
import logging
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from crosslmm import storage
from crosslmm.config import DataConfig
from crosslmm.data.feature_cache import QUARANTINE_FILE, IndexEntry, write_index
from crosslmm.data.manifest import VideoReference
from crosslmm.data.quarantine import ErrorBudget, escape_to_ascii, read_quarantine
from crosslmm.progress import Progress

log = logging.getLogger(__name__)

INDEX_INTERVAL_S = 5.0
"""Shortest time between two index files [s]. A killed job loses the features encoded after its last index file. Readers
need one request per index file."""
SOURCE = "the videos"
"""Source in the error budget: all manifests together, as blocks do not say which one a readable video belongs to."""


class EncodingRecorder:
    """Records finished blocks. Use it as a context manager: leaving the context writes the rest.

    Attributes:
        videos: videos encoded so far.
        frames: their frames.
        bytes: size of their features [bytes].
        squared_error: sum of squared rounding errors, see `write_shard`.
        squared_values: sum of squared values.
        quarantined: quarantine entries of this job.
    """

    def __init__(
        self,
        folder: str,
        missing: dict[str, VideoReference],
        data: DataConfig,
        require_owner: Callable[[], None] = lambda: None,
    ) -> None:
        """Read what earlier jobs quarantined.

        Args:
            folder: folder of the recipe.
            missing: the videos that this job encodes.
            data: error budget.
            require_owner: raises an error if the folder has another owner.
        """
        self.folder, self._require_owner = folder, require_owner
        self.videos = self.frames = self.bytes = 0
        self.squared_error = self.squared_values = 0.0
        self.quarantined: list[dict[str, Any]] = []
        self._first_start, self._last_end = math.inf, -math.inf
        self._pending: list[IndexEntry] = []
        self._last_write = 0.0
        self._started = time.monotonic()
        self._budget = ErrorBudget(data.max_bad_share, data.bad_allowed)
        self._progress = Progress(log, "encoding", len(missing), "video")
        # Videos that this job tries get a new entry, unless they have become readable.
        tried = {escape_to_ascii(uri) for uri in missing}
        self._earlier = [entry for entry in read_quarantine(folder) if entry["uri"] not in tried]

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._progress.__exit__(kind, error, tb)
        self._write()
        if self.quarantined:
            count = len(self.quarantined)
            log.warning("%s videos could not be read: %s in %s", count, QUARANTINE_FILE, self.folder)

    @property
    def encoding_s(self) -> float:
        """Time from the start of the first block to the end of the last one [s]; 0 without blocks."""
        return max(0.0, self._last_end - self._first_start)

    def add(self, report: dict[str, Any]) -> None:
        """Record a block.

        Args:
            report: see `actor.Encode`.

        Raises:
            TooManyUnreadable: the error budget is exceeded.
        """
        self._first_start = min(self._first_start, report["started"])
        self._last_end = max(self._last_end, report["ended"])
        entries = [IndexEntry(**entry) for entry in report["entries"]]
        self._pending += entries
        self.videos += sum(entry.frames > 0 for entry in entries)
        self.frames += sum(entry.frames for entry in entries)
        self.bytes += sum(entry.size for entry in entries)
        self.squared_error += report["squared_error"]
        self.squared_values += report["squared_values"]
        self.quarantined += report["quarantined"]
        for row in report["quarantined"]:
            log.warning("left out: %s line %s (%s): %s", row["manifest"], row["line"], row["id"], row["reason"])
        for line in report["shortfalls"]:
            log.warning("kept: %s", line)
        if time.monotonic() - self._last_write >= INDEX_INTERVAL_S:
            self._write()
        self._budget.record([SOURCE] * len(entries), [row | {"manifest": SOURCE} for row in report["quarantined"]])
        rate = self.frames / (time.monotonic() - self._started)
        self._progress.update(self.videos + len(self.quarantined), f"{rate:.0f} frames/s  {self.bytes / 1e9:.3f} GB")

    def _write(self) -> None:
        """Write the quarantine file, then the index: videos in the index are not tried again by this job."""
        self._last_write = time.monotonic()
        self._require_owner()
        rows = [*self._earlier, *self.quarantined]
        rows.sort(key=lambda row: (row["manifest"], row["line"], row["uri"]))
        if rows or storage.exists(storage.join(self.folder, QUARANTINE_FILE)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            storage.write_bytes(storage.join(self.folder, QUARANTINE_FILE), lines.encode())
        if self._pending:
            write_index(self.folder, self._pending)
            self._pending = []
