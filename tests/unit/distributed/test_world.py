"""The processes of a run, and agreement between them."""

import os
import pickle
import platform
import re
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import TCPStore

from harness.config import WorldConfig
from harness.distributed import device
from harness.distributed.world import (
    ROW_BYTES,
    Maximum,
    SoloWorld,
    TorchrunWorld,
    _fresh_store,
    has_lost_a_peer,
    join_world,
    world_of_program,
)
from harness.errors import ConfigError, RankFailure
from harness.runtime import console
from harness.runtime.environment import Ranks
from harness.training import program
from tests.support.cluster import launch, play, played, returned

RANKS = 3
HALF_A_MINUTE = timedelta(seconds=30)

# --- one plain process -----------------------------------------------------------------------------------------------


@pytest.fixture
def solo():
    return SoloWorld(torch.device("cpu"))


def test_a_plain_process_agrees_with_itself(solo):
    """Everything that asks other processes has its answer at once."""
    value = {"step": 3}
    assert (solo.rank, solo.size) == (0, 1)
    assert solo.broadcast(value) is value
    assert solo.gather(value) == solo.all_gather(value) == [value]
    assert solo.all_gather_floats([1.5, 2.0]) == [[1.5, 2.0]]
    assert solo.begin_max([3, 4])() == [3, 4]
    model, tensor = nn.Linear(1, 1), torch.ones(2)
    assert solo.wrap(model) is model
    solo.broadcast_tensors([tensor])
    assert tensor.tolist() == [1, 1]
    found = torch.zeros(1, 2, dtype=torch.uint8)
    solo.exchange(torch.tensor([7, 8], dtype=torch.uint8), list(found))
    assert found.tolist() == [[7, 8]]
    solo.close()


def test_an_agreement_of_one_is_immediate(solo):
    """What one plain process wants counts at the same step."""
    agreement = Maximum(solo, wants=2)
    assert agreement.exchange(0, 0) == [0, 0]
    assert agreement.exchange(1, 0) == [1, 0]
    agreement.finish()


def test_without_a_launcher_there_is_no_group(monkeypatch):
    """A plain process makes none, so a debugger finds nothing but the loop."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert isinstance(join_world(WorldConfig(device="cpu")), SoloWorld)
    assert not torch.distributed.is_initialized()


# --- what the machine has not ----------------------------------------------------------------------------------------


def be_one_of_two(monkeypatch) -> None:
    """As torchrun tells its workers."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def have_one_device(monkeypatch) -> None:
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(device, "count", lambda: 1)


def test_a_device_that_is_not_there(monkeypatch):
    """It is said before any group is made: here there is none to make it with, so an attempt would be another error."""
    have_one_device(monkeypatch)
    be_one_of_two(monkeypatch)
    with pytest.raises(ConfigError, match=r"world\.device: expected a CUDA device for each of 2 local ranks, found 1"):
        join_world(WorldConfig(device="cuda"))


