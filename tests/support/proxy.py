"""A TCP proxy that disturbs the connections to a server as it is told: refuses, cuts, delays, swallows the answer. It counts
what the server sends."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Self

HOST = "127.0.0.1"
PIECE_BYTES = 1 << 16


class Proxy:
    """Passes connections to ``port`` on. Its attributes are set while it runs and count for what happens from then on."""

    def __init__(self, port: int) -> None:
        self.upstream_port = port
        self.refusals = 0  # so many of the next connections are reset at once
        self.cuts = 0  # so many connections are reset …
        self.cut_after_bytes = 0  # … when each has sent more than this
        self.lost_answers = 0  # so many connections are reset when the server answers …
        self.lost_after_bytes = 0  # … to one that has sent more than this
        self.delay_seconds = 0.0  # of each piece
        self.disturbances = 0  # resets so far
        self.served_bytes = 0  # sent by the server so far
        self.busiest_bytes = 0  # of these, on the connection that has had most
        self.most_at_once = 0  # connections on which the server's bytes were under way at one time
        self._under_way = 0
        self._lock = threading.Lock()
        self._ends: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset_all()

    def reset_all(self) -> None:
        """Resets every connection there is."""
        for end in list(self._ends):
            _reset(end)

    @contextlib.contextmanager
    def delivery(self, size_bytes: int, of_connection_bytes: int) -> Iterator[None]:
        """The time in which bytes of the server's are under way."""
        with self._lock:
            self.served_bytes += size_bytes
            self.busiest_bytes = max(self.busiest_bytes, of_connection_bytes)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            yield
        finally:
            with self._lock:
                self._under_way -= 1

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._take("refusals"):
                _reset(client)
                continue
            try:
                server = socket.create_connection((HOST, self.upstream_port))
            except OSError:
                _reset(client)
                continue
            self._ends |= {client, server}
            connection = _Connection(self, client, server)
            for pump in (connection.pump_up, connection.pump_down):
                threading.Thread(target=pump, daemon=True).start()

    def _take(self, what: str) -> bool:
        """Uses one of the disturbances up that were ordered."""
        with self._lock:
            left = getattr(self, what)
            if left:
                setattr(self, what, left - 1)
                self.disturbances += 1
            return bool(left)


class _Connection:
    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy, self.client, self.server = proxy, client, server
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent_bytes = self.served_bytes = 0

    def pump_up(self) -> None:
        while data := self._receive(self.client):
            self.sent_bytes += len(data)
            if self.sent_bytes > self.proxy.cut_after_bytes and self.proxy._take("cuts"):
                break
            self._send(self.server, data)
        self._end()

    def pump_down(self) -> None:
        while data := self._receive(self.server):
            if self.sent_bytes > self.proxy.lost_after_bytes and self.proxy._take("lost_answers"):
                break
            self.served_bytes += len(data)
            with self.proxy.delivery(len(data), self.served_bytes):
                self._send(self.client, data)
        self._end()

    def _receive(self, end: socket.socket) -> bytes:
        with contextlib.suppress(OSError):
            return end.recv(PIECE_BYTES)
        return b""

    def _send(self, end: socket.socket, data: bytes) -> None:
        time.sleep(self.proxy.delay_seconds)
        with contextlib.suppress(OSError):
            end.sendall(data)

    def _end(self) -> None:
        for end in (self.client, self.server):
            _reset(end)


def _reset(end: socket.socket) -> None:
    """Ends a connection so that the other side gets an error, rather than an end that looks regular."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.shutdown(socket.SHUT_RD)  # wakes a thread that waits for data
        end.close()
