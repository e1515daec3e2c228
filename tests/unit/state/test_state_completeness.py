"""What goes into a run's state is all of it, the same on every rank, and can be put back; else it is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR
from torch.utils.data import TensorDataset

from harness import Evaluation, Run, StopRequest, Task, save
from harness.data.seeding import seed_everything
from harness.distributed.world import TorchrunWorld
from harness.errors import ConfigError, Mismatch, Unsupported
from harness.state.capture import State
from harness.training.checkpointing import Checkpointing
from tests.support.cluster import newest, train_here

CPU = torch.device("cpu")
QUIET = {"log": {"every_steps": None}, "metrics": {"every_seconds": None}}


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def run_of(state: dict[str, Any], url: Path | None = None, **options: Any) -> Run:
    return Run(url, state, stop=StopRequest(), config=QUIET, **options)


# --- sharded -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning", "ignore::FutureWarning")
def test_a_model_whose_ranks_hold_shards_is_refused(one_rank):
    """Before anything is captured, which would be a collective that only some ranks take part in."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(2, 2), FullyShardedDataParallel(nn.Linear(2, 2), device_id=CPU))
    words = (
        "flattens the parameters and gives each rank a piece, which cannot be saved; use torch.distributed.fsdp.fully_shard"
    )
    with pytest.raises(Unsupported, match=rf"^net\.1: FullyShardedDataParallel {words}, or DistributedDataParallel$"):
        run_of({"net": model})


def test_a_sharded_tensor_without_a_place_is_refused(one_rank):
    """At the start, with its name: sums that are still to be made, and a local part that is not what the mesh says."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = distributed.init_device_mesh("cpu", (1,))
    local = torch.ones(2, 2)
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(DTensor.from_local(local, mesh, [Partial()]))
    with pytest.raises(Unsupported, match=r"^net/0\.weight: a DTensor with the placement P\(sum\), .*redistribute"):
        run_of({"net": model})
    wrong = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([3, 2]), stride=(2, 1), run_check=False)
    model[0].weight = nn.Parameter(wrong)
    with pytest.raises(
        Unsupported, match=r"^net/0\.weight: expected a local part of shape \[3, 2\] .* found \[2, 2\]; give"
    ):
        run_of({"net": model})


def test_a_sharded_model_is_not_wrapped(one_rank):
    """harness train would put DistributedDataParallel around it."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(nn.Linear(2, 2), mesh=distributed.init_device_mesh("cpu", (1,)))
    world = TorchrunWorld(CPU, "gloo", 20)
    with pytest.raises(ConfigError, match=r"the task's model is sharded .*; use harness\.Run"):
        world.wrap(model)
    world.let_go()


def test_a_sharded_tensor_is_not_saved_by_one_process(one_rank, tmp_path):
    """harness.save asks nobody; it says who does."""
    from torch.distributed.tensor import Shard, distribute_tensor

    tensor = distribute_tensor(torch.ones(2, 2), distributed.init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(Unsupported, match=r"^model/w: a DTensor, .*; harness\.Run saves it from all ranks"):
        save(tmp_path / "run", {"model": {"w": tensor}})
    assert not [*(tmp_path / "run").glob("step-*")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports
def test_an_optimizer_whose_ranks_hold_shards_is_refused(one_rank):
    """By name, and not with torch's own error at the first save."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(2, 2)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    with pytest.raises(Unsupported, match=r"^adam: ZeroRedundancyOptimizer gives each rank its own shard of the state"):
        run_of({"model": model, "adam": optimizer})


def test_what_must_be_the_same_on_all_ranks(tmp_path):
    """Parameters and the optimizer's state change its digests; buffers and options, which may differ, do not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    state = State({"model": model, "optimizer": optimizer, "steps": StepLR(optimizer, 2)}, CPU)
    first, _ = state.steady_digests()
    assert first.keys() == {"model", "optimizer"}
    model(torch.randn(3, 2))
    optimizer.param_groups[0]["lr"] = 2.0
    assert state.steady_digests()[0] == first
    model(torch.randn(3, 2)).square().sum().backward()
    optimizer.step()
    second, _ = state.steady_digests()
    assert all(second[name] != first[name] for name in first)
    with torch.no_grad():
        optimizer.state[model[0].weight]["exp_avg"][0, 0] += 1
    third, _ = state.steady_digests()
    assert third == {**second, "optimizer": third["optimizer"]}
    assert third != second


# --- left out ----------------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A base and an adapter; ``state_dict()`` has the adapter alone."""

    def __init__(self, *, frozen: bool = True, tolerant: bool = False) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(2, 2), nn.Linear(2, 2)
        self.base.requires_grad_(requires_grad=not frozen)
        self.tolerant = tolerant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.adapter(x)

    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "adapter" in name}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=strict and not self.tolerant, assign=assign)


