"""A copy of the state at one step boundary, made while the training goes on.

What the next forward pass may change (the buffers of a batch norm, random states, whatever nobody vouches for) is copied
before the step boundary is left. What only the optimizer's step changes, its parameters and its own state, is *steady*: it
is copied beside the next forward and backward pass, and the optimizer's step waits (``fence``) in case that takes longer. A
version counter would not do in place of the fence: fused optimizers and ``.data`` change tensors without counting.

On the CPU one thread copies into memory that is used again for each save, so that only the first one pays for fresh pages.
From a GPU a stream of its own copies into pinned memory, after what the computing stream had been given until then; the
fence then holds up the computing stream and not the processor.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from harness.checkpoint import tree
from harness.checkpoint.tree import Encoded

_ALIGNMENT_BYTES = 64
_SMALL_BYTES = 32 << 10  # torch copies so few in the calling thread


@dataclass
class HostMemory:
    """One block of the host's memory that all saves share, one after the other."""

    pinned: bool
    block: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def at_least(self, size_bytes: int) -> torch.Tensor:
        """The block, uint8, of this size or more; its content is whatever it was."""
        if self.block.numel() < size_bytes:
            self.block = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            self.block = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=self.pinned)
        return self.block


class Snapshot:
    """The encoded parts of a state, and the copy of their tensors that is being made."""

    def __init__(self, parts: Mapping[str, Encoded], memory: HostMemory, is_steady: Callable[[torch.Tensor], bool]) -> None:
        block, offset = memory.at_least(size_bytes(parts)), 0
        self.parts: dict[str, Encoded] = {}  # as given, on the host; there, and whole, once ``drain`` has returned
        self._later: list[_Copy] = []
        self._drained = threading.Event()
        self._stream = torch.cuda.Stream() if memory.pinned else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        now: list[_Copy] = []
        for name, part in parts.items():
            self.parts[name] = replace(part, tensors={})
            for path, tensor in part.tensors.items():
                copy = _Copy(tensor, self.parts[name].tensors, path, block, offset)
                (self._later if is_steady(tensor) else now).append(copy)
                offset += _padded(tensor.nbytes)
        self._copy_now(now)

    def drain(self) -> None:
        """Makes the rest of the copy; called in the writer's thread."""
        try:
            if self._stream is None:
                for copy in self._later:
                    copy.make()
                return
            with torch.cuda.stream(self._stream):
                for copy in self._later:
                    copy.make()
                self._copied = self._stream.record_event()
            self._drained.set()  # the copies are under way, and what must wait for them can say so to the GPU
            self._copied.synchronize()
        finally:
            self._drained.set()
            self._later.clear()  # until now it kept the tensors' memory from being used for others

    def fence(self) -> None:
        """Waits until what was steady may change. On a GPU, it is the computing stream that waits."""
        self._drained.wait()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def _copy_now(self, copies: list["_Copy"]) -> None:
        if self._stream is None:
            for copy in copies:
                copy.make()
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # the step that has just been queued comes first
        with torch.cuda.stream(self._stream):
            for copy in copies:
                copy.make()
        torch.cuda.current_stream().wait_stream(self._stream)  # these are few, and the next forward pass may change them


class _Copy(NamedTuple):
    """A tensor that is to be copied into the block, from an offset in bytes on, and filed under its path."""

    tensor: torch.Tensor
    places: dict[str, torch.Tensor]
    path: str
    block: torch.Tensor
    offset: int

    def make(self) -> None:
        tensor = self.tensor
        place = self.block[self.offset : self.offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        _copy(place, tensor)
        self.places[self.path] = place


def size_bytes(parts: Mapping[str, Encoded]) -> int:
    """How much memory a snapshot of these parts takes."""
    return sum(_padded(tensor.nbytes) for part in parts.values() for tensor in part.tensors.values())


def _padded(count: int) -> int:
    return -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _copy(place: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copies a tensor to its place on the host; from a GPU, in the current stream and without waiting."""
    if tensor.nbytes <= _SMALL_BYTES and tensor.device.type == "cpu":
        place.copy_(tensor.detach())
    elif tensor.device.type == "cpu":  # by NumPy, since torch would start as many threads as there are cores
        target, done = place.reshape(-1).view(torch.uint8).numpy(), 0
        for chunk in tree.raw_bytes(tensor):
            np.copyto(target[done : done + len(chunk)], np.frombuffer(chunk, dtype=np.uint8))
            done += len(chunk)
    elif tensor.numel():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        place.reshape(-1).view(torch.uint8).copy_(plain.reshape(-1).view(torch.uint8), non_blocking=True)
