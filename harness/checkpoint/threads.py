"""Work in other threads: a call beside the caller, one call for each of many items, calls one after the other."""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
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
    """A thread that is kept for one call after the other, and holds up nobody's exit.

    To start a thread is to wait until it has had its turn: milliseconds, now and then, where all cores are busy.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] | None = None  # None: nothing more comes

    def begin(self, function: Callable[[], T]) -> "Future[T]":
        """Has a function called when those before it have returned."""
        if self._calls is None:
            self._calls = SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._calls.put, None)
        future: Future[T] = Future()
        self._calls.put((future, function))
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
    if count == 1:
        return [function(item) for item in items]
    every = list(items)
    coming = iter(enumerate(every))
    results: dict[int, T] = {}
    failures: list[Item] = []

    def work() -> None:
        for index, item in coming:
            if failures:
                return
            try:
                results[index] = function(item)
            except BaseException:
                failures.append(item)
                raise

    workers = [Background(work) for _ in range(min(count, len(every)))]
    for worker in workers:
        worker.join()
    for worker in workers:
        worker.result()
    return [results[index] for index in range(len(every))]
