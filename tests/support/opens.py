"""Which files of a folder are opened, whoever does it: the kernel tells (inotify), on all hosts that share the disk."""

import contextlib
import ctypes
import fnmatch
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_OPEN, _CREATE, _IS_DIRECTORY = 0x20, 0x100, 0x40000000  # linux/inotify.h
_EVENT = struct.Struct("iIII")  # watch, what, a number, the size of the name that follows
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def opens(folder: Path, pattern: str) -> Iterator[list[Path]]:
    """The files of a folder, and of those in it, that match a pattern, each time that one is opened; of new folders, too."""
    found: list[Path] = []
    watched: dict[int, Path] = {}
    queue, over = _libc.inotify_init1(os.O_CLOEXEC), threading.Event()

    def watch(each: Path) -> None:
        if (number := _libc.inotify_add_watch(queue, os.fsencode(each), _OPEN | _CREATE)) >= 0:  # else it is gone again
            watched[number] = each

    def follow() -> None:
        while not over.is_set():
            events = os.read(queue, 1 << 16)
            while events:
                number, what, _, size = _EVENT.unpack_from(events)
                path = watched.get(number, folder) / os.fsdecode(events[_EVENT.size :][:size].rstrip(b"\0"))
                events = events[_EVENT.size + size :]
                if what & _CREATE and what & _IS_DIRECTORY:
                    watch(path)
                elif what & _OPEN and fnmatch.fnmatch(path.name, pattern):
                    found.append(path)

    for each in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        watch(each)
    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield found
    finally:
        over.set()
        os.listdir(folder)  # an event, with which it ends
        follower.join()
        os.close(queue)
