"""Cloud preemption notices: a thread asks the machine's metadata service whether the machine is about to be taken away.

    cloud   asked                                       kind     how long before, at best
    aws     spot/instance-action                        stop     2 minutes; a hibernation begins at once
            events/recommendations/rebalance            advice   earlier, or together with it
    gcp     instance/preempted                          stop     30 seconds
            instance/maintenance-event                  advice   60 seconds; an hour where there are GPUs
    azure   Preempt, Terminate                          stop     30 seconds; 5 to 15 minutes
            Reboot, Redeploy that have started          stop     nothing
            Freeze, Reboot, Redeploy that are to come   advice   10 to 15 minutes, or days

After *stop* the machine is lost whatever the process does. After *advice* it may stay for hours or for good (and where it
goes down, the system's shutdown sends SIGTERM), while a run that stopped for it would meet the same advice when it starts
again on the same machine.

Nothing here reaches the training: what goes wrong is logged, once for each kind, and polling continues. ``http.client``
does the talking, because it knows no proxies: a link-local address means the machine that asks, and behind an
``HTTP_PROXY`` it would mean another. Its timeouts, like those of every library above it, begin anew with each byte. So each
request is made in a thread of its own, and after a single deadline, or at a stop, its connection is cut.
"""

import contextlib
import email.utils
import http.client
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlencode, urlsplit

from harness.errors import ConfigError
from harness.runtime.threads import Background

log = logging.getLogger("harness")

BASE_URL = "http://169.254.169.254"  # of all three; an address, for a look-up of Google's name is bounded by nothing
_ANSWER_BYTES = 1 << 20  # no honest answer is longer


@dataclass(frozen=True)
class Notice:
    """What the cloud has announced for this machine."""

    source: str
    """``aws``, ``gcp`` or ``azure``."""
    kind: Literal["advice", "stop"]
    """Whether the machine may be lost, or will be."""
    deadline: datetime | None
    """Until when it is ours, in UTC, where the cloud names a time."""
    text: str
    """All of it, for people."""


