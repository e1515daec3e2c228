"""Several ranks write one checkpoint: who writes what, tensors in pieces, receipts, and what becomes of a writer that fails.

test_crash_points.py enumerates the crashes of two writers.
"""

import errno
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from harness import Task
from harness.checkpoint import commit, load
from harness.checkpoint import format as layout
from harness.checkpoint.catalog import Catalog, verify_all
from harness.checkpoint.format import DTYPES, MANIFEST, Attempt, Receipt, TensorInfo, receipt_name
from harness.checkpoint.plan import SavePlan, TensorSlice, Writers, divide
from harness.checkpoint.retention import Pruner, Retention
from harness.checkpoint.saver import Saver, SaveRequest
from harness.checkpoint.tree import Encoded, flat_bytes
from harness.distributed.world import SoloWorld, World
from harness.errors import Corrupt, Mismatch, StoreError, Unsupported
from harness.interchange.export import export_model
from harness.interchange.files import Place, read_directory
from harness.storage.filesystem import LocalDisk
from harness.storage.store import Store, open_store
from tests.support.cluster import committed, launch, newest, play, played, records, returned, train_here
from tests.support.faults import Objects, silence
from tests.support.forged_manifests import sealed, unexpected_error
from tests.support.saving import held_up
from tests.support.states import bits

ATTEMPT = Attempt("000001-00000000")
BLOCK_BYTES = 256
PATIENCE_SECONDS = 20


def everything(tensor: torch.Tensor) -> bool:
    """All is the same on all ranks."""
    return True


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", BLOCK_BYTES)


# --- the plan --------------------------------------------------------------------------------------------------------


def adamw(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Encoded]:
    """A model and what AdamW keeps of it, without the bytes."""
    model = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    state = {}
    for name, shape in shapes.items():
        state |= {f"state/{name}/{kind}": torch.empty(shape, device="meta") for kind in ("exp_avg", "exp_avg_sq")}
        state[f"state/{name}/step"] = torch.empty((), device="meta")
    return {"model": Encoded({}, model), "optimizer": Encoded({}, state)}


def gpt(width: int, layers: int, vocabulary: int = 50257) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (1024, width)}
    for layer in range(layers):
        for name, shape in {"qkv": (3 * width, width), "out": (width, width), "up": (4 * width, width)}.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes |= {f"{layer}.down.weight": (width, 4 * width), f"{layer}.norm": (width,)}
    return shapes


def convnet() -> dict[str, tuple[int, ...]]:
    """Shapes as in a ResNet-50."""
    shapes: dict[str, tuple[int, ...]] = {"stem": (64, 3, 7, 7), "fc": (1000, 2048)}
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            name = f"{stage}.{block}"
            shapes |= {f"{name}.a": (width, 4 * width, 1, 1), f"{name}.b": (width, width, 3, 3)}
            shapes |= {f"{name}.c": (4 * width, width, 1, 1), f"{name}.norm": (4 * width,)}
    return shapes


REALISTIC = {
    "gpt2, 2 ranks": (adamw(gpt(768, 12)), 2),
    "gpt2, 3 ranks": (adamw(gpt(768, 12)), 3),
    "gpt2, 8 ranks": (adamw(gpt(768, 12)), 8),
    "gpt2-xl, 8 ranks": (adamw(gpt(1600, 48)), 8),
    "7B in bf16, 64 ranks": (adamw(gpt(4096, 32, 128_000), torch.bfloat16), 64),
    "resnet, 8 ranks": (adamw(convnet()), 8),
    "one tensor, 3 ranks": (adamw({"embedding": (1_000_003, 129)}), 3),
}


@pytest.mark.parametrize("name", REALISTIC)
def test_shares_are_about_equal(name):
    """The largest is at most a tenth more than the mean; few tensors are cut; each rank plans the same without asking."""
    parts, count = REALISTIC[name]
    plan = SavePlan(parts, 1 << 30, Writers(tuple(range(count)), 0), everything)
    sizes = [sum(piece.nbytes for piece in pieces) for pieces in plan.pieces.values()]
    total = sum(tensor.nbytes for part in parts.values() for tensor in part.tensors.values())
    assert sum(sizes) == total
    assert max(sizes) <= 1.1 * total / count
    assert sum(len(plan.slices(part)) for part in parts) < count
    last = SavePlan(parts, 1 << 30, Writers(tuple(range(count)), count - 1), everything)
    assert (last.checksum, last.pieces) == (plan.checksum, plan.pieces)
    assert SavePlan(parts, 1 << 29, last.writers, everything).checksum != plan.checksum


