"""Memory for tensors on a disk, so that a model need not fit into the machine's own memory."""

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence

import torch

from harness.checkpoint import places

_WORTH_A_FILE_BYTES = 1 << 20


def on_disk(path: str, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """As ``places.empty``, in a temporary file that nobody else sees. The kernel writes it out when it needs the memory.

    Small tensors are in plain memory, and so is one for which the disk has no room.
    """
    kind = getattr(torch, dtype)
    size_bytes = kind.itemsize * math.prod(shape)
    if size_bytes >= _WORTH_A_FILE_BYTES and hasattr(os, "posix_fallocate"):
        with contextlib.suppress(OSError, RuntimeError), tempfile.NamedTemporaryFile(prefix="harness-") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a write to memory must not find the disk full
            memory = torch.from_file(file.name, shared=True, size=size_bytes, dtype=torch.uint8)
            return memory.view(kind).view(tuple(shape))
    return places.empty(path, shape, dtype)
