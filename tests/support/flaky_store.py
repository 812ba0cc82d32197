"""A store that misbehaves when a test says so: an HTTP proxy on loopback before a real one.

    with FlakyStore(port_of_the_store) as flaky:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{flaky.port}"
        flaky.writes = "503"                                   # from now on; None heals it
        held = flaky.hold(lambda method, path: method == "PUT" and "checkpoint" in path, after=1000)
        held.wait(30)                                          # such a request is on its way, and stands still
        held.drop()                                            # or .release()

Clients sign the Host header, and the store checks the one that it gets: it passes through unchanged.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import BinaryIO, Literal, Self

Mode = Literal["503", "reset", "lost"] | float | None
"""What becomes of a request. "503": it is answered with S3's SlowDown. "reset": the connection breaks in the middle of
its body, or of the answer's. "lost": the store gets it whole, and the connection breaks before the answer. A number: it
is passed on after so many seconds. None: it is passed on."""

READS = ("GET", "HEAD")
PIECE = 1 << 16
SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"


class Held:
    """Requests that match, each kept waiting until the test decides for all of them; later ones pass."""

    def __init__(self, matches: Callable[[str, str], bool], after: int | None) -> None:
        self.matches, self.after = matches, after
        self.requests: list[tuple[str, str]] = []
        self._reached, self._decided = threading.Event(), threading.Event()
        self._dropped = False

    def wait(self, seconds: float) -> tuple[str, str]:
        """(method, path) of the first one, as soon as it is held."""
        if not self._reached.wait(seconds):
            raise TimeoutError(f"no request to hold came in {seconds:g} s")
        return self.requests[0]

    def release(self) -> None:
        """Pass them on."""
        self._decided.set()

    def drop(self) -> None:
        """Break their connections: what the store has of them is a part."""
        self._dropped = True
        self._decided.set()

    def over(self) -> bool:
        return self._decided.is_set()

    def keep(self, method: str, path: str) -> None:
        self.requests.append((method, path))
        self._reached.set()
        self._decided.wait()
        if self._dropped:
            raise _Broken


class _Broken(Exception):
    """This connection is to be reset."""


class _Head:
    """The first line and the headers of a message, as they came."""

    def __init__(self, file: BinaryIO) -> None:
        lines = []
        while line := file.readline(PIECE):
            lines.append(line)
            if line == b"\r\n":
                break
        self.bytes = b"".join(lines)
        self.first = lines[0].decode("latin-1").split(" ", 2) if lines else []
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:])
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}

    def body(self, file: BinaryIO) -> Iterator[bytes]:
        """As it stands on the wire, frames of chunks included."""
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := file.readline(PIECE):
                yield size
                if left := int(size.split(b";")[0], 16):
                    yield file.read(left + 2)
                    continue
                while (line := file.readline(PIECE)) not in (b"\r\n", b""):
                    yield line
                yield b"\r\n"
                return
            raise OSError("it ended within its body")
        left = int(self.headers.get("content-length", 0))
        while left:
            piece = file.read1(min(PIECE, left))  # type: ignore[attr-defined]
            if not piece:
                raise OSError("it ended within its body")
            left -= len(piece)
            yield piece


class FlakyStore:
    """Listens on `port` while the block is entered, a thread for each connection.

    Attributes:
        reads, writes: `Mode` of GET and HEAD, and of everything else.
        requests: (method, path with query) of all so far.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.target = target
        self.reads: Mode = None
        self.writes: Mode = None
        self.requests: list[tuple[str, str]] = []
        self._held: list[Held] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for held in self._held:
            held.drop()

    def hold(self, matches: Callable[[str, str], bool], after: int | None = None) -> Held:
        """Keep requests waiting whose method and path match: before the store hears of them, or after so many bytes of
        their bodies [bytes]."""
        self._held.append(Held(matches, after))
        return self._held[-1]

    def heal(self) -> None:
        """From now on all requests are passed on; those that are held, too."""
        self.reads = self.writes = None
        for held in self._held:
            held.release()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rb") as asked, suppress(OSError):
            try:
                while (head := _Head(asked)).first:
                    self._pass_on(head, asked, client)
            except _Broken:
                # Closed so, a socket says RST at once instead of FIN.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _pass_on(self, head: _Head, asked: BinaryIO, client: socket.socket) -> None:
        method, path, _ = head.first
        self.requests.append((method, path))
        held = next((held for held in self._held if not held.over() and held.matches(method, path)), None)
        if held and held.after is None:
            held.keep(method, path)
        mode = self.reads if method in READS else self.writes
        if isinstance(mode, int | float):
            time.sleep(mode)
        if head.headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if mode == "503":
            for _ in head.body(asked):
                pass
            said = (
                f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
            )
            client.sendall(said.encode() + SLOW_DOWN * (method != "HEAD"))
            return
        size = int(head.headers.get("x-amz-decoded-content-length") or head.headers.get("content-length", 0))
        with ExitStack() as stack:
            # A new connection for each: one that the store has closed meanwhile would look like a fault of ours.
            store = stack.enter_context(socket.create_connection(("127.0.0.1", self.target)))
            answers = stack.enter_context(store.makefile("rb"))
            lines = head.bytes.splitlines(keepends=True)
            store.sendall(b"".join(line for line in lines if not line.lower().startswith(b"expect:")))
            sent = 0
            for piece in head.body(asked):
                if held and held.after is not None and sent <= held.after < sent + len(piece):
                    store.sendall(piece[: held.after - sent])
                    held.keep(method, path)
                    piece, sent = piece[held.after - sent :], held.after
                if mode == "reset" and sent + len(piece) > size // 2:
                    store.sendall(piece[: max(0, size // 2 - sent)])
                    raise _Broken
                store.sendall(piece)
                sent += len(piece)
            if mode == "reset" and method not in READS:
                raise _Broken
            answer = _Head(answers)
            if not answer.first or mode == "lost":
                raise _Broken
            if mode == "reset":
                length = int(answer.headers.get("content-length", 0))
                client.sendall(answer.bytes if length and method == "GET" else b"")
                left = length // 2
                for piece in answer.body(answers) if method == "GET" else ():
                    client.sendall(piece[:left])
                    left -= len(piece)
                    if left <= 0:
                        break
                raise _Broken
            client.sendall(answer.bytes)
            if method != "HEAD" and answer.first[1] not in ("204", "304"):
                for piece in answer.body(answers):
                    client.sendall(piece)
