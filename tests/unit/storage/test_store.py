"""Objects under a URL: the contract on five real stores, and what opening a store and trying again means."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

import harness
from harness.checkpoint.catalog import Catalog
from harness.errors import ConfigError, StoreError
from harness.runtime.threads import in_threads
from harness.storage.store import open_store
from tests.support.faults import system_calls_through
from tests.support.store_contract import (
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


def test_the_parts_of_an_object_travel_together(s3, monkeypatch):
    """Two of them meet on the way."""
    store = open_store(s3.url(uuid.uuid4().hex), s3.storage_options)
    call, meeting = store.filesystem.fs.call_s3, threading.Barrier(2)

    def call_when_both_are_there(name, **request):
        if name == "upload_part":
            meeting.wait(30)
        return call(name, **request)

    monkeypatch.setattr(store.filesystem.fs, "call_s3", call_when_both_are_there)
    put(store, "file.bin", content(32 * MIB))
    assert store.get("file.bin", 32 * MIB) == content(32 * MIB)


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
        open_store("sftp://127.0.0.1:1/run", {"look_for_keys": False, "allow_agent": False}, tries=2)
    assert caught.value.transient


def test_credentials_from_the_environment(s3, azure, sftp):
    """Where the configuration has no storage options, endpoint and credentials come from the environment."""
    program = """
import sys
from harness.storage.store import open_store
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
    store = open_store(str(tmp_path), tries=3, deadline_seconds=0.5)
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


# --- filesystems that nobody here knows ----------------------------------------------------------------------------------


class Foreign(Exception):
    """An error of a package of its own, no OSError."""

    def __init__(self, text, status=None):
        super().__init__(text)
        self.response = type("Response", (), {"status_code": status}) if status else None


class Strange(AbstractFileSystem):
    """Local files behind a filesystem of a third party: it wants directories made, and lists no sizes."""

    protocol = "strange"
    cachable = False
    fault = staticmethod(lambda operation, path: None)

    def _below(self, operation, path):
        Strange.fault(operation, path)
        return LocalFileSystem()

    def ls(self, path, detail=True, **kwargs):
        found = self._below("ls", path).ls(path, detail=True)
        return [{**info, "size": None} for info in found] if detail else [info["name"] for info in found]

    def info(self, path, **kwargs):
        return self._below("info", path).info(path)

    def makedirs(self, path, exist_ok=False):
        self._below("makedirs", path).makedirs(path, exist_ok)

    def rmdir(self, path):
        shutil.rmtree(path)  # as WebDAV does it

    def rm(self, path, recursive=False, maxdepth=None):
        self._below("rm", path).rm_file(path)

    def rm_file(self, path):
        raise NotImplementedError

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._below("pipe_file", path)
        if not os.path.isdir(os.path.dirname(path)):
            raise Foreign("the parent is missing", 409)
        with open(path, "wb") as file:
            file.write(value)

    def _open(self, path, mode="rb", **kwargs):
        self._below("open", path)
        return open(path, mode)


fsspec.register_implementation("strange", Strange, clobber=True)


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A run's place behind the strange filesystem, and the means to have one of its calls fail."""

    def fail(operation, error, times=1):
        left = [times]

        def fault(called, path):
            if called == operation and left[0]:
                left[0] -= 1
                raise error

        monkeypatch.setattr(Strange, "fault", staticmethod(fault))

    yield f"strange://{tmp_path}/runs/a", fail
    Strange.fault = staticmethod(lambda operation, path: None)


class TestStrange(StoreContract):
    @pytest.fixture
    def place(self, tmp_path):
        return Place(f"strange://{tmp_path}/run", RawDirectory(f"{tmp_path}/run"))

    @pytest.mark.skip(reason="fsspec says nothing of links there")
    def test_links(self, place): ...

    @pytest.mark.skip(reason="it writes files in place, and says nothing of an upload")
    def test_interrupt_while_overwriting_keeps_the_old(self, place): ...


def test_a_retry_draws_no_random_number(strange):
    """Python's generator belongs to the training: a storage that failed for a moment must not change what that draws."""
    url, fail = strange
    store = open_store(url, tries=4)
    before = random.getstate()
    fail("pipe_file", Foreign("connection lost"), times=3)
    put(store, "first", b"1")
    assert store.retries == 3
    assert random.getstate() == before


@pytest.mark.parametrize("operation", ["pipe_file", "open", "ls", "info"])
def test_an_error_of_any_class_is_the_storages(strange, operation):
    """One that passes is passed over; one that stays is a failure of the storage, and no traceback."""
    url, fail = strange
    store = open_store(url, tries=3)
    put(store, "first", b"1")
    calls = {
        "pipe_file": lambda: put(store, "second", b"2"),
        "open": lambda: store.read("first", lambda file: file.read(), 1),
        "ls": store.list,
        "info": lambda: store.stat("first"),
    }
    fail(operation, Foreign("connection lost"), times=2)
    calls[operation]()
    for error in (Foreign("connection lost"), ValueError("bad answer"), KeyError("size")):
        fail(operation, error, times=100)
        with pytest.raises(StoreError, match=type(error).__name__) as caught:
            calls[operation]()
        assert caught.value.transient
    fail(operation, Foreign("go away", 404), times=1)
    with pytest.raises(StoreError, match="go away") as caught:
        calls[operation]()
    assert not caught.value.transient


