"""Work in other threads."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from harness.runtime.threads import InTurn, Worker, in_order, side_by_side


def test_a_worker_makes_one_call_after_the_other():
    """In one thread, in order, whatever some of them raise."""
    worker, seen = Worker("kept"), []

    def call(number: int) -> int:
        time.sleep(0.02)
        seen.append((number, threading.current_thread().name))
        return 10 // number

    coming = [worker.begin(lambda number=number: call(number)) for number in (5, 0, 2)]
    assert coming[0].result() == 2
    with pytest.raises(ZeroDivisionError):
        coming[1].result()
    assert coming[2].result() == 5
    assert seen == [(5, "kept"), (0, "kept"), (2, "kept")]


def test_its_thread_ends_when_nobody_has_the_worker_any_more():
    """A run that rolls back has a new saver each time."""
    worker = Worker("to end")
    worker.begin(lambda: None).result()
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "to end"]
    del worker
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_several_threads_of_a_worker_take_what_comes():
    """A call that takes long holds up nothing but itself, and all threads end with the worker."""
    worker, go_on = Worker("several", threads=2), threading.Event()
    long = worker.begin(lambda: go_on.wait(30))
    assert [worker.begin(lambda number=number: number).result(30) for number in range(5)] == [*range(5)]
    go_on.set()
    assert long.result(30)
    threads = [thread for thread in threading.enumerate() if thread.name == "several"]
    assert len(threads) == 2
    del worker
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_call_that_hangs_does_not_hold_up_the_exit():
    """A call that hangs ends with the program."""
    program = "import time; from harness.runtime.threads import Worker; w = Worker('x'); w.begin(lambda: time.sleep(60))"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
    assert time.monotonic() - began < 30


# --- one call for each of many ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_results_come_in_the_order_of_the_items(count):
    def late(number: int) -> int:
        time.sleep(0.02 * (number % 3 == 0))
        return number * number

    assert list(in_order(count, late, range(20), ahead=5)) == [number * number for number in range(20)]


def test_threads_do_not_run_too_far_ahead():
    """So much memory, and no more, holds what nobody has asked for yet."""
    begun, done = [], threading.Semaphore(0)

    def call(number: int) -> int:
        begun.append(number)
        done.release()
        return number

    coming = in_order(2, call, range(100), ahead=4)
    assert next(coming) == 0
    for _ in range(4):
        assert done.acquire(timeout=30)
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2, 3]
    assert next(coming) == 1
    assert done.acquire(timeout=30)
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("waits", [False, True])
def test_nothing_is_begun_after_an_error(waits):
    """What is under way is waited for where that matters: a part of an upload that arrives after the abort would stay."""
    begun, ended, all_begun = [], [], threading.Barrier(3, timeout=30)

    def call(number: int) -> None:
        begun.append(number)
        all_begun.wait()
        if number == 1:
            raise ZeroDivisionError
        time.sleep(0.2 + 0.2 * number)  # the first one, too, ends after the error
        ended.append(number)

    with pytest.raises(ZeroDivisionError):
        list(in_order(3, call, range(20), waits=waits))
    assert ended == ([0, 2] if waits else [0])
    time.sleep(0.5)
    assert sorted(begun) == [0, 1, 2]


def test_a_later_error_comes_in_its_turn():
    """What is before it has been begun, and is given."""

    def call(number: int) -> int:
        if number == 2:
            raise ZeroDivisionError
        time.sleep(0.2)
        return number

    coming = in_order(3, call, range(20))
    assert [next(coming), next(coming)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(coming)


def test_an_error_of_the_items_own_ends_it():
    def items():
        yield 1
        yield 2
        raise ZeroDivisionError

    coming = in_order(2, lambda number: number, items(), ahead=2)
    assert next(coming) == 1
    with pytest.raises(ZeroDivisionError):
        list(coming)


def test_who_asks_for_no_more_leaves_no_thread_behind():
    own, all_at_it = set(), threading.Barrier(4)

    def call(number: int) -> int:
        own.add(threading.current_thread())
        if number < 4:
            all_at_it.wait(10)
        return number

    coming = in_order(4, call, range(1000), ahead=8)
    assert next(coming) == 0
    coming.close()
    gc.collect()
    assert len(own) == 4
    for thread in own:
        thread.join(10)
    assert not any(thread.is_alive() for thread in own)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_side_by_side_each_item_is_taken_once(count):
    """The caller takes its part."""
    taken: list[tuple[int, str]] = []

    def take(number: int) -> None:
        time.sleep(0.002)
        taken.append((number, threading.current_thread().name))

    side_by_side(count, take, range(60))
    assert sorted(number for number, _ in taken) == [*range(60)]
    assert len({name for _, name in taken}) <= count
    assert threading.current_thread().name in {name for _, name in taken}


@pytest.mark.parametrize("failing", [0, 1])
def test_side_by_side_nothing_is_begun_after_an_error(failing):
    """Whichever thread has it; what is under way is waited for, since it may write into memory of the caller's."""
    begun, ended, all_begun = [], [], threading.Barrier(2, timeout=30)

    def call(number: int) -> None:
        begun.append(number)
        all_begun.wait()
        if number == failing:
            raise ZeroDivisionError
        time.sleep(0.2)
        ended.append(number)

    with pytest.raises(ZeroDivisionError):
        side_by_side(2, call, range(20))
    assert sorted(begun) == [0, 1]
    assert ended == [1 - failing]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_in_turn_items_are_taken_in_order_one_at_a_time(count):
    """Whichever thread is ahead: what is early is kept, and none is lost when all are there."""
    taken, at_it = [], []

    def take(number: int) -> None:
        at_it.append(number)
        time.sleep(0.002 * (number % 4 == 0))
        assert at_it == [number]
        taken.append(at_it.pop())

    turn = InTurn(take)

    def bring(number: int) -> None:
        time.sleep(0.002 * (number % 3 == 0))
        turn.bring(number, number)

    assert len(list(in_order(count, bring, range(60)))) == 60
    assert taken == [*range(60)]


def test_who_is_early_does_not_wait_for_its_turn():
    taken: list[str] = []
    turn = InTurn(taken.append)
    turn.bring(1, "second")
    assert taken == []
    turn.bring(0, "first")
    assert taken == ["first", "second"]


@pytest.mark.parametrize(
    "calls", [lambda call: list(in_order(2, call, range(10), ahead=4)), lambda call: side_by_side(2, call, range(10))]
)
def test_what_the_calls_of_one_that_failed_held_is_free_at_once(calls):
    """A corrupt checkpoint may be as large as the next one that is tried: it does not wait for the garbage collector."""

    class Memory:
        pass

    def fails() -> weakref.ref[Memory]:
        held = Memory()

        def begin(number: int, _held: Memory = held) -> None:
            if number == 3:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            calls(begin)
        return weakref.ref(held)

    gc.disable()
    try:
        reference = fails()
        for thread in threading.enumerate():
            if thread.name == "harness-worker":
                thread.join(10)
        assert reference() is None
    finally:
        gc.enable()
