"""The write protocol: what lies in the store afterwards, in what order it got there, and what a failure leaves."""

import io
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from harness.checkpoint import commit, load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import DTYPES, Ancestor, Attempt, FileInfo, Manifest, checksum, parse_directory
from harness.errors import StoreError, Unsupported
from harness.storage.filesystem import LocalDisk
from harness.storage.store import Store, open_store
from tests.support.states import bits

ATTEMPT = Attempt("000003-0000abcd")


def model() -> dict[str, torch.Tensor]:
    weight = torch.arange(600.0).view(20, 30)
    return {
        "embed.weight": weight,
        "head.weight": weight,  # tied
        "half": torch.linspace(0, 1, 50, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "transposed": weight.t(),
        "wide": torch.tensor([1j, 2, -0.0], dtype=torch.complex64),
    }


def parts() -> dict[str, dict]:
    optimizer = {"state": {"embed.weight": {"step": torch.tensor(7.0), "exp_avg": torch.ones(20, 30)}}, "lr": 0.1}
    return {"model": model(), "optimizer": optimizer, "training": {"epoch": 3, "history": [0.5, math.inf]}}


def write(store: Store, **options) -> tuple[str, Manifest]:
    return commit.write(store, parts(), step=40, attempt=ATTEMPT, **options)


class Observed(Store):
    """A store that notes what is asked of it, and lets a test do something at that moment."""

    @classmethod
    def at(cls, path, before: Callable[[str, str], None] = lambda operation, name: None) -> "Observed":
        store = open_store(str(path))
        store.__class__ = type("ObservedLocal", (cls, type(store)), {})
        store.noted, store.before = [], before
        return store

    def put(self, name, chunks, size_bytes):
        self._note("put", name)
        super().put(name, chunks, size_bytes)

    def list(self, prefix="", **how):
        self._note("list", f"{prefix}/")
        return super().list(prefix, **how)

    def read_range(self, name, start, size_bytes):
        self._note("read", name)
        return super().read_range(name, start, size_bytes)

    def _note(self, operation: str, name: str) -> None:
        self.noted.append((operation, name.partition("/")[2]))
        self.before(operation, name)


# --- what lies there -------------------------------------------------------------------------------------------------


def test_the_directory_is_the_documented_one(tmp_path):
    """A fresh directory per save, whose name says step and attempt, with the shards, the indices and the manifest."""
    store = open_store(str(tmp_path))
    lineage = [Ancestor("000002-00000000", 30)]
    directory, manifest = write(store, lineage=lineage, meta={"epoch": 3}, shard_bytes=2404)
    assert parse_directory(directory) == (40, ATTEMPT)
    assert {name.removeprefix(f"{directory}/") for name in store.list()} == {
        *(f"model-0000{index}-of-00004.safetensors" for index in (1, 2, 3, 4)),
        *("model.safetensors.index.json", "optimizer.safetensors", "manifest.json"),
    }
    assert Catalog(store).open(directory) == manifest
    assert (manifest.step, manifest.attempt, manifest.lineage, manifest.meta) == (40, ATTEMPT.id, lineage, {"epoch": 3})
    assert {name: part.files for name, part in manifest.parts.items()}["training"] == []
    assert write(store)[0] != directory


def test_files_are_named_with_their_sizes_and_checksums(tmp_path):
    """The manifest has every other object of the directory, as it lies on the disk."""
    directory, manifest = write(open_store(str(tmp_path)), shard_bytes=2000)
    found = []
    for path in sorted((tmp_path / directory).iterdir()):
        data = path.read_bytes()
        found += [FileInfo(path.name, len(data), checksum(data))] if path.name != "manifest.json" else []
    assert sorted(manifest.files, key=lambda file: file.name) == found


@pytest.mark.parametrize("shard_bytes", [1, 2000, 1 << 30])
def test_hugging_faces_tools_load_the_model_as_it_lies(tmp_path, shard_bytes):
    """``safetensors`` and the index give every tensor under its own name, tied ones once, whatever the number of shards."""
    directory, manifest = write(open_store(str(tmp_path)), shard_bytes=shard_bytes)
    files = manifest.parts["model"].files
    if len(files) > 1:
        index = json.loads((tmp_path / directory / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model().values()) - 2400  # tied
    found = {}
    for file in files:
        tensors = load_file(tmp_path / directory / file)
        assert shard_bytes == 1 << 30 or all(index["weight_map"][name] == file for name in tensors)
        found |= tensors
    expected = model()
    assert manifest.parts["model"].aliases == {"head.weight": "embed.weight"}
    del expected["head.weight"]
    assert bits(found) == bits(expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_safetensors_reads_every_dtype_it_knows(tmp_path):
    """Dtypes that the format can name are read as such by its own library; the others lie there as bytes."""
    tensors = {
        name: torch.zeros(2, 3, dtype=torch.uint8).to(getattr(torch, name)) for name in DTYPES if "float4" not in name
    }
    commit_store = open_store(str(tmp_path))
    directory, _ = commit.write(commit_store, {"model": tensors}, step=1, attempt=ATTEMPT)
    with safe_open(tmp_path / directory / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"
        for name, (code, itemsize) in DTYPES.items():
            if name in tensors:
                found = file.get_slice(name)
                shape = [2, 3] if code else [2, 3, itemsize]
                assert (found.get_dtype(), found.get_shape()) == (code or "U8", shape)
                assert code or file.metadata()[f"dtype:{name}"] == name


def test_what_was_written_reads_back(tmp_path):
    """All parts come back bit for bit, tied tensors as one."""
    store = open_store(str(tmp_path))
    directory, manifest = write(store, shard_bytes=2000)
    found = load.read(store, directory, manifest)
    assert bits(found) == bits(parts())
    assert found["model"]["head.weight"] is found["model"]["embed.weight"]


def test_parts_without_anything(tmp_path):
    """An empty part, and a checkpoint of nothing, are checkpoints."""
    store = open_store(str(tmp_path))
    for empty in ({}, {"model": {}}, {"model": {"none": {}}, "optimizer": {}}):
        directory, manifest = commit.write(store, empty, step=1, attempt=ATTEMPT)
        assert load.read(store, directory, manifest) == empty
        assert Catalog(store).entries()[0].state == "whole"


# --- digests ---------------------------------------------------------------------------------------------------------


def test_digests_do_not_depend_on_the_shards(tmp_path):
    """Equal states have equal digests however they are divided, and ``digest_of`` tells them without writing."""
    store = open_store(str(tmp_path))
    digests = [
        {name: part.digest for name, part in write(store, shard_bytes=shard_bytes)[1].parts.items()}
        for shard_bytes in (1, 1000, 5000, 1 << 30)
    ]
    assert all(found == digests[0] for found in digests)
    assert digests[0] == {name: commit.digest_of(part, name) for name, part in parts().items()}
    changed = model()
    changed["scalar"] = torch.tensor(4)
    assert commit.digest_of(changed, "model") != digests[0]["model"]


def test_digests_do_not_depend_on_ties_and_layout():
    """A tied model and one that holds two equal tensors are the same state, and so are views and copies of them."""
    untied = {name: tensor.clone().contiguous() for name, tensor in model().items()}
    assert commit.digest_of(untied, "model") == commit.digest_of(model(), "model")


# --- the order -------------------------------------------------------------------------------------------------------


def test_the_manifest_is_last(tmp_path):
    """All other objects are put, then looked at, and only then the manifest is put, and read back."""
    store = Observed.at(tmp_path)
    _, manifest = write(store, shard_bytes=2000)
    names = [file.name for file in manifest.files]
    assert sorted(store.noted[: len(names)]) == sorted(("put", name) for name in names)
    assert store.noted[len(names) :] == [("list", ""), ("put", "manifest.json"), ("read", "manifest.json")]


@pytest.mark.parametrize("kind", ["short", "long", "missing"])
def test_an_object_that_the_store_does_not_have_is_noticed(tmp_path, kind):
    """Where the store has another size than was sent, or nothing, the manifest is never put."""

    def harm(operation, name):
        if operation == "list" and name.startswith("step-"):
            path = tmp_path / name / "optimizer.safetensors"
            data = path.read_bytes()
            path.unlink() if kind == "missing" else path.write_bytes(data[:-1] if kind == "short" else data + b"\0")

    store = Observed.at(tmp_path, harm)
    has = "no such object" if kind == "missing" else r"\d+ bytes"
    with pytest.raises(StoreError, match=rf"optimizer\.safetensors: sent \d+ bytes, the store has {has}"):
        write(store)
    assert ("put", "manifest.json") not in store.noted
    assert [entry.state for entry in Catalog(open_store(str(tmp_path))).entries()] == ["unfinished"]


@pytest.mark.parametrize("kind", ["short", "long", "other", "missing"])
def test_a_manifest_that_the_store_does_not_have_is_noticed(tmp_path, kind):
    """A save whose manifest cannot be read back as it was sent has failed: nothing may be deleted for it."""

    def harm(operation, name):
        if (operation, name.partition("/")[2]) == ("read", "manifest.json"):
            path = tmp_path / name
            data = path.read_bytes()
            path.unlink()
            if kind != "missing":
                path.write_bytes({"short": data[:-1], "long": data + b"\0", "other": data.replace(b"1", b"2", 1)}[kind])

    has = "no such object" if kind == "missing" else "others"
    with pytest.raises(StoreError, match=rf"manifest\.json: sent \d+ bytes, the store has {has}"):
        write(Observed.at(tmp_path, harm))


def test_a_directory_is_never_touched_again(tmp_path):
    """A second save of the same step by the same attempt leaves every byte of the first as it was."""
    store = open_store(str(tmp_path))
    first, _ = write(store)
    before = {name: (tmp_path / name).read_bytes() for name in store.list(first)}
    write(store)
    assert {name: (tmp_path / name).read_bytes() for name in store.list(first)} == before


# --- failures --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    """A value without a form on disk is refused before the first byte is written, wherever it is."""
    store = Observed.at(tmp_path)
    for bad in ({"a": object()}, {"deep": [{"x": (1, {2: b""}, [torch.zeros(2, device="meta")])}]}):
        with pytest.raises(Unsupported, match=r"^training/"):
            commit.write(store, {**parts(), "training": bad}, step=1, attempt=ATTEMPT)
    assert store.noted == []
    assert store.list() == {}


@pytest.mark.parametrize(
    "meta",
    [
        {"x": object()},
        {"x": torch.zeros(1)},
        {"x": math.nan},
        {"x": [np.int64(1)]},
        {1: "a", "1": "b"},
        {"x": {True: 1, "true": 2}},
        {("a", "b"): 1},
    ],
    ids=["object", "tensor", "nan", "numpy", "twins", "deep twins", "tuple"],
)
def test_a_meta_that_is_no_json_commits_nothing(tmp_path, meta):
    """The manifest's own part is checked as well, before anything is written: no manifest is better than one that cannot be
    read."""
    store = open_store(str(tmp_path))
    with pytest.raises(Unsupported, match=r"^meta: expected JSON: "):
        write(store, meta=meta)
    assert store.list() == {}


def test_tries_of_an_upload_send_the_same_bytes(tmp_path):
    """When an upload fails half-way and is tried again, the shard and its checksums are those of the second try."""
    failures = iter([True, True, False])
    sent = []

    class Flaky(LocalDisk):
        def put(self, path, chunks, size_bytes):
            data = io.BytesIO()
            for chunk in chunks:
                data.write(chunk)
                if path.endswith("model.safetensors") and data.tell() > 2000 and next(failures, False):
                    raise TimeoutError
            sent.append(path)
            super().put(path, [data.getvalue()], size_bytes)

    store = open_store(str(tmp_path))
    store.filesystem.__class__ = Flaky
    directory, manifest = write(store)
    assert next(failures, None) is None
    assert len(sent) == 3
    assert bits(load.read(store, directory, manifest)) == bits(parts())


def test_so_many_shards_are_on_their_way_at_once(tmp_path):
    """With three streams three shards meet in the middle of their ``put``; the checkpoint is the one of a single stream."""
    meeting = threading.Barrier(3, timeout=20)

    def meet(operation: str, name: str) -> None:
        if operation == "put" and "-of-" in name:
            meeting.wait()

    store = Observed.at(tmp_path / "three", meet)
    about: dict[str, Any] = {"step": 40, "attempt": ATTEMPT, "shard_bytes": 100}  # six shards
    model = {"model": parts()["model"]}
    directory, manifest = commit.write(store, model, **about, streams=3)
    assert len(manifest.parts["model"].files) == 6
    assert bits(load.read(store, directory, manifest)) == bits(model)
    _, alone = commit.write(open_store(str(tmp_path / "one")), model, **about)
    assert (alone.files, alone.parts) == (manifest.files, manifest.parts)


def test_a_shard_that_fails_beside_others_leaves_no_commit(tmp_path):
    """The error is the failed shard's, and those that had not begun are not sent."""

    def refuse(operation: str, name: str) -> None:
        if name.endswith("model-00002-of-00006.safetensors"):
            raise StoreError("refused")

    store = Observed.at(tmp_path, refuse)
    model = {"model": parts()["model"]}
    with pytest.raises(StoreError, match="refused"):
        commit.write(store, model, step=40, attempt=ATTEMPT, shard_bytes=100, streams=2)
    assert {entry.state for entry in Catalog(store).entries()} <= {"unfinished"}
    assert len([name for operation, name in store.noted if operation == "put"]) < 6
