"""Work in other threads: a call beside the caller, one call after the other, one call for each of many items."""

import concurrent.futures
import functools
import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")

_THREADS = min(4, os.cpu_count() or 1)  # more read and hash no faster than memory is
WORTH_THREADS_BYTES = 32 << 20


class Background(threading.Thread, Generic[T]):
    """A call in another thread, begun at once. It cannot be cancelled, and holds up nobody's exit."""

    def __init__(self, function: Callable[[], T], name: str = "harness-worker") -> None:
        super().__init__(name=name, daemon=True)
        self.function = function
        self.results: list[T] = []
        self.failure: BaseException | None = None
        self.left_behind = False  # nobody waits for it any more
        self.start()

    def run(self) -> None:
        try:
            self.results.append(self.function())
        except BaseException as error:  # handed to the caller below, whatever it is
            self.failure = error

    def result(self) -> T:
        """What the call returns, or raises."""
        self.join()
        if self.failure is not None:
            raise self.failure
        return self.results[0]

    def result_within(self, seconds: float) -> T:
        """The same, or ``TimeoutError`` where it takes too long: then it is left behind."""
        try:
            self.join(seconds)
        finally:  # also when the caller was interrupted
            self.left_behind = self.is_alive()
        if self.left_behind:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return self.result()


class Worker:
    """A thread, or several, kept for one call after the other. It holds up nobody's exit.

    To start a thread is to wait until it has had its turn: milliseconds, now and then, where all cores are busy.
    """

    def __init__(self, name: str, threads: int = 1) -> None:
        self._name = name
        self._missing = threads  # each is started for a call
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()  # None: nothing more comes

    def begin(self, function: Callable[[], T]) -> "Future[T]":
        """Has a function called when a thread is done with what came before."""
        future: Future[T] = Future()
        self._calls.put((future, function))
        if self._missing:
            self._missing -= 1
            threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._calls.put, None)
        return future


def _serve(calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (call := calls.get()) is not None:
        future, function = call
        try:
            future.set_result(function())
        except BaseException as error:  # handed to the caller, whatever it is
            future.set_exception(error)
        del call, future, function  # what they hold on to may be as large as the state


class InTurn(Generic[Item]):
    """Calls a function with numbered items in the order of their numbers, from 0, in the threads that bring them.

    No thread waits for its turn: the thread that brings the next item also takes those that came early. So an item is most
    often taken by the thread that has made it, while it is still in the cache of that thread's core.
    """

    def __init__(self, function: Callable[[Item], object]) -> None:
        self._function = function
        self._early: dict[int, Item] = {}
        self._next = 0
        self._turn = threading.Lock()

    def bring(self, number: int, item: Item) -> None:
        """Returns at once where it is not this item's turn."""
        self._early[number] = item
        # Looks again after each release: an item may have come since, brought by a thread that found the turn taken.
        while self._next in self._early and self._turn.acquire(blocking=False):
            try:
                while self._next in self._early:
                    self._function(self._early.pop(self._next))
                    self._next += 1
            finally:
                self._turn.release()


def threads_for(size_bytes: int) -> int:
    """How many threads are worth starting to read or hash so much."""
    return _THREADS if size_bytes >= WORTH_THREADS_BYTES else 1


def in_threads(count: int, function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    """Calls a function on each item in several threads, and returns the results in order. After an error it begins no
    further item."""
    return list(in_order(count, function, items))


def side_by_side(count: int, function: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls a function on each item in several threads, of which the caller's is one. After an error it begins no further
    item, waits for those that are under way, and raises it.

    Each thread takes its next item itself, and one thread less is started than work. To hand each item over, and to wait
    for it, would add a quarter to the time of a restore of 100 MB.
    """
    rest, lock = iter(items), threading.Lock()
    failures: list[BaseException] = []

    def next_item() -> Item | None:
        with lock:
            return None if failures else next(rest, None)

    def take() -> None:
        try:
            while (item := next_item()) is not None:
                function(item)
        except BaseException as error:  # handed to the caller, whatever it is
            failures.append(error)

    others = [Background(take) for _ in range(count - 1)]
    take()
    for other in others:
        other.join()
    try:
        if failures:
            raise failures[0]
    finally:
        failures.clear()  # with this frame it would be a circle, and keep what the calls held until the next collection


def in_order(
    count: int,
    function: Callable[[Item], T],
    items: Iterable[Item],
    *,
    ahead: int | None = None,
    waits: bool = False,
) -> Iterator[T]:
    """Calls a function on each item in several threads, and yields the results in order, each as soon as it is next.

    At most ``ahead`` calls (by default, all) are begun or done and not given yet. None is begun after an error, or when
    nobody asks for more; those that are under way then are left behind, or with ``waits`` waited for. A single thread is
    the caller's own.
    """
    if count == 1:
        yield from map(function, items)
        return
    worker = Worker("harness-worker", count)
    coming: deque[Future[T]] = deque()
    is_over = threading.Event()

    def call(item: Item) -> T:
        if is_over.is_set():
            raise concurrent.futures.CancelledError  # which nobody sees: what has failed comes before it
        try:
            return function(item)
        except BaseException:
            is_over.set()
            raise

    calls = (worker.begin(functools.partial(call, item)) for item in items)
    try:
        coming.extend(itertools.islice(calls, ahead))
        while coming:
            yield coming.popleft().result()
            coming.extend(itertools.islice(calls, 1))
    finally:
        is_over.set()
        if waits:
            concurrent.futures.wait(coming)
