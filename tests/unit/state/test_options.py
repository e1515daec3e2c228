"""What the program says of learning rates and schedules and what the checkpoint says: which counts, and that it is told."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest, Task
from harness.errors import ConfigError
from harness.state.capture import State
from tests.support.cluster import train_here

CPU = torch.device("cpu")
QUIET = {"log": {"every_steps": None}, "metrics": {"every_seconds": None}}


class Program:
    """A program that trains something at a URL, and notes the options with which each step was taken."""

    def __init__(
        self,
        url: Path,
        schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        *,
        reset: list[str] | None = None,
        extra: dict[str, Any] | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        groups = [{"params": layer.parameters()} for layer in self.model]
        self.optimizer = optimizer(groups, **{"lr": 0.1, **options})
        self.scheduler = schedule(self.optimizer) if schedule else None
        state = {"model": self.model, "optimizer": self.optimizer, **(extra or {})}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler
        self.rates: list[float] = []
        self.run = Run(url, state, config=QUIET, stop=StopRequest(), reset_options=reset or [])

    def train(self, steps: int) -> "Program":
        """Trains up to a step."""
        for _ in self.run.steps(steps):
            self.optimizer.zero_grad()
            self.model(torch.ones(2)).sum().backward()
            self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
            self.optimizer.step()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(1.0)
            elif self.scheduler is not None:
                self.scheduler.step()
            self.run.step()
        self.run.close()
        return self


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was said of differences."""
    return [message for message in caplog.messages if "in this program" in message]


# --- the checkpoint counts, and it is said -----------------------------------------------------------------------------


def test_an_edited_rate_does_not_count_and_is_told_of(tmp_path, caplog):
    """One line for each option, with both values, who counts, and what to do."""
    Program(tmp_path, momentum=0.5).train(2)
    assert not told(caplog)
    again = Program(tmp_path, lr=0.001, weight_decay=0.2).train(3)
    assert again.rates == [0.1]
    lines = [("lr", "0.001", "0.1"), ("momentum", "0", "0.5"), ("weight_decay", "0.2", "0")]
    assert told(caplog) == [
        f"optimizer: {option}: {here} in this program, {there} in the checkpoint; using the checkpoint's. To use the "
        f'program\'s: Run(..., reset_options=["{option}"])'
        for option, here, there in lines
    ]
    caplog.clear()
    Program(tmp_path, lr=0.001, momentum=0.5).train(4)  # it is told as long as it is so, whoever wrote the checkpoint
    assert len(told(caplog)) == 1


def test_what_a_loop_or_a_schedule_has_moved_is_no_difference(tmp_path, caplog):
    """The program is the same, wherever its schedule is, and whatever it has set by hand."""
    schedule = lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5)
    program = Program(tmp_path, schedule)
    program.optimizer.param_groups[0]["weight_decay"] = 0.3
    program.train(3)
    again = Program(tmp_path, schedule).train(4)
    assert again.rates == [0.0125]
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert not told(caplog)


def test_settings_of_a_schedule_are_told_of(tmp_path, caplog):
    """Within others, too; of a cosine that is prolonged, what becomes of it."""
    build = lambda length: (
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, length)],
            [2],
        )
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Program(tmp_path, build(4)).train(3)
        Program(tmp_path, build(8))
    (line,) = told(caplog)
    assert line.startswith(
        "scheduler: 1.T_max: 8 in this program, 4 in the checkpoint; using the checkpoint's, and its learning rate rises "
        "again after 4 of the scheduler's steps. To use the program's: Run(..., reset_options=[\"T_max\"])"
    )


def test_a_loaders_batches_are_told_of(tmp_path, caplog):
    """Of which the program's count."""
    loader = lambda size: {"loader": Loader(TensorDataset(torch.ones(8, 2)), size)}
    Program(tmp_path, extra=loader(2)).train(1)
    Program(tmp_path, extra=loader(4))
    assert told(caplog) == ["loader: global_batch_size: 4 in this program, 2 in the checkpoint; using the program's"]


