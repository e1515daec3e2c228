"""The agent looks after its ranks: real processes, which die and are suspended."""

import os
import signal
import subprocess
import time

import pytest

from harness.launcher.watch import Watch
from tests.support.cluster import alive, wait_until


@pytest.fixture
def ranks():
    """Two processes, by the number of their rank."""
    processes = {rank: subprocess.Popen(["sleep", "600"]) for rank in (0, 1)}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def pids(ranks):
    return {rank: process.pid for rank, process in ranks.items()}


def test_a_death_ends_the_wait(ranks):
    """Once: one that has ended well leaves the others in peace, and is not looked at again."""
    watch = Watch(0, print)
    began = time.monotonic()
    watch.wait(pids(ranks), 0.05)
    assert time.monotonic() - began > 0.04
    ranks[1].kill()
    began = time.monotonic()
    watch.wait(pids(ranks), 60)
    assert time.monotonic() - began < 30
    began = time.monotonic()
    watch.wait(pids(ranks), 0.1)
    assert time.monotonic() - began > 0.08
    ranks[1].wait()
    ranks[1] = subprocess.Popen(["sleep", "600"])  # the next start
    ranks[1].kill()
    watch.wait(pids(ranks), 60)


def suspend(process):
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)


def test_a_rank_that_is_suspended_is_told_of_and_killed(ranks, monkeypatch):
    """After the time that was given; nobody else is."""
    monkeypatch.setattr("harness.launcher.watch.LOOK_SECONDS", 0.01)
    said = []
    watch = Watch(0.1, said.append)
    suspend(ranks[1])
    began = time.monotonic()
    while alive(ranks[1].pid):
        watch.wait(pids(ranks), 0.005)
    assert time.monotonic() - began > 0.09
    (line,) = said
    assert line.startswith(
        f"rank 1 is suspended (SIGSTOP, process {ranks[1].pid}), and the others wait for it; it is killed"
    )
    assert watch.ended.keys() == {1}
    assert ranks[1].wait() == -signal.SIGKILL
    assert alive(ranks[0].pid)


def test_a_rank_that_goes_on_is_left_alone(ranks, monkeypatch):
    """Its time begins anew. So it does for a whole job that was suspended: this process has not run meanwhile."""
    monkeypatch.setattr("harness.launcher.watch.LOOK_SECONDS", 0.01)
    said = []
    watch = Watch(0.2, said.append)
    for rank in (0, 1):
        suspend(ranks[rank])
        wait_until(lambda rank=rank: watch.wait(pids(ranks), 0.01) or len(said) == rank + 1, "a word of it")
        time.sleep(0.3)  # this process is suspended, too
        watch.wait(pids(ranks), 0)
        ranks[rank].send_signal(signal.SIGCONT)
        wait_until(lambda rank=rank: watch.wait(pids(ranks), 0.02) or not watch.suspended, "its end")
    assert all(alive(pid) for pid in pids(ranks).values())
    assert watch.ended == {}
