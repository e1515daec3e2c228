"""Optimizers, schedulers and the gradient scaler go on from a checkpoint as if nothing had happened.

All of ``torch.optim`` and ``torch.optim.lr_scheduler``, by enumeration: a class or a switch that a next torch adds fails
here until someone says how to make one.
"""

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler, swa_utils
from torch.torch_version import TorchVersion

from harness.checkpoint import commit
from harness.errors import Mismatch, Unsupported
from harness.state.optimizers import check_optimizer, optimizer_state, restore_optimizer
from harness.state.to_device import sent
from tests.support.states import Net, Training, bits, through_a_store, train

NEWEST = TorchVersion("2.13")  # the newest torch whose classes were all looked at


# --- optimizers ------------------------------------------------------------------------------------------------------


class Matrices(Net):
    """Without vectors, which Muon does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)


class Table(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(7, 3, sparse=True), nn.Embedding(5, 3, sparse=True)

    def loss(self, index: int) -> torch.Tensor:
        rows = torch.tensor([[index % 7, 1], [index % 5, 2]], device=self.first.weight.device)
        return (self.first(rows[0]) - self.second(rows[1])).square().mean()


@dataclass(frozen=True)
class Recipe:
    """How to make an optimizer that does what is special about it within six steps."""

    options: dict[str, Any] = field(default_factory=dict)
    net: type[nn.Module] = Net
    groups: bool = True  # takes several parameter groups
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float64, torch.complex64)
    more: tuple[dict[str, Any], ...] = ()  # further options that are worth a try, besides the switches


DECAY = {"weight_decay": 0.05}
REAL = (torch.bfloat16, torch.float64)
RECIPES = {
    "ASGD": Recipe({"t0": 2, **DECAY}),  # averages from the second step on
    "Adadelta": Recipe(DECAY),
    "Adafactor": Recipe(DECAY, dtypes=REAL),
    "Adagrad": Recipe({"lr_decay": 0.1, **DECAY}, more=({"initial_accumulator_value": 0.5},)),
    "Adam": Recipe(DECAY, more=({"amsgrad": True, "fused": True}, {"betas": (torch.tensor(0.8), torch.tensor(0.9))})),
    "AdamW": Recipe(more=({"amsgrad": True, "fused": True},)),
    "Adamax": Recipe(DECAY),
    "LBFGS": Recipe({"lr": 0.3, "history_size": 3, "max_iter": 4}, groups=False),  # forgets the oldest of its history
    "Muon": Recipe(net=Matrices, dtypes=REAL),
    "NAdam": Recipe(DECAY),
    "RAdam": Recipe(DECAY),  # begins to rectify after the fifth step
    "RMSprop": Recipe({"momentum": 0.9, **DECAY}, more=({"momentum": 0, "centered": True},)),
    "Rprop": Recipe(),
    "SGD": Recipe({"momentum": 0.9, **DECAY}, more=({"momentum": 0}, {"dampening": 0.1})),
    "SparseAdam": Recipe(net=Table, dtypes=REAL),
}
# What turns a switch on whose default is None.
ON = {"foreach": True, "fused": True, "line_search_fn": "strong_wolfe", "max_eval": 3, "adjust_lr_fn": "match_rms_adamw"}
ELSEWHERE = {"differentiable", "capturable"}  # the one keeps no state; the other has tests of its own below


def subclasses(module: Any, base: type) -> dict[str, type]:
    """What a module exports of a kind, the kind itself left out."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)}
    return {name: value for name, value in found.items() if value is not base and not name.startswith("_")}


OPTIMIZERS = subclasses(optim, optim.Optimizer)


def switches(name: str) -> dict[str, Any]:
    """The options of an optimizer that are off, or None, by default."""
    parameters = inspect.signature(OPTIMIZERS[name]).parameters.values()
    found = {each.name: each.default for each in parameters if each.default is None or isinstance(each.default, bool)}
    return {switch: default for switch, default in found.items() if switch not in ELSEWHERE}


