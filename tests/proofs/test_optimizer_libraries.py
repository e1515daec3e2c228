"""Every optimizer of some libraries resumes bit for bit, or is refused at the first save; never a silent difference.

The libraries are nothing that harness or its other tests need: ``make soak`` installs them into a folder of their own, which
``SOAK_LIBRARIES`` names; ``SOAK_OPTIMIZERS="lamb adan"`` tries these alone. Each optimizer that trains a small model for 12
steps on its own trains it for 6, is saved, and goes on in objects that were made anew. The others need a model of another
kind, several processes or a GPU, or fail by themselves.
"""

import contextlib
import importlib
import importlib.util
import inspect
import logging
import os
import random
import sys
import types
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn, optim

from harness.errors import HarnessError
from harness.runtime.signals import StopRequest
from harness.training.run import Run
from tests.support.states import bits

STEPS, SAVED = 12, 6


class Net(nn.Module):
    """Convolutions and matrices."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 1)
        self.third, self.last = nn.Linear(16, width), nn.Linear(width, 4)

    def forward(self, index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(4, 3, 8, 8, generator=generator)
        if self.first.weight.is_contiguous(memory_format=torch.channels_last):
            inputs = inputs.to(memory_format=torch.channels_last)
        hidden = self.second(self.first(inputs).tanh()).tanh().mean((2, 3))
        target = torch.randint(4, (4,), generator=generator)
        return nn.functional.cross_entropy(self.last(self.third(hidden).tanh()), target)


# --- how an optimizer may want to be made, and to be called ------------------------------------------------------------

Make = Callable[[nn.Module], optim.Optimizer]
Step = Callable[[nn.Module, optim.Optimizer, int], None]


def makes(kind: Any) -> Iterator[Make]:
    """With the usual arguments; with the model in place of its parameters; with groups for matrices and for the rest."""

    def groups(net: nn.Module) -> list[dict[str, Any]]:
        each = list(net.parameters())
        matrices, others = [p for p in each if p.ndim > 1], [p for p in each if p.ndim < 2]
        return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]

    yield lambda net: kind(net.parameters(), lr=1e-3)
    yield lambda net: kind(net.parameters())
    yield lambda net: kind(groups(net))
    yield lambda net: kind(net, lr=1e-3)
    yield lambda net: kind(net.parameters(), num_data=48)


def plain(net: nn.Module, optimizer: optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    net(index).backward()
    optimizer.step()


def with_closure(net: nn.Module, optimizer: optim.Optimizer, index: int) -> None:
    def closure() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            loss = net(index)
            loss.backward()
            return loss

    closure()  # some want gradients when they are called, and these must be of this step
    optimizer.step(closure)


def with_second_derivatives(net: nn.Module, optimizer: optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    net(index).backward(create_graph=True)
    optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None  # which has the graph that has it


def with_loss(net: nn.Module, optimizer: optim.Optimizer, index: int) -> None:
    optimizer.zero_grad()
    loss = net(index)
    loss.backward()
    optimizer.step(lambda: loss)


WAYS: list[Step] = [plain, with_closure, with_second_derivatives, with_loss]


# --- the libraries -----------------------------------------------------------------------------------------------------


def of_timm() -> dict[str, list[Make]]:
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed: make soak does it")
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("timm.optim")
    if "timm.optim" not in sys.modules:  # its models need torchvision, its optimizers do not
        for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
            del sys.modules[name]
        for name, path in (("timm", list(spec.submodule_search_locations)), ("timm.models", [])):
            sys.modules[name] = module = types.ModuleType(name)
            module.__path__ = path
        sys.modules["timm.models"].group_parameters = None
    library = importlib.import_module("timm.optim")
    options = {"lr": 1e-3, "momentum": 0.9}
    return {name: [partial(library.create_optimizer_v2, opt=name, **options)] for name in library.list_optimizers()}


def of_pytorch_optimizer() -> dict[str, list[Make]]:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed: make soak does it")
    adamw = partial(optim.AdamW, lr=1e-3)
    wrappers = {
        "Lookahead": lambda net: library.Lookahead(adamw(net.parameters()), k=4),
        "ScheduleFreeWrapper": lambda net: library.ScheduleFreeWrapper(adamw(net.parameters())),
        "TRAC": lambda net: library.TRAC(adamw(net.parameters())),
        "OrthoGrad": lambda net: library.OrthoGrad(adamw(net.parameters())),
        "SAM": lambda net: library.SAM(net.parameters(), optim.AdamW, lr=1e-3),
        "LookSAM": lambda net: library.LookSAM(net.parameters(), optim.AdamW, lr=1e-3),
        "FriendlySAM": lambda net: library.FriendlySAM(net.parameters(), optim.AdamW, lr=1e-3),
    }
    names = library.get_supported_optimizers()
    return {name: list(makes(library.load_optimizer(name))) for name in names} | {
        name: [make] for name, make in wrappers.items() if hasattr(library, name)
    }


def of_torchao() -> dict[str, list[Make]]:
    library = pytest.importorskip("torchao.optim", reason="torchao is not installed: make soak does it")
    kinds = {name: getattr(library, name) for name in library.__all__ if "Offload" not in name}
    return {name: list(makes(kind)) for name, kind in kinds.items()}


def of_schedulefree() -> dict[str, list[Make]]:
    library = pytest.importorskip("schedulefree", reason="schedulefree is not installed: make soak does it")
    kinds = {
        name: kind for name, kind in vars(library).items() if inspect.isclass(kind) and issubclass(kind, optim.Optimizer)
    }
    wrappers = {name: kind for name, kind in kinds.items() if "Wrapper" in name}
    made = {name: [lambda net, kind=kind: kind(optim.AdamW(net.parameters(), lr=1e-3))] for name, kind in wrappers.items()}
    return {name: list(makes(kind)) for name, kind in kinds.items()} | made


LIBRARIES = {
    "timm": of_timm,
    "pytorch_optimizer": of_pytorch_optimizer,
    "torchao": of_torchao,
    "schedulefree": of_schedulefree,
}


# --- training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A way to make an optimizer, and to step with it."""

    make: Make
    step: Step
    memory_format: torch.memory_format
    width: int

    def built(self, seed: int) -> tuple[nn.Module, optim.Optimizer]:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        net = Net(self.width).to(memory_format=self.memory_format)
        optimizer = self.make(net)
        if hasattr(optimizer, "train"):
            optimizer.train()  # of a schedule-free one
        return net, optimizer

    def alone(self) -> Any:
        net, optimizer = self.built(seed=0)
        for index in range(STEPS):
            self.step(net, optimizer, index)
        return told(net, optimizer)

    def under_a_run(self, url: str, seed: int, until: int) -> Any:
        net, optimizer = self.built(seed)
        state = {"model": net, "optimizer": optimizer}
        # The comparison is with a training without harness, and some of these draw random numbers.
        config = {"log": {"every_steps": None}, "checkpoint": {"random": "carried"}}
        run = Run(url, state, every_steps=SAVED, stop=StopRequest(), config=config, reopen=True)  # ended early, it trains on
        try:
            for index in run.steps(STEPS):
                self.step(net, optimizer, index)
                run.step()
                if run.global_step == until < STEPS:
                    run.finish()
                    break
        finally:
            run.close()
        return told(net, optimizer)


