"""Ranks that restore together: each byte is read once between them, and every rank verifies all of them.

On a real S3 server the bytes that it sends are counted. On a disk, what goes wrong on one rank (its storage, what it
reads, what reaches it, its life) becomes a matter of all.
"""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from harness import Task
from harness.checkpoint import commit, load, relay
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt
from harness.config import WorldConfig
from harness.distributed.world import World, has_lost_a_peer, join_world
from harness.storage.store import open_store
from harness.training import resume
from tests.support.cluster import environment, play, played, returned, train_here, wait_until
from tests.support.faults import Flaw, Flawed
from tests.support.process_memory import forget_the_peak, memory_bytes
from tests.support.proxy import Proxy
from tests.support.states import Training

MIB = 1 << 20
EXTRA_BYTES = 190_000_000  # of pieces that are on their way; another copy of the larger state would be too much
TIMEOUT_SECONDS = 3


# --- on a real S3 server ---------------------------------------------------------------------------------------------


def state_of(size_bytes: int, seed: int) -> Training:
    """A model with Adam's moments, of a size in all, after a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(256, 1024) for _ in range(size_bytes // (3 * MIB))))
    optimizer = torch.optim.AdamW(model.parameters())
    model[0](torch.ones(1, 256)).sum().backward()
    for layer in model[1:]:
        layer.weight.grad, layer.bias.grad = model[0].weight.grad, model[0].bias.grad
    optimizer.step()
    return Training(model, optimizer)


def restored_from_s3(world: World, place: Path) -> dict[str, Any]:
    """Restores in each way from the checkpoint that is there for it; the digests, and the memory beside the state."""
    found = {}
    for how, (url, options, size_bytes) in json.loads((place.parent / "s3.json").read_text()).items():
        catalog, state = Catalog(open_store(url, options)), state_of(size_bytes, seed=1 + world.rank)
        before = forget_the_peak()
        resumed = resume.resume(world, catalog, state, how=how)
        extra_bytes = memory_bytes("VmHWM") - before - size_bytes
        digests = {name: digest for name, digest in state.digests().items() if name in ("model", "optimizer")}
        found[how] = {"step": resumed.step, "digests": digests, "extra_bytes": extra_bytes}
    return found


class S3Runs:
    """For each way to restore a checkpoint in the bucket, behind a proxy of its own that counts what is served."""

    def __init__(self, s3: Any, directory: Path, sizes_bytes: dict[str, int]) -> None:
        self.proxies, self.manifests, settings = {}, {}, {}
        for how, size_bytes in sizes_bytes.items():
            name = f"{directory.name}-{how}"
            parts = {**state_of(size_bytes, seed=0).capture(), "random": {}}
            store = open_store(s3.url(name), s3.storage_options)
            _, self.manifests[how] = commit.write(store, parts, step=5, attempt=Attempt.after([]))
            self.proxies[how] = Proxy(s3.port)
            settings[how] = (s3.url(name), s3.at(self.proxies[how].port).storage_options, size_bytes)
        (directory / "s3.json").write_text(json.dumps(settings))

    def served(self, how: str) -> float:
        """What the server sent in all, in parts of the checkpoint."""
        return self.proxies[how].served_bytes / self.manifests[how].bytes

    def judge(self, results: list[dict[str, Any]]) -> None:
        """Every rank holds what was saved, and took no more memory for it than the state and a bound."""
        for found in returned(results):
            for how, manifest in self.manifests.items():
                saved = {name: manifest.parts[name].digest for name in ("model", "optimizer")}
                assert (found[how]["step"], found[how]["digests"]) == (5, saved)
                assert found[how]["extra_bytes"] < EXTRA_BYTES, how


# --- on a disk that fails for some -----------------------------------------------------------------------------------

TRAIN = {"steps": 6, "global_batch_size": 3}
CHECKPOINT = {"every_steps": 2, "shard_bytes": 4096}


def build() -> Task:
    model = nn.Sequential(nn.Linear(2, 1000), nn.Linear(1000, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return Task(model, TensorDataset(torch.randn(10, 2)), optimizer, lambda model, batch: model(batch[0]).square().mean())


class Listener(logging.Handler):
    """What a rank says about checkpoints that it does not resume from."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def resumed(world: World, place: Path, flaw: Flaw | None = None) -> dict[str, Any]:
    """Trains to step 6, then on from there with a flawed storage and in small pieces: from which step, and what was said."""
    train_here(build, world, url=place / "run", train=TRAIN, checkpoint=CHECKPOINT)
    Flawed.flaw = staticmethod(flaw or (lambda path, data: data))
    relay.ROUND_BYTES, relay.SMALLEST_PIECE_BYTES = 0, 1000
    listener = Listener()
    logging.getLogger("harness.training.resume").addHandler(listener)
    try:
        config = {"train": {**TRAIN, "steps": 8}, "checkpoint": CHECKPOINT, "log": {"jsonl": str(place / "log.jsonl")}}
        step = train_here(build, world, url=f"flawed://{place}/run", **config).step
    finally:
        logging.getLogger("harness.training.resume").removeHandler(listener)
    assert step == 8
    lines = world.broadcast((place / "log.jsonl").read_text().splitlines() if world.rank == 0 else None)
    (record,) = [record for record in map(json.loads, lines) if record["event"] == "resume"]
    return {"step": record["step"], "said": listener.lines}


