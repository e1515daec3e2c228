"""A machine that is about to be taken away is noticed in time, and a metadata service that misbehaves harms nothing."""

import contextlib
import dataclasses
import http.client
import itertools
import logging
import logging.handlers
import os
import queue
import socket
import threading
import time
import warnings
from datetime import UTC, datetime

import pytest

from harness.errors import ConfigError
from harness.runtime.preemption import Notice, Watcher
from tests.support import metadata_server as faults
from tests.support.metadata_server import AWS, AWS_TOKEN, AZURE, GCP, HOST, MetadataServer

QUICK = {"interval_seconds": 0.01, "request_seconds": 5.0, "long_poll_seconds": 300, "backoff_seconds": 0.02}
HASTY = {**QUICK, "long_poll_seconds": 0, "first_answer_seconds": 0}  # nobody waits for anything
BOUND_SECONDS = 3  # for what takes milliseconds on a machine that has nothing else to do
AT = datetime(2030, 1, 1, 0, 2, tzinfo=UTC)
ISO, RFC = "2030-01-01T00:02:00Z", "Tue, 01 Jan 2030 00:02:00 GMT"


def azure_event(kind, *resources, status="Scheduled", not_before=RFC):
    return {
        "EventId": "C7061BAC-AFDC-4513-B24B-AA5F13A16123",
        "EventType": kind,
        "ResourceType": "VirtualMachine",
        "Resources": list(resources) or ["train_3"],
        "EventStatus": status,
        "NotBefore": not_before,
        "Description": "Said by the platform.",
        "EventSource": "Platform",
        "DurationInSeconds": -1,
    }


def announce(cloud, server):
    """The cloud's way to say that the machine goes; what comes of it."""
    match cloud:
        case "aws":
            server.aws["spot/instance-action"] = f'{{"action": "terminate", "time": "{ISO}"}}'
        case "gcp":
            server.set_gcp("preempted", "TRUE")
        case "azure":
            server.azure_events = [azure_event("Preempt")]
    return ("stop", None if cloud == "gcp" else AT)


FIRST_ASKED = {"aws": AWS + "spot/instance-action", "gcp": GCP + "preempted", "azure": AZURE + "scheduledevents"}
CLOUDS = list(FIRST_ASKED)


@pytest.fixture
def server():
    with MetadataServer() as server:
        yield server


@pytest.fixture
def watch(server):
    """Starts watchers, and ends them."""
    with contextlib.ExitStack() as stack:

        def start(cloud, url=None, **pace):
            watcher = Watcher(cloud, url or server.url, **(pace or QUICK))
            stack.callback(watcher.stop)
            watcher.start()
            return watcher

        yield start
    assert all(ends(thread) for thread in threads("harness-preemption-request"))  # nothing goes on that was given up
    assert not threads()


@pytest.fixture
def told():
    """What is said of warnings, as a queue that can be waited for."""
    handler = logging.handlers.QueueHandler(queue.Queue())
    handler.setLevel(logging.WARNING)
    logging.getLogger("harness").addHandler(handler)
    yield handler.queue
    logging.getLogger("harness").removeHandler(handler)


def threads(name="harness-preemption"):
    return [thread for thread in threading.enumerate() if thread.name == name]


def heard(told):
    """The next warning; by then ``poll`` knows what it says."""
    return told.get(timeout=faults.PATIENCE_SECONDS).getMessage()


def gaps(requests):
    return [after.at - before.at for before, after in itertools.pairwise(requests)]


def ends(thread):
    thread.join(faults.PATIENCE_SECONDS)
    return not thread.is_alive()


