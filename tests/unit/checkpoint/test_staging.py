"""Saving beside the training: what is written is the state of one step boundary, whatever the training does meanwhile."""

import contextlib
import random
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Task
from harness.checkpoint import commit, load, staging
from harness.checkpoint.commit import streamed as streamed_of
from harness.checkpoint.format import BlockHasher, checksum
from harness.checkpoint.plan import SavePlan
from harness.checkpoint.saver import Saver, SaveRequest
from harness.checkpoint.staging import HostMemory, Snapshot
from harness.checkpoint.tree import encode
from harness.distributed import device
from harness.errors import StoreError, Unsupported
from harness.runtime.threads import Background
from harness.storage.store import open_store
from tests.support.cluster import newest, train_here
from tests.support.saving import TOO_LARGE, failed_lines, held_up, parts, saver, slow_copies, small_files

OPTIMIZERS = {
    "plain": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=False),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
}
STEPS = 6


class Net(nn.Module):
    """Running averages that the forward pass changes, and an average of the weights that follows each optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.average = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1)).requires_grad_(
            False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def follow(self) -> None:
        with torch.no_grad():
            for mine, other in zip(self.average.parameters(), self.body.parameters(), strict=True):
                mine.lerp_(other, 0.1)


def build(optimizer: str, edit: bool = False) -> Task:
    net = Net()
    optimizer = OPTIMIZERS[optimizer](net.body.parameters())
    optimizer.register_step_post_hook(lambda *_: net.follow())

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        if edit:
            net.body[0].weight.data.clamp_(-0.1, 0.1)
        return F.mse_loss(model(batch[0]), batch[1])

    x = torch.randn(30, 3)
    return Task(net, TensorDataset(x, x.sum(1, keepdim=True)), optimizer, loss)


def train(url, optimizer: str, *, edit: bool = False, **checkpoint):
    """Saves after every step; the digests of all checkpoints."""
    settings = {"every_steps": 1, "check_snapshots": True, **checkpoint}
    sections = {"train": {"steps": STEPS, "global_batch_size": 6}, "checkpoint": settings}
    train_here(lambda: build(optimizer, edit), url=url, **sections)
    catalog = saver(str(url)).catalog
    return [(entry.step, {name: part.digest for name, part in entry.manifest.parts.items()}) for entry in catalog.entries()]


@pytest.fixture
def slow(monkeypatch):
    """Copies that take so long that each optimizer step has to wait for them."""
    slow_copies(monkeypatch, 0.005)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_checkpoint_is_of_one_step(tmp_path, slow, optimizer):
    """Each has the bits that a save has for which the training waits: of the weights, the moments, the running averages of a
    batch norm, an average of the weights, and the random states."""
    beside = train(tmp_path / "beside", optimizer)
    waiting = train(tmp_path / "waiting", optimizer, mode="sync")
    assert [step for step, _ in beside] == list(range(STEPS, 0, -1))
    assert beside == waiting


def test_without_the_fence_they_are_not(tmp_path, slow, monkeypatch):
    """The check that compares a snapshot with the step boundary finds an optimizer that did not wait, by names."""
    monkeypatch.setattr(Saver, "fence", lambda saver: None)
    with pytest.raises(
        Unsupported, match=r"(model|optimizer): .*weight.* changed between the step boundary and the optimizer's"
    ):
        train(tmp_path, "fused")


def test_parameters_that_are_edited_by_hand(tmp_path, slow):
    """An edit before the optimizer's step is found by the check, and is safe without the overlap."""
    with pytest.raises(Unsupported, match=r"body\.0\.weight"):
        train(tmp_path / "overlapping", "plain", edit=True)
    assert train(tmp_path / "at once", "plain", edit=True, overlap=False) == train(
        tmp_path / "waiting", "plain", edit=True, mode="sync"
    )


def test_a_state_beyond_the_limit_is_saved_while_the_training_waits(tmp_path):
    """No copy is made, and the checkpoint is the same."""
    limited = train(tmp_path / "limited", "plain", memory_limit_bytes=100)
    assert limited == train(tmp_path / "waiting", "plain", mode="sync")


# --- the saver -------------------------------------------------------------------------------------------------------