def nothing_fails(world: World, place: Path):
    return resumed(world, place)


def one_cannot_read_its_share(world: World, place: Path):
    def refuse(path: str, data: bytes) -> bytes:
        if world.rank == 1 and "optimizer" in path:
            raise PermissionError(13, "Permission denied", path)
        return data

    return resumed(world, place, refuse)


def one_reads_other_bytes(world: World, place: Path):
    return resumed(world, place, lambda path, data: bytes(byte ^ 1 for byte in data) if world.rank == 1 else data)


def other_bytes_reach_one(world: World, place: Path):
    exchange, rounds = world.exchange, []

    def flip(own: torch.Tensor, found: list[torch.Tensor]) -> None:
        exchange(own, found)
        rounds.append(len(own))
        if world.rank == 2 and len(rounds) == 3:
            found[0][-1] ^= 1

    world.exchange = flip
    try:
        return resumed(world, place)
    finally:
        del world.exchange


def it_has_grown(world: World, place: Path):
    return resumed(world, place, lambda path, data: data + b"\0")


def it_was_cut(world: World, place: Path):
    return resumed(world, place, lambda path, data: data[:-1])


def it_is_gone(world: World, place: Path):
    def lose(path: str, data: bytes) -> bytes:
        raise FileNotFoundError(path)

    return resumed(world, place, lose)


ON_A_DISK = [
    nothing_fails,
    one_cannot_read_its_share,
    one_reads_other_bytes,
    other_bytes_reach_one,
    it_has_grown,
    it_was_cut,
    it_is_gone,
]


@pytest.fixture(scope="module")
def three(s3, tmp_path_factory):
    """What three ranks did, and the runs on S3 that they had."""
    directory = tmp_path_factory.mktemp("together")
    runs = S3Runs(s3, directory, {"auto": 12 * MIB, "each": 12 * MIB, "shared": 96 * MIB})
    return runs, played(__file__, directory, ranks=3)


@pytest.mark.torchrun
def test_three_ranks_hold_what_was_saved(three):
    """Three ranks share by themselves where the storage is remote; each holds the bits that were saved."""
    runs, found = three
    runs.judge(found["restored_from_s3"])
    assert runs.served("auto") < 1.02  # what is not the checkpoint weighs more beside a small one


@pytest.mark.torchrun
def test_three_ranks_read_each_byte_once(three, capsys):
    """Between them they take the checkpoint's bytes from the server, and one for one three times as many."""
    runs, found = three
    with capsys.disabled():
        extra_bytes = max(result["shared"]["extra_bytes"] for result in returned(found["restored_from_s3"]))
        times = f"{runs.served('shared'):.4f} times the checkpoint together, {runs.served('each'):.4f} one for one"
        print(f"\n    served: {times}; {extra_bytes / 1e6:.0f} MB beside the state", end="")
    assert 1 < runs.served("shared") < 1.01
    assert 3 < runs.served("each") < 3.03


