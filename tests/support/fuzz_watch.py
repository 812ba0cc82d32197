"""Watches a function while it handles a hostile file: what it opens, starts and contacts, and how long it takes."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

CASE_SECONDS = 30.0


class Hang(BaseException):
    """A case took too long."""


class Watch:
    """Notes what a case does that it must not."""

    READING = ("open", "os.listdir", "os.scandir")
    CHANGING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
    """These act on a link, and not on what it leads to."""
    FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
                 "socket.bind", "socket.getaddrinfo", "socket.sendto")  # fmt: skip
    LIBRARIES = (f"{sys.prefix}/", f"{sys.base_prefix}/", f"{Path(__file__).parents[2]}/", "/dev/null/",
                 f"/proc/{os.getpid()}/stat/", "/proc/sys/kernel/random/boot_id/")  # fmt: skip
    """Also what a lease says of its process."""

    def __init__(self) -> None:
        self.folder = ""
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in self.FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}")
        elif event in self.READING + self.CHANGING:
            for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
                if isinstance(path, str | bytes | os.PathLike):
                    self._check(event, os.fsdecode(path))

    def _check(self, event: str, path: str) -> None:
        with contextlib.suppress(ValueError):  # a name that no file can have
            folder, name = os.path.split(path)
            real = os.path.realpath(path) if event in self.READING else f"{os.path.realpath(folder)}/{name}"
            allowed = (f"{self.folder}/", *(self.LIBRARIES if event in self.READING else ()))
            if not f"{real}/".startswith(allowed):
                self.seen.append(f"{event} {path!r}")

    @contextlib.contextmanager
    def case(self, folder: Path) -> Iterator[None]:
        """Watch one case, which may open the files of a folder, and Python's libraries."""

        def hangs(number: int, frame: FrameType | None) -> None:
            raise Hang(f"took more than {CASE_SECONDS:g} s")

        signal.signal(signal.SIGALRM, hangs)
        signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
        self.folder, self.active = os.path.realpath(folder), True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        assert not self.seen, f"outside of the folder: {self.seen}"