def test_an_error_of_our_own_is_none_of_the_storages(strange):
    """Neither what the sender of a put raises, nor what the reader does."""
    url, _ = strange
    store = open_store(url)
    put(store, "first", b"1")

    def chunks():
        yield b"1"
        raise KeyError("the sender's")

    with pytest.raises(KeyError, match="the sender's"):
        store.put("second", chunks, 2)


@pytest.mark.parametrize(
    "error", [NotImplementedError(), Foreign("no", 405), ValueError("this is read-only")], ids=["none", "405", "text"]
)
def test_a_filesystem_that_cannot_be_written(strange, error):
    """That is for the author of the configuration, at the first claim of the run: before anything is trained."""
    url, fail = strange
    fail("pipe_file", error, times=100)
    with pytest.raises(ConfigError, match=r"Strange cannot do that; .*choose another URL"):
        Catalog(open_store(url, tries=2)).attempts.claim({})


def test_an_archive_can_be_read(tmp_path):
    """A run that lies in a zip file is one to load from, not to write to."""
    harness.save(f"{tmp_path}/run", {"model": {"a": 1}}, step=5)
    shutil.make_archive(f"{tmp_path}/archive", "zip", tmp_path, "run")
    url = f"zip://run::file://{tmp_path}/archive.zip"
    assert harness.load(url)["model"] == {"a": 1}
    with pytest.raises(ConfigError, match="an archive can only be read"):
        harness.save(url, {"model": {"a": 1}})


# --- credentials ---------------------------------------------------------------------------------------------------------


def test_credentials_that_are_renewed(s3, tmp_path, monkeypatch):
    """A store that is refused reads the credentials anew, for all calls that are under way; the next put succeeds."""
    file = tmp_path / "credentials"

    def write(secret):
        file.write_text(f"[default]\naws_access_key_id = {s3.key}\naws_secret_access_key = {secret}\n")

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    options = {"endpoint_url": s3.address, "skip_instance_cache": True}
    write("of yesterday")
    store = open_store(s3.url("renewed"), options, tries=3)
    with pytest.raises(StoreError, match=r"renewed/file\.bin") as caught:
        put(store, "file.bin", b"1")
    assert not caught.value.transient
    write(s3.secret)
    time.sleep(1.1)  # so often are they read at most
    in_threads(4, lambda number: put(store, f"{number}", content(5 * MIB)), range(4))
    assert store.list() == {f"{number}": 5 * MIB for number in range(4)}
    assert store.retries == 0, "a refusal is no failure that passes by itself"


def test_who_is_refused_for_good_is_not_asked_for_long(s3):
    """Two tries, and a new connection at most once a second."""
    made = []
    store = open_store(s3.url("refused"), {**s3.storage_options, "secret": "wrong", "skip_instance_cache": True})
    another = store.filesystem.another
    store.filesystem.another = lambda: made.append(1) or another()
    for _ in range(5):
        with pytest.raises(StoreError):
            put(store, "file.bin", b"1")
    assert len(made) <= 3


# --- directories that cannot be flushed --------------------------------------------------------------------------------


def test_a_disk_that_cannot_make_names_durable(tmp_path, caplog):
    """CIFS and some FUSE file systems refuse fsync of a directory: that is told once, and the run goes on."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed: apt-get install gcc")
    (tmp_path / "fault.c").write_text("""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/stat.h>
int fsync(int fd) {
    struct stat about;
    if (fstat(fd, &about) == 0 && S_ISDIR(about.st_mode)) { errno = EINVAL; return -1; }
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
""")
    library = f"{tmp_path}/fault.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, f"{tmp_path}/fault.c", "-ldl"], check=True)
    program = """
import logging, sys
from harness.storage.store import open_store
logging.basicConfig()
for number in range(2):
    store = open_store(sys.argv[1])
    for name in ("a/1", "a/2"):
        store.put(name, lambda: [b"1"], 1)
    assert store.list() == {"a/1": 1, "a/2": 1} and not store.filesystem.keeps_names
"""
    env = {**os.environ, "LD_PRELOAD": library}
    command = [sys.executable, "-c", program, f"{tmp_path}/run"]
    done = subprocess.run(command, env=env, check=True, timeout=60, capture_output=True, text=True)
    assert done.stderr.count("cannot flush a directory") == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_directory_that_was_not_flushed_fails_the_put(tmp_path, code):
    """Any other answer to its fsync is a failure: the name may be gone after a power cut."""
    store = open_store(str(tmp_path), tries=1)
    flushed = []

    def hook(call, perform):
        if call.name == "fsync":
            flushed.append(call)
            if len(flushed) == 3:  # the parents', the file's, the directory's
                raise OSError(code, os.strerror(code))
        return perform()

    with system_calls_through(hook), pytest.raises(StoreError, match=os.strerror(code)):
        put(store, "file.bin", b"1")
    assert store.filesystem.keeps_names


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
    store = open_store(str(tmp_path), tries=3)
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
    store = open_store(str(tmp_path), tries=3)
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
from harness.storage.store import open_store
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
