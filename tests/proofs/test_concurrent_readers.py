"""Who reads a run beside the one that trains it, and deletes: every reader gets a whole checkpoint, always. And a run of
many checkpoints: what a start, a save and a look cost."""

import itertools
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import harness
from harness.checkpoint.catalog import Catalog, further
from harness.checkpoint.format import MANIFEST, new_directory
from harness.checkpoint.retention import Pruner, Retention
from harness.cli import cli
from harness.storage.store import Store, open_store
from harness.telemetry.crashes import is_looping
from tests.support.faults import Life, resume_from
from tests.support.store_contract import RawS3

# --- beside a run that deletes ---------------------------------------------------------------------------------------

WRITER = """
import sys
import torch
import harness
from torch import nn
model = nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
run = harness.Run(sys.argv[1], {"model": model, "optimizer": optimizer}, every_steps=1, keep_last=1)
for step in run.steps(10**9):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run.step()
"""


@pytest.fixture(params=["disk", "s3"])
def training(request, tmp_path, monkeypatch):
    """The URL of a run that another process trains, saving and deleting at each step."""
    url = str(tmp_path / "run")
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        url = server.url(tmp_path.name)
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=output, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 300
            while harness.latest(url) is None:
                assert process.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()
                time.sleep(0.1)
            yield url
            assert process.poll() is None, (tmp_path / "output").read_text()
        finally:
            process.kill()
            process.wait()


class Reader:
    """Reads in every way, and judges what it is given."""

    def __init__(self, url: str, out: Path) -> None:
        self.url, self.out = url, str(out / "out.safetensors")
        self.step = 0

    def judge(self, step: int | None) -> None:
        assert step is not None and step >= self.step, f"read step {step} after step {self.step}"
        self.step = step

    def latest(self) -> None:
        self.judge(harness.latest(self.url))

    def load(self) -> None:
        assert harness.load(self.url)["model"]["weight"].shape == (2, 2)

    def verb(self, *arguments: str) -> dict | list:
        done = CliRunner().invoke(cli, [arguments[0], self.url, *arguments[1:], "--json"])
        assert done.exit_code == 0, (arguments, done.exception)
        return json.loads(done.output)

    def ls(self) -> None:
        found = self.verb("ls")
        assert {entry["state"] for entry in found} <= {"whole", "unfinished"}, found
        self.judge(max(entry["step"] for entry in found if entry["state"] == "whole"))

    def verify(self) -> None:
        assert {entry["state"] for entry in self.verb("verify", "--deep")} == {"whole"}

    def inspect(self) -> None:
        self.judge(self.verb("inspect")["step"])

    def export(self) -> None:
        self.judge(self.verb("export", self.out, "--overwrite")["step"])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reads", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_readers_beside_a_run_that_deletes(training, tmp_path, reads):
    """Whatever reads beside a run that keeps one checkpoint and saves at each step gets a whole one, and never an older one
    than it had. There is always one."""
    reader = Reader(training, tmp_path)
    began = reader.step
    ways = [reader.latest, reader.load, reader.ls, reader.verify, reader.inspect, reader.export, reader.latest, reader.load]
    enough = reads if training.startswith("/") else reads // 10
    for number, read in enumerate(itertools.cycle(ways)):
        if number >= enough and reader.step > began + 10:  # the run went on meanwhile
            break
        read()


# --- a run of many checkpoints ---------------------------------------------------------------------------------------


def many(store: Store, count: int, put) -> None:
    """Has a run save the steps from 1 to ``count``: one save is real, the others have its files under their own names."""
    life = Life(store, keep_last=None, shard_bytes=1 << 20)
    first = life.save(1).directory
    manifest = Catalog(store).open(first)
    files = [(file.name, store.get(f"{first}/{file.name}", 1 << 20)) for file in manifest.files]

    def copy(step: int) -> None:
        directory = new_directory(step, life.attempt)
        for name, data in [*files, (MANIFEST, replace(manifest, step=step).encode())]:
            put(f"{directory}/{name}", data)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(copy, range(2, count + 1)))