tensors = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=2), st.booleans()), max_size=12
)


@settings(deadline=None, database=None, derandomize=True)
@given(tensors, st.integers(1, 5), st.integers(1, 3000))
def test_every_byte_is_somebodys(found, count, shard_bytes):
    """Whatever the tensors are: each byte lies in one piece, pieces begin at blocks, what cannot be cut is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK_BYTES", 64)
        pieces = []
        for number, (dtype, shape, can_be_cut) in enumerate(found):
            info = TensorInfo(str(number), dtype, tuple(shape))
            pieces.append(TensorSlice("part", info, 0, info.nbytes, can_be_cut and info.nbytes > 64))
        shares = divide(pieces, count)
    assert len(shares) == count
    for whole in pieces:
        own = sorted((each.start, each.stop) for share in shares for each in share if each.tensor is whole.tensor)
        assert (own[0][0], own[-1][1]) == (0, whole.nbytes)
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(own))
        assert all(start % 64 == 0 for start, _ in own)
        assert len(own) == 1 or whole.can_be_cut


def test_the_first_writer_has_what_is_not_the_same_everywhere():
    """Buffers, and all JSON: the others know only of what is theirs, and agree with it all the same."""
    parts = {"model": Encoded({}, {"weight": torch.ones(8), "mean": torch.zeros(3)}, {"tied": "weight"})}
    other = {"model": Encoded({}, {"weight": torch.ones(8), "mean": torch.zeros(5), "extra": torch.zeros(1)})}

    def steady(tensor: torch.Tensor) -> bool:
        return len(tensor) == 8

    first, second = SavePlan(parts, 64, Writers((0, 1), 0), steady), SavePlan(other, 64, Writers((0, 1), 1), steady)
    assert {piece.tensor.path for piece in first.pieces[1]} <= {"weight"}
    assert "mean" in {piece.tensor.path for piece in first.pieces[0]}
    assert first.checksum == second.checksum


def cut_and_whole() -> dict[str, torch.Tensor]:
    """A tensor of 18 blocks, and a small one."""
    return {"large": torch.randn(48, 24), "small": torch.randn(3)}


CHANGES = {
    "nothing": lambda values: values,
    "every value and address": lambda values: cut_and_whole(),
    "a shape": lambda values: {**values, "large": values["large"].reshape(24, 48)},
    "a dtype": lambda values: {**values, "large": values["large"].view(torch.int32)},
    "the order in memory": lambda values: {**values, "large": torch.randn(24, 48).t()},
    "a name": lambda values: {"great": values["large"], "small": values["small"]},
    "the order of the names": lambda values: dict(reversed(values.items())),
    "one more": lambda values: {**values, "third": torch.ones(1)},
    "one less": lambda values: {"large": values["large"]},
    "a second name": lambda values: {**values, "tied": values["large"]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_plan_is_used_again_until_something_changes(tmp_path, small_blocks, what):
    """What the next save writes is right in any case."""
    catalog = Catalog(open_store(str(tmp_path)))
    saver = Saver(catalog, ATTEMPT, [], Retention(), shard_bytes=1000, failures_allowed=0)
    before = cut_and_whole()
    after = CHANGES[what](before)
    plans = []
    for step, values in enumerate((before, after)):
        saver.begin({"model": values}, SaveRequest(step, is_steady=everything))
        assert saver.wait() is not None
        plans.append(saver._plan)
    assert (plans[0] is plans[1]) == (what in ("nothing", "every value and address", "a second name"))
    entry = catalog.newest()
    assert bits(load.read(catalog.store, entry.directory, entry.manifest)["model"]) == bits(after)


def test_a_plan_is_for_those_whom_it_was_made_for(small_blocks):
    """What may be divided is part of it, where there is somebody to divide it with."""
    parts = {"model": Encoded({}, cut_and_whole())}
    for ranks in ((0,), (0, 1, 2)):
        writers = Writers(ranks)
        plan = SavePlan(parts, 1000, writers, everything)
        assert plan.is_for(parts, 1000, writers, everything)
        assert plan.is_for(parts, 1000, writers) == (len(ranks) == 1)
        assert not plan.is_for({**parts, "further": Encoded()}, 1000, writers, everything)
        assert not plan.is_for(parts, 2000, writers, everything)
        assert not plan.is_for(parts, 1000, Writers((*ranks, 3)), everything)


# --- two savers in one process ---------------------------------------------------------------------------------------


def model() -> dict[str, Any]:
    """Each dtype in an odd number of items, tied, empty, strided and scalar tensors, and one with a piece on each rank."""
    torch.manual_seed(0)
    noise = {name: torch.randint(0, 2, (97 * size,), dtype=torch.uint8) for name, (_, size) in DTYPES.items()}
    odd = {name: raw.view(getattr(torch, name)) for name, raw in noise.items() if "float4" not in name}
    large = torch.randn(31, 33)
    shapes = {"empty": large[:0], "scalar": torch.tensor(3.0), "strided": torch.randn(40, 20).t(), "tied": large}
    return {**odd, "large": large, **shapes, "a/b~": torch.arange(600)}


def parts(changed: float = 0) -> dict[str, Any]:
    optimizer = {"state": {"large": {"exp_avg": torch.ones(31, 33), "step": torch.tensor(1.0 + changed)}}, "lr": 0.1}
    return {"model": model(), "optimizer": optimizer, "training": {"epoch": 1}}


def savers(*stores: Store, patience_seconds: float = PATIENCE_SECONDS, **changes: Any) -> list[Saver]:
    """The savers of as many ranks."""
    options = {"lineage": [], "retention": Retention(), "shard_bytes": 1000, "failures_allowed": 2, **changes}
    ranks = tuple(range(len(stores)))
    return [
        Saver(Catalog(store), ATTEMPT, writers=Writers(ranks, rank, patience_seconds), **options)
        for rank, store in enumerate(stores)
    ]


def save(savers: list[Saver], step: int = 1, states: Any = None, **options: Any) -> Any:
    """Each saves beside the others; what the first one says."""
    directory = savers[0].new_directory(step)
    for saver, state in zip(savers, states or [parts() for _ in savers], strict=True):
        saver.begin(state, SaveRequest(step, directory=directory, is_steady=everything), **options)
    assert [saver.wait() for saver in savers[1:]] == [None] * (len(savers) - 1)
    return savers[0].wait()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_what_several_wrote_reads_back(small_blocks, tmp_path, count):
    """Bit for bit, ties included, on every way to read it, with the digests of a single writer; no receipts stay."""
    writers = savers(*(open_store(str(tmp_path)) for _ in range(count)))
    save(writers)
    entry = writers[0].catalog.newest()
    manifest, expected = entry.manifest, bits(parts())
    assert {name: part.digest for name, part in manifest.parts.items()} == {
        name: commit.digest_of(part, name) for name, part in parts().items()
    }
    assert {"large", "a~1b~0"} <= manifest.parts["model"].slices.keys()
    names = {file.name for file in manifest.files}
    assert {path.name for path in (tmp_path / entry.directory).iterdir()} == {*names, MANIFEST}
    ranks = {name.partition("-rank")[2].partition("-")[0] for name in names if "-rank" in name}
    assert ranks == ({str(rank) for rank in range(count)} if count > 1 else set())
    for peers in (None, SoloWorld(torch.device("cpu"))):
        found = load.read(writers[0].catalog.store, entry.directory, manifest, peers=peers)
        assert bits(found) == expected
        assert found["model"]["tied"] is found["model"]["large"]
    assert [found.state for found in verify_all(writers[0].catalog, deep=True)] == ["whole"]


@pytest.mark.parametrize("mode", ["sync", "async", "no room"])
def test_every_way_to_save(small_blocks, tmp_path, mode):
    """At the boundary, beside the training, and where a share is larger than the memory that it may take."""
    writers = savers(*(open_store(str(tmp_path)) for _ in range(2)), memory_limit_bytes=100 if mode == "no room" else None)
    if mode == "sync":
        request = SaveRequest(1, directory=writers[0].new_directory(1), is_steady=everything)
        assert writers[1].save(parts(), request, must_succeed=True) is None
        writers[0].save(parts(), request, must_succeed=True)
    elif mode == "no room":  # the first one waits within ``begin``, for one that another process would be
        request = SaveRequest(1, directory=writers[0].new_directory(1), is_steady=everything)
        for writer in reversed(writers):
            writer.begin(parts(), request)
        assert writers[0].wait() is not None
    else:
        save(writers, check=True)
    assert bits(newest(tmp_path)["parts"]) == bits(parts())


def test_a_share_is_all_that_is_copied(small_blocks, tmp_path):
    """The memory of a snapshot is that of the share."""
    writers = savers(*(open_store(str(tmp_path)) for _ in range(4)))
    save(writers)
    alone = savers(open_store(str(tmp_path)))
    save(alone, 2)
    sizes = [writer.memory.block.numel() for writer in writers]
    assert max(sizes) < 0.4 * alone[0].memory.block.numel()


def test_hugging_faces_tools_load_what_was_not_cut(tmp_path):
    """By the index, whoever wrote it; where a tensor lies in pieces, there is no index that would promise it."""
    writers = savers(*(open_store(str(tmp_path)) for _ in range(2)))
    saved = save(writers)
    index = json.loads((tmp_path / saved.directory / "model.safetensors.index.json").read_text())
    found = {}
    for name in set(index["weight_map"].values()):
        found |= load_file(tmp_path / saved.directory / name)
    assert "-rank1-" in " ".join(index["weight_map"].values())
    assert torch.equal(found["large"], model()["large"])
    assert found.keys() == model().keys() - {"tied", "a/b~"} | {"a~1b~0"}


def test_a_model_in_pieces_is_exported_and_not_taken_for_one_that_is_not(small_blocks, tmp_path):
    """Under its own names, whole; a start from the directory itself is refused, even where another part has an index."""
    writers = savers(*(open_store(str(tmp_path / "run")) for _ in range(2)))
    state = {"model": {"large": torch.arange(800.0)}, "optimizer": {str(number): torch.ones(50) for number in range(20)}}
    saved = save(writers, states=[state, state])
    entry = writers[0].catalog.newest()
    assert [
        name for name in map(str, (tmp_path / "run" / saved.directory).iterdir()) if "optimizer" in name and "index" in name
    ]
    out = str(tmp_path / "model.safetensors")
    export_model(writers[0].catalog.store, entry.directory, entry.manifest, out)
    assert load_file(out)["large"].equal(torch.arange(800.0))
    with pytest.raises(Mismatch, match="name the run's URL"):
        read_directory(Place(str(tmp_path / "run" / saved.directory)))


def test_receipts_come_last_and_shards_before_them(small_blocks, tmp_path):
    """Another writer's last put is its receipt; the first one's manifest comes after all receipts."""
    objects: dict[str, bytes] = {}
    calls: list[tuple[int, str, str]] = []

    def note(rank: int):
        return lambda operation, name: calls.append((rank, operation, name.partition("/")[2]))

    save(savers(*(Objects(objects, note(rank)) for rank in range(3))))
    puts = [(rank, name) for rank, operation, name in calls if operation == "put"]
    for rank in (1, 2):
        *shards, last = [name for found, name in puts if found == rank]
        assert last == receipt_name(rank)
        assert shards and all(f"-rank{rank}-" in name for name in shards)
        assert puts.index((0, MANIFEST)) > puts.index((rank, last))
    assert puts[-1] == (0, MANIFEST)


# --- a writer that fails ---------------------------------------------------------------------------------------------


class Refusing(Objects):
    """A store that takes no shards, or nothing at all."""

    takes_receipts = True

    def put(self, name, chunks, size_bytes):
        if not self.takes_receipts or "receipt" not in name:
            raise StoreError(f"put {self.url}/{name}: No space left on device")
        super().put(name, chunks, size_bytes)


def failed(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_writer_whose_storage_refuses_says_so(small_blocks, caplog):
    """At once; the save fails by the policy, nothing is committed, and the next one succeeds."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Refusing(objects))
    began = time.monotonic()
    assert save(writers) is None
    assert time.monotonic() - began < PATIENCE_SECONDS / 2
    assert (writers[0].failures, writers[1].failures) == (1, 0)
    lines = failed(caplog)
    assert any(line.startswith("save of step 1: the share of rank 1 FAILED: put objects://run/") for line in lines)
    (line,) = (line for line in lines if line.startswith("save of step 1 FAILED (1 in a row): rank 1: put objects://run/"))
    assert "No space left" in line
    assert [entry.state for entry in writers[0].catalog.entries()] == ["unfinished"]
    writers[1].catalog = Catalog(Objects(objects))
    saved = save(writers, 2)
    assert writers[0].catalog.newest().directory == saved.directory
    assert (
        [entry.step for entry in Pruner(writers[0].catalog).prune(Retention(1))]
        == []
        == [name for name in objects if "receipt" in name]
    )