def cases() -> list[Any]:
    """Each optimizer: as it is, each switch turned, a tensor for a learning rate, other dtypes."""
    found = []
    for name in sorted(OPTIMIZERS.keys() & RECIPES.keys()):
        recipe = RECIPES[name]
        variants = [{}, {"lr": torch.tensor(0.02)}, *recipe.more]
        variants += [
            {switch: not default if default is not None else ON.get(switch)} for switch, default in switches(name).items()
        ]
        found += [pytest.param(name, variant, torch.float32, id=f"{name}-{variant}") for variant in variants]
        found += [pytest.param(name, {}, dtype, id=f"{name}-{dtype}") for dtype in recipe.dtypes]
    return found


def make(name: str, options: Mapping[str, Any], dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"):
    """A model and its optimizer, whose second group has options of its own."""
    torch.manual_seed(seed)
    recipe = RECIPES[name]
    net = recipe.net().to(device, dtype)
    parameters = list(net.parameters())
    # Every other parameter, so that the optimizer's order is not the model's.
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.005}] if recipe.groups else parameters
    return net, OPTIMIZERS[name](groups, **{"lr": 0.02, **recipe.options, **options})


def resumed(net: nn.Module, optimizer: optim.Optimizer, twin: nn.Module, twins: optim.Optimizer) -> None:
    """Saves a model and its optimizer, and restores them into others, which must then hold the same bits."""
    parts = {"model": net.state_dict(), "optimizer": optimizer_state(optimizer, net)}
    expected = bits(optimizer.state_dict()), commit.digest_of(parts["optimizer"], "optimizer")
    saved = through_a_store(parts)
    twin.load_state_dict(saved["model"])
    restore_optimizer(twins, check_optimizer(twins, twin, saved["optimizer"]))
    assert (bits(twins.state_dict()), commit.digest_of(optimizer_state(twins, twin), "optimizer")) == expected


def test_every_optimizer_of_torch_has_a_recipe():
    """An optimizer that a next torch adds is noticed, and so is a recipe for one that is gone."""
    assert not OPTIMIZERS.keys() - RECIPES.keys(), "say how to make one"
    if TorchVersion(torch.__version__) >= NEWEST:
        assert not RECIPES.keys() - OPTIMIZERS.keys(), "torch has none of this name"


def test_every_switch_of_every_optimizer_is_turned():
    """An option that a next torch adds to an optimizer is tried out."""
    unknown = {
        name: [key for key, default in switches(name).items() if default is None and key not in ON] for name in OPTIMIZERS
    }
    assert not {name: keys for name, keys in unknown.items() if keys}, "say what turns it on"


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(("name", "options", "dtype"), cases())
def test_an_optimizer_goes_on_bit_for_bit(name, options, dtype):
    """After a restore, state, options and the next steps of every optimizer are those of the run that never stopped."""
    net, optimizer = make(name, options, dtype)
    twin, twins = make(name, options, dtype, seed=1)
    train(net, optimizer, range(3))
    resumed(net, optimizer, twin, twins)
    train(net, optimizer, range(3, 6))
    train(twin, twins, range(3, 6))
    assert bits(twin.state_dict()) == bits(net.state_dict())
    assert bits(twins.state_dict()) == bits(optimizer.state_dict())


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_that_has_not_stepped_is_restored(name):
    """A checkpoint of step 0 takes the steps back that the live optimizer has made."""
    net, optimizer = make(name, {})
    twin, twins = make(name, {}, seed=1)
    train(twin, twins, range(2))
    resumed(net, optimizer, twin, twins)