def test_too_few_gpus_mean_the_cpu(monkeypatch):
    """Where one local rank would go without, ``auto`` takes the CPU for all, and NCCL cannot be had."""
    have_one_device(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_world(WorldConfig()).device.type == "cpu"
    be_one_of_two(monkeypatch)
    with pytest.raises(ConfigError, match=r"world\.backend: expected CUDA devices for nccl, found none"):
        join_world(WorldConfig(backend="nccl"))


# --- finding each other ----------------------------------------------------------------------------------------------


@pytest.fixture
def lent(monkeypatch):
    """A store like the one that torchrun lends its workers, over all their restarts."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    return store


def start(rank: int, found: dict, timeout: timedelta = HALF_A_MINUTE) -> threading.Thread:
    """A rank of a new generation, as a thread."""

    def join() -> None:
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            found[rank] = _fresh_store(Ranks(rank, RANKS, rank, RANKS, address, port), timeout)
        except RankFailure as error:
            found[rank] = error

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    return thread


def generation(lent) -> dict:
    """The stores of ranks of which the first comes last, as after a restart."""
    found: dict = {}
    threads = [start(rank, found) for rank in (1, 2)]
    for rank in (1, 2):
        lent.wait([f"harness/greeting/{rank}"])
    threads.append(start(0, found))
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [0, 1, 2], "all have found each other"
    return found


def test_ranks_of_one_start_find_each_other(lent):
    """What one sets, the others get."""
    stores = generation(lent)
    stores[0].set("address", "here")
    assert [stores[rank].get("address") for rank in (1, 2)] == [b"here"] * 2


def test_a_restart_does_not_see_what_was_before(lent):
    """Neither the keys of an earlier start, nor those of one that died half-way, come up again."""
    for number in range(3):
        stores = generation(lent)
        for rank in range(RANKS):
            assert not stores[rank].check(["address"]), number
        stores[0].set("address", f"port {number}")
        assert stores[1].get("address") == stores[2].get("address") == f"port {number}".encode()
        lent.set("harness/greeting/1", f"a word of a rank that died after start {number}")


def test_a_rank_that_died_after_its_greeting_is_replaced(lent):
    """Rank 0 answers whoever comes, and waits for the one that answers back."""
    lent.set("harness/greeting/1", "dead")
    lent.set("harness/greeting/2", "dead too")
    found: dict = {}
    first = start(0, found)
    lent.wait(["harness/answer/dead", "harness/answer/dead too"])
    others = [start(rank, found) for rank in (1, 2)]
    for thread in (first, *others):
        thread.join(30)
    found[2].set("address", "here")
    assert found[0].get("address") == found[1].get("address") == b"here"


def test_a_rank_that_does_not_come_is_named(lent):
    """The wait is bounded."""
    found: dict = {}
    start(1, found)
    start(0, found, timedelta(seconds=0.5)).join(30)
    assert isinstance(found[0], RankFailure)
    assert "ranks [2] did not join" in str(found[0])


@pytest.fixture
def unlent(monkeypatch):
    """Starts whose store rank 0 has to open, since torchrun lends none: what is called before each."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")

    def prepare() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))

    return prepare


def test_ranks_that_are_faster_than_the_first_lose_no_time(unlent):
    """They have found rank 0 as soon as it is there, where torch's own client sleeps for a quarter of a second or more."""
    seconds = []
    for _ in range(3):
        unlent()
        found: dict = {}
        others = [start(rank, found) for rank in (1, 2)]
        time.sleep(0.1)
        begin = time.monotonic()
        for thread in (start(0, found), *others):
            thread.join(30)
        seconds.append(time.monotonic() - begin)
        found[0].set("address", "here")
        assert [found[rank].get("address") for rank in (1, 2)] == [b"here"] * 2
    assert min(seconds) < 0.2


def test_a_first_rank_that_does_not_come_is_named(unlent):
    """This wait is bounded, too."""
    unlent()
    found: dict = {}
    start(1, found, timedelta(seconds=0.3)).join(30)
    assert isinstance(found[1], RankFailure)
    assert "rank 0 has not started" in str(found[1])


# --- real ranks ------------------------------------------------------------------------------------------------------


def objects(world, place: Path):
    gathered = world.gather(["from", world.rank])
    # Those of rank 1 and 2 do not fit into the row that each rank sends: one of them hardly, one by far.
    sizes = [0, next(size for size in range(ROW_BYTES) if len(pickle.dumps("x" * size)) == ROW_BYTES + 1), 3_000_000]
    long = world.gather("x" * sizes[world.rank])
    return {
        "broadcast": world.broadcast(f"rank {world.rank}"),
        "gather": gathered,
        "long": long and [len(each) for each in long] == sizes and {*"".join(long)} == {"x"},
        "all": world.all_gather(world.rank),
        "texts": world.all_gather_text("abc"[: world.rank]),
    }


def floats(world, place: Path):
    return world.all_gather_floats([0.1 * world.rank, 1e300])