def test_a_writer_that_says_nothing_is_not_waited_for_for_ever(small_blocks, caplog, monkeypatch):
    """Not beyond the patience; and when the training is over, no longer than the save has already taken."""
    monkeypatch.setattr("harness.checkpoint.saver.SHORTEST_PATIENCE_SECONDS", 0.1)
    objects: dict[str, bytes] = {}
    silent = Refusing(objects)
    silent.takes_receipts = False
    writers = savers(Objects(objects), silent, patience_seconds=0.3)
    assert save(writers) is None
    assert "ranks [1] have not written theirs" in failed(caplog)[-1]
    writers = savers(Objects(objects), silent, patience_seconds=600)
    request = SaveRequest(2, directory=writers[0].new_directory(2), is_steady=everything)
    writers[0].begin(parts(), request)
    began = time.monotonic()
    assert writers[0].give_up_after(60) is None
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("other", ["shape", "settings"])
def test_ranks_that_do_not_hold_the_same_cannot_write_together(small_blocks, caplog, other):
    """It is no matter of storage, and no save is made of halves."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Objects(objects))
    theirs = parts()
    if other == "shape":
        theirs["model"]["large"] = torch.ones(33, 31)
    else:
        writers[1].shard_bytes = 2000
    with pytest.raises(Unsupported, match="settings of rank 1 differ from those of rank 0"):
        save(writers, states=[parts(), theirs])
    assert MANIFEST not in " ".join(objects)


def test_other_bits_on_another_rank_are_found(small_blocks):
    """Where snapshots are checked, the first writer compares all with what it holds itself."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Objects(objects))
    theirs = parts()
    encoded = commit.encode(theirs)
    piece = SavePlan(encoded, 1000, writers[1].writers, everything).pieces[1][0]
    flat_bytes(encoded[piece.part].tensors[piece.tensor.path])[piece.start] ^= 1
    with pytest.raises(Unsupported, match=f"{piece.part}: {piece.tensor.path} changed .* or are not the same on all ranks"):
        save(writers, states=[parts(), theirs], check=True)
    assert MANIFEST not in " ".join(objects)


