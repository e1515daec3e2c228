"""The waits between the training, the copies beside it, and the processor: on a device that is as late, or as early, as the
rules allow (see ``tests/support/late_device.py``). A wait that is missing shows as other bytes."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from harness import Run, StopRequest
from harness.checkpoint import commit, kept, load, staging
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.saver import Saver, SaveRequest
from harness.distributed import device
from harness.distributed.world import SoloWorld
from harness.state import to_device
from harness.state.capture import State
from harness.state.to_device import sent
from harness.storage.store import open_store
from harness.training import checkpointing
from harness.training.loose import Loose
from harness.training.stragglers import OwnWork
from tests.support import late_device
from tests.support.late_device import CPU, MODES, Hangs, Late, LateDevice, LateEvent, LateStream
from tests.support.saving import saver

pytestmark = pytest.mark.parametrize("late", MODES, indirect=True)


@pytest.fixture
def late(monkeypatch, request) -> Iterator[Late]:
    late = late_device.use(monkeypatch, request.param)
    yield late
    assert late.strays == [], "threads that take memory on another device"


class Net:
    """What a training changes: a weight in the optimizer's step, a buffer in the forward pass."""

    def __init__(self, late: Late) -> None:
        self.late = late
        self.weight, self.buffer = torch.zeros(1000), torch.zeros(1000)
        late.own(self.weight, self.buffer)

    @property
    def state(self):
        return {"model": {"weight": self.weight, "buffer": self.buffer}}

    def request(self, step: int) -> SaveRequest:
        return SaveRequest(step, is_steady=lambda tensor: tensor is self.weight)

    def forward(self, step: int) -> None:
        self.late.write(self.buffer, step)

    def optimize(self, step: int) -> None:
        self.late.write(self.weight, step)


def saved(writer: Saver) -> dict[int, tuple[set[float], set[float]]]:
    """The values of each checkpoint, by step."""
    found = {}
    for entry in writer.catalog.entries():
        model = load.read(writer.catalog.store, entry.directory, entry.manifest)["model"]
        found[entry.step] = tuple({*model[name].tolist()} for name in ("weight", "buffer"))
    return found


def each_of(steps: range) -> dict[int, tuple[set[float], set[float]]]:
    return {step: ({float(step)}, {float(step)}) for step in steps}


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_save_beside_the_training(late, tmp_path, overlap, own_stream):
    """Each checkpoint is of its boundary, though the next forward pass and the optimizer are queued while it is copied."""
    writer, net = saver(str(tmp_path)), Net(late)
    with late.in_own_stream() if own_stream else contextlib.nullcontext():
        for step in range(1, 4):
            writer.fence()
            net.forward(step)
            net.optimize(step)
            writer.wait()
            with late.processor_is_slow():
                writer.begin(net.state, net.request(step), overlap=overlap)
                net.forward(-1)
                writer.fence()
                net.optimize(-1)
        writer.wait()
    assert saved(writer) == each_of(range(1, 4))


def test_a_save_that_is_waited_for(late, tmp_path):
    """It reads the tensors in other threads, which have other current streams than the training."""
    writer, net = saver(str(tmp_path)), Net(late)
    with late.in_own_stream():
        net.forward(1)
        net.optimize(1)
        writer.save(net.state, net.request(1))
    assert saved(writer) == each_of(range(1, 2))


def test_the_digest_of_a_state(late, monkeypatch):
    """The same of its checksums, by which ranks compare what they hold."""
    monkeypatch.setattr(commit, "threads_for", lambda _size_bytes: 2)
    net = Net(late)
    with late.in_own_stream():
        net.forward(1)
        net.optimize(1)
        found = commit.digest_of(net.state["model"], "model")
    assert found == commit.digest_of({"weight": torch.ones(1000), "buffer": torch.ones(1000)}, "model")


def test_tensors_that_nobody_else_holds(late, tmp_path):
    """Their memory is not used for others before the copy is made."""
    writer = saver(str(tmp_path))
    state = {"model": {name: torch.full((1000,), 5.0) for name in ("weight", "buffer")}}
    late.own(*state["model"].values())
    weight = state["model"]["weight"].data_ptr()
    with late.processor_is_slow():
        writer.begin(state, SaveRequest(5, is_steady=lambda tensor: tensor.data_ptr() == weight))
        del state
        writer.fence()
    writer.wait()
    assert saved(writer) == each_of(range(5, 6))


def test_a_copy_that_failed_is_over(late, tmp_path, monkeypatch):
    """What was under way when an error came is done before the error is told: the next save has the same memory."""
    writer, net = saver(str(tmp_path)), Net(late)
    copy_tensor = staging.copy_tensor

    def failing(memory, start, tensor) -> Iterator[memoryview]:
        if tensor is net.weight:
            raise RuntimeError("out of memory")
        return copy_tensor(memory, start, tensor)

    net.forward(1)
    with monkeypatch.context() as patched:
        patched.setattr(staging, "copy_tensor", failing)
        writer.begin(net.state, SaveRequest(1, is_steady=lambda _tensor: True))
        with pytest.raises(RuntimeError, match="out of memory"):
            writer.wait()
    beside: LateStream = device.of(CPU).beside("save")
    assert (beside.done, len(beside.queued)) == (len(beside.queued), len(beside.queued))
    assert len(beside.queued) > 2, "the buffer was copied"


