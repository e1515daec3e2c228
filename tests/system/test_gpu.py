"""On a machine with CUDA devices: saving, restoring, random numbers, mixed precision, NCCL, kills, survivors, forks.

``make test-gpu`` runs these, and all others that are marked ``gpu``. ``GPU_TESTS_ON=cpu`` runs what is here on the CPU, over
gloo, so that the tests themselves can be tried without a device.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness import Run, StopRequest, Task
from harness.checkpoint import commit, load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.data.seeding import random_state, restore_random_state, seed_everything
from harness.data.streams import keys_here, seed_streams, stream_states
from harness.distributed import device
from harness.distributed.world import SoloWorld
from harness.launcher.fork_server import Preload
from harness.runtime.environment import rank
from harness.state.to_device import sent
from harness.storage.store import open_store
from harness.training.run import device_of
from tests.support.cluster import branch, committed, held, hold, launch, newest, read_json, release, train_here
from tests.support.states import bits

KIND = os.environ.get("GPU_TESTS_ON", "cuda")
COUNT = torch.cuda.device_count() if KIND == "cuda" else 2  # which initializes nothing
STEPS, EVERY, HELD_AT = 12, 3, 8
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(KIND == "cuda" and not COUNT, reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # what torch warns of on a device is not what is tried here
]


@pytest.fixture
def there() -> torch.device:
    """The last device: what takes the current one of a thread by mistake takes another, where there are several."""
    if KIND != "cuda":
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    return device.choose(COUNT - 1)


def occupy(seconds: float) -> None:
    """Has the current stream do nothing for a while, as in a collective whose other ranks do not come."""
    if KIND == "cuda":
        torch.cuda._sleep(int(seconds * 2e9))  # cycles, of at most 2 GHz


# --- a training ------------------------------------------------------------------------------------------------------


def build(place: str = "", waits: int = 0, width: int = 256) -> Task:
    """A model with all that is hard to resume: dropout, statistics of batches, moments. In ``place``, the rank that
    ``waits`` does so at a step until it is released, once."""
    model = nn.Sequential(nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.9)

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        if place and rank() == waits and scheduler.last_epoch == HELD_AT:
            hold(Path(place, "step"))
        return F.mse_loss(model(batch[0]), batch[1])

    x = torch.randn(64, 16)
    return Task(model, TensorDataset(x, x.sum(1, keepdim=True)), optimizer, loss, scheduler)


def train(there: torch.device, url: str, *, steps: int = STEPS, precision: str = "fp32", width: int = 256, **checkpoint):
    """Trains in this process. The digests of all checkpoints, by step."""
    sections: dict[str, Any] = {
        "train": {"steps": steps, "global_batch_size": 8, "precision": precision, "clip_grad_norm": 1.0}
    }
    train_here(
        lambda: build(width=width), SoloWorld(there), url=url, checkpoint={"every_steps": 1, **checkpoint}, **sections
    )
    entries = Catalog(open_store(url)).entries()
    return {each.step: {name: part.digest for name, part in each.manifest.parts.items()} for each in entries}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_save_beside_the_training_and_a_resume(there, tmp_path, precision):
    """Each checkpoint has the bits of one for which the training waits; a resume in the middle, of weights, moments, random
    numbers and the scale of fp16, ends with the same bits."""
    options: dict[str, Any] = {"precision": precision, "width": 2048}
    beside = train(there, str(tmp_path / "beside"), **options)
    waiting = train(there, str(tmp_path / "waiting"), mode="sync", **options)
    assert beside == waiting
    resumed = train(there, branch(tmp_path / "beside", tmp_path / "resumed", STEPS // 2), **options)
    assert resumed[STEPS] == beside[STEPS]


def test_a_run_with_carried_random_states(there, tmp_path):
    """The device's generator is put back as it was, rather than begun anew."""
    straight = train(there, str(tmp_path / "straight"), random="carried")
    resumed = train(there, branch(tmp_path / "straight", tmp_path / "resumed", 5), random="carried")
    assert resumed == straight