def test_a_share_that_was_torn_is_made_up_for(small_blocks, monkeypatch, caplog):
    """What changes on any rank while it is copied keeps the save from being committed. It is no failure of a writer."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Objects(objects))
    states = [parts(), parts()]
    request = SaveRequest(1, directory=writers[0].new_directory(1), is_steady=everything)
    writers[0].begin(states[0], request)
    with held_up(monkeypatch):
        writers[1].begin(states[1], request)
        for tensor in states[1]["model"].values():
            tensor.zero_()
    assert [writer.wait() for writer in reversed(writers)] == [None, None]
    assert [(writer.failures, writer.must_repeat) for writer in writers] == [(0, True), (0, False)]
    assert failed(caplog) == []
    saved = save(writers, 2, states=states)
    assert writers[0].catalog.newest().directory == saved.directory


def test_an_error_of_the_program_is_told_and_raised(small_blocks, monkeypatch):
    """A writer that has a mistake in it dies of it, and the first one does not wait."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Objects(objects))
    write_share = commit.write_share

    def mistaken(store, directory, plan, *arguments):
        return write_share(store, directory, plan, *arguments) if plan.writers.is_first else {}[directory]

    monkeypatch.setattr(commit, "write_share", mistaken)
    request = SaveRequest(1, directory=writers[0].new_directory(1), is_steady=everything)
    for writer in writers:
        writer.begin(parts(), request)
    with pytest.raises(KeyError):
        writers[1].wait()
    with pytest.raises(Unsupported, match="rank 1: KeyError"):
        writers[0].wait()


