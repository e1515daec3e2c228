"""Optimizers as people write them go on from a checkpoint bit for bit, or are refused when they are saved."""

import random
import uuid
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import optim

from harness.checkpoint import commit, load
from harness.checkpoint.format import Attempt
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.storage.store import open_store
from tests.support.states import Net, Training, bits, through_a_store, train


class Counting(optim.SGD):
    """Makes an option in its first step, and another one later."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] = group["step"] + 1 if "step" in group else 1
            group["lr"] = 0.1 / group["step"]
            if group["step"] > 2:
                group["seen"] = (*group.get("seen", ()), group["step"])
        return super().step(closure)


class Typed(optim.Optimizer):
    """Has a dtype and a device for options, and keeps its moments in that dtype."""

    def __init__(self, params: Any) -> None:
        options = {"lr": 0.1, "state_dtype": torch.float16, "device": torch.device("cpu"), "betas": {0: 0.9, "x": [0.8]}}
        super().__init__(params, options)

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                with torch.no_grad():
                    self.move(parameter, self.state[parameter], group)

    def move(self, parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        dtype, device = group["state_dtype"], group["device"]
        if not state:
            state["moment"] = torch.zeros_like(parameter, dtype=dtype, device=device)
        state["moment"].mul_(group["betas"][0]).add_(parameter.grad.to(dtype))
        parameter.sub_(group["lr"] * state["moment"].to(parameter))


class Windowed(Typed):
    """Keeps the newest three gradients in a deque that drops the oldest, and its dtype in the state."""

    def move(self, parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"window": deque(maxlen=3), "nested": {"losses": deque([(1, 2.5)], maxlen=2)}, "dtype": torch.float64}
        state["window"].append(parameter.grad.to(state["dtype"]) / 3)
        state["nested"]["losses"].append((len(state["window"]), float(parameter.grad.norm())))
        parameter.sub_((group["lr"] * sum(state["window"]) * len(state["nested"]["losses"])).to(parameter))


class Wrapping(optim.Optimizer):
    """Keeps slow weights beside another optimizer; its ``state_dict`` has a form of its own."""

    def __init__(self, params: Any) -> None:
        self.base = optim.AdamW(params, lr=0.02)
        super().__init__(self.base.param_groups, {"k": 2})
        self.param_groups = self.base.param_groups

    def step(self, closure: Callable[[], Any]) -> None:
        self.base.step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                slow = state.setdefault("slow", parameter.detach().clone())
                state["count"] = state.get("count", 0) + 1
                if state["count"] % group["k"] == 0:
                    parameter.data.copy_(slow.lerp_(parameter.data, 0.5))

    def numbered(self) -> dict[Any, torch.Tensor]:
        return {(i, j): each for i, group in enumerate(self.param_groups) for j, each in enumerate(group["params"])}

    def state_dict(self) -> dict[str, Any]:
        slow = {key: dict(self.state[each]) for key, each in self.numbered().items() if each in self.state}
        return {"slow": slow, "base": self.base.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.param_groups = self.base.param_groups
        self.state.clear()
        self.state.update({self.numbered()[key]: dict(value) for key, value in state["slow"].items()})


class Sharpened(optim.Optimizer):
    """Climbs before another optimizer steps, whose moments its own ``state_dict`` does not have."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"rho": 0.05})
        self.base_optimizer = optim.AdamW(self.param_groups, lr=0.02)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                self.state[parameter]["before"] = parameter.detach().clone()
                parameter.data.add_(parameter.grad, alpha=group["rho"])
        closure()
        for parameter, state in self.state.items():
            parameter.data.copy_(state["before"])
        self.base_optimizer.step()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.base_optimizer.param_groups = self.param_groups