def tensors(world, place: Path):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8]
    sent = [torch.full((2, 3), world.rank == 0, dtype=dtype).t() for dtype in dtypes]
    sent.append(torch.tensor(5 - world.rank))
    strides = [tensor.stride() for tensor in sent]
    world.broadcast_tensors(sent)
    assert [tensor.stride() for tensor in sent] == strides
    return [bool((tensor == 1).all()) for tensor in sent[:-1]] + [int(sent[-1])]


def pieces(world, place: Path):
    found = torch.zeros(RANKS, 5, dtype=torch.uint8)
    world.exchange(torch.full((3,), world.rank + 1, dtype=torch.uint8), [row[1:4] for row in found])
    return found.tolist()


def wrapping(world, place: Path):
    learning, frozen = nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(requires_grad=False)
    return [type(world.wrap(model)).__name__ for model in (learning, frozen)]


def agreeing(world, place: Path):
    """Two ranks want something at different steps; each notes when it learns of it. Steps of a millisecond."""
    agreement = Maximum(world, wants=2, interval_seconds=0.02)
    learnt = []
    rounds = 0
    begin = world.begin_max

    def counted(values):
        nonlocal rounds
        rounds += 1
        return begin(values)

    world.begin_max = counted
    for step in range(400):
        deadline = time.monotonic() + 0.001
        while time.monotonic() < deadline:
            pass
        wants = (int(world.rank == 1 and step >= 100), 3 if world.rank == 2 and step == 0 else 0)
        if any(agreed := agreement.exchange(*wants)):
            learnt.append([step, *agreed])
            if agreed[0]:
                break
    agreement.finish()
    del world.begin_max
    return {"learnt": learnt, "rounds": rounds}


def letting_go(world, _place: Path):
    """A second world is made, used, and let go of, twice. How many threads there are before, meanwhile, and afterwards."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    counts = [threads()]
    other = TorchrunWorld(world.device, world.backend, 60)
    other.all_gather_floats([1.0])
    counts.append(threads())
    other.let_go()
    other.let_go()
    return [*counts, threads()]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return played(__file__, tmp_path_factory.mktemp("world"), RANKS)


@pytest.mark.torchrun
def test_no_thread_is_left_when_python_ends(results):
    """Otherwise a script that does not take its groups down ends with SIGABRT now and then, when all is done: one of five on
    busy cores."""
    for before, meanwhile, afterwards in returned(results["letting_go"]):
        assert meanwhile > before
        assert afterwards == before


@pytest.mark.torchrun
def test_objects_travel_between_ranks(results):
    """Rank 0's to all, all to rank 0, all to all; in the order of the ranks."""
    found = returned(results["objects"])
    assert [result["broadcast"] for result in found] == ["rank 0"] * RANKS
    assert [result["gather"] for result in found] == [[["from", 0], ["from", 1], ["from", 2]], None, None]
    assert [result["long"] for result in found] == [True, None, None]
    assert [result["all"] for result in found] == [[0, 1, 2]] * RANKS
    assert [result["texts"] for result in found] == [["", "a", "ab"]] * RANKS


@pytest.mark.torchrun
def test_floats_keep_their_bits(results):
    """In double precision, by rank."""
    assert returned(results["floats"]) == [[[0.1 * rank, 1e300] for rank in range(RANKS)]] * RANKS


@pytest.mark.torchrun
def test_tensors_are_overwritten_by_rank_0s(results):
    """Every dtype that a buffer may have, whatever its strides."""
    assert returned(results["tensors"]) == [[True] * 7 + [5]] * RANKS


@pytest.mark.torchrun
def test_bytes_are_exchanged(results):
    """Each rank's arrive on every rank, where they are wanted."""
    rows = [[0, rank + 1, rank + 1, rank + 1, 0] for rank in range(RANKS)]
    assert returned(results["pieces"]) == [rows] * RANKS


@pytest.mark.torchrun
def test_ddp_wraps_only_models_with_gradients(results):
    """DDP refuses a model without gradients."""
    assert returned(results["wrapping"]) == [["DistributedDataParallel", "Linear"]] * RANKS