class Watcher:
    """Asks from ``start`` to ``stop`` in a daemon thread, and remembers the first notice; a stop takes an advice's place.

    One process of a machine is enough, and all of them may be too many: the services refuse who asks too often.
    """

    def __init__(
        self,
        cloud: Literal["aws", "gcp", "azure", "none"],
        base_url: str = BASE_URL,
        *,
        interval_seconds: float | None = None,  # from one round of questions to the next; None: what the cloud recommends
        request_seconds: float = 2,  # for all of a request
        long_poll_seconds: int = 10,  # that a request to Google may wait for a change, on top
        first_answer_seconds: float = 125,  # Azure switches its events on when first asked, which takes up to 2 minutes
        backoff_seconds: float = 10,  # the longest pause while nothing answers: less than any lead
    ) -> None:
        self._cloud = cloud
        self._interval_seconds = interval_seconds
        self._long_poll_seconds = long_poll_seconds
        self._first_answer_seconds = first_answer_seconds
        self._backoff_seconds = backoff_seconds
        self._notice: Notice | None = None
        self._warned: set[tuple[str, str]] = set()
        self._service = _Service(*_parse(base_url), request_seconds)
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def start(self) -> None:
        """Begins to ask; with ``none``, does nothing."""
        if self._cloud == "none" or self._thread is not None:
            return
        match self._cloud:
            case "aws":
                cloud: _Aws | _Gcp | _Azure = _Aws(self._service)
            case "gcp":
                cloud = _Gcp(self._service, self._long_poll_seconds)
            case "azure":
                cloud = _Azure(self._service, self._first_answer_seconds)
        self._thread = threading.Thread(target=self._watch, args=(cloud,), name="harness-preemption", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def poll(self) -> Notice | None:
        """What has been announced so far. Costs nothing, and never forgets."""
        return self._notice

    def stop(self) -> None:
        """Ends the watch, in the middle of a long poll, too. May be called twice, and without ``start``.

        A thread that is just connecting is left behind: it ends by itself, and says nothing more.
        """
        if self._thread is None or os.getpid() != self._pid:  # a forked child shares the connection
            return
        self._service.stop()
        self._thread.join(timeout=0.2)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _watch(self, cloud: "_Aws | _Gcp | _Azure") -> None:
        interval = cloud.interval_seconds if self._interval_seconds is None else self._interval_seconds
        pause, is_over = interval, self._service.is_over
        while not is_over.is_set():
            began = time.monotonic()
            answers = [self._put(question) for question in cloud.questions]
            if self._notice is not None and self._notice.kind == "stop":
                return  # there is nothing more to learn
            pause = interval if any(answers) else min(2 * pause, max(interval, self._backoff_seconds))
            is_over.wait(began + pause - time.monotonic())

    def _put(self, question: Callable[[], Notice | None]) -> bool:
        """Whether the question was answered."""
        try:
            notice = question()
        except _Fault as fault:
            self._warn_once(fault)
            return False
        except Exception as error:  # a defect of ours must not end the watch
            self._warn_once(_Fault(question.__name__, type(error).__name__, str(error)), error)
            return False
        if notice is not None and (self._notice is None or (self._notice.kind, notice.kind) == ("advice", "stop")):
            self._notice = notice
            log.warning("preemption notice (%s): %s", notice.kind, notice.text)
        return True

    def _warn_once(self, fault: "_Fault", defect: Exception | None = None) -> None:
        if fault.kind not in self._warned and not self._service.is_over.is_set():
            self._warned.add(fault.kind)
            log.warning("preemption.watch %s: %s (logged once; polling continues)", self._cloud, fault, exc_info=defect)


# --- the clouds ------------------------------------------------------------------------------------------------------
# Each has questions, the most urgent first. A question returns a notice, or None where all is quiet, or raises _Fault.


class _Aws:
    """EC2's instance metadata, version 2: every request shows a token. Where all is quiet, there is no such object."""

    interval_seconds = 5.0

    def __init__(self, service: "_Service") -> None:
        self._service = service
        self._token = ""
        self.questions = (self.interruption, self.rebalance)

    def interruption(self) -> Notice | None:
        answer = self._get("/latest/meta-data/spot/instance-action")
        if answer.status == 404:
            return None
        found = answer.object()
        action = found.get("action")
        if not isinstance(action, str):
            raise answer.malformed()
        deadline = _moment(found.get("time"), datetime.fromisoformat)
        when = f" at {deadline}" if deadline else ""
        return Notice("aws", "stop", deadline, f"EC2 announces: {action:.40} this spot instance{when}")

    def rebalance(self) -> Notice | None:
        answer = self._get("/latest/meta-data/events/recommendations/rebalance")
        if answer.status == 404:
            return None
        since = answer.object().get("noticeTime")
        if not isinstance(since, str):
            raise answer.malformed()
        return Notice("aws", "advice", None, f"EC2 recommends leaving this spot instance, since {since}")

    def _get(self, path: str) -> "_Answer":
        if not self._token:
            self._renew_token()
        answer = self._service.ask(path, {"X-aws-ec2-metadata-token": self._token})
        if answer.status == 401:  # it has expired
            self._renew_token()
            answer = self._service.ask(path, {"X-aws-ec2-metadata-token": self._token})
        return answer

    def _renew_token(self) -> None:
        self._token = ""
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}  # the longest there is
        answer = self._service.ask("/latest/api/token", lifetime, method="PUT")
        token = answer.value()
        if not token.isascii() or not token.isprintable() or not token:
            raise _Fault(answer.where, "malformed")  # and not shown: it may be half a secret
        self._token = token


