"""Writing a large file past the page cache.

A file that is written in the usual way costs the processor a copy of every byte and the kernel's search for free pages,
beside a training that would use the processor itself, and what it throws out of the cache is the training's data. With
``O_DIRECT`` the device fetches the bytes from our memory: on the machine of benchmarks/README.md a gigabyte took 0.04 s of
processor time and was on the disk after 0.5 s, against 0.3 to 2.4 s and 0.9 to 3.6 s. It asks for whole blocks from
aligned memory; chunks that are not like that are gathered in a buffer. Where the filesystem does not know it, the file is
written as usual.
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import Any

Buffer = bytes | bytearray | memoryview

BUFFER_BYTES = 2 << 20  # a multiple of every device's block, in the processor's cache; smaller files are not worth it
_PAGE_BYTES = 4096  # a whole block of every disk
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none


def write(file: Any, chunks: Iterable[Buffer]) -> None:
    """Writes chunks to a file that was opened without a buffer. It is not durable before its ``fsync``.

    What lies in whole pages, where the file has whole pages before it, is written from where it is.
    """
    import numpy as np  # noqa: PLC0415  # whoever only reads a run does without it

    buffer = np.frombuffer(mmap.mmap(-1, BUFFER_BYTES), dtype=np.uint8)  # begins on a page
    direct, filled = _switch(file, on=True), 0
    for chunk in chunks:
        rest = np.frombuffer(chunk, dtype=np.uint8)
        if len(rest) >= BUFFER_BYTES and (filled | rest.ctypes.data) % _PAGE_BYTES == 0:
            if filled:
                direct = _write_whole(file, buffer[:filled].data, direct=direct)
            pages = len(rest) // _PAGE_BYTES * _PAGE_BYTES
            direct = _write_whole(file, rest[:pages].data, direct=direct)
            filled, rest = 0, rest[pages:]
        while len(rest):
            count = min(len(rest), BUFFER_BYTES - filled)
            np.copyto(buffer[filled : filled + count], rest[:count])  # unlike a slice's assignment, without the GIL
            filled, rest = filled + count, rest[count:]
            if filled == BUFFER_BYTES:
                direct = _write_whole(file, buffer.data, direct=direct)
                filled = 0
    if direct:
        _switch(file, on=False)  # the end of the file is not a whole block
    write_all(file, buffer[:filled].data)


def write_all(file: Any, data: Buffer) -> None:
    """Writes all of the data: a raw write may be short."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _write_whole(file: Any, block: memoryview, *, direct: bool) -> bool:
    """Writes whole pages from the beginning of one; whether the next ones may go past the cache, too."""
    try:
        written = file.write(block)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:  # some filesystems say only now that they cannot
            raise
        written = 0
    if written < len(block) and direct:  # what is left need not be aligned
        _switch(file, on=False)
        direct = False
    write_all(file, block[written:])
    return direct


def _switch(file: Any, *, on: bool) -> bool:
    """Has the next writes go past the cache or through it; whether the filesystem agreed."""
    if not _DIRECT:
        return False
    flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    try:
        fcntl.fcntl(file.fileno(), fcntl.F_SETFL, flags | _DIRECT if on else flags & ~_DIRECT)
    except OSError:
        return False
    return on