def test_begin_does_not_wait_and_the_fence_does(tmp_path, monkeypatch):
    """What is steady is copied later, everything else at once; the fence holds until the copy is whole."""
    writer = saver(str(tmp_path))
    weight, buffer = torch.zeros(1000), torch.zeros(1000)
    state = {"model": {"weight": weight, "buffer": buffer}}
    with held_up(monkeypatch) as (begun, gate):
        writer.begin(state, SaveRequest(1, is_steady=lambda tensor: tensor is weight))
        buffer.fill_(7)
        assert writer.poll() is None
        assert writer.is_busy
        assert begun.wait(30)
        threading.Timer(0.2, gate.set).start()
        writer.fence()
        weight.fill_(7)
    saved = writer.wait()
    assert 0.15 < saved.blocked_seconds < saved.seconds + 0.05  # the thread's end is seen a moment later
    entry = writer.catalog.newest()
    read = load.read(writer.catalog.store, entry.directory, entry.manifest)["model"]
    assert read["weight"].eq(0).all()
    assert read["buffer"].eq(0).all()
    assert not writer.is_busy
    assert writer.poll() is writer.wait() is None


def test_a_failure_is_told_of_when_it_is_asked_for(tmp_path, caplog):
    """A save that fails beside the training is counted as any other, and the one too many is raised."""
    writer = saver(str(tmp_path), failures_allowed=1)
    with small_files():
        writer.begin(parts(1, TOO_LARGE), SaveRequest(1))
        assert writer.wait() is None
        assert (writer.failures, len(failed_lines(caplog))) == (1, 1)
        writer.begin(parts(2, TOO_LARGE), SaveRequest(2))
        writer._under_way.join(30)
        with pytest.raises(StoreError, match="File too large"):
            writer.poll()
    writer.begin(parts(3), SaveRequest(3))
    assert writer.wait().step == 3
    assert writer.failures == 0


def test_a_save_that_does_not_end_is_given_up(tmp_path, monkeypatch, caplog):
    """The end of a training waits so long and no longer, and raises nothing."""
    writer = saver(str(tmp_path))
    with held_up(monkeypatch):
        writer.begin(parts(1), SaveRequest(1, is_steady=lambda tensor: True))
        assert writer.give_up_after(0.1) is None
        assert "gave up the save of step 1" in caplog.text
    writer.begin(parts(2), SaveRequest(2))
    assert writer.give_up_after(30).step == 2


def test_what_could_not_be_copied_is_not_committed(tmp_path, monkeypatch):
    """The error of the thread that copies is that of the save, and ends the training like any other of ours."""
    writer = saver(str(tmp_path))

    def failing(*_arguments):
        raise RuntimeError("no copy")

    monkeypatch.setattr(staging, "copy_tensor", failing)
    writer.begin(parts(1), SaveRequest(1, is_steady=lambda tensor: True))
    writer.fence()
    with pytest.raises(RuntimeError, match="no copy"):
        writer.wait()
    assert [entry for entry in writer.catalog.entries() if entry.state == "whole"] == []


def snapshot_of(values: dict[str, torch.Tensor], memory: HostMemory, steady=lambda tensor: True) -> Snapshot:
    """A snapshot of a part called ``model``."""
    encoded = {"model": encode(values, "model")}
    plan = SavePlan(encoded, 1 << 30)
    own, _ = plan.own(encoded)
    return Snapshot(plan.shards[0], own, memory, steady)


