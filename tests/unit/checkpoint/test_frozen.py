"""Frozen parameters lie where an earlier save has them: what is written, what is read, what stays, and what is refused."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import TensorDataset

from harness import Loader, Run, StopRequest
from harness.checkpoint import commit, frozen, load
from harness.checkpoint.boxes import Box
from harness.checkpoint.catalog import Catalog, Entry, verify_all
from harness.checkpoint.format import MANIFEST, Ancestor, Attempt, FileInfo, Manifest
from harness.checkpoint.retention import Pruner, Retention
from harness.checkpoint.saver import Saver, SaveRequest
from harness.cli import cli
from harness.data.seeding import seed_everything
from harness.distributed.world import SoloWorld
from harness.errors import Corrupt, NoCheckpoint, StoreError
from harness.interchange import export_model
from harness.storage.store import open_store
from tests.support import faults
from tests.support.cluster import newest
from tests.support.faults import Contents, ShardedPair
from tests.support.saving import saver
from tests.support.states import bits

LIMIT = 1 << 12  # of a shard: one tensor


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A little is worth it, too."""
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1000)


def parts(step: int, **changes: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Two frozen tensors and a trained one, with a moment."""
    model = {"base": torch.arange(1000.0).view(10, 100), "embedding": torch.ones(300, dtype=torch.int64)}
    trained = torch.full((20,), float(step))
    return {"model": {**model, **changes, "trained": trained}, "optimizer": {"moment": trained / 2}, "other": {"step": step}}


def save(writer: Saver, step: int, how: str = "sync", **changes: torch.Tensor) -> Manifest:
    """Saves; everything of the model that is not trained is said to be frozen."""
    state = parts(step, **changes)
    places = {tensor.data_ptr() for name, tensor in state["model"].items() if name != "trained"}
    request = SaveRequest(step, is_frozen=lambda tensor: tensor.data_ptr() in places)
    if how == "sync":
        saved = writer.save(state, request, must_succeed=True)
    else:
        writer.begin(state, request)
        writer.fence()
        saved = writer.wait()
    manifest = writer.catalog.open(saved.directory)
    assert saved.bytes == manifest.bytes - manifest.shared_bytes
    assert bits(load.read(writer.catalog.store, saved.directory, manifest)) == bits(state)
    return manifest


def places(manifest: Manifest) -> dict[str, int]:
    """The steps whose directories have the frozen files of a checkpoint, by their names; 0 for its own."""
    found = {file.path("").rpartition("/")[2]: file.base for file in manifest.files if "-frozen" in file.name}
    return {name: int(base.split("-")[1]) if base else 0 for name, base in found.items()}


def here(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- two ranks, each with its boxes ----------------------------------------------------------------------------------


def pair(contents: Contents, **options: Any) -> ShardedPair:
    """A start of a run of two ranks. One frozen parameter changes at step 25, 50 and so on."""
    stores = [open_store("bucket://run", {"contents": contents}, tries=1) for _ in range(2)]
    return ShardedPair(*stores, keep_last=None, shard_bytes=1 << 20, **options)


def boxes_of(contents: Contents) -> list[set[tuple[int, int]]]:
    """The ranks, and the steps whose directories have their frozen boxes, of each whole checkpoint, the last first."""
    entries = verify_all(Catalog(open_store("bucket://run", {"contents": contents})), deep=True)
    return [
        {
            (int(file.name.partition("-frozen-rank")[2][0]), int((file.base or entry.directory).split("-")[1]))
            for file in entry.manifest.files
            if "-frozen-rank" in file.name
        }
        for entry in entries
        if entry.state == "whole"
    ]


@pytest.fixture
def changing(monkeypatch):
    monkeypatch.setattr(faults, "FROZEN_STEPS", 25)
    monkeypatch.setattr(frozen, "LEAST_BYTES", 1)
    monkeypatch.setattr(frozen, "LEAST_PART", 0.0)


def test_boxes_that_do_not_change_are_written_once(changing):
    """By each rank its own, also in the next start of the run; what has moved all the same is no longer among them."""
    contents = Contents()
    first = pair(contents)
    for step in (10, 20):
        first.save(step)
    second = pair(contents)
    assert second.restored.exact
    for step in (21, 30, 40, 41):
        second.save(step)
    # At 30 a file is written anew, since one of the two in it has moved; from 40 on the other one has files of its own.
    ten, thirty, forty = {(0, 10), (1, 10)}, {(0, 30), (1, 30)}, {(0, 40), (1, 40)}
    assert boxes_of(contents) == [forty, forty, thirty, ten, ten, ten]
    assert pair(contents).restored.exact


def test_a_rank_refers_to_nothing_of_a_save_that_failed(changing):
    """The first writer says what is committed. The others have written a share of a save that was not."""
    contents = Contents()
    pair(contents).save(10)
    two = pair(contents, failures_allowed=9)

    def fail(what: str, perform: Callable[[], Any]) -> None:
        if what.startswith("PUT") and what.endswith(MANIFEST):
            raise OSError(errno.ENOSPC, "full")
        perform()

    contents.request = fail
    assert two.save(26, must_succeed=False) is None
    contents.request = lambda _what, perform: perform()
    for step in (27, 28):
        two.save(step)
    assert boxes_of(contents) == [{(0, 27), (1, 27)}] * 2 + [{(0, 10), (1, 10)}]


# --- a run -----------------------------------------------------------------------------------------------------------


class Lora(nn.Module):
    """A frozen matrix, and a sum of one of low rank that is trained."""

    def __init__(self, side: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(side, side, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(side, rank, bias=False), nn.Linear(rank, side, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def fine_tune(url: Path, steps: int, *, side: int = 64, until: int = 1000, every_steps: int = 1, **checkpoint: Any) -> int:
    """Trains, saves at each step or at fewer, and returns how many bytes are changed by a step."""
    seed_everything(1)
    model = Lora(side, 1 + side // 200)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loader = Loader(TensorDataset(torch.randn(2 * steps, side)), 2, seed=1)
    state = {"model": model, "optimizer": optimizer, "loader": loader}
    config = {"log": {"every_steps": None}, "checkpoint": checkpoint}
    run = Run(url, state, every_steps=every_steps, keep_last=2, stop=StopRequest(), config=config)
    for _ in run.epochs(1):
        for (x,) in loader:
            if run.global_step == until:
                run.close()
                return 0
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
    return 3 * sum(each.nbytes for each in model.parameters() if each.requires_grad)


def saves_of(url: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for path in sorted((url / "metrics").iterdir()) for line in path.read_text().splitlines()]
    return [line for line in lines if line["event"] == "save"]


def test_what_a_fine_tuning_saves(tmp_path, monkeypatch):
    """64 MiB that are frozen and 1 % that are trained, as the defaults have it: after the first save, at most 1.05 times the
    bytes that have changed are written; the digests are those of a run that writes everything."""
    monkeypatch.undo()
    changed_bytes = fine_tune(tmp_path / "run", 10, side=4096)
    first, *others = (line["bytes"] for line in saves_of(tmp_path / "run"))
    assert first > 64 << 20
    assert len(others) == 9
    assert max(others) <= 1.05 * changed_bytes
    fine_tune(tmp_path / "plain", 10, side=4096, every_steps=10, incremental=False)
    assert min(line["bytes"] for line in saves_of(tmp_path / "plain")) > 64 << 20
    found, expected = newest(tmp_path / "run"), newest(tmp_path / "plain")
    assert found["step"] == expected["step"] == 10
    assert bits(found["parts"]["model"]) == bits(expected["parts"]["model"])
    digests = [
        {name: part.digest for name, part in Catalog(open_store(str(tmp_path / name))).newest().manifest.parts.items()}
        for name in ("run", "plain")
    ]
    assert {*digests[0]} == {"model", "optimizer", "loader", "training", "random"} and digests[0] == digests[1]


def test_a_run_that_goes_on_writes_nothing_again(tmp_path):
    """Another start of the run refers to what the one before has written, and has the bits of the run that never stopped."""
    fine_tune(tmp_path / "run", 6, until=3)
    fine_tune(tmp_path / "run", 6)
    manifests = [entry.manifest for entry in Catalog(open_store(str(tmp_path / "run"))).entries() if entry.manifest]
    assert [places(manifest) for manifest in manifests] == [{"model-frozen-00001-of-00002.safetensors": 1}] * 2
    fine_tune(tmp_path / "straight", 6)
    found, expected = newest(tmp_path / "run"), newest(tmp_path / "straight")
    assert bits(found["parts"]) == bits(expected["parts"])


@pytest.mark.parametrize("changes", [{"incremental": False}, {"side": 8}], ids=str)
def test_a_checkpoint_that_refers_to_nothing_is_what_it_was(tmp_path, changes):
    """Where it is switched off, or not worth it: one file of the model, under the name of ever, and version 1."""
    fine_tune(tmp_path, 2, **changes)
    entry = Catalog(open_store(str(tmp_path))).newest()
    assert {"model.safetensors", "optimizer.safetensors"} < {*here(tmp_path / entry.directory)}
    assert json.loads((tmp_path / entry.directory / MANIFEST).read_text())["version"] == 1


def test_an_average_of_weights_is_not_taken_for_frozen(tmp_path):
    """No optimizer trains it, but it moves: it lies under the name of ever from the first save on."""
    seed_everything(1)
    model = nn.Linear(40, 40)
    average = nn.Linear(40, 40).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = {"model": model, "average": average, "optimizer": optimizer}
    run = Run(tmp_path, state, every_steps=1, stop=StopRequest(), config={"log": {"every_steps": None}})
    for _ in run.steps(3):
        model(torch.ones(1, 40)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for mean, each in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(each, 0.1)
        run.step()
    saved = sorted(tmp_path.glob("step-*"))
    assert len(saved) == 3 and all("average.safetensors" in here(path) for path in saved)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "async", "no room"])
def test_every_way_to_save(tmp_path, how):
    """At the boundary, beside the training, and without a copy: what has not changed is named where it is."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT, memory_limit_bytes=100 if how == "no room" else None)
    first, second, third = (save(writer, step, "sync" if how == "sync" else "async") for step in (10, 20, 30))
    names = ["model-frozen-00001-of-00003.safetensors", "model-frozen-00002-of-00003.safetensors"]
    assert places(first) == dict.fromkeys(names, 0)
    assert places(second) == places(third) == dict.fromkeys(names, 10), "and no reference leads to another one"
    versions = [json.loads(path.read_text())["version"] for path in sorted(tmp_path.glob(f"step-*/{MANIFEST}"))]
    assert versions == [1, 2, 2], "an earlier harness refuses what it would misread"
    assert second.bases == third.bases and len(second.bases) == 1
    assert not any(name.startswith("model-frozen") for path in tmp_path.glob("step-*[23]0-0*") for name in here(path))


def test_what_moves_is_written(tmp_path):
    """What is said to be frozen and has changed is written, and from then on among what changes."""
    writer = saver(str(tmp_path), shard_bytes=1 << 20)
    save(writer, 10)
    moved = save(writer, 20, embedding=torch.zeros(300, dtype=torch.int64))
    assert places(moved) == {"model-frozen-00001-of-00002.safetensors": 0}
    apart = save(writer, 30, embedding=torch.zeros(300, dtype=torch.int64))
    assert places(apart) == {"model-frozen-00001-of-00002.safetensors": 0}, "without the one that has moved"
    assert places(save(writer, 40)) == {"model-frozen-00001-of-00002.safetensors": 30}


def test_a_tensor_in_pieces(tmp_path, monkeypatch):
    """One that is larger than a shard lies in several files, all of an earlier save."""
    monkeypatch.setattr("harness.checkpoint.format.BLOCK_BYTES", 512)
    writer = saver(str(tmp_path), shard_bytes=1024)
    save(writer, 10)
    second = save(writer, 20)
    assert {*places(second).values()} == {10} and len(places(second)) > 5
    assert {"base", "embedding"} == {*second.parts["model"].slices}


def test_a_file_that_is_not_there_is_written(tmp_path):
    """Somebody has deleted the base of what would be written now, or has cut it."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT)
    save(writer, 10)
    one, other = sorted(tmp_path.glob("step-*/model-frozen-*"))
    one.unlink()
    os.truncate(other, 100)
    assert {*places(save(writer, 20)).values()} == {0}


def test_a_file_that_goes_in_the_meantime_fails_the_save(tmp_path, monkeypatch):
    """Between the look at it and the commit: nothing is committed that has lost a file."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT)
    save(writer, 10)
    write_share = commit.write_share

    def and_it_goes(*arguments: Any) -> Any:
        receipt = write_share(*arguments)
        next(tmp_path.glob("step-*/model-frozen-*")).unlink()
        return receipt

    monkeypatch.setattr(commit, "write_share", and_it_goes)
    with pytest.raises(StoreError, match=r"step-000000000010-.*/model-frozen-.*: sent \d+ bytes, the store has no such"):
        save(writer, 20)
    assert len([*tmp_path.glob(f"step-*/{MANIFEST}")]) == 1
    monkeypatch.setattr(commit, "write_share", write_share)
    assert {*places(save(writer, 30)).values()} == {0, 10}, "and the next one writes what has gone"


def test_only_what_the_run_stands_on_is_referred_to(tmp_path):
    """A line that was left is not: it goes when the run has passed it."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT)
    save(writer, 10)
    stranger = saver(str(tmp_path), shard_bytes=LIMIT, attempt=Attempt("000002-00000000"))
    assert not save(stranger, 20).bases
    successor = saver(
        str(tmp_path), shard_bytes=LIMIT, attempt=Attempt("000003-00000000"), lineage=[Ancestor("000001-00000000", 10)]
    )
    assert {*places(save(successor, 30)).values()} == {10}


# --- what is read ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rows:
    """Some rows of a tensor."""

    box: Box

    def holding(self, local: torch.Tensor) -> torch.Tensor:
        return local


def rows(_part: str, info: Any) -> Rows | None:
    return Rows(Box((2, 0), (3, 100))) if info.path == "base" else None


@pytest.mark.parametrize("kind", ["a disk", "a bucket"])
@pytest.mark.parametrize("peers", [None, SoloWorld(torch.device("cpu"))], ids=["each", "shared"])
def test_every_way_to_read(tmp_path, kind, peers):
    """Whole, some parts, in ranges, together with others, and a part of a tensor."""
    store = open_store(str(tmp_path)) if kind == "a disk" else open_store("bucket://run", {"contents": Contents()})
    writer = dataclasses.replace(saver(str(tmp_path), shard_bytes=LIMIT), catalog=Catalog(store))
    save(writer, 10)
    manifest = save(writer, 20)
    entry = Catalog(store).newest()
    assert entry.manifest == manifest and manifest.bases
    assert bits(load.read(store, entry.directory, manifest, peers=peers)) == bits(parts(20))
    assert bits(load.read(store, entry.directory, manifest, ["model"], peers=peers)) == bits({"model": parts(20)["model"]})
    found = load.read(store, entry.directory, manifest, ["model"], peers=peers, land=rows)["model"]
    assert torch.equal(found["base"], parts(20)["model"]["base"][2:5])
    assert torch.equal(found["trained"], parts(20)["model"]["trained"])
    assert [each.state for each in verify_all(Catalog(store), deep=True)] == ["whole", "whole"]


def test_what_other_programs_read(tmp_path):
    """Hugging Face's index names the files from where it lies; an exported model is complete."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT)
    save(writer, 10)
    save(writer, 20)
    entry = writer.catalog.newest()
    place = tmp_path / entry.directory
    index = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: safetensors.torch.load_file(place / file)[name] for name, file in index.items()}
    assert bits(found) == bits({name: parts(20)["model"][name] for name in found}) and len(found) == 3
    export_model(writer.catalog.store, entry.directory, entry.manifest, str(tmp_path / "model.safetensors"))
    assert bits(safetensors.torch.load_file(tmp_path / "model.safetensors")) == bits(found)