# --- notices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cloud", "change", "kind", "deadline"),
    [
        pytest.param(
            "aws", ("spot/instance-action", f'{{"action": "terminate", "time": "{ISO}"}}'), "stop", AT, id="terminate"
        ),
        pytest.param("aws", ("spot/instance-action", f'{{"action": "stop", "time": "{ISO}"}}'), "stop", AT, id="stop"),
        pytest.param("aws", ("spot/instance-action", '{"action": "hibernate"}'), "stop", None, id="hibernate"),
        pytest.param("aws", ("spot/instance-action", '{"action": "stop", "time": "soon"}'), "stop", None, id="soon"),
        pytest.param(
            "aws", ("events/recommendations/rebalance", f'{{"noticeTime": "{ISO}"}}'), "advice", None, id="rebalance"
        ),
        pytest.param("gcp", ("preempted", "TRUE"), "stop", None, id="preempted"),
        pytest.param("gcp", ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), "advice", None, id="maintenance"),
        pytest.param("gcp", ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE"), "advice", None, id="migration"),
        pytest.param("azure", azure_event("Preempt"), "stop", AT, id="Preempt"),
        pytest.param("azure", azure_event("Preempt", status="Started", not_before=""), "stop", None, id="Preempt-started"),
        pytest.param("azure", azure_event("Terminate", "train_2", "TRAIN_3"), "stop", AT, id="Terminate"),
        pytest.param("azure", azure_event("Reboot", status="Started", not_before=""), "stop", None, id="Reboot-started"),
        pytest.param("azure", azure_event("Reboot"), "advice", AT, id="Reboot"),
        pytest.param("azure", azure_event("Redeploy"), "advice", AT, id="Redeploy"),
        pytest.param("azure", azure_event("Freeze", status="Started", not_before="never"), "advice", None, id="Freeze"),
    ],
)
def test_each_notice_is_seen_as_soon_as_it_is_there(server, watch, told, cloud, change, kind, deadline):
    """Whatever a cloud can announce is known within one round of questions, with its weight and its time."""
    watcher = watch(cloud, **QUICK | ({"long_poll_seconds": 0} if "maintenance-event" in change else {}))
    server.until_asked(FIRST_ASKED[cloud])
    assert watcher.poll() is None
    began = time.monotonic()
    match cloud:
        case "aws":
            server.aws[change[0]] = change[1]
        case "gcp":
            server.set_gcp(*change)
        case "azure":
            server.azure_events = [change]
    message = heard(told)
    assert time.monotonic() - began < BOUND_SECONDS
    notice = watcher.poll()
    assert (notice.source, notice.kind, notice.deadline) == (cloud, kind, deadline)
    assert kind in message and notice.text in message
    assert told.empty()


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_from_before_the_start_is_seen(server, watch, told, cloud):
    """A process that starts on a machine already doomed learns it at once, and does not wait for a change."""
    kind, deadline = announce(cloud, server)
    watcher = watch(cloud)
    heard(told)
    assert (watcher.poll().kind, watcher.poll().deadline) == (kind, deadline)


def test_an_interruption_takes_the_place_of_an_advice_and_nothing_takes_its_own(server, watch, told):
    """The first notice stays, but for a stop after an advice; after a stop nothing more is asked."""
    server.azure_events = [azure_event("Freeze")]
    watcher = watch("azure")
    heard(told)
    first = watcher.poll()
    server.azure_events = [azure_event("Reboot"), azure_event("Freeze")]
    server.until_asked_again(FIRST_ASKED["azure"])
    assert watcher.poll() is first

    (thread,) = threads()
    server.azure_events = [azure_event("Reboot"), azure_event("Preempt")]
    heard(told)
    assert watcher.poll().kind == "stop" and "Preempt" in watcher.poll().text
    assert ends(thread)
    assert told.empty()


def test_a_notice_is_a_value():
    """A notice cannot be changed, and equals one that says the same."""
    notice = Notice("gcp", "stop", None, "text")
    assert notice == Notice("gcp", "stop", None, "text")
    with pytest.raises(dataclasses.FrozenInstanceError):
        notice.kind = "advice"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_silence_is_no_notice(server, watch, told, cloud):
    """Where nothing is announced, there is no notice and no warning, however often one asks."""
    watcher = watch(cloud, **HASTY)
    server.until_asked(FIRST_ASKED[cloud], 20)
    assert watcher.poll() is None
    assert told.empty()


def test_without_a_cloud_no_service_is_asked(server, watch):
    """Switched off, there is no thread, no request and no notice."""
    watcher = watch("none")
    assert not threads()
    assert watcher.poll() is None
    assert not server.requests


