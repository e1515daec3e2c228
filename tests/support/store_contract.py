"""What every store must do, and means of looking at each that bypass ``Store``."""

import contextlib
import io
import os
import random
import threading
from dataclasses import dataclass, field
from typing import Any

import pytest

from harness.errors import StoreError
from harness.storage.store import Store, open_store, without_traces

MIB = 1 << 20
SEVERAL_BLOCKS = 36 * MIB + 12345  # two whole parts of a multipart upload and a rest


@dataclass
class Place:
    """An empty place to keep objects in, and the means to look at it."""

    url: str
    raw: "Raw"
    storage_options: dict[str, Any] = field(default_factory=dict)

    def open(self, **bounds) -> Store:
        """A store that shares no cache with any other."""
        store = open_store(self.url, self.storage_options, **bounds)
        fs = store.filesystem.fs
        store.filesystem.fs = type(fs)(*fs.storage_args, **fs.storage_options, skip_instance_cache=True)
        return store

    def directories(self) -> list[str]:
        """The directories of the place on this machine, itself among them, where it lies on one."""
        return [directory for directory, _, _ in os.walk(self.raw.root)] if isinstance(self.raw, RawDirectory) else []


class Raw:
    """The objects of a place, by the storage's own means."""

    def read(self, name: str) -> bytes | None:
        raise NotImplementedError

    def write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def names(self) -> set[str]:
        raise NotImplementedError

    def uploads(self) -> int:
        """Uploads that were begun and neither completed nor aborted."""
        return 0


class RawDirectory(Raw):
    def __init__(self, root: str) -> None:
        self.root = root

    def read(self, name):
        with contextlib.suppress(FileNotFoundError), open(f"{self.root}/{name}", "rb") as file:
            return file.read()

    def write(self, name, data):
        os.makedirs(os.path.dirname(f"{self.root}/{name}"), exist_ok=True)
        with open(f"{self.root}/{name}", "wb") as file:
            file.write(data)

    def delete(self, name):
        os.unlink(f"{self.root}/{name}")

    def names(self):
        places = [(directory, file) for directory, _, files in os.walk(self.root) for file in files]
        return {os.path.relpath(f"{directory}/{file}", self.root) for directory, file in places}


class RawMemory(Raw):
    def __init__(self, root: str) -> None:
        from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

        self.root, self.objects, self.new = root, MemoryFileSystem.store, MemoryFile

    def read(self, name):
        found = self.objects.get(f"{self.root}/{name}")
        return found and found.getvalue()

    def write(self, name, data):
        self.objects[f"{self.root}/{name}"] = self.new(None, f"{self.root}/{name}", data)

    def delete(self, name):
        del self.objects[f"{self.root}/{name}"]

    def names(self):
        return {path.removeprefix(f"{self.root}/") for path in self.objects if path.startswith(f"{self.root}/")}


class RawS3(Raw):
    def __init__(self, server, client, root: str) -> None:
        self.bucket, self.client, self.root = server.bucket, client, root

    @staticmethod
    def connect(server):
        import botocore.session

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=server.address,
            region_name="us-east-1",
            aws_access_key_id=server.key,
            aws_secret_access_key=server.secret,
        )

    def read(self, name):
        with contextlib.suppress(self.client.exceptions.NoSuchKey):
            return self.client.get_object(Bucket=self.bucket, Key=f"{self.root}/{name}")["Body"].read()

    def write(self, name, data):
        self.client.put_object(Bucket=self.bucket, Key=f"{self.root}/{name}", Body=data)

    def delete(self, name):
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.root}/{name}")

    def names(self):
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.root}/").get("Contents", [])
        return {item["Key"].removeprefix(f"{self.root}/") for item in found if not item["Key"].endswith("/")}

    def uploads(self):
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=f"{self.root}/").get("Uploads", [])
        return len(found)