@pytest.mark.parametrize("text", [b"", b"{}", b"\0" * 100, Receipt(2).encode(), Receipt(1).encode()[:-3]])
def test_a_forged_receipt_fails_the_save(small_blocks, text):
    """Another object under its name fails the save, and commits nothing."""
    objects: dict[str, bytes] = {}
    writers = savers(Objects(objects), Objects(objects))
    directory = writers[0].new_directory(1)
    objects[f"{directory}/{receipt_name(1)}"] = text
    with pytest.raises((StoreError, Unsupported)):
        writers[0].save(parts(), SaveRequest(1, directory=directory, is_steady=everything), must_succeed=True)
    assert MANIFEST not in " ".join(objects)


# --- pieces that are damaged -----------------------------------------------------------------------------------------


@pytest.fixture
def cut(small_blocks):
    """The objects of a checkpoint that two ranks wrote, by their names within its directory, and the directory."""
    objects: dict[str, bytes] = {}
    state = {"model": {"large": torch.arange(200.0), "small": torch.ones(3)}, "training": {"epoch": 1}}
    with silence():
        saved = save(savers(*(Objects(objects) for _ in range(2)), shard_bytes=400), states=[state, state])
    return {name.partition("/")[2]: data for name, data in objects.items()}, saved.directory


def read(files: Mapping[str, bytes], directory: str, **options: Any) -> Any:
    store = Objects({f"{directory}/{name}": data for name, data in files.items()})
    return load.read(store, directory, Catalog(store).open(directory), **options)