# --- protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("PUT", AWS_TOKEN, 400),
        ("GET", AWS + "spot/instance-action", 401),
        ("GET", GCP + "preempted", 403),
        ("GET", AZURE + "scheduledevents?api-version=2020-07-01", 400),
        ("GET", AZURE + "instance/compute/name?api-version=2021-02-01&format=text", 400),
    ],
)
def test_the_server_of_these_tests_wants_to_be_asked_properly(server, method, path, status):
    """Without the headers that the clouds ask for, the test server refuses: so the watcher sends them."""
    with contextlib.closing(http.client.HTTPConnection(HOST, server.server_port)) as connection:
        connection.request(method, path)
        assert connection.getresponse().status == status


def test_a_token_that_has_expired_is_renewed(server, watch, told):
    """EC2's token is fetched once, and again when it is refused; nothing is missed and nothing is said."""
    watcher = watch("aws")
    server.until_asked_again(FIRST_ASKED["aws"])
    assert len(server.asked(AWS_TOKEN)) == 1
    server.tokens.clear()
    server.until_asked_again(FIRST_ASKED["aws"])
    assert len(server.asked(AWS_TOKEN)) == 2
    announce("aws", server)
    assert "announces" in heard(told)
    assert watcher.poll().kind == "stop"


def test_a_long_poll_waits_with_the_last_etag(server, watch):
    """Compute Engine is asked once for the value, and then only for its change: one request, and the other key between."""
    watch("gcp")
    server.until(lambda: server.waiting == 1)
    first, second = server.asked("preempted")
    assert first.query == {}
    assert second.query == {"wait_for_change": "true", "timeout_sec": "300", "last_etag": "preempted=FALSE&"}
    assert len(server.asked("maintenance-event")) == 1


def test_a_server_that_does_not_wait_for_changes_is_not_flooded(server, watch, told):
    """Where long polls return at once, the interval holds."""
    server.waits_for_change = False
    watch("gcp", **QUICK | {"interval_seconds": 0.1})
    server.until_asked("preempted", 4)
    assert sum(gaps(server.asked("preempted")[:4])) > 0.15  # 0.3
    server.set_gcp("preempted", "TRUE")
    heard(told)


def test_events_of_other_machines_are_not_ours(server, watch, told):
    """Azure lists the events of the whole set; only those that name this machine count, and no part of a name does."""
    watcher = watch("azure")
    server.azure_events = [azure_event("Preempt", "train_30", "train_4", "rain_3"), azure_event("Terminate", "train")]
    server.until_asked_again(FIRST_ASKED["azure"])
    assert watcher.poll() is None
    server.azure_events = [*server.azure_events, azure_event("Terminate", "train_4", "train_3")]
    assert "Terminate" in heard(told)


def test_the_machines_name_is_asked_for_once(server, watch):
    """The name does not change; it is not asked for with each poll."""
    watch("azure")
    server.until_asked_again(FIRST_ASKED["azure"])
    assert len(server.asked("compute/name")) == 1


def test_a_malformed_event_does_not_hide_a_proper_one(server, watch, told):
    """What Azure garbles about one event costs us no other."""
    server.azure_events = [None, {"Resources": "train_3"}, azure_event("Preempt")]
    watch("azure")
    assert "Preempt" in heard(told)
    assert told.empty()


