"""How ranks ended, as one exit code."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness import errors
from harness.launcher import outcome
from harness.launcher.outcome import Outcome


@pytest.fixture(autouse=True)
def _no_rank(monkeypatch):
    """This process is none but where a test has it claim that, and afterwards it is none again."""
    monkeypatch.setattr(outcome, "_directory", None)


def test_a_record_is_written_where_the_launcher_wants_it(tmp_path, monkeypatch):
    """Each rank leaves one record; a new start takes its own away first."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    outcome.claim()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        outcome.record_outcome(Outcome(75, f"rank {rank}"))
    assert outcome.read_outcomes(str(tmp_path)) == [Outcome(75, "rank 0"), Outcome(75, "rank 1")]
    outcome.forget()
    assert outcome.read_outcomes(str(tmp_path)) == [Outcome(75, "rank 0")]


def test_a_record_may_go_while_it_is_read(tmp_path, monkeypatch):
    """The launcher looks at any time, and a rank that starts again takes its record away."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    outcome.claim()
    with ThreadPoolExecutor() as pool:
        looks = pool.submit(lambda: [outcome.read_outcomes(str(tmp_path)) for _ in range(5_000)])
        while not looks.done():
            outcome.record_outcome(Outcome(75))
            outcome.forget()
    assert {tuple(each) for each in looks.result()} <= {(), (Outcome(75),)}


def test_nothing_is_written_without_a_launcher(monkeypatch):
    """Under stock torchrun and in a plain process there is nowhere to write to, and that is no error."""
    monkeypatch.delenv(outcome.DIRECTORY_VARIABLE, raising=False)
    outcome.claim()
    outcome.record_outcome(Outcome(1))
    outcome.forget()


def test_an_exit_does_not_fail_because_its_record_does(monkeypatch):
    """A directory that has gone is no reason to end in another way."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, "/nonexistent")
    outcome.claim()
    outcome.record_outcome(Outcome(1))


