"""An object store that fails on request: an HTTP proxy on loopback in front of a real store.

    with FlakyStore(port_of_the_store) as flaky:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{flaky.port}"
        flaky.writes = "503"                                   # from now on; None heals it
        held = flaky.hold(lambda method, path: method == "PUT" and "checkpoint" in path, after=1000)
        held.wait(30)                                          # such a request is stopped half-way
        held.drop()                                            # or .release()

Clients sign the Host header and the store checks it, so the proxy passes it through unchanged.
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
"""How a request fails. "503": response 503 SlowDown. "reset": the connection is reset in the middle of the body of a
write, or of the response to a read. "lost": the store gets the complete request, and the connection is reset before the
response. A number: the request is delayed [s]. None: no failure."""

READS = ("GET", "HEAD")
PIECE = 1 << 16
SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Slow down.</Message></Error>"


class Held:
    """Stops matching requests until the test releases or drops them; later ones pass."""

    def __init__(self, matches: Callable[[str, str], bool], after: int | None) -> None:
        self.matches, self.after = matches, after
        self.requests: list[tuple[str, str]] = []
        self._reached, self._decided = threading.Event(), threading.Event()
        self._dropped = False

    def wait(self, seconds: float) -> tuple[str, str]:
        """Wait until a request is stopped; return its (method, path)."""
        if not self._reached.wait(seconds):
            raise TimeoutError(f"no matching request within {seconds:g} s")
        return self.requests[0]

    def release(self) -> None:
        """Pass the stopped requests on."""
        self._decided.set()

    def drop(self) -> None:
        """Reset the connections of the stopped requests; the store has a part of each."""
        self._dropped = True
        self._decided.set()

    def is_decided(self) -> bool:
        return self._decided.is_set()

    def stop(self, method: str, path: str) -> None:
        self.requests.append((method, path))
        self._reached.set()
        self._decided.wait()
        if self._dropped:
            raise _Reset


class _Reset(Exception):
    """Resets the current connection."""


class _Head:
    """First line and headers of an HTTP message, unchanged."""

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
        """Yield the body as transferred, including chunk frames."""
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
            raise OSError("the message ended within its body")
        left = int(self.headers.get("content-length", 0))
        while left:
            piece = file.read1(min(PIECE, left))  # type: ignore[attr-defined]
            if not piece:
                raise OSError("the message ended within its body")
            left -= len(piece)
            yield piece


class FlakyStore:
    """Context manager: listens on `port`, with a thread per connection.

    Attributes:
        reads, writes: `Mode` of GET and HEAD requests, and of all others.
        requests: (method, path with query) of all requests so far.
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
        """Stop requests whose method and path match: before the store gets them, or after `after` bytes of the body."""
        self._held.append(Held(matches, after))
        return self._held[-1]

    def heal(self) -> None:
        """Pass on all requests from now on, including the stopped ones."""
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
        with client, client.makefile("rb") as request, suppress(OSError):
            try:
                while (head := _Head(request)).first:
                    self._pass_on(head, request, client)
            except _Reset:
                # With this option, closing the socket sends RST instead of FIN.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _pass_on(self, head: _Head, request: BinaryIO, client: socket.socket) -> None:
        method, path, _ = head.first
        self.requests.append((method, path))
        held = next((held for held in self._held if not held.is_decided() and held.matches(method, path)), None)
        if held and held.after is None:
            held.stop(method, path)
        mode = self.reads if method in READS else self.writes
        if isinstance(mode, int | float):
            time.sleep(mode)
        if head.headers.get("expect", "").lower() == "100-continue":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if mode == "503":
            for _ in head.body(request):
                pass
            response = (
                f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n\r\n"
            )
            client.sendall(response.encode() + SLOW_DOWN * (method != "HEAD"))
            return
        size = int(head.headers.get("x-amz-decoded-content-length") or head.headers.get("content-length", 0))
        with ExitStack() as stack:
            # A new connection per request: one that the store has closed meanwhile would look like an injected failure.
            store = stack.enter_context(socket.create_connection(("127.0.0.1", self.target)))
            responses = stack.enter_context(store.makefile("rb"))
            lines = head.bytes.splitlines(keepends=True)
            store.sendall(b"".join(line for line in lines if not line.lower().startswith(b"expect:")))
            sent = 0
            for piece in head.body(request):
                if held and held.after is not None and sent <= held.after < sent + len(piece):
                    store.sendall(piece[: held.after - sent])
                    held.stop(method, path)
                    piece, sent = piece[held.after - sent :], held.after
                if mode == "reset" and sent + len(piece) > size // 2:
                    store.sendall(piece[: max(0, size // 2 - sent)])
                    raise _Reset
                store.sendall(piece)
                sent += len(piece)
            if mode == "reset" and method not in READS:
                raise _Reset
            response = _Head(responses)
            if not response.first or mode == "lost":
                raise _Reset
            if mode == "reset":
                length = int(response.headers.get("content-length", 0))
                client.sendall(response.bytes if length and method == "GET" else b"")
                left = length // 2
                for piece in response.body(responses) if method == "GET" else ():
                    client.sendall(piece[:left])
                    left -= len(piece)
                    if left <= 0:
                        break
                raise _Reset
            client.sendall(response.bytes)
            if method != "HEAD" and response.first[1] not in ("204", "304"):
                for piece in response.body(responses):
                    client.sendall(piece)
