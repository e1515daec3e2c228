"""Objects under a URL: the contract on five real stores, and what opening a store and trying again means."""

import errno
import os
import subprocess
import sys
import threading
import time
import uuid

import pytest
from store_contract import (
    MIB,
    Place,
    RawAzure,
    RawDirectory,
    RawMemory,
    RawS3,
    StoreContract,
    content,
    put,
    wait_for_those_left_behind,
)

from harness.checkpoint.store import open_store
from harness.errors import ConfigError, StoreError


class TestLocal(StoreContract):
    @pytest.fixture
    def place(self, tmp_path):
        return Place(str(tmp_path / "run"), RawDirectory(f"{tmp_path}/run"))


class TestMemory(StoreContract):
    @pytest.fixture
    def place(self):
        name = uuid.uuid4().hex
        return Place(f"memory://{name}/run", RawMemory(f"/{name}/run"))


@pytest.fixture(scope="module")
def client(s3):
    return RawS3.connect(s3)


class TestS3(StoreContract):
    @pytest.fixture
    def place(self, s3, client):
        name = uuid.uuid4().hex
        return Place(s3.url(name), RawS3(s3, client, name), s3.storage_options)


def test_the_parts_of_an_object_travel_together(s3):
    """Two of them meet on the way."""
    store = open_store(s3.url(uuid.uuid4().hex), s3.storage_options)
    send, meeting = store._send_part, threading.Barrier(2)

    def send_when_all_are_there(*part):
        meeting.wait(30)
        return send(*part)

    store._send_part = send_when_all_are_there
    put(store, "file.bin", content(32 * MIB))
    assert store.get("file.bin", 32 * MIB) == content(32 * MIB)


def test_a_large_object_goes_over_several_clients(s3):
    """Each an event loop, in a thread of its own; all are made anew when a connection has failed."""
    store = open_store(s3.url(uuid.uuid4().hex), s3.storage_options)
    put(store, "small.bin", content(32 * MIB))
    assert not store._clients, "to make one takes longer than it would save"
    put(store, "large.bin", content(68 * MIB))
    assert store.get("large.bin", 68 * MIB) == content(68 * MIB)
    before = store._clients
    assert before[0] is store.fs
    assert len({id(client.loop) for client in before}) == len({id(client._s3) for client in before}) == 4
    store._suspect = store.fs
    put(store, "large.bin", content(68 * MIB, seed=1))
    assert store.get("large.bin", 68 * MIB) == content(68 * MIB, seed=1)
    assert not {*map(id, before)} & {*map(id, store._clients)}
    assert {id(client.loop) for client in before} == {id(client.loop) for client in store._clients}, "threads are kept"


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # adlfs hands whole blocks to aiohttp
class TestAzure(StoreContract):
    @pytest.fixture
    def place(self, azure):
        name = uuid.uuid4().hex
        return Place(azure.url(name), RawAzure(azure, name), azure.storage_options)


class TestSftp(StoreContract):
    @pytest.fixture
    def place(self, sftp):
        name = uuid.uuid4().hex
        return Place(sftp.url(name), RawDirectory(f"{sftp.folder}/data/{name}"), sftp.storage_options)


# --- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "dropbox://run"], ids=["unknown", "not installed"])
def test_a_filesystem_that_cannot_be_had(url):
    """A protocol that nobody knows, or whose package is not installed, is for the configuration's author."""
    with pytest.raises(ConfigError, match=url):
        open_store(url)


def test_a_server_that_is_not_there():
    """A store that has to connect first, and cannot, is a failure of storage, after the tries that are allowed."""
    with pytest.raises(StoreError, match=r"open sftp://127\.0\.0\.1:1/run: .*") as caught:
        open_store("sftp://127.0.0.1:1/run", {"look_for_keys": False, "allow_agent": False}, attempts=2)
    assert caught.value.transient