def test_a_model_that_leaves_out_what_is_trained_is_refused():
    """It would be lost, however tolerant its ``load_state_dict`` is."""
    words = (
        r"^model: its state_dict\(\) leaves out parameters that are trained: base\.weight, base\.bias\. They would be lost"
    )
    for tolerant in (False, True):
        with pytest.raises(Unsupported, match=words):
            run_of({"model": Adapted(frozen=False, tolerant=tolerant)})


def test_a_model_that_cannot_load_what_it_saves_is_refused():
    """When the run is made, not when it is resumed, with a traceback and half of the state restored."""
    with pytest.raises(
        Unsupported, match=r"^model: its own state_dict\(\) cannot be loaded into it: .*Missing key.*base\.weight"
    ):
        run_of({"model": Adapted()})

    class OwnSignature(nn.Linear):
        def load_state_dict(self, state):
            super().load_state_dict(state)

    with pytest.raises(Unsupported, match=r"^model: its own state_dict\(\) cannot be loaded into it: .*strict"):
        run_of({"model": OwnSignature(1, 1)})

    class Surplus(nn.Linear):
        def state_dict(self, *args, **kwargs):
            return {**super().state_dict(*args, **kwargs), "version": torch.ones(1)}

    with pytest.raises(Unsupported, match=r"cannot be loaded into it: .*Unexpected key.*version"):
        run_of({"model": Surplus(1, 1)})


def test_a_module_that_does_not_take_what_was_saved(tmp_path):
    """Its own objection is the message; the program has to be changed, and no restart helps."""

    class Picky(nn.Linear):
        allowed = True

        def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
            super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
            errors += [] if self.allowed else ["these weights are out of fashion"]

    run = run_of({"model": Picky(1, 1)}, tmp_path)
    for _ in run.steps(1):
        run.step()
    Picky.allowed = False
    with pytest.raises(
        Mismatch, match=r"the model's load_state_dict\(\) rejected the checkpoint: .*these weights are out of fashion"
    ):
        run_of({"model": Picky(1, 1)}, tmp_path)


def test_a_model_that_leaves_its_frozen_base_out_is_told_what_that_means(tmp_path, caplog):
    """An adapter alone is small to save; its base is what the program builds."""
    run = run_of({"model": Adapted(tolerant=True)}, tmp_path)
    assert (
        "model: its state_dict() leaves out base.weight, base.bias: a resume takes what the program builds"
        in caplog.messages
    )
    for _ in run.steps(1):
        run.step()
    assert sorted(newest(tmp_path)["parts"]["model"]) == ["adapter.bias", "adapter.weight"]
    assert run_of({"model": Adapted(tolerant=True)}, tmp_path).global_step == 1


def test_an_adapter_alone_in_the_state(tmp_path):
    """The way that docs/guides/your-loop.md names: the trained parameters as a module of their own."""
    for expected in (0, 2):
        seed_everything(0)
        model = Adapted()
        trained = nn.ParameterDict(
            {name.replace(".", "/"): each for name, each in model.named_parameters() if each.requires_grad}
        )
        optimizer = torch.optim.Adam(trained.parameters())
        run = run_of({"adapter": trained, "optimizer": optimizer}, tmp_path)
        assert run.global_step == expected
        if expected:
            assert torch.equal(model.adapter.weight, newest(tmp_path)["parts"]["adapter"]["adapter/weight"])
        for _ in run.steps(2):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            run.step()


