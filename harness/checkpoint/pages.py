"""Pages for memory that is about to be filled.

Most of the time of a restore goes into fresh memory, whose pages the kernel finds and clears one by one when they are first
touched. It can be asked for those of a stretch at once (Linux 5.14). Huge pages come five to ten times as fast still, on
most machines; on others each takes milliseconds: where a virtual machine gives free ones back to its host, or where no
memory of that size is left in one piece. Which of the two it is changes within seconds, and nothing tells beforehand. So
both kinds are timed as they come, and huge ones are asked for while they have come faster.
"""

import ctypes
import mmap
import threading
import time
from collections.abc import Iterable, Iterator

HUGE_BYTES = 2 << 20  # where pages have 4 KiB; where they have more, huge ones do too, and to ask for them does nothing
_WORTH_ASKING_BYTES = 64 << 10  # for less the call takes longer than it saves
_WORTH_TRYING_BYTES = 128 << 20  # a slow huge page takes as long as 20 MiB of small ones
_PROVEN_BYTES = 16 << 20  # of huge pages; until so many have been fast only one thread asks for them
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
    """Gives memory its pages, several threads at a time."""

    def __init__(self) -> None:
        self._windows: set[int] = set()  # addresses at which a huge page can lie
        self._lock = threading.Lock()
        self._small: list[float] = []  # seconds per byte, the first samples
        self._huge_bytes, self._huge_seconds = 0, 0.0
        self._under_way = 0  # calls for huge pages

    def expect(self, places: Iterable[memoryview]) -> None:
        """Tells of memory that is to be filled. A huge page may lie where all small ones would have some of it: what is
        allocated one after the other often follows each other, too."""
        runs: list[list[int]] = []
        for start, stop in sorted(_small_pages(place) for place in places if len(place) >= _WORTH_ASKING_BYTES):
            if runs and start <= runs[-1][1]:
                runs[-1][1] = stop
            else:
                runs.append([start, stop])
        for start, stop in runs:
            first = start + -start % HUGE_BYTES
            self._windows.update(range(first, stop - HUGE_BYTES + 1, HUGE_BYTES))

    def give(self, place: memoryview) -> None:
        """Has the kernel give a piece (see ``cut``) its pages now. Where it does not, they come when they are touched."""
        if len(place) < _WORTH_ASKING_BYTES:
            return
        start, stop = _small_pages(place)
        window = start - start % HUGE_BYTES
        huge = window in self._windows and self._are_huge_ones_better()
        began = time.perf_counter()
        if huge:
            _advise(window, HUGE_BYTES, _MADV_HUGEPAGE)
        _advise(start, stop - start, _MADV_POPULATE_WRITE)
        self._took(time.perf_counter() - began, len(place), huge=huge)

    def _are_huge_ones_better(self) -> bool:
        with self._lock:
            if len(self._windows) * HUGE_BYTES < _WORTH_TRYING_BYTES or len(self._small) < _SAMPLES:
                return False
            if self._huge_bytes < _PROVEN_BYTES and self._under_way:
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


def _small_pages(place: memoryview) -> tuple[int, int]:
    """Where the pages of some memory begin and end. What else is on the first and on the last one stays as it is."""
    start, stop = _address(place), _address(place) + len(place)
    return start - start % mmap.PAGESIZE, stop + -stop % mmap.PAGESIZE


def _advise(start: int, size_bytes: int, advice: int) -> None:
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size_bytes), advice)