def contents(values: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """The bytes that the tensors have now."""
    return {name: tensor.numpy().tobytes() for name, tensor in values.items()}


def check(snapshot: Snapshot, before: dict[str, bytes]) -> None:
    """The one image of the snapshot has these bytes behind its header, and the checksum of what it has."""
    (image,) = snapshot.images
    whole = b"".join(image())
    assert whole == image.shard.header + b"".join(before[info.path] for info in image.shard.tensors)
    assert image.checksum == checksum(whole)


def test_memory_is_used_again():
    """The second snapshot lies where the first one lay; a larger one gets more."""
    memory = HostMemory(pinned=False)
    places = []
    for count in (1000, 1000, 2000):
        snapshot = snapshot_of({"weight": torch.rand(count)}, memory)
        snapshot.drain()
        (image,) = snapshot.images
        _header, data = image()
        places.append(np.frombuffer(data, dtype=np.uint8).ctypes.data)
    assert places[0] == places[1]
    assert {place % 4096 for place in places} == {0}, "a disk can fetch it from there"
    assert memory.block.numel() >= 8000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_a_snapshot_has_the_same_bytes(dtype):
    """Of every dtype, of views with strides, of conjugates, of empty tensors and of scalars."""
    tensor = torch.randn(40, 30).to(dtype)
    values = {"whole": tensor, "columns": tensor.t(), "every": tensor[::3, 1:], "none": tensor[:0], "one": tensor[2, 3]}
    if dtype.is_complex:
        values["conjugate"] = tensor.conj()
    snapshot = snapshot_of(values, HostMemory(pinned=False), lambda tensor: tensor.numel() > 100)
    snapshot.drain()
    encoded = {"model": encode(values, "model")}
    (image,), (streamed,) = snapshot.images, streamed_of(SavePlan(encoded, 1 << 30), encoded)
    assert b"".join(image()) == b"".join(streamed())
    assert (image.checksum, image.blocks) == (streamed.checksum, streamed.blocks)
    assert b"".join(image()) == b"".join(streamed()), "as often as an upload is tried"


def test_an_image_is_written_while_it_is_filled(monkeypatch):
    """The writer gets what is there, and waits for the rest; the checksums are there when it has everything."""
    monkeypatch.setattr(staging, "WINDOW_BYTES", 1 << 20)
    values = {name: torch.rand(1 << 18) for name in "abc"}
    with held_up(monkeypatch) as (_begun, gate):
        snapshot = snapshot_of(values, HostMemory(pinned=False), lambda tensor: tensor is not values["a"])
        draining = Background(snapshot.drain)
        (image,) = snapshot.images
        coming = image()
        assert bytes(next(coming)) == image.shard.header
        assert bytes(next(coming)) == values["a"].numpy().tobytes()
        rest = Background(lambda: [bytes(window) for window in coming])
        rest.join(0.2)
        assert rest.is_alive()
        assert not image.checksum
        gate.set()
        assert rest.result() == [values[name].numpy().tobytes() for name in "bc"]
        assert image.checksum
    draining.result()


@pytest.mark.parametrize(
    ("sizes", "steady"),
    [([10] * 40, [10]), ([40 << 18], [40 << 18]), ([40 << 18, 10], [10])],
    ids=["between tensors", "within one", "within one that is copied"],
)
def test_the_fence_does_not_wait_for_checksums(monkeypatch, sizes, steady):
    """Once somebody waits, what is left is copied first and hashed afterwards."""

    class Slow(BlockHasher):
        def update(self, data: memoryview) -> None:
            time.sleep(0.05)
            super().update(data)

    monkeypatch.setattr(staging, "BlockHasher", Slow)
    values = {f"layer{index:02}": torch.rand(size) for index, size in enumerate(sizes)}
    before = contents(values)
    snapshot = snapshot_of(values, HostMemory(pinned=False), lambda tensor: tensor.numel() in steady)
    began = time.monotonic()
    draining = Background(snapshot.drain)
    snapshot.fence()
    assert time.monotonic() - began < 1
    for tensor in values.values():
        tensor.fill_(-1)
    draining.result()
    assert time.monotonic() - began > 2
    check(snapshot, before)


def test_who_waits_copies_too(monkeypatch):
    """From the last tensor backwards, while the other thread is at the first one; the fence waits for that one, too."""
    values = {f"layer{index}": torch.full((10,), float(index)) for index in range(8)}
    before = contents(values)
    helped: list[int] = []
    with held_up(monkeypatch) as (begun, gate):
        copy = staging.copy_tensor

        def watched(memory, start, tensor):
            if threading.current_thread() is threading.main_thread():
                helped.append(int(tensor[0]))
                if len(helped) == 7:
                    threading.Timer(0.2, gate.set).start()
            return copy(memory, start, tensor)

        monkeypatch.setattr(staging, "copy_tensor", watched)
        snapshot = snapshot_of(values, HostMemory(pinned=False))
        draining = Background(snapshot.drain)
        assert begun.wait(30)
        snapshot.fence()
        assert gate.is_set()
    for tensor in values.values():
        tensor.fill_(-1)
    draining.result()
    assert helped == [7, 6, 5, 4, 3, 2, 1]
    check(snapshot, before)


def test_nothing_is_hashed_before_it_is_copied(monkeypatch):
    """What the waiting thread has taken is not there yet when the other one comes to it, which must not take what lies there
    from the save before."""
    copy, memory = staging.copy_tensor, HostMemory(pinned=False)

    def slowly(*arguments):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.05)
        return copy(*arguments)

    monkeypatch.setattr(staging, "copy_tensor", slowly)
    for number in range(3):
        values = {f"layer{index}": torch.full((10,), float(8 * number + index)) for index in range(8)}
        snapshot = snapshot_of(values, memory)
        draining = Background(snapshot.drain)
        snapshot.fence()
        draining.result()
        check(snapshot, contents(values))


