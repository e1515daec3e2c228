"""The device that a rank computes on: streams beside the training, marks in them, pinned memory, random numbers.

An accelerator (CUDA, and what else ``torch.accelerator`` knows) works through *streams*: a call puts work into the current
stream of its thread and returns. The work of one stream is done in order; that of two streams is in no order unless one
waits. So a reader of what another stream writes, and a writer of what another stream still reads, wait for a ``Mark``.

The CPU has done its work when a call returns. Its ``Device``, ``Streams`` and ``Mark`` do nothing, so nobody above asks
which kind a device is. ``is_async`` is for those that have something better to do meanwhile.

What is easily forgotten is settled here:

* The current device and the current streams belong to a thread. A new thread begins with device 0 and the default streams.
  So an event is recorded in a stream that is named, and work for other threads takes its streams along (``here``).
* Whatever is done to an event puts the thread's own device back afterwards, and where that is device 0, this alone takes
  hundreds of megabytes there for each rank. So our own threads ``adopt`` the rank's device first.
* torch draws streams from a pool, round and round: the 33rd is the first again, and waits for whatever hangs there. So a
  purpose has one stream for good, from the pool of high priority, which few use.
* What a stream copies must stay allocated until it is done, or until the stream that it was made in waits for the copy.
  Pinned memory is safe: torch does not use it again before the copies from and to it are done.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch

T = TypeVar("T")
R = TypeVar("R")

_WITHOUT_STREAMS = ("cpu", "meta", "mps")  # torch has none for MPS
_HIGH = -1  # a priority


def kind() -> str | None:
    """The type of the accelerators that this torch was made for, whether there are any or not; None where it has none that
    works as described above."""
    found = torch.accelerator.current_accelerator()
    return None if found is None or found.type in _WITHOUT_STREAMS else found.type


def count() -> int:
    """How many accelerators this process can see."""
    return torch.accelerator.device_count() if kind() is not None else 0


def choose(index: int) -> torch.device:
    """Makes an accelerator the current one of this thread."""
    torch.accelerator.set_device_index(index)
    return torch.device(cast("str", kind()), index)


# --- the CPU, which has nothing to wait for --------------------------------------------------------------------------


class Mark:
    """A place in the order of what was queued. This one was always passed."""

    def is_over(self) -> bool:
        """Whether all before it is done."""
        return True

    def wait(self) -> None:
        """Has the current streams of this thread wait for it. The processor does not wait."""

    def synchronize(self) -> None:
        """Waits for it."""

    def seconds_until(self, later: "Mark") -> float:  # noqa: ARG002
        """The time from here to a later mark. Both are timed, and over."""
        return 0.0


class _Moment(Mark):
    def __init__(self) -> None:
        self._time = time.perf_counter()

    def seconds_until(self, later: Mark) -> float:
        return cast("_Moment", later)._time - self._time


class Streams:
    """Streams that work is queued in, one for each device. These are the CPU's, where nothing is queued."""

    is_async = False

    def follow(self, mark: Mark | None = None) -> None:
        """What is queued here from now on comes after a mark; by default, after all that the current streams were given."""

    def lead(self) -> None:
        """What the current streams are given from now on comes after all that was queued here."""

    def mark(self) -> Mark:
        """A mark behind all that was queued here."""
        return NOTHING

    def adopt(self) -> None:
        """Makes their device the current one of this thread, which is ours."""

    def within(self) -> contextlib.AbstractContextManager[Any]:
        """The time in which they are the current streams of this thread."""
        return contextlib.nullcontext()

    def each(self, values: Iterator[T]) -> Iterator[T]:
        """The values, each of which is made within these streams, in whatever thread."""
        return values

    def calling(self, function: Callable[[T], R]) -> Callable[[T], R]:
        """A function that calls another one within these streams, in whatever thread."""
        return function