def test_credentials_from_the_environment(s3, azure, sftp):
    """Where the configuration has no storage options, endpoint and credentials come from the environment."""
    program = """
import sys
from harness.checkpoint.store import open_store
for url in sys.argv[1:]:
    store = open_store(url)
    store.put("file.bin", lambda: [b"from the environment"], 20)
    assert store.list() == {"file.bin": 20}
"""
    urls = [server.url("environment") for server in (s3, azure, sftp)]
    env = {**os.environ, **s3.env, **azure.env, **sftp.env}
    subprocess.run([sys.executable, "-c", program, *urls], env=env, check=True, timeout=60)
    for server in (s3, azure, sftp):
        assert open_store(server.url("environment"), server.storage_options).get("file.bin", MIB) == b"from the environment"


# --- many calls in one thread ------------------------------------------------------------------------------------------


def test_a_call_that_hangs_among_others(tmp_path):
    """It is named when its own time is over, and none of those that were to follow is made when it wakes up."""
    store = open_store(str(tmp_path), attempts=3, deadline_seconds=0.5)
    os.mkfifo(tmp_path / "pipe")  # who opens it waits for somebody who writes
    put(store, "before", b"1")

    def calls():
        time.sleep(0.7)  # what is no call does not count
        store.read_range("before", 0, 1)
        store.read_range("pipe", 0, 1)
        put(store, "after", b"1")

    with pytest.raises(StoreError, match=r"^read .*/pipe: no answer within") as caught:
        store.together(calls).result()
    assert caught.value.transient
    os.close(os.open(tmp_path / "pipe", os.O_WRONLY))  # now it may go on
    wait_for_those_left_behind()
    assert store.list() == {"before": 1}


# --- trying again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised", "tries"),
    [
        (OSError(errno.EIO, "Input/output error"), StoreError, 3),
        (TimeoutError("timed out"), StoreError, 3),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), StoreError, 3),
        (OSError(errno.ENOSPC, "No space left on device"), StoreError, 1),
        (PermissionError("without a number, as s3fs raises it"), StoreError, 1),
        (ValueError("an error of the caller's"), ValueError, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_transient_errors_are_tried_again(tmp_path, error, raised, tries):
    """What may pass is tried as often as is allowed, each time from the beginning; what will not surfaces at once."""
    store = open_store(str(tmp_path), attempts=3)
    calls = []

    def chunks():
        calls.append(len(calls))
        yield b"1"
        raise error

    with pytest.raises(raised, match=error.strerror if isinstance(error, OSError) else str(error)) as caught:
        store.put("file.bin", chunks, 2)
    assert len(calls) == tries
    if raised is StoreError:
        assert caught.value.transient is (tries > 1)
    assert store.list() == {}


def test_a_try_that_succeeds_ends_it(tmp_path):
    """After a failure that passed, the object is what the last try sent, and nothing of the first."""
    store = open_store(str(tmp_path), attempts=3)
    calls = []

    def chunks():
        calls.append(len(calls))
        yield b"first" * len(calls)
        if len(calls) == 1:
            raise TimeoutError

    store.put("file.bin", chunks, 10)
    assert len(calls) == 2
    assert store.get("file.bin", MIB) == b"firstfirst"
    assert store.list() == {"file.bin": 10}


def test_what_a_dead_writer_left_is_no_object_of_that_name(tmp_path):
    """The half-written file of a writer that was killed has another name, and the next put does not mind it."""
    store = open_store(str(tmp_path))
    killed = """
import os, signal, sys
from harness.checkpoint.store import open_store
def chunks():
    yield b"half"
    os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put("directory/file.bin", chunks, 8)
"""
    process = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, timeout=60)
    assert process.returncode == -9
    assert store.get("directory/file.bin", MIB) is None
    assert len(store.list()) == 1
    put(store, "directory/file.bin", b"whole")
    assert store.get("directory/file.bin", MIB) == b"whole"
