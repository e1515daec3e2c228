"""Objects under a URL: put, get, read, list, stat, delete, over any fsspec filesystem. No torch.

The contract that everything above rests on:

* ``put`` publishes an object whole or not at all, and returns when it is durable. On a local filesystem: written under
  another name, flushed, fsynced, renamed, and the directories on the way fsynced (leaving out the file's or the
  directory's fsync loses committed checkpoints in a power cut). On an object store: one request, or one multipart
  upload that is aborted on any exception.
* No operation but ``delete`` takes anything away, and nothing here renames one object over another's content or asks
  for exclusive creation: not every store has those, and the format does not need them.
* Every call ends: it runs in a thread of its own under a deadline (a frozen S3 server holds s3fs for minutes whatever
  its timeouts say), transient failures are tried again with backoff, and what remains is a ``StoreError`` that names the
  operation and the object.

URLs are ``str``: ``pathlib`` eats a slash of ``s3://``.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile

from harness.errors import ConfigError, HarnessError, StoreError

T = TypeVar("T")
Buffer = bytes | bytearray | memoryview

_SMALL_BYTES = 4 << 20  # an object up to this size is sent in one request
_BLOCK_BYTES = 16 << 20  # larger ones are streamed in parts of this size
_SLOWEST_BYTES_PER_SECOND = 1 << 20  # a transfer slower than this has failed
_PERMANENT = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EEXIST,
}  # fmt: skip
_PERMANENT_NAMES = {"NoCredentialsError", "ClientAuthenticationError", "ParamValidationError", "PartialCredentialsError"}
_BACKEND_PACKAGES = {"botocore", "aiobotocore", "aiohttp", "azure", "google", "gcsfs", "paramiko", "asyncssh", "requests"}


class Store:
    """The objects under one URL. Made by ``open_store``.

    ``attempts`` and ``deadline_seconds`` bound each call: so many tries, and so many seconds for each try besides the
    time that its bytes may take.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, url: str, attempts: int, deadline_seconds: float) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = url  # without credentials: it is shown to people
        self.attempts = attempts
        self.deadline_seconds = deadline_seconds

    def put(self, name: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        """Publishes an object. ``chunks`` is called once for each try and yields its ``size_bytes`` bytes."""
        self._call("put", name, lambda: self._put(self._path(name), chunks(), size_bytes), size_bytes)

    def get(self, name: str, limit_bytes: int) -> bytes | None:
        """The bytes of an object; None when there is none. One that is longer than ``limit_bytes`` is cut there."""

        def get() -> bytes | None:
            try:
                with self.fs.open(self._path(name), "rb") as file:
                    return bytes(file.read(limit_bytes))
            except (FileNotFoundError, IsADirectoryError):
                return None

        return self._call("get", name, get, limit_bytes)

    def read(self, name: str, consume: Callable[[BinaryIO], T], size_bytes: int) -> T:
        """Opens an object and returns what ``consume`` makes of it; ``FileNotFoundError`` when there is none.

        ``consume`` is called once for each try, in another thread, and reads from beginning to end.
        """

        def read() -> T:
            with self.fs.open(self._path(name), "rb", block_size=_BLOCK_BYTES) as file:
                return consume(file)

        return self._call("read", name, read, size_bytes)

    def list(self, prefix: str = "") -> dict[str, int]:
        """All objects below a prefix (a directory's name), with their sizes in bytes. Directories do not count."""

        def find() -> dict[str, int]:
            self.fs.invalidate_cache()  # fsspec may keep listings, and other machines write here
            place = f"{self.root}/{prefix}".rstrip("/")
            try:
                found = self.fs.find(place, detail=True)
            except FileNotFoundError:
                return {}
            start = len(self.root) + 1
            return {path[start:]: info["size"] for path, info in found.items() if info["type"] == "file"}

        return self._call("list", prefix, find)

    def stat(self, name: str) -> int | None:
        """The size of an object in bytes, as the store says now; None when there is none."""

        def stat() -> int | None:
            self.fs.invalidate_cache(self.fs._parent(self._path(name)))
            try:
                info = self.fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

        return self._call("stat", name, stat)

    def delete(self, name: str) -> None:
        """Removes an object; one that is not there is no error."""

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name))

        self._call("delete", name, delete)

    def delete_directory(self, name: str) -> None:
        """Removes a directory that has become empty, where the filesystem keeps such things. Best effort."""
        with contextlib.suppress(OSError, NotImplementedError):
            self.fs.rmdir(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        if size_bytes <= _SMALL_BYTES or isinstance(self.fs, MemoryFileSystem):  # memory: open() publishes at once
            self.fs.pipe_file(path, b"".join(chunks))
            return
        file = self.fs.open(path, "wb", block_size=_BLOCK_BYTES)
        try:
            for chunk in chunks:
                file.write(chunk)
        except BaseException:
            _abandon(file)
            raise
        file.close()

    def _call(self, operation: str, name: str, function: Callable[[], T], size_bytes: int = 0) -> T:
        """Runs a storage call: deadline, retries, and errors in our own words."""
        limit_seconds = self.deadline_seconds + size_bytes / _SLOWEST_BYTES_PER_SECOND
        where = f"{operation} {self.url}/{name}".rstrip("/")

        def attempt() -> T:
            try:
                return _within(limit_seconds, function)
            except (HarnessError, FileNotFoundError):
                raise
            except Exception as error:
                if not _is_of_storage(error):
                    raise
                raise StoreError(f"{where}: {_in_words(error)}", transient=_is_transient(error)) from error

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10),
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, StoreError) and error.transient),
            reraise=True,
        )
        return retrying(attempt)


