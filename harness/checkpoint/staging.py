"""A copy of the state at one step boundary, made and written while the training goes on.

What the next forward pass may change (the buffers of a batch norm, random states, whatever nobody vouches for) is copied
before the step boundary is left. What only the optimizer's step changes, its parameters and its own state, is *steady*: it
is copied beside the next forward and backward pass, and the optimizer's step waits (``fence``) in case that takes longer. A
version counter would not do in place of the fence: fused optimizers and ``.data`` change tensors without counting.

Programs change parameters elsewhere, too: ``Embedding(max_norm=…)`` in its forward pass, averages of weights that are
swapped in for a validation, schedule-free optimizers in ``eval()``. Two checks keep such a state from being committed:

* The version counters of what is steady are compared from the boundary to the end of the copy, or to the fence where that
  comes first. Where one has moved the snapshot is *torn* (``refuse_torn``).
* A snapshot that is a *proof* copies everything at the boundary, so that it is right whatever happens. At the fence the live
  tensors are compared with it, byte for byte: what has ``strayed`` must not be copied later from then on. This finds what no
  counter sees.

The copy of a shard is its file, byte for byte, in memory that begins on a page (``Image``), from where a disk can fetch it.
One thread copies, and hashes each piece while that is still in the processor's cache; another one follows and writes. Once
the optimizer waits, the hashes wait, too, and both threads copy: the one whose turn it was from the front, the one that
waits from the back. The memory is used again for each save, so that only the first one pays for fresh pages.

From an accelerator a stream of its own copies into pinned memory, after what the computing stream had been given until
then; the fence then holds up the computing stream and not the processor.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from harness import torch_private
from harness.checkpoint import tree
from harness.checkpoint.commit import Torn
from harness.checkpoint.format import CHECKSUM, DATA_ALIGNMENT_BYTES, BlockHasher, Blocks, TensorInfo, hasher
from harness.checkpoint.plan import Shard
from harness.checkpoint.tree import Encoded
from harness.distributed import device
from harness.storage.direct_io import Buffer

log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20  # that the writer is given at once


@dataclass
class HostMemory:
    """One block of the host's memory that all saves share, one after the other."""

    pinned: bool
    block: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8, device="cpu"))

    def at_least(self, size_bytes: int) -> torch.Tensor:
        """The block, uint8, of this size or more, from the beginning of a page on; its content is whatever it was."""
        if self.block.numel() < (needed_bytes := size_bytes + DATA_ALIGNMENT_BYTES):
            self.block = torch.empty(0, dtype=torch.uint8, device="cpu")  # the old one goes before the new one comes
            self.block = self._new(needed_bytes)
        return self.block[-self.block.data_ptr() % DATA_ALIGNMENT_BYTES :]

    def _new(self, size_bytes: int) -> torch.Tensor:
        if self.pinned:
            try:
                return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:  # there is less memory that may be pinned than memory
                self.pinned = False
                why = str(error).partition("\n")[0]
                log.warning(
                    "saves copy at half the speed: %d MB of memory could not be pinned: %s", size_bytes // 10**6, why
                )
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")


class _Watched(NamedTuple):  # there is one for each tensor of a model, at each save
    """A steady tensor: its version at the step boundary, and where its copy begins in the memory of its image."""

    path: str
    tensor: torch.Tensor
    version: int
    memory: torch.Tensor  # uint8
    start: int

    def has_moved(self) -> bool:
        return torch_private.version(self.tensor) != self.version

    def differs(self) -> bool:
        """Whether the tensor has other bytes than its copy."""
        place = self.memory[self.start : self.start + self.tensor.nbytes]
        if self.tensor.device.type != "cpu":
            flat = self.tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            pairs = zip(*(torch.split(each, WINDOW_BYTES) for each in (flat, place)), strict=True)
            return any(not torch.equal(live, copy.to(live.device)) for live, copy in pairs)
        start, copy = 0, place.numpy()
        for chunk in tree.raw_bytes(self.tensor):
            if not np.array_equal(copy[start : start + len(chunk)], np.frombuffer(chunk, np.uint8)):
                return True
            start += len(chunk)
        return False


