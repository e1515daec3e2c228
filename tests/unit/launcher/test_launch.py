"""``harness launch``: stock torchrun with what must be set, and exit codes that say what to do next."""

import os
import platform
import re
import signal
import tempfile
import time
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.launcher.agent import Restarts, describe_death
from harness.launcher.launch import Own, command, halves
from harness.launcher.launch import launch as start
from tests.support.cluster import Run, harness, hears, launch, newest, wait_until
from tests.support.metadata_server import MetadataServer

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
    assert command(given, ["train"])[4:] == [*given, "-m", "harness", "train"]
    monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    assert command([], ["train"])[4:] == ["--max-restarts=3", "--shutdown-timeout=60", "-m", "harness", "train"]


def last_line(run: Run) -> str:
    return run.output().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "options", "program"),
    [
        ("train c.yaml", "", "train c.yaml"),
        ("--role train -- train c.yaml", "--role train", "train c.yaml"),
        ("--role train train c.yaml", "--role train", "train c.yaml"),
        ("--standalone train c.yaml", "--standalone", "train c.yaml"),
        ("--nproc-per-node=2 -- harness train c.yaml", "--nproc-per-node=2", "train c.yaml"),
        ("-- python script.py --role x", "", "script.py --role x"),
        ("-r 3 -- python3.11 -m module", "-r 3", "-m module"),
        ("--tee 3 -m module -- x", "--tee 3", "-m module -- x"),
        ("--no-python -- python script.py", "--no-python", "python script.py"),
        ("script.py -- x", "", "script.py -- x"),
        ("--verbose script.py --verbose", "--verbose", "script.py --verbose"),
        ("--preload a.b --suspended-seconds=5 script.py", "--preload a.b --suspended-seconds=5", "script.py"),
    ],
)
def test_where_the_program_begins(tmp_path, monkeypatch, arguments, options, program):
    """Not at an option's value; and Python, and harness, need not be named again."""
    monkeypatch.chdir(tmp_path)
    Path("script.py").touch()
    assert halves(arguments.split()) == (options.split(), program.split())


def test_options_that_torchrun_does_not_know():
    """They are taken out of its own, wherever they stand."""
    options = ["--preload=a.b", "--tee", "3", "--preload", "c", "--verbose", "--suspended-seconds", "5", "--role", "x"]
    assert Own.of(options) == (Own(True, ("a.b", "c"), 5.0), ["--tee", "3", "--role", "x"])
    assert Own.of([]) == (Own(False, (), 60.0), [])
    for wrong in (["--suspended-seconds=-1"], ["--suspended-seconds=soon"], ["--suspended-seconds", "nan"]):
        with pytest.raises(ConfigError, match=r"--suspended-seconds: expected seconds \(0: never\), found"):
            Own.of(wrong)
    with pytest.raises(ConfigError, match="--preload: expected a value, found none"):
        Own.of(["--preload"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "found no program"),
        (("--nproc-per-node=2", "--"), "found no program"),
        (("--", "ls", "url"), "found 'ls'"),
        (("2", "--", "train", "c.yaml"), "found '2'"),
        (("--", "none.py"), "there is no file 'none.py'"),
    ],
)
def test_what_is_no_program(arguments, words):
    """One line that says what is."""
    done = harness("launch", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "harness: harness launch: expected [torchrun options] -- train CONFIG.yaml, doctor CONFIG.yaml,"
    )
    assert done.stderr.endswith(f"{words}\n")