# --- restoring -------------------------------------------------------------------------------------------------------


def test_a_restore_through_two_pieces_of_memory(late, monkeypatch):
    """Each is filled again only when what it held has arrived. What is done with the tensors comes after them."""
    monkeypatch.setattr(to_device, "STAGE_BYTES", 1 << 10)
    monkeypatch.setattr(to_device, "LARGE_BYTES", 1)
    before = {"weights": [torch.randn(size) for size in (1000, 1, 700, 256)], "wide": torch.randn(40, 30).t()}
    live = [torch.zeros(size) for size in (1000, 1, 700, 256)]
    late.own(*live)
    found = sent(before, CPU)
    for place, value in zip(live, found["weights"], strict=True):
        device.of(CPU).copy(place, value)
    late.read()
    assert [each.tolist() for each in live] == [each.tolist() for each in before["weights"]]
    assert (found["wide"].tolist(), found["wide"].stride()) == (before["wide"].tolist(), before["wide"].stride())


# --- a survivor ------------------------------------------------------------------------------------------------------


class Queued(torch.optim.SGD):
    """Its steps are queued."""

    def __init__(self, late: Late, parameters) -> None:
        super().__init__(parameters, lr=0.1)
        self.late, self.value = late, 0.0

    def step(self, closure=None):
        self.value += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                self.late.write(parameter, self.value)


class Died(Exception):
    """In place of a peer's death."""


@pytest.mark.parametrize("own_stream", [False, True], ids=["default stream", "own stream"])
def test_a_survivor_beside_a_collective_that_hangs(late, tmp_path, own_stream):
    """The state of the last boundary is kept, though the stream of the training never comes back, and has the forward pass
    of the next step behind it."""
    model = nn.BatchNorm1d(300)
    late.own(*model.state_dict().values())
    optimizer = Queued(late, model.parameters())
    settings = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep")}}
    (tmp_path / "keep").mkdir()
    with late.in_own_stream() if own_stream else contextlib.nullcontext():
        training, state = late.current_stream(CPU), {"model": model, "optimizer": optimizer}
        run = Run(str(tmp_path / "run"), state, every_steps=1000, stop=StopRequest(), config=settings)
        with contextlib.closing(run):
            for _ in run.steps(10):
                step = run.global_step + 1
                late.write(model.running_mean, step)
                if step == 4:
                    late.hang()
                    error = Died()
                    run.remember_crash(error)
                    break
                optimizer.step()
                run.step()
    (place,) = (tmp_path / "keep").glob("harness-*/*")
    (entry,) = Catalog(open_store(str(place))).entries()
    assert (entry.step, entry.state) == (3, "whole")
    assert kept.KEPT in entry.manifest.meta
    found = load.read(open_store(str(place)), entry.directory, entry.manifest)["model"]
    assert {name: {*found[name].tolist()} for name in ("weight", "running_mean")} == {"weight": {3.0}, "running_mean": {3.0}}
    with pytest.raises(Hangs):
        training.run(len(training.queued))


class Average:
    """Its state is computed when it is asked for, and too large to be copied at each boundary."""

    def __init__(self, late: Late) -> None:
        self.late, self.steps = late, 0

    def state_dict(self):
        found = torch.zeros(400_000)
        self.late.own(found)
        self.late.write(found, self.steps)
        return {"mean": found}

    def load_state_dict(self, state) -> None:
        """Nothing is restored here."""


def test_what_a_boundary_itself_computes(late, tmp_path):
    """A state that an object computes at the boundary is there before a survivor reads it."""
    model, average = nn.Linear(2, 2), Average(late)
    late.own(*model.state_dict().values())
    optimizer = Queued(late, model.parameters())
    settings = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep")}}
    (tmp_path / "keep").mkdir()
    state = {"model": model, "optimizer": optimizer, "average": average}
    with contextlib.closing(Run(str(tmp_path / "run"), state, every_steps=1000, stop=StopRequest(), config=settings)) as run:
        for _ in run.steps(10):
            if run.global_step == 3:
                late.hang()
                run.remember_crash(Died())
                break
            optimizer.step()
            average.steps += 1
            run.step()
    (place,) = (tmp_path / "keep").glob("harness-*/*")
    (entry,) = Catalog(open_store(str(place))).entries()
    found = load.read(open_store(str(place)), entry.directory, entry.manifest)["average"]
    assert (entry.step, {*found["state"]["mean"].tolist()}) == (3, {3.0})


