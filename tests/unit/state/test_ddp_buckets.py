"""Settling DDP's buckets before a resumed run trains is something that nobody else notices.

That it gives the bits of the run that never stopped, on three ranks, is in ``test_exact_resume``.
"""

import re

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from harness import Run, StopRequest, torch_private
from harness.data.seeding import seed_everything
from harness.state.capture import State
from harness.state.ddp_buckets import BucketOrder
from tests.support.cluster import newest

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def net() -> nn.Module:
    seed_everything(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def heeding_order(**options) -> DistributedDataParallel:
    """A model whose order matters, though there is one rank: a communication hook is told of the buckets."""
    model = DistributedDataParallel(net(), **options)
    model.register_comm_hook(None, default_hooks.allreduce_hook)
    return model


class Ears:
    """Counts whatever a parameter's hooks can hear."""

    def __init__(self, model: nn.Module) -> None:
        self.heard: list[str] = []
        self.nodes = [torch.autograd.graph.get_gradient_edge(parameter).node for parameter in model.parameters()]
        for parameter, node in zip(model.parameters(), self.nodes, strict=True):
            parameter.register_hook(lambda _: self.heard.append("gradient"))
            parameter.register_post_accumulate_grad_hook(lambda _: self.heard.append("accumulated"))
            node.register_hook(lambda *_: self.heard.append("node"))
            node.register_prehook(lambda *_: self.heard.append("before the node"))
        torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), lambda _: self.heard.append("all"))


def order_of(model: DistributedDataParallel) -> list[int]:
    """The order that a first backward pass has."""
    gradients = BucketOrder(model)
    model(torch.ones(2, 3)).sum().backward()
    return gradients.order


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=str)
def test_no_hook_of_a_parameter_hears_of_it(options):
    """Neither while it goes on nor is a hook lost: all hear of the next backward pass."""
    order = order_of(DistributedDataParallel(net(), **options))
    assert sorted(order) == [0, 1, 2, 3]
    model = heeding_order(**options)
    ears, gradients = Ears(model), BucketOrder(model)
    random_state = torch.get_rng_state()
    assert gradients.settle(order) is None
    assert gradients.order == order
    assert ears.heard == []
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.require_backward_grad_sync
    model(torch.ones(2, 3)).sum().backward()
    kinds = ("gradient", "accumulated", "node", "before the node")
    assert {kind: ears.heard.count(kind) for kind in (*kinds, "all")} == {**dict.fromkeys(kinds, 4), "all": 1}
    alone = net()
    alone(torch.ones(2, 3)).sum().backward()
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_optimizers_that_step_in_the_backward_pass_go_on(tmp_path):
    """A step of theirs is taken by each gradient that comes, and by none that a resume makes up."""

    def train(url, *ends: int) -> dict[str, str]:
        for end in ends:
            model = heeding_order()
            optimizers = {name: torch.optim.AdamW([each], lr=0.1) for name, each in model.module.named_parameters()}
            for name, parameter in model.module.named_parameters():

                def step(parameter, optimizer=optimizers[name]) -> None:
                    optimizer.step()
                    parameter.grad = None

                parameter.register_post_accumulate_grad_hook(step)
            state = {"model": model, **{f"for-{name}": each for name, each in optimizers.items()}}
            run = Run(url, state, stop=StopRequest(), config={"log": {"every_steps": None}})
            for _ in run.steps(end):
                model(torch.ones(2, 3)).square().sum().backward()
                run.step()
            assert optimizers["0.bias"].state[model.module[0].bias]["step"] == end
            run.close()
        return newest(url)["digests"]

    assert train(tmp_path / "halves", 2, 4) == train(tmp_path / "straight", 4)


def test_a_gradient_that_is_there_stays_as_it_is():
    """The tensor itself, with what is in it: DDP would have averaged it over the ranks."""
    order = order_of(DistributedDataParallel(net()))
    model = heeding_order()
    before = [torch.randn_like(parameter) for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        parameter.grad = gradient
    versions = [gradient._version for gradient in before]
    BucketOrder(model).settle(order)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), before, strict=True))
    assert [gradient._version for gradient in before] == versions