class Noisy(optim.SGD):
    """Keeps a count, an average and generators as attributes, where no ``state_dict`` has them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        self.steps, self.label = 0, "noise"
        self.torch_generator = torch.Generator().manual_seed(5)
        self.python_generator = random.Random(5)
        self.numpy_generator = np.random.default_rng(5)
        self.older_generator = np.random.RandomState(5)
        self.average = torch.zeros(())

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.steps += 1
        self.newest = self.steps / 3
        factor = self.python_generator.random() + self.numpy_generator.random() + self.older_generator.rand()
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                noise = torch.randn(parameter.shape, generator=self.torch_generator).to(parameter)
                parameter.data.add_(noise, alpha=0.001 * factor / self.steps)
                self.average.lerp_(parameter.detach().mean().float(), 0.1)
                parameter.data.sub_(self.average.to(parameter) * 0.01)
        return result


class Packed(torch.Tensor):
    """A tensor that has its values as whole numbers and a scale."""

    def __new__(cls, codes: torch.Tensor, _scale: torch.Tensor, _bits: int, dtype: torch.dtype) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bits: int, _dtype: torch.dtype) -> None:
        self.codes, self.scale, self.bits = codes, scale, bits

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], [self.bits, self.dtype]

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"], *context)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            dtype = (kwargs or {}).get("dtype") or args[0].dtype
            return cls(args[0].codes.clone(), args[0].scale.clone(), args[0].bits, dtype)
        raise NotImplementedError(function)


class EightBit(Typed):
    """Keeps its moments in a tensor of a class of its own."""

    def move(self, parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state["moment"] = Packed(torch.zeros_like(parameter, dtype=torch.int8), torch.ones(()), 8, torch.float32)
        packed = state["moment"]
        moment = packed.codes.float() * packed.scale * 0.9 + parameter.grad.float()
        packed.scale.copy_(moment.abs().max().clamp_min(1e-9) / 127)
        packed.codes.copy_((moment / packed.scale).round())
        parameter.sub_((0.02 * packed.codes.float() * packed.scale).to(parameter))


class Casting(optim.AdamW):
    """Its own ``load_state_dict`` makes tensors of another dtype, which are put back."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for values in self.state.values():
            values["exp_avg"] = values["exp_avg"].clone().double()


@pytest.fixture
def declared_safe():
    with torch.serialization.safe_globals([Packed]):
        yield


def of_kind(kind: Any, seed: int, dtype: torch.dtype = torch.float32) -> Training:
    torch.manual_seed(seed)
    net = Net().to(dtype)
    return Training(net, kind(net.parameters()))


def digests(state: Training) -> dict[str, str]:
    return {name: commit.digest_of(part, name) for name, part in state.capture().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Counting, Typed, Windowed, Wrapping, Sharpened, Noisy, EightBit, Casting])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_an_optimizer_of_any_make_goes_on_bit_for_bit(kind, dtype, steps, declared_safe, caplog):
    """In new objects, and in live ones that have gone on: options, values of any kind, and attributes are as they were."""
    state, twin, other = of_kind(kind, 0, dtype), of_kind(kind, 1, dtype), of_kind(kind, 2, dtype)
    train(other.model, other.optimizer, range(6))
    train(state.model, state.optimizer, range(steps))
    store = open_store(f"memory://{uuid.uuid4()}")
    written = commit.write(store, state.capture(), step=steps, attempt=Attempt.after([]))
    train(state.model, state.optimizer, range(steps, 8))
    for each in (twin, other):
        each.restore(load.read(store, *written), steps)
        train(each.model, each.optimizer, range(steps, 8))
        assert bits(each.model.state_dict()) == bits(state.model.state_dict())
        assert digests(each) == digests(state)
    assert not caplog.records


def test_an_option_that_only_the_program_has_keeps_its_value_and_is_told_of(caplog):
    """An upgrade of torch adds options: the run goes on, and one line names them."""
    state, twin = of_kind(optim.AdamW, 0), of_kind(optim.AdamW, 1)
    train(state.model, state.optimizer, range(2))
    parts = through_a_store(state.capture())
    for group in parts["optimizer"]["param_groups"]:
        del group["decoupled_weight_decay"], group["capturable"]
    twin.restore(parts, 2)
    assert twin.optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert [record.getMessage() for record in caplog.records] == [
        "AdamW: the checkpoint has no option capturable, decoupled_weight_decay; using the value of this program"
    ]
    train(state.model, state.optimizer, range(2, 4))
    train(twin.model, twin.optimizer, range(2, 4))
    assert digests(twin) == digests(state)