@pytest.mark.parametrize("is_captured", [True, False])
def test_an_optimizers_step_in_a_graph(late, tmp_path, monkeypatch, is_captured):
    """A graph takes the steps of an optimizer without its hooks: each save is copied at its boundary, and a survivor, which
    cannot know how far the device is, keeps nothing. ``is_captured``: after the run was made."""
    monkeypatch.setattr(checkpointing, "PROOFS", 0)  # which are copied at the boundary in any case
    model = nn.Linear(100, 1)
    late.own(*model.state_dict().values())
    optimizer = Queued(late, model.parameters())
    settings = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep"), "keep_last": 10}}
    (tmp_path / "keep").mkdir()
    state = {"model": model, "optimizer": optimizer}
    run = Run(str(tmp_path / "run"), state, every_steps=1, stop=StopRequest(), config=settings)
    with contextlib.ExitStack() as slow, contextlib.closing(run):
        for _ in run.steps(6):
            step = run.global_step + 1
            if step == 6:
                slow.close()
                run.remember_crash(Died())
                break
            if is_captured and step == 3:
                with monkeypatch.context() as patched:
                    patched.setattr(LateStream, "is_capturing", lambda _: True, raising=False)
                    optimizer.step()
            for each in model.parameters():  # a replay, while the save before is under way
                late.write(each, step)
            slow.close()
            run._attempt.saves.wait()
            slow.enter_context(late.processor_is_slow())
            run.step()
    store = open_store(str(tmp_path / "run"))
    found = {each.step: load.read(store, each.directory, each.manifest)["model"] for each in Catalog(store).entries()}
    assert {step: {*model["weight"].flatten().tolist()} for step, model in found.items()} == {
        step: {float(step)} for step in range(1, 6)
    }
    assert not [*(tmp_path / "keep").glob("harness-*/*/*/manifest*")]


def test_buffers_that_rank_0_gives(late, monkeypatch):
    """Another rank's copy of them is made in the forward pass, after the boundary, and has to be waited for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(300))
        late.own(*model.state_dict().values())
        state = State({"model": model}, CPU)
        world = SoloWorld(CPU)
        world.rank, world.size = 1, 2
        loose, mean = Loose(SimpleNamespace(world=world, state=state)), model.module.running_mean
        loose.note()
        assert "rank 0 has died before it gave its buffers" in loose.why_changed()
        late.write(mean, 3)  # which DDP does before the forward pass, with rank 0's
        model.train(mode=False)(torch.zeros(2, 300))
        late.write(mean, 4)
        late.hang()
        with loose.beside_the_training():
            late.read()
        loose.close()
    finally:
        dist.destroy_process_group()
    assert loose.why_changed() == ""
    assert {*loose.put_into({"model": {}})["model"]["running_mean"].tolist()} == {3.0}


# --- marks and streams of several devices ----------------------------------------------------------------------------


def test_streams_of_several_devices(late, monkeypatch):
    """Each follows the stream of its own device, and each device's stream waits for its own."""
    kinds = [torch.device("xpu", index) for index in range(2)]
    for each in kinds:
        monkeypatch.setitem(device.KNOWN, each, LateDevice(each, late))
    beside, done = device.beside([*kinds, kinds[0]], "save"), []

    def queue(what: str) -> None:
        for each in kinds:
            late.current_stream(each).put(lambda each=each: done.append((what, each.index)))

    queue("step")
    beside.follow()
    with beside.within():
        queue("copy")
        marks = device.here(kinds).mark()
    assert all(late.current_stream(each) is late.default(each) for each in kinds)
    beside.lead()
    queue("next step")
    marks.synchronize()
    for each in kinds:
        late.default(each).run(len(late.default(each).queued))
    orders = [[what for what, index in done if index == each.index] for each in kinds]
    assert orders == 2 * [["step", "copy", "next step"]]
    assert marks.is_over()


def test_a_mark_is_followed_and_waited_for(late):
    """By the streams of a purpose, and by the current stream."""
    done, beside, there = [], device.beside([CPU], "keep"), device.of(CPU)
    late.current_stream(CPU).put(lambda: done.append("step"))
    mark = there.mark()
    beside.follow(mark)
    with beside.within():
        late.current_stream(CPU).put(lambda: done.append("copy"))
    copied = beside.mark()
    copied.wait()
    late.current_stream(CPU).put(lambda: done.append("next step"))
    late.read()
    assert done == ["step", "copy", "next step"]
    assert device.beside([CPU], "keep")._streams == beside._streams, "a purpose has one stream"
    assert there.beside("save") is not there.beside("keep"), "of which none waits for the other"


def test_forward_passes_are_timed_in_their_stream(late):
    """Those that the device is still at do not count yet, and nothing piles up where nobody asks."""
    model = nn.Linear(2, 2)
    own_work = OwnWork(CPU, [model])
    for _ in range(200):
        model(torch.zeros(1, 2))
        late.current_stream(CPU).put(lambda: None)
    was_lazy = late.default().is_lazy
    assert len(own_work._passes) == (200 if was_lazy else len(own_work._passes))
    before = own_work.seconds()
    assert (before == 0) is was_lazy
    late.read()
    assert own_work.seconds() > 0
    assert not own_work._passes


def test_an_event_that_was_not_recorded(late):
    """It was passed, as torch has it."""
    event = LateEvent(late)
    event.synchronize()
    assert event.query()