@pytest.fixture
def float64_by_default():
    """Counts of steps are float64 then, except where torch casts them."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CAPTURABLE = [name for name, kind in sorted(OPTIMIZERS.items()) if "capturable" in inspect.signature(kind).parameters]


@pytest.mark.parametrize("name", CAPTURABLE)
@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_counts_of_steps_keep_their_dtype(name, option, float64_by_default):
    """torch casts the count of a capturable or fused optimizer to float32; the restored one is as it was saved."""
    net, optimizer = make(name, {}, torch.bfloat16)
    twin, twins = make(name, {}, torch.bfloat16, seed=1)
    train(net, optimizer, range(2))
    for group in (*optimizer.param_groups, *twins.param_groups):
        group[option] = True  # the CPU refuses to step with `capturable`, not to keep state
    resumed(net, optimizer, twin, twins)
    assert {state["step"].dtype for state in twins.state.values()} == {torch.float64}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_large_tensors_are_sent_to_a_gpu():
    """Bit for bit, in several pieces and a rest, whatever the dtype; small ones stay for torch to place."""
    large = torch.arange(40_000_003, dtype=torch.int32)
    value = {
        "state": {0: {"exp_avg": large.view(torch.float32), "step": torch.tensor(3.0)}},
        "half": large.to(torch.bfloat16),
    }
    found = sent(value, torch.device("cuda"))
    assert found["state"][0]["exp_avg"].device.type == found["half"].device.type == "cuda"
    assert found["state"][0]["step"] is value["state"][0]["step"]
    assert torch.equal(found["state"][0]["exp_avg"].view(torch.int32).cpu(), large)
    assert torch.equal(found["half"].cpu(), value["half"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_an_optimizer_on_a_gpu_goes_on_bit_for_bit(name):
    """State is restored to the device that it was on: moments, histories, counts of steps, a tensor for a learning rate."""
    options = {"capturable": True, "lr": torch.tensor(0.02, device="cuda")} if name in CAPTURABLE else {}
    net, optimizer = make(name, options, device="cuda")
    twin, twins = make(name, options, seed=1, device="cuda")
    train(net, optimizer, range(3))
    resumed(net, optimizer, twin, twins)
    train(net, optimizer, range(3, 6))
    train(twin, twins, range(3, 6))
    assert bits(twin.state_dict()) == bits(net.state_dict())


class Hoarder(optim.Optimizer):
    """Keeps one of everything that a state may be made of, most of it of another dtype than the parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "schedule": [1, (2.5, None)], "tables": {"warm": torch.arange(3)}})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        with torch.enable_grad():
            closure()
        self.state["all"] = {
            "steps": self.state["all"].get("steps", 0) + 1,
            "norm": torch.tensor(1 / 3, dtype=torch.float64),
        }
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, self.state[parameter], group["lr"])

    def move(self, parameter: torch.Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            state |= {
                "moment": torch.zeros_like(parameter, dtype=torch.float32),
                "history": [],
                "codes": torch.zeros(parameter.shape, dtype=torch.uint8),
                "count": torch.tensor((1 << 53) + 1),
                "rule": {
                    "name": "sign",
                    "blob": b"\x00\xff",
                    "shape": (2, [None, True]),
                    "seen": {1, 2},
                    "rows": Counter("aab"),
                },
                "array": np.linspace(0, 1, 3, dtype=np.float32),
                "root": 1 + 2j,
                "best": float("inf"),
                "twin": None,
            }
        state["moment"].lerp_(parameter.grad.float(), 0.1)
        state["history"] = [*state["history"][-1:], (state["moment"] / 3, {"at": state["count"].double() / 7})]
        state["codes"] += 1
        state["count"] += 1
        scale = float(state["array"].sum()) * len(state["rule"]["name"]) * state["codes"].float().mean()
        parameter.sub_((lr * scale * (state["moment"] + state["history"][0][0])).to(parameter.dtype))


def test_a_state_of_any_dtype_and_kind_survives_beside_bf16_parameters():
    """fp32 moments of bf16 parameters, nested ones too, and values that ``load_state_dict`` mangles are as they were."""
    net, twin = Net().bfloat16(), Net().bfloat16()
    optimizer, twins = Hoarder(net.parameters()), Hoarder(twin.parameters())
    train(net, optimizer, range(3))
    resumed(net, optimizer, twin, twins)
    train(net, optimizer, range(3, 6))
    train(twin, twins, range(3, 6))
    assert bits(twin.state_dict()) == bits(net.state_dict())


def test_an_lbfgs_history_survives_parameters_of_two_dtypes():
    """LBFGS files one fp32 history for all parameters under the first of them, which may be of bf16."""
    nets = [Net(), Net()]
    for net in nets:
        net.first.bfloat16()
    optimizers = [optim.LBFGS(net.parameters(), lr=0.3, max_iter=3) for net in nets]
    train(nets[0], optimizers[0], range(3))
    resumed(nets[0], optimizers[0], nets[1], optimizers[1])
    history = next(iter(optimizers[1].state.values()))
    assert {tensor.dtype for tensor in (history["d"], *history["old_dirs"], *history["ro"])} == {torch.float32}


class Newer(optim.SGD):
    """A later version of an optimizer, which moves older states up."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for values in self.state.values():
            values["age"] = torch.tensor(float(values["age"]))
            values["new"] = values.pop("old").double()


def test_what_an_optimizer_makes_of_an_older_state_stands():
    """Putting back what torch has cast does not undo what the optimizer itself does to load the state."""
    net, optimizer = make("SGD", {})
    train(net, optimizer, range(1))
    for values in optimizer.state.values():
        values |= {"age": 3, "old": torch.ones(1)}
    saved = through_a_store({"o": {**optimizer_state(optimizer, net), "class": "Newer"}})["o"]
    twins = Newer(optimizer.param_groups, momentum=0.9)
    restore_optimizer(twins, check_optimizer(twins, net, saved))
    momentum = optimizer.state[net.first.weight]["momentum_buffer"]
    expected = {"momentum_buffer": momentum, "age": torch.tensor(3.0), "new": torch.ones(1).double()}
    assert bits(twins.state[net.first.weight]) == bits(expected)


def test_a_state_that_cannot_be_written_is_refused_with_its_path():
    """What has no form on disk is refused when it is saved, by the name of the parameter that has it."""
    net, optimizer = make("SGD", {})
    train(net, optimizer, range(1))
    optimizer.state[net.first.weight]["hook"] = [print]
    with pytest.raises(Unsupported, match=r"^optimizer/state/first\.weight/hook/0: a value of type builtins\."):
        through_a_store({"optimizer": optimizer_state(optimizer, net)})


# --- optimizers: names and differences ---------------------------------------------------------------------------------


class Reordered(Net):
    """The same parameters, declared in another order."""

    def __init__(self) -> None:
        super().__init__()
        self._modules = dict(reversed(self._modules.items()))


def test_state_follows_the_names_when_the_order_of_the_parameters_changes():
    """A model whose modules are declared in another order goes on just the same."""
    net, twin = Net(), Reordered()
    optimizer, twins = optim.AdamW(net.named_parameters()), optim.AdamW(twin.named_parameters())
    assert [*dict(twin.named_parameters())] != [*dict(net.named_parameters())]
    train(net, optimizer, range(3))
    saved = through_a_store({"model": net.state_dict(), "optimizer": optimizer_state(optimizer, net)})
    twin.load_state_dict(saved["model"])
    restore_optimizer(twins, check_optimizer(twins, twin, saved["optimizer"]))
    assert twins.param_groups[0]["param_names"] == [*dict(twin.named_parameters())]
    train(net, optimizer, range(3, 6))
    train(twin, twins, range(3, 6))
    assert {name: bits(value) for name, value in twin.state_dict().items()} == {
        name: bits(value) for name, value in net.state_dict().items()
    }


def test_the_name_of_a_tied_parameter_does_not_depend_on_the_order_of_the_modules():
    """Two names of one parameter lead to the same state, whichever module is declared first."""
    net, twin = Net(), Reordered()
    for model in (net, twin):
        model.second.weight = nn.Parameter(torch.ones(2, 4))
        model.third = nn.Linear(4, 2)
        model.third.weight = model.second.weight
    twin._modules = {"third": twin._modules.pop("third"), **twin._modules}
    optimizer, twins = optim.AdamW(net.parameters()), optim.AdamW(twin.parameters())
    train(net, optimizer, range(1))
    restore_optimizer(twins, check_optimizer(twins, twin, through_a_store({"o": optimizer_state(optimizer, net)})["o"]))
    assert bits(twins.state[twin.third.weight]) == bits(optimizer.state[net.third.weight])


def test_names_that_an_optimizer_was_told_are_no_option():
    """``parameters()`` may become ``named_parameters()`` between two starts, in the words of any wrapper."""
    net, optimizer = make("Adam", {})
    train(net, optimizer, range(1))
    saved = through_a_store({"o": optimizer_state(optimizer, net)})["o"]
    for group in optimizer.param_groups:
        group["param_names"] = [f"module.{index}" for index in range(len(group["params"]))]
    assert bits(optimizer_state(optimizer, net)) == bits(saved)
    check_optimizer(optimizer, net, saved)


def test_no_optimizer_takes_the_state_of_another():
    """Adam's moments are not AdamW's, though all names and options are the same."""
    taken = []
    for one in OPTIMIZERS:
        for other in OPTIMIZERS:
            net = Matrices()
            saved = through_a_store({"o": optimizer_state(OPTIMIZERS[one](net.parameters(), lr=0.1), net)})["o"]
            with contextlib.suppress(Mismatch):
                check_optimizer(OPTIMIZERS[other](net.parameters(), lr=0.1), net, saved)
                taken.append((one, other))
    assert taken == [(name, name) for name in OPTIMIZERS]


def test_what_differs_between_two_optimizers_is_listed():
    """The message has every parameter group and parameter that differs; nothing live is touched."""
    net = Net()
    saved = optimizer_state(optim.SGD([{"params": [net.first.weight, net.first.bias]}, {"params": [net.second.bias]}]), net)
    saved = through_a_store({"o": saved})["o"]
    optimizer = optim.SGD(
        [{"params": [net.first.weight]}, {"params": [net.second.bias, net.first.bias]}, {"params": [net.second.weight]}]
    )
    before = bits(optimizer.state_dict())
    with pytest.raises(Mismatch) as caught:
        check_optimizer(optimizer, net, saved)
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit the optimizer SGD (3 differences)",
        "  parameter groups: the checkpoint has 2, the optimizer has 3; "  # noqa: ISC004
        "add the groups of add_param_group before Run is made, or in Run(..., adapt=...)",
        "  group 0: first.bias is only in the checkpoint",
        "  group 1: first.bias is only in the optimizer",
    ]
    assert bits(optimizer.state_dict()) == before


def test_a_parameter_that_is_not_the_models_is_refused():
    """The moments of a foreign parameter would be saved and its value lost: it is told before the first step."""
    net = Net()
    optimizer = optim.SGD([{"params": net.parameters()}, {"params": [torch.zeros(2, 3, requires_grad=True)]}])
    with pytest.raises(
        Unsupported, match=r"^optimizer: parameter 0 of group 1 \(float32\[2, 3\]\) does not belong to the model"
    ):
        optimizer_state(optimizer, net)


def test_an_optimizers_own_state_under_the_name_of_a_parameter_is_refused():
    """State that is no parameter's is kept under its own key, and never merged with that of a parameter."""
    net, optimizer = make("SGD", {})
    train(net, optimizer, range(1))
    optimizer.state["first.weight"] = {"momentum_buffer": torch.zeros(1)}
    with pytest.raises(Unsupported, match=r"^optimizer/state: first\.weight "):
        optimizer_state(optimizer, net)


# --- schedulers ------------------------------------------------------------------------------------------------------


class Ramp:
    """A callable with a state of its own: what it returns depends on how often it was called."""

    def __init__(self, gain: float) -> None:
        self.gain, self.calls, self.seen = gain, 0, Counter()

    def __call__(self, at: float) -> float:
        self.calls += 1
        self.seen[round(at) % 3] += 1
        return self.gain / (self.calls + self.seen[1])

    def method(self, at: float) -> float:
        return self.gain / (1 + at)


def fading(at: float) -> float:
    return 0.9**at


def sequence(optimizer: optim.Optimizer) -> lr_scheduler.LRScheduler:
    """One that takes others in turn."""
    warm = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
    parts = [warm, lr_scheduler.ExponentialLR(optimizer, 0.95), lr_scheduler.StepLR(optimizer, 3, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [5, 12])


def cyclic(mode: str, **options: Any) -> Any:
    return partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=[0.1, 0.2], step_size_up=3, mode=mode, gamma=0.9, **options)


SCHEDULERS = {
    "ChainedScheduler": [
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [sequence(optimizer), lr_scheduler.MultiStepLR(optimizer, [2, 9, 9], 0.5)]
        ),
        lambda optimizer: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, 0.3, 4), lr_scheduler.MultiplicativeLR(optimizer, Ramp(2.0))], optimizer
        ),
    ],
    "ConstantLR": [partial(lr_scheduler.ConstantLR, factor=0.3, total_iters=9)],
    "CosineAnnealingLR": [partial(lr_scheduler.CosineAnnealingLR, T_max=11, eta_min=1e-3)],
    "CosineAnnealingWarmRestarts": [partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3, T_mult=2)],
    "CyclicLR": [
        cyclic("triangular"),
        cyclic("triangular2", step_size_down=5),
        cyclic("exp_range", cycle_momentum=False),
        cyclic("triangular", scale_fn=fading, scale_mode="iterations"),
        cyclic("triangular", scale_fn=Ramp(0.7).method),
        lambda optimizer: cyclic("triangular", scale_fn=Ramp(0.7))(optimizer),  # noqa: PLW0108  # each has a Ramp of its own
    ],
    "ExponentialLR": [partial(lr_scheduler.ExponentialLR, gamma=0.9)],
    "LambdaLR": [
        partial(lr_scheduler.LambdaLR, lr_lambda=fading),
        partial(lr_scheduler.LambdaLR, lr_lambda=[fading, partial(pow, 0.8)]),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, [Ramp(1.0), fading]),
    ],
    "LinearLR": [partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=12)],
    "MultiStepLR": [partial(lr_scheduler.MultiStepLR, milestones=[2, 9, 9, 15], gamma=0.5)],
    "MultiplicativeLR": [
        partial(lr_scheduler.MultiplicativeLR, lr_lambda=fading),
        lambda optimizer: lr_scheduler.MultiplicativeLR(optimizer, [Ramp(1.5), Ramp(1.7)]),
    ],
    "OneCycleLR": [
        partial(lr_scheduler.OneCycleLR, max_lr=[0.1, 0.2], total_steps=40),
        partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30, anneal_strategy="linear", three_phase=True),
    ],
    "PolynomialLR": [partial(lr_scheduler.PolynomialLR, total_iters=20, power=1.5)],
    "ReduceLROnPlateau": [
        partial(lr_scheduler.ReduceLROnPlateau, patience=1, cooldown=1),
        partial(lr_scheduler.ReduceLROnPlateau, mode="max", threshold_mode="abs", patience=2, min_lr=[1e-3, 1e-4]),
    ],
    "SWALR": [
        partial(swa_utils.SWALR, swa_lr=0.5, anneal_epochs=9),
        partial(swa_utils.SWALR, swa_lr=[0.5, 0.4], anneal_strategy="linear"),
    ],
    "SequentialLR": [sequence],
    "StepLR": [partial(lr_scheduler.StepLR, step_size=3, gamma=0.7)],
}
ALL_SCHEDULERS = subclasses(lr_scheduler, lr_scheduler.LRScheduler) | subclasses(swa_utils, lr_scheduler.LRScheduler)


