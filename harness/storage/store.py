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
import errno
import functools
import io
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from stat import S_ISLNK
from typing import Any, BinaryIO, ClassVar, Self, TypeVar

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from harness import secrecy
from harness.errors import ConfigError, StoreError
from harness.runtime.threads import Background, in_order
from harness.storage import direct_io
from harness.storage.direct_io import Buffer
from harness.storage.retries import (
    THREAD,
    SerialCalls,
    call_with_retries,
    cannot,
    check_awaited,
    in_words,
    is_transient,
    lacks_directory,
    while_awaited,
)
from harness.storage.urls import connect, shown

T = TypeVar("T")

log = logging.getLogger(__name__)

_SMALL_BYTES = 4 << 20  # an object up to this size is sent in one request
_BLOCK_BYTES = 16 << 20  # larger ones are streamed in parts of this size
_S3_PART_BYTES = 8 << 20  # or, to S3, of this,
_S3_PARTS_AT_ONCE = 2  # so many of an object at once: there are several objects, and with 4 all of them came later
_S3_MOST_PARTS = 10_000  # that S3 takes for an object
_FIRST_BYTES = 1 << 20  # of an object whose size is not known, this much is asked for first
RANGE_BYTES = 8 << 20  # what is read in ranges comes in pieces of this size,
_RANGES_AHEAD = 8  # so many of them at a time
_S3 = {"s3", "s3a"}
_RANGED = {*_S3, "gs", "gcs", "abfs", "az"}
_SLOWEST_BYTES_PER_SECOND = 1 << 20  # a transfer slower than this has failed
_RENEWED_EVERY_SECONDS = 1.0  # so often at most are credentials read anew: deletions may be refused by the thousand
_NAMELESS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # says fsync of a directory where a filesystem has no such thing
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL}  # where directories cannot be fsynced, we made none