class _Gcp:
    """Compute Engine's metadata: a request with the last ETag is answered when the value changes."""

    interval_seconds = 1.0  # should a server not wait for changes, it is not flooded

    def __init__(self, service: "_Service", long_poll_seconds: int) -> None:
        self._service = service
        self._long_poll_seconds = long_poll_seconds
        self._etag = ""
        self.questions = (self.preempted, self.maintenance)

    def preempted(self) -> Notice | None:
        etag, self._etag = self._etag, ""  # after a fault and at first, the value is asked for as it is now
        if etag:
            wait = {"wait_for_change": "true", "timeout_sec": str(self._long_poll_seconds), "last_etag": etag}
            answer = self._get("instance/preempted", wait, self._long_poll_seconds)
        else:
            answer = self._get("instance/preempted")
        value = answer.value()
        if value not in {"TRUE", "FALSE"}:
            raise answer.malformed()
        self._etag = answer.etag
        return Notice("gcp", "stop", None, "Compute Engine is preempting this machine") if value == "TRUE" else None

    def maintenance(self) -> Notice | None:
        """Asked between the long polls: it leaves more time."""
        answer = self._get("instance/maintenance-event")
        match answer.value():
            case "NONE":
                return None
            case "MIGRATE_ON_HOST_MAINTENANCE" | "TERMINATE_ON_HOST_MAINTENANCE" as event:
                return Notice("gcp", "advice", None, f"Compute Engine announces {event}")
        raise answer.malformed()

    def _get(self, path: str, query: Mapping[str, str] | None = None, waiting_seconds: float = 0) -> "_Answer":
        flavor = {"Metadata-Flavor": "Google"}
        return self._service.ask(f"/computeMetadata/v1/{path}", flavor, query=query, waiting_seconds=waiting_seconds)


class _Azure:
    """Azure's scheduled events. Those of other machines of the same set are listed, too."""

    interval_seconds = 1.0

    def __init__(self, service: "_Service", first_answer_seconds: float) -> None:
        self._service = service
        self._waiting_seconds = first_answer_seconds
        self._name = ""
        self.questions = (self.scheduled_events,)

    def scheduled_events(self) -> Notice | None:
        if not self._name:
            self._name = self._own_name()
        answer = self._get("scheduledevents", {"api-version": "2020-07-01"}, self._waiting_seconds)
        events = answer.object().get("Events")
        self._waiting_seconds = 0
        if not isinstance(events, list):
            raise answer.malformed()
        known = [event for event in events if _is_event(event)]
        notices = [_announced(event) for event in known if self._name in map(str.casefold, event["Resources"])]
        if not notices and len(known) < len(events):
            raise answer.malformed()
        return min(notices, key=lambda notice: notice.kind != "stop", default=None)

    def _own_name(self) -> str:
        """As the events have it. The host name is another one in scale sets: ``train000003`` of ``train_3``."""
        answer = self._get("instance/compute/name", {"api-version": "2021-02-01", "format": "text"})
        name = answer.value()
        if not re.fullmatch(r"[\w.-]+", name):
            raise answer.malformed()  # or no event would ever be ours
        return name.casefold()

    def _get(self, path: str, query: Mapping[str, str], waiting_seconds: float = 0) -> "_Answer":
        return self._service.ask(f"/metadata/{path}", {"Metadata": "true"}, query=query, waiting_seconds=waiting_seconds)


def _is_event(event: Any) -> bool:
    if not isinstance(event, dict) or not isinstance(event.get("EventType"), str):
        return False
    resources = event.get("Resources")
    return isinstance(resources, list) and all(isinstance(name, str) for name in resources)


def _announced(event: Mapping[str, Any]) -> Notice:
    what, status, about = event["EventType"], event.get("EventStatus"), str(event.get("Description"))
    final = what in {"Preempt", "Terminate"} or (what in {"Reboot", "Redeploy"} and status == "Started")
    deadline = _moment(event.get("NotBefore"), email.utils.parsedate_to_datetime)  # empty once it has started
    when = f", not before {deadline}" if deadline else ""
    text = f"Azure announces: {what:.40} of this machine ({status!s:.40}{when}) {about:.200}"
    return Notice("azure", "stop" if final else "advice", deadline, text.strip())


