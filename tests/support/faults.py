"""Storage that fails on purpose, for the proofs by enumeration.

``Life`` is a run that only saves: it claims an attempt, resumes and commits as the training loop does, without training.
What it holds at a step follows from the step alone, so that every byte that comes back can be judged.

``SystemCalls`` stands in for ``os`` and ``open`` where harness and fsspec touch a local disk, and has a say in each call:
it can write calls down, refuse them, or stop the program at one of them.

``Disk`` says what a power cut leaves of the calls that were made. It is as strict as POSIX, which promises less than ext4
and xfs keep: what was written to a file is safe once the file was fsynced, a name (made, renamed or removed) once its
directory was, and of everything else any part may be there.

``Objects`` is a store that is a dictionary. ``Bucket`` is an object store as fsspec sees one: whole objects, uploads in
parts, and requests that get lost on the way there or back. ``Flawed`` is a filesystem whose files can come back altered.
"""

import builtins
import contextlib
import fcntl
import functools
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem

import harness.storage.filesystem
from harness.checkpoint import commit
from harness.checkpoint.boxes import Box
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import MANIFEST
from harness.checkpoint.frozen import IsFrozen, nothing_is_frozen, sharded_worth_it
from harness.checkpoint.plan import Writers
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Parts, Saved, Saver, SaveRequest
from harness.checkpoint.sharding import Key, Sharding
from harness.checkpoint.tree import Encoded, Placed
from harness.distributed.world import SoloWorld
from harness.state.sharded import ShardedState
from harness.storage import direct_io
from harness.storage.store import Store
from harness.training import resume

Tree = Mapping[str, bytes]  # what lies on a disk or in a bucket: the objects' names and their bytes


# --- a run -----------------------------------------------------------------------------------------------------------


SIDE = 4  # of the largest tensors, which are squares
FROZEN_STEPS = 0  # so long stays one of the parameters that nothing trains as it is, another one for ever; 0: there are none


