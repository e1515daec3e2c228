"""Objects under a URL: put, get, read, list, stat, delete, over any fsspec filesystem. No torch.

The contract that everything above rests on:

* ``put`` publishes an object whole or not at all, and returns when it is durable. On a local filesystem: written under
  another name, flushed, fsynced, renamed, and the directories on the way fsynced (leaving out the file's or the
  directory's fsync loses committed checkpoints in a power cut). On an object store: one request, or one multipart
  upload that is aborted on any exception. Over SFTP: written under another name, its size confirmed, renamed; when it
  reaches the disk is the server's affair.
* No operation but ``delete`` takes anything away, and nothing here renames one object over another's content or asks
  for exclusive creation: not every store has those, and the format does not need them.
* Every call ends (see ``harness.storage.retries``): under a deadline, since a frozen S3 server holds s3fs for minutes
  whatever its timeouts say. Transient failures are tried again with backoff over a new connection, and what remains is a
  ``StoreError`` that names the operation and the object. A put that hung and wakes up later publishes nothing: the memory
  that it reads may hold the next step by then.
* Nothing is answered from a cache, and what could not be listed is an error, not an empty directory.
* Large objects come as fast as the storage gives them, in bounded memory: from an object store in several ranges at a time.
  Local files are read, never mapped: a mapped file that is cut short, or a page of it that the disk cannot read, is a
  SIGBUS that ends the process, and what was verified in a mapping may be other bytes when it is touched the next time.

* A filesystem that nothing here knows is taken at its word: it may raise what it likes, want its directories made, tell no
  sizes in its listings. What it cannot do at all is a ``ConfigError``.

What a URL means, ``harness.storage.urls`` says.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from harness import secrecy
from harness.errors import ConfigError, StoreError
from harness.runtime.threads import Background, in_order, in_threads
from harness.storage.direct_io import Buffer
from harness.storage.filesystem import Filesystem, files_below, joined, kind_of
from harness.storage.retries import THREAD, SerialCalls, call_with_retries, cannot, in_words, is_transient
from harness.storage.urls import connect, shown

T = TypeVar("T")

_FIRST_BYTES = 1 << 20  # of an object whose size is not known, this much is asked for first
RANGE_BYTES = 8 << 20  # what is read in ranges comes in pieces of this size,
_RANGES_AHEAD = 8  # so many of them at a time
_DELETED_AT_ONCE = 1000  # objects, which is what S3 takes in a request
_DIRECTORIES_AT_ONCE = 64  # are removed within the deadline of one call
_SLOWEST_BYTES_PER_SECOND = 1 << 20  # a transfer slower than this has failed
_RENEWED_EVERY_SECONDS = 1.0  # so often at most are credentials read anew: deletions may be refused by the thousand


class Store:
    """The objects under one URL. Made by ``open_store``.

    ``tries`` and ``deadline_seconds`` bound each call: the number of tries, and the seconds of each try besides the time
    that its bytes may take. ``streams`` and ``shard_bytes`` are what suits it: how many shards to send at once, and how
    large they should be. One connection to an object store is far slower than the store.
    """

    def __init__(self, filesystem: Filesystem, tries: int, deadline_seconds: float) -> None:
        self.filesystem = filesystem
        self.calls = Calls(filesystem, tries, deadline_seconds)
        self.root, self.url = filesystem.root, filesystem.url
        self.is_local, self.has_ranges = filesystem.is_local, filesystem.has_ranges
        self.deletes_many = filesystem.deletes_many
        self.streams, self.shard_bytes = filesystem.streams, filesystem.shard_bytes

    @property
    def retries(self) -> int:
        """The calls so far that failed for the moment."""
        return self.calls.retries

    def together(self, function: Callable[[], T]) -> Background[T]:
        """Begins a function that makes many calls, which on a local filesystem share its thread.

        A thread for each call would have to wait twice for its turn, four milliseconds each time where a training keeps all
        cores busy, and the call itself takes one. Each call keeps its deadline. One that hangs is not tried again, since
        there is no connection that could be another.
        """
        return SerialCalls(function) if self.is_local else Background(function, THREAD)

    def put(self, name: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        """Publishes an object. ``chunks`` is called once for each try and yields its ``size_bytes`` bytes."""
        path = self.filesystem.path(name)
        self.calls.call("put", name, lambda: self.filesystem.send(path, chunks, size_bytes), size_bytes)

    def get(self, name: str, limit_bytes: int) -> bytes | None:
        """The bytes of an object; None when there is none. One that is longer than ``limit_bytes`` is cut there."""
        size_bytes = self.stat(name)  # the deadline depends on it
        if size_bytes is None:
            return None
        try:
            return self.read_range(name, 0, min(size_bytes, limit_bytes))
        except FileNotFoundError:
            return None

    def read(self, name: str, consume: Callable[[BinaryIO], T], size_bytes: int) -> T:
        """Opens an object and returns what ``consume`` makes of it; ``FileNotFoundError`` when there is none.

        ``consume`` reads from beginning to end. It may be called once for each try, and in another thread.
        """

        def read() -> T:
            with self.filesystem.open(self.filesystem.path(name)) as file:
                return consume(file)

        return self.calls.read(name, read, size_bytes)

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        """Reads ``size_bytes`` of an object from ``start`` on; fewer at its end. ``FileNotFoundError`` if there is none."""
        if not size_bytes:
            return b""
        path = self.filesystem.path(name)
        return self.calls.read(name, lambda: self.filesystem.read_range(path, start, size_bytes), size_bytes)

    def pieces(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
        """Each range (name, start, size in bytes) as ``read_range`` gives it, in order; the next few are on their way."""
        at_once = _RANGES_AHEAD if self.has_ranges else 1
        return in_order(at_once, lambda each: self.read_range(*each), ranges, ahead=at_once)

    def names(self, directory: str = "", *, beginning: str = "") -> list[str]:
        """The names that lie directly in a directory and begin so, of objects and of directories. Nothing below them is
        looked at."""

        def look() -> list[str]:
            place = self.filesystem.path(directory)
            try:
                return [name for path in self.filesystem.names(place, beginning) if (name := path[len(place) + 1 :])]
            except FileNotFoundError:
                return []

        return self.calls.call("list", directory, look)

    def list(self, prefix: str = "", *, beginning: str = "", follow: bool = True) -> dict[str, int]:
        """All objects below a prefix (a directory's name), with their sizes in bytes. Directories do not count.

        ``beginning`` is that of the names below it that are wanted; for object stores (``has_ranges``) alone. A link counts
        as what it leads to; without ``follow`` as an object of its own, which can be deleted. Raises
        ``StoreError`` where the prefix itself is a link that leads nowhere.
        """
        place = f"{self.root}/{prefix}".rstrip("/")

        def find() -> dict[str, int]:
            start = len(self.root) + 1
            infos = files_below(self.filesystem.fs, place, beginning, follow=follow)
            found = {info["name"][start:]: self.filesystem.size_of(info) for info in infos}
            if not found and self.filesystem.is_link(place) and not self.filesystem.fs.exists(place):
                what = "it is a link whose target is missing; mount the target, or delete the link"
                raise StoreError(f"list {self.url}/{prefix}: {what}")
            return found

        return self.calls.call("list", prefix, find)

    def stat(self, name: str) -> int | None:
        """The size of an object in bytes, as the store says now; None when there is none."""

        def stat() -> int | None:
            try:
                info = self.filesystem.fs.info(self.filesystem.path(name))
            except FileNotFoundError:
                return None
            return self.filesystem.size_of(info) if info["type"] == "file" else None

        return self.calls.call("stat", name, stat)

    def delete(self, name: str) -> None:
        """Removes an object; one that is not there is no error."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.filesystem.remove(self.filesystem.path(name))

        self.calls.call("delete", name, delete)

    def delete_many(self, names: Sequence[str]) -> None:
        """Removes objects, 1,000 in a request, where ``deletes_many``; one that is not there is no error."""
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = names[start : start + _DELETED_AT_ONCE]
            paths = [self.filesystem.path(name) for name in some]
            try:
                self.calls.call("delete", some[0], functools.partial(self.filesystem.remove_many, paths))
            except StoreError as error:
                if error.transient:
                    raise
                in_threads(self.streams, self.delete, some)  # a server may know no such request

    def delete_directories(self, names: Sequence[str], first: str) -> bool:
        """Removes directories with all that is in them, many in one call; in each, the object named ``first`` goes first.

        Of a link only the link goes. Returns false, and does nothing, where that is not a local filesystem.
        """
        for start in range(0, len(names) if self.is_local else 0, _DIRECTORIES_AT_ONCE):
            some = names[start : start + _DIRECTORIES_AT_ONCE]
            paths = [self.filesystem.path(name) for name in some]
            remove = functools.partial(self.filesystem.remove_directories, paths, first)
            self.calls.call("delete", f"{some[0]} and others" if len(some) > 1 else some[0], remove)
        return self.is_local

    def is_link(self, name: str) -> bool:
        """Whether a name is a link."""
        return self.calls.call("stat", name, lambda: self.filesystem.is_link(self.filesystem.path(name)))

    def delete_directory(self, name: str) -> None:
        """Removes a directory in which no object is left, where the filesystem keeps such things. Best effort."""
        assert name, "the root of an object store is a bucket"

        def remove(path: str) -> None:
            with contextlib.suppress(Exception):  # it does no harm where it is
                for info in self.filesystem.fs.ls(path, detail=True) if self.filesystem.has_directories else ():
                    if info["type"] == "directory":  # not one that a link leads to
                        remove(info["name"])
                self.filesystem.remove_directory(path)

        with contextlib.suppress(StoreError):
            self.calls.call("remove", name, lambda: remove(self.filesystem.path(name)))


class _RangedStore(Store):
    """An object store, of which several ranges are read at a time."""

    def get(self, name: str, limit_bytes: int) -> bytes | None:
        """As ``Store.get``; most objects that are wanted whole are small, and come with the first request."""
        try:
            first = self.read_range(name, 0, min(_FIRST_BYTES, limit_bytes))
        except FileNotFoundError:
            return None
        return first if len(first) < min(_FIRST_BYTES, limit_bytes) else super().get(name, limit_bytes)

    def read(self, name: str, consume: Callable[[BinaryIO], T], size_bytes: int) -> T:  # noqa: ARG002  # each range has a deadline
        found_bytes = self.stat(name)
        if found_bytes is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        starts = range(0, found_bytes, RANGE_BYTES)
        ranges = ((name, start, min(RANGE_BYTES, found_bytes - start)) for start in starts)
        try:
            return consume(joined(self.pieces(ranges)))
        except FileNotFoundError:
            raise
        except OSError as error:  # what becomes of the bytes may fail, too: a full disk
            reason = in_words(error)
            raise StoreError(f"read {self.url}/{name}: {reason}", transient=is_transient(error)) from error


def limited(store: Store, tries: int, deadline_seconds: float) -> Store:
    """The same objects, within tighter limits."""
    return type(store)(store.filesystem.at(store.root, store.url), tries, deadline_seconds)


@contextlib.contextmanager
def without_traces(store: Store) -> Iterator[None]:
    """Takes those directories away afterwards that had to be made on the way to the root, where they are empty."""
    filesystem = store.filesystem
    made = store.calls.call("stat", "", lambda: list(_missing(filesystem, store.root))) if filesystem.has_directories else []
    try:
        yield
    finally:
        for path in made:
            with contextlib.suppress(OSError, StoreError):
                store.calls.call("remove", "", lambda path=path: filesystem.remove_directory(path))  # type: ignore[misc]


def _missing(filesystem: Filesystem, path: str) -> Iterator[str]:
    """Of a path and those above it, those that are not there, the innermost first."""
    try:
        if path:
            filesystem.fs.info(path)
    except FileNotFoundError:
        yield path
        yield from _missing(filesystem, os.path.dirname(path))


class Calls:
    """The calls to a filesystem: each within a deadline, tried again where that may help, with errors in our own words."""

    def __init__(self, filesystem: Filesystem, tries: int, deadline_seconds: float) -> None:
        self.filesystem = filesystem
        self.tries = tries
        self.deadline_seconds = deadline_seconds
        self.retries = 0  # calls so far that failed for the moment
        # What failed may have been the connection: SFTP never makes another, and S3 has a few, which may all hang.
        self._suspect: AbstractFileSystem | None = None
        self._renewed = -_RENEWED_EVERY_SECONDS
        self._renewing = threading.Lock()

    def call(self, operation: str, name: str, function: Callable[[], T], size_bytes: int = 0) -> T:
        """What a function returns that asks the filesystem for something."""
        used = self.filesystem.fs

        def run() -> T:
            nonlocal used
            if self.filesystem.fs is self._suspect:
                self.filesystem.fs = self.filesystem.another()
            used = self.filesystem.fs
            used.invalidate_cache()  # fsspec may keep listings, and other machines write here
            return function()

        def suspect() -> None:
            self.retries += 1
            if self.filesystem.fs is used:  # else another call has seen to it
                self._suspect = used

        where = f"{operation} {self.filesystem.url}/{name}".rstrip("/")
        limit_seconds = self.deadline_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            return call_with_retries(where, run, self.tries, limit_seconds, suspect, lambda: self._renew(used))
        except StoreError as error:
            if operation in ("put", "list") and cannot(error.__cause__):
                advice = f"{type(used).__name__} cannot do that; a run needs a file system to put, list and delete in"
                raise ConfigError(f"{error}: {advice}; choose another URL") from None
            raise

    def read(self, name: str, function: Callable[[], T], size_bytes: int) -> T:
        """The same, of one that reads an object; ``FileNotFoundError`` when there is none."""
        try:
            return self.call("read", name, function, size_bytes)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(f"{self.filesystem.url}/{name}") from None
            raise

    def _renew(self, refused: AbstractFileSystem) -> bool:
        """Whether a call that was refused is worth another try. Credentials are read when a filesystem is made, and those
        in a file or of a machine's role are replaced by others every few hours."""
        if self.filesystem.is_local:
            return False
        with self._renewing:
            if self.filesystem.fs is refused and self._suspect is not refused:  # else another call has seen to it
                if time.monotonic() < self._renewed + _RENEWED_EVERY_SECONDS:
                    return False
                self._suspect, self._renewed = refused, time.monotonic()
            return True


def open_store(
    url: str, storage_options: Mapping[str, Any] | None = None, *, tries: int = 5, deadline_seconds: float = 60
) -> Store:
    """The store at a URL: ``s3://bucket/run``, ``memory://run``, a local path, anything that fsspec knows.

    ``storage_options`` go to the filesystem as they are (``key``, ``endpoint_url``, …). Raises ``ConfigError`` when there is
    no such filesystem, its package is not installed, or the URL can be read in two ways; ``StoreError`` when it cannot be
    connected to.
    """

    secrecy.learn(url, storage_options, fsspec.config.conf)
    fs, root = call_with_retries(f"open {shown(url)}", lambda: connect(url, storage_options or {}), tries, deadline_seconds)
    filesystem = kind_of(fs)(fs, root, shown(url))
    return (_RangedStore if filesystem.has_ranges else Store)(filesystem, tries, deadline_seconds)