def test_tensors_come_back_where_they_were(there, tmp_path):
    """A checkpoint of what lies on the device, in several shapes, and its way back: bit for bit."""
    seed_everything(0)
    wide = torch.randn(3000, 2000, device=there)
    values = {
        "wide": wide,
        "columns": wide.t(),
        "half": wide.half(),
        "some": wide[::2, 1:],
        "one": wide[1, 1],
        "none": wide[:0],
    }
    store = open_store(str(tmp_path))
    attempt = Attempt("000001-00000000")
    found = sent(load.read(store, *commit.write(store, {"part": values}, step=1, attempt=attempt))["part"], there)
    assert {found[name].device for name in ("wide", "columns", "half")} == {there}
    assert {name: bits(each.cpu()) for name, each in found.items()} == {
        name: bits(each.cpu()) for name, each in values.items()
    }


def test_random_numbers_of_the_device(there):
    """A state that is set gives the same numbers again; a stream begins where its key says, and a survivor knows where."""
    seed_everything(5)
    keys = keys_here(there)
    seed_streams(keys, 7, there)
    state = random_state(there)
    assert bits(stream_states(keys, 7, there)) == bits(state)
    first = [torch.rand(5, device=there).tolist(), torch.rand(5).tolist()]
    restore_random_state(state, there)
    assert [torch.rand(5, device=there).tolist(), torch.rand(5).tolist()] == first
    seed_streams(keys, 8, there)
    assert [torch.rand(5, device=there).tolist(), torch.rand(5).tolist()] != first


# --- streams ---------------------------------------------------------------------------------------------------------


def in_another_thread(function) -> None:
    """A thread begins with device 0 and its default stream."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed, failed


@pytest.mark.parametrize("turn", range(5))
def test_copies_in_a_stream_beside(there, turn):
    """They follow what was queued, and what is queued then waits for them; from another thread, too."""
    where, source = device.of(there), torch.zeros(8 << 20, dtype=torch.uint8, device=there)
    found = [where.host_memory(len(source)) for _ in range(2)]
    beside = device.beside([there], "save")
    occupy(0.05)
    source.fill_(turn + 1)
    beside.follow()
    with beside.within():
        where.copy(found[0], source)
    beside.lead()
    source.fill_(77)
    mark = where.mark()

    def copy() -> None:
        beside.follow(mark)
        with beside.within():
            where.copy(found[1], source)
        beside.mark().synchronize()

    in_another_thread(copy)
    assert [{*each.tolist()} for each in found] == [{turn + 1}, {77}]


def test_bytes_that_another_thread_reads(there):
    """It reads them in the stream in which they are computed, though its own current one is another."""
    own = device.beside([there], "test")
    own.follow()
    with own.within():
        occupy(0.2)
        tensor = torch.full((1 << 20,), 3.0, device=there)
        here = device.here([there])
    found: list[torch.Tensor] = []
    in_another_thread(lambda: found.extend(here.each(tensor.cpu() for _ in range(1))))
    in_another_thread(lambda: found.append(here.calling(torch.Tensor.cpu)(tensor)))
    assert [bool(each.eq(3).all()) for each in found] == [True, True]
    if KIND == "cuda":
        assert torch.cuda.current_stream() == torch.cuda.default_stream(), "the current stream is back"


def test_marks_take_the_time(there):
    """Of what the device does between them."""
    where = device.of(there)
    begin = where.mark(timed=True)
    occupy(0.2)
    end = where.mark(timed=True)
    end.synchronize()
    assert end.is_over()
    assert begin.seconds_until(end) >= (0.05 if KIND == "cuda" else 0)


# --- a survivor ------------------------------------------------------------------------------------------------------


class Died(Exception):
    """In place of a peer's death."""