def test_an_uninitialized_parameter_is_refused():
    """With what to do."""
    with pytest.raises(Unsupported, match=r"^model\.0\.weight: an uninitialized parameter; run the model once before Run"):
        run_of({"model": nn.Sequential(nn.LazyLinear(2))})


# --- modules with semantics of their own -------------------------------------------------------------------------------


class Hooked(nn.Module):
    """Keeps its weight under another name in its state, by hooks for both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({f"{prefix}w": state.pop(f"{prefix}weight")})
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_: state.update({f"{prefix}weight": state.pop(f"{prefix}w")})
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


OWN_WAYS = {
    "weight_norm": lambda: weight_norm(nn.Linear(2, 2)),
    "spectral_norm": lambda: spectral_norm(nn.Linear(2, 2)),
    "parametrized": lambda: parametrizations.orthogonal(nn.Linear(2, 2)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5),
    "hooks": Hooked,
    "quantization-aware": torch.ao.quantization.FakeQuantize,
}


@pytest.mark.filterwarnings("ignore")  # most of these are deprecated
@pytest.mark.parametrize("kind", OWN_WAYS)
def test_modules_that_have_their_own_way_go_on(tmp_path, kind):
    """With the bits of the run that was not interrupted."""

    def train(url: Path, *steps: int) -> dict[str, str]:
        for until in steps:
            seed_everything(5)
            model = nn.Sequential(nn.Linear(2, 2), OWN_WAYS[kind]())
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            run = run_of({"model": model, "optimizer": optimizer}, url)
            for _ in run.steps(until):
                optimizer.zero_grad()
                model(torch.ones(3, 2)).square().sum().backward()
                optimizer.step()
                run.step()
            run.close()
        return newest(url)["digests"]

    assert train(tmp_path / "halves", 2, 4) == train(tmp_path / "straight", 4)


# --- names that change -------------------------------------------------------------------------------------------------


def grown(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """What a program does once it trains the second layer, too."""
    optimizer.add_param_group({"params": list(model[1].parameters())})


def growing(url: Path, steps: int, **options: Any) -> tuple[Run, torch.optim.Optimizer]:
    """A program whose optimizer gets a group before step 2."""
    seed_everything(1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.Adam(model[0].parameters(), lr=0.1)

    def adapt(step, epoch, names) -> None:
        seen.append((step, epoch, names))
        if step >= 2:
            grown(optimizer, model)

    seen: list[tuple] = []
    options = {**options, "adapt": adapt} if options.pop("adapts", False) else options
    run = run_of({"model": model, "optimizer": optimizer}, url, every_steps=1, **options)
    for step in run.steps(steps):
        if step == 2 and len(optimizer.param_groups) == 1:
            grown(optimizer, model)
        optimizer.zero_grad()
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        run.step()
    run.close()
    run.seen = seen
    return run, optimizer


def test_a_save_with_other_names_says_that_it_will_be_refused(tmp_path, caplog):
    """At the first such save, once, with the names and with the way out; and so it is."""
    growing(tmp_path, 5)
    (message,) = [each for each in caplog.messages if "names or shapes" in each]
    assert message.startswith("the names or shapes in the state have changed since Run was made (2 differences)\n")
    assert "optimizer: 1.weight of group 1: new" in message
    assert "Run(..., adapt=...)" in message
    with pytest.raises(Mismatch, match="parameter groups: the checkpoint has 2, the optimizer has 1"):
        growing(tmp_path, 6)


def test_a_program_that_adapts_goes_on(tmp_path, caplog):
    """It is called with what the checkpoint has, before that is compared, and ends with the same bits."""
    growing(tmp_path / "straight", 6)
    growing(tmp_path / "halves", 1, adapts=True)
    run, _ = growing(tmp_path / "halves", 4, adapts=True)
    assert [(step, epoch) for step, epoch, _ in run.seen] == [(1, 0)]
    caplog.clear()
    run, optimizer = growing(tmp_path / "halves", 6, adapts=True)
    ((step, epoch, names),) = run.seen
    assert (step, epoch) == (4, 0)
    assert names["model"]["1.weight"] == ("float32", (1, 2))
    assert names["optimizer"]["state/1.bias/exp_avg"] == ("float32", (1,))
    assert len(optimizer.param_groups) == 2
    ends = [newest(tmp_path / url)["digests"] for url in ("straight", "halves")]
    assert [end["model"] for end in ends] == [ends[0]["model"]] * 2
    assert [end["optimizer"] for end in ends] == [ends[0]["optimizer"]] * 2
    assert not [each for each in caplog.messages if "names or shapes" in each]


@pytest.mark.parametrize("change", ["a buffer of the first forward pass", "pruning", "another shape", "nothing"])
def test_changes_of_a_model_are_noticed(tmp_path, caplog, change):
    """A name that comes or goes, and a shape that changes."""
    model = nn.Sequential(nn.Linear(2, 2))
    run = run_of({"model": model}, tmp_path, every_steps=1)
    for step in run.steps(4):
        if step == 1 and change == "pruning":
            prune.random_unstructured(model[0], "weight", 0.5)
        elif step == 1 and change == "another shape":
            model[0].bias = nn.Parameter(torch.zeros(3))
        elif step == 0 and "buffer" in change:
            model[0].register_buffer("seen", torch.zeros(3))
        run.step()
    found = [each.splitlines()[1:-1] for each in caplog.messages if "names or shapes" in each]
    assert (
        found
        == {
            "a buffer of the first forward pass": [["  model: 0.seen: new, float32[3]"]],
            "pruning": [
                [
                    "  model: 0.weight_orig: new, float32[2, 2]",
                    "  model: 0.weight_mask: new, float32[2, 2]",
                    "  model: 0.weight: gone",
                ]
            ],
            "another shape": [["  model: 0.bias: float32[2] before, now float32[3]"]],
            "nothing": [],
        }[change]
    )


# --- optimizers within others ------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """As Accelerate has it: an optimizer that has everything from the one within, and never initialized itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self):
        return self.optimizer.state

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def defaults(self):
        return self.optimizer.defaults

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        self.optimizer.step(closure)


