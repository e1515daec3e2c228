"""The metadata services of EC2, Compute Engine and Azure on one port of loopback: as strict as they are, faulty on demand.

    with MetadataServer() as server:
        server.aws["spot/instance-action"] = '{"action": "terminate", "time": "2030-01-01T00:02:00Z"}'
        server.break_with(reset)

A test sees what was asked in ``requests``, and waits with ``until`` for it, never for time to pass.
"""

import json
import os
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, urlsplit

HOST = "127.0.0.1"
PATIENCE_SECONDS = 20  # until a test gives up
AWS, GCP, AZURE = "/latest/meta-data/", "/computeMetadata/v1/instance/", "/metadata/"
AWS_TOKEN = "/latest/api/token"


class Request(NamedTuple):
    """A request as it came in, whatever became of it; ``at`` is a time of the monotonic clock."""

    at: float
    method: str
    path: str
    query: dict[str, str]


class MetadataServer(ThreadingHTTPServer):
    """Serves from ``with`` on, what its attributes say."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.changed = threading.Condition()
        self.closed = False
        self.requests: list[Request] = []
        self.waiting = 0  # long polls that are not answered yet
        self.fault: Callable[[_Handler], None] | None = None  # instead of an answer
        self.faulty = ""  # to the paths that contain this
        self.waits_for_change = True
        self.tokens: dict[str, float] = {}
        self.aws: dict[str, str] = {}
        self.gcp = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.azure_name = "train_3"
        self.azure_events: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def set_gcp(self, key: str, value: str) -> None:
        """Changes a value, and so its ETag; who waits for it is answered."""
        with self.changed:
            self.gcp[key] = value
            self.changed.notify_all()

    def break_with(self, fault: "Callable[[_Handler], None] | None", faulty: str = "") -> None:
        """Answers with a fault from here on, or with the truth again; a late one comes."""
        with self.changed:
            self.fault, self.faulty = fault, faulty
            self.changed.notify_all()

    def until(self, true: Callable[[], bool]) -> None:
        """Waits until requests or long polls have made it true."""
        with self.changed:
            assert self.changed.wait_for(true, PATIENCE_SECONDS), f"asked so far: {self.requests}"

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if path in request.path]

    def until_asked(self, path: str, times: int = 1) -> None:
        """Waits until requests for it have come in so many times."""
        self.until(lambda: len(self.asked(path)) >= times)

    def until_asked_again(self, path: str, times: int = 3) -> None:
        """Waits until so many more have come in: the last but one was answered with what is so now, and that was heeded."""
        self.until_asked(path, len(self.asked(path)) + times)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # who asks may hang up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: MetadataServer

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, text: str = "", **headers: str) -> None:
        content = text.encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.serve("", self.aws_token)

    def do_GET(self) -> None:
        for prefix, service in ((AWS, self.aws), (GCP, self.gcp), (AZURE, self.azure)):
            if self.path.startswith(prefix):
                return self.serve(prefix, service)
        return self.answer(404)

    def serve(self, prefix: str, service: Callable[[str, dict[str, str]], None]) -> None:
        """Notes the request, and answers it, if nothing is to go wrong."""
        url, server = urlsplit(self.path), self.server
        query = dict(parse_qsl(url.query))
        with server.changed:
            server.requests.append(Request(time.monotonic(), self.command, url.path, query))
            fault = server.fault if server.faulty in url.path else None
            server.changed.notify_all()
        if fault is None:
            return service(url.path.removeprefix(prefix), query)
        self.close_connection = True
        return fault(self)

    def wait_for(self, true: Callable[[], bool], seconds: float | None = None) -> bool:
        """Waits for a change of the server; not for longer than there is one."""
        with self.server.changed:
            return self.server.changed.wait_for(lambda: self.server.closed or true(), seconds)

    # --- EC2 ---------------------------------------------------------------------------------------------------------

    def aws_token(self, path: str, query: dict[str, str]) -> None:
        lifetime = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if path != AWS_TOKEN:
            return self.answer(404)
        if not lifetime.isdigit() or not 1 <= int(lifetime) <= 21600:
            return self.answer(400)
        token = uuid.uuid4().hex
        self.server.tokens[token] = time.monotonic() + int(lifetime)
        return self.answer(200, token)

    def aws(self, key: str, query: dict[str, str]) -> None:
        if self.server.tokens.get(self.headers.get("X-aws-ec2-metadata-token", ""), 0) < time.monotonic():
            return self.answer(401)
        value = self.server.aws.get(key)
        return self.answer(404) if value is None else self.answer(200, value)

    # --- Compute Engine ----------------------------------------------------------------------------------------------

    def gcp(self, key: str, query: dict[str, str]) -> None:
        server = self.server
        if self.headers.get("Metadata-Flavor") != "Google":
            return self.answer(403)
        if key not in server.gcp:
            return self.answer(404)
        with server.changed:
            seen = query.get("last_etag", self.etag(key))
            if query.get("wait_for_change") == "true" and server.waits_for_change:
                server.waiting += 1
                server.changed.notify_all()
                self.wait_for(lambda: self.etag(key) != seen, float(query["timeout_sec"]))
                server.waiting -= 1
            value, etag = server.gcp[key], self.etag(key)
        return self.answer(200, value, ETag=etag)

    def etag(self, key: str) -> str:
        return f"{key}={self.server.gcp[key]}&"  # a tag may hold anything: it has to be quoted in the query

    # --- Azure -------------------------------------------------------------------------------------------------------

    def azure(self, key: str, query: dict[str, str]) -> None:
        if self.headers.get("Metadata", "").lower() != "true" or "api-version" not in query:
            return self.answer(400)
        if key == "instance/compute/name" and query.get("format") == "text":
            return self.answer(200, self.server.azure_name)
        if key == "scheduledevents":
            return self.answer(200, json.dumps({"DocumentIncarnation": 1, "Events": self.server.azure_events}))
        return self.answer(404)


# --- faults ----------------------------------------------------------------------------------------------------------


def missing(handler: _Handler) -> None:
    handler.answer(404)


def refused(handler: _Handler) -> None:
    handler.answer(403, "<html>no</html>")


def failing(handler: _Handler) -> None:
    handler.answer(500)


def redirected(handler: _Handler) -> None:
    handler.answer(302, Location="http://127.0.0.1:9/login")


def malformed(handler: _Handler) -> None:
    handler.answer(200, '{"action": "term')


def no_text(handler: _Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"\xff\xfe\x00")


def deep(handler: _Handler) -> None:
    handler.answer(200, "[" * 100_000)


def wrong_types(handler: _Handler) -> None:
    handler.answer(200, '{"action": 1, "time": [], "noticeTime": {}, "Events": "none"}')


def wrong_events(handler: _Handler) -> None:
    handler.answer(200, json.dumps({"Events": [None, {"EventType": 7, "Resources": []}, {"EventType": "Preempt"}]}))


def cut(handler: _Handler) -> None:
    """Promises more than comes before a regular end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"FALSE")


def no_http(handler: _Handler) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


def reset(handler: _Handler) -> None:
    """A lingering time of zero makes the end a reset."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


def silent(handler: _Handler) -> None:
    """Takes the request, and never says anything."""
    handler.wait_for(lambda: False)


def late(handler: _Handler) -> None:
    """Says the truth when the fault is over."""
    handler.wait_for(lambda: handler.server.fault is not late)
    handler.do_GET()


def trickling(handler: _Handler) -> None:
    """Sends a byte every 20 ms: no gap is ever long, and there is no end."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Padding: ")
    while not handler.wait_for(lambda: False, 0.02):
        handler.wfile.write(b"-")