# --- what stays ------------------------------------------------------------------------------------------------------


def test_the_files_of_later_checkpoints_stay_and_go_with_the_last_of_them(tmp_path):
    """A directory of which only these are left is a base. When the frozen parameters change, it goes."""
    writer = saver(str(tmp_path), retention=Retention(keep_last=2), shard_bytes=LIMIT)
    for step in (10, 20, 30, 40):
        save(writer, step)
    entries = Catalog(open_store(str(tmp_path))).entries()
    assert [(entry.step, entry.state) for entry in entries] == [(40, "whole"), (30, "whole"), (10, "base")]
    base = tmp_path / entries[-1].directory
    assert here(base) == ["model-frozen-00001-of-00003.safetensors", "model-frozen-00002-of-00003.safetensors"]
    save(writer, 50, base=torch.zeros(10, 100))
    save(writer, 60, base=torch.zeros(10, 100))
    assert here(base) == ["model-frozen-00001-of-00003.safetensors"], "the other one is nobody's any longer"
    later = saver(str(tmp_path), retention=Retention(keep_last=1), shard_bytes=1 << 20)
    save(later, 70)
    assert [entry.step for entry in Catalog(open_store(str(tmp_path))).entries()] == [70]


def test_checkpoints_that_are_kept_for_ever_keep_their_files(tmp_path):
    """Also where they are kept by their names, and nobody has looked into them in this attempt."""
    writer = saver(str(tmp_path), retention=Retention(keep_last=1, keep_every_steps=100), shard_bytes=LIMIT)
    for step in (90, 100):
        save(writer, step)
    later = saver(str(tmp_path), retention=Retention(keep_last=1, keep_every_steps=100), shard_bytes=1 << 20)
    for step in (110, 120, 130):
        save(later, step, base=torch.zeros(10, 100))
    entries = Catalog(open_store(str(tmp_path))).entries()
    assert {entry.step: entry.state for entry in entries if entry.step < 110} == {100: "whole", 90: "base"}
    assert [entry.state for entry in verify_all(Catalog(open_store(str(tmp_path))), deep=True)][-1] == "whole"