class Requests:
    """Counts what a store asks of an S3 server."""

    def __init__(self, store: Store) -> None:
        self.made: list[tuple[str, str]] = []
        store.filesystem.fs.connect()
        store.filesystem.fs.s3.meta.events.register("request-created.s3", self._note)

    def _note(self, request, operation_name, **_) -> None:
        self.made.append((operation_name, request.url))

    def lists(self) -> int:
        """The number of requests since the last call that list."""
        count = sum(name.startswith("List") for name, _ in self.made)
        self.made.clear()
        return count

    def take(self) -> tuple[int, int]:
        """The number of requests since the last call, and of the manifests that were read with them."""
        manifests = sum(name == "GetObject" and MANIFEST in url for name, url in self.made)
        count = len(self.made)
        self.made.clear()
        return count, manifests


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_what_a_run_of_many_checkpoints_asks_of_s3(s3, tmp_path, count, capsys):
    """A start reads one manifest, however many there are; a save that deletes nothing lists no saves; each look at what is
    the newest is a few requests."""
    url = s3.url(tmp_path.name)
    many(open_store(url, s3.storage_options), count, RawS3(s3, RawS3.connect(s3), tmp_path.name).write)
    store = open_store(url, {**s3.storage_options, "skip_instance_cache": True})
    requests, pages = Requests(store), -(-count // 1000)
    began = time.monotonic()
    attempt = Catalog(store).attempts.claim({})
    assert requests.take()[0] <= 2 + pages
    _, restored = resume_from(store)
    resumed_seconds = time.monotonic() - began
    made, manifests = requests.take()
    assert restored.step == count
    assert manifests == 1, "of the newest checkpoint"
    assert made <= 2 * pages + 2 + 3 * len(restored.parts)
    assert Catalog(store).newest().step == count
    assert requests.take() == (pages + 2, 1)
    Pruner(Catalog(store)).tidy(Retention(), None, attempt)
    assert requests.take() == (1, 0), "the attempts alone"
    life = Life(store, keep_last=None, shard_bytes=1 << 20)
    requests.take()
    life.save(count + 1)
    first, _ = requests.take()
    life.save(count + 2)
    again, _ = requests.take()
    assert again <= first - pages <= 20, "the first one looks at what earlier attempts have left"
    began = time.monotonic()
    assert len(Catalog(store).entries()) == count + 2
    with capsys.disabled():
        listed_seconds = time.monotonic() - began
        print(
            f"\n    {count} on S3: start {resumed_seconds:.2f} s, ls {listed_seconds:.1f} s, {again} requests a save", end=""
        )


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_how_often_a_run_of_many_checkpoints_and_starts_is_listed_on_s3(s3, tmp_path, count, capsys):
    """A start and ``ls`` list the names once, 1,000 in a request, and the objects of a few saves. ``prune`` lists all
    objects once, since it has to name them, and deletes 1,000 in a request."""
    url = s3.url(tmp_path.name)
    raw = RawS3(s3, RawS3.connect(s3), tmp_path.name)
    many(open_store(url, s3.storage_options), count, raw.write)
    for number in range(2, count // 10):
        raw.write(f"attempts/{number:06}-{number:08x}.json", b"{}")
    store = open_store(url, {**s3.storage_options, "skip_instance_cache": True})
    requests, pages, objects = Requests(store), -(-count // 1000), len(store.list(beginning="step-"))

    catalog = Catalog(store)
    requests.made.clear()
    assert not is_looping(catalog, 3)
    catalog.attempts.claim({}, resumes=True)
    newest = next(catalog.candidates())
    assert (newest.step, further(catalog, newest)) == (count, [])
    started = requests.lists()
    assert started == pages + 2 <= 12, "the names, the attempts, the newest one's objects"

    found = Catalog(store).entries(50)
    assert [entry.step for entry in found] == [*range(count, count - 50, -1)]
    assert {entry.state for entry in found} == {"whole"}
    listed = requests.lists()
    assert listed <= pages + 2 <= 12

    gone = Pruner(Catalog(store)).prune(Retention(1))
    assert [entry.step for entry in gone] == [*range(count - 1, 0, -1)]
    deletions = sum("Delete" in name for name, _ in requests.made)
    pruned = requests.lists()
    assert pruned <= -(-objects // 1000) + 2, "all objects, the attempts"
    assert deletions <= 2 * -(-objects // 1000) + 2
    assert [entry.step for entry in Catalog(store).entries()] == [count]
    assert {name.partition("/")[0] for name in store.list(beginning="step-")} == {newest.directory}
    with capsys.disabled():
        print(
            f"\n    {count} on S3: list requests of a start {started}, ls {listed}, prune {pruned}; {deletions} deletions",
            end="",
        )


def watch_looks(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories whose objects are listed from now on."""
    found: list[str] = []
    plain = type(store).list

    def watched(self, prefix="", **how):
        found.append(prefix)
        return plain(self, prefix, **how)

    monkeypatch.setattr(type(store), "list", watched)
    return found


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_what_a_run_of_many_checkpoints_costs_on_a_disk(tmp_path, monkeypatch, count, capsys):
    """A start looks into one directory, a save into none; the first save that keeps a few deletes some of the others, and
    does not make the training wait for all; ``prune`` deletes the rest."""

    def put(name: str, data: bytes) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)

    store = open_store(str(tmp_path))
    many(store, count, put)
    looked_into: list[str] = []
    plain = type(store).list
    monkeypatch.setattr(
        type(store), "list", lambda self, name="", **how: looked_into.append(name) or plain(self, name, **how)
    )
    seconds = {}

    def timed(what: str, function):
        began = time.monotonic()
        result = function()
        seconds[what] = time.monotonic() - began
        return result

    life = timed("start", lambda: Life(store, keep_last=2, shard_bytes=1 << 20))
    assert life.restored.step == count
    assert len([name for name in looked_into if name.startswith("step-")]) == 1
    life.saver.retention = Retention()
    timed("save", lambda: life.save(count + 1))
    looked_into.clear()
    timed("save again", lambda: life.save(count + 2))
    assert {name.split("-")[1] for name in looked_into if name.startswith("step-")} == {f"{count + 2:012}"}, "its own"
    life.saver.retention = Retention(2)
    timed("save and delete", lambda: life.save(count + 3))
    left = len(store.names()) - 1
    assert 2 <= left <= count + 3 - 16
    monkeypatch.undo()
    assert len(timed("ls", Catalog(store).entries)) == left
    looked_into = watch_looks(store, monkeypatch)
    assert [entry.step for entry in Catalog(store).entries(2)] == [count + 3, count + 2]
    assert len(Pruner(Catalog(store)).prune(Retention(2), dry_run=True)) == left - 2
    assert {int(name.split("-")[1]) for name in looked_into if name != "attempts"} == {count + 3, count + 2}
    monkeypatch.undo()
    assert len(timed("prune", lambda: Pruner(Catalog(store)).prune(Retention(2)))) == left - 2
    with capsys.disabled():
        found = ", ".join(f"{what} {each:.2f} s" for what, each in seconds.items())
        print(f"\n    {count} on a disk: {found} ({left} left for ls and prune)", end="")


def test_most_checkpoints_of_a_run_may_be_milestones(tmp_path, monkeypatch):
    """Those that are kept for their step stay by their names: a save looks into none of them, whoever has written them."""
    store = open_store(str(tmp_path))
    looked_into = watch_looks(store, monkeypatch)
    for steps in (range(1, 8), range(8, 12)):
        life = Life(store, shard_bytes=1 << 20)
        life.saver.retention = Retention(keep_last=1, keep_every_steps=3)
        looked_into.clear()
        for step in steps:
            life.save(step)
        looked_into_steps = {int(name.split("-")[1]) for name in looked_into if name.startswith("step-")}
        kept = {entry.step for entry in Catalog(store).entries()}
        assert kept == {step for step in range(1, steps[-1]) if step % 3 == 0} | {steps[-1]}
    assert looked_into_steps == {7, *steps}, "the last one's, to delete it, and its own"