def test_what_keeps_torchrun_from_starting(monkeypatch, tmp_path):
    """No place for temporary files, and an option that torchrun does not know: a line says so, the last one."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    with pytest.raises(ConfigError, match=r"harness launch: cannot create temporary files .*; set TMPDIR to a folder"):
        start([], ["train"])
    monkeypatch.undo()
    done = harness("launch", "--no-such-option=1", "--", "-m", "module", env={"TMPDIR": str(tmp_path)})
    assert done.returncode == 2
    (log,) = tmp_path.glob("harness-launch-*.log")
    assert log.read_text().startswith("usage: torchrun ")
    why = "torchrun ended with 2: torchrun: error: unrecognized arguments: --no-such-option=1"
    assert done.stderr == f"harness launch: exit code 2: no rank reported an error; {why} (torchrun's output: {log})\n"


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    """Under nohup the launch outlives the terminal."""
    replaced = f"harness.launcher.launch.command = lambda *_: [sys.executable, '-c', {DEAF!r}]"
    script = (
        "import signal, sys, harness.launcher.launch; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        f"{replaced}; sys.exit(harness.launcher.launch.launch([], []))"
    )
    with launch(tmp_path, None, command=("-c", script)) as run:
        run.wait(lambda: "here" in run.output(), "the agent")
        wait_until(lambda: hears(run.process.pid), "the launcher to listen")
        os.kill(run.process.pid, signal.SIGHUP)
        time.sleep(0.5)
        assert run.process.poll() is None
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.finish(seconds=10) == 75


def test_restarts_count_while_nothing_is_gained():
    """Three in a row are allowed; a start from a newer checkpoint than ever before makes it three again."""
    restarts, left, told = Restarts(3, renewed=True), 3, []
    for step in (0, 100, 100, 50, 200, 200, 200, 200, 200):  # from where the start went on that has failed now
        left = restarts.left(left, step)
        told.append(left)
        left -= 1
    assert told == [3, 3, 2, 1, 3, 2, 1, 0, -1]
    assert Restarts(3, renewed=True).left(1, None) == 1, "no rank has come so far"
    own = Restarts(5, renewed=False)
    assert [own.left(left, step) for left, step in ((5, 0), (4, 100), (3, 200))] == [5, 4, 3]
    assert own.describe(4, None) == "restart 2 of at most 5 (--max-restarts)"
    kind = "in a row without a newer checkpoint"
    assert restarts.describe(3, 0) == f"restart 1 of at most 3 {kind}; no checkpoint has been reported yet"
    assert restarts.describe(1, 40) == f"restart 3 of at most 3 {kind}; training continues from step 40 or later"
    assert restarts.describe(0, None) == f"no restart is left of the 3 allowed {kind}"
    assert Restarts(0, renewed=False).describe(0, 0) == "no restart is allowed (--max-restarts)"
    kept = "the newest checkpoint is of step 40 or later"
    assert restarts.describe(0, 40) == f"no restart is left of the 3 allowed {kind}; {kept}"


def test_who_died_of_what(tmp_path):
    """The rank that failed by itself, not those that lost it or that torchrun ended; its last step, and its error."""
    here = f"on {platform.node()}"
    assert describe_death(str(tmp_path), {}) == "a rank failed"
    assert describe_death(str(tmp_path), {0: 76, 3: 3}) == f"rank 3 {here} ended with exit code 3"
    (tmp_path / "resumed").write_text("0")
    assert (
        describe_death(str(tmp_path), {0: 76, 1: -15, 3: -9}) == f"rank 3 {here} was killed by SIGKILL before its first step"
    )
    (tmp_path / "step-3").write_bytes((66).to_bytes(8, "little"))
    (tmp_path / "rank-3.json").write_text('{"exit_code": 1, "message": "RuntimeError: boom"}')
    assert describe_death(str(tmp_path), {3: 1}) == f"rank 3 {here} ended with exit code 1 after step 66: RuntimeError: boom"
    assert describe_death(str(tmp_path), {1: 76, 0: 76}) == f"rank 0 {here} ended with exit code 76 before its first step"
    assert describe_death(str(tmp_path), {3: -99}) == f"rank 3 {here} was killed by signal 99 after step 66"


FAILS = """
import os, signal, sys
from pathlib import Path
from harness.launcher import outcome

