"""The interval that chooses itself: what it follows from, and what it is worth."""

import itertools
import math
import random
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.checkpoint.saver import Saved
from harness.errors import ConfigError
from harness.training import interval
from harness.training.interval import Deaths, Interval, best_seconds

HOUR = 3600.0


def saved(blocked_seconds: float, seconds: float) -> Saved:
    return Saved(1, "step-1", 100, seconds, blocked_seconds)


def test_it_is_youngs_within_bounds():
    """At least what keeps saves below a hundredth of the time, and one save at a time; at most half an hour."""
    assert best_seconds(0.15, 0.7, 6 * HOUR) == pytest.approx(math.sqrt(2 * 0.15 * 6 * HOUR))
    assert best_seconds(40.0, 1.0, HOUR) == 4000.0
    assert best_seconds(0.001, 30.0, HOUR) == 30.0
    assert best_seconds(1.0, 1.0, 30 * 24 * HOUR) == interval.LONGEST_SECONDS


def test_the_cost_is_what_the_steps_lose(monkeypatch):
    """Steps that take longer while a save is under way cost, too, and not their length alone."""
    clock = itertools.accumulate([0.0, *[0.1] * 9, 0.3, 0.3, *[0.0] * 9])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    auto = Interval(Deaths())
    for is_saving in [False] * 9 + [True, True]:
        auto.step(is_saving=is_saving)
    changed = auto.saved(saved(blocked_seconds=0.05, seconds=0.5))
    assert changed is not None
    assert changed["cost_seconds"] == pytest.approx(0.4)
    assert auto.seconds == changed["seconds"] == pytest.approx(best_seconds(0.4, 0.5, 24 * HOUR + 1.5))
    assert auto.saved(saved(blocked_seconds=0.4, seconds=0.5)) is None, "nearly the same as before"


def waste(cost: float, recovery: float, deaths: list[float], hours: float, every=None) -> float:
    """The seconds that saves, steps that are trained again and recoveries take; ``every`` is a fixed interval."""
    now = since = lost = trained = 0.0
    count, seconds, waiting = 0, interval.FIRST_SECONDS, [*deaths, math.inf]
    while now < hours * HOUR:
        due = now + (every or seconds) - since + cost
        if waiting[0] < due:
            died = waiting.pop(0)
            lost += since + max(died - now, 0.0) + recovery
            trained += max(died - now, 0.0)
            now, since, count = max(died, now) + recovery, 0.0, count + 1
            while waiting[0] < now:
                waiting.pop(0)
        else:
            lost += cost
            trained += due - now
            now, since = due, 0.0
        seconds = best_seconds(cost, cost, Deaths(count, trained).between_seconds)
    return lost


@pytest.mark.parametrize("seed", range(4))
def test_it_loses_little_more_than_the_best_fixed_interval(seed):
    """In 10,000 hours, with costs and deaths that are drawn: at most a tenth more than an interval that knew all of them."""
    draw = random.Random(seed)
    mean = 10 ** draw.uniform(0.5, 2) * HOUR
    young = draw.uniform(150, min(1700, 0.018 * mean))  # else the bounds count, and not the deaths
    cost = young**2 / (2 * mean)
    deaths = list(itertools.accumulate(draw.expovariate(1 / mean) for _ in range(int(12_000 * HOUR / mean) + 9)))
    fixed = min(waste(cost, 30.0, deaths, 10_000, young * factor) for factor in (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0))
    assert waste(cost, 30.0, deaths, 10_000) <= 1.1 * fixed


class Script:
    """A run that chooses its interval."""

    def __init__(self, url) -> None:
        torch.manual_seed(0)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = Loader(TensorDataset(torch.ones(8, 1)), 1)
        self.model, self.optimizer, self.loader = model, optimizer, loader
        state = {"model": model, "optimizer": optimizer, "loader": loader}
        self.run = Run(url, state, every_steps=2, every_seconds="auto", stop=StopRequest())

    def train(self, until: int, *, dies: bool) -> None:
        for _ in self.run.epochs(100):
            for (x,) in self.loader:
                self.model(x).sum().backward()
                self.optimizer.step()
                self.run.step()
                if self.run.global_step == until:
                    if dies:
                        raise InterruptedError
                    self.run.finish()
                    return


def test_ten_deaths_are_counted(tmp_path, caplog):
    """Each of them, also over restarts; the log and the next checkpoint tell what follows."""
    caplog.set_level("INFO")
    for number in range(10):
        script = Script(tmp_path)
        with pytest.raises(InterruptedError):
            script.train(3 * number + 4, dies=True)
        script.run.close()
    script = Script(tmp_path)
    auto = script.run._attempt.saves._auto
    assert auto.deaths.count == 10
    assert auto.deaths.between_seconds == pytest.approx(interval.PRIOR_SECONDS / 11, rel=0.01)
    script.train(40, dies=False)
    script.run.close()
    assert 0 < auto.seconds < interval.FIRST_SECONDS
    assert "from now on: a save costs" in caplog.text
    again = Script(tmp_path)
    assert again.run._attempt.saves._auto.deaths.count == 10, "it came to its end"
    again.run.close()


def test_a_word_that_is_no_interval(tmp_path):
    """It is named, with what may stand there."""
    with pytest.raises(ConfigError, match=r"checkpoint\.every_seconds: expected a valid number or 'auto', found 'soon'$"):
        Run(tmp_path, {"model": nn.Linear(1, 1)}, every_seconds="soon", stop=StopRequest())
