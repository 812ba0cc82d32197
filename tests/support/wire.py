"""A TCP relay on loopback that counts requests and received bytes."""

import re
import socket
import threading
from types import TracebackType
from typing import Self

REQUEST = re.compile(rb"(?:GET|HEAD|PUT|POST|DELETE) \S+ HTTP/1\.1\r\n")


class Wire:
    """Context manager: listens on `port` and relays to `target`.

    Attributes:
        requests: number of HTTP requests so far.
        received: size of the responses so far, headers included [bytes].
        silent: set it to pass nothing on any more; connections stay open.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.target, self.requests, self.received, self.silent = target, 0, 0, False
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                store = socket.create_connection(("127.0.0.1", self.target))
            except OSError:  # the store has ended before its clients
                client.close()
                continue
            for source, sink, back in ((client, store, False), (store, client, True)):
                threading.Thread(target=self._relay, args=(source, sink, back), daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if back:
                    self.received += len(data)
                else:
                    # A request starts a packet, because the client waits for each response.
                    self.requests += bool(REQUEST.match(data))
                if not self.silent:
                    sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                end.close()
