"""A remote object as a file, of which only the requested ranges are transferred."""

import io
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec

from crosslmm.storage.retry import (
    Unavailable,
    classified_errors,
    current_policy,
    retrying,
    with_retries,
)


class RangedFile(io.RawIOBase):
    """A remote object, read in ranges.

    s3fs' own read-ahead of 50 MiB fetches 182 MB of a 188 MB video to get 32 frames. Here an announced range is one
    request (large ones are split), made while the previous range is in use. Outside of announced ranges the file reads
    ahead half as much as was last read sequentially, so that a header costs few requests and a seek wastes little.

    Attributes:
        size: size of the object [bytes].
        version: ETag of the object. Reading an object that was replaced since it was opened raises `Unavailable`.
    """

    MIN_REQUEST, MAX_REQUEST = 64 * 2**10, 8 * 2**20
    """Bounds of one request [bytes]; an announced range may be smaller."""
    CACHED_PIECES = 4
    """Number of cached pieces: a demuxer jumps between the head, the index and the frames."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__()
        self._name = f"s3://{path}"
        self._file: Any = fs.open(path, "rb", cache_type="none")
        self.size = int(self._file.size)
        self.version = str(self._file.details.get("ETag", "")).strip('"') or None
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=self.CACHED_PIECES)
        self._announced: list[tuple[int, int]] = []
        self._pending: tuple[tuple[int, int], Future[bytes]] | None = None
        # One thread makes all requests, so one file position suffices.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._policy = current_policy()
        self._position = self._sequence_start = 0

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce the byte ranges [start, end) that will be read, ascending; overlapping ones are merged."""
        merged: list[tuple[int, int]] = []
        for start, end in ranges:
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, min(end, self.size)))
        self._announced = [
            (at, min(at + self.MAX_REQUEST, end)) for start, end in merged for at in range(start, end, self.MAX_REQUEST)
        ]
        if self._announced:  # a file without an index announces nothing
            self._request(0)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the current piece; return the number of bytes, 0 at the end of the file only."""
        if self._position >= self.size or not len(buffer):
            return 0
        start, data = self._piece()
        part = data[self._position - start :][: len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def _piece(self) -> tuple[int, bytes]:
        """Return (start, bytes) of the piece at the current position, from the cache or the store."""
        for start, data in self._pieces:
            if start <= self._position < start + len(data):
                return start, data
        number = bisect_right(self._announced, (self._position, self.size)) - 1
        if number >= 0 and self._position < self._announced[number][1]:
            span, future = self._request(number)
            piece = span[0], future.result()
            self._pending = None
            if number + 1 < len(self._announced):
                self._request(number + 1)
        else:
            sequence = self._position - self._sequence_start
            end = self._position + min(max(sequence // 2, self.MIN_REQUEST), self.MAX_REQUEST)
            later = (start for start, _ in self._announced if start > self._position)
            span = self._position, min(end, self.size, next(later, self.size))
            piece = span[0], self._thread.submit(self._fetch, *span).result()
        self._pieces.append(piece)
        return piece

    def _request(self, number: int) -> tuple[tuple[int, int], "Future[bytes]"]:
        """Start to fetch announced range `number`, unless its request is pending; return the range and its future."""
        if number < len(self._announced) and (self._pending is None or self._pending[0] != self._announced[number]):
            span = self._announced[number]
            self._pending = span, self._thread.submit(self._fetch, *span)
        assert self._pending is not None
        return self._pending

    def _fetch(self, start: int, end: int) -> bytes:
        from s3fs.utils import FileExpired  # takes half a second to import; a remote file has imported it already

        def attempt() -> bytes | None:
            with classified_errors(self._name):
                self._file.seek(start)
                try:
                    data = self._file.read(end - start)
                except FileExpired:
                    return None
            if len(data) != end - start:
                raise Unavailable(f"{self._name}: received {len(data)} bytes instead of {end - start}")
            return data

        with retrying(self._policy):  # in this file's own thread
            fetched = with_retries(attempt)
        if fetched is None:  # opening it again reads the new object
            raise Unavailable(f"{self._name}: it expired: another object has taken its place")
        return fetched

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; a seek resets the read-ahead."""
        position = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset)
        if position != self._position:
            self._position = self._sequence_start = position
        return position

    def tell(self) -> int:
        """Return the position [bytes]."""
        return self._position

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def close(self) -> None:
        """Drop cached pieces and pending requests."""
        if not self.closed:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._pieces.clear()
            self._pending = None
        super().close()