class RawAzure(Raw):
    def __init__(self, server, root: str) -> None:
        from azure.storage.blob import ContainerClient

        self.root, self.client = root, ContainerClient.from_connection_string(server.connection_string, server.container)

    def read(self, name):
        from azure.core.exceptions import ResourceNotFoundError

        with contextlib.suppress(ResourceNotFoundError):
            return self.client.download_blob(f"{self.root}/{name}").readall()

    def write(self, name, data):
        self.client.upload_blob(f"{self.root}/{name}", data, overwrite=True)

    def delete(self, name):
        self.client.delete_blob(f"{self.root}/{name}")

    def names(self):
        return {name.removeprefix(f"{self.root}/") for name in self.client.list_blob_names(name_starts_with=f"{self.root}/")}


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def in_pieces(data: bytes, piece_bytes: int = MIB):
    """A ``chunks`` that yields the data as ``put`` is given it by a shard: piece by piece, as views."""
    return lambda: (memoryview(data)[start : start + piece_bytes] for start in range(0, len(data), piece_bytes))


def put(store: Store, name: str, data: bytes) -> None:
    store.put(name, in_pieces(data), len(data))


def wait_for_those_left_behind() -> None:
    """Calls of a store that were given up end, too, when what they waited for has come."""
    for thread in threading.enumerate():
        if thread.name == "harness-store":
            thread.join(30)
            assert not thread.is_alive()


