"""``harness launch``: stock torchrun with what must be set, and exit codes that say what to do next."""

import os
import signal
import time

import pytest
from cluster import hears, launch, newest, wait_until
from metadata_server import MetadataServer

from harness.launch import command

LAUNCH = ("-m", "harness", "launch", "--nproc-per-node=2", "--", "train")

SLOW = """
import dataclasses
import time
import harness.tasks.linear

def build():
    task = harness.tasks.linear.build()
    def slow(model, batch):
        print("in a step", flush=True)
        time.sleep(60)
        return task.loss(model, batch)
    return dataclasses.replace(task, loss=slow)
"""
DEAF = """
import time

print("here", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""


def config(steps: int) -> dict:
    """A run that is quick, and that does not end by itself while a test looks on."""
    return {
        "task": "harness.tasks.linear:build",
        "train": {"steps": steps, "global_batch_size": 4},
        "checkpoint": {"url": "run"},
        "log": {"every_steps": 50, "jsonl": "log.jsonl"},
    }


def test_the_command_line_gets_only_what_is_missing(monkeypatch):
    """What the user says stands; what torchrun would get wrong by default is added."""
    own = "--max-restarts=3 --shutdown-timeout=60 --standalone --local-addr=localhost --nproc-per-node=auto"
    assert f"{own} -m harness train c.yaml" in " ".join(command([], ["train", "c.yaml"]))
    given = ["--max_restarts=9", "--nnodes=2", "--nproc-per-node=4", "--shutdown-timeout", "5"]
    assert command(given, ["train"])[3:] == [*given, "-m", "harness", "train"]
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    assert command([], ["train"])[3:] == ["--max-restarts=3", "--shutdown-timeout=60", "-m", "harness", "train"]


@pytest.mark.torchrun
def test_a_signal_to_the_launcher_stops_all_ranks_and_asks_for_more(tmp_path):
    """SIGTERM: the ranks stop at one step, that step is saved, the exit code is 75, and the next launch goes on from it."""
    with launch(tmp_path, config(1_000_000), command=LAUNCH) as run:
        run.wait_for("train", step=100)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.finish() == 75
        stopped_at = newest(tmp_path / "run")["step"]
        assert f"asked to stop (SIGTERM) at step {stopped_at}" in run.output()
    with launch(tmp_path, config(stopped_at + 10), command=LAUNCH) as run:
        assert run.wait_for("resume", attempt=2)["step"] == stopped_at
        run.succeed()


@pytest.mark.torchrun
def test_a_mistake_is_not_tried_again(tmp_path):
    """A configuration that cannot work ends the launch with its own code, with restarts left and unused."""
    with launch(tmp_path, {**config(10), "seeed": 1}, command=LAUNCH) as run:
        assert run.finish() == 2
        *said, last = run.output().splitlines()
        assert "\n".join(said).count("seeed: unknown key") <= 2  # by each of two ranks, which were not started again
        assert last.startswith("harness launch: exit code 2: ")
        assert "seeed: unknown key" in last


@pytest.mark.torchrun
def test_a_killed_launcher_leaves_no_orphans(tmp_path):
    """SIGKILL for the launcher ends the agent, and that ends the ranks."""
    with launch(tmp_path, config(1_000_000), command=LAUNCH) as run:
        run.wait_for("train", step=50)
        run.process.kill()
        wait_until(lambda: not run.processes(), "the end of all processes of the run", seconds=10)


def test_a_notice_of_the_cloud_stops_the_run(tmp_path):
    """The metadata service says that the machine goes: the step is saved, and the exit code asks for a new start."""
    with MetadataServer() as server:
        watched = {**config(1_000_000), "preemption": {"watch": "gcp", "base_url": server.url}}
        with launch(tmp_path, watched) as run:
            run.wait_for("train", step=100)
            server.set_gcp("preempted", "TRUE")
            assert run.finish() == 75
            assert f"at step {newest(tmp_path / 'run')['step']}, which is saved" in run.output()


def test_an_interrupt_while_torchrun_starts(tmp_path):
    """Python raises it in the middle of the imports, where it may be swallowed; it ends the launch all the same."""
    replaced = f"harness.launch.command = lambda *_: [sys.executable, '-c', {DEAF!r}]"
    script = f"import sys, harness.launch; {replaced}; sys.exit(harness.launch.launch([], []))"
    with launch(tmp_path, None, command=("-c", script)) as run:
        run.wait(lambda: "here" in run.output(), "the agent")
        wait_until(lambda: hears(run.process.pid), "the launcher to listen")
        os.kill(run.process.pid, signal.SIGINT)
        assert run.finish(seconds=10) == 75


@pytest.mark.torchrun
def test_a_second_interrupt_does_not_wait(tmp_path):
    """Of ^C and ^C again: the ranks are ended in the middle of a step, and nothing of it is saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    with launch(tmp_path, {**config(10), "task": "slow.py:build"}, command=LAUNCH) as run:
        run.wait(lambda: run.output().count("in a step") == 2, "the first step")
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(1)
        assert len(run.workers()) == 2
        os.kill(run.process.pid, signal.SIGINT)
        assert run.finish(seconds=10) == 130
        wait_until(lambda: not run.processes(), "the end of all processes of the run", seconds=10)