def test_the_files_of_a_manifest_that_cannot_be_read_stay(tmp_path):
    """It may be repaired. What it names nobody knows, so all stays that it may name."""
    writer = saver(str(tmp_path), shard_bytes=LIMIT)
    for step in (10, 20):
        save(writer, step)
    broken = tmp_path / writer.catalog.newest().directory / MANIFEST
    text = broken.read_bytes()
    broken.write_bytes(text[:-9])
    save(saver(str(tmp_path), shard_bytes=1 << 20), 15, base=torch.zeros(10, 100))
    Pruner(Catalog(open_store(str(tmp_path)))).prune(Retention(1))
    broken.write_bytes(text)
    entries = {entry.step: entry.state for entry in Catalog(open_store(str(tmp_path))).entries()}
    assert entries[20] == "whole"


@pytest.mark.parametrize("kind", ["a disk", "a bucket"])
def test_a_prune_from_outside(tmp_path, kind):
    """It deletes what nobody needs, tells of it, and has nothing to do the second time."""
    store = open_store(str(tmp_path)) if kind == "a disk" else open_store("bucket://run", {"contents": Contents()})
    writer = dataclasses.replace(saver(str(tmp_path), shard_bytes=LIMIT), catalog=Catalog(store))
    for step in (10, 20, 30, 40):
        save(writer, step)
    pruner = Pruner(Catalog(store))
    assert [entry.step for entry in pruner.prune(Retention(1), dry_run=True)] == [30, 20, 10]
    assert len(Catalog(store).entries()) == 4
    assert [entry.step for entry in pruner.prune(Retention(1))] == [30, 20, 10]
    assert [(entry.step, entry.state) for entry in Catalog(store).entries()] == [(40, "whole"), (10, "base")]
    assert pruner.prune(Retention(1)) == []
    assert [entry.state for entry in verify_all(Catalog(store), deep=True)] == ["whole"]