def test_a_survivor_beside_a_stream_that_hangs(there, tmp_path):
    """The state of the last boundary is kept while the stream of the training is still at something, and the next step is
    queued behind that."""
    seed_everything(0)
    model = build().model.to(there)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    (tmp_path / "keep").mkdir()
    settings = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep")}, "stop": {"grace_seconds": 20}}
    run = Run(
        str(tmp_path / "run"),
        {"model": model, "optimizer": optimizer},
        every_steps=1000,
        stop=StopRequest(),
        config=settings,
    )
    x, before = torch.randn(8, 16, device=there), ""
    with contextlib.closing(run):
        for _ in run.steps(10):
            step = run.global_step + 1
            if step == 4:
                before = bits({name: each.cpu() for name, each in model.state_dict().items()})
                occupy(8)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if step == 4:
                run.remember_crash(Died())
                assert KIND != "cuda" or not torch.cuda.current_stream().query(), "the copy has waited for the training"
                break
            optimizer.step()
            run.step()
    (place,) = (tmp_path / "keep").glob("harness-*/*")
    (entry,) = Catalog(open_store(str(place))).entries()
    found = load.read(open_store(str(place)), entry.directory, entry.manifest)["model"]
    assert (entry.step, entry.state) == (3, "whole")
    assert bits({name: found[name] for name in model.state_dict()}) == before


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """The time in which nobody waits for the device: torch raises an error."""
    if KIND == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if KIND == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_boundary_does_not_wait_for_the_device(there, tmp_path):
    """What a survivor may need is noted beside the training: statistics of batches, and the scale of fp16."""
    model, scaler = build().model.to(there), torch.amp.GradScaler(KIND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    (tmp_path / "keep").mkdir()
    settings = {"log": {"every_steps": None}, "checkpoint": {"keep": str(tmp_path / "keep")}}
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run = Run(str(tmp_path / "run"), state, every_steps=1000, stop=StopRequest(), config=settings)
    x = torch.randn(8, 16, device=there)
    with contextlib.closing(run):
        steps = run.steps(10)
        next(steps)
        for number in range(6):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            with without_waiting() if number > 1 else contextlib.nullcontext():
                run.step()
                next(steps)
        run.remember_crash(Died())
        steps.close()
    (place,) = (tmp_path / "keep").glob("harness-*/*")
    (entry,) = Catalog(open_store(str(place))).entries()
    found = load.read(open_store(str(place)), entry.directory, entry.manifest)["scaler"]
    assert (entry.step, found["state"]) == (6, scaler.state_dict())


@pytest.mark.skipif(KIND != "cuda", reason="needs a CUDA device")
def test_saves_of_a_training_in_a_graph(there, tmp_path):
    """A graph that holds the optimizer's step calls no hooks: what is saved is copied at the boundary."""
    seed_everything(0)
    model = nn.Linear(2048, 2048, device=there)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, capturable=True)
    x, beside = torch.randn(64, 2048, device=there), torch.cuda.Stream(there)

    def train() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    state, config = {"model": model, "optimizer": optimizer}, {"checkpoint": {"keep_last": 100}}
    run = Run(str(tmp_path), state, every_steps=1, stop=StopRequest(), config=config)
    beside.wait_stream(torch.cuda.current_stream(there))
    with torch.cuda.stream(beside):
        for _ in range(3):
            train()
    torch.cuda.current_stream(there).wait_stream(beside)
    graph, expected = torch.cuda.CUDAGraph(), {}
    with torch.cuda.graph(graph):
        train()
    with contextlib.closing(run):
        for step in run.steps(8):
            graph.replay()
            expected[step + 1] = {name: each.detach().clone() for name, each in model.state_dict().items()}
            run.step()
    store = open_store(str(tmp_path))
    found = {each.step: load.read(store, each.directory, each.manifest)["model"] for each in Catalog(store).entries()}
    assert {step: bits(each) for step, each in found.items()} == {
        step: bits({name: value.cpu() for name, value in each.items()}) for step, each in expected.items()
    }


def test_where_a_program_trains(there):
    """On the device, though the first module in the state, an average of the other one's weights, is not there."""
    assert device_of({"average": nn.Linear(1, 1), "model": nn.Linear(1, 1).to(there)}) == there