class Proxy:
    """The same without being an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Lookahead(torch.optim.Optimizer):
    """Has weights of its own besides the optimizer within, and a state that is not laid out as torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups, self.state = optimizer.param_groups, {}
        self.slow = [parameter.detach().clone() for group in self.param_groups for parameter in group["params"]]

    def state_dict(self):
        return {"fast": self.optimizer.state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["fast"])
        self.slow = state_dict["slow"]

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step(closure)
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for slow, parameter in zip(self.slow, parameters, strict=True):
            slow.lerp_(parameter, 0.5)
            parameter.copy_(slow)


class Scaling(Wrapper):
    """Shares the state of the one within, and has a number of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.scale = 1.0

    def state_dict(self):
        return {"within": self.optimizer.state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["within"])
        self.scale = state_dict["scale"]

    def step(self, closure=None):
        self.scale *= 0.9
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad *= self.scale
        self.optimizer.step(closure)


def identity(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


@pytest.mark.parametrize("wrap", [identity, Wrapper, Proxy, lambda each: Wrapper(Wrapper(each)), Lookahead, Scaling])
def test_an_optimizer_within_another(tmp_path, monkeypatch, wrap):
    """Its state is saved and restored, all that the outer one remembers, too, and a save waits before it steps."""

    def train(url: Path, *steps: int) -> dict[str, Any]:
        for until in steps:
            seed_everything(2)
            model = nn.Linear(2, 2)
            inner = torch.optim.Adam(model.parameters(), lr=0.1)
            optimizer = wrap(inner)
            scheduler = StepLR(inner, 2, 0.5)
            fenced: list[int] = []
            run = run_of({"model": model, "optimizer": optimizer, "scheduler": scheduler}, url)
            monkeypatch.setattr(Checkpointing, "fence", lambda saves, fenced=fenced: fenced.append(1))
            for _ in run.steps(until):
                optimizer.zero_grad()
                model(torch.ones(2)).square().sum().backward()
                optimizer.step()
                scheduler.step()
                run.step()
            assert len(fenced) >= steps[0]
            run.close()
        return newest(url)

    halves, straight = train(tmp_path / "halves", 2, 4), train(tmp_path / "straight", 4)
    assert halves["digests"] == straight["digests"]
    if wrap not in (Lookahead, Scaling):
        assert set(halves["parts"]["optimizer"]["state"]) == {"weight", "bias"}


def test_an_optimizer_that_was_never_initialized_is_refused():
    """Nobody could know when it steps."""

    class Odd(torch.optim.SGD):
        def __init__(self, parameters) -> None:
            self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": 1.0}], {}, {}

        def state_dict(self):
            return {"state": {}, "param_groups": [{"params": [0, 1], "lr": 1.0}]}

    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"^optimizer: Odd calls no step hooks; have its __init__ call"):
        run_of({"model": model, "optimizer": Odd(model.parameters())})


# --- what harness train can step ---------------------------------------------------------------------------------------


def task(optimizer=torch.optim.SGD, scheduler=None, evaluated: bool = True, **options) -> Task:
    model = nn.Linear(2, 1)
    made = optimizer(model.parameters(), lr=0.1, **options)
    data = TensorDataset(torch.ones(8, 2))
    mean = lambda model, batch: model(batch[0]).mean()
    evaluation = Evaluation(data, lambda model, batch: {"error": torch.ones(())}, "error") if evaluated else None
    return Task(model, data, made, mean, scheduler and scheduler(made), evaluation)


class Timed(LRScheduler):
    """Wants to know the time."""

    def step(self, seconds):
        pass

    def _initial_step(self):
        pass


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"optimizer": torch.optim.LBFGS},
            "task: LBFGS needs a closure, which harness train does not pass; .* own with harness.Run",
        ),
        ({"scheduler": ReduceLROnPlateau, "evaluated": False}, "task: ReduceLROnPlateau needs evaluations; expected"),
        ({"scheduler": Timed}, r"task: expected a scheduler with step\(\), found Timed, whose step\(\) requires arguments"),
    ],
)
def test_what_a_task_cannot_step_is_refused(options, words):
    """When the task is built."""
    with pytest.raises(ConfigError, match=words):
        train_here(lambda: task(**options), train={"steps": 2, "global_batch_size": 4}, evaluation={"every_steps": 1})


def test_a_plateau_waits_for_evaluations(tmp_path):
    """It sees each evaluation's metric once, and goes on where it was after a resume."""
    plateau = lambda optimizer: ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    config = {"evaluation": {"every_steps": 2}, "train": {"global_batch_size": 4, "steps": 12}}
    for url, steps in (("straight", 12), ("halves", 8), ("halves", 12)):
        train = {"train": {**config["train"], "steps": steps}}
        train_here(lambda: task(scheduler=plateau), url=tmp_path / url, **{**config, **train})
    found = [newest(tmp_path / url) for url in ("straight", "halves")]
    assert found[0]["digests"] == found[1]["digests"]
    assert found[0]["parts"]["scheduler"]["state"]["last_epoch"] == 6
    assert found[0]["parts"]["optimizer"]["param_groups"][0]["lr"] == 0.025  # evaluations 3 and 5 were no better


# --- another default device --------------------------------------------------------------------------------------------


def test_a_default_device_of_the_programs(tmp_path):
    """What harness makes for itself lies in the host's memory, whatever the program has new tensors lie in."""
    digests = []
    for default, url, steps in (("cpu", "straight", 4), ("meta", "halves", 2), ("meta", "halves", 4)):
        seed_everything(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batch = torch.ones(2)
        torch.set_default_device(default)
        try:
            run = run_of({"model": model, "optimizer": optimizer}, tmp_path / url, every_steps=1)
            for _ in run.steps(steps):
                optimizer.zero_grad()
                model(batch).square().sum().backward()
                optimizer.step()
                run.step(loss=1.0)
            run.close()
        finally:
            torch.set_default_device(None)
        digests.append(newest(tmp_path / url)["digests"])
    assert digests[2] == digests[0]