@pytest.mark.torchrun
def test_a_restore_in_small_pieces(three):
    """Many rounds, files that begin and end within one, ranks that go empty-handed in the last."""
    assert returned(three[1]["nothing_fails"]) == [{"step": 6, "said": []}] * 3


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("scenario", "words", "ranks"),
    [
        ("one_cannot_read_its_share", "-of-00006.safetensors: Permission denied", [1]),
        ("one_reads_other_bytes", "safetensors: ", [0, 1, 2]),
        ("other_bytes_reach_one", ".safetensors: expected xxh3_128:", [2]),
        ("it_has_grown", " bytes, found more", None),
        ("it_was_cut", "expected ", None),
        ("it_is_gone", "missing; expected ", None),
    ],
)
def test_what_fails_on_one_rank_makes_all_fall_back(three, scenario, words, ranks):
    """To the checkpoint before, all of them, and all say the same: what is wrong, and on which ranks."""
    found = returned(three[1][scenario])
    assert [result["step"] for result in found] == [4, 4, 4]
    assert found[0]["said"] == found[1]["said"] == found[2]["said"]
    (line,) = found[0]["said"]
    assert line.startswith("NOT resuming from step-000000000006-") and words in line, line
    told = [rank for rank in range(3) if f"(rank {rank})" in line]
    assert told == ranks if ranks else told, line


# --- a rank that dies in the middle ----------------------------------------------------------------------------------


def die_in_the_middle(directory: Path, number: int) -> None:
    """A rank of three. The second gets a signal in the middle of a restore; the others say how long they waited then."""
    (directory / f"started-{os.environ['RANK']}").touch()  # with so short a time none may be late
    wait_until(lambda: len(list(directory.glob("started-*"))) == 3, "the other ranks to start")
    world = join_world(WorldConfig(timeout_seconds=TIMEOUT_SECONDS if number == signal.SIGSTOP else 60))
    exchange, rounds = world.exchange, []

    def noted(own: torch.Tensor, found: list[torch.Tensor]) -> None:
        rounds.append(time.monotonic())
        if len(rounds) == 5:
            (directory / f"reached-{world.rank}").touch()
            if world.rank == 1:
                os.kill(os.getpid(), number)
        exchange(own, found)

    world.exchange = noted
    relay.ROUND_BYTES, relay.SMALLEST_PIECE_BYTES = 0, 1000
    catalog = Catalog(open_store(str(directory / "run")))
    entry = catalog.newest()
    try:
        load.read(catalog.store, entry.directory, entry.manifest, peers=world)
    except RuntimeError as error:
        record = {"rank": world.rank, "seconds": time.monotonic() - rounds[-1], "lost": has_lost_a_peer(error)}
        (directory / f"rank-{world.rank}.json").write_text(json.dumps(record))
    os._exit(0)  # as the ranks of a run do whose peers are gone


@pytest.mark.torchrun
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_rank_that_dies_in_the_middle_holds_nobody_up(tmp_path, number):
    """The others learn of it at once where its connections end, else when ``world.timeout_seconds`` are over."""
    train_here(build, url=tmp_path / "run", train=TRAIN, checkpoint=CHECKPOINT)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        **environment(),
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    command = [sys.executable, __file__, str(tmp_path), str(int(number))]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(3)]
    try:
        for rank in (0, 2):
            wait_until(lambda rank=rank: ranks[rank].poll() is not None, f"the end of rank {rank}")
        for rank in (0, 2):
            record = json.loads((tmp_path / f"rank-{rank}.json").read_text())
            assert record["lost"]
            assert record["seconds"] < (3 if number == signal.SIGKILL else TIMEOUT_SECONDS + 2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        die_in_the_middle(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        play([restored_from_s3, *ON_A_DISK], Path(sys.argv[1]))