def told(net: nn.Module, optimizer: optim.Optimizer) -> Any:
    """All bits of weights and of the state, and how they lie in memory."""
    return {"model": deep(net.state_dict()), "optimizer": deep(optimizer.state_dict())}


def deep(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and type(value) not in (torch.Tensor, nn.Parameter):
        names, context = value.__tensor_flatten__()
        return deep(context), {name: deep(getattr(value, name)) for name in names}
    if isinstance(value, torch.Tensor):
        return bits(value), value.stride()
    if isinstance(value, Mapping):
        return {repr(key): deep(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [deep(item) for item in value]
    return repr(value) if isinstance(value, str | bool | int | float | complex | None) else type(value).__name__


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from differences(one.get(key, "nothing"), other.get(key, "nothing"), f"{path}/{key}")
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{path}/{index}")
    elif one != other:
        yield f"{path}: {one!s:.80} and {other!s:.80}"


def first_that_works(trials: Iterable[Trial]) -> tuple[Trial, Any] | str:
    problem = ""
    for trial in trials:
        try:
            return trial, trial.alone()
        except Exception as error:
            problem = problem or f"{type(error).__name__}: {error}".partition("\n")[0]
    return problem


def outcome(trials: Iterable[Trial]) -> tuple[str, str]:
    """equal, refused, different or does not train; and why."""
    found = first_that_works(trials)
    if isinstance(found, str):
        return "does not train", found
    trial, end = found
    if list(differences(end, trial.alone())):
        return "does not train", "to the same end twice"
    url = f"memory://{uuid.uuid4()}"
    try:
        try:
            trial.under_a_run(url, seed=0, until=SAVED)
        except HarnessError as error:
            return "refused", f"{type(error).__name__}: {error}"
        resumed = trial.under_a_run(url, seed=1, until=STEPS)
    except Exception as error:
        return "different", f"{type(error).__name__}: {error}"
    finally:
        with contextlib.suppress(FileNotFoundError):
            fsspec.filesystem("memory").rm(url.removeprefix("memory:/"), recursive=True)
    different = next(differences(end, resumed), None)
    return ("equal", "") if different is None else ("different", different)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", LIBRARIES)
def test_every_optimizer_of_a_library_resumes_bit_for_bit_or_is_refused(library, caplog, capsys, monkeypatch):
    """After 6 steps, a save and 6 more in new objects, all bits and strides are those of 12 steps without harness."""
    caplog.set_level(logging.CRITICAL)
    torch.compiler.set_stance("force_eager")  # the arithmetic is what matters, and compiling takes minutes
    wanted = os.environ.get("SOAK_OPTIMIZERS", "").split()
    if folder := os.environ.get("SOAK_LIBRARIES"):
        monkeypatch.syspath_prepend(folder)
    found: dict[str, list[str]] = defaultdict(list)
    try:
        for name, each in LIBRARIES[library]().items():
            if wanted and name not in wanted:
                continue
            for memory_format in (torch.contiguous_format, torch.channels_last):
                width = 256 if library == "torchao" else 32  # smaller ones are not kept in 8 bits
                what, why = outcome(Trial(make, way, memory_format, width) for make in each for way in WAYS)
                found[what].append(f"{name} ({str(memory_format).removeprefix('torch.')}): {why}")
                with capsys.disabled():
                    print("." if what == "equal" else f"\n{library}: {what}: {found[what][-1]:.400}", end="", flush=True)
    finally:
        torch.compiler.set_stance("default")
    with capsys.disabled():
        print(f"\n{library}: {', '.join(f'{len(each)} {what}' for what, each in sorted(found.items()))}")
    assert found["equal"], "none of them was tried"
    assert not found["different"]
    assert len({each.partition(" ")[0] for each in found["refused"]}) <= 5, found["refused"]