def test_flipped_bytes_are_noticed(cut):
    """In each file, whichever way it is read."""
    files, directory = cut
    assert read(files, directory)["model"]["large"].equal(torch.arange(200.0))
    for name, data in files.items():
        for at in range(0, len(data), 29):
            damaged = files | {name: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]}
            for peers in (None, SoloWorld(torch.device("cpu"))):
                with pytest.raises(Corrupt):
                    read(damaged, directory, peers=peers)


def lies() -> dict[str, dict[str, Any]]:
    """What a manifest may say of a tensor of 800 bytes whose pieces begin at 0, 256 and 512."""
    honest = {"dtype": "float32", "shape": [200], "offsets": [0, 256, 512]}
    changes: dict[str, dict[str, Any]] = {
        "a gap": {"offsets": [0, 512]},
        "an overlap": {"offsets": [0, 256, 256, 512]},
        "backwards": {"offsets": [512, 256, 0]},
        "no beginning": {"offsets": [256, 512]},
        "within a block": {"offsets": [0, 255, 512]},
        "beyond the end": {"offsets": [0, 256, 512, 1024]},
        "negative": {"offsets": [0, -256, 512]},
        "none": {"offsets": []},
        "no list": {"offsets": {"0": 0}},
        "no numbers": {"offsets": [0, "256", 512]},
        "true": {"offsets": [False, 256, 512]},
        "another size": {"shape": [201]},
        "another shape": {"shape": [100, 2]},
        "another dtype": {"dtype": "int32"},
        "no dtype": {"dtype": "float31"},
        "a list as dtype": {"dtype": ["float32"]},
        "a negative shape": {"shape": [-200]},
        "a shape of bool": {"shape": [True]},
        "an exabyte": {"shape": [1 << 60]},
        "a terabyte": {"shape": [1 << 38], "offsets": [0, 256, 512]},
        "one more key": {"more": 1},
    }
    return {name: {**honest, **change} for name, change in changes.items()}


@pytest.mark.parametrize("name", lies())
def test_a_manifest_that_lies_of_pieces(cut, name):
    """Gaps, overlaps, wrong sizes, impossible shapes: Corrupt, before there is memory for them."""
    files, directory = cut
    manifest = json.loads(files[MANIFEST])
    assert manifest["parts"]["model"]["slices"] == {
        "large": {"dtype": "float32", "shape": [200], "offsets": [0, 256, 512]}
    }, "so the lies are ones"
    manifest["parts"]["model"]["slices"]["large"] = lies()[name]
    with pytest.raises(Corrupt):
        read(files | {MANIFEST: sealed(manifest)}, directory)


@pytest.mark.parametrize(
    "slices",
    [
        *(None, 1, [], "x", {"large": None}, {"large": []}, {"large": {}}),
        {"small": {"dtype": "float32", "shape": [3], "offsets": [0]}},
        {"large": lies()["a gap"] | {"offsets": [0]}},
        {"nothing": {"dtype": "uint8", "shape": [0], "offsets": [0]}},
        {f"{number}": lies()["a gap"] | {"offsets": [0, 256, 512]} for number in range(100)},
    ],
    ids=str,
)
def test_slices_of_another_kind(cut, slices):
    """Any other value there is an error of the format, too; pieces that nobody claims are tensors without a place."""
    files, directory = cut
    manifest = json.loads(files[MANIFEST])
    manifest["parts"]["model"]["slices"] = slices
    assert unexpected_error(lambda: read(files | {MANIFEST: sealed(manifest)}, directory)) is None
    if slices is not None:
        with pytest.raises(Corrupt):
            read(files | {MANIFEST: sealed(manifest)}, directory)


def test_a_try_that_was_given_up_writes_nothing(cut, monkeypatch):
    """A read that hung and wakes up later does not touch what its successor has verified."""
    files, directory = cut
    hung, woken, begun = threading.Event(), threading.Event(), []

    class Hanging(Objects):
        def read(self, name, consume, size_bytes):
            if "-rank1-" not in name or begun:
                return super().read(name, consume, size_bytes)
            begun.append(threading.Thread(target=self.sleep, args=(name, consume), daemon=True))
            begun[0].start()
            assert hung.wait(20)
            return super().read(name, consume, size_bytes)

        def sleep(self, name, consume):
            data = self.objects[name]
            stream = SimpleNamespace(at=0)

            def readinto(place):
                count = min(len(place), len(data) - stream.at)
                place[:count] = bytes(count) if stream.at > 300 else data[stream.at : stream.at + count]
                stream.at += count
                if stream.at > 300 and not hung.is_set():
                    hung.set()
                    assert woken.wait(20)
                return count

            with pytest.raises(TimeoutError):
                consume(SimpleNamespace(readinto=readinto, read=lambda size: b""))

    store = Hanging({f"{directory}/{name}": data for name, data in files.items()})
    found = load.read(store, directory, Catalog(store).open(directory))
    woken.set()
    begun[0].join(20)
    assert found["model"]["large"].equal(torch.arange(200.0))


