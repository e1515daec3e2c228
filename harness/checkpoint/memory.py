"""Fresh memory for what is large.

The kernel clears each page of 4 KiB when it is first touched, and that takes several times as long as copying into it. With
huge pages it does so for 2 MiB at a time. Where there are too few of them, because the page cache has taken the memory in
small pieces, a program that asks for them waits while the kernel moves pages together, and that takes longer than all.
"""

import contextlib
import mmap
from pathlib import Path

_HUGE_ORDER = 9  # 2 MiB, in pages of 4 KiB to the power of two


def fresh_region(size_bytes: int) -> mmap.mmap:
    """Memory that belongs to nobody else, in huge pages where the system has enough of them at hand."""
    region = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel built without them
        if _free_huge_bytes() >= size_bytes:
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


def _free_huge_bytes() -> int:
    """How much memory lies free in pieces that are large enough for a huge page; see /proc/buddyinfo in proc(5)."""
    free_pages = 0
    for line in Path("/proc/buddyinfo").read_text().splitlines():
        counts = line.split()[4:]  # Node 0, zone Normal, then the free pieces of 1, 2, 4 ... pages
        free_pages += sum(int(count) << order for order, count in enumerate(counts) if order >= _HUGE_ORDER)
    return free_pages * mmap.PAGESIZE
