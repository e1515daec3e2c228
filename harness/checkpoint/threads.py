"""Work in other threads: a call beside the caller, and one call for each of many items."""

import os
import threading
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

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