def test_left_over_receipts_are_nobodys(cut, tmp_path):
    """A reader passes over them, and a deletion takes them along."""
    files, directory = cut
    store = open_store(str(tmp_path))
    for name, data in {**files, receipt_name(1): b"rubbish", receipt_name(7): b""}.items():
        store.put(f"{directory}/{name}", lambda data=data: [data], len(data))
    catalog = Catalog(store)
    assert [entry.state for entry in verify_all(catalog, deep=True)] == ["whole"]
    Pruner(catalog).delete(directory)
    assert list(tmp_path.iterdir()) == []


# --- three ranks under torchrun --------------------------------------------------------------------------------------

TRAIN = {"steps": 6, "global_batch_size": 6}
CHECKPOINT = {"every_steps": 2, "shard_bytes": 1024, "writers": "all"}


def build(kill: str | None = None) -> Task:
    """A model with buffers that differ between the ranks. ``kill`` is a place: rank 1 dies there, once, when its shards of
    step 4 are written and its receipt is not."""
    layout.BLOCK_BYTES = BLOCK_BYTES
    net = nn.Sequential(nn.Linear(2, 301), nn.BatchNorm1d(301), nn.Dropout(0.1), nn.Linear(301, 1))
    if kill is not None and os.environ["RANK"] == "1":
        put_receipt = commit.put_receipt

        def die(store: Store, directory: str, receipt: Receipt) -> None:
            if directory.startswith("step-000000000004-") and not Path(kill).exists():
                Path(kill).write_text("\n".join(store.list(directory)))
                os.kill(os.getpid(), signal.SIGKILL)
            put_receipt(store, directory, receipt)

        commit.put_receipt = die
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    x = torch.randn(30, 2)
    return Task(net, TensorDataset(x), optimizer, lambda model, batch: model(batch[0]).square().mean())


def train(world: World, place: Path, steps: int = 6, **checkpoint: Any) -> int:
    train_config = {**TRAIN, "steps": steps}
    log = {"jsonl": str(place / "log.jsonl")}
    return train_here(
        build, world, url=place / "run", train=train_config, checkpoint={**CHECKPOINT, **checkpoint}, log=log
    ).step


class on_rank:  # noqa: N801  # a context
    """While it lasts, this rank's local disk does something before it takes a shard of a step, or any."""

    def __init__(self, is_it: bool, what: Any, step: int | None = None) -> None:
        self.what, self.is_it, self.step = what, is_it, "" if step is None else f"/step-{step:012}-"
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        put = LocalDisk.put

        def put_after(disk: LocalDisk, path: str, *rest: Any) -> None:
            if self.is_it and self.step in path and path.endswith(".safetensors"):
                self.what()
            put(disk, path, *rest)

        self.patch.setattr(LocalDisk, "put", put_after)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def one_writes(world: World, place: Path):
    return train(world, place, writers="rank0")


def all_write(world: World, place: Path):
    return train(world, place)


def one_of_each_node_writes_while_the_training_waits(world: World, place: Path):
    """As if the last rank were on a machine of its own."""
    local_rank, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], str(int(world.rank == 1))
    try:
        return train(world, place, writers="node", mode="sync")
    finally:
        os.environ["LOCAL_RANK"] = local_rank


def they_go_on_and_read_together(world: World, place: Path):
    if world.rank == 0:
        shutil.copytree(place.parent / "all_write" / "run", place / "run")
    world.broadcast(None)
    return train(world, place, steps=8, restore="shared")


def a_disk_is_full(world: World, place: Path):
    with on_rank(world.rank == 1, full, step=4):
        return train(world, place)


def a_disk_is_full_at_the_end(world: World, place: Path):
    with on_rank(world.rank == 2, full, step=6):
        return train(world, place)


def a_disk_is_slow(world: World, place: Path):
    with on_rank(world.rank == 2, lambda: time.sleep(0.02)):
        return train(world, place, every_steps=1, when_busy="skip")