@pytest.mark.torchrun
def test_all_ranks_learn_of_a_wish_at_the_same_step(results):
    """The largest wish counts; one that is held up is heard a little later, and there are far fewer rounds than steps."""
    found = returned(results["agreeing"])
    assert found[0]["learnt"] == found[1]["learnt"] == found[2]["learnt"]
    assert found[0]["learnt"][0] == [1, 0, 3], "the first round begins with the first step and is read at the next"
    step, *agreed = found[0]["learnt"][-1]
    assert agreed == [1, 0]
    assert 100 < step < 399
    assert found[0]["rounds"] < step / 2


@pytest.mark.torchrun
def test_a_lost_peer_is_told_from_an_error_here(tmp_path):
    """A rank whose peer was killed says so in one line, without a traceback, and with an exit code of its own."""
    config = {
        "task": "harness.tasks.linear:build",
        "train": {"steps": 100_000_000, "global_batch_size": 8},
        "log": {"every_steps": 100, "jsonl": str(tmp_path / "log.jsonl")},
    }
    with launch(tmp_path, config, ranks=2) as run:
        run.wait_for("train", step=100, attempt=0)
        run.kill_rank(1)
        assert run.finish() == 1
        output = run.output()
    lines = [line for line in output.splitlines() if "harness:" in line]
    assert len(lines) == 1
    lost = r"lost contact with another rank: .+; this rank was at the boundary of step \d{3,}"
    ended = "another rank has failed; this rank exits, too"  # the agent was faster than gloo
    assert re.fullmatch(rf"rank 0 on {re.escape(platform.node())}: harness: ({lost}|{ended})", lines[0]), lines
    assert output.count("Traceback") == 1, "torchrun's own"


def test_a_store_with_old_addresses_is_warned_of(tmp_path, monkeypatch, caplog):
    """Where the program has joined by torch's own means, and torchrun may start it again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        monkeypatch.setattr(TorchrunWorld, "has_joined", False)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
        world_of_program(torch.device("cpu"), 60)
        assert caplog.text == ""
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
        world_of_program(torch.device("cpu"), 60)
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_name_that_leads_nowhere(monkeypatch, caplog, rank):
    """It is told of within seconds, by every rank, with what is wrong; without torchrun it may still be published."""
    address, port = "no-such-host.invalid", "29500"
    environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("harness.distributed.world.NAME_SECONDS", 0.3)
    words = f"this machine cannot resolve MASTER_ADDR={address}, the machine of rank 0: .*--local-addr"
    with pytest.raises(RankFailure, match=words):
        join_world(WorldConfig(timeout_seconds=1))
    assert "trying again for up to 1 s" in caplog.text
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    began = time.monotonic()
    with pytest.raises(RankFailure, match=words):
        join_world(WorldConfig(timeout_seconds=600))
    assert time.monotonic() - began < 60


def test_a_wait_that_was_too_long(monkeypatch):
    """Says at which boundary this rank was, so that somebody can compare it with the others, and what to do."""
    monkeypatch.setattr(console.here, "step", 7)
    for reason in ("Application timeout caused pair closure", "Timed out waiting 5000ms for recv operation to complete"):
        said = program.where_this_rank_was(reason)
        assert said.startswith("this rank was at the boundary of step 7; compare with the other ranks")
        assert "world.timeout_seconds" in said
    assert program.where_this_rank_was("Connection closed by peer") == "this rank was at the boundary of step 7"
    monkeypatch.setattr(console.here, "step", None)
    assert "before its first step boundary" in program.where_this_rank_was("Connection closed by peer")


def test_what_counts_as_a_lost_peer():
    """torch's own errors of communication, and gloo's, which have no class."""
    assert has_lost_a_peer(torch.distributed.DistNetworkError("connection reset"))
    assert has_lost_a_peer(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not has_lost_a_peer(RuntimeError("shapes cannot be multiplied"))
    assert not has_lost_a_peer(ValueError("gloo/transport"))


if __name__ == "__main__":
    play([objects, floats, tensors, pieces, wrapping, agreeing, letting_go], Path(sys.argv[1]))