def test_a_tensor_of_a_class_that_is_not_declared_safe_is_refused_at_the_save():
    """Whoever loads the checkpoint would have no way to build it."""
    state = of_kind(EightBit, 0)
    train(state.model, state.optimizer, range(1))
    with pytest.raises(
        Unsupported, match=r"^optimizer/state/first\.\w+/moment: a tensor of the subclass \S*Packed .* declare"
    ):
        through_a_store(state.capture())


def test_a_tensor_of_a_class_of_its_own_stays_one_where_its_parameter_lies_otherwise(declared_safe):
    """Only what is a plain tensor is laid out like its parameter."""
    state, twin = of_kind(EightBit, 0), of_kind(EightBit, 1)
    train(state.model, state.optimizer, range(2))
    weight = twin.model.first.weight
    weight.data = weight.data.t().contiguous().t()
    twin.restore(through_a_store(state.capture()), 2)
    assert type(twin.optimizer.state[weight]["moment"]) is Packed
    assert digests(twin) == digests(state)


def test_a_tensor_of_a_class_that_the_program_does_not_know_is_an_error_that_says_so():
    """Nothing is imported because a checkpoint says so."""
    state = of_kind(EightBit, 0)
    train(state.model, state.optimizer, range(1))
    store = open_store(f"memory://{uuid.uuid4()}")
    with torch.serialization.safe_globals([Packed]):
        written = commit.write(store, state.capture(), step=1, attempt=Attempt.after([]))
    with pytest.raises(
        ConfigError, match=r"moment: the checkpoint holds a value of the class \S*\.Packed, .* import its library first"
    ):
        load.read(store, *written)


def test_an_optimizer_within_an_optimizer_goes_by_the_same_groups():
    """A learning rate that is changed after a resume is that of both."""
    state, twin = of_kind(Sharpened, 0), of_kind(Sharpened, 1)
    train(state.model, state.optimizer, range(2))
    twin.restore(through_a_store(state.capture()), 2)
    for each in (state, twin):
        each.optimizer.param_groups[0]["lr"] = 0.001
        train(each.model, each.optimizer, range(2, 4))
    assert digests(twin) == digests(state)


class Doubling(optim.AdamW):
    """Makes something else of what it has saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for values in self.state.values():
            values["exp_avg"] = values["exp_avg"] * 2


def test_an_optimizer_that_makes_something_else_of_its_state_is_told_of(caplog):
    """The warning names what has changed."""
    state, twin = of_kind(Doubling, 0), of_kind(Doubling, 1)
    train(state.model, state.optimizer, range(2))
    twin.restore(through_a_store(state.capture()), 2)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("Doubling: its load_state_dict changed the saved values (state/0/exp_avg, state/1/exp_avg, ")


def test_state_that_goes_by_the_order_of_the_parameters_is_refused_where_that_has_changed():
    """Names are filed where harness knows the numbers; within a form of its own an optimizer may count in its own way."""
    state = of_kind(Wrapping, 0)
    train(state.model, state.optimizer, range(2))
    parts = through_a_store(state.capture())
    net = Net()
    twin = Training(net, Wrapping(list(reversed(list(net.parameters())))))
    with pytest.raises(Mismatch, match="goes by the order of the parameters, which has changed; build them in the order"):
        twin.restore(parts, 2)


def test_groups_that_came_in_training_are_made_again_first():
    """As many groups as the checkpoint has, with the same parameters: anything else is an error that says what to do."""
    state = of_kind(lambda parameters: optim.AdamW(list(parameters)[:2], lr=0.01), 0)
    train(state.model, state.optimizer, range(2))
    added = {"params": list(state.model.second.parameters()), "lr": 0.005}
    state.optimizer.add_param_group(added)
    train(state.model, state.optimizer, range(2, 4))
    parts = through_a_store(state.capture())
    twin = of_kind(lambda parameters: optim.AdamW(list(parameters)[:2], lr=0.01), 1)
    with pytest.raises(
        Mismatch, match=r"the checkpoint has 2, the optimizer has 1; add the groups of add_param_group before Run"
    ):
        twin.restore(parts, 4)
    twin.optimizer.add_param_group({"params": list(twin.model.second.parameters())})
    twin.restore(parts, 4)
    train(state.model, state.optimizer, range(4, 6))
    train(twin.model, twin.optimizer, range(4, 6))
    assert digests(twin) == digests(state)
