"""A run that is asked to stop at any moment: all ranks stop at one step, that step is saved, and none is lost.

Every trial is the next part of one long run: it is launched, gets a signal at a moment drawn by chance, and the launch
after it must go on from exactly where it stopped. The end has the bits of a run that nobody disturbed.
"""

import contextlib
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.cluster import Run, hears, launch, newest, train_undisturbed, wait_until
from tests.support.slow_task import MOST_STEPS, TASK

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def config(steps: int, url: str, **args) -> dict:
    """Steps of about ten milliseconds; an evaluation and a save, of several steps' length, come often."""
    return {
        "task": TASK,
        "args": args,
        "train": {"steps": steps, "global_batch_size": 6},
        "evaluation": {"every_steps": 5},
        "checkpoint": {"url": url, "every_steps": 7, "keep_last": 2},
    }


class Chain:
    """A run that is stopped and started again, time after time."""

    def __init__(self, place: Path, ranks: int, seed: int) -> None:
        self.place, self.ranks = place, ranks
        self.random = random.Random(seed)
        self.step = 0  # the last one that is known to be saved
        self.log: list[str] = []  # what was done, for the message of a failure

    def launch(self, steps: int, **args) -> contextlib.AbstractContextManager[Run]:
        command = ("-m", "harness", "launch", f"--nproc-per-node={self.ranks}", "--", "train")
        return launch(self.place, config(steps, "run", **args), command=command)

    def trial(self, moment: str) -> None:
        """One launch that is disturbed. Whatever happens in it, the step that it says it stopped at is the newest one."""
        counts = self.place / "counts"
        counts.mkdir(exist_ok=True)
        for old in counts.iterdir():
            old.unlink()
        with self.launch(MOST_STEPS, pause_seconds=0.003, counts=str(counts)) as run:
            wait_until(lambda: hears(run.process.pid), "the launcher to listen")
            if moment == "training":
                run.wait(lambda: run.events("train"), "the first step")
            time.sleep(self.random.uniform(0, 1 if moment == "training" else 3))
            self.disturb(run)
            code = run.finish()
            assert code == 75, (code, self.log, run.output()[-3000:])
            assert not run.processes()
            self.check(run, counts)

    def disturb(self, run: Run) -> None:
        """A signal to a rank or to the launcher; sometimes there comes another one."""
        targets = [run.process.pid, *(pid for pid in run.workers().values() if hears(pid))]
        target = self.random.choice(targets)
        numbers = [self.random.choice(SIGNALS)]
        if self.random.random() < 0.3:  # twice: as Slurm does it. A second SIGINT means something else.
            numbers.append(self.random.choice([signal.SIGTERM, signal.SIGUSR1, numbers[0]]))
            numbers = [signal.SIGTERM if number == signal.SIGINT else number for number in numbers]
        for number in numbers:
            self.log.append(f"{signal.Signals(number).name} to {targets.index(target)} at step {self.step}+")
            with contextlib.suppress(ProcessLookupError):  # it is quick to stop
                os.kill(target, number)
            time.sleep(self.random.uniform(0, 0.05))

    def check(self, run: Run, counts: Path) -> None:
        for resumed in run.events("resume"):
            assert resumed["step"] == self.step, (self.log, "a step was lost")
        said = re.findall(r"asked to stop \(.*\) at step (\d+), which is saved", run.output())
        taken = {int(path.read_text()) for path in counts.iterdir()}
        if not said:  # it came before the first step: there is nothing to save
            assert not taken, (self.log, run.output()[-3000:])
            return
        assert len(taken) == 1, (self.log, f"the ranks stopped at different steps: {taken}")
        assert len(list(counts.iterdir())) == self.ranks
        (stopped_at,) = map(int, said)
        assert stopped_at == self.step + taken.pop(), self.log
        assert newest(self.place / "run")["step"] == stopped_at
        self.step = stopped_at

    def end(self) -> None:
        """The last part is not disturbed, and ends like a run that never was."""
        with self.launch(self.step + 5) as run:
            run.succeed(300)
            assert run.events("resume" if self.step else "start")[0]["step"] == self.step
        train_undisturbed(self.place, config(self.step + 5, "undisturbed"), self.ranks, seconds=600)
        assert newest(self.place / "run")["digests"] == newest(self.place / "undisturbed")["digests"]


def disturbed(place: Path, ranks: int, trials: int, seed: int) -> None:
    chain = Chain(place, ranks, seed)
    for index in range(trials):
        chain.trial("starting" if index % 4 == 1 else "training")
    chain.end()


@pytest.mark.torchrun
def test_a_stop_at_any_moment(tmp_path):
    """A few moments; the many are drawn in the soak test."""
    disturbed(tmp_path, ranks=2, trials=2, seed=int(time.time()) // 86400)  # others every day


@pytest.mark.torchrun
def test_signals_that_come_late_change_nothing(tmp_path):
    """A rank that has stopped, and the launcher, are signalled until they are gone: nobody takes that for a failure."""
    chain = Chain(tmp_path, ranks=2, seed=0)
    with chain.launch(MOST_STEPS, pause_seconds=0.003) as run:
        run.wait(lambda: run.events("train"), "the first step")
        (rank_0, rank_1), launcher = (run.workers()[rank] for rank in (0, 1)), run.process.pid
        os.kill(rank_1, signal.SIGUSR1)
        wait_until(lambda: "asked to stop" in run.output(), "the stop")
        while run.process.poll() is None:
            for pid in (rank_0, rank_1, launcher):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.001)
        assert run.finish() == 75
        assert len({record["attempt"] for record in run.events()}) == 1


@pytest.mark.soak
@pytest.mark.torchrun
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_stop_at_a_hundred_moments(tmp_path, ranks):
    """While it starts, in steps, in collectives, in evaluations, in saves; once or twice; to a rank or to the launcher."""
    disturbed(tmp_path, ranks, trials=100, seed=1)
