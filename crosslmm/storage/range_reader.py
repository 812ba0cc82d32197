"""A remote object as a file, of which only the pieces that are asked for travel."""

import io
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import fsspec

from crosslmm.storage.retry import PRECONDITION_FAILED, Unavailable, patiently, status_of, told_apart


class RangedFile(io.RawIOBase):
    """A remote object, read in ranges.

    s3fs' own read-ahead of 50 MiB fetches 182 MB of a 188 MB video for 32 of its frames. Here an announced range is one
    request (large ones are cut), made while the one before it is in use; elsewhere the file reads ahead half as much as
    it was asked for in one go, so that a header costs few requests and a jump little waste.

    Attributes:
        size: of the object [bytes].
        version: its ETag. An object that is replaced while it is read is an error.
    """

    LEAST, MOST = 64 * 2**10, 8 * 2**20
    """Bounds of one request [bytes]; an announced range may be smaller."""
    PIECES = 4
    """Pieces kept: a demuxer jumps between the head, the index and the frames."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str) -> None:
        super().__init__()
        self._name = f"s3://{path}"
        self._file: Any = fs.open(path, "rb", cache_type="none")
        self.size = int(self._file.size)
        self.version = str(self._file.details.get("ETag", "")).strip('"') or None
        self._pieces: deque[tuple[int, bytes]] = deque(maxlen=self.PIECES)
        self._announced: list[tuple[int, int]] = []
        self._coming: tuple[tuple[int, int], Future[bytes]] | None = None
        # One thread makes all requests, so one file position is enough.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._position = self._run_start = 0

    def will_read(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce ranges [start, end), ascending; overlapping ones are joined."""
        joined: list[tuple[int, int]] = []
        for start, end in ranges:
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, min(end, self.size)))
        self._announced = [
            (at, min(at + self.MOST, end)) for start, end in joined for at in range(start, end, self.MOST)
        ]
        if self._announced:  # a file without an index announces nothing
            self._ask(0)

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with what is at hand, one byte at least before the end of the file."""
        if self._position >= self.size or not len(buffer):
            return 0
        start, data = self._piece()
        here = data[self._position - start :][: len(buffer)]
        buffer[: len(here)] = here
        self._position += len(here)
        return len(here)

    def _piece(self) -> tuple[int, bytes]:
        """The piece that holds the position, fetched if it is not at hand."""
        for start, data in self._pieces:
            if start <= self._position < start + len(data):
                return start, data
        number = bisect_right(self._announced, (self._position, self.size)) - 1
        if number >= 0 and self._position < self._announced[number][1]:
            span, future = self._ask(number)
            piece = span[0], future.result()
            self._coming = None
            if number + 1 < len(self._announced):
                self._ask(number + 1)
        else:
            end = self._position + min(max((self._position - self._run_start) // 2, self.LEAST), self.MOST)
            later = (start for start, _ in self._announced if start > self._position)
            span = self._position, min(end, self.size, next(later, self.size))
            piece = span[0], self._thread.submit(self._fetch, *span).result()
        self._pieces.append(piece)
        return piece

    def _ask(self, number: int) -> tuple[tuple[int, int], "Future[bytes]"]:
        """Have an announced range fetched, if it is not on its way."""
        if number < len(self._announced) and (self._coming is None or self._coming[0] != self._announced[number]):
            span = self._announced[number]
            self._coming = span, self._thread.submit(self._fetch, *span)
        assert self._coming is not None
        return self._coming

    def _fetch(self, start: int, end: int) -> bytes:
        def once() -> bytes:
            with told_apart(self._name):
                self._file.seek(start)
                data = self._file.read(end - start)
            if len(data) != end - start:
                raise Unavailable(f"{self._name}: {len(data)} bytes came where {end - start} were asked for")
            return data

        try:
            return patiently(once)
        except OSError as error:
            if status_of(error) == PRECONDITION_FAILED:  # whoever opens it again gets the new one
                raise Unavailable(f"{self._name}: it expired: another object has taken its place") from error
            raise

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; a jump ends the reading ahead."""
        position = max(0, {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset)
        if position != self._position:
            self._position = self._run_start = position
        return position

    def tell(self) -> int:
        """The position [bytes]."""
        return self._position

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Let go of what was read and of what is on its way."""
        if not self.closed:
            self._thread.shutdown(wait=False, cancel_futures=True)
            self._pieces.clear()
            self._coming = None
        super().close()