class Store:
    """The objects under one URL. Made by ``open_store``.

    ``tries`` and ``deadline_seconds`` bound each call: so many tries, and so many seconds for each try besides the
    time that its bytes may take. ``streams`` and ``shard_bytes`` are what suits it: how many shards to send at once, and how
    large they should be. One connection to an object store is far slower than the store.
    """

    streams: ClassVar[int] = 8
    shard_bytes: ClassVar[int] = 128 << 20
    is_local: ClassVar[bool] = False
    has_ranges: ClassVar[bool] = False  # that can be read several at a time, each by a request of its own
    has_directories: ClassVar[bool] = False  # of its own, which somebody has to make and may remove
    keeps_names = True  # whether the name of a file is on the disk when its directory was flushed
    retries = 0  # calls so far that failed for the moment

    def __init__(self, fs: AbstractFileSystem, root: str, url: str, tries: int, deadline_seconds: float) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = url  # without credentials: it is shown to people
        self.tries = tries
        self.deadline_seconds = deadline_seconds
        # What failed may have been the connection: SFTP never makes another, and S3 has a few, which may all hang.
        self._suspect: AbstractFileSystem | None = None
        self._renewed = -_RENEWED_EVERY_SECONDS
        self._renewing = threading.Lock()
        self._durable: set[str] = set()  # local directories whose names are on the disk

    def within(self, tries: int, deadline_seconds: float) -> Self:
        """The same store, for whoever has less time."""
        return type(self)(self.fs, self.root, self.url, tries, deadline_seconds)

    def together(self, function: Callable[[], T]) -> Background[T]:
        """Begins a function that makes many calls, which on a local filesystem share its thread.

        A thread for each call would have to wait twice for its turn, four milliseconds each time where a training keeps all
        cores busy, and the call itself takes one. Each call keeps its deadline. One that hangs is not tried again, since
        there is no connection that could be another.
        """
        return SerialCalls(function) if self.is_local else Background(function, THREAD)

    def put(self, name: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        """Publishes an object. ``chunks`` is called once for each try and yields its ``size_bytes`` bytes."""
        self._call("put", name, lambda: self._send(self._path(name), chunks, size_bytes), size_bytes)

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
            with self._open(self._path(name)) as file:
                return consume(file)

        return self._reading(name, read, size_bytes)

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        """So many bytes of an object from ``start`` on, fewer where it ends; ``FileNotFoundError`` when there is none."""
        if not size_bytes:
            return b""
        return self._reading(name, lambda: self._read_range(self._path(name), start, size_bytes), size_bytes)

    def pieces(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
        """Each range (name, start, size in bytes) as ``read_range`` gives it, in order; the next few are on their way."""
        at_once = _RANGES_AHEAD if self.has_ranges else 1
        return in_order(at_once, lambda each: self.read_range(*each), ranges, ahead=at_once)

    def names(self, directory: str = "") -> list[str]:
        """The names that lie directly in a directory, of objects and of directories. Nothing below them is looked at."""

        def look() -> list[str]:
            place = self._path(directory)
            try:
                found = self.fs.ls(place, detail=False)
            except FileNotFoundError:
                return []
            return [name for path in found if (name := path.rstrip("/")[len(place) + 1 :])]

        return self._call("list", directory, look)

    def list(self, prefix: str = "", *, beginning: str = "", follow: bool = True) -> dict[str, int]:
        """All objects below a prefix (a directory's name), with their sizes in bytes. Directories do not count.

        ``beginning`` is that of the names below it that are wanted; for object stores (``has_ranges``) alone. A link counts
        as what it leads to; without ``follow`` as an object of its own, which can be deleted. Raises
        ``StoreError`` where the prefix itself is a link that leads nowhere.
        """
        place = f"{self.root}/{prefix}".rstrip("/")

        def find() -> dict[str, int]:
            start = len(self.root) + 1
            infos = _files(self.fs, place, beginning, follow=follow)
            found = {info["name"][start:]: self._size_bytes(info) for info in infos}
            if not found and self._is_link(place) and not self.fs.exists(place):
                what = "it is a link, and what it leads to is not there; mount that, or delete the link"
                raise StoreError(f"list {self.url}/{prefix}: {what}")
            return found

        return self._call("list", prefix, find)

    def stat(self, name: str) -> int | None:
        """The size of an object in bytes, as the store says now; None when there is none."""

        def stat() -> int | None:
            try:
                info = self.fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return self._size_bytes(info) if info["type"] == "file" else None

        return self._call("stat", name, stat)

    def _size_bytes(self, info: Mapping[str, Any]) -> int:
        """The size of a file that was listed: some listings have none, and the file itself has to be asked."""
        size = info.get("size")
        if size is None and (size := self.fs.info(info["name"]).get("size")) is None:
            raise OSError(errno.ENOTSUP, "the storage does not say how large it is")
        return int(size)

    def delete(self, name: str) -> None:
        """Removes an object; one that is not there is no error."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._remove(self._path(name))

        self._call("delete", name, delete)

    def unlink(self, name: str) -> bool:
        """Removes a name that is a link, and nothing of what it leads to; false where it is none."""

        def unlink() -> bool:
            if is_link := self._is_link(self._path(name)):
                self._remove(self._path(name))
            return is_link

        return self._call("delete", name, unlink)

    def delete_directory(self, name: str) -> None:
        """Removes a directory in which no object is left, where the filesystem keeps such things. Best effort."""
        assert name, "the root of an object store is a bucket"

        def remove(path: str) -> None:
            with contextlib.suppress(Exception):  # it does no harm where it is
                for info in self.fs.ls(path, detail=True) if self.has_directories else ():
                    if info["type"] == "directory":  # not one that a link leads to
                        remove(info["name"])
                self._remove_directory(path)

        with contextlib.suppress(StoreError):
            self._call("remove", name, lambda: remove(self._path(name)))

    def _is_link(self, path: str) -> bool:  # noqa: ARG002  # an object store has none
        return False

    def _remove(self, path: str) -> None:
        self.fs.rm_file(path)

    @contextlib.contextmanager
    def without_traces(self) -> Iterator[None]:
        """Takes those directories away afterwards that had to be made on the way to the root, where they are empty."""
        made = self._call("stat", "", lambda: list(self._missing(self.root))) if self.has_directories else []
        try:
            yield
        finally:
            for path in made:
                with contextlib.suppress(OSError, StoreError):
                    self._call("remove", "", lambda path=path: self._remove_directory(path))  # type: ignore[misc]

    def _missing(self, path: str) -> Iterator[str]:
        """Of a path and those above it, those that are not there, the innermost first."""
        try:
            if path:
                self.fs.info(path)
        except FileNotFoundError:
            yield path
            yield from self._missing(os.path.dirname(path))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _remove_directory(self, path: str) -> None:
        self.fs.rmdir(path)

    def _send(self, path: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        self._put(path, while_awaited(chunks()), size_bytes)

    def _another(self) -> AbstractFileSystem:
        """A filesystem like ``fs``, with connections of its own."""
        fs = self.fs
        return type(fs)(*fs.storage_args, **{**fs.storage_options, "skip_instance_cache": True})

    def _open(self, path: str) -> Any:
        return self.fs.open(path, "rb", block_size=_BLOCK_BYTES)

    def _read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        with self._open(path) as file:
            file.seek(start)
            return bytes(file.read(size_bytes))

    def _reading(self, name: str, function: Callable[[], T], size_bytes: int) -> T:
        try:
            return self._call("read", name, function, size_bytes)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise FileNotFoundError(f"{self.url}/{name}") from None
            raise

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        if size_bytes <= _SMALL_BYTES or isinstance(self.fs, MemoryFileSystem):  # memory: open() publishes at once
            self.fs.pipe_file(path, b"".join(chunks))
            return
        file = self.fs.open(path, "wb", block_size=_BLOCK_BYTES)
        try:
            for chunk in chunks:
                file.write(chunk)
            file.close()
        except BaseException:
            _abandon(file)
            raise

    def _call(self, operation: str, name: str, function: Callable[[], T], size_bytes: int = 0) -> T:
        """Runs a storage call: deadline, retries, and errors in our own words."""

        used = self.fs

        def run() -> T:
            nonlocal used
            if self.fs is self._suspect:
                self.fs = self._another()
            used = self.fs
            used.invalidate_cache()  # fsspec may keep listings, and other machines write here
            return function()

        def suspect() -> None:
            self.retries += 1
            if self.fs is used:  # else another call has seen to it
                self._suspect = used

        where = f"{operation} {self.url}/{name}".rstrip("/")
        limit_seconds = self.deadline_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND
        try:
            return call_with_retries(where, run, self.tries, limit_seconds, suspect, lambda: self._renew(used))
        except StoreError as error:
            if operation in ("put", "list") and cannot(error.__cause__):
                advice = f"{type(used).__name__} cannot do that; a run needs a file system to put, list and delete in"
                raise ConfigError(f"{error}: {advice}; choose another URL") from None
            raise

    def _renew(self, refused: AbstractFileSystem) -> bool:
        """Whether a call that was refused is worth another try. Credentials are read when a filesystem is made, and those
        in a file or of a machine's role are replaced by others every few hours."""
        if self.is_local:
            return False
        with self._renewing:
            if self.fs is refused and self._suspect is not refused:  # else another call has seen to it
                if time.monotonic() < self._renewed + _RENEWED_EVERY_SECONDS:
                    return False
                self._suspect, self._renewed = refused, time.monotonic()
            return True


class _OtherStore(Store):
    """A filesystem of which nothing is known but what fsspec asks of all."""

    has_directories = True  # or nothing of that name is there to be taken away
    streams = 1  # a connection that is its only one may be at the other end

    def _send(self, path: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        if isinstance(self.fs, AbstractArchiveFileSystem):
            raise ConfigError(f"put {self.url}: an archive can only be read; choose another URL")
        try:
            super()._send(path, chunks, size_bytes)
        except Exception as error:  # of any class
            if not lacks_directory(error):
                raise
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)
            super()._send(path, chunks, size_bytes)

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        if size_bytes <= _SMALL_BYTES:
            super()._put(path, chunks, size_bytes)
            return
        try:
            file = self.fs.open(path, "wb", block_size=_BLOCK_BYTES)
        except NotImplementedError:  # it takes objects in one piece only
            self.fs.pipe_file(path, b"".join(chunks))
            return
        try:
            for chunk in chunks:
                file.write(chunk)
            file.close()
        except BaseException:
            if not _abandon(file):
                with contextlib.suppress(Exception):
                    self._remove(path)
            raise

    def _remove(self, path: str) -> None:
        try:
            self.fs.rm_file(path)
        except NotImplementedError:
            self.fs.rm(path)

    def _remove_directory(self, path: str) -> None:
        if not self.fs.ls(path, detail=False):  # some remove what is in it, too
            self.fs.rmdir(path)


class _RangedStore(Store):
    """An object store whose filesystem knows ranges, and can be called by several threads."""

    has_ranges = True

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

    def _read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        try:
            data = self.fs.cat_file(path, start=start, end=start + size_bytes)
        except Exception:  # how a store refuses a range beyond the end is its own affair
            info = self.fs.info(path)
            if info["type"] != "file":
                raise FileNotFoundError(path) from None
            if info["size"] > start:
                raise
            return b""
        if len(data) > size_bytes:
            raise OSError(f"asked for {size_bytes} bytes from {start} on, got {len(data)}")
        return bytes(data)


class _S3Store(_RangedStore):
    """S3, to which the parts of an object can be on their way at once: fsspec's own file sends one after the other."""

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        if size_bytes <= _SMALL_BYTES:
            super()._put(path, chunks, size_bytes)
            return
        bucket, key, _ = self.fs.split_path(path)
        upload = {"Bucket": bucket, "Key": key}
        upload["UploadId"] = self.fs.call_s3("create_multipart_upload", **upload)["UploadId"]
        part_bytes = max(_S3_PART_BYTES, -(-size_bytes // _S3_MOST_PARTS))
        bodies = enumerate(_gathered(chunks, part_bytes), 1)
        try:  # a part that arrives after the abort would stay, and cost money: they are waited for
            send, at_once = functools.partial(self._send_part, upload), _S3_PARTS_AT_ONCE
            parts = list(in_order(at_once, send, bodies, ahead=at_once, waits=True))
            check_awaited()
            self.fs.call_s3("complete_multipart_upload", **upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.call_s3("abort_multipart_upload", **upload)
            raise

    def _send_part(self, upload: Mapping[str, str], numbered: tuple[int, bytes]) -> dict[str, Any]:
        """What the completion has to say of a part."""
        number, body = numbered
        sent = self.fs.call_s3("upload_part", **upload, PartNumber=number, Body=body)
        return {"PartNumber": number, "ETag": sent["ETag"]}


class _LocalStore(Store):
    """A local filesystem, where ``put`` needs care of its own."""

    is_local = True
    has_directories = True
    streams = 1  # a disk is fastest at one thing after the other
    shard_bytes = 1 << 30

    def _is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def _open(self, path: str) -> Any:
        return open(path, "rb")  # fsspec's file has layers; this one reads straight to where the bytes are to be

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        directory = os.path.dirname(path)
        self._make_directory(directory)
        partial = _partial(path)
        try:
            with open(partial, "wb", buffering=0) as file:
                if size_bytes < direct_io.BUFFER_BYTES:
                    direct_io.write_all(file, b"".join(chunks))
                else:
                    direct_io.write(file, chunks)
                os.fsync(file.fileno())  # ext4 accepts more than the disk holds, and says so only here
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        self._keep_names(directory)

    def _make_directory(self, path: str) -> None:
        """Makes a directory and those above it, each with its name on the disk.

        Who made one that is there already may have died, or been told of an error, before its name was: the first time that
        a store meets a directory it sees to that itself.
        """
        exists = os.path.isdir(path)
        if exists and (path in self._durable or path == os.path.dirname(path)):
            return
        parent = os.path.dirname(path)
        self._make_directory(parent)
        with contextlib.suppress(FileExistsError):
            if not exists:
                os.mkdir(path)
        flush = _fsync_directory if exists else self._keep_names
        try:
            flush(parent)
        except OSError as error:
            if not exists or error.errno not in _NOT_OURS:
                raise
        self._durable.add(path)

    def _keep_names(self, directory: str) -> None:
        """Puts the names in a directory on the disk, where its filesystem can do that."""
        try:
            _fsync_directory(directory)
        except OSError as error:
            if error.errno not in _NAMELESS:
                raise
            self.keeps_names = False
            _warn_of_names(self.root)


class _SftpStore(Store):
    """SFTP, where others see a file while it is being written."""

    has_directories = True
    streams = 1  # one connection, whatever is asked of it
    shard_bytes = 1 << 30

    def _is_link(self, path: str) -> bool:
        try:
            return S_ISLNK(self.fs.ftp.lstat(path).st_mode)
        except (AttributeError, FileNotFoundError):  # another library's filesystem, or nothing
            return False

    def _remove(self, path: str) -> None:
        if hasattr(self.fs, "ftp"):
            self.fs.ftp.remove(path)  # of a link to a directory, fsspec would remove the directory
        else:
            super()._remove(path)

    def _open(self, path: str) -> Any:
        file = super()._open(path)
        if hasattr(file, "prefetch"):  # paramiko, which waits for each 32 KiB otherwise
            file.prefetch(max_concurrent_requests=256)
        return file

    def _read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        with super()._open(path) as file:
            file.seek(start)
            if hasattr(file, "prefetch"):
                file.prefetch(min(start + size_bytes, file.stat().st_size), max_concurrent_requests=256)
            return bytes(file.read(size_bytes))

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        partial = _partial(path)
        try:
            with self.fs.open(partial, "wb") as file:
                for chunk in chunks:
                    _write_pipelined(file, chunk)
            if (found := self.fs.info(partial)["size"]) != size_bytes:
                raise OSError(f"sent {size_bytes} bytes, the server has {found}")
            self.fs.mv(partial, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(partial)
            raise


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
    return _kind_of(fs)(fs, root, shown(url), tries, deadline_seconds)


def _kind_of(fs: AbstractFileSystem) -> type[Store]:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if isinstance(fs, LocalFileSystem):
        return _LocalStore
    if "sftp" in protocols:
        return _SftpStore
    if not _S3.isdisjoint(protocols) and hasattr(fs, "call_s3"):  # it is s3fs
        return _S3Store
    if not _RANGED.isdisjoint(protocols):
        return _RangedStore
    return Store if isinstance(fs, MemoryFileSystem) else _OtherStore


class _Joined(io.RawIOBase):
    """Pieces as one file."""

    def __init__(self, pieces: Iterable[Buffer]) -> None:
        self.pieces = iter(pieces)
        self.piece = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, place: Any) -> int:
        import numpy as np  # noqa: PLC0415  # whoever only looks at a run does without it

        while not self.piece:
            if (piece := next(self.pieces, None)) is None:
                return 0
            self.piece = memoryview(piece)
        count = min(len(place), len(self.piece))
        # Unlike a slice's assignment, which would hold the training up for milliseconds, without the interpreter lock.
        np.copyto(np.frombuffer(place, np.uint8)[:count], np.frombuffer(self.piece, np.uint8)[:count])
        self.piece = self.piece[count:]
        return count


def joined(pieces: Iterable[Buffer]) -> BinaryIO:
    """A file made of pieces, to be read once from beginning to end."""
    return io.BufferedReader(_Joined(pieces))


def _gathered(chunks: Iterable[Buffer], size_bytes: int) -> Iterator[bytes]:
    """The bytes of the chunks in pieces of one size, and what is left."""
    file = joined(chunks)
    while piece := file.read(size_bytes):
        yield piece


def _files(
    fs: AbstractFileSystem, place: str, beginning: str = "", *, follow: bool = True, is_behind_link: bool = False
) -> Iterator[dict[str, Any]]:
    """What fsspec knows of each file below a place, and behind the links in it; without ``follow`` of each link itself.

    Behind a link to a directory none to another directory is followed: so there is no circle.
    """
    if getattr(type(fs), "_find", AsyncFileSystem._find) is not AsyncFileSystem._find:  # an object store: one listing
        found = fs.find(place, detail=True, **({"prefix": beginning} if beginning else {}))
        yield from (info for info in found.values() if info["type"] == "file")
        return
    try:
        found = fs.ls(place, detail=True)  # not find(), which leaves out what it may not list
    except FileNotFoundError:  # nothing was ever written, or it was deleted since its parent was listed
        return
    for info in found:
        if info["type"] == "directory":
            yield from _files(fs, info["name"], follow=follow, is_behind_link=is_behind_link)
        elif info["type"] == "file" or not follow:
            yield info
        elif (target := _behind(fs, info["name"])) is not None and target["type"] == "file":
            yield target
        elif target is not None and target["type"] == "directory" and not is_behind_link:
            yield from _files(fs, info["name"], is_behind_link=True)


def _behind(fs: AbstractFileSystem, link: str) -> dict[str, Any] | None:
    """What fsspec knows of what a link leads to; None where that is not there."""
    try:
        return {**fs.info(link), "name": link}
    except FileNotFoundError:
        return None


def _abandon(file: Any) -> bool:
    """Gives a half-written object up. Closing it would publish what has been written so far, and so would its finalizer.

    False where that may have happened.
    """
    is_known = isinstance(file, AbstractBufferedFile)
    try:
        file.discard()
    except Exception:  # the upload is lost already; what matters is the exception that is under way
        if not is_known:
            with contextlib.suppress(Exception):
                file.close()
            return False
    if is_known:
        file.closed = True
    return True


def _partial(path: str) -> str:
    """A name beside an object's for what is not yet the object."""
    directory, name = os.path.split(path)
    return f"{directory}/.{name}.{secrets.token_hex(4)}.partial"


def _write_pipelined(file: Any, chunk: Buffer) -> None:
    """Sends a chunk without waiting for the answer to each packet; all answers are there when it returns.

    paramiko does not read the answers that are under way when a pipelined file is closed: a full disk would go unnoticed.
    """
    if not hasattr(file, "set_pipelined"):
        file.write(chunk)
        return
    view = memoryview(chunk)
    file.set_pipelined(True)
    file.write(view[:-1])
    file.set_pipelined(False)
    file.write(view[-1:])


@functools.cache
def _warn_of_names(root: str) -> None:
    log.warning(
        "%s: this file system cannot make names durable (fsync of a directory); a power cut, or a crash of its server, may "
        "take the newest checkpoints with it",
        root,
    )


def _fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