def with_scheduler(build: Callable[..., Any] | None, *, lr: Any = 0.1, kind: Any = optim.SGD, seed: int = 0) -> Training:
    """A state whose optimizer has two groups with learning rates of their own."""
    torch.manual_seed(seed)
    net = Net()
    groups = [{"params": net.first.parameters(), "lr": lr}, {"params": net.second.parameters(), "lr": lr / 2}]
    optimizer = kind(groups, **({"momentum": 0.9} if kind is optim.SGD else {}))
    scheduler = None if build is None else build(optimizer)
    return Training(net, optimizer, scheduler)


def walk(state: Training, steps: range) -> list[Any]:
    """The options of all parameter groups after each of some steps."""
    options = []
    for index in steps:
        state.optimizer.step()
        metrics = (
            [torch.tensor(1 / (1 + min(index, 4)))] if isinstance(state.scheduler, lr_scheduler.ReduceLROnPlateau) else []
        )
        state.scheduler.step(*metrics)
        groups = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
        options.append(bits(groups))
    return options


def test_every_scheduler_of_torch_has_a_recipe():
    """A scheduler that a next torch adds is noticed, and so is a recipe for one that is gone."""
    assert not ALL_SCHEDULERS.keys() - SCHEDULERS.keys(), "say how to make one"
    if TorchVersion(torch.__version__) >= NEWEST:
        assert not SCHEDULERS.keys() - ALL_SCHEDULERS.keys(), "torch has none of this name"