def test_parameters_that_ddp_ignores_are_no_part_of_the_order():
    """Else the order would never be complete, and a resume never settled."""
    plain = net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(plain, ["0.bias"])
    plain[0].bias.requires_grad_(requires_grad=True)
    model = DistributedDataParallel(plain)
    assert sorted(order_of(model)) == [0, 1, 2]


def test_without_three_ranks_nothing_is_gone_through(monkeypatch):
    """There is but one order to add in. The order that was saved is kept, for more ranks."""
    monkeypatch.setattr(torch_private, "begin_backward", lambda _: pytest.fail("a backward pass"))
    model = DistributedDataParallel(net())
    gradients = BucketOrder(model)
    assert gradients.settle([0, 1, 2, 3]) is None
    model(torch.ones(2, 3)).sum().backward()
    assert gradients.order == [0, 1, 2, 3]


def test_each_of_several_has_its_order():
    """A module may have more than one model in DDP."""
    both = nn.ModuleDict({"one": DistributedDataParallel(net()), "two": DistributedDataParallel(net())})
    state = State({"both": both}, CPU)
    both.two(both.one(torch.ones(1, 3)).sum() * torch.ones(1, 3)).sum().backward()
    assert [sorted(each.order) for each in state.gradients.values()] == [[0, 1, 2, 3]] * 2


# --- communication hooks -----------------------------------------------------------------------------------------------


class Compressing(nn.Module):
    """Counts the buckets that it has seen, and saves the count or not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def hook(self, _state, bucket):
        self.seen += 1
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future


def objects_with(hooked) -> dict[str, nn.Module]:
    """A model with a communication hook: ``hooked`` registers it and returns what is in the state beside the model."""
    model = DistributedDataParallel(net())
    return {"model": model, **hooked(model)}


def trained(hooked) -> State:
    """The state of one that has seen a backward pass."""
    objects = objects_with(hooked)
    state = State(objects, CPU)
    objects["model"](torch.ones(2, 3)).sum().backward()
    return state


def hook_of_the_state(model):
    compressing = Compressing()
    model.register_comm_hook(None, compressing.hook)
    return {"compressing": compressing}


def hook_of_nobody(model):
    model.hooked = Compressing()  # outside of the module that DDP wraps: in no state_dict of ours
    model.register_comm_hook(None, model.hooked.hook)
    return {}


def hook_that_forgets(model):
    model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return {}


def power(model):
    model.register_comm_hook(powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook)
    return {}


def test_a_hook_whose_state_is_restored_may_see_it():
    """What it has counted is overwritten with what was saved."""
    state = trained(hook_of_the_state)
    assert state.modules["compressing"].seen == 1
    twin = State(objects_with(hook_of_the_state), CPU)
    twin.restore(state.capture(), 5)
    assert twin.gradients["model"].order == state.gradients["model"].order != []
    assert twin.modules["compressing"].seen == 1


@pytest.mark.parametrize("hooked", [hook_of_nobody, power])
def test_a_hook_whose_state_is_nowhere_does_not_see_it(hooked, caplog):
    """The order is then found out anew, and the program is told what that means and what to do."""
    state, objects = trained(hooked), objects_with(hooked)
    twin = State(objects, CPU)
    twin.restore(state.capture(), 5)
    assert twin.gradients["model"].order == []
    words = (
        r"model: with three ranks .*: the communication hook (Compressing.hook|powerSGD_hook) has a state that is not saved"
    )
    assert len([message for message in caplog.messages if re.match(words, message)]) == 1
    for hook, kept in objects["model"]._comm_hooks:
        assert kept.iter == 0 if kept else hook.__self__.seen == 0
    objects["model"](torch.ones(2, 3)).sum().backward()
    assert twin.gradients["model"].order == state.gradients["model"].order


def test_a_hook_that_forgets_may_see_it(caplog):
    """Compression that keeps nothing of what it has sent."""
    state, twin = trained(hook_that_forgets), State(objects_with(hook_that_forgets), CPU)
    twin.restore(state.capture(), 5)
    assert twin.gradients["model"].order != []
    assert not caplog.records
