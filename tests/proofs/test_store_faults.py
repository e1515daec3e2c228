"""What storage does to a save: every fault is the real one, and none leaves anything half-committed.

Each test saves a checkpoint, brings the fault about, and tries to save the next one. Whatever became of that, the earlier
checkpoint is the newest whole one afterwards and reads back as it was written, or the next one is, where it was to succeed.
"""

import errno
import logging
import os
import resource
import shutil
import subprocess
import time
import traceback

import pytest
import torch

from harness.checkpoint import commit, load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.errors import StoreError
from harness.storage.store import Store, open_store
from harness.storage.urls import shown
from tests.support import servers
from tests.support.proxy import Proxy
from tests.support.store_contract import MIB, wait_for_those_left_behind

ATTEMPT = Attempt("000001-00000000")


def parts(step: int, size_bytes: int) -> dict[str, dict]:
    weights = torch.arange(size_bytes // 4, dtype=torch.int32) + step
    return {"model": {"weight": weights}, "training": {"step": step}}


def save(store: Store, step: int, size_bytes: int = 1000) -> str:
    directory, _ = commit.write(store, parts(step, size_bytes), step=step, attempt=ATTEMPT)
    return directory


def assert_newest(store: Store, directory: str, step: int, size_bytes: int = 1000) -> None:
    """The checkpoint is whole, reads back bit for bit, and is the only one beside older ones and rubbish."""
    catalog = Catalog(store)
    newest = catalog.newest()
    assert newest.directory == directory
    assert {entry.state for entry in catalog.entries() if entry.step > step} <= {"unfinished"}
    found, expected = load.read(store, directory, newest.manifest), parts(step, size_bytes)
    assert torch.equal(found["model"]["weight"], expected["model"]["weight"])
    assert found["training"] == expected["training"]


def fails(store: Store, step: int, size_bytes: int, *, transient: bool) -> StoreError:
    """The error of a save that has to fail; it names the operation and the URL."""
    with pytest.raises(StoreError) as caught:
        save(store, step, size_bytes)
    assert caught.value.transient is transient
    assert store.url in str(caught.value)
    return caught.value


# --- a local filesystem ----------------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path):
    """Mounts filesystems for a test."""
    if os.geteuid() != 0:
        pytest.skip("mounting a filesystem needs root")
    mounted = []

    def mount(kind: str, source: str, options: str) -> str:
        place = str(tmp_path / f"mount-{len(mounted)}")
        os.mkdir(place)
        command = ["mount", "-t", kind, "-o", options, source, place]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        if found.returncode:
            pytest.skip(f"cannot mount a {kind} ({options}) here: {found.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", place], check=True)


def test_disk_full(mount):
    """A full disk fails the save at once and leaves none of its files; when there is room again, saving works again."""
    place = mount("tmpfs", "tmpfs", "size=8m")
    store = open_store(f"{place}/run")
    first = save(store, 1)
    began = time.monotonic()
    assert os.strerror(errno.ENOSPC) in str(fails(store, 2, 16 * MIB, transient=False))
    assert time.monotonic() - began < 5
    assert_newest(store, first, 1)
    assert all(name.startswith((first, "attempts")) for name in store.list())
    third = save(store, 3, 2 * MIB)
    assert_newest(store, third, 3, 2 * MIB)


def test_disk_full_that_only_fsync_tells(mount):
    """Where ``write`` accepts more than the disk can hold, the save fails all the same: it asks for the flush's result."""
    small = mount("tmpfs", "tmpfs", "size=24m")
    subprocess.run(["truncate", "-s", "128M", f"{small}/image"], check=True)
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", options, f"{small}/image"], check=True)
    place = mount("ext4", f"{small}/image", "loop")
    store = open_store(f"{place}/run", tries=2)
    first = save(store, 1)
    with open(f"{place}/probe", "wb") as file:
        file.write(bytes(40 * MIB))  # does not fail: that is the trap
    os.unlink(f"{place}/probe")
    with pytest.raises(StoreError):
        save(store, 2, 40 * MIB)
    assert_newest(store, first, 1)


