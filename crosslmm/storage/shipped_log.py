"""Logs in storage: the beginning and the end of a growing local file, copied there again and again."""

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from crosslmm.storage.files import remove, write_bytes
from crosslmm.storage.folders import names_in
from crosslmm.storage.names import join
from crosslmm.storage.retry import NO_RETRIES, retrying
from crosslmm.text import printable, redacted

EVERY_S = 15.0
"""Pause between two copies: what a process that is killed wrote since the last one is lost [s]."""
HEAD_BYTES, TAIL_BYTES = 2**17, 2**19
"""Of a longer file, this much of its beginning and of its end is copied [bytes]."""


class ShippedLog:
    """Context manager whose thread copies a growing file to storage, and once more at the end.

    Only the end of the context waits for it, and no failure of the store reaches anybody: it tries again. The copy has
    neither credentials nor control characters.

    Args:
        path: local file.
        uri: of the copy, path or URI.
        every_s: see `EVERY_S`.
    """

    def __init__(self, path: Path, uri: str, every_s: float = EVERY_S) -> None:
        self.path, self.uri, self.every_s = path, uri, every_s
        self._shipped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"log to {uri}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join(self.every_s)

    def _follow(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(self.every_s)
            with contextlib.suppress(OSError), retrying(NO_RETRIES):
                self._ship()

    def _ship(self) -> None:
        size = self.path.stat().st_size
        if size != self._shipped:
            write_bytes(self.uri, printable(redacted(excerpt(self.path).decode(errors="replace"))).encode())
            self._shipped = size


def excerpt(path: Path) -> bytes:
    """Return a file's content; of a long one its beginning and its end, and how much was left out between them."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= HEAD_BYTES + TAIL_BYTES:
            return file.read(HEAD_BYTES + TAIL_BYTES)
        head = file.read(HEAD_BYTES)
        file.seek(size - TAIL_BYTES)
        return b"%s\n[%d bytes left out]\n%s" % (head, size - HEAD_BYTES - TAIL_BYTES, file.read(TAIL_BYTES))


def output_files() -> Iterator[Path]:
    """Yield the files that this process's standard output and standard error go to, if they go to files."""
    with contextlib.suppress(OSError):  # no /proc, or a descriptor is closed
        files = {Path(f"/proc/self/fd/{number}").resolve() for number in (1, 2)}
        yield from sorted(path for path in files if stat.S_ISREG(path.stat().st_mode))


def keep_newest(folder: str, most: int) -> None:
    """Remove all but the last `most` logs of a folder, in the order of their names; failures are left for next time."""
    with contextlib.suppress(OSError), retrying(NO_RETRIES):
        remove([join(folder, name) for name in sorted(names_in(folder))[:-most]])