def test_the_first_answer_may_take_its_time(server, watch, told):
    """Azure takes minutes to switch its events on: the first answer is waited for longer than those that follow."""
    server.break_with(faults.late, "scheduledevents")
    server.azure_events = [azure_event("Freeze")]
    watch("azure", **HASTY | {"request_seconds": 0.2, "first_answer_seconds": 60})
    with pytest.raises(queue.Empty):
        told.get(timeout=0.4)
    assert len(server.asked("scheduledevents")) == 1
    server.break_with(None)
    assert "Freeze" in heard(told)
    server.break_with(faults.silent)
    assert "no answer within 0.2 s" in heard(told)


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        pytest.param(faults.missing, "missing (404)", id="missing"),
        pytest.param(faults.refused, "refused (403)", id="refused"),
        pytest.param(faults.failing, "refused (500)", id="failing"),
        pytest.param(faults.redirected, "refused (302)", id="redirected"),
        pytest.param(faults.malformed, "malformed", id="malformed"),
        pytest.param(faults.no_text, "malformed", id="no-text"),
        pytest.param(faults.deep, "malformed", id="deep"),
        pytest.param(faults.wrong_types, "malformed", id="wrong-types"),
        pytest.param(faults.cut, "malformed", id="cut"),
        pytest.param(faults.no_http, "BadStatusLine", id="no-http"),
        pytest.param(faults.reset, "ConnectionResetError", id="reset"),
        pytest.param(faults.silent, "no answer within 0.1 s", id="silent"),
        pytest.param(faults.trickling, "no answer within 0.1 s", id="trickling"),
    ],
)
def test_a_fault_is_said_once_and_overcome(server, watch, told, cloud, fault, what):
    """A service that misbehaves is warned about once, harms nothing, and is listened to when it has recovered."""
    faulty = AWS_TOKEN if (cloud, fault) == ("aws", faults.missing) else FIRST_ASKED[cloud]
    server.break_with(fault, faulty)
    watcher = watch(cloud, **HASTY | {"request_seconds": 0.1 if "no answer" in what else 5.0})
    message = heard(told)
    assert f"preemption.watch {cloud}: " in message and f" {faulty}: {what}" in message
    server.until_asked_again(faulty)
    assert watcher.poll() is None
    assert told.empty()

    announce(cloud, server)
    server.break_with(None)
    assert "preemption notice (stop)" in heard(told)
    assert told.empty()


def test_each_kind_of_fault_is_said(server, watch, told):
    """After one fault another is still news; the first, when it returns, is not."""
    server.break_with(faults.failing, "scheduledevents")
    watch("azure", **QUICK)
    assert "refused (500)" in heard(told)
    server.break_with(faults.wrong_events, "scheduledevents")
    assert "malformed" in heard(told)
    server.break_with(faults.failing, "scheduledevents")
    server.until_asked_again("scheduledevents")
    assert told.empty()


def test_an_impossible_machine_name_is_asked_for_again(server, watch, told):
    """What cannot be the machine's name is asked for again: with a wrong one every event would be somebody else's."""
    server.azure_name, server.azure_events = '{"error": "not yet"}', [azure_event("Preempt")]
    watch("azure")
    assert "compute/name: malformed" in heard(told)
    server.azure_name = "train_3"
    assert "Preempt" in heard(told)


