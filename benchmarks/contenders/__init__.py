"""Who takes part. An entry says what there is to know without importing anything; its class does the work.

``fsync``, ``checksum``, ``atomic`` and ``pickle`` are what the versions in ``requirements.txt`` do, by their source and by
what strace saw.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One contender."""

    name: str
    what: str
    place: str  # "file:Class" in this folder
    fsync: str  # of what it writes, before it says that it has finished
    checksum: str  # of what it reads
    atomic: str  # whether a crash at any moment leaves the old checkpoint or the new one
    pickle: str  # whether reading needs it
    s3: bool = False
    keeps_buffers: bool = False  # a first save leaves buffers that make the next ones faster
    restores_as: str = ""  # its checkpoints are those of another contender, and are read in the same way
    only_restores: bool = False  # its saves are those of another contender

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("harness")

    def make(self, url: str) -> Any:
        """A contender that keeps its checkpoints under a URL."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(f"contenders.{module}"), name)(url)


_TORCH = {"checksum": "written, not read", "pickle": "weights_only"}
_DCP = {"checksum": "written, not read", "pickle": "yes"}
_LAST = "metadata last"  # renamed into a fresh directory, whose own name is not fsynced

ENTRIES = [
    Entry(
        "harness", "Saver.begin, resume.resume", "ours:Harness", "files, directories", "yes", "yes", "no",
        keeps_buffers=True,
    ),
    Entry("torch.save", "into the file's place", "plain:TorchSave", "no", **_TORCH, atomic="no"),
    Entry(
        "torch.save, safe", "other name, fsync, rename, fsync of the directory", "plain:SafeTorchSave",
        "file, directory", **_TORCH, atomic="yes", restores_as="torch.save",
    ),
    Entry("torch.load mmap=True", "", "plain:MappedTorchLoad", "no", **_TORCH, atomic="no", only_restores=True),
    Entry("DCP save", "FileSystemWriter", "dcp:Save", "files", **_DCP, atomic=_LAST),
    Entry("DCP save, 2 threads", "thread_count=2", "dcp:TwoThreads", "files", **_DCP, atomic=_LAST, restores_as="DCP save"),
    Entry("DCP save, fsspec", "FsspecWriter", "dcp:Fsspec", "files", **_DCP, atomic=_LAST),
    Entry("DCP async, thread", "its defaults", "dcp:AsyncThread", "files", **_DCP, atomic=_LAST, restores_as="DCP save"),
    Entry(
        "DCP async, staged", "thread, kept buffers, staging beside the step", "dcp:AsyncStaged", "files", **_DCP,
        atomic=_LAST, keeps_buffers=True, restores_as="DCP save",
    ),
    Entry(
        "DCP async, process", "process, kept shared buffers, staging beside the step", "dcp:AsyncProcess", "files", **_DCP,
        atomic=_LAST, keeps_buffers=True, restores_as="DCP save",
    ),
    Entry("torchsnapshot take", "", "libraries:Snapshot", "no", "no", "metadata last", "for objects"),
    Entry(
        "torchsnapshot async_take", "", "libraries:AsyncSnapshot", "no", "no", "metadata last", "for objects",
        restores_as="torchsnapshot take",
    ),
    Entry("Lightning Fabric save", "", "libraries:Fabric", "no", **_TORCH, atomic="rename, unsynced"),
    Entry("Accelerate save_state", "", "libraries:Accelerate", "no", "no", "no", "weights_only"),
    Entry("harness on S3", "", "ours:Harness", "the server's", "yes", "yes", "no", s3=True, keeps_buffers=True),
    Entry(
        "s3fs and torch.save", "fsspec.open and torch.save", "objects:S3fs", "the server's", **_TORCH,
        atomic="not on an error", s3=True,
    ),
    Entry("DCP on s3fs", "FsspecWriter", "dcp:Fsspec", "the server's", **_DCP, atomic=_LAST, s3=True),
    Entry(
        "DCP on s3torchconnector", "S3StorageWriter", "objects:S3Connector", "the server's", **_DCP, atomic=_LAST, s3=True,
    ),
]  # fmt: skip
BY_NAME = {entry.name: entry for entry in ENTRIES}
