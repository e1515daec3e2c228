"""What a ``Store`` asks of a filesystem, one plain call each: no deadline, no second try. No torch.

Each kind does in its own way what ``harness.storage.store`` promises. Paths are whole; errors are the filesystem's own.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from stat import S_ISLNK
from typing import Any, BinaryIO, ClassVar, Self

from fsspec.archive import AbstractArchiveFileSystem
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

from harness.errors import ConfigError
from harness.runtime.threads import in_order
from harness.storage import direct_io
from harness.storage.direct_io import Buffer
from harness.storage.retries import check_awaited, lacks_directory, while_awaited

log = logging.getLogger(__name__)

SMALL_BYTES = 4 << 20  # an object up to this size is sent in one request
BLOCK_BYTES = 16 << 20  # larger ones are streamed in parts of this size
_S3_PART_BYTES = 8 << 20  # or, to S3, of this,
_S3_PARTS_AT_ONCE = 2  # so many of an object at once: there are several objects, and with 4 all of them came later
_S3_MOST_PARTS = 10_000  # that S3 takes for an object
_S3 = {"s3", "s3a"}
_RANGED = {*_S3, "gs", "gcs", "abfs", "az"}
_NAMELESS = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS}  # says fsync of a directory where a filesystem has no such thing
_NOT_OURS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL}  # where directories cannot be fsynced, we made none


class Filesystem:
    """A filesystem of fsspec, and a place in it. ``kind_of`` says which kind is for which."""

    streams: ClassVar[int] = 8
    shard_bytes: ClassVar[int] = 128 << 20
    is_local: ClassVar[bool] = False
    has_ranges: ClassVar[bool] = False  # that can be read several at a time, each by a request of its own
    has_directories: ClassVar[bool] = False  # of its own, which somebody has to make and may remove
    deletes_many: ClassVar[bool] = False  # objects in one request
    keeps_names = True  # whether the name of a file is on the disk when its directory was flushed; found out at a put

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = url  # without credentials: it is shown to people

    def at(self, root: str, url: str) -> Self:
        """The same, at another place. Only these arguments reach it: a new setting has to be passed on here."""
        return type(self)(self.fs, root, url)

    def another(self) -> AbstractFileSystem:
        """A filesystem like ``fs``, with connections of its own."""
        fs = self.fs
        return type(fs)(*fs.storage_args, **{**fs.storage_options, "skip_instance_cache": True})

    def path(self, name: str) -> str:
        """Where an object lies."""
        return f"{self.root}/{name}" if name else self.root

    def open(self, path: str) -> Any:
        """A file, to be read from beginning to end."""
        return self.fs.open(path, "rb", block_size=BLOCK_BYTES)

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        """Reads ``size_bytes`` from ``start`` on; fewer at the end of the file."""
        with self.open(path) as file:
            file.seek(start)
            return bytes(file.read(size_bytes))

    def send(self, path: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        """Puts what ``chunks`` yields, as long as somebody waits for the call."""
        self.put(path, while_awaited(chunks()), size_bytes)

    def put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        """Publishes a file whole or not at all; it is durable when this returns."""
        if size_bytes <= SMALL_BYTES or isinstance(self.fs, MemoryFileSystem):  # memory: open() publishes at once
            self.fs.pipe_file(path, b"".join(chunks))
            return
        try:
            file = self.fs.open(path, "wb", block_size=BLOCK_BYTES)
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
                    self.remove(path)
            raise

    def size_of(self, info: Mapping[str, Any]) -> int:
        """The size of a file that was listed: some listings have none, and the file itself has to be asked."""
        size = info.get("size")
        if size is None and (size := self.fs.info(info["name"]).get("size")) is None:
            raise OSError(errno.ENOTSUP, "the storage does not report its size")
        return int(size)

    def names(self, path: str, beginning: str) -> Iterator[str]:
        """The paths of what lies directly in a directory and has a name that begins so."""
        start = f"{path}/{beginning}"
        return (found for each in self.fs.ls(path, detail=False) if (found := each.rstrip("/")).startswith(start))

    def is_link(self, path: str) -> bool:  # noqa: ARG002  # an object store has none
        """Whether a name leads to another place."""
        return False

    def remove(self, path: str) -> None:
        """Removes a file, or a link."""
        try:
            self.fs.rm_file(path)
        except NotImplementedError:
            self.fs.rm(path)

    def remove_many(self, paths: Sequence[str]) -> None:
        """Removes objects in one request; where ``deletes_many``."""
        raise NotImplementedError

    def remove_directories(self, paths: Iterable[str], first: str) -> None:
        """Removes directories with all that is in them; where ``is_local``."""
        raise NotImplementedError

    def remove_directory(self, path: str) -> None:
        """Removes an empty directory."""
        self.fs.rmdir(path)


class OtherFilesystem(Filesystem):
    """A filesystem of which nothing is known but what fsspec asks of all."""

    has_directories = True  # or nothing of that name is there to be taken away
    streams = 1  # a connection that is its only one may be at the other end

    def send(self, path: str, chunks: Callable[[], Iterable[Buffer]], size_bytes: int) -> None:
        if isinstance(self.fs, AbstractArchiveFileSystem):
            raise ConfigError(f"put {self.url}: an archive can only be read; choose another URL")
        try:
            super().send(path, chunks, size_bytes)
        except Exception as error:  # of any class
            if not lacks_directory(error):
                raise
            self.fs.makedirs(os.path.dirname(path), exist_ok=True)
            super().send(path, chunks, size_bytes)

    def remove_directory(self, path: str) -> None:
        if not self.fs.ls(path, detail=False):  # some remove what is in it, too
            self.fs.rmdir(path)


class RangedFilesystem(Filesystem):
    """An object store whose filesystem knows ranges, and can be called by several threads."""

    has_ranges = True

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
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


class S3Filesystem(RangedFilesystem):
    """S3, to which the parts of an object can be on their way at once: fsspec's own file sends one after the other."""

    deletes_many = True

    def names(self, path: str, beginning: str) -> Iterator[str]:
        """As ``Filesystem.names``; nothing else is listed, at 1,000 names in a request."""
        bucket, key, _ = self.fs.split_path(path)
        asked = {"Bucket": bucket, "Prefix": f"{key}/{beginning}" if key else beginning, "Delimiter": "/"}
        while True:
            page = self.fs.call_s3("list_objects_v2", **asked)
            yield from (f"{bucket}/{each['Prefix']}".rstrip("/") for each in page.get("CommonPrefixes", ()))
            yield from (f"{bucket}/{each['Key']}" for each in page.get("Contents", ()))
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def remove_many(self, paths: Sequence[str]) -> None:
        """Removes up to 1,000 objects in one request. Those that are not there are no error."""
        bucket = self.fs.split_path(paths[0])[0]
        keys = [{"Key": self.fs.split_path(path)[1]} for path in paths]
        errors = self.fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}).get("Errors")
        if errors:
            kind = PermissionError if errors[0].get("Code") == "AccessDenied" else OSError
            raise kind(f"{len(errors)} objects were not deleted, the first: {errors[0]}")

    def put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
        if size_bytes <= SMALL_BYTES:
            super().put(path, chunks, size_bytes)
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


