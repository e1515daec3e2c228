"""Counts what a server answers: a TCP relay before it."""

import contextlib
import socket
import threading
from collections.abc import Iterator

HOST = "127.0.0.1"
PIECE_BYTES = 1 << 20


class Relay:
    """Passes connections to a port on, and counts the bytes that come back."""

    def __init__(self, port: int) -> None:
        self.upstream_port = port
        self.answered_bytes = 0
        self.lock = threading.Lock()
        self.listener = socket.create_server((HOST, 0), backlog=128)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                client, _ = self.listener.accept()
                server = socket.create_connection((HOST, self.upstream_port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self.pump, args=(*ends, ends[0] is server), daemon=True).start()

    def pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):  # one side has gone: so does the other
            while data := source.recv(PIECE_BYTES):
                if is_answer:
                    with self.lock:
                        self.answered_bytes += len(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def counting(port: int) -> Iterator[Relay]:
    """A relay before a port, as long as the block lasts."""
    relay = Relay(port)
    try:
        yield relay
    finally:
        relay.listener.close()
