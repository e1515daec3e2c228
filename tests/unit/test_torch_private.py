"""What harness takes from torch that is not public: all of it is there, and a torch without it is met in order."""

import ast
import logging
import re
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.torch_version import TorchVersion

import harness
from harness import torch_private
from harness.doctor import ranks
from harness.errors import ConfigError
from harness.state.capture import State
from harness.state.ddp_buckets import BucketOrder
from harness.state.modules import module_versions
from harness.state.options import position, reset_schedule
from harness.torch_private import PARTS, Part

PACKAGE = Path(harness.__file__).parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    """Each test hears its warnings for the first time."""
    monkeypatch.setattr(torch_private, "_warned", set())


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.names.partition(",")[0])
def test_the_installed_torch_has_it(part):
    """Should this fail with a newer torch: read its sources, mend ``torch_private``, and only then add it to ``TRIED``."""
    assert part.is_there(), part.without


def test_no_other_module_reaches_into_torch():
    """An attribute of another object with an underscore is harness's own, Python's or fsspec's, or in ``torch_private``. An
    integration knows the library that it is for."""
    of_torch = set(re.findall(r"\b_[a-z]\w+", Path(torch_private.__file__).read_text()))
    for path in (each for each in PACKAGE.rglob("*.py") if each.parent.name != "integrations"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and path.name != "torch_private.py":
                is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert is_own or node.attr not in of_torch, f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.attr}"


def test_the_readme_names_the_versions_that_were_tried():
    """The constant is the only place to change besides."""
    *others, newest = torch_private.TRIED
    assert f"torch {', '.join(others)} and {newest}" in PACKAGE.parent.joinpath("README.md").read_text()
    assert sorted(torch_private.TRIED, key=TorchVersion) == list(torch_private.TRIED)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        *(("2.10.2", False), ("2.11.0", True), ("2.12.1+cu130", True), ("2.15.1+cpu", True), ("2.16.0", False)),
        *(("2.16.0a0+git1234", False), ("3.0.0", False)),
    ],
)
def test_a_version_is_tried_or_not(version, expected):
    assert torch_private.is_tried(version) is expected


# --- what is not -----------------------------------------------------------------------------------------------------


def gone() -> object:
    raise AttributeError("it is gone")


def test_a_part_that_is_missing_is_told_once(monkeypatch, caplog):
    part = Part("Tensor._gone", "does something", "it is not done", gone)
    assert not torch_private.has(part)
    assert not torch_private.has(part)
    assert caplog.messages == [f"torch {torch.__version__} has no Tensor._gone: it is not done"]


def test_a_run_without_a_part_that_it_needs_is_refused(monkeypatch):
    """Before it starts, in words that name the versions to choose from."""
    needed = [part for part in PARTS if part.is_needed]
    assert needed
    for part in needed:
        with monkeypatch.context() as patch:
            patch.setattr(torch_private, "PARTS", (Part(part.names, part.use, part.without, gone, is_needed=True),))
            with pytest.raises(ConfigError, match=r"torch .* has no .*install one of the versions that were tried: 2\.11"):
                State({"model": nn.Linear(1, 1)}, CPU)


def test_the_doctor_warns_of_a_torch_that_nobody_tried(monkeypatch):
    """And of each part that it lacks; of one that is well it says nothing."""
    assert ranks._untried() == []
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    (found,) = ranks._untried()
    assert (found.level, found.found) == ("warn", "harness was not tested with it, but with 2.11, 2.13, 2.15")
    monkeypatch.setattr(torch_private, "PARTS", (Part("Tensor._gone", "does something", "it is not done", gone),))
    assert [each.found for each in ranks._untried()][1:] == ["it has no Tensor._gone: it is not done"]


def test_models_without_versions_of_modules(monkeypatch):
    """A checkpoint of theirs says nothing of versions."""
    model = nn.BatchNorm1d(2)
    assert module_versions(model) == {"": 2}
    monkeypatch.delattr(nn.modules.batchnorm._NormBase, "_version")
    monkeypatch.delattr(nn.Module, "_version")
    assert module_versions(model) == {}


def test_schedules_that_torch_keeps_otherwise(monkeypatch):
    """Their settings are not compared, and to have them reset is refused."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    vars(scheduler)["children"] = vars(scheduler).pop("_schedulers")
    vars(scheduler)["bounds"] = vars(scheduler).pop("_milestones")
    monkeypatch.delattr(lr_scheduler.ConstantLR, "_get_closed_form_lr")
    assert position(scheduler) == 0
    with pytest.raises(ConfigError, match="reset_options cannot move a schedule"):
        reset_schedule(scheduler, [], ["lr"], [])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
def test_a_loader_whose_insides_are_others_is_refused(monkeypatch):
    """Its order would differ after a resume. ``harness.Loader`` needs none of them."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    loader = stateful.StatefulDataLoader(list(range(4)))
    monkeypatch.delattr(torch.utils.data.dataloader._BaseDataLoaderIter, "_next_data")
    monkeypatch.delattr(torch.utils.data.dataloader._SingleProcessDataLoaderIter, "_next_data")
    with pytest.raises(ConfigError, match=r"has no DataLoader._get_iterator.*use harness.Loader"):
        State({"model": nn.Linear(1, 1), "loader": loader}, CPU)


def test_ddp_whose_insides_are_others_trains_on():
    """A resume says that the next step may differ in its last bits."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 1))
        del model._comm_hooks
        gradients = BucketOrder(model)
        assert gradients.settle([0, 1]) == f"torch {torch.__version__} has no DistributedDataParallel._comm_hooks"
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("part", [torch_private.RANKS_END, torch_private.RESTARTS], ids=["ends", "restarts"])
def test_a_torchrun_whose_insides_are_others_starts_the_ranks(part, monkeypatch, caplog):
    """It is as it was, and what it cannot tell is said in one line."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import PContext

    caplog.set_level(logging.WARNING)
    if part is torch_private.RESTARTS:
        monkeypatch.delattr(LocalElasticAgent, "_monitor_workers")
        torch_private.when_ranks_fail(lambda _allowed, left: left)
        assert "_monitor_workers" not in vars(LocalElasticAgent)
    else:
        monkeypatch.delattr(PContext, "pids")
        before = PContext.close
        torch_private.before_ranks_are_ended(lambda _pids: None)
        assert PContext.close is before
    assert [part.without in message for message in caplog.messages] == [True]


@pytest.mark.skipif(not hasattr(DistributedDataParallel, "finalize_backward"), reason="torch 2.15 or newer")
def test_a_program_that_finalizes_its_backward_passes_itself():
    """Settling the buckets leaves DDP ready for the next pass, and nothing in the gradients."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 1))
        model.require_manual_backward_finalization = True
        model.register_comm_hook(None, allreduce_hook)  # or else the order of one rank does not matter
        assert BucketOrder(model).settle([0, 1]) is None
        assert all(parameter.grad is None for parameter in model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        model.finalize_backward()
        assert model.module.bias.grad.item() == 1.0
    finally:
        distributed.destroy_process_group()