class LocalDisk(Filesystem):
    """A local filesystem, where ``put`` needs care of its own."""

    is_local = True
    has_directories = True
    streams = 1  # a disk is fastest at one thing after the other
    shard_bytes = 1 << 30

    def __init__(self, fs: AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(fs, root, url)
        self._durable: set[str] = set()  # directories whose names are on the disk

    def is_link(self, path: str) -> bool:
        return os.path.islink(path)

    def remove_directory(self, path: str) -> None:
        super().remove_directory(path)
        self._durable.discard(path)

    def remove_directories(self, paths: Iterable[str], first: str) -> None:
        """Removes directories with all that is in them; in each, the file named ``first`` goes first. Of a link only the
        link goes."""
        for path in paths:
            if os.path.islink(path):
                self.remove(path)
            else:
                _remove_directory(path, first)
            self._durable.discard(path)

    def open(self, path: str) -> Any:
        return open(path, "rb")  # fsspec's file has layers; this one reads straight to where the bytes are to be

    def put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
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

        The process that made an existing one may have died, or seen an error, before its name was: the first time that
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
        flush = fsync_directory if exists else self._keep_names
        try:
            flush(parent)
        except OSError as error:
            if not exists or error.errno not in _NOT_OURS:
                raise
        self._durable.add(path)

    def _keep_names(self, directory: str) -> None:
        """Puts the names in a directory on the disk, where its filesystem can do that."""
        try:
            fsync_directory(directory)
        except OSError as error:
            if error.errno not in _NAMELESS:
                raise
            self.keeps_names = False
            _warn_of_names(self.root)


def _remove_directory(path: str, first: str = "") -> None:
    try:
        inside = sorted(os.scandir(path), key=lambda each: each.name != first)
    except FileNotFoundError:
        return
    for each in inside:
        if each.is_dir(follow_symlinks=False):
            _remove_directory(each.path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each.path)
    with contextlib.suppress(OSError):  # it does no harm where it is
        os.rmdir(path)


class SftpFilesystem(Filesystem):
    """SFTP, where others see a file while it is being written."""

    has_directories = True
    streams = 1  # one connection, whatever is asked of it
    shard_bytes = 1 << 30

    def is_link(self, path: str) -> bool:
        try:
            return S_ISLNK(self.fs.ftp.lstat(path).st_mode)
        except (AttributeError, FileNotFoundError):  # another library's filesystem, or nothing
            return False

    def remove(self, path: str) -> None:
        if hasattr(self.fs, "ftp"):
            self.fs.ftp.remove(path)  # of a link to a directory, fsspec would remove the directory
        else:
            super().remove(path)

    def open(self, path: str) -> Any:
        file = super().open(path)
        if hasattr(file, "prefetch"):  # paramiko, which waits for each 32 KiB otherwise
            file.prefetch(max_concurrent_requests=256)
        return file

    def read_range(self, path: str, start: int, size_bytes: int) -> bytes:
        with super().open(path) as file:
            file.seek(start)
            if hasattr(file, "prefetch"):
                file.prefetch(min(start + size_bytes, file.stat().st_size), max_concurrent_requests=256)
            return bytes(file.read(size_bytes))

    def put(self, path: str, chunks: Iterable[Buffer], size_bytes: int) -> None:
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


def kind_of(fs: AbstractFileSystem) -> type[Filesystem]:
    """What knows how to use a filesystem."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if isinstance(fs, LocalFileSystem):
        return LocalDisk
    if "sftp" in protocols:
        return SftpFilesystem
    if not _S3.isdisjoint(protocols) and hasattr(fs, "call_s3"):  # it is s3fs
        return S3Filesystem
    if not _RANGED.isdisjoint(protocols):
        return RangedFilesystem
    return Filesystem if isinstance(fs, MemoryFileSystem) else OtherFilesystem


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


def files_below(
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
            yield from files_below(fs, info["name"], follow=follow, is_behind_link=is_behind_link)
        elif info["type"] == "file" or not follow:
            yield info
        elif (target := _behind(fs, info["name"])) is not None and target["type"] == "file":
            yield target
        elif target is not None and target["type"] == "directory" and not is_behind_link:
            yield from files_below(fs, info["name"], is_behind_link=True)


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
        "%s: this file system cannot flush a directory (fsync); a power cut, or a crash of its server, may lose "
        "the newest checkpoints",
        root,
    )


def fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