def test_a_base_behind_a_link_stays(tmp_path):
    """Somebody has moved an old checkpoint to another disk, and has left a link."""
    writer = saver(str(tmp_path / "run"), shard_bytes=LIMIT, retention=Retention(keep_last=1))
    save(writer, 10)
    (first,) = (tmp_path / "run").glob("step-*")
    shutil.move(first, tmp_path / "moved")
    first.symlink_to(tmp_path / "moved")
    save(writer, 20)
    assert first.is_symlink()
    Pruner(Catalog(open_store(str(tmp_path / "run")))).prune(Retention(1))
    assert first.is_symlink() and len(here(tmp_path / "moved")) > 3
    save(writer, 30, base=torch.zeros(10, 100), embedding=torch.zeros(300, dtype=torch.int64))
    assert not first.is_symlink() and len(here(tmp_path / "moved")) > 3


def test_who_reads_meanwhile_never_lacks_a_file(tmp_path):
    """While a run saves, refers and deletes, every reader gets a whole checkpoint, and none is called corrupt."""
    is_over = threading.Event()

    def run() -> None:
        lineage: list[Ancestor] = []
        try:
            for number in range(1, 9):  # a start of the run each, whose frozen parameters are others
                attempt = Attempt(f"{number:06}-00000000")
                writer = saver(str(tmp_path), attempt=attempt, lineage=lineage, retention=Retention(1), shard_bytes=LIMIT)
                for step in range(10 * number, 10 * number + 4):
                    save(writer, step, base=torch.full((10, 100), float(number // 2)))
                lineage = [*lineage, Ancestor(attempt.id, 10 * number + 3)]
        finally:
            is_over.set()

    def read(entry: Entry) -> int:
        found = load.read(store, entry.directory, entry.manifest)
        expected = parts(entry.step, base=torch.full((10, 100), float(entry.step // 10 // 2)))
        assert bits(found) == bits(expected)
        return entry.step

    store = open_store(str(tmp_path))
    thread = threading.Thread(target=run)
    thread.start()
    steps = set()
    while not is_over.is_set():
        with contextlib.suppress(NoCheckpoint):
            steps.add(Catalog(store).reading(read))
        assert not [entry for entry in Catalog(store).entries() if entry.state == "corrupt"]
    thread.join()
    assert Catalog(store).reading(read) == 83
    assert len(steps) > 1


# --- what is refused -------------------------------------------------------------------------------------------------


def two(url: Path) -> tuple[Path, Path]:
    """A run of two checkpoints: the directory of the first one, and of the second one, which refers to it."""
    writer = saver(str(url), shard_bytes=LIMIT)
    save(writer, 10)
    save(writer, 20)
    first, second = sorted(url.glob("step-*"))
    return first, second


def test_a_directory_without_its_base_is_refused_by_name(tmp_path):
    """A checkpoint that was copied away alone says which directory it lacks, wherever it is looked at."""
    first, second = two(tmp_path / "run")
    shutil.copytree(second, tmp_path / "copy" / second.name)
    store = open_store(str(tmp_path / "copy"))
    (entry,) = Catalog(store).entries()
    what = f"expected \\d+ bytes in the directory of an earlier save, {first.name}, it is missing"
    assert entry.state == "corrupt" and re.search(what, entry.problem)
    with pytest.raises(Corrupt, match=f"{first.name}/model-frozen-00001-of-00003.safetensors: missing"):
        load.read(store, second.name, Catalog(store).open(second.name))
    done = CliRunner().invoke(cli, ["verify", str(tmp_path / "copy")])
    assert first.name in done.output
    shutil.copytree(first, tmp_path / "copy" / first.name)
    assert Catalog(store).newest().directory == second.name


def test_damage_is_that_of_every_checkpoint_that_has_the_file(tmp_path):
    """A flipped bit in a base is found in each of them, and restored from none."""
    first, second = two(tmp_path)
    file = first / "model-frozen-00001-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    entries = verify_all(Catalog(open_store(str(tmp_path))), deep=True)
    assert [entry.state for entry in entries] == ["corrupt", "corrupt"]
    assert all(f"{first.name}/{file.name}: expected" in entry.problem for entry in entries)
    store = open_store(str(tmp_path))
    with pytest.raises(Corrupt, match=f"{first.name}/{file.name}"):
        load.read(store, second.name, Catalog(store).open(second.name))


@pytest.mark.parametrize(
    "name",
    [
        "../step-000000000010-000001-00000000-00000000/model.safetensors",
        "../step-000000000010-000001-00000000-00000000/manifest.json",
        "../step-000000000010-000001-00000000-00000000/../model-frozen.safetensors",
        "../../step-000000000010-000001-00000000-00000000/model-frozen.safetensors",
        "../elsewhere/model-frozen.safetensors",
        "../model-frozen.safetensors",
        "/model-frozen.safetensors",
        "step-000000000010-000001-00000000-00000000/model-frozen.safetensors",
    ],
)
def test_no_name_leads_elsewhere(name):
    """A manifest can name frozen files of other saves, and no other file of this machine."""
    with pytest.raises(Corrupt, match=r"manifest\.json: .*(no file that a checkpoint may have|is not a name of a file)"):
        FileInfo(name, 1, "xxh3_128:0").check()


def test_a_file_of_a_later_save_is_refused(tmp_path):
    """What goes is deleted the latest first: no checkpoint can stand on a later one, or on itself."""
    _, second = two(tmp_path)
    manifest = Catalog(open_store(str(tmp_path))).open(second.name)
    for base in (second.name, second.name.replace("step-000000000020", "step-000000000021")):
        files = [dataclasses.replace(file, name=file.name.replace(file.base or "-", base)) for file in manifest.files]
        names = {old.name: new.name for old, new in zip(manifest.files, files, strict=True) if old.base}
        changed = [new if old.base else old for old, new in zip(manifest.files, files, strict=True)]
        model = manifest.parts["model"]
        model = dataclasses.replace(model, files=[names.get(file, file) for file in model.files])
        forged = dataclasses.replace(manifest, files=changed, parts={**manifest.parts, "model": model})
        (second / MANIFEST).write_bytes(forged.encode())
        with pytest.raises(Corrupt, match="expected files of earlier saves, found one of step-00000000002"):
            Catalog(open_store(str(tmp_path))).open(second.name)


def test_a_manifest_of_version_1_refers_to_nothing(tmp_path):
    """An earlier harness would look for the file in the wrong place."""
    _, second = two(tmp_path)
    manifest = Catalog(open_store(str(tmp_path))).open(second.name)
    assert b'"version": 2' in manifest.encode()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Corrupt, match="version 1 has no files in other directories"):
        patch.setattr("harness.checkpoint.format.VERSION_OF_REFERENCES", 1)
        Manifest.decode(manifest.encode())


# --- what is shown ---------------------------------------------------------------------------------------------------


def test_what_ls_shows(tmp_path):
    """How much each checkpoint has itself and with others, and what a directory is of which only these files are left."""
    attempt = Catalog(open_store(str(tmp_path))).attempts.claim({})
    writer = saver(str(tmp_path), retention=Retention(keep_last=1), shard_bytes=1 << 20, attempt=attempt)
    big = torch.zeros(1000, 100)
    for step in (10, 20):
        save(writer, step, base=big)
    lines = CliRunner().invoke(cli, ["ls", str(tmp_path)]).output.splitlines()
    assert re.match(r"whole +step 20 .* 0\.0 MB \+ 0\.4 MB shared ", lines[0])
    assert re.match(r"base +step 10 +0\.4 MB of later checkpoints +step-000000000010-", lines[1])
    whole, base = json.loads(CliRunner().invoke(cli, ["ls", "--json", str(tmp_path)]).output)
    assert whole["bytes"] > whole["shared_bytes"] > big.nbytes and base["state"] == "base"
    done = CliRunner().invoke(cli, ["prune", "--keep-last", "1", str(tmp_path)])
    assert (done.exit_code, done.output) == (0, "")
    found = json.loads(CliRunner().invoke(cli, ["inspect", "--json", str(tmp_path)]).output)
    assert found["files"][0]["name"].startswith(f"../{base['directory']}/model-frozen-")
