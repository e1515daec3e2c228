"""An accelerator without one: its work is done as late, or as early, as the rules of streams and events allow.

Its tensors lie on the CPU. What is queued in a stream is done

* in a *lazy* stream, when something needs it: the processor waits for it, or another stream that comes to a wait for it;
* in an *eager* stream, at once, and what it waits for in other streams just before it.

``late copies`` has the default stream, in which the training computes, eager and all others lazy; ``early copies`` the other
way round. A wait that is missing shows in one of them: a copy is made before its source is written, or after it is written
anew. Where a stream hangs (``hang``), nothing behind that is ever done, and the processor that waits for it is told so.

A thread begins with a device on which the process has nothing. Whoever does anything to an event with that as its current
device takes memory there, which ``strays`` notes. Memory that is given back is used again: a copy that reads from it then
finds other bytes. The tensors that are on the device are those that were said to be (``own``). torch's copies of them to the
processor wait for the current stream, as ``tree.raw_bytes`` does here.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from harness.checkpoint import tree
from harness.distributed import device as devices
from harness.distributed.device import Accelerator, Device

CPU = torch.device("cpu")
MODES = ("late copies", "early copies")
Work = Callable[[], None]
_OTHER_BYTES = 171
_OURS, _ANOTHER = "ours", "another"  # devices


class Hangs(Exception):
    """The processor waits for what will never be done."""


class LateStream:
    def __init__(self, late: "Late", device: torch.device, *, is_lazy: bool) -> None:
        self.device, self.is_lazy = device, is_lazy
        self._late = late
        self.queued: list[Work] = []
        self.done = 0

    def put(self, work: Work) -> None:
        with self._late.lock:
            self.queued.append(work)
            if not self.is_lazy:
                with contextlib.suppress(Hangs):  # the one who queues does not wait
                    self.run(len(self.queued))

    def run(self, until: int) -> None:
        with self._late.lock:
            while self.done < until:
                self.queued[self.done]()
                self.queued[self.done] = _nothing
                self.done += 1

    def wait_event(self, event: "LateEvent") -> None:
        stream, until = event.place
        self._late.touch()
        if stream is not None:
            self.put(lambda: stream.run(until))

    def wait_stream(self, other: "LateStream") -> None:
        self._late.touch()
        until = len(other.queued)
        self.put(lambda: other.run(until))


class LateEvent:
    def __init__(self, late: "Late") -> None:
        self._late = late
        self.place: tuple[LateStream | None, int] = (None, 0)
        self._seconds = 0.0

    def record(self, stream: LateStream) -> None:
        self._late.touch()
        with self._late.lock:
            stream.put(self._pass)
            self.place = stream, len(stream.queued)

    def _pass(self) -> None:
        self._seconds = perf_counter()

    def __del__(self) -> None:
        self._late.touch()

    def query(self) -> bool:
        stream, until = self.place
        return stream is None or stream.done >= until

    def synchronize(self) -> None:
        stream, until = self.place
        self._late.wait_for_the_processor()
        if stream is not None:
            stream.run(until)

    def elapsed_time(self, end: "LateEvent") -> float:
        assert self.query() and end.query(), "torch raises an error"
        return 1000 * (end._seconds - self._seconds)


class Late:
    """What torch is asked for, in ``harness.distributed.device.Interface``."""

    def __init__(self, mode: str) -> None:
        assert mode in MODES
        self.lock = threading.RLock()
        self._copies_are_late = mode == "late copies"
        self._defaults: dict[torch.device, LateStream] = {}
        self._here = threading.local()  # the current streams of a thread
        self._owned: set[int] = set()
        self.strays: list[str] = []  # the threads
        self._here.device = _OURS
        self._hangs = False
        self._may_wait = threading.Event()
        self._may_wait.set()

    def Stream(self, device: torch.device, priority: int = 0) -> LateStream:  # noqa: N802  # torch's name
        assert priority < 0, "the streams of the other pool are drawn by everybody"
        assert not self._hangs, "to make a stream may take as long as a kernel that hangs"
        return LateStream(self, device, is_lazy=self._copies_are_late)

    def Event(self, device: torch.device, *, enable_timing: bool = False) -> LateEvent:  # noqa: N802  # torch's name
        return LateEvent(self)

    def current_stream(self, device: torch.device) -> LateStream:
        found: LateStream | None = self._streams_here().get(device)
        return found or self.default(device)

    def default(self, device: torch.device = CPU) -> LateStream:
        """The stream that each thread begins with."""
        with self.lock:
            return self._defaults.setdefault(device, LateStream(self, device, is_lazy=not self._copies_are_late))

    def set_stream(self, stream: LateStream) -> None:
        self._streams_here()[stream.device] = stream

    def _streams_here(self) -> dict[torch.device, LateStream]:
        found: dict[torch.device, LateStream] = self._here.__dict__.setdefault("streams", {})
        return found

    def set_device_index(self, index: int | None) -> None:
        self._here.device = _OURS

    @contextlib.contextmanager
    def device_index(self, index: int | None) -> Iterator[None]:
        before = getattr(self._here, "device", _ANOTHER)
        self._here.device = _OURS
        try:
            yield
        finally:
            self._here.device = before

    def touch(self) -> None:
        if getattr(self._here, "device", _ANOTHER) != _OURS:
            self.strays.append(threading.current_thread().name)

    def host_memory(self, size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        storage, form = source.untyped_storage(), (source.storage_offset(), source.size(), source.stride())
        dtype, held = source.dtype, None if self.owns(source) else source  # torch itself holds the memory of the host
        weak: Any = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        storage_of: Any = torch.UntypedStorage._new_with_weak_ptr  # None where it was given back
        del storage, source

        def copy() -> None:
            if held is not None:
                _write(target, held)
            elif (alive := storage_of(weak.cdata)) is None:
                _write(target, torch.full_like(target, _OTHER_BYTES))
            else:
                _write(target, torch.empty(0, dtype=dtype).set_(alive, *form))

        self.current_stream(CPU).put(copy)

    def copy_each(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        assert len({each.dtype for each in sources}) == 1, "these would be copied one by one"
        for target, source in zip(targets, sources, strict=True):
            self.copy(target, source)

    # --- for the tests -----------------------------------------------------------------------------------------------

    def own(self, *tensors: torch.Tensor) -> None:
        """These are on the device."""
        self._owned |= {each.untyped_storage().data_ptr() for each in tensors}

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._owned

    def write(self, tensor: torch.Tensor, value: float) -> None:
        """A step of the training: queued in the current stream. As on a device, nobody sees when it is done."""
        self.current_stream(CPU).put(lambda: _write(tensor, torch.full_like(tensor, value)))

    def hang(self) -> None:
        """The current stream waits for a rank that has died."""

        def never() -> None:
            raise Hangs

        self._hangs = True
        self.current_stream(CPU).put(never)

    def read(self) -> None:
        """What torch does before it hands bytes to the processor: waits for the current stream."""
        stream = self.current_stream(CPU)
        stream.run(len(stream.queued))

    @contextlib.contextmanager
    def processor_is_slow(self) -> Iterator[None]:
        """Until the block is over, no thread comes back from waiting for an event."""
        self._may_wait.clear()
        try:
            yield
        finally:
            self._may_wait.set()

    def wait_for_the_processor(self) -> None:
        assert self._may_wait.wait(30), "the processor waits for the device while the training is to go on"

    @contextlib.contextmanager
    def in_own_stream(self) -> Iterator[None]:
        """The time in which the training computes in a stream of its own, which is as eager as the default one."""
        before, here = self.default(), LateStream(self, CPU, is_lazy=self.default().is_lazy)
        self.set_stream(here)
        try:
            yield
        finally:
            self.set_stream(before)


class LateDevice(Accelerator):
    """Its random numbers are the process's."""

    random_state = Device.random_state
    set_random_state = Device.set_random_state
    seed = Device.seed
    state_of_seed = Device.state_of_seed


def use(monkeypatch: pytest.MonkeyPatch, mode: str) -> Late:
    """From now on the CPU is such a device."""
    late = Late(mode)
    monkeypatch.setitem(devices.KNOWN, CPU, LateDevice(CPU, late))
    raw_bytes = tree.raw_bytes

    def reading(tensor: torch.Tensor) -> Iterator[memoryview]:
        if late.owns(tensor):
            late.read()
        yield from raw_bytes(tensor)

    monkeypatch.setattr(tree, "raw_bytes", reading)
    return late


def _nothing() -> None:
    pass


def _write(target: torch.Tensor, source: Any) -> None:
    """Without moving the version counter: a device moves it when the work is queued."""
    target.detach().numpy()[...] = source.detach().numpy()