def _moment(text: Any, parse: Callable[[str], datetime]) -> datetime | None:
    """A time as a cloud writes it. One that cannot be read must not cost us the notice."""
    try:
        moment = parse(text)
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except Exception:  # the parsers raise what they like
        return None


# --- the metadata service --------------------------------------------------------------------------------------------


class _Fault(Exception):
    """An answer that says nothing, or none."""

    def __init__(self, where: str, what: str, found: str = "") -> None:
        super().__init__(f"{where}: {what}: {found:.100}" if found else f"{where}: {what}")
        self.kind = (where, what)


class _Answer(NamedTuple):
    where: str
    status: int
    text: str
    etag: str

    def value(self) -> str:
        if self.status != 200:
            raise _Fault(self.where, "missing (404)" if self.status == 404 else f"refused ({self.status})")
        return self.text

    def object(self) -> dict[str, Any]:
        try:
            value = json.loads(self.value())
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.malformed()
        return value

    def malformed(self) -> _Fault:
        return _Fault(self.where, "malformed", f"found {self.text!r}")


class _Service:
    """One request, one connection: none is held open between the questions."""

    def __init__(self, host: str, port: int, request_seconds: float) -> None:
        self.is_over = threading.Event()  # nobody wants to know any more
        self._host, self._port = host, port
        self._request_seconds = request_seconds
        self._cut: Callable[[], None] = lambda: None  # ends the request that is under way

    def stop(self) -> None:
        """Ends the request that is under way; there is no other."""
        self.is_over.set()
        self._cut()

    def ask(
        self,
        path: str,
        headers: Mapping[str, str],
        *,
        method: str = "GET",
        query: Mapping[str, str] | None = None,
        waiting_seconds: float = 0,
    ) -> _Answer:
        where, limit_seconds = f"{method} {path}", self._request_seconds + waiting_seconds
        connection = http.client.HTTPConnection(self._host, self._port, timeout=limit_seconds)
        wires: list[socket.socket] = []  # the connection forgets its own before the answer is read

        def exchange() -> _Answer:
            with contextlib.closing(connection):
                connection.connect()
                wires.append(connection.sock)
                if self.is_over.is_set():
                    raise TimeoutError
                target = f"{path}?{urlencode(query)}" if query else path
                connection.request(method, target, headers={**headers, "Connection": "close"})
                with connection.getresponse() as response:
                    text = response.read(_ANSWER_BYTES).decode(errors="replace").strip()
                    if response.length:  # read() with a limit does not mind an answer that ends early
                        raise _Fault(where, "malformed", f"{response.length} bytes are missing at its end")
                    return _Answer(where, response.status, text, response.getheader("ETag", ""))

        def cut() -> None:
            for wire in wires:
                with contextlib.suppress(OSError):  # it is over already
                    wire.shutdown(socket.SHUT_RDWR)

        self._cut = cut
        try:
            return Background(exchange, "harness-preemption-request").result_within(limit_seconds)
        except TimeoutError:
            cut()
            raise _Fault(where, f"no answer within {limit_seconds:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Fault(where, type(error).__name__, str(error)) from None


def _parse(base_url: str) -> tuple[str, int]:
    """Host and port. These services speak plain HTTP, and their paths are known."""
    with contextlib.suppress(ValueError):  # a port that is none
        url = urlsplit(base_url)
        if url.scheme == "http" and url.hostname and url.path in {"", "/"} and not url.query and "@" not in url.netloc:
            return url.hostname, 80 if url.port is None else url.port
    raise ConfigError(f"preemption.base_url: expected http://host or http://host:port, found {base_url!r}")
