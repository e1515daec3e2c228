"""What a process has once belongs to a training for as long as its loop is under way, and is given back."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harness import Run
from harness.errors import ConfigError
from harness.launcher import outcome
from harness.launcher.outcome import Outcome
from harness.runtime.signals import STOP_SIGNALS
from harness.training import program
from tests.support.cluster import newest

QUIET = {"log": {"every_steps": None}}


def of_process() -> tuple:
    """What the process has once."""
    return [signal.getsignal(number) for number in STOP_SIGNALS], sys.excepthook, sys.getprofile()


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Every test leaves the process as it was, and this one is no rank."""
    monkeypatch.setattr(outcome, "_directory", None)
    before = of_process()
    yield
    for run in [*program.host()._runs]:  # that a test has left behind
        program.host().let_go(run)
    assert of_process() == before
    assert not program.host().stop


class Script:
    """A loop of a program's own, whose run owns the process: something may happen in a step."""

    def __init__(self, url: Path | None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.run = Run(url, {"model": self.model, "optimizer": self.optimizer}, config=QUIET)

    def train(self, happens, *, at: int = 3, steps: int = 5, wrapped=iter) -> None:
        for step in wrapped(self.run.steps(steps)):
            if step == at:
                happens()
            self.model(torch.ones(2)).square().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.run.step()


def crashes(url: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(url.glob("attempts/*.crash-*.json"))]


def fails(text: str = "bad sample") -> None:
    raise ValueError(text)


# --- a prompt --------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_prompt(monkeypatch):
    """As in a notebook's kernel."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


def test_a_cell_that_is_interrupted_can_be_run_again(tmp_path, at_prompt):
    """Its step is saved, the prompt comes back, and the next cell goes on from there and is not asked to stop."""
    script = Script(tmp_path)
    with pytest.raises(KeyboardInterrupt, match=r"asked to stop \(SIGINT\) at step 4, which is saved"):
        script.train(lambda: os.kill(os.getpid(), signal.SIGINT))
    assert newest(tmp_path)["step"] == 4
    again = Script(tmp_path)
    assert again.run.global_step == 4
    again.train(lambda: None, steps=8)
    assert newest(tmp_path)["step"] == 8


def test_after_a_loop_an_interrupt_is_pythons(tmp_path):
    """A cell that has nothing to do with the run can be interrupted."""
    script = Script(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    script.train(lambda: None)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_an_error_at_a_prompt_is_an_error(tmp_path, at_prompt, capsys):
    """Nothing ends the process there: no hook waits for it."""
    before = sys.excepthook
    with pytest.raises(ConfigError):
        Run(tmp_path, {"model": nn.Linear(1, 1)}, every_steps=0)
    assert sys.excepthook == before


# --- errors that a program catches -------------------------------------------------------------------------------------


def passed_on(iterator):
    """As tqdm does it."""
    yield from iterator


@pytest.mark.parametrize("wrapped", [iter, passed_on])
def test_an_error_is_recorded_whoever_catches_it(tmp_path, wrapped):
    """Its class, its text and its step, as if it had ended the program."""
    script = Script(tmp_path)
    try:
        script.train(fails, wrapped=wrapped)
    except ValueError:
        print("hydra would have a word to say, and end with 1")
    assert [(crash["step"], crash["error"]) for crash in crashes(tmp_path)] == [(4, "ValueError: bad sample")]


def test_a_loop_that_is_left_is_no_error(tmp_path):
    """Nor is an error after that, in the same function."""
    script = Script(tmp_path)
    for step in script.run.steps(5):
        script.run.step()
        if step == 2:
            break
    try:
        fails("of the evaluation")
    except ValueError:
        script.run.finish()
    assert crashes(tmp_path) == []


def test_what_an_error_means_for_the_launch(tmp_path, monkeypatch):
    """A lost peer is told of at once. An error that ends the launch is told of when the program ends: it may begin another
    loop instead."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    outcome.claim()
    script = Script(None)

    def loses_a_peer() -> None:
        raise RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed by peer. x gloo/transport")

    def forgets() -> None:
        raise ConfigError("mine")

    with pytest.raises(RuntimeError):
        script.train(loses_a_peer)
    outcome_of = lambda: [each.exit_code for each in outcome.read_outcomes(str(tmp_path))]
    assert outcome_of() == [76]
    with pytest.raises(ConfigError):
        script.train(forgets, at=script.run.global_step)
    assert outcome_of() == []
    program.host()._leave()
    assert outcome.read_outcomes(str(tmp_path)) == [Outcome(2, "mine")]
    script.train(lambda: None)
    assert outcome_of() == []


def test_an_own_hook_stays(tmp_path):
    """One that the program has installed after the run."""
    script = Script(tmp_path)
    ours, own = sys.excepthook, lambda *_: None
    sys.excepthook = own
    script.train(lambda: None)
    assert sys.excepthook == own
    sys.excepthook = ours


# --- children --------------------------------------------------------------------------------------------------------

FORKS = """
import multiprocessing, os, sys, time
import torch, harness
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = harness.Run("run", {"model": model, "optimizer": optimizer}, config={"stop": {"grace_seconds": 1}})
multiprocessing.set_start_method("fork")
for step in run.steps(4):
    if step == 1:
        if not (child := os.fork()):
            sys.exit(0)
        print("child ended with", os.waitpid(child, 0)[1], flush=True)
    if step == 2:
        child = multiprocessing.Process(target=time.sleep, args=(60,))
        child.start()
        child.terminate()
        child.join()
        print("helper ended with", child.exitcode, flush=True)
        with multiprocessing.Pool(1) as pool:
            pool.apply_async(time.sleep, [60])
        time.sleep(1.5)
    model(torch.ones(2)).square().backward()
    optimizer.step()
    run.step()
print("parent is done")
"""


def test_children_in_a_loop(tmp_path):
    """One that leaves by ``sys.exit``, one that is ended, a busy pool: they end as without a run, and it trains on."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child ended with 0", f"helper ended with {-signal.SIGTERM}", "parent is done"]
    assert newest(tmp_path / "run")["step"] == 4
    assert crashes(tmp_path / "run") == []


def test_a_setting_that_is_wrong_ends_a_script_in_one_line(tmp_path):
    """With the exit code that says that starting again would not help."""
    script = "import torch, harness; m = torch.nn.Linear(1, 1); harness.Run(None, {'m': m}, config={'log': {'jsnol': 'a'}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)
    words = "harness: config: log.jsnol: unknown key (found 'a'); the nearest known key is log.jsonl\n"
    assert (done.returncode, done.stderr) == (2, words)