# --- ranks -----------------------------------------------------------------------------------------------------------


def config(*, place: str = "", waits: int = 0, every: int = EVERY, keep: str | None = None) -> dict[str, Any]:
    return {
        "task": f"{__file__}:build",
        "args": {"place": place, "waits": waits},
        "train": {"steps": STEPS, "global_batch_size": 24, "clip_grad_norm": 1.0},
        "checkpoint": {"url": "run", "every_steps": every, "keep": keep},
        "world": {"device": KIND, "backend": "nccl" if KIND == "cuda" else "gloo", "timeout_seconds": 60},
        "stop": {"grace_seconds": 10},
    }


@contextlib.contextmanager
def launched(folder: Path, settings: dict[str, Any], *, restarts: int = 0, **env: str) -> Iterator[Any]:
    """One rank for each device, forked by the agent."""
    passed = {name: value for name, value in os.environ.items() if name.startswith(("CUDA_", "NCCL_"))}
    with launch(folder, settings, ranks=max(COUNT, 1), max_restarts=restarts, env={**passed, **env}) as run:
        yield run


def digests(folder: Path) -> dict[str, str]:
    found = read_json("inspect", str(folder / "run"))
    return {name: found["digest"][name] for name in ("model", "optimizer", "random")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The end of the run that nothing happens to. Its ranks are forked from a process that has not touched a device."""
    folder = tmp_path_factory.mktemp("straight")
    with launched(folder, config()) as run:
        run.succeed(90)
        (start,) = run.events("start")
        assert "cannot be forked" not in run.output()
    assert start["world_size"] == max(COUNT, 1)
    assert newest(folder / "run")["step"] == STEPS
    return digests(folder)


@pytest.mark.torchrun
@pytest.mark.parametrize("killed", sorted({0, max(COUNT, 1) - 1}))
def test_a_kill_and_a_resume(straight, tmp_path, killed):
    """A rank is killed while the others wait for it in a collective; the run goes on from the last save, to the same end."""
    with launched(tmp_path, config(place="."), restarts=1) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which a rank is killed", 90)
        run.wait(lambda: HELD_AT // EVERY * EVERY in committed(tmp_path / "run"), "the save before it")
        run.kill_rank(killed)
        release(tmp_path / "step")
        assert run.wait_for("resume", attempt=2, seconds=90)["step"] == HELD_AT // EVERY * EVERY
        run.succeed(90)
    assert digests(tmp_path) == straight


@pytest.mark.torchrun
@pytest.mark.skipif(COUNT < 2, reason="needs two CUDA devices")
def test_a_survivor_beside_a_collective_that_hangs(straight, tmp_path):
    """Nothing is lost: rank 0 waits for the killed one, and has kept the step before, with the statistics of batches."""
    (tmp_path / "keep").mkdir()
    settings = config(place=".", waits=COUNT - 1, every=1000, keep=str(tmp_path / "keep"))
    with launched(tmp_path, settings, restarts=1) as run:
        run.wait(lambda: held(tmp_path / "step"), "the step at which a rank is killed", 90)
        run.kill_rank(COUNT - 1)
        release(tmp_path / "step")
        assert run.wait_for("resume", attempt=2, seconds=90)["step"] == HELD_AT
        run.succeed(90)
    assert digests(tmp_path) == straight


@pytest.mark.torchrun
@pytest.mark.skipif(KIND != "cuda", reason="needs a CUDA device")
def test_a_preloaded_module_that_uses_a_device(straight, tmp_path):
    """No rank is forked from a process with a driver that a fork would break, and a line says why; the run is the same."""
    (tmp_path / "uses_a_device.py").write_text("import torch\ntorch.zeros(1, device='cuda')\n")
    with launched(tmp_path, config(), **Preload(["uses_a_device"], str(tmp_path)).leave()) as run:
        run.succeed(90)
        assert "so each rank imports all by itself" in run.output()
    assert digests(tmp_path) == straight