class _LocalStore(Store):
    """A local filesystem, where ``put`` needs care of its own."""

    def _put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        directory = os.path.dirname(path)
        _make_durable_directory(directory)
        partial = f"{directory}/.{os.path.basename(path)}.{secrets.token_hex(4)}.partial"
        try:
            with open(partial, "wb", buffering=0) as file:
                for chunk in chunks:
                    _write_all(file, chunk)
                os.fsync(file.fileno())  # ext4 accepts more than the disk holds, and says so only here
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        _fsync_directory(directory)


def open_store(
    url: str, storage_options: Mapping[str, Any] | None = None, *, attempts: int = 5, deadline_seconds: float = 60
) -> Store:
    """The store at a URL: ``s3://bucket/run``, ``memory://run``, a local path, anything that fsspec knows.

    ``storage_options`` go to the filesystem as they are (``key``, ``endpoint_url``, …). Raises ``ConfigError`` when there is
    no such filesystem or its package is not installed.
    """
    try:
        fs, root = fsspec.core.url_to_fs(url, **(storage_options or {}))
    except (ValueError, ImportError, TypeError) as error:
        raise ConfigError(f"{shown(url)}: {error}") from None
    kind = _LocalStore if isinstance(fs, LocalFileSystem) else Store
    return kind(fs, root, shown(url), attempts, deadline_seconds)


def shown(url: str) -> str:
    """A URL as it may be shown: without user name, password and query, where secrets can stand."""
    scheme, separator, rest = url.rpartition("://")
    if not separator:
        return url.rstrip("/")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}".rstrip("/")


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of a call, or ``TimeoutError``. A call that hangs is left behind in a daemon thread: it cannot be
    cancelled, and what it may still write is an object under a name that nobody refers to."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:  # handed to the caller below, whatever it is
            failure.append(error)

    thread = threading.Thread(target=run, name="harness-store", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if failure:
        raise failure[0]
    return result[0]


def _abandon(file: Any) -> None:
    """Gives a half-written object up. Closing it would publish what has been written so far, and so would its finalizer."""
    if not isinstance(file, AbstractBufferedFile):
        file.close()
        return
    with contextlib.suppress(Exception):  # the upload is lost already; what matters is the exception that is under way
        file.discard()
    file.closed = True


def _write_all(file: Any, chunk: Buffer) -> None:
    view = memoryview(chunk)
    while len(view):  # a raw write may be short
        view = view[file.write(view) :]


def _make_durable_directory(path: str) -> None:
    """Makes a directory and those above it, each with its name on the disk."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_durable_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _fsync_directory(parent)


def _fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_of_storage(error: Exception) -> bool:
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | asyncio.TimeoutError) or package in _BACKEND_PACKAGES


def _is_transient(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _PERMANENT
    return type(error).__name__ not in _PERMANENT_NAMES


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".rstrip(": ")
