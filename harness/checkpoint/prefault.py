"""Pages for memory that is about to be filled.

Most of the time of a restore goes into fresh memory, whose pages the kernel finds and clears one by one when they are first
touched. It can be asked for those of a stretch at once (Linux 5.14). Huge pages come five times as fast still, or each of
them takes milliseconds: where a virtual machine gives free ones back to its host, or where no memory of that size is left in
one piece. Which of the two it is changes within seconds, and nothing tells beforehand. So both kinds are timed as they come,
and huge ones are asked for while they have come faster.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator

HUGE_BYTES = 2 << 20  # where pages have 4 KiB; where they have more, huge ones do too, and to ask for them does nothing
_WORTH_ASKING_BYTES = 64 << 10  # for less the call takes longer than it saves
_WORTH_TRYING_BYTES = 128 << 20  # a slow huge page takes as long as 20 MiB of small ones
PROVEN_BYTES = 16 << 20  # of huge pages; until so many have been fast only one thread asks for them
_SAMPLES = 2  # of small pages; the faster one counts, since another program may have held up the other

_MADV_HUGEPAGE = 14  # linux/mman.h
_MADV_POPULATE_WRITE = 23
_libc = ctypes.CDLL(None)


def cut(place: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Memory in pieces that begin and end where a huge page would, each with where it begins in the whole. A little stays
    in one piece."""
    address, start = _address(place) if len(place) >= _WORTH_ASKING_BYTES else 0, 0
    while start < len(place):
        stop = start + HUGE_BYTES - (address + start) % HUGE_BYTES
        yield start, place[start:stop]
        start = stop


class Pages:
    """Backs the pages of a piece of memory, in several threads at a time."""

    def __init__(self, size_bytes: int) -> None:
        self._is_worth_trying = size_bytes >= _WORTH_TRYING_BYTES
        self._lock = threading.Lock()
        self._small: list[float] = []  # seconds per byte, the first samples
        self._huge_bytes, self._huge_seconds = 0, 0.0
        self._under_way = 0  # calls for huge pages

    def give(self, place: memoryview) -> None:
        """Has the kernel give a piece (see ``cut``) its pages now. Where it does not, they come when they are touched.

        A piece that is less than a huge page has a neighbour in it whose pages are small: ``malloc`` has written there.
        """
        if len(place) < _WORTH_ASKING_BYTES:
            return
        huge = len(place) == HUGE_BYTES and self._are_huge_ones_better()
        start = _address(place)
        first = start - start % mmap.PAGESIZE  # what else is on the first and on the last small page stays as it is
        began = time.perf_counter()
        if huge:
            advise(start, HUGE_BYTES, _MADV_HUGEPAGE)
        advise(first, start + len(place) - first, _MADV_POPULATE_WRITE)
        self._took(time.perf_counter() - began, len(place), huge=huge)

    def _are_huge_ones_better(self) -> bool:
        with self._lock:
            if not self._is_worth_trying or len(self._small) < _SAMPLES:
                return False
            if self._huge_bytes < PROVEN_BYTES and self._under_way:
                return False
            are_better = self._huge_seconds <= self._huge_bytes * min(self._small)
            self._under_way += are_better
            return are_better

    def _took(self, seconds: float, size_bytes: int, *, huge: bool) -> None:
        with self._lock:
            if huge:
                self._huge_seconds += seconds
                self._huge_bytes += size_bytes
                self._under_way -= 1
            elif size_bytes > HUGE_BYTES // 2 and len(self._small) < _SAMPLES:
                self._small.append(seconds / size_bytes)


def _address(place: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(place))


def advise(start: int, size_bytes: int, advice: int) -> None:
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), advice)
