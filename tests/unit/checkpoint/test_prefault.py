"""Fresh memory gets its pages before it is filled, huge ones as long as they come faster than small ones."""

import ctypes
import itertools
import mmap
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness.checkpoint import prefault as pages
from harness.checkpoint.prefault import HUGE_BYTES, Pages, cut
from harness.runtime.threads import in_threads

MIB = 1 << 20
PAGE = mmap.PAGESIZE


class Memory:
    """Fresh memory whose first byte is where a huge page can lie."""

    def __init__(self, size_bytes: int) -> None:
        whole = memoryview(mmap.mmap(-1, size_bytes + 3 * HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        start = HUGE_BYTES + -pages._address(whole) % HUGE_BYTES  # behind a page that other memory may have a part of
        self.view = whole[start : start + size_bytes]
        self.address = pages._address(self.view)

    def resident_bytes(self) -> int:
        vector = (ctypes.c_ubyte * (len(self.view) // PAGE))()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(len(self.view)), vector) == 0
        return sum(each & 1 for each in vector) * PAGE

    def huge_bytes(self) -> int:
        """In huge pages, of the mappings that have a part of it."""
        found, is_ours = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if ends := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                start, stop = (int(end, 16) for end in ends.groups())
                is_ours = start < self.address + len(self.view) and stop > self.address
            elif is_ours and line.startswith("AnonHugePages:"):
                found += int(line.split()[1]) << 10
        return found


class Kernel:
    """Takes the place of the kernel, for calls of known lengths. A page of either kind takes so many seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, small_seconds: float, huge_seconds: list[float]) -> None:
        self.small_seconds = small_seconds
        self.huge_seconds = huge_seconds  # of each in turn; the last one's is also that of all further ones
        self.asked: list[int] = []  # for huge ones, where
        self.at_once = self.most_at_once = 0
        self.is_huge: dict[int, bool] = {}
        self.lock = threading.Lock()
        monkeypatch.setattr(pages, "advise", self.advise)

    def advise(self, start: int, size_bytes: int, advice: int) -> None:
        if advice == pages._MADV_HUGEPAGE:
            assert (start % HUGE_BYTES, size_bytes) == (0, HUGE_BYTES)
            self.is_huge[threading.get_ident()] = True
            return
        if not self.is_huge.pop(threading.get_ident(), False):
            time.sleep(self.small_seconds)
            return
        with self.lock:
            seconds = self.huge_seconds[min(len(self.asked), len(self.huge_seconds) - 1)]
            self.asked.append(start)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(seconds)
        with self.lock:
            self.at_once -= 1


def give_all(view: memoryview, threads: int = 1) -> None:
    in_threads(threads, Pages(len(view)).give, [piece for _, piece in cut(view)])


@pytest.mark.parametrize("start", [0, 1, PAGE, HUGE_BYTES - 1])
@pytest.mark.parametrize("size_bytes", [0, 1, HUGE_BYTES - 1, HUGE_BYTES, HUGE_BYTES + 1, 3 * HUGE_BYTES])
def test_pieces_lie_in_one_huge_page(start, size_bytes):
    """Together they are the memory, in order; none is in two but one that gets no pages in advance."""
    place = Memory(5 * HUGE_BYTES).view[start : start + size_bytes]
    pieces, done = list(cut(place)), 0
    for offset, piece in pieces:
        first = pages._address(piece)
        assert (offset, first) == (done, pages._address(place) + done)
        assert first // HUGE_BYTES == (first + len(piece) - 1) // HUGE_BYTES or size_bytes < pages._WORTH_ASKING_BYTES
        done += len(piece)
    assert done == size_bytes
    assert len(pieces) <= size_bytes // HUGE_BYTES + 2


def test_memory_has_its_pages_and_its_content():
    """All that was asked for is there, nothing else, and what stood on the first and on the last page still does."""
    memory = Memory(8 * MIB)
    memory.view[0] = memory.view[-1] = 7
    assert memory.resident_bytes() == 2 * PAGE
    place = memory.view[PAGE // 2 : 4 * MIB - PAGE // 2]
    for _, piece in cut(place):
        Pages(len(place)).give(piece)
    assert memory.resident_bytes() == 4 * MIB + PAGE
    assert memory.view[0] == memory.view[-1] == 7
    assert not any(place[PAGE::PAGE])


def test_huge_pages_lie_within_what_is_asked_for(monkeypatch):
    """None has a part of what comes before or after."""
    kernel = Kernel(monkeypatch, small_seconds=0.05, huge_seconds=[0.0])
    memory = Memory(256 * MIB)
    give_all(memory.view[PAGE:-1])
    windows = [(address - memory.address) // HUGE_BYTES for address in kernel.asked]
    assert windows == list(range(pages._SAMPLES, 127)), "the first and the last piece have neighbours"


def test_huge_pages_that_are_faster(monkeypatch):
    """Once two samples of small ones are there, all are huge."""
    kernel = Kernel(monkeypatch, small_seconds=0.05, huge_seconds=[0.0])
    give_all(Memory(256 * MIB).view)
    assert len(kernel.asked) == 128 - pages._SAMPLES


@pytest.mark.parametrize("threads", [1, 4])
def test_huge_pages_that_are_slower(monkeypatch, threads):
    """One is asked for, whatever the number of threads."""
    kernel = Kernel(monkeypatch, small_seconds=0.001, huge_seconds=[0.5])
    give_all(Memory(256 * MIB).view, threads)
    assert len(kernel.asked) == 1


def test_huge_pages_that_become_slower(monkeypatch):
    """None is asked for once all of them have taken longer than small ones would have: what is lost was gained before."""
    kernel = Kernel(monkeypatch, small_seconds=0.01, huge_seconds=[0.0] * 5 + [0.045])
    give_all(Memory(128 * MIB).view)
    assert 6 <= len(kernel.asked) <= 10  # two slow ones use up what five fast ones have saved, more where sleeps are longer


def test_threads_ask_side_by_side_for_what_has_proven_fast(monkeypatch):
    """Until then one of them does, and the others take small pages."""
    kernel = Kernel(monkeypatch, small_seconds=0.05, huge_seconds=[0.001])
    with monkeypatch.context() as never_proven:
        never_proven.setattr(pages, "PROVEN_BYTES", 1 << 40)
        give_all(Memory(128 * MIB).view, 4)
    assert kernel.most_at_once == 1
    give_all(Memory(256 * MIB).view, 4)
    assert kernel.most_at_once > 1


def test_a_little_memory_gets_small_pages(monkeypatch):
    """A slow huge page would take longer than all that there is to win."""
    kernel = Kernel(monkeypatch, small_seconds=0.001, huge_seconds=[0.0])
    give_all(Memory(64 * MIB).view)
    assert kernel.asked == []


def test_the_kernel_gives_huge_pages(monkeypatch):
    """Where small ones seem to take forever, a real kernel gives huge ones, if it has been set to give any."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this kernel gives no huge pages")
    memory = Memory(128 * MIB)
    clock = itertools.chain([0, 1] * pages._SAMPLES, itertools.repeat(0))
    monkeypatch.setattr(pages, "time", SimpleNamespace(perf_counter=clock.__next__))
    of_memory = Pages(128 * MIB)
    for _, piece in cut(memory.view):
        of_memory.give(piece)
    assert memory.resident_bytes() >= 128 * MIB
    assert memory.huge_bytes() >= 64 * MIB
    assert not torch.frombuffer(memory.view, dtype=torch.int64).any()