def test_a_checkpoint_that_does_not_say_how_it_was_built(tmp_path):
    """Of an older version: what it has of the options is compared, under a schedule the rate that it began with."""
    state = {}
    for rate in (0.1, 0.2):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        state[rate] = State({"model": model, "optimizer": optimizer, "scheduler": scheduler}, CPU, reset_options=["lr"])
    optimizer.step()
    scheduler.step()
    parts = state[0.2].capture()
    for key in ("built", "reset_options", "frozen"):
        del parts["training"][key]
    twin = State({name: each.live for name, each in state[0.1]._parts.items()}, CPU)
    twin.edits.compare(parts, parts["training"])
    assert [str(each) for each in twin.edits.differences] == [
        "optimizer: lr: 0.1 in this program, 0.2 in the checkpoint; using the checkpoint's"
    ]
    assert twin.capture()["training"]["built"]["optimizer"]["lr"] == [0.1]  # so that it is told once
    state[0.1].restore(parts, 1)
    assert [str(each) for each in state[0.1].edits.differences] == [
        "optimizer: lr: 0.1 in this program, 0.2 in the checkpoint; using the program's"
    ]
    assert state[0.1].optimizers["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01)


# --- the program counts ------------------------------------------------------------------------------------------------


def test_options_that_are_reset(tmp_path, caplog):
    """The next step is taken with the program's; what is not named stays the checkpoint's."""
    adam = {"optimizer": torch.optim.Adam, "betas": (0.5, 0.9)}
    Program(tmp_path, **adam).train(2)
    again = Program(tmp_path, lr=0.001, reset=["lr", "betas"], **{**adam, "betas": (0.6, 0.9)}, weight_decay=0.1).train(3)
    assert again.rates == [0.001]
    assert [group["betas"] for group in again.optimizer.param_groups] == [(0.6, 0.9)] * 2
    assert again.optimizer.param_groups[0]["weight_decay"] == 0
    assert again.optimizer.state[again.model[0].weight]["step"] == 3
    assert [line.partition(";")[2] for line in told(caplog)][:2] == [" using the program's"] * 2


def test_each_group_has_its_own(tmp_path):
    """Groups with rates of their own get those."""

    def rates(program: Program) -> list[float]:
        return [group["lr"] for group in program.optimizer.param_groups]

    def by_layer(*rates: float) -> Callable[..., torch.optim.Optimizer]:
        def make(groups, **_):
            return torch.optim.SGD([{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)])

        return make

    Program(tmp_path, optimizer=by_layer(0.1, 0.2)).train(1)
    assert rates(Program(tmp_path, optimizer=by_layer(0.3, 0.4))) == [0.1, 0.2]
    assert rates(Program(tmp_path, optimizer=by_layer(0.3, 0.4), reset=["lr"])) == [0.3, 0.4]


def test_what_was_reset_once_is_not_reset_by_every_restart(tmp_path):
    """What the loop has made of it since goes on; another edit counts again."""
    Program(tmp_path).train(1)
    program = Program(tmp_path, lr=0.5, reset=["lr"])
    program.optimizer.param_groups[0]["lr"] = 0.25  # the loop's own doing
    program.train(2)
    assert Program(tmp_path, lr=0.5, reset=["lr"]).train(3).rates == [0.25]
    assert Program(tmp_path, lr=0.7, reset=["lr"]).train(4).rates == [0.7]


def test_a_rate_that_the_loop_has_moved_is_reset_when_somebody_asks(tmp_path):
    """The program that asks for the first time says the same as the one before; its rate counts all the same."""
    program = Program(tmp_path)
    program.optimizer.param_groups[0]["lr"] = 0.25
    program.train(1)
    assert Program(tmp_path, reset=["lr"]).train(2).rates == [0.1]


class Half:
    """A schedule's function that is an object."""

    def __call__(self, step: int) -> float:
        return 0.5 ** (step // 2)


def warmed_up(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    warmup = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, 9)], [2])


