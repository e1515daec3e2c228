"""Fresh memory for what is large.

The kernel clears each page of 4 KiB when it is first touched, and that takes several times as long as copying into it. With
huge pages it does so for 2 MiB at a time.
"""

import contextlib
import mmap


def fresh_region(size_bytes: int) -> mmap.mmap:
    """Memory that belongs to nobody else, in huge pages where the system has them."""
    region = mmap.mmap(-1, max(size_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # another system, or a kernel built without them
        region.madvise(mmap.MADV_HUGEPAGE)
    return region