@pytest.mark.parametrize(
    ("cloud", "broken", "key", "value"),
    [
        ("aws", "instance-action", "events/recommendations/rebalance", f'{{"noticeTime": "{ISO}"}}'),
        ("aws", "rebalance", "spot/instance-action", '{"action": "stop"}'),
        ("gcp", "preempted", "maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("gcp", "maintenance-event", "preempted", "TRUE"),
    ],
    ids=["interruption", "rebalance", "preempted", "maintenance"],
)
def test_what_is_broken_does_not_hide_the_rest(server, watch, told, cloud, broken, key, value):
    """A cloud's two answers stand for themselves, and neither is asked for less often because of the other."""
    server.break_with(faults.failing, broken)
    watcher = watch(cloud, **HASTY | {"backoff_seconds": 1000})
    assert "refused (500)" in heard(told)
    server.until_asked_again(broken, 12)  # in vain with that backoff
    if cloud == "aws":
        server.aws[key] = value
    else:
        server.set_gcp(key, value)
    heard(told)
    assert watcher.poll().source == cloud


def test_a_service_that_is_not_there_yet_is_found_later(watch, told):
    """Where nothing listens, the asking goes on until something does."""
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
    watch("gcp", f"http://localhost:{port}", **QUICK)
    assert all("ConnectionRefusedError" in heard(told) for _ in ("preempted", "maintenance-event"))
    with MetadataServer(port) as server:
        server.set_gcp("preempted", "TRUE")
        assert "preemption notice (stop)" in heard(told)


def test_whatever_happens_the_asking_goes_on(watch, told):
    """An error that nobody thought of is told with its traceback and ends nothing."""
    watch("aws", f"http://{'a' * 64}")  # no name may be so long: the resolver's codec raises no OSError
    for _ in ("interruption", "rebalance"):
        assert "Traceback" in heard(told)
    (thread,) = threads()
    thread.join(0.2)  # many rounds
    assert thread.is_alive()
    assert told.empty()


def test_the_pauses_grow_while_nothing_answers(server, watch):
    """Each pause is twice the last one, up to a bound, and the first answer ends that."""
    server.break_with(faults.failing)
    watch("azure", **QUICK | {"interval_seconds": 0.02, "backoff_seconds": 0.08})
    server.until_asked("compute/name", 8)
    assert 0.3 < sum(gaps(server.requests[:8])) < 3  # 0.52; it were 0.14 without growth, and 5 without the bound
    server.break_with(None)
    server.until_asked("scheduledevents", 20)
    assert min(gaps(server.asked("scheduledevents"))) < 0.06


def test_a_proxy_is_passed_by(server, watch, told, monkeypatch):
    """A link-local address behind a proxy would be another machine's: whatever the environment says, no proxy is asked."""
    with socket.create_server((HOST, 0)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{HOST}:{proxy.getsockname()[1]}")
        announce("aws", server)
        watch("aws")
        assert "preemption notice (stop)" in heard(told)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()


@pytest.mark.parametrize(
    "url",
    ["https://169.254.169.254", "169.254.169.254", "http://", "http://host:port", "http://host/computeMetadata/v1", ""],
)
def test_a_base_url_that_cannot_be_meant_is_refused(url):
    """A mistake in the configuration is told before anything starts, with what was expected."""
    with pytest.raises(ConfigError, match=r"preemption\.base_url: expected http://host"):
        Watcher("aws", url)


# --- the end ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deaf_port():
    """A port whose queue is full: the kernel drops whoever else wants to connect."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((HOST, 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def stops_at_once(watcher):
    (thread,) = threads()
    began = time.monotonic()
    watcher.stop()
    return time.monotonic() - began < 0.9 and not thread.is_alive()


def test_a_stop_ends_a_long_poll(server, watch):
    """Stopping does not wait for Google's answer."""
    watcher = watch("gcp")
    server.until(lambda: server.waiting == 1)
    assert stops_at_once(watcher)


@pytest.mark.parametrize("fault", [faults.silent, faults.trickling])
def test_a_stop_ends_a_request_without_answer(server, watch, fault):
    """Stopping does not wait for a request's deadline."""
    server.break_with(fault)
    watcher = watch("aws", **QUICK | {"request_seconds": 60})
    server.until_asked(AWS_TOKEN, 1)
    assert stops_at_once(watcher)


def test_a_stop_ends_a_pause(server, watch):
    """Stopping does not wait for the next poll."""
    watcher = watch("aws", **QUICK | {"interval_seconds": 60})
    server.until_asked("rebalance", 1)
    assert stops_at_once(watcher)


def test_connecting_is_bounded_and_can_be_stopped(watch, told):
    """Packets that vanish are waited for no longer than any answer, and not at all when it is time to go: the thread that
    waits is left behind, says nothing, and ends by itself."""
    with deaf_port() as port:
        watcher = watch("aws", f"http://{HOST}:{port}", **QUICK | {"request_seconds": 0.1})
        assert "no answer within 0.1 s" in heard(told)
        watcher.stop()
        (thread,) = threads() or [None]
        assert thread is None or ends(thread)
        watcher = watch("aws", f"http://{HOST}:{port}", **QUICK | {"request_seconds": 3})
        (thread,) = threads()
        began = time.monotonic()
        watcher.stop()
        assert time.monotonic() - began < 0.9
        assert ends(thread)
        assert told.empty()


def test_a_stop_needs_nothing_before_it(server):
    """A watcher may be stopped twice, and without having been started."""
    watcher = Watcher("aws", server.url)
    watcher.stop()
    watcher.start()
    watcher.stop()
    watcher.stop()
    assert not threads()


def test_a_forked_child_does_not_keep_the_thread_alive(server, watch):
    """A loader's worker that was forked meanwhile holds every descriptor, and the watcher stops all the same."""
    watcher = watch("gcp")
    server.until(lambda: server.waiting == 1)
    wait, release = os.pipe()
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of forking beside threads, as loaders do
        child = os.fork()
    if not child:
        os.close(release)
        os.read(wait, 1)
        os._exit(0)
    try:
        assert stops_at_once(watcher)
    finally:
        os.close(release)
        os.close(wait)
        os.waitpid(child, 0)
