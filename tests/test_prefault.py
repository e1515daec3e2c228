"""Fresh memory gets its pages before it is filled."""

import ctypes
import mmap

from harness.checkpoint import prefault

MIB = 1 << 20
PAGE = mmap.PAGESIZE


def resident_bytes(view: memoryview) -> int:
    vector = (ctypes.c_ubyte * (len(view) // PAGE))()
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(view)), vector) == 0
    return sum(each & 1 for each in vector) * PAGE


def test_memory_has_its_pages_and_its_content():
    """All that was asked for is there, nothing else, and what stood on the first and on the last page still does."""
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # or the first touch may bring two MiB
    view = memoryview(memory)
    view[0] = view[-1] = 7
    assert resident_bytes(view) == 2 * PAGE
    place = view[PAGE // 2 : 4 * MIB - PAGE // 2]
    for start in range(0, len(place), MIB):
        prefault.populate(place[start : start + MIB])
    assert resident_bytes(view) == 4 * MIB + PAGE
    assert view[0] == view[-1] == 7
    assert not any(place[PAGE::PAGE])


def test_a_little_memory_is_left_to_its_first_touch():
    """The call would take longer than it saves."""
    view = memoryview(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    prefault.populate(view[: 32 << 10])
    prefault.populate(view[:0])
    assert resident_bytes(view) == 0