@pytest.mark.parametrize("steps", [0, 7])
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "build",
    [pytest.param(build, id=f"{name}-{index}") for name in SCHEDULERS for index, build in enumerate(SCHEDULERS[name])],
)
def test_a_scheduler_goes_on_bit_for_bit(build, lr, steps):
    """After a restore, all options that any scheduler moves are the uninterrupted run's for the next 20 steps."""
    state, twin = with_scheduler(build, lr=lr), with_scheduler(build, lr=lr, seed=1)
    walk(state, range(steps))
    twin.restore(through_a_store(state.capture()), steps)
    assert bits(twin.scheduler.state_dict()) == bits(state.scheduler.state_dict())
    following = range(steps, steps + 20)
    assert walk(twin, following) == walk(state, following)


def test_a_scheduler_that_moves_betas_goes_on_bit_for_bit():
    """Adam's momentum is one of two numbers in a tuple, and is restored as one."""
    for build in (cyclic("triangular2"), partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=40)):
        state, twin = with_scheduler(build, kind=optim.AdamW), with_scheduler(build, kind=optim.AdamW)
        walk(state, range(7))
        twin.restore(through_a_store(state.capture()), 7)
        assert walk(twin, range(7, 27)) == walk(state, range(7, 27))


def test_a_scheduler_that_cannot_be_written_is_refused_with_its_path():
    """A callable object that holds a function is refused when it is saved."""
    function = Ramp(1.0)
    function.then = [fading]
    state = with_scheduler(partial(lr_scheduler.LambdaLR, lr_lambda=[fading, function]))
    with pytest.raises(Unsupported, match=r"^scheduler/state/lr_lambdas/1/then/0: a value of type builtins\.function"):
        through_a_store(state.capture())


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        (None, SCHEDULERS["StepLR"][0], "not in the checkpoint; the run has StepLR"),
        (SCHEDULERS["StepLR"][0], None, "not in the run; the checkpoint has it"),
        (SCHEDULERS["StepLR"][0], SCHEDULERS["ExponentialLR"][0], "the checkpoint has StepLR, the task has ExponentialLR"),
        (
            SCHEDULERS["ChainedScheduler"][0],
            SCHEDULERS["ChainedScheduler"][1],
            "the checkpoint has ChainedScheduler(SequentialLR(LinearLR, ExponentialLR, StepLR), MultiStepLR), "  # noqa: ISC004
            "the task has ChainedScheduler(ConstantLR, MultiplicativeLR)",
        ),
    ],
)
def test_no_scheduler_takes_the_state_of_another(saved, live, message):
    """What ``load_state_dict`` would merge in silence is refused, and nothing live is touched."""
    parts = through_a_store(with_scheduler(saved).capture())
    state = with_scheduler(live, seed=1)
    before = bits(state.capture())
    with pytest.raises(Mismatch) as caught:
        state.restore(parts, 3)
    assert any(line.endswith(f"scheduler: {message}") for line in str(caught.value).splitlines())
    assert (bits(state.capture()), state.progress.step) == (before, 0)