class Device:
    """A device. This is the CPU, or one without streams."""

    is_async = False
    """Whether calls return before their work is done, and copy twice as fast from and to pinned memory."""

    def mark(self, *, timed: bool = False) -> Mark:
        """A mark behind all that the current stream was given."""
        return _Moment() if timed else NOTHING

    def is_capturing(self) -> bool:
        """Whether the current stream notes down what it is given, for a graph that does it again."""
        return False

    def host_memory(self, size_bytes: int) -> torch.Tensor:
        """Memory of the host, pinned where that is worth it. Its content is whatever it was."""
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu")

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy between the device and the host, or on the device."""
        target.copy_(source)

    def copy_each(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """Queues copies on the device."""
        torch._foreach_copy_([*targets], [*sources])

    def random_state(self) -> torch.Tensor | None:
        """The state of its own generator; None where it has none besides the process's."""
        return None

    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Sets its own generator, where there is one and the state is one."""

    def seed(self, seed: int) -> None:
        """Seeds its own generator."""

    def state_of_seed(self, seed: int) -> torch.Tensor | None:  # noqa: ARG002
        """The state that ``seed`` gives its own generator, which is not touched."""
        return None


NOTHING = Mark()
_NO_STREAMS = Streams()


# --- an accelerator --------------------------------------------------------------------------------------------------


class Interface:
    """What an accelerator asks of torch. The tests have another one, where all is as late, or as early, as is allowed."""

    Stream: Any = torch.Stream
    Event: Any = torch.Event
    current_stream: Any = staticmethod(torch.accelerator.current_stream)
    set_stream: Any = staticmethod(torch.accelerator.set_stream)
    set_device_index: Any = staticmethod(torch.accelerator.set_device_index)
    device_index: Any = torch.accelerator.device_index
    copy_each: Any = staticmethod(torch._foreach_copy_)

    @staticmethod
    def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    @staticmethod
    def host_memory(size_bytes: int) -> torch.Tensor:
        return torch.empty(size_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


class _Events(Mark):
    """An event in each of some streams."""

    def __init__(self, interface: Any, streams: Sequence[Any], *, timed: bool = False) -> None:
        self._interface = interface
        self.events: list[tuple[Any, torch.device]] = []
        for stream in streams:
            event = interface.Event(stream.device, enable_timing=timed)
            event.record(stream)
            self.events.append((event, stream.device))

    def is_over(self) -> bool:
        return all(event.query() for event, _ in self.events)

    def wait(self) -> None:
        for event, device in self.events:
            self._interface.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        for event, _ in self.events:
            event.synchronize()

    def seconds_until(self, later: Mark) -> float:
        pairs = zip(self.events, cast("_Events", later).events, strict=True)
        return float(max(begin.elapsed_time(end) / 1000 for (begin, _), (end, _) in pairs))


class _Streams(Streams):
    is_async = True

    def __init__(self, interface: Any, streams: Sequence[Any]) -> None:
        self._interface, self._streams = interface, streams

    def follow(self, mark: Mark | None = None) -> None:
        for stream in self._streams:
            if mark is None:
                stream.wait_stream(self._interface.current_stream(stream.device))
            elif isinstance(mark, _Events):
                for event, _ in mark.events:
                    stream.wait_event(event)

    def lead(self) -> None:
        for stream in self._streams:
            self._interface.current_stream(stream.device).wait_stream(stream)

    def mark(self) -> Mark:
        return _Events(self._interface, self._streams)

    def adopt(self) -> None:
        self._interface.set_device_index(self._streams[0].device.index)

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        before = [self._interface.current_stream(stream.device) for stream in self._streams]
        with self._interface.device_index(self._streams[0].device.index):
            for stream in reversed(self._streams):  # each makes its device the current one
                self._interface.set_stream(stream)
            try:
                yield
            finally:
                for stream in before:
                    self._interface.set_stream(stream)

    def each(self, values: Iterator[T]) -> Iterator[T]:
        end = object()
        while True:
            with self.within():
                value = next(values, end)
            if value is end:
                return
            yield cast("T", value)

    def calling(self, function: Callable[[T], R]) -> Callable[[T], R]:
        def call(item: T) -> R:
            with self.within():
                return function(item)

        return call


def _captures(stream: Any) -> bool:
    """Whether a graph is made of what a stream is given."""
    if (asks := getattr(stream, "is_capturing", None)) is not None:  # since torch 2.13
        return bool(asks())
    return stream.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Accelerator(Device):
    is_async = True

    def __init__(self, device: torch.device, interface: Any = Interface) -> None:
        self._device, self.interface = device, interface
        self._beside: dict[str, Any] = {}

    def current(self) -> Any:
        """The current stream of this thread."""
        return self.interface.current_stream(self._device)

    def beside(self, purpose: str) -> Any:
        """The stream of a purpose."""
        if (found := self._beside.get(purpose)) is None:
            found = self._beside.setdefault(purpose, self.interface.Stream(self._device, priority=_HIGH))
        return found

    def mark(self, *, timed: bool = False) -> Mark:
        stream = self.current()
        if timed and _captures(stream):  # its events tell no time
            return NOTHING
        return _Events(self.interface, [stream], timed=timed)

    def is_capturing(self) -> bool:
        return _captures(self.current())

    def host_memory(self, size_bytes: int) -> torch.Tensor:
        return cast("torch.Tensor", self.interface.host_memory(size_bytes))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.interface.copy(target, source)

    def copy_each(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self.interface.copy_each(targets, sources)

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self._device)

    def random_state(self) -> torch.Tensor | None:
        return cast("torch.Tensor", self._module.get_rng_state(self._device))

    def set_random_state(self, state: torch.Tensor | None) -> None:
        if state is not None:
            self._module.set_rng_state(state, self._device)

    def seed(self, seed: int) -> None:
        self._module.default_generators[self._device.index].manual_seed(seed)  # manual_seed() of the module takes far longer

    def state_of_seed(self, seed: int) -> torch.Tensor | None:
        return torch.Generator(device=self._device).manual_seed(seed).get_state()


# --- which is which --------------------------------------------------------------------------------------------------

KNOWN: dict[torch.device, Device] = {torch.device("cpu"): Device()}  # those that were asked for


def of(device: torch.device) -> Device:
    """What a device of torch's is for us."""
    if (found := KNOWN.get(device)) is None:
        if cast("int | None", device.index) is None and device.type == kind():  # which is another one in another thread
            return of(torch.device(device.type, torch.accelerator.current_device_index()))
        found = KNOWN.setdefault(device, Accelerator(device) if device.type == kind() else Device())
    return found


def beside(devices: Iterable[torch.device], purpose: str) -> Streams:
    """The streams of a purpose, on those of the devices that have streams."""
    return _streams(devices, lambda each: each.beside(purpose))


def here(devices: Iterable[torch.device]) -> Streams:
    """The current streams of this thread, to be taken along into others."""
    return _streams(devices, Accelerator.current)


def _streams(devices: Iterable[torch.device], stream_of: Callable[[Accelerator], Any]) -> Streams:
    found = [each for each in map(of, dict.fromkeys(devices)) if isinstance(each, Accelerator)]
    return _Streams(found[0].interface, [*map(stream_of, found)]) if found else _NO_STREAMS