class StoreContract:
    """The tests; a subclass has the fixture ``place``."""

    def test_put_publishes_exactly_the_bytes(self, place):
        """What was put is what lies in the storage, and what every reading operation says."""
        store, data = place.open(), content(100_000)
        put(store, "file.bin", data)
        assert place.raw.read("file.bin") == data
        assert place.open().get("file.bin", MIB) == data
        assert store.read("file.bin", lambda file: file.read(), len(data)) == data
        assert store.stat("file.bin") == len(data)
        assert store.list() == {"file.bin": len(data)}

    def test_absent_objects(self, place):
        """What is not there is None, nothing, or FileNotFoundError, also where nothing was ever written."""
        store = place.open()
        assert store.list() == {}
        assert store.list("directory") == {}
        assert store.get("directory/file.bin", MIB) is None
        assert store.stat("directory/file.bin") is None
        with pytest.raises(FileNotFoundError):
            store.read("directory/file.bin", lambda file: file.read(), MIB)

    def test_directories_are_not_objects(self, place):
        """The name of a directory, with objects in it or left over empty, is no object's."""
        store = place.open()
        put(store, "directory/file.bin", b"1")
        assert (store.stat("directory"), store.get("directory", MIB)) == (None, None)
        store.delete("directory/file.bin")
        assert (store.list(), store.stat("directory"), store.get("directory", MIB)) == ({}, None, None)

    def test_empty_object(self, place):
        """An object without bytes exists."""
        store = place.open()
        put(store, "empty", b"")
        assert place.raw.read("empty") == b""
        assert store.get("empty", MIB) == b""
        assert store.read("empty", lambda file: file.read(), 0) == b""
        assert (store.stat("empty"), store.list()) == (0, {"empty": 0})

    def test_object_of_several_blocks(self, place):
        """A large object is streamed in and out whole, in the readers' own step."""
        store, data = place.open(), content(SEVERAL_BLOCKS)
        put(store, "large", data)
        assert place.raw.read("large") == data
        assert store.stat("large") == len(data)
        buffer = bytearray(len(data))

        def consume(file: io.BufferedIOBase) -> int:
            view = memoryview(buffer)
            while count := file.readinto(view[: 3 * MIB + 7]):
                view = view[count:]
            return len(view)

        assert store.read("large", consume, len(data)) == 0
        assert buffer == data

    def test_ranges_of_an_object(self, place):
        """Any range has exactly its bytes, and fewer at the end; many come in order; a reader may stop in the middle."""
        store, data = place.open(), content(SEVERAL_BLOCKS)
        put(store, "large", data)
        ranges = [(start, 3 * MIB) for start in range(0, len(data), 3 * MIB)]
        found = list(store.pieces(("large", start, size) for start, size in ranges))
        assert found == [data[start : start + size] for start, size in ranges]
        assert store.read_range("large", len(data) - 10, 11) == data[-10:]
        assert store.read_range("large", len(data), 1) == store.read_range("large", 5, 0) == b""
        assert store.read("large", lambda file: file.read(100), len(data)) == data[:100]
        with pytest.raises(FileNotFoundError):
            store.read_range("nothing", 0, 1)
        with pytest.raises(FileNotFoundError):
            list(store.pieces([("large", 0, 1), ("nothing", 0, 1)]))

    def test_get_is_cut_at_its_limit(self, place):
        """A hostile object cannot ask for more memory than its reader grants."""
        place.raw.write("file.bin", content(5000))
        assert place.open().get("file.bin", 1000) == content(5000)[:1000]

    def test_overwriting_is_visible(self, place):
        """The newer of two puts under one name is what everybody sees, whoever looked before."""
        store, other = place.open(), place.open()
        put(store, "file.bin", b"old")
        assert (other.list(), other.get("file.bin", MIB)) == ({"file.bin": 3}, b"old")
        put(store, "file.bin", b"newer")
        for each in (store, other):
            assert each.get("file.bin", MIB) == b"newer"
            assert each.read("file.bin", lambda file: file.read(), 5) == b"newer"
            assert each.stat("file.bin") == 5
            assert each.list() == {"file.bin": 5}

    def test_listings_are_never_stale(self, place):
        """What others write and delete is seen at once, also by a store that has just listed."""
        store = place.open()
        put(store, "directory/mine", b"1")
        assert store.list() == store.list("directory") == {"directory/mine": 1}
        place.raw.write("directory/theirs", b"22")
        assert store.get("directory/theirs", MIB) == b"22"
        assert store.stat("directory/theirs") == 2
        assert store.list() == store.list("directory") == {"directory/mine": 1, "directory/theirs": 2}
        place.raw.delete("directory/mine")
        assert store.get("directory/mine", MIB) is None
        assert store.stat("directory/mine") is None
        assert store.list() == {"directory/theirs": 2}
        place.raw.write("directory/theirs", b"4444")
        assert store.get("directory/theirs", MIB) == b"4444"

    def test_names_with_directories(self, place):
        """A listing has all below a directory, at any depth, and nothing of one whose name begins alike."""
        store = place.open()
        names = ["top", "step-1/a.safetensors", "step-1/deeper/still/b", "step-10/c", "step-1.old"]
        for name in names:
            put(store, name, name.encode())
        assert place.raw.names() == set(names)
        assert store.list() == {name: len(name) for name in names}
        assert set(store.list("step-1")) == {"step-1/a.safetensors", "step-1/deeper/still/b"}
        assert set(store.list("step-1/deeper")) == {"step-1/deeper/still/b"}
        assert store.get("step-1/deeper/still/b", MIB) == b"step-1/deeper/still/b"

    def test_names_in_a_directory(self, place):
        """What lies directly in it, object or directory, each once; nothing where nothing was ever written."""
        store = place.open()
        assert store.names() == store.names("nowhere") == []
        for name in ("top", "step-1/a", "step-1/b", "step-1/deeper/c", "step-10/c"):
            put(store, name, b"1")
        assert sorted(store.names()) == ["step-1", "step-10", "top"]
        assert sorted(store.names("step-1")) == ["a", "b", "deeper"]
        place.raw.write("step-2/d", b"1")
        assert sorted(store.names()) == ["step-1", "step-10", "step-2", "top"]

    def test_links(self, place):
        """They count as what they lead to, where a storage has them; taking one away harms nothing of that."""
        store = place.open()
        put(store, "there/deeper/a", b"22")
        assert not store.is_link("there")
        assert not store.is_link("nowhere")
        if not isinstance(place.raw, RawDirectory):
            return
        os.makedirs(f"{place.raw.root}/step-1")
        for name, target in (
            ("step-1/b", "../there/deeper/a"),
            ("step-1/c", "../there"),
            ("step-2", "there"),
            ("lost", "no"),
        ):
            os.symlink(target, f"{place.raw.root}/{name}")
        os.symlink("../../step-1", f"{place.raw.root}/there/deeper/circle")
        assert store.list("step-1") == {"step-1/b": 2, "step-1/c/deeper/a": 2}
        assert store.list("step-2") == {"step-2/deeper/a": 2, "step-2/deeper/circle/b": 2}
        assert sorted(store.list("step-1", follow=False)) == ["step-1/b", "step-1/c"]
        assert (store.stat("step-1/b"), store.get("step-1/b", MIB)) == (2, b"22")
        with pytest.raises(StoreError, match=r"list .*/lost: it is a link whose target is missing"):
            store.list("lost")
        assert store.is_link("step-2") and store.is_link("lost")
        for name in ("step-1/b", "step-1/c", "step-2", "lost"):
            store.delete(name)
        store.delete_directory("step-1")
        assert sorted(os.listdir(place.raw.root)) == ["there"]
        assert place.raw.read("there/deeper/a") == b"22"

    @pytest.mark.parametrize("size_bytes", [1000, SEVERAL_BLOCKS], ids=["small", "large"])
    def test_exception_while_sending_publishes_nothing(self, place, size_bytes):
        """An exception in the middle of ``chunks`` comes out as it is, and neither an object nor an upload is left."""
        store = place.open()

        def chunks():
            yield content(size_bytes // 2)
            raise ZeroDivisionError("in the middle")

        with pytest.raises(ZeroDivisionError, match="in the middle"):
            store.put("directory/file.bin", chunks, size_bytes)
        assert (place.raw.names(), place.raw.uploads()) == (set(), 0)
        assert (store.list(), store.stat("directory/file.bin")) == ({}, None)

    def test_interrupt_while_overwriting_keeps_the_old(self, place):
        """Not even an exception that is no error, in the middle of an overwriting put, harms what was there."""
        store = place.open()
        put(store, "file.bin", b"old")

        def chunks():
            yield content(20 * MIB)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.put("file.bin", chunks, SEVERAL_BLOCKS)
        assert place.raw.names() == {"file.bin"}
        assert store.get("file.bin", MIB) == b"old"

    def test_put_that_nobody_awaits_publishes_nothing(self, place):
        """A put that outlived its deadline stops at its next chunk: what it would send then is no longer what was meant."""
        store = place.open(tries=1, deadline_seconds=2)
        released = threading.Event()

        def chunks():
            yield content(20 * MIB)
            released.wait(30)
            yield b"too late"

        with pytest.raises(StoreError, match="no answer within"):
            store.put("file.bin", chunks, 100)
        released.set()
        wait_for_those_left_behind()
        assert (place.raw.names(), place.raw.uploads()) == (set(), 0)

    def test_calls_that_are_made_together(self, place):
        """They do what they do one by one, with the same errors, and what the function returns or raises is passed on."""
        store = place.open(tries=1)

        def calls():
            put(store, "directory/a", b"1")
            put(store, "b", content(6 * MIB))
            return store.list(), store.get("directory/a", MIB), store.stat("nowhere")

        assert store.together(calls).result() == ({"directory/a": 1, "b": 6 * MIB}, b"1", None)
        with pytest.raises(FileNotFoundError):
            store.together(lambda: store.read_range("nowhere", 0, 1)).result()
        with pytest.raises(ZeroDivisionError):
            store.together(lambda: 1 // 0).result()

    def test_delete(self, place):
        """Deleting takes one object away, and may be done twice."""
        store = place.open()
        for name in ("directory/a", "directory/ab"):
            put(store, name, b"1")
        for _ in range(2):
            store.delete("directory/a")
            assert place.raw.names() == {"directory/ab"}
            assert store.list() == {"directory/ab": 1}
        store.delete("nowhere/never")

    def test_delete_directory(self, place):
        """Removing an emptied directory leaves nothing of it; one with objects in it keeps them all."""
        store = place.open()
        put(store, "directory/file.bin", b"1")
        put(store, "other/file.bin", b"1")
        store.delete_directory("directory")
        assert place.raw.names() == {"directory/file.bin", "other/file.bin"}
        store.delete("directory/file.bin")
        for _ in range(2):
            store.delete_directory("directory")
        assert store.list() == {"other/file.bin": 1}

    def test_directories_on_the_way_leave_no_trace(self, place):
        """Those that had to be made are gone when they are empty; one with objects in it keeps them all."""
        before = place.directories()
        store = place.open()
        with without_traces(store):
            put(store, "directory/file.bin", b"1")
            store.delete("directory/file.bin")
            store.delete_directory("directory")
        assert place.directories() == before
        with without_traces(store):
            put(store, "kept", b"1")
        with without_traces(store):
            put(store, "other", b"1")
            store.delete("other")
        assert place.raw.names() == {"kept"}