class Snapshot:
    """The shards of a state, of which a copy is being made. Without ``overlap`` all of it is made at once; ``is_proof`` says
    that the copy is then compared with what is live at the fence."""

    def __init__(
        self,
        shards: Iterable[Shard],
        parts: Mapping[str, Encoded],
        memory: HostMemory,
        is_steady: Callable[[torch.Tensor], bool],
        *,
        overlap: bool = True,
        is_proof: bool = False,
    ) -> None:
        shards = list(shards)
        block, offset = memory.at_least(size_bytes(shards)), 0
        self.images: list[Image] = []
        for shard in shards:
            self.images.append(Image(shard, parts[shard.part].tensors, block[offset : offset + shard.data_bytes]))
            offset += _padded(shard.data_bytes)
        self._awaited = threading.Event()  # by the fence
        self._helped = threading.Event()  # what the thread at the fence has taken is copied
        self._drained = threading.Event()  # and so is what the other one has taken
        self._beside = device.beside((each.device for part in parts.values() for each in part.tensors.values()), "save")
        self._copied = device.NOTHING
        self.strayed: list[str] = []  # of a proof: what was found at the fence to have changed since the boundary
        self._torn: list[str] | None = None  # None: nobody has looked yet
        self._looking = threading.Lock()
        # It also keeps what is copied beside the training from being given back before that is done.
        self._watched = [each for image in self.images for each in image.watch(is_steady)] if overlap or is_proof else []
        self._is_proof = is_proof
        self._copy_now(is_steady if overlap and not is_proof else _nothing)

    def drain(self) -> None:
        """Makes the rest of the copy, beside the writer, who waits for it. What goes wrong is raised there."""
        try:
            if self._beside.is_async:
                self._beside.adopt()
                self._copy_beside()
            for image in self.images:
                image.fill(self._awaited, self._hurry)
            self._look()
        except BaseException as error:
            self._fail(error)
        finally:
            self._drained.set()

    def refuse_torn(self) -> None:
        """Raises ``Torn`` where something steady has changed before it was copied. Called when all images are whole."""
        self._look()
        if self._torn:
            raise Torn(self._torn)

    def _look(self) -> None:
        """Notes what has changed since the boundary: once, before the optimizer may change anything."""
        with self._looking:
            if self._torn is None:
                torn = [] if self._is_proof else [each.path for each in self._watched if each.has_moved()]
                self._torn = sorted(torn)

    def _prove(self) -> None:
        if self._is_proof and not self._awaited.is_set():
            self.strayed = sorted(each.path for each in self._watched if each.differs())

    def fence(self) -> None:
        """Waits until what was steady may change, and helps to copy it. On an accelerator, the computing stream waits."""
        try:
            self._look()
            self._prove()
            self._awaited.set()
            if not self._beside.is_async and not self._drained.is_set():
                for image in reversed(self.images):
                    image.copy(_everything, last_first=True)
        except BaseException as error:
            self._fail(error)  # it is that of the save, as in the other thread
            if not isinstance(error, Exception):
                raise
        finally:
            self._helped.set()
        self._drained.wait()
        self._copied.wait()

    def _hurry(self) -> None:
        """When somebody waits for it, copies all that nobody has taken yet, unhashed. After that, all of it is there."""
        if self._awaited.is_set() and not self._drained.is_set():
            for image in self.images:
                image.copy(_everything)
            self._drained.set()
            self._helped.wait()

    def _fail(self, error: BaseException) -> None:
        for image in self.images:
            image.fail(error)

    def _copy_now(self, is_steady: Callable[[torch.Tensor], bool]) -> None:
        self._beside.follow()  # the step that has just been queued comes first
        with self._beside.within():
            for image in self.images:
                image.copy(lambda tensor: not is_steady(tensor))
        self._beside.lead()  # these are few, and the next forward pass may change them

    def _copy_beside(self) -> None:
        try:
            with self._beside.within():
                for image in self.images:
                    image.copy(_everything)
        finally:  # after an error, too: what is under way must not come into the memory of the next save
            self._copied = self._beside.mark()
            self._drained.set()  # what must wait for the copies can say so to the device
            self._copied.synchronize()