def test_a_fence_at_any_time(monkeypatch):
    """Whenever it comes, and whoever has copied what: the state before it is what the image has."""
    monkeypatch.setattr(staging, "WINDOW_BYTES", 1 << 20)
    memory, draws = HostMemory(pinned=False), random.Random(0)
    for _ in range(100):
        values = {f"layer{index}": torch.rand(draws.choice([0, 1, 1000, 1 << 20])) for index in range(12)}
        before = contents(values)
        snapshot = snapshot_of(values, memory, lambda tensor: tensor.numel() != 1000)
        draining = Background(snapshot.drain)
        time.sleep(draws.uniform(0, 0.01))
        snapshot.fence()
        for tensor in values.values():
            tensor.fill_(-1)
        draining.result()
        check(snapshot, before)


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), KeyboardInterrupt("stop")], ids=lambda error: type(error).__name__
)
def test_what_the_fence_could_not_copy_is_not_written(monkeypatch, error):
    """Its error is the save's, and the other thread is not left waiting; who interrupts the training interrupts it, too."""
    with held_up(monkeypatch) as (begun, gate):
        copy = staging.copy_tensor

        def failing(*arguments):
            if threading.current_thread() is threading.main_thread():
                gate.set()
                raise error
            return copy(*arguments)

        monkeypatch.setattr(staging, "copy_tensor", failing)
        snapshot = snapshot_of({name: torch.rand(10) for name in "abc"}, HostMemory(pinned=False))
        draining = Background(snapshot.drain)
        assert begun.wait(30)
        raised = contextlib.nullcontext() if isinstance(error, Exception) else pytest.raises(type(error), match="stop")
        with raised:
            snapshot.fence()
    draining.join(30)
    assert not draining.is_alive()
    (image,) = snapshot.images
    with pytest.raises(type(error), match=str(error)):
        list(image())


@pytest.mark.parametrize("size", [0, 1, 4096, 3 << 20, (8 << 20) + 4096, (20 << 20) + 5])
def test_an_image_on_a_disk(tmp_path, size):
    """What is written from where it lies, past the page cache where the disk has that, is the same to the last byte."""
    values = {"whole": torch.randint(255, (size,), dtype=torch.uint8)}
    snapshot = snapshot_of(values, HostMemory(pinned=False))
    snapshot.drain()
    (image,) = snapshot.images
    open_store(str(tmp_path)).put("a", image, image.shard.size_bytes)
    data = (tmp_path / "a").read_bytes()
    assert data == b"".join(image())
    assert image.checksum == checksum(data)


def test_a_busy_saver_makes_the_next_save_wait_or_be_skipped(tmp_path, monkeypatch):
    """``checkpoint.when_busy``: either all are there in the end, or some are not and the log says which."""
    write = commit.write_share

    def slowly(*arguments):
        time.sleep(0.15)
        return write(*arguments)

    monkeypatch.setattr(commit, "write_share", slowly)
    assert [step for step, _ in train(tmp_path / "wait", "plain")] == list(range(STEPS, 0, -1))
    skipping = [step for step, _ in train(tmp_path / "skip", "plain", when_busy="skip")]
    assert STEPS in skipping, "the last one is not skipped"
    assert len(skipping) < STEPS
    assert newest(tmp_path / "skip")["digests"] == newest(tmp_path / "wait")["digests"]


@pytest.mark.skipif(device.count() > 0, reason="needs a machine that pins no memory")
def test_memory_that_cannot_be_pinned(caplog):
    """Saves go on with memory that is not, and one line says so."""
    memory = HostMemory(pinned=True)
    assert [memory.at_least(size_bytes).numel() >= size_bytes for size_bytes in (1000, 100_000)] == [True, True]
    (line,) = caplog.messages
    assert line.startswith("saves copy at half the speed: 0 MB of memory could not be pinned: ")