# --- the gradient scaler -----------------------------------------------------------------------------------------------


def with_scaler(*, enabled: bool = True, fused: bool = False, seed: int = 0) -> Training:
    torch.manual_seed(seed)
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=3, enabled=enabled)
    optimizer = optim.AdamW(net.parameters(), lr=0.01, fused=fused)
    return Training(net, optimizer, None, scaler)


def train_scaled(state: Training, steps: range) -> list[float]:
    """Mixed precision; the gradients of step 4 overflow. Returns the scales."""
    scales = []
    for index in steps:
        with torch.autocast("cpu", torch.float16):
            loss = state.model.loss(index) * (1e30 if index == 4 else 1)
        state.scaler.scale(loss).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        scales.append(state.scaler.get_scale())
    return scales


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_a_gradient_scaler_goes_on_bit_for_bit(steps, fused):
    """Scale and growth go on within an interval and after an overflow as in the run that never stopped."""
    state, twin = with_scaler(fused=fused), with_scaler(fused=fused, seed=1)
    scales = train_scaled(state, range(steps))
    twin.restore(through_a_store(state.capture()), steps)
    following = range(steps, 10)
    scales += train_scaled(state, following)
    assert train_scaled(twin, following) == scales[steps:]
    assert bits(twin.capture()) == bits(state.capture())
    assert max(scales) > scales[0] and scales[4] < scales[3], "the scale has grown, and the overflow has cut it"


@pytest.mark.parametrize("enabled", [False, True])
def test_a_gradient_scaler_is_needed_where_one_was_saved_and_only_there(enabled):
    """A change of ``train.precision`` to or from fp16 is refused before anything live is touched."""
    parts = through_a_store(with_scaler(enabled=enabled).capture())
    state = with_scaler(enabled=not enabled, seed=1)
    before = bits(state.capture())
    with pytest.raises(Mismatch, match=r"^scaler: "):
        state.restore(parts, 3)
    assert bits(state.capture()) == before
