"""Work in other threads."""

import gc
import subprocess
import sys
import threading
import time

import pytest

from harness.checkpoint.threads import Worker


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


def test_it_holds_up_nobodys_exit():
    """A call that hangs ends with the program."""
    program = "import time; from harness.checkpoint.threads import Worker; w = Worker('x'); w.begin(lambda: time.sleep(60))"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)
    assert time.monotonic() - began < 30
