"""Work in other threads: a call beside the caller, calls that wait for their turn, one call, or two, for each of many
items."""

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
_WORTH_THREADS_BYTES = 32 << 20


class Background(threading.Thread, Generic[T]):
    """A call in another thread, begun at once. It cannot be cancelled, and holds up nobody's exit."""

    def __init__(self, function: Callable[[], T], name: str = "harness-worker") -> None:
        super().__init__(name=name, daemon=True)
        self.function = function
        self.results: list[T] = []
        self.failure: BaseException | None = None
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


def threads_for(size_bytes: int) -> int:
    """How many threads are worth starting to read or hash so much."""
    return _THREADS if size_bytes >= _WORTH_THREADS_BYTES else 1


def in_threads(count: int, function: Callable[[Item], T], items: Iterable[Item]) -> list[T]:
    """What a function makes of each item, in order, by so many threads. After an error no further item is begun."""
    return list(in_order(count, function, items))


def in_order(
    count: int,
    function: Callable[[Item], T],
    items: Iterable[Item],
    *,
    ahead: int | None = None,
    waits: bool = False,
) -> Iterator[T]:
    """What a function makes of each item, each as soon as those before it have been given, by so many threads.

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


def in_turns(count: int, first: Callable[[Item], object], then: Callable[[Item], object], items: Iterable[Item]) -> None:
    """Calls ``first`` with each item, by so many threads side by side, and ``then`` with each in order, one at a time.

    The caller is one of the threads. None waits for another one's turn: ``then`` is called by the thread that finds that an
    item can have it, most often the one that has called ``first``, in the cache of whose core things still are. No item is
    begun after an error, which is raised here; what another thread is in the middle of then is left behind.
    """
    if count == 1:
        for item in items:
            first(item)
            then(item)
        return
    turns = _Turns(first, then, items)
    for _ in range(count - 1):
        Background(turns.take)
    turns.take()
    failure = turns.outcome()
    del turns
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # with this frame it would be a circle, and keep what the calls held until the next collection


class _Turns(Generic[Item]):
    """The items of ``in_turns``, and how far they are."""

    def __init__(self, first: Callable[[Item], object], then: Callable[[Item], object], items: Iterable[Item]) -> None:
        self._first, self._then = first, then
        self._items = enumerate(items)
        self._ready: dict[int, Item] = {}  # for ``then``, by number
        self._begun = self._done = 0
        self._is_taken = False  # the turn, by one of the threads
        self._is_over = False  # something has failed
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def take(self) -> None:
        """What each of the threads does, until no item is left or something has failed."""
        try:
            while (mine := self._next()) is not None:
                number, item = mine
                self._first(item)
                self._ready[number] = item  # before it asks for the turn: who has that looks here again when it ends it
                while self._begin_turn():
                    self._then(self._ready.pop(self._done))
                    self._end_turn()
        except BaseException as error:  # handed to the caller, whatever it is
            with self._changed:
                if not self._is_over:
                    self._is_over, self._failure = True, error
                self._changed.notify_all()

    def _next(self) -> tuple[int, Item] | None:
        with self._changed:
            mine = None if self._is_over else next(self._items, None)
            self._begun += mine is not None
            return mine

    def _begin_turn(self) -> bool:
        """Whether there is an item whose turn it is, and nobody at it."""
        with self._changed:
            can_begin = not (self._is_over or self._is_taken) and self._done in self._ready
            self._is_taken = self._is_taken or can_begin
            return can_begin

    def _end_turn(self) -> None:
        with self._changed:
            self._done, self._is_taken = self._done + 1, False
            self._changed.notify_all()

    def outcome(self) -> BaseException | None:
        """The first error, or None when all items are done. Forgets it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._done == self._begun)
        failure, self._failure = self._failure, None
        return failure