def test_only_the_rank_itself_leaves_a_record(tmp_path, monkeypatch):
    """What it starts, harness's own verbs among it, inherits its environment and does not speak for it; nor does a fork."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    outcome.claim()
    verb = subprocess.run(
        [sys.executable, "-m", "harness", "verify", str(tmp_path / "none")], capture_output=True, check=False
    )
    assert verb.returncode == 66, verb.stderr
    if not (child := os.fork()):
        outcome.record_outcome(Outcome(2))
        os._exit(0)
    os.waitpid(child, 0)
    assert outcome.read_outcomes(str(tmp_path)) == []
    outcome.record_outcome(Outcome(75))
    assert outcome.read_outcomes(str(tmp_path)) == [Outcome(75)]


def test_a_rank_knows_whether_a_stop_was_asked_for(tmp_path, monkeypatch):
    """SIGTERM alone may also mean that another rank has died."""
    assert not outcome.stop_was_asked()
    assert not outcome.is_ended_for_another()
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    outcome.claim()
    outcome.say_ended(str(tmp_path), [os.getpid() + 1])
    assert not outcome.is_ended_for_another(), "a process of an earlier start"
    outcome.say_ended(str(tmp_path), [os.getpid()])
    assert outcome.is_ended_for_another()
    assert not outcome.stop_was_asked()
    assert outcome.stop_reason() == ""
    outcome.say_stop(str(tmp_path), "SIGINT")
    assert outcome.stop_was_asked()
    assert outcome.stop_reason() == "SIGINT", "the ranks get SIGTERM"


def test_a_killed_rank_has_left_its_step(tmp_path, monkeypatch):
    """And rank 0 the step of the newest checkpoint; a new start has reached nothing yet."""
    directory = str(tmp_path)
    assert (outcome.reached_step(directory, 0), outcome.saved_step(directory), outcome.resumed_step(directory)) == (
        None,
    ) * 3
    for _ in range(2):
        monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, directory)
        outcome.claim()
        assert outcome.reached_step(directory, 0) is None
        outcome.resumed(40)
        outcome.reached(41)
        outcome.reached(1 << 40)
        assert outcome.reached_step(directory, 0) == 1 << 40
        assert (outcome.saved_step(directory), outcome.resumed_step(directory)) == (40, 40)
        outcome.saved(42)
        assert (outcome.saved_step(directory), outcome.resumed_step(directory)) == (42, 40)
    monkeypatch.setenv("RANK", "1")
    outcome.saved(50)
    assert outcome.saved_step(directory) == 42, "rank 0 knows"
    monkeypatch.setattr(outcome, "_directory", tmp_path / "gone")
    outcome.reached(60)  # an error would end the training


@pytest.mark.parametrize(("code", "waits"), [(2, True), (75, False), (1, False)])
def test_what_ends_the_launch_waits_to_be_seen(tmp_path, monkeypatch, code, waits):
    """A rank that torchrun would start again in vain is still there when the launcher looks for the next time."""
    monkeypatch.setenv(outcome.DIRECTORY_VARIABLE, str(tmp_path))
    if not waits:
        monkeypatch.setattr(outcome, "POLL_SECONDS", 5)  # on a busy machine little else takes so long
    outcome.claim()
    began = time.monotonic()
    outcome.record_outcome(Outcome(code))
    assert (time.monotonic() - began > 2 * outcome.POLL_SECONDS) == waits


def test_words_come_before_the_record(tmp_path):
    """The launcher ends a rank that has left one, and what a user did wrong must be on the terminal by then."""
    environment = {**os.environ, outcome.DIRECTORY_VARIABLE: str(tmp_path)}
    command = [sys.executable, "-m", "harness", "train", str(tmp_path / "none.yaml")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert "none.yaml" in process.stderr.readline()
        told = time.monotonic()
        assert process.wait() == 2
    assert time.monotonic() - told > 2 * outcome.POLL_SECONDS
    assert [each.exit_code for each in outcome.read_outcomes(str(tmp_path))] == [2]


def test_the_outcome_of_an_error():
    """Our errors have their own codes, and only their first line is recorded; others are 1."""
    assert outcome.of(errors.ConfigError("a\nb")) == Outcome(2, "a")
    assert outcome.of(ValueError("what")) == Outcome(1, "ValueError: what")


@pytest.mark.parametrize(("launcher", "codes", "expected"), [(1, [], 75), (0, [], 0), (1, [2], 2), (-15, [76], 75)])
def test_exit_code_of_a_launch_that_was_asked_to_stop(launcher, codes, expected):
    """It wants to be started again, whether or not its ranks came so far as to say so; unless it is done, or hopeless."""
    assert outcome.exit_code(launcher, map(Outcome, codes), asked_to_stop=True) == expected


@pytest.mark.parametrize(
    ("launcher", "codes", "expected"),
    [
        (0, [], 0),
        (1, [], 1),
        (137, [1, 76], 1),
        (2, [], 2),
        (2, [1], 1),
        (0, [75, 75], 75),
        (1, [75, 75], 75),
        (1, [76, 2], 2),
        (1, [75, 66], 66),
        (1, [70, 1], 70),
        (1, [77], 77),
        (1, [76, 76], 76),
        (1, [74, 76], 74),
        (1, [0, 76], 76),
        (0, [76], 0),
    ],
)
def test_exit_code(launcher, codes, expected):
    """What no restart can mend comes first, then a stop that was saved, then what may pass, then torchrun's own word."""
    assert outcome.exit_code(launcher, map(Outcome, codes)) == expected


def test_the_exit_code_of_a_verdict():
    """Ranks that end well and say that a run would not: theirs counts, and it ends nothing early."""
    verdicts = [Outcome(74, verdict=True)] * 2
    assert outcome.exit_code(0, verdicts) == 74
    assert outcome.exit_code(1, verdicts) == 1, "one of them did not come to its end"
    assert not Outcome(2, verdict=True).is_final
    assert Outcome(2).is_final
