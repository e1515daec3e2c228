"""A signal is remembered, acted upon at a step boundary, and the process is gone in time."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from cluster import CONTAINER, PATIENCE_SECONDS, alive, wait_until

from harness.signals import STOP_SIGNALS, StopRequest


@pytest.fixture
def stop():
    """A request that listens in this process, whose handlers are put back afterwards."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    request = StopRequest()
    request.listen()
    yield request
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_nobody_leaves_without_a_signal(stop):
    """The grace begins with the first signal, and ends with the call."""
    left = threading.Event()
    stop.leave_in_time(0.05, left.set)
    assert not left.wait(0.3)
    os.kill(os.getpid(), signal.SIGTERM)
    assert left.wait(PATIENCE_SECONDS)


def test_a_signal_that_came_early_counts(stop):
    """Also one that came before anybody could say how long the grace is: while torch was being imported."""
    left = threading.Event()
    os.kill(os.getpid(), signal.SIGTERM)
    stop.leave_in_time(0.05, left.set)
    assert left.wait(10)


HANGS = """\
import ctypes
from harness.signals import StopRequest
from harness.world import leave_at_once
stop = StopRequest()
stop.listen()
stop.leave_in_time(0.1, lambda: leave_at_once(75))
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
from harness.signals import die_with_parent
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
    child = f"{shlex.quote(sys.executable)} -c 'from harness.signals import die_with_parent; die_with_parent()'; exit $?"
    assert in_container("sh", "-c", child) == 128 + signal.SIGKILL