def test_read_only_filesystem(mount):
    """A filesystem that was remounted read-only, as ext4 is after an error, fails the save at once."""
    place = mount("tmpfs", "tmpfs", "size=8m")
    store = open_store(f"{place}/run")
    first = save(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    assert os.strerror(errno.EROFS) in str(fails(store, 2, 1000, transient=False))
    assert_newest(store, first, 1)


def test_quota(tmp_path, mount):
    """A used-up quota fails the save at once, though the disk has room."""
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed: apt-get install btrfs-progs")
    subprocess.run(["truncate", "-s", "128M", tmp_path / "image"], check=True)
    subprocess.run(["mkfs.btrfs", "-q", tmp_path / "image"], check=True)
    place = mount("btrfs", str(tmp_path / "image"), "loop")
    for command in ("quota enable", "subvolume create", "qgroup limit 8M"):
        where = place if command == "quota enable" else f"{place}/limited"
        subprocess.run(["btrfs", *command.split(), where], check=True, capture_output=True)
    store = open_store(f"{place}/limited/run")
    first = save(store, 1)
    assert os.strerror(errno.EDQUOT) in str(fails(store, 2, 16 * MIB, transient=False))
    assert_newest(store, first, 1)


def test_permission_denied(public_path, ordinary_user):
    """A run whose directory may not be written to keeps what it has."""
    store = open_store(f"{public_path}/run")
    first = save(store, 1)
    os.chmod(f"{public_path}/run", 0o555)
    with ordinary_user():
        assert os.strerror(errno.EACCES) in str(fails(store, 2, 1000, transient=False))
    assert_newest(store, first, 1)


def test_what_cannot_be_listed_is_not_taken_for_empty(public_path, ordinary_user):
    """A directory without permission to list it is an error: a run must not start anew because it cannot see its past."""
    store = open_store(f"{public_path}/run")
    first = save(store, 1)
    for hidden in (public_path, f"{public_path}/run", f"{public_path}/run/{first}"):
        os.chmod(hidden, 0)
        with ordinary_user(), pytest.raises(StoreError, match=os.strerror(errno.EACCES)):
            store.list()
        os.chmod(hidden, 0o755)
    with ordinary_user():
        assert_newest(store, first, 1)


def test_file_too_large(tmp_path):
    """A limit on the size of files fails the save at once and leaves none of its files."""
    store = open_store(str(tmp_path / "run"))
    first = save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, limits[1]))
    try:
        assert os.strerror(errno.EFBIG) in str(fails(store, 2, 4 * MIB, transient=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_newest(store, first, 1)
    assert all(name.startswith((first, "attempts")) for name in store.list())


def test_sftp_disk_full(sftp, mount):
    """A full disk behind an SFTP server fails the save, though paramiko does not wait for the answer to each packet."""
    place = mount("tmpfs", "tmpfs", "size=8m")
    url = sftp.url("x").partition("/data/")[0].removesuffix(str(sftp.folder)) + f"{place}/run"
    store = open_store(url, sftp.storage_options, tries=2)
    first = save(store, 1)
    fails(store, 2, 16 * MIB, transient=True)  # the protocol has no number for it, so that it is tried again
    assert_newest(store, first, 1)
    assert all(name.startswith((first, "attempts")) for name in store.list())


# --- a server --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["s3", "azure", "sftp"])
def server(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["s3", "sftp"])
def quick_server(request):
    """A server whose client tries again within a second: Azure's waits for 15."""
    return request.getfixturevalue(request.param)


def quick_options(server) -> dict:
    """Without the patience of the client's own: what is tested is the store's."""
    impatient = {"config_kwargs": {"retries": {"max_attempts": 0}}} if isinstance(server, servers.S3) else {}
    return server.storage_options | impatient


@pytest.fixture
def proxied(quick_server, request):
    """A server's store, seen directly and through a proxy, and the proxy."""
    name = request.node.name.replace("[", "-").rstrip("]")
    with Proxy(quick_server.port) as proxy:
        through = quick_server.at(proxy.port)
        direct = open_store(quick_server.url(name), quick_server.storage_options)
        yield direct, open_store(through.url(name), quick_options(through), tries=3, deadline_seconds=20), proxy


def wait_for_left_behind() -> None:
    wait_for_those_left_behind()


def test_server_killed(tmp_path):
    """A save to a server that is no longer there fails; what was committed is there when the server is back."""
    with servers.seaweedfs(tmp_path) as server:
        store = open_store(server.url("run"), quick_options(server), tries=2)
        first = save(store, 1)
        server.kill()
        fails(store, 2, 1000, transient=True)
    with servers.seaweedfs(tmp_path) as server:
        assert_newest(open_store(server.url("run"), server.storage_options), first, 1)


def test_server_frozen(server):
    """Every call to a server that answers no more ends within its deadline; when it goes on, the same store works again."""
    patient = open_store(server.url("frozen"), server.storage_options)
    first = save(patient, 1)
    store = open_store(server.url("frozen"), server.storage_options, tries=1, deadline_seconds=0.5)
    calls = {
        "put": lambda: save(store, 2),
        "get": lambda: store.get(f"{first}/manifest.json", 256 * MIB),
        "list": store.list,
        "delete": lambda: store.delete("nothing"),
    }
    with server.frozen():
        for name, call in calls.items():
            began = time.monotonic()
            with pytest.raises(StoreError, match="no answer within"):
                call()
            assert time.monotonic() - began < 5, name
    wait_for_left_behind()
    assert_newest(patient, first, 1)
    store.calls.deadline_seconds = 30
    third = save(store, 3)
    assert_newest(patient, third, 3)


def test_connection_cut_in_every_upload(proxied):
    """When no large object comes through, the save fails, and nothing of it counts."""
    direct, store, proxy = proxied
    first = save(store, 1)
    store.calls.tries, proxy.cut_after_bytes, proxy.cuts = 2, 3 * MIB, 1000
    fails(store, 2, 20 * MIB, transient=True)
    assert proxy.disturbances >= 2
    assert_newest(direct, first, 1)


def test_connection_cut_once(proxied):
    """An upload that is cut once in the middle is sent again and whole."""
    direct, store, proxy = proxied
    save(store, 1)
    proxy.cut_after_bytes, proxy.cuts = 3 * MIB, 1
    second = save(store, 2, 20 * MIB)
    assert proxy.disturbances == 1
    assert_newest(direct, second, 2, 20 * MIB)


def test_connection_lost_between_calls(proxied):
    """A connection that died while nobody used it, and one refusal on top, are made up for by the next call."""
    direct, store, proxy = proxied
    save(store, 1)
    proxy.reset_all()
    proxy.refusals = 1
    second = save(store, 2)
    assert proxy.disturbances == 1
    assert_newest(direct, second, 2)


def test_answer_lost(proxied):
    """A put that succeeded and whose answer never came is done again; the checkpoint is whole."""
    direct, store, proxy = proxied
    save(store, 1)
    proxy.reset_all()
    proxy.lost_after_bytes, proxy.lost_answers = 100_000, 1
    second = save(store, 2, 2 * MIB)
    assert proxy.disturbances == 1
    assert_newest(direct, second, 2, 2 * MIB)


def test_download_cut_once(proxied):
    """A download that is cut in the middle is a matter of trying again, not a corrupt checkpoint."""
    direct, store, proxy = proxied
    first = save(direct, 1, 20 * MIB)
    proxy.reset_all()
    proxy.lost_after_bytes, proxy.lost_answers = 0, 1
    assert_newest(store, first, 1, 20 * MIB)
    assert proxy.disturbances == 1


def test_download_of_several_ranges_at_a_time(s3):
    """An object store that sends little on each connection is asked on several."""
    first = save(open_store(s3.url("ranges"), s3.storage_options), 1, 32 * MIB)
    with Proxy(s3.port) as proxy:
        store = open_store(s3.url("ranges"), s3.at(proxy.port).storage_options)
        proxy.delay_seconds = 0.02  # 3 MiB/s on each
        assert_newest(store, first, 1, 32 * MIB)
        assert proxy.most_at_once > 2
        assert proxy.busiest_bytes < 32 * MIB / 2


def test_slow_server(proxied):
    """A server that takes longer than the deadline of a call is waited for as long as the bytes come at a bearable rate."""
    direct, store, proxy = proxied
    store.calls.deadline_seconds = 2
    proxy.delay_seconds = 0.03  # 2 MiB/s
    began = time.monotonic()
    first = save(store, 1, 5 * MIB)
    assert time.monotonic() - began > store.calls.deadline_seconds
    assert_newest(direct, first, 1, 5 * MIB)


def test_missing_container(azure):
    """Writing into a container that does not exist is a permanent error, not a missing object."""
    store = open_store("az://no-such-container/run", azure.storage_options)
    assert store.get("file.bin", MIB) is None
    fails(store, 1, 1000, transient=False)


# --- secrets ---------------------------------------------------------------------------------------------------------


def refused_logins(request):
    """For each server, a login that it refuses, and the secrets in it."""
    s3, azure, sftp = (request.getfixturevalue(name) for name in ("s3", "azure", "sftp"))
    wrong = "bm90IHRoZSBwYXNzd29yZA=="
    yield s3.url("run"), {**s3.storage_options, "secret": wrong}, [wrong]
    yield azure.url("run"), {"connection_string": azure.connection_string.replace(azure.account_key, wrong)}, [wrong]
    options = {"look_for_keys": False, "allow_agent": False}
    yield f"sftp://somebody:{wrong}@{servers.HOST}:{sftp.port}/run", options, [wrong, "somebody"]


def test_refused_logins_are_permanent_and_tell_no_secrets(request, caplog):
    """A wrong password is tried once, and stands in no error, no traceback and no log, at whatever level."""
    caplog.set_level(logging.DEBUG)
    for url, storage_options, secrets in refused_logins(request):
        with pytest.raises(StoreError) as caught:
            save(open_store(url, storage_options), 1)
        assert not caught.value.transient, url
        told = "".join(traceback.format_exception(caught.value)) + caplog.text
        for secret in secrets:
            assert secret not in told


def test_secrets_are_not_written(s3, caplog):
    """Neither an object of a run nor a log line at any level has the credentials with which it was written."""
    caplog.set_level(logging.DEBUG)
    store = open_store(s3.url("secrets"), s3.storage_options)
    catalog = Catalog(store)
    commit.write(store, parts(1, 1000), step=1, attempt=catalog.attempts.claim({}))
    written = b"".join(store.get(name, MIB) for name in store.list())
    assert b"manifest" not in written  # and yet it was read:
    assert b'"harness-checkpoint"' in written
    for secret in (s3.key, s3.secret):
        assert secret.encode() not in written
    assert s3.secret not in caplog.text


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("s3://bucket/run/", "s3://bucket/run"),
        ("sftp://user:pass@host:22/run", "sftp://host:22/run"),
        ("sftp://user:p@ss@host/run", "sftp://host/run"),
        ("https://host/run?sig=secret", "https://host/run"),
        ("filecache::sftp://user:pass@host/run", "filecache::sftp://host/run"),
        ("zip://a::https://user:pass@host/a.zip?sig=secret", "zip://a::https://host/a.zip"),
        ("dir::https://user:pass@one/::https://user:pass@two/", "dir::https://one/::https://two"),
        ("/local/p@th/run?", "/local/p@th/run?"),
    ],
)
def test_urls_are_shown_without_secrets(url, expected):
    """What stands in messages has no user, no password and no query."""
    assert shown(url) == expected