def parts_at(step: int) -> dict[str, dict[str, Any]]:
    """What a run holds at a step: several shards in two of its parts, tied and empty tensors, a part without tensors."""
    weight = torch.arange(SIDE**2, dtype=torch.float32).reshape(SIDE, SIDE) * 0.1 + step
    frozen = {"base": torch.full((16,), float(step // FROZEN_STEPS)), "still": torch.arange(16.0)} if FROZEN_STEPS else {}
    return {
        "model": {
            **frozen,
            "weight": weight,
            "tied": weight,
            "half": torch.full((3,), step, dtype=torch.bfloat16),
            "none": weight[:0],
        },
        "optimizer": {"state": {"weight": {"exp_avg": weight / 7, "step": torch.tensor(float(step))}}, "lr": 1 / (step + 1)},
        "training": {"loss": 1 / (step + 3), "scheduler": None},
        "random": {"0": {}, "1": {}},
    }


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are the same, bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        alike = type(one) is type(other) and one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


class Restored:
    """Takes what ``harness.training.resume`` puts into a training state."""

    device = torch.device("cpu")
    sharded = ShardedState({}, {})  # nothing is
    step: int | None = None
    parts: Mapping[str, Any] | None = None

    def restore(self, parts: Mapping[str, Any], step: int, rank: int, epoch: int, **_: Any) -> None:
        self.parts, self.step = parts, step

    @property
    def exact(self) -> bool:
        """Whether it is, bit for bit, what the run held at that step."""
        assert self.parts is not None and self.step is not None, "nothing was restored"
        return same(self.parts, parts_at(self.step)) and self.parts["model"]["tied"] is self.parts["model"]["weight"]


class _World(SoloWorld):
    """One process that says that it is of seven, as no checkpoint is here: the random states stay as they are."""

    size = 7


def resume_from(store: Store) -> tuple[resume.Resumed, Restored]:
    """Resumes as a training run does, with the same fallbacks, in one process."""
    restored = Restored()
    state: Any = restored
    return resume.resume(_World(Restored.device), Catalog(store), state), restored


class Life:
    """One start of a run: claims an attempt and resumes when it is made, saves when it is told to."""

    def __init__(self, store: Store, *, keep_last: int | None = 1, failures_allowed: int = 0, shard_bytes: int = 64) -> None:
        self.catalog = Catalog(store)
        self.attempt = self.catalog.attempts.claim({})
        resumed, self.restored = resume_from(store)
        self.saver = Saver(
            catalog=self.catalog,
            attempt=self.attempt,
            lineage=resumed.lineage,
            retention=Retention(keep_last),
            shard_bytes=shard_bytes,
            failures_allowed=failures_allowed,
        )

    def save(self, step: int, *, must_succeed: bool = True) -> Saved | None:
        parts = parts_at(step)
        request = SaveRequest(step, {"world_size": 2}, is_frozen=frozen_of(parts))
        return self.saver.save(parts, request, must_succeed=must_succeed)


def frozen_of(parts: Mapping[str, Any]) -> IsFrozen:
    """Tells the parameters that nothing trains."""
    places = {each.data_ptr() for name, each in parts["model"].items() if name in ("base", "still")}
    return (lambda tensor: tensor.data_ptr() in places) if places else nothing_is_frozen


def sharded_frozen_of(parts: Mapping[str, Encoded]) -> IsFrozen:
    """The same of a rank's part of a sharded state."""
    return frozen_of({"model": parts["model"].tensors})


class Pair(Life):
    """Two ranks that write together, in one thread: the second one writes its share when the first has written its own, and
    waits. With ``SMALL_BLOCK_BYTES``, tensors lie in pieces."""

    SMALL_BLOCK_BYTES: ClassVar = 32

    def __init__(self, store: Store, second: Store, **options: Any) -> None:
        super().__init__(store, **options)
        self.saver.writers = Writers((0, 1), 0)
        self.second = replace(self.saver, catalog=Catalog(second), writers=Writers((0, 1), 1))

    def save(self, step: int, *, must_succeed: bool = True) -> Saved | None:
        directory = self.saver.new_directory(step)
        parts = self.parts(step, 0)
        second = self.parts(step, 1) if self.sharding else parts
        is_frozen = nothing_is_frozen if self.sharding else frozen_of(parts)
        request = SaveRequest(
            step,
            {"world_size": 2},
            directory=directory,
            is_steady=lambda tensor: not is_frozen(tensor),
            sharding=self.sharding,
            is_frozen=is_frozen,
            frozen=self.frozen(parts, second),
            base=self.saver.base(),
        )

        def share(_seconds: float) -> None:
            self.second.save(second, request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "time", SimpleNamespace(monotonic=time.monotonic, sleep=share))
            return self.saver.save(parts, request, must_succeed=must_succeed)

    @property
    def sharding(self) -> Sharding | None:
        """Which rank has what."""
        return None

    def frozen(self, *_parts: Any) -> frozenset[Key]:
        """The sharded tensors that are frozen on both ranks."""
        return frozenset()

    def parts(self, step: int, _rank: int) -> Parts:
        """What a rank has."""
        return parts_at(step)


class ShardedPair(Pair):
    """The same of a sharded state: each rank has some rows or columns of the tensors that have a place for both."""

    BOXES: ClassVar = {
        ("model", "weight"): (Box((0, 0), (1, 4)), Box((1, 0), (3, 4))),
        ("model", "half"): (Box((0,), (2,)), Box((2,), (1,))),
        ("optimizer", "state/weight/exp_avg"): (Box((0, 0), (4, 3)), Box((0, 3), (4, 1))),
    }
    FROZEN: ClassVar = {("model", name): (Box((0,), (10,)), Box((10,), (6,))) for name in ("base", "still")}

    @property
    def boxes(self) -> Mapping[Key, tuple[Box, Box]]:
        return {**self.BOXES, **(self.FROZEN if FROZEN_STEPS else {})}

    @property
    def sharding(self) -> Sharding:
        found = {key: {box: (rank,) for rank, box in enumerate(boxes)} for key, boxes in self.boxes.items()}
        return Sharding(found, frozenset({("model", "tied", "weight")}), ("first", "second"))

    def frozen(self, *parts: Mapping[str, Encoded]) -> frozenset[Key]:
        savers = zip((self.saver, self.second), parts, strict=True)
        among = [saver.frozen.sharded_among(own, sharded_frozen_of(own)) for saver, own in savers]
        return sharded_worth_it(frozenset.intersection(*among), parts[0], self.sharding)

    def parts(self, step: int, rank: int) -> Parts:
        encoded = commit.encode(parts_at(step))
        for (name, path), boxes in self.boxes.items():
            part, box = encoded[name], boxes[rank]
            shape = tuple(part.tensors[path].shape)
            part.placed[path] = Placed(shape, box)
            part.tensors[path] = part.tensors[path][box.within(Box.whole(shape))].clone()
        return encoded


def committed_step(name: str) -> int | None:
    """The step whose manifest an object is; None for any other object."""
    directory, _, file = name.rpartition("/")
    return int(directory.split("-")[1]) if file == MANIFEST else None


@dataclass(frozen=True)
class Mark:
    """A remark between two calls: from here on, the newest checkpoint must be one of these (None: there is none)."""

    allowed: tuple[int | None, ...]
    verb: str


@dataclass
class Witness:
    """Believes what a store says: once the manifest's ``put`` has returned, that checkpoint is the newest; once it was
    called, it may be."""

    allowed: tuple[int | None, ...] = (None,)
    now: Mark = Mark((None,), "claim")

    def watch(self, store: Store) -> Store:
        put, delete = store.put, store.delete

        def watched_put(name: str, *arguments: Any) -> None:
            if (step := committed_step(name)) is None:
                self.remark("claim" if name.startswith("attempts/") else "save")
                put(name, *arguments)
                return
            self.allowed = (*self.allowed, step)
            self.remark("commit")
            put(name, *arguments)
            self.allowed = (step,)
            self.remark("prune")

        def watched_delete(name: str) -> None:
            self.remark("prune")
            delete(name)

        vars(store).update(put=watched_put, delete=watched_delete)
        return store

    def remark(self, verb: str) -> None:
        self.now = Mark(self.allowed, verb)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Thousands of refusals are told of as loudly as they should be; nobody needs to read them."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# --- a local disk ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The program dies here: nothing that it would still do is done."""


@dataclass(frozen=True)
class Call:
    """A system call. ``handle`` numbers the open files: a name may go to another file while one is open."""

    name: str
    path: str = ""
    target: str = ""
    handle: int = 0
    data: bytes = b""
    creates: bool = False

    @property
    def changes(self) -> bool:
        """Whether it changes what is on the disk, what a power cut leaves there, or how the next bytes get there."""
        return self.name in {"write", "fsync", "fcntl", "rename", "unlink", "mkdir", "rmdir"} or (
            self.name == "open" and self.creates
        )


Hook = Callable[[Call, Callable[[], Any]], Any]


class SystemCalls:
    """What ``os`` and ``open`` are for the modules that touch a local disk; each call goes through ``hook``."""

    _HARMLESS: ClassVar = {
        "path", "sep", "fspath", "close", "getpid", "getcwd", "stat_result", "DirEntry", "PathLike", "SEEK_SET",
    }  # fmt: skip

    def __init__(self, hook: Hook) -> None:
        # What earlier tests have left running, and what that starts.
        self.strangers = {*threading.enumerate()} - {threading.current_thread()}

        def own(call: Call, perform: Callable[[], Any]) -> Any:
            return perform() if threading.current_thread() in self.strangers else hook(call, perform)

        self.hook = own
        self.handles: dict[int, int] = {}  # by file descriptor
        self.numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        if name in self._HARMLESS or name.startswith("O_"):
            return getattr(os, name)
        raise AssertionError(f"os.{name}: the storage uses a call that these proofs do not know")

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC), "written through open() so far"
        handle = next(self.numbers)
        descriptor = self.hook(Call("open", path, handle=handle), lambda: os.open(path, flags, mode))
        self.handles[descriptor] = handle
        return descriptor

    def open_file(self, path: str, mode: str = "r", buffering: int = -1, **options: Any) -> "_File":
        writes = mode != "rb"
        assert not writes or (mode == "wb" and buffering == 0), "what a buffer still holds is invisible here"
        handle = next(self.numbers)
        call = Call("open", path, handle=handle, creates=writes)
        file = self.hook(call, lambda: builtins.open(path, mode, buffering, **options))  # noqa: SIM115
        self.handles[file.fileno()] = handle
        return _File(self, file, handle)

    def fcntl(self, descriptor: int, command: int, *flags: int) -> int:
        """Of its arguments only ``O_DIRECT`` is looked at: whether the next writes go past the page cache."""
        if command == fcntl.F_GETFL:
            return fcntl.fcntl(descriptor, command)
        how = "O_DIRECT" if flags[0] & os.O_DIRECT else ""
        call = Call("fcntl", target=how, handle=self.handles[descriptor])
        return self.hook(call, lambda: fcntl.fcntl(descriptor, command, *flags))

    def fsync(self, descriptor: int) -> None:
        # The model decides what is safe. The machine that runs the tests is not going to lose its power.
        self.hook(Call("fsync", handle=self.handles[descriptor]), lambda: os.fstat(descriptor))

    def replace(self, path: str, target: str) -> None:
        self.hook(Call("rename", path, target), lambda: os.replace(path, target))

    rename = replace

    def remove(self, path: str) -> None:
        self.hook(Call("unlink", path), lambda: os.unlink(path))

    unlink = remove

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        self.hook(Call("mkdir", path), lambda: os.mkdir(path, mode))

    def rmdir(self, path: str) -> None:
        self.hook(Call("rmdir", path), lambda: os.rmdir(path))

    def stat(self, path: str, **options: Any) -> os.stat_result:
        return self.hook(Call("stat", path), lambda: os.stat(path, **options))

    def scandir(self, path: str) -> Any:
        return self.hook(Call("scandir", path), lambda: os.scandir(path))


class _File:
    """An open file, of which reads and writes are calls too."""

    def __init__(self, calls: SystemCalls, file: Any, handle: int) -> None:
        self._calls, self._file, self._handle = calls, file, handle

    def write(self, data: Any) -> int:
        call = Call("write", handle=self._handle, data=bytes(data))
        return self._calls.hook(call, lambda: self._file.write(data))

    def read(self, *size: int) -> bytes:
        return self._calls.hook(Call("read", handle=self._handle), lambda: self._file.read(*size))

    def readinto(self, buffer: Any) -> int:
        return self._calls.hook(Call("read", handle=self._handle), lambda: self._file.readinto(buffer))

    def __getattr__(self, name: str) -> Any:
        assert name not in {"truncate", "writelines", "readinto1", "read1", "readline"}, f"{name}: not known to these proofs"
        return getattr(self._file, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextlib.contextmanager
def system_calls_through(hook: Hook) -> Iterator[None]:
    """Everything that harness and fsspec do to a local disk goes through ``hook``."""
    calls, start = SystemCalls(hook), threading.Thread.start

    def starting(thread: threading.Thread) -> None:
        if threading.current_thread() in calls.strangers:
            calls.strangers.add(thread)
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", starting)
        for module in (harness.storage.filesystem, direct_io, fsspec.implementations.local):
            patch.setattr(module, "os", calls)
            patch.setattr(module, "open", calls.open_file, raising=False)
        patch.setattr(direct_io, "fcntl", SimpleNamespace(**{**vars(fcntl), "fcntl": calls.fcntl}))
        yield


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Tries a failed call again at once."""

    class _Time:
        sleep = staticmethod(lambda seconds: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tenacity.nap.time", _Time)
        yield


@dataclass
class _Inode:
    """A file or a directory; what is in it now, and what of it is safe."""

    content: bytes = b""
    safe_content: bytes = b""
    names: dict[str, int] = field(default_factory=dict)
    safe_names: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)  # changes of names that are not safe yet, in order


class Disk:
    """The files below a directory that is itself safe: what the programs see, and what a power cut may leave."""

    ALL_SUBSETS = 10  # of so many changes of names that are not safe, every subset is tried; of more, the likeliest

    def __init__(self, root: str) -> None:
        self.root = root
        self.inodes = [_Inode()]
        self.is_file = [False]
        self.handles: dict[int, int] = {}

    def apply(self, call: Call) -> None:
        """Does to the model what the call has done to the disk."""
        match call.name:
            case "open":
                if call.creates:
                    directory, name = self._place(call.path)
                    if name in directory.names:
                        self.inodes[directory.names[name]].content = b""
                    else:
                        self._change(directory, {name: self._new(is_file=True)})
                if f"{call.path}/".startswith(f"{self.root}/"):  # what lies above is safe
                    self.handles[call.handle] = self._find(call.path)
            case "write":
                self.inodes[self.handles[call.handle]].content += call.data  # files are only ever appended to
            case "fsync" if call.handle in self.handles:
                inode = self.inodes[self.handles[call.handle]]
                inode.safe_content, inode.safe_names, inode.pending = inode.content, dict(inode.names), []
            case "mkdir":
                directory, name = self._place(call.path)
                self._change(directory, {name: self._new(is_file=False)})
            case "rename":
                directory, name = self._place(call.path)
                target, new_name = self._place(call.target)
                assert directory is target, "a rename between two directories is not modelled"
                self._change(directory, {new_name: directory.names[name], name: None})
            case "unlink" | "rmdir":
                directory, name = self._place(call.path)
                self._change(directory, {name: None})

    def now(self, torn: Call | None = None, length: int = 0) -> Tree:
        """What a program sees that starts now, after the one before was killed (within the write ``torn``)."""
        with self._torn(torn, length):
            return self._tree(0, lambda number: self.inodes[number].names, {})

    def after_power_cut(self, torn: Call | None = None, length: int = 0) -> Iterator[Tree]:
        """Every disk that a power cut may leave."""
        with self._torn(torn, length):
            reachable = self._reachable()
            changes = [(number, index) for number in reachable for index in range(len(self.inodes[number].pending))]
            unsafe = [number for number in reachable if self.inodes[number].content != self.inodes[number].safe_content]
            for contents, chosen in itertools.product(self._contents(unsafe), self._subsets(changes)):
                yield self._tree(0, functools.partial(self._names, chosen=chosen), contents)

    def _new(self, *, is_file: bool) -> int:
        self.inodes.append(_Inode())
        self.is_file.append(is_file)
        return len(self.inodes) - 1

    def _find(self, path: str) -> int:
        number = 0
        for name in path.removeprefix(self.root).strip("/").split("/"):
            number = self.inodes[number].names[name] if name else number
        return number

    def _place(self, path: str) -> tuple[_Inode, str]:
        parent, _, name = path.rpartition("/")
        return self.inodes[self._find(parent)], name

    @staticmethod
    def _change(directory: _Inode, change: dict[str, int | None]) -> None:
        names = {**directory.names, **change}
        directory.names = {name: number for name, number in names.items() if number is not None}
        directory.pending.append(change)

    @contextlib.contextmanager
    def _torn(self, call: Call | None, length: int) -> Iterator[None]:
        if call is None:
            yield
            return
        inode = self.inodes[self.handles[call.handle]]
        before = inode.content
        inode.content += call.data[:length]
        yield
        inode.content = before

    def _reachable(self) -> list[int]:
        """The inodes that have a name, or may have one after a power cut."""
        found, new = {0}, [0]
        while new:
            inode = self.inodes[new.pop()]
            names = {*inode.safe_names.values()}
            names |= {number for change in inode.pending for number in change.values() if number is not None}
            new += names - found
            found |= names
        return sorted(found)

    def _contents(self, unsafe: list[int]) -> Iterator[dict[int, bytes]]:
        """What may be in the files that were not fsynced: all of them alike, and each one for itself."""
        if not unsafe:
            yield {}
            return
        fates = {number: self._fates(self.inodes[number]) for number in unsafe}
        for alike in zip(*fates.values(), strict=True):
            yield dict(zip(unsafe, alike, strict=True))
        for number in unsafe if len(unsafe) > 1 else ():
            kept = {other: self.inodes[other].content for other in unsafe}
            lost = {other: self.inodes[other].safe_content for other in unsafe}
            yield kept | {number: lost[number]}
            yield lost | {number: kept[number]}

    @staticmethod
    def _fates(inode: _Inode) -> list[bytes]:
        """Kept, lost, cut at several places, and as long as it was but never written (zeros)."""
        safe, content = len(inode.safe_content), inode.content
        if not content.startswith(inode.safe_content):  # it was emptied
            return [content, inode.safe_content, b"", b"", b"", b""]
        cuts = [safe + 1, (safe + len(content)) // 2, len(content) - 1]
        zeros = inode.safe_content + bytes(len(content) - safe)
        return [content, inode.safe_content, *(content[:cut] for cut in cuts), zeros]

    def _subsets(self, changes: list[tuple[int, int]]) -> Iterator[set[tuple[int, int]]]:
        if len(changes) <= self.ALL_SUBSETS:
            for bits in itertools.product((True, False), repeat=len(changes)):
                yield set(itertools.compress(changes, bits))
            return
        for index in range(len(changes) + 1):
            yield set(changes[:index])
            yield set(changes[index : index + 1])
            yield {*changes[:index], *changes[index + 1 :]}

    def _names(self, number: int, chosen: set[tuple[int, int]]) -> dict[str, int]:
        """What is in a directory when of its changes only those that were chosen have reached the disk."""
        names: dict[str, int | None] = dict(self.inodes[number].safe_names)
        for index, change in enumerate(self.inodes[number].pending):
            if (number, index) in chosen:
                names |= change
        return {name: child for name, child in names.items() if child is not None}

    def _tree(
        self, number: int, names: Callable[[int], dict[str, int]], contents: Mapping[int, bytes], prefix: str = ""
    ) -> dict[str, bytes]:
        tree = {}
        for name, child in names(number).items():
            if self.is_file[child]:
                tree[prefix + name] = contents.get(child, self.inodes[child].content)
            else:
                tree |= self._tree(child, names, contents, f"{prefix}{name}/")
        return tree


def below(tree: Tree, directory: str) -> Tree:
    """The part of a tree that lies in a directory."""
    start = f"{directory}/"
    return {name.removeprefix(start): data for name, data in tree.items() if name.startswith(start)}


def write_tree(tree: Tree, directory: str) -> None:
    """Lays files out in a real directory."""
    for name, data in tree.items():
        os.makedirs(os.path.dirname(f"{directory}/{name}"), exist_ok=True)
        with builtins.open(f"{directory}/{name}", "wb") as file:
            file.write(data)


# --- stores ----------------------------------------------------------------------------------------------------------


class Objects(Store):
    """A store that is a dictionary, without threads and deadlines. ``before`` is told of every call and may raise."""

    streams, shard_bytes, retries = 1, 128 << 20, 0
    is_local, has_ranges, deletes_many = False, False, False

    def __init__(self, objects: Tree, before: Callable[[str, str], None] = lambda operation, name: None) -> None:
        self.objects = objects if isinstance(objects, dict) else dict(objects)
        self.before = before
        self.url = "objects://run"

    def put(self, name: str, chunks: Callable[[], Iterable[Any]], size_bytes: int) -> None:
        data = b"".join(chunks())
        assert len(data) == size_bytes, "the size is known before the upload"
        self.before("put", name)
        self.objects[name] = data

    def get(self, name: str, limit_bytes: int) -> bytes | None:
        self.before("get", name)
        return self.objects[name][:limit_bytes] if name in self.objects else None

    def read(self, name: str, consume: Callable[[Any], Any], size_bytes: int) -> Any:
        self.before("read", name)
        if name not in self.objects:
            raise FileNotFoundError(name)
        return consume(io.BytesIO(self.objects[name]))

    def read_range(self, name: str, start: int, size_bytes: int) -> bytes:
        return self.read(name, lambda file: file.read()[start : start + size_bytes], size_bytes)

    def names(self, directory: str = "", *, beginning: str = "") -> list[str]:
        self.before("list", directory)
        start = f"{directory}/" if directory else ""
        return [
            *{name.removeprefix(start).partition("/")[0] for name in [*self.objects] if name.startswith(start + beginning)}
        ]

    def list(self, prefix: str = "", **how: Any) -> dict[str, int]:
        self.before("list", prefix)
        start = f"{prefix}/" if prefix else ""
        return {name: len(data) for name, data in list(self.objects.items()) if name.startswith(start)}

    def stat(self, name: str) -> int | None:
        self.before("stat", name)
        return len(self.objects[name]) if name in self.objects else None

    def delete(self, name: str) -> None:
        self.before("delete", name)
        self.objects.pop(name, None)

    def is_link(self, name: str) -> bool:
        return False

    def delete_directory(self, name: str) -> None:
        pass


@dataclass
class Contents:
    """What is in a bucket, and who may have a say in what is done to it."""

    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[int, list[bytes]] = field(default_factory=dict)  # begun, and neither completed nor aborted
    request: Callable[[str, Callable[[], Any]], Any] = lambda what, perform: perform()
    numbers: Iterator[int] = field(default_factory=itertools.count)


class Bucket(fsspec.AbstractFileSystem):
    """An object store. Objects appear whole: by one request, or when an upload in parts is completed.

    ``contents.request`` performs each request that changes something, and may raise before or after that.
    """

    protocol = "bucket"
    cachable = False

    def __init__(self, contents: Contents, **options: Any) -> None:
        super().__init__(**options)
        self.contents = contents
        self.objects = contents.objects

    def request(self, what: str, perform: Callable[[], Any]) -> None:
        self.contents.request(what, perform)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self.request(f"PUT {path}", lambda: self.objects.__setitem__(path, bytes(value)))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(name.startswith(f"{path}/") for name in [*self.objects]):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        start = f"{path}/"
        if not any(name.startswith(start) for name in [*self.objects]):
            raise FileNotFoundError(path)
        children = {start + name.removeprefix(start).partition("/")[0] for name in [*self.objects] if name.startswith(start)}
        return [self.info(child) if detail else child for child in sorted(children)]

    def rm_file(self, path: str) -> None:
        if path not in self.objects:
            raise FileNotFoundError(path)
        self.request(f"DELETE {path}", lambda: self.objects.pop(path))

    def _open(self, path: str, mode: str = "rb", block_size: int = 1 << 20, **options: Any) -> Any:
        if mode == "rb":
            return io.BytesIO(self.cat_file(path))
        return _Upload(self, path, mode, block_size=block_size, **options)


fsspec.register_implementation("bucket", Bucket)


class _Upload(AbstractBufferedFile):
    """An upload in parts, as fsspec's object stores do it."""

    def _initiate_upload(self) -> None:
        self.number = next(self.fs.contents.numbers)
        self.parts: list[bytes] = []
        self.fs.request(f"BEGIN {self.path}", lambda: self.fs.contents.uploads.__setitem__(self.number, self.parts))

    def _upload_chunk(self, final: bool = False) -> bool:
        data = self.buffer.getvalue()
        if data:
            self.fs.request(f"PART {self.path}", lambda: self.parts.append(data))
        if final:
            self.fs.request(f"COMPLETE {self.path}", self._complete)
        return True

    def _complete(self) -> None:
        self.fs.objects[self.path] = b"".join(self.fs.contents.uploads.pop(self.number))

    def discard(self) -> None:
        self.fs.request(f"ABORT {self.path}", lambda: self.fs.contents.uploads.pop(self.number, None))


# --- files that fail while they are read -----------------------------------------------------------------------------

Flaw = Callable[[str, bytes], bytes]


class Flawed(AbstractFileSystem):
    """Local files, and what becomes of those of step 6 when they are read."""

    protocol = "flawed"
    flaw: Flaw = staticmethod(lambda path, data: data)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return LocalFileSystem().ls(path, detail)

    def info(self, path: str, **kwargs: Any) -> Any:
        return LocalFileSystem().info(path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).write_bytes(value)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        data = Path(path).read_bytes()
        is_flawed = "step-000000000006" in path and path.endswith(".safetensors")
        return io.BytesIO(Flawed.flaw(path, data) if is_flawed else data)


fsspec.register_implementation("flawed", Flawed, clobber=True)