class Image:
    """A shard in the host's memory, as it lies in its file behind the header. It can be written while it is filled."""

    def __init__(self, shard: Shard, tensors: Mapping[str, torch.Tensor], memory: torch.Tensor) -> None:
        self.shard = shard
        self.checksum = ""
        self.blocks: dict[str, Blocks] = {}
        self._memory = memory  # uint8, as many as the tensors have
        starts = accumulate((info.nbytes for info in shard.tensors), initial=0)
        self._missing = {  # where it goes, and what: of those that nobody has taken yet, who then copies it
            info.path: (start, tensors[info.path]) for start, info in zip(starts, shard.tensors, strict=False)
        }
        self._changed = threading.Condition()
        self._ready_bytes = -1  # that the writer may have; all of them when the checksums are there, too
        self._failure: BaseException | None = None

    def watch(self, is_steady: Callable[[torch.Tensor], bool]) -> list[_Watched]:
        """Those tensors that nothing but the optimizer should change, before any of them is copied."""
        return [
            _Watched(path, tensor, torch_private.version(tensor), self._memory, start)
            for path, (start, tensor) in self._missing.items()
            if is_steady(tensor)
        ]

    def __call__(self) -> Iterator[Buffer]:
        """The bytes of the file, each when it is there. Raises what has kept the image from being filled."""
        yield self.shard.header
        view, done = self._memory.numpy().data, 0
        while done < len(view):
            window = view[done : done + WINDOW_BYTES]
            done += len(window)
            self._wait_for(done)
            yield window
        self._wait_for(done)  # where there are no bytes, too

    def hash(self) -> None:
        """Returns when all is copied and hashed. Raises what has kept the image from being filled."""
        self._wait_for(self.shard.data_bytes)

    def copy(self, wanted: Callable[[torch.Tensor], bool], last_first: bool = False) -> None:
        """Copies those tensors that are wanted and missing; from an accelerator, in the current stream and without waiting.
        Two threads may do so at the same time."""
        missing = list(self._missing.items())
        for path, (start, tensor) in reversed(missing) if last_first else missing:
            if wanted(tensor) and self._missing.pop(path, None) is not None:
                _exhaust(copy_tensor(self._memory, start, tensor))

    def fill(self, awaited: threading.Event, hurry: Callable[[], None]) -> None:
        """Copies what is still missing, and hashes everything, tensor by tensor. Once it is ``awaited``, no further hash
        comes before what ``hurry`` copies."""
        whole, start = hasher(), 0
        whole.update(self.shard.header)
        for info in self.shard.tensors:
            own = BlockHasher()
            for piece in self._pieces(info, start, awaited, hurry):
                whole.update(piece)
                own.update(piece)
                start += len(piece)
                if start // WINDOW_BYTES > self._ready_bytes // WINDOW_BYTES and start < self.shard.data_bytes:
                    self._tell(start)
            self.blocks[info.path] = own.blocks()
        self.checksum = f"{CHECKSUM}:{whole.hexdigest()}"
        self._tell(start)

    def _pieces(
        self, info: TensorInfo, start: int, awaited: threading.Event, hurry: Callable[[], None]
    ) -> Iterator[memoryview]:
        """The bytes of a tensor. Until somebody waits, each piece is copied when it is asked for, and still in the cache."""
        end = start + info.nbytes
        if (taken := self._missing.pop(info.path, None)) is not None:
            copying = copy_tensor(self._memory, *taken)
            for piece in copying:
                yield piece
                start += len(piece)
                if awaited.is_set():
                    break
            _exhaust(copying)
        hurry()  # now at the latest the tensor is there, even if the thread that waits has taken it
        if start < end:
            for piece in tree.raw_bytes(self._memory[start:end]):
                yield piece
                hurry()

    def fail(self, error: BaseException) -> None:
        """Lets the writer know that it waits in vain."""
        with self._changed:
            self._failure = error
            self._missing.clear()
            self._changed.notify_all()

    def _tell(self, ready_bytes: int) -> None:
        with self._changed:
            self._ready_bytes = ready_bytes
            self._changed.notify_all()

    def _wait_for(self, ready_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._ready_bytes >= ready_bytes)
        if self._failure is not None:
            raise self._failure


def size_bytes(shards: Iterable[Shard]) -> int:
    """How much memory a snapshot of these shards takes."""
    return sum(_padded(shard.data_bytes) for shard in shards)


def _everything(_tensor: torch.Tensor) -> bool:
    return True


def _nothing(_tensor: torch.Tensor) -> bool:
    return False


def _exhaust(copying: Iterator[memoryview]) -> None:
    for _piece in copying:
        pass


def _padded(count: int) -> int:
    return -(-count // DATA_ALIGNMENT_BYTES) * DATA_ALIGNMENT_BYTES


def copy_tensor(memory: torch.Tensor, start: int, tensor: torch.Tensor) -> Iterator[memoryview]:
    """Copies a tensor to its place, and gives each piece of it that is there. From an accelerator it is copied in the
    current stream, which is not waited for, and none is given."""
    where = device.of(tensor.device)
    if tensor.is_cpu and not where.is_async:  # by NumPy, since torch would start as many threads as there are cores
        place = memory.numpy()
        for chunk in tree.raw_bytes(tensor):
            piece = place[start : start + len(chunk)]
            np.copyto(piece, np.frombuffer(chunk, dtype=np.uint8))
            start += len(chunk)
            yield piece.data
    elif tensor.numel():
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        where.copy(memory[start : start + tensor.nbytes], plain.reshape(-1).view(torch.uint8))