outcome.claim()
starts = len(Path("starts").read_text()) + 1 if Path("starts").exists() else 1
Path("starts").write_text("x" * starts)
print("a rank begins", file=sys.stderr, flush=True)
assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3", "torch's default, and not torchrun's"
outcome.resumed(10 * min(starts, 4))
outcome.reached(10 * min(starts, 4) + 3)
if starts == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(1)
"""


@pytest.mark.torchrun
def test_a_launch_outlives_many_deaths(tmp_path):
    """As long as the ranks come further in between: the launch ends after three restarts in a row that led nowhere.

    One of them is suspended, which is told, and killed. The ranks' own output, which torchrun copies here (``--tee``), is on
    the screen; torchrun's is in a file that is named.
    """
    (tmp_path / "fails.py").write_text(FAILS)
    command = ("-m", "harness", "launch", "--nproc-per-node=1", "--tee=2", "--suspended-seconds=1", "--", "fails.py")
    with launch(tmp_path, None, command=command) as run:
        assert run.finish() == 1
        named = re.search(r" \(torchrun's output: (\S+)\)$", last_line(run))
        assert named, run.output()
        assert "torch.distributed.elastic.multiprocessing.errors.ChildFailedError" in Path(named[1]).read_text()
    assert (tmp_path / "starts").read_text() == 7 * "x", run.output()
    assert run.output().count("[default0]:a rank begins\n") == 7
    kind = "in a row without a newer checkpoint"
    assert run.output().count(f"restart 1 of at most 3 {kind}; training continues from step ") == 4
    died = f"rank 0 on {platform.node()} ended with exit code 1 after step 43"
    assert last_line(run).startswith(f"harness launch: exit code 1: {died}; no restart is left of the 3 allowed {kind}")
    assert "mend the cause, or allow more (--max-restarts), and start the same command again (torchrun's" in last_line(run)
    assert "it is killed if it is still so in 1 s (--suspended-seconds)" in run.output()
    assert re.search(r"rank 0 on \S+ was suspended for \d s and killed after step 23\n", run.output())
    assert "Traceback" not in run.output()
    assert len(run.output().splitlines()) == 7 + 6 * 2 + 2 + 1, "a line of each start, two of each restart, two at the end"


@pytest.mark.soak
@pytest.mark.torchrun
def test_a_signal_to_the_launcher_stops_all_ranks_and_asks_for_more(tmp_path):
    """SIGTERM: the ranks stop at one step, that step is saved, the exit code is 75, and the next launch goes on from it."""
    with launch(tmp_path, config(1_000_000), command=LAUNCH) as run:
        run.wait_for("train", step=100)
        os.kill(run.process.pid, signal.SIGTERM)
        assert run.finish() == 75
        stopped_at = newest(tmp_path / "run")["step"]
        assert f"asked to stop (SIGTERM) at step {stopped_at}, which is saved" in run.output()
        assert (
            last_line(run) == "harness launch: exit code 75: stopped as requested; start the same command again to continue"
        )
        assert "Traceback" not in run.output()
    with launch(tmp_path, config(stopped_at + 10), command=LAUNCH) as run:
        assert run.wait_for("resume", attempt=2)["step"] == stopped_at
        run.succeed()


@pytest.mark.torchrun
def test_a_mistake_is_not_tried_again(tmp_path):
    """A configuration that cannot work ends the launch with its own code, with restarts left and unused."""
    with launch(tmp_path, {**config(10), "seeed": 1}, command=LAUNCH) as run:
        assert run.finish() == 2
        *said, last = run.output().splitlines()  # by the first rank, if it came to that; nothing of torchrun's
        assert len(said) <= 1
        assert all("seeed: unknown key" in line for line in said)
        assert last.startswith("harness launch: exit code 2: ")
        assert "seeed: unknown key" in last


@pytest.mark.soak
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
    replaced = f"harness.launcher.launch.command = lambda *_: [sys.executable, '-c', {DEAF!r}]"
    script = f"import sys, harness.launcher.launch; {replaced}; sys.exit(harness.launcher.launch.launch([], []))"
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
        assert last_line(run).startswith(
            "harness launch: exit code 130: interrupted twice and ended at once; the steps since"
        )
        assert "Traceback" not in run.output()
        wait_until(lambda: not run.processes(), "the end of all processes of the run", seconds=10)
