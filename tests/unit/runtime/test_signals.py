"""A signal is remembered, acted upon at a step boundary, and the process is gone in time."""

import contextlib
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from harness.runtime.signals import STOP_SIGNALS, StopRequest, deaf_children
from tests.support.cluster import CONTAINER, PATIENCE_SECONDS, alive, wait_until


@pytest.fixture
def stop():
    """A request that listens in this process, and leaves it as it was."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.listen()
    yield request
    request.close()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
    assert signal.set_wakeup_fd(-1) == -1


def asked(stop: StopRequest) -> threading.Event:
    """Is set when the thread that listens hears of a signal."""
    heard = threading.Event()
    stop.when_asked(lambda _over: heard.set())
    return heard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_remembered_by_its_name(stop, number):
    """Whatever a launcher uses; nothing else happens."""
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    assert stop.reason == signal.Signals(number).name


def test_a_second_interrupt_interrupts(stop):
    """Who presses ^C twice does not want to wait for a step."""
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_notice_may_be_given_twice(stop):
    """A launcher that repeats its SIGTERM changes nothing."""
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "SIGTERM"


def test_the_thread_hears_the_first_signal(stop):
    """And nothing before it."""
    heard = asked(stop)
    assert not heard.wait(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.wait(PATIENCE_SECONDS)


def test_a_signal_that_came_early_counts(stop):
    """Also one that came before there was a thread."""
    os.kill(os.getpid(), signal.SIGTERM)
    assert asked(stop).wait(PATIENCE_SECONDS)


def test_a_handler_of_the_program_wins(stop):
    """One that was installed later, to dump the stacks, say: no stop was asked for. Nor is it replaced afterwards."""
    heard = asked(stop)
    called = []
    own = lambda number, _frame: called.append(number)
    signal.signal(signal.SIGUSR1, own)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not heard.wait(1.3)
        assert (called, stop.reason) == ([signal.SIGUSR1], "")
        stop.close()
        assert signal.getsignal(signal.SIGUSR1) == own
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def pipes() -> set[str]:
    """The pipes and sockets that this process has open."""
    found = set()
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself, or it has just been closed
            found.add(os.readlink(file))
    return {name for name in found if name.startswith(("pipe:", "socket:"))}


def test_handlers_end_with_whoever_listens():
    """What was there before is back, the request is forgotten, and no thread and no pipe is left of it."""
    threads, before = set(threading.enumerate()), pipes()  # others of this process may end and be closed meanwhile
    for _ in range(3):
        request = StopRequest()
        request.listen()
        heard = asked(request)
        request.close()
        request.close()
        assert not heard.is_set()
        wait_until(lambda: threads.issuperset(threading.enumerate()), "the thread to end", 10)
    assert pipes() <= before
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


# --- children --------------------------------------------------------------------------------------------------------


def in_child(do) -> int:
    """The exit status of a forked child that does something, after a signal to it if it waits for one."""
    if not (child := os.fork()):
        os._exit(do() or 0)
    return child


def test_a_child_can_be_ended(stop):
    """It is as if nobody listened there, from its first moment on, and the parent takes no notice of its signals."""
    heard = asked(stop)
    for _ in range(20):
        child = in_child(lambda: time.sleep(60))
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which it ends while its processes are busy
        pool.map_async(time.sleep, [60, 60])
    assert not heard.wait(0.3)
    assert not stop


def test_a_notice_does_not_end_a_child(stop):
    """Slurm sends it to every process, and only the trainer understands it."""
    child = in_child(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert os.waitpid(child, 0)[1] == 0


def test_a_child_may_be_deaf(stop):
    """A loader's worker, in the moment before it can say so itself."""
    with deaf_children():
        child = in_child(lambda: [os.kill(os.getpid(), number) for number in STOP_SIGNALS] and 0)
    assert os.waitpid(child, 0)[1] == 0
    child = in_child(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert os.waitpid(child, 0)[1] == signal.SIGHUP


HANGS = """\
import ctypes
from harness.training.program import Program
program = Program().__enter__()
program.grace_seconds = 0.1
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
print("hanging", flush=True)
libc.pthread_mutex_lock(mutex)
"""


def test_a_main_thread_that_hangs_is_no_obstacle():
    """A call into C that never returns, as a collective without its peer is, ends with the grace."""
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline() == b"hanging\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 75


PARENT = '''\
import os, subprocess, sys, time
child = """
import time
from pathlib import Path
from harness.runtime.signals import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(1000)
"""
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
print(process.pid if process.stdout.readline() else 0, flush=True)
time.sleep(1000)
'''


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux ties a process's life to its parent's")
def test_a_process_dies_with_its_parent():
    """However the parent ends."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        assert alive(child)
        process.kill()
        wait_until(lambda: not alive(child), "the child to die")


def in_container(*command: str) -> int:
    """The exit code of a command that is process 1."""
    return subprocess.run([*CONTAINER, *command], check=False, capture_output=True).returncode


@pytest.mark.skipif(
    shutil.which("unshare") is None or in_container("true"), reason="needs unshare, and leave to make namespaces"
)
def test_process_1_of_a_container_is_a_parent_like_any_other():
    """The launcher may be process 1. One whose parent is a process 1 that is no launcher has lost its own."""
    with subprocess.Popen([*CONTAINER, sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as process:
        assert int(process.stdout.readline()) > 0
        process.kill()
    child = (
        f"{shlex.quote(sys.executable)} -c 'from harness.runtime.signals import die_with_parent; die_with_parent()'; exit $?"
    )
    assert in_container("sh", "-c", child) == 128 + signal.SIGKILL