SCHEDULES = {
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "LambdaLR of an object": lambda optimizer: lr_scheduler.LambdaLR(optimizer, Half()),
    "MultiplicativeLR": lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, lambda step: 0.9),
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.3),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [1, 4], 0.3),
    "ConstantLR": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 0.5, 6),
    "LinearLR": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6),
    "ExponentialLR": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 9, 2.0),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9, eta_min=0.01),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 2),
    "SequentialLR": warmed_up,
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2, 0.5)]
    ),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], 9),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(
        optimizer, optimizer.defaults["lr"] / 2, optimizer.defaults["lr"], 3, cycle_momentum=False
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch's own, of SequentialLR
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("step", [1, 4])
def test_a_reset_rate_goes_on_in_its_schedule(tmp_path, name, step):
    """From the checkpoint on, each step has the rate that a run with the new one from the beginning would have there."""
    schedule = SCHEDULES[name]
    momentum = {"momentum": 0.9}
    expected = Program(tmp_path / "straight", schedule, lr=0.7, **momentum).train(8).rates
    Program(tmp_path / "run", schedule, lr=0.1, **momentum).train(step)
    reset = ["lr", "max_lrs"] if name == "CyclicLR" else ["lr"]
    found = Program(tmp_path / "run", schedule, lr=0.7, reset=reset, **momentum).train(8).rates
    assert found == pytest.approx(expected[step:])


def test_a_reset_rate_on_a_plateau(tmp_path):
    """There is no position to say what it has come to: the program's rate is the next step's."""
    plateau = lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    assert Program(tmp_path, plateau).train(3).rates == [0.1, 0.1, 0.05]
    assert Program(tmp_path, plateau, lr=0.4, reset=["lr"]).train(5).rates == [0.4, 0.2]


class Decay:
    """A schedule's function that is an object with a setting."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, step: int) -> float:
        return self.factor**step


def test_settings_of_functions_and_of_phases(tmp_path, caplog):
    """Also where torch keeps them in objects, and under names of its own."""
    build = lambda factor: lambda optimizer: lr_scheduler.LambdaLR(optimizer, [Decay(factor)] * 2)
    Program(tmp_path / "lambda", build(0.5)).train(2)
    assert Program(tmp_path / "lambda", build(0.1)).train(3).rates == pytest.approx([0.025])
    assert told(caplog)[-1].startswith("scheduler: lr_lambdas: ({'factor': 0.1}, {'factor': 0.1}) in this program, ")
    assert Program(tmp_path / "lambda", build(0.1), reset=["lr_lambdas"]).train(5).rates == pytest.approx([1e-4, 1e-5])
    cycle = lambda start: lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, 8, pct_start=start)
    Program(tmp_path / "cycle", cycle(0.5)).train(2)
    Program(tmp_path / "cycle", cycle(0.25))
    assert told(caplog)[-1].startswith("scheduler: schedule_phases: ({'end_step': 1.0, ")
    expected = Program(tmp_path / "straight", cycle(0.25)).train(8).rates
    assert Program(tmp_path / "cycle", cycle(0.25), reset=["schedule_phases"]).train(8).rates == pytest.approx(expected[2:])


LONGER = {
    "CosineAnnealingLR": ("T_max", lr_scheduler.CosineAnnealingLR),
    "OneCycleLR": ("total_steps", lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, 0.1, steps)),
    "LinearLR": ("total_iters", lambda optimizer, steps: lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)),
    "MultiStepLR": ("milestones", lambda optimizer, steps: lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps])),
}


@pytest.mark.parametrize("name", LONGER)
def test_a_schedule_that_is_prolonged(tmp_path, name):
    """Reset by its name, it goes on where a run with the longer one from the beginning would be."""
    option, build = LONGER[name]
    expected = Program(tmp_path / "straight", lambda optimizer: build(optimizer, 8)).train(8).rates
    Program(tmp_path / "run", lambda optimizer: build(optimizer, 4)).train(3)
    found = Program(tmp_path / "run", lambda optimizer: build(optimizer, 8), reset=[option]).train(8).rates
    assert found == pytest.approx(expected[3:])


def test_a_tensor_for_a_rate_stays_that_tensor(tmp_path):
    """A compiled step, or a captured graph, has it."""
    Program(tmp_path, lr=torch.tensor(0.1), foreach=False).train(1)
    program = Program(tmp_path, lr=torch.tensor(0.7), foreach=False, reset=["lr"])
    assert program.train(2).rates == pytest.approx([0.7])
    assert isinstance(program.optimizer.param_groups[0]["lr"], torch.Tensor)


def test_a_gradient_scalers_settings(tmp_path, caplog):
    """They are told of, and can be reset; the scale that it has found goes on."""
    build = lambda interval: {"scaler": torch.amp.GradScaler("cpu", growth_interval=interval, init_scale=8.0)}
    Program(tmp_path, extra=build(5)).train(1)
    extra = build(7)
    Program(tmp_path, extra=extra)
    assert extra["scaler"].get_growth_interval() == 5
    assert told(caplog)[0].startswith(
        "scaler: growth_interval: 7 in this program, 5 in the checkpoint; using the checkpoint"
    )
    extra = build(7)
    Program(tmp_path, extra=extra, reset=["growth_interval"])
    assert extra["scaler"].get_growth_interval() == 7


# --- what is refused ---------------------------------------------------------------------------------------------------


def test_an_option_that_nothing_has():
    """A slip of the pen is no reset."""
    with pytest.raises(
        ConfigError, match=r"reset_options: no optimizer or scheduler has the option 'lrr'; there are .*\blr\b"
    ):
        Program(None, reset=["lrr"])


def test_a_schedule_that_ends_before_the_run(tmp_path):
    """The checkpoint's length counts, and torch would end the run with a traceback: it is said before the first step."""
    build = lambda steps: lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
    Program(tmp_path, build(4)).train(3)
    again = Program(tmp_path, build(8))
    with pytest.raises(ConfigError, match=r"scheduler: OneCycleLR ends after 4 steps, and this run has 8; .*'total_steps'"):
        again.train(8)
    assert again.rates == []
    assert len(Program(tmp_path, build(8), reset=["total_steps"]).train(8).rates) == 5


def test_a_schedule_that_ends_before_a_task_does(tmp_path):
    """``harness train`` steps it with each step, and knows at the start."""

    def build(steps: int = 4) -> Task:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.1, steps)
        data = TensorDataset(torch.ones(8, 2))
        return Task(model, data, optimizer, lambda model, batch: model(batch[0]).mean(), scheduler)

    train = {"steps": 6, "global_batch_size": 4}
    with pytest.raises(ConfigError, match=r"scheduler: OneCycleLR ends after 4 steps, and this run has 6"):
        train_here(build, url=tmp_path, train=train)
    train_here(lambda: build(6), url=tmp_path, train={**train, "steps": 5})
    reset = {**train, "steps": 8, "reset_options": ["total_steps"]}
    assert train_here(lambda: build(8), url=tmp_path, train=reset).step == 8


# --- what is trained ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["never", "before the run", "in the loop"])
def test_a_part_that_was_not_frozen_any_more(tmp_path, caplog, when):
    """``requires_grad`` is the program's; one that forgets at a resume what it had changed is told so."""

    def program() -> Program:
        made = Program(tmp_path)
        made.model[0].requires_grad_(requires_grad=False)
        return made

    first = program()
    first.model[0].requires_grad_(requires_grad=True)
    first.train(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD([{"params": layer.parameters()} for layer in model], lr=0.1)
    model[0].requires_grad_(requires_grad=when == "before the run")
    run = Run(tmp_path, {"model": model, "optimizer": optimizer}, config=QUIET, stop=StopRequest())
    for _ in run.steps(4):
        model[0].requires_grad_(requires_grad=when != "never")
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        run.step()
    found = [message for message in caplog.messages if "the trained parameters differ" in message]
    assert len(found) == (when == "never")
    if found:
        assert found[0].startswith(
            "model: the trained parameters differ from those of the checkpoint: 0.bias, 0.weight: trained then, frozen now. "
        )