SCENARIOS = [
    one_writes,
    all_write,
    one_of_each_node_writes_while_the_training_waits,
    they_go_on_and_read_together,
    a_disk_is_full,
    a_disk_is_full_at_the_end,
    a_disk_is_slow,
]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three ranks did, and where."""
    directory = tmp_path_factory.mktemp("writers")
    return directory, played(__file__, directory, ranks=3)


def digests(url: Path) -> dict[str, str]:
    return {name: digest for name, digest in newest(url)["digests"].items() if name in ("model", "optimizer", "random")}


def ranks_that_wrote(url: Path) -> set[int]:
    return {int(path.name.partition("-rank")[2].partition("-")[0]) for path in url.glob("step-*/*-rank*")}


@pytest.mark.torchrun
@pytest.mark.parametrize(
    ("scenario", "ranks"), [("all_write", {0, 1, 2}), ("one_of_each_node_writes_while_the_training_waits", {0, 2})]
)
def test_what_several_ranks_write_is_what_one_writes(small_blocks, three, scenario, ranks):
    """The same digests at the end, in shards of each writer's own, and no receipts."""
    directory, found = three
    assert returned(found[scenario]) == returned(found["one_writes"]) == [6, 6, 6]
    url = directory / scenario / "run"
    assert committed(url) == {2, 4, 6}
    assert digests(url) == digests(directory / "one_writes" / "run")
    assert (ranks_that_wrote(url), ranks_that_wrote(directory / "one_writes" / "run")) == (ranks, set())
    assert list(url.glob("*/receipt-*")) == []


@pytest.mark.torchrun
def test_ranks_restore_pieces_and_read_each_byte_once(small_blocks, three):
    """A checkpoint in pieces is one that ranks can restore together."""
    directory, found = three
    assert returned(found["they_go_on_and_read_together"]) == [8, 8, 8]
    (record,) = records(directory / "they_go_on_and_read_together" / "log.jsonl", "resume")
    assert record["step"] == 6


@pytest.mark.torchrun
def test_another_number_of_ranks_goes_on(small_blocks, three, tmp_path):
    """One process resumes from what three have written together, to the bits that it would have from one writer's."""
    for scenario in ("one_writes", "all_write"):
        shutil.copytree(three[0] / scenario / "run", tmp_path / scenario)
        progress = train_here(build, url=tmp_path / scenario, train={**TRAIN, "steps": 8}, checkpoint=CHECKPOINT)
        assert progress.step == 8
    assert digests(tmp_path / "all_write") == digests(tmp_path / "one_writes")


@pytest.mark.torchrun
def test_a_full_disk_on_one_rank_fails_the_save_and_no_more(small_blocks, three):
    """Training goes on, with the saves before and after; at the end of the run it is an error, on every rank."""
    directory, found = three
    assert returned(found["a_disk_is_full"]) == [6, 6, 6]
    assert committed(directory / "a_disk_is_full" / "run") == {2, 6}
    assert digests(directory / "a_disk_is_full" / "run") == digests(directory / "one_writes" / "run")
    for result in found["a_disk_is_full_at_the_end"]:
        assert result["raised"] == "StoreError"
        assert result["message"].startswith("rank 2: put ") and "No space left on device" in result["message"]
    assert committed(directory / "a_disk_is_full_at_the_end" / "run") == {2, 4}


@pytest.mark.torchrun
def test_a_slow_disk_on_one_rank_makes_all_skip(small_blocks, three):
    """A save that would have to wait for another rank's share is left out on all of them."""
    directory, found = three
    assert returned(found["a_disk_is_slow"]) == [6, 6, 6]
    skipped = {record["step"] for record in records(directory / "a_disk_is_slow" / "log.jsonl", "skip")}
    assert skipped and committed(directory / "a_disk_is_slow" / "run") == {1, 2, 3, 4, 5, 6} - skipped


@pytest.mark.soak
@pytest.mark.torchrun
def test_a_writer_that_is_killed_leaves_no_commit(small_blocks, tmp_path):
    """Its shards are there and its receipt is not: the run goes on from the checkpoint before."""
    config = {"task": f"{__file__}:build", "args": {"kill": str(tmp_path / "killed")}, "train": TRAIN}
    config |= {"checkpoint": {**CHECKPOINT, "url": "run"}, "world": {"timeout_seconds": 60}}
    with launch(tmp_path, config, ranks=2, max_restarts=1) as run:
        run.succeed()
    shards = (tmp_path / "killed").read_text().splitlines()
    assert any("-rank1-" in name for name in shards) and not any("receipt-1" in name for name in shards)
    (resumed,) = run.events("resume")
    assert resumed["step"] == 2
    assert [record["step"] for record in run.events("save")] == [2, 4, 6]
    assert newest(tmp_path / "run")["step"] == 6


if __name__ == "__main__":
    play(SCENARIOS, Path(sys.argv[1]))
