"""A process in which nothing goes on writes its stacks and ends, whatever it hangs in."""

import subprocess
import sys

import pytest

HEAD = """
import ctypes, os, threading, time
from harness.runtime import watchdog
watchdog._LAST_RESORT_SECONDS = 1.0
reports = []
def report(stacks):
    print("REPORTED", "culprit" in stacks, flush=True)
dog = watchdog.Watchdog({timeout}, {first}, report, lambda: os._exit(1))
def culprit():
    {body}
culprit()
"""


def run(body: str, *, timeout: float = 0.3, first: float = 0.3) -> subprocess.CompletedProcess[str]:
    """A program that is watched while it does something."""
    program = HEAD.format(body=body, timeout=timeout, first=first)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("body", ["threading.Event().wait()", "ctypes.CDLL(None).sleep(60)"])
def test_a_hang_is_reported_and_ended(body):
    """Waiting for ever, in Python or in C: the stacks name the function, and the process leaves with code 1."""
    ended = run(body)
    assert ended.returncode == 1
    assert "REPORTED True" in ended.stdout
    assert "in culprit" in ended.stderr


def test_a_hang_that_keeps_the_interpreter_lock_is_ended_all_the_same():
    """No Python thread runs then; the timer in C writes the stacks and leaves."""
    ended = run("ctypes.PyDLL(None).sleep(60)")  # PyDLL: the lock is kept during the call
    assert ended.returncode == 1
    assert "REPORTED" not in ended.stdout
    assert "in culprit" in ended.stderr


def test_steps_keep_the_watchdog_quiet():
    """A process that goes on stepping is left alone much longer than the time of a step, and so is one that is done."""
    body = "[(dog.step(), time.sleep(0.05)) for _ in range(20)]; dog.stop(); time.sleep(0.6); print('ALIVE')"
    ended = run(body, timeout=0.4)
    assert (ended.returncode, ended.stdout.split()) == (0, ["ALIVE"])


def test_the_first_step_has_a_time_of_its_own():
    """The first limit holds until the first step has ended, the other one from then on."""
    body = "time.sleep(0.5); print('PATIENT', flush=True); dog.step(); time.sleep(60)"
    ended = run(body, timeout=0.2, first=20)
    assert ended.returncode == 1
    assert ended.stdout.split() == ["PATIENT", "REPORTED", "True"]
