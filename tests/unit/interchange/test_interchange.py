"""Reading what others wrote, writing what others read: torch, safetensors and torch's distributed checkpoints themselves."""

import contextlib
import copy
import dataclasses
import functools
import http.server
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import threading
import uuid
import warnings
import zipfile
from collections.abc import Mapping

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog, verify
from harness.cli import cli
from harness.errors import ConfigError, Corrupt, HarnessError, Mismatch, NoCheckpoint, StoreError, Unsupported
from harness.interchange import Foreign, export_model, import_run, load_into, read_foreign
from harness.state.capture import State
from harness.storage.store import open_store
from harness.tasks import gpt
from tests.support.states import Training


class Net(nn.Module):
    """A model with what a state_dict may have: buffers, an integer among them, and modules of more than one version."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class OwnsModule(nn.Module):
    """A model whose only child is really called ``module``."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.module = Net(seed)

    def forward(self, x):
        return self.module(x)


class WithExtraState(nn.Linear):
    """A model with state that is no tensor."""

    def __init__(self, extra) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def train(model, optimizer, steps=3):
    """A few steps on data that are always the same."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(8, 3, generator=generator)

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()  # noqa: B023  # called within the same turn
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.fixture
def trained():
    """A model and its optimizer after a few steps."""
    model = Net()
    optimizer = adamw(model)
    train(model, optimizer)
    return model, optimizer


def same(found, expected):
    """Whether two nested values are equal, their tensors bit for bit and of one dtype."""
    if isinstance(expected, torch.Tensor):
        if (found.dtype, found.shape) != (expected.dtype, expected.shape):
            return False
        raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
        return torch.equal(*raw)
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


def checkpoint(url, model, optimizer=None, **options):
    """A run with one checkpoint of a model: its store, the checkpoint's directory, its manifest."""
    store = open_store(url)
    state = Training(model, optimizer or adamw(model))
    meta = {"epoch": 4, "metrics": {"last": {"loss": 0.25}}}
    attempt = Catalog(store).attempts.claim({})
    return store, *commit.write(store, state.capture(), step=7, attempt=attempt, meta=meta, **options)


def small_gpt():
    torch.manual_seed(3)
    return gpt.GPT(layers=1, heads=2, width=8, context=4, dropout=0.0)


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_pth(tmp_path):
    """``model.load_state_dict(torch.load(OUT, weights_only=True))`` takes an exported .pth, tied weights and all."""
    model, fresh = small_gpt(), gpt.GPT(1, 2, 8, 4, 0.0)
    out = f"{tmp_path}/new/model.pth"
    written = export_model(*checkpoint(f"{tmp_path}/run", model), out)
    state = torch.load(out, weights_only=True)
    assert same(state, model.state_dict())
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr(), "stored once"
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), model.state_dict())
    assert written == {"model.pth": os.path.getsize(out)}
    assert os.listdir(f"{tmp_path}/new") == ["model.pth"]


def test_export_safetensors(tmp_path):
    """safetensors reads an exported file, and what it reads fills a model with tied weights strictly."""
    model, fresh = small_gpt(), gpt.GPT(1, 2, 8, 4, 0.0)
    out = f"{tmp_path}/model.safetensors"
    export_model(*checkpoint(f"{tmp_path}/run", model), out)
    state = safetensors.torch.load_file(out)
    assert same(state, dict(model.state_dict()))
    fresh.load_state_dict(state, strict=True)
    assert same(fresh.state_dict(), model.state_dict())


def test_export_directory(tmp_path):
    """A directory gets shards of a bounded size and an index with the place of every tensor, as Hugging Face has it."""
    model = small_gpt()
    written = export_model(*checkpoint(f"{tmp_path}/run", model), f"{tmp_path}/out/", shard_bytes=4000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert {*shards, "model.safetensors.index.json"} == {*written} == {*os.listdir(tmp_path / "out")}
    assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
    state = {}
    for shard in shards:
        tensors = safetensors.torch.load_file(tmp_path / "out" / shard)
        assert {name for name, place in index["weight_map"].items() if place == shard} == tensors.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 4000
        state |= tensors
    assert same(state, dict(model.state_dict()))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())


def test_export_small_directory(tmp_path):
    """A model that fits one shard is ``model.safetensors`` alone; other files in an existing directory are left alone."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")
    export_model(*checkpoint(f"{tmp_path}/run", Net()), f"{tmp_path}/out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_export_to_another_store(tmp_path):
    """OUT may be on any filesystem that fsspec knows."""
    model, place = Net(), f"memory://{uuid.uuid4().hex}"
    run = checkpoint(f"{tmp_path}/run", model)
    for out in ("model.pth", "model.safetensors", "directory/"):
        export_model(*run, f"{place}/{out}", shard_bytes=64)
        assert same(read_foreign(f"{place}/{out}").model, dict(model.state_dict()))


def test_object_store(tmp_path, s3):
    """On a real object store, OUT and SRC may be files of several parts and directories, with options of their own."""
    model, place, options = nn.Linear(1200, 1000), s3.url(uuid.uuid4().hex), s3.storage_options
    run = checkpoint(f"{tmp_path}/run", model)
    for out in ("model.pth", "model.safetensors", "directory/"):
        export_model(*run, f"{place}/{out}", storage_options=options, shard_bytes=64 << 10)
        assert same(read_foreign(f"{place}/{out}", storage_options=options).model, dict(model.state_dict()))
    store = open_store(f"{place}/imported", options)
    import_run(f"{place}/model.pth", store, storage_options=options)
    assert same(read_foreign(f"{place}/imported", storage_options=options).model, dict(model.state_dict()))


@pytest.mark.parametrize("out", ["model.pth", "model.safetensors", "out/"])
def test_export_does_not_overwrite(tmp_path, out):
    """What is at OUT stays unless the caller says otherwise; then nothing of it is left."""
    old, new = Net(1), Net(2)
    export_model(*checkpoint(f"{tmp_path}/old", old), f"{tmp_path}/{out}", shard_bytes=64)
    with pytest.raises(ConfigError, match="is there already"):
        export_model(*checkpoint(f"{tmp_path}/new", new), f"{tmp_path}/{out}")
    assert same(read_foreign(f"{tmp_path}/{out}").model, dict(old.state_dict()))
    written = export_model(*checkpoint(f"{tmp_path}/newer", new), f"{tmp_path}/{out}", overwrite=True)
    assert same(read_foreign(f"{tmp_path}/{out}").model, dict(new.state_dict()))
    assert out != "out/" or os.listdir(tmp_path / out) == list(written) == ["model.safetensors"]


def test_export_every_dtype(tmp_path):
    """Tensors of every dtype, empty ones and single numbers arrive bit for bit, or are refused by name."""
    model = nn.Module()
    dtypes = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
    for dtype in dtypes:
        name = f"of_{str(dtype).removeprefix('torch.')}"
        model.register_buffer(name, torch.tensor([1, 0, 1]).to(dtype))
        model.register_buffer(f"{name}_scalar", torch.tensor(1).to(dtype))
    model.register_buffer("empty", torch.zeros(0, 3))
    model.weight = nn.Parameter(torch.randn(3, 2).T)  # not contiguous
    run = checkpoint(f"{tmp_path}/run", model, torch.optim.SGD(model.parameters()))
    export_model(*run, f"{tmp_path}/model.safetensors")
    export_model(*run, f"{tmp_path}/model.pth")
    assert same(safetensors.torch.load_file(f"{tmp_path}/model.safetensors"), dict(model.state_dict()))
    assert same(torch.load(f"{tmp_path}/model.pth", weights_only=True), dict(model.state_dict()))

    model.register_buffer("wide", torch.tensor([1j], dtype=torch.complex128))
    run = checkpoint(f"{tmp_path}/wide", model, torch.optim.SGD(model.parameters()))
    with pytest.raises(Unsupported, match=r"wide is a tensor of dtype torch.complex128.*\.pth"):
        export_model(*run, f"{tmp_path}/wide.safetensors")
    export_model(*run, f"{tmp_path}/wide.pth")
    assert same(torch.load(f"{tmp_path}/wide.pth", weights_only=True), dict(model.state_dict()))


def test_export_extra_state(tmp_path):
    """Extra state of plain values goes into a .pth, and is refused where the form cannot hold it or nobody could load it."""
    run = checkpoint(f"{tmp_path}/run", WithExtraState({"seen": 3, "names": ("a", "b"), "at": torch.arange(2)}))
    export_model(*run, f"{tmp_path}/model.pth")
    fresh = WithExtraState(None)
    fresh.load_state_dict(torch.load(f"{tmp_path}/model.pth", weights_only=True))
    assert same(fresh.extra, {"seen": 3, "names": ("a", "b"), "at": torch.arange(2)})
    with pytest.raises(Unsupported, match=r"_extra_state is extra state of type dict.*\.pth"):
        export_model(*run, f"{tmp_path}/model.safetensors")
    with pytest.raises(Unsupported, match=r"_extra_state: expected .* plain values, found numpy"):
        export_model(*checkpoint(f"{tmp_path}/numpy", WithExtraState(np.float64(3))), f"{tmp_path}/numpy.pth")
    assert sorted(os.listdir(tmp_path)) == ["model.pth", "numpy", "run"]


class Renamed(nn.Linear):
    """A module that has changed its format, as BatchNorm did: states of version 1 are translated."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if (metadata.get("version") or 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].neg()
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_module_versions(tmp_path):
    """The versions of the modules survive export and import, so that no module takes its state for an old one."""
    model = nn.Sequential(nn.Sequential(Renamed(2, 2)))
    out = f"{tmp_path}/model.pth"
    export_model(*checkpoint(f"{tmp_path}/run", model), out)
    assert torch.load(out, weights_only=True)._metadata == model.state_dict()._metadata
    import_run(out, open_store(f"{tmp_path}/imported"))
    for source in (out, f"{tmp_path}/imported", f"{tmp_path}/run"):
        fresh = nn.Sequential(nn.Sequential(Renamed(2, 2)))
        load_into(fresh, None, read_foreign(source))
        assert same(fresh.state_dict(), model.state_dict()), source


def test_export_of_another_part(tmp_path):
    """In a loop of one's own the model may be called anything; an optimizer is none, and what is there is told."""
    generator, judge = nn.Linear(2, 3), nn.Linear(3, 1)
    store = open_store(f"{tmp_path}/run")
    state = State({"generator": generator, "judge": judge, "optimizer": adamw(generator)}, torch.device("cpu"))
    attempt = Catalog(store).attempts.claim({})
    run = store, *commit.write(store, state.capture(), step=7, attempt=attempt)
    export_model(*run, f"{tmp_path}/judge.pth", part="judge")
    exported = torch.load(f"{tmp_path}/judge.pth", weights_only=True)
    assert same(exported, judge.state_dict())
    assert exported._metadata == judge.state_dict()._metadata
    with pytest.raises(Mismatch, match=r"expected a part called model, found generator, judge, .*\(--part says which\)"):
        export_model(*run, f"{tmp_path}/model.pth")
    with pytest.raises(Mismatch, match="expected a module, one of generator, judge; found optimizer"):
        export_model(*run, f"{tmp_path}/optimizer.pth", part="optimizer")
    done = CliRunner().invoke(cli, ["export", "--part", "generator", f"{tmp_path}/run", f"{tmp_path}/generator.pth"])
    assert done.exit_code == 0, done.output
    assert same(torch.load(f"{tmp_path}/generator.pth", weights_only=True), generator.state_dict())


def test_export_verifies(tmp_path):
    """Nothing is exported from a corrupt checkpoint."""
    store, directory, manifest = checkpoint(f"{tmp_path}/run", Net())
    flip(tmp_path / "run" / directory / "model.safetensors", -5)
    for out in ("model.pth", "model.safetensors", "out/"):
        with pytest.raises(Corrupt, match=r"model\.safetensors"):
            export_model(store, directory, manifest, f"{tmp_path}/{out}")
    assert os.listdir(tmp_path) == ["run"]


@contextlib.contextmanager
def largest_file(size_bytes):
    """The kernel refuses to let any file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("out", ["model.pth", "model.safetensors", "out/"])
def test_export_that_fails_leaves_nothing(tmp_path, out):
    """When the storage refuses half-way, the error says so, and there is nothing at OUT."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(300, 300))
    run = checkpoint(f"{tmp_path}/run", model)
    with largest_file(64 << 10), pytest.raises(StoreError, match="File too large"):
        export_model(*run, f"{tmp_path}/{out}", shard_bytes=1000)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "run" not in path.parts] == []


def test_export_of_nothing(tmp_path):
    """An OUT of no known form, and a checkpoint without a model, are told in a sentence."""
    run = checkpoint(f"{tmp_path}/run", Net())
    with pytest.raises(ConfigError, match=r"model\.txt: expected NAME\.safetensors, NAME\.pth or a directory"):
        export_model(*run, f"{tmp_path}/model.txt")
    store = open_store(f"{tmp_path}/other")
    attempt = Catalog(store).attempts.claim({})
    with pytest.raises(Mismatch, match="expected a part called model, found other"):
        export_model(store, *commit.write(store, {"other": {"a": 1}}, step=0, attempt=attempt), f"{tmp_path}/model.pth")


# --- the forms of others ---------------------------------------------------------------------------------------------


def lightning(model, optimizer):
    return {"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 5, "global_step": 3}


FORMS = {  # what is saved, and the epoch and the loss that are to be found in it
    "state_dict": (lambda model, _: model.state_dict(), None, None),
    "parameters": (lambda model, _: model.state_dict(keep_vars=True), None, None),
    "training dictionary": (
        lambda model, optimizer: {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "epoch": 5,
            "loss": torch.tensor(0.5),
        },
        5,
        0.5,
    ),
    "snapshot": (
        lambda model, optimizer: {
            "model_state": model.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "finished_epoch": 5,
        },
        5,
        None,
    ),
    "snapshot in capitals": (lambda model, _: {"MODEL_STATE": model.state_dict(), "EPOCHS_RUN": 5}, 5, None),
    "lightning": (lightning, 5, None),
    "short": (
        lambda model, optimizer: {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loss": 2},
        None,
        2.0,
    ),
    "within": (lambda model, optimizer: {"app": {"model": model.state_dict(), "optim": optimizer.state_dict()}}, None, None),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("form", FORMS)
def test_import_of_every_form_of_pth(tmp_path, trained, form, legacy):
    """Every known form of a .pth gives the weights bit for bit, and what else it has: optimizer, epoch, loss."""
    model, optimizer = trained
    make, epoch, loss = FORMS[form]
    saved = make(model, optimizer)
    torch.save(saved, tmp_path / "saved.pth", _use_new_zipfile_serialization=not legacy)
    found = read_foreign(f"{tmp_path}/saved.pth")
    assert same(found.model, dict(model.state_dict()))
    assert (found.epoch, found.loss) == (epoch, loss)
    if "optim" in repr(list(saved)) or form == "within":
        assert same(found.optimizer, optimizer.state_dict())
    else:
        assert found.optimizer is None
    assert found.source == f"{tmp_path}/saved.pth"
    assert not any(tensor.requires_grad for tensor in found.model.values())


def test_what_is_left_out_is_told(tmp_path, trained):
    """What a file has beyond the known parts is named for the log."""
    saved = {"model": trained[0].state_dict(), "optimizer": "adamw", "scheduler": {"last_epoch": 3}, "epoch": True}
    torch.save(saved, tmp_path / "saved.pth")
    found = read_foreign(f"{tmp_path}/saved.pth")
    assert found.what == "torch.save: model; left out: optimizer, scheduler, epoch"
    assert (found.optimizer, found.epoch, found.loss) == (None, None, None)


def test_named_optimizer(tmp_path):
    """An optimizer that was made from named parameters is read under their plain names."""
    model = Net()
    optimizer = torch.optim.AdamW((f"module.{name}", parameter) for name, parameter in model.named_parameters())
    train(model, optimizer)
    saved = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": saved, "optimizer": optimizer.state_dict()}, tmp_path / "saved.pth")
    found = read_foreign(f"{tmp_path}/saved.pth").optimizer
    names = [name for name, _ in model.named_parameters()]
    assert [group["params"] for group in found["param_groups"]] == [names]
    assert same(found["state"], dict(zip(names, optimizer.state_dict()["state"].values(), strict=True)))


def test_partly_named_optimizer(tmp_path, trained):
    """An optimizer that names the parameters of some groups only is read by number."""
    saved = copy.deepcopy(trained[1].state_dict())
    (group,) = saved["param_groups"]
    numbers = group["params"]
    saved["param_groups"] = [{**group, "params": numbers[:1], "param_names": ["a"]}, {**group, "params": numbers[1:]}]
    torch.save({"model": trained[0].state_dict(), "optimizer": saved}, tmp_path / "saved.pth")
    found = read_foreign(f"{tmp_path}/saved.pth").optimizer
    assert [group["params"] for group in found["param_groups"]] == [numbers[:1], numbers[1:]]
    assert same(found["state"], saved["state"])


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def with_compiled_child(model):
    model.first = compiled(model.first)
    return model


WRAPPERS = {
    "ddp": nn.parallel.DistributedDataParallel,
    "compiled": compiled,
    "compiled ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "ddp of compiled": lambda model: nn.parallel.DistributedDataParallel(compiled(model)),
    "compiled child": with_compiled_child,
    "ddp of compiled child": lambda model: nn.parallel.DistributedDataParallel(with_compiled_child(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_prefixes(tmp_path, group, wrapper):
    """The names that DDP and torch.compile really write come out plain, in any nesting, and load into the plain model."""
    wrapped = WRAPPERS[wrapper](Net()).state_dict()
    assert wrapped.keys() != Net().state_dict().keys(), "there are prefixes"
    torch.save(wrapped, tmp_path / "saved.pth")
    found, model = read_foreign(f"{tmp_path}/saved.pth"), Net(1)
    assert found.versions == {"norm.": 2}
    load_into(model, None, found)
    assert same(model.state_dict(), Net().state_dict())


def test_a_child_called_module(tmp_path, group):
    """A model that owns a child called ``module`` gets its weights, saved plainly, from within DDP, or imported first."""
    own = OwnsModule()
    for name, model in {"plain": own, "ddp": nn.parallel.DistributedDataParallel(own)}.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        import_run(f"{tmp_path}/{name}.pth", open_store(f"{tmp_path}/{name}"))
        for source in (f"{tmp_path}/{name}.pth", f"{tmp_path}/{name}"):
            fresh = OwnsModule(1)
            load_into(fresh, None, read_foreign(source))
            assert same(fresh.state_dict(), own.state_dict()), source


def test_one_plain_name_keeps_the_prefix(tmp_path):
    """``module.`` is part of the names as soon as one name is without it."""
    saved = {"module.weight": torch.ones(2), "n_averaged": torch.tensor(1)}
    torch.save(saved, tmp_path / "saved.pth")
    assert read_foreign(f"{tmp_path}/saved.pth").model.keys() == saved.keys()


def test_no_name_is_lost(tmp_path):
    """Where two names would be one without a wrapper's step, all names stay as they are."""
    saved = {"_orig_mod.weight": torch.ones(2), "weight": torch.zeros(2)}
    torch.save(saved, tmp_path / "saved.pth")
    assert same(read_foreign(f"{tmp_path}/saved.pth").model, saved)


# --- files and directories -------------------------------------------------------------------------------------------


def test_safetensors_file(tmp_path, trained):
    """A file that safetensors wrote is read bit for bit, wherever it is."""
    state = dict(trained[0].state_dict())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"epoch": "3"})
    assert same(read_foreign(f"{tmp_path}/model.safetensors").model, state)
    url = f"memory://{uuid.uuid4().hex}.bin"  # the bytes say what it is, not the name
    with fsspec.open(url, "wb") as file:
        file.write((tmp_path / "model.safetensors").read_bytes())
    assert same(read_foreign(url).model, state)


def test_unaligned_safetensors(tmp_path):
    """Tensors that another writer has not aligned, or that have no bytes, are read all the same."""
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "none": {"dtype": "F32", "shape": [0, 2], "data_offsets": [3, 3]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + b"abc" + np.float32([1.5, -2]).tobytes()
    )
    found = read_foreign(f"{tmp_path}/model.safetensors").model
    assert same(found, {"odd": torch.tensor([*b"abc"]).byte(), "none": torch.empty(0, 2), "wide": torch.tensor([1.5, -2])})


def shards_of(state):
    names = sorted(state)
    return {f"model-{index + 1:05}-of-00002": {name: state[name] for name in names[index::2]} for index in range(2)}


@pytest.fixture(params=["safetensors", "bin"])
def sharded(request, tmp_path, trained):
    """A directory of Hugging Face's layout with an index, and the state in it."""
    directory, state = tmp_path / "hf", trained[0].state_dict()
    directory.mkdir()
    places = {}
    for name, shard in shards_of(state).items():
        file = f"{name}.{request.param}"
        save = safetensors.torch.save_file if request.param == "safetensors" else torch.save
        save(shard, directory / file)
        places |= dict.fromkeys(shard, file)
    index = "model.safetensors.index.json" if request.param == "safetensors" else "pytorch_model.bin.index.json"
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (directory / "config.json").write_text("{}")
    return directory, directory / index, dict(state)


def test_sharded_directory(sharded):
    """The shards that an index names make one model."""
    directory, _, state = sharded
    assert same(read_foreign(str(directory)).model, state)


def test_sharded_directory_elsewhere(sharded):
    """A directory on another filesystem is fetched file by file."""
    directory, _, state = sharded
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(directory), url, recursive=True)
    assert same(read_foreign(url).model, state)


def test_broken_index(sharded):
    """A shard that is missing, lacks a tensor or lies elsewhere, and an index that is none, are told by name."""
    directory, index, _ = sharded
    places = json.loads(index.read_text())["weight_map"]
    name, shard = next(iter(places.items()))
    for replaced, problem in {
        "absent.safetensors": "absent.safetensors: missing",
        f"../hf/{shard}": "missing",
        min({*places.values()} - {shard}): f"expected {name} in it",
    }.items():
        index.write_text(json.dumps({"weight_map": {**places, name: replaced}}))
        with pytest.raises(Corrupt, match=problem):
            read_foreign(str(directory))
    for text in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(Corrupt, match=r"index\.json: expected JSON with a weight_map"):
            read_foreign(str(directory))


def test_a_tensor_in_two_shards(sharded):
    """A tensor that two shards have is refused by name: nobody knows which is meant."""
    directory, index, state = sharded
    first, second = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    more = {**shards_of(state)[second.partition(".")[0]], min(state): state[min(state)] + 1}
    (safetensors.torch.save_file if second.endswith("safetensors") else torch.save)(more, directory / second)
    with pytest.raises(Corrupt, match=f"{first}|{second}: {min(state)} is in another file, too"):
        read_foreign(str(directory))


@pytest.mark.parametrize("name", ["model.safetensors", "adapter.safetensors", "pytorch_model.bin"])
def test_single_file_directory(tmp_path, trained, name):
    """A directory with one file of weights is read without an index."""
    state = dict(trained[0].state_dict())
    (torch.save if name.endswith("bin") else safetensors.torch.save_file)(state, tmp_path / name)
    assert same(read_foreign(str(tmp_path)).model, state)


def test_import_of_a_run(tmp_path, trained):
    """A run of harness is read from its newest whole checkpoint, or from the one whose directory is named."""
    store, old, _ = checkpoint(f"{tmp_path}/run", *trained)
    train(*trained)
    _, new, _ = checkpoint(f"{tmp_path}/run", *trained)
    found = read_foreign(f"{tmp_path}/run")
    assert same(found.model, dict(trained[0].state_dict()))
    names = [name for name, _ in trained[0].named_parameters()]
    assert same(found.optimizer["state"], dict(zip(names, trained[1].state_dict()["state"].values(), strict=True)))
    assert (found.epoch, found.loss, found.what, found.source) == (4, 0.25, "harness, step 7", f"{tmp_path}/run/{new}")
    named = read_foreign(f"{tmp_path}/run/{old}/")
    assert named.source == f"{tmp_path}/run/{old}"
    assert not same(named.model, found.model)
    flip(tmp_path / "run" / new / "model.safetensors", -5)
    with pytest.raises(Corrupt, match=new):
        read_foreign(f"{tmp_path}/run")
    for directory in (old, new):
        store.delete(f"{directory}/manifest.json")
    with pytest.raises(NoCheckpoint):
        read_foreign(f"{tmp_path}/run")


@pytest.fixture
def distributed(tmp_path, trained):
    """A function that writes a distributed checkpoint."""

    def save(value):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there is no process group
            dcp.save(value, checkpoint_id=tmp_path / "dcp", no_dist=True)
        return f"{tmp_path}/dcp"

    return save


def test_distributed_checkpoint(trained, distributed):
    """A distributed checkpoint is read by a caller who trusts it: weights, optimizer, epoch and loss."""
    model, optimizer = trained
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 5, "loss": 0.5}
    found = read_foreign(distributed(value), trust=True)
    assert same(found.model, dict(model.state_dict()))
    assert same(found.optimizer, optimizer.state_dict())
    assert (found.epoch, found.loss) == (5, 0.5)


def test_distributed_checkpoint_with_names(trained, distributed):
    """The states that torch's own helper makes, keyed by names, load into model and optimizer."""
    state, optimizer_state = get_state_dict(*trained)
    directory = distributed({"app": {"model": state, "optim": optimizer_state}})
    url = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(directory, url, recursive=True)
    for source in (directory, url):
        model = Net(1)
        optimizer = adamw(model)
        load_into(model, optimizer, read_foreign(source, trust=True))
        assert same(model.state_dict(), trained[0].state_dict())
        assert same(optimizer.state_dict(), trained[1].state_dict())


def test_distributed_checkpoint_without_state(trained, distributed):
    """An optimizer without state, of which a distributed checkpoint drops the empty dictionary, is still one."""
    optimizer = torch.optim.SGD(trained[0].parameters())
    found = read_foreign(distributed({"model": trained[0].state_dict(), "optimizer": optimizer.state_dict()}), trust=True)
    assert found.optimizer["state"] == {}


def test_broken_distributed_checkpoint(tmp_path, trained, distributed):
    """Parts that are missing or cut, and metadata that is none, are an error of the tree."""
    directory = distributed({"model": trained[0].state_dict()})
    (part,) = (tmp_path / "dcp").glob("*.distcp")
    metadata = tmp_path / "dcp/.metadata"
    whole = part.read_bytes()
    damages = [
        lambda: part.write_bytes(whole[: len(whole) // 2]),
        part.unlink,
        lambda: metadata.write_bytes(metadata.read_bytes()[:-9]),
        lambda: metadata.write_bytes(pickle.dumps(None)),
    ]
    for damage in damages:
        damage()
        with pytest.raises(Corrupt, match="expected a whole distributed checkpoint"):
            read_foreign(directory, trust=True)


# --- what is refused -------------------------------------------------------------------------------------------------


class Malice:
    """Whoever unpickles this runs a command."""

    def __init__(self, marker) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_malice_does_not_run(tmp_path, legacy):
    """A .pth whose pickle runs a command is refused with the reason, and the command does not run."""
    marker = tmp_path / "marker"
    torch.save({"weight": torch.ones(2), "x": Malice(marker)}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        Unsupported, match=r"a pickle that calls for posix\.system; .* refused.*torch\.save\(model\.state_dict"
    ):
        read_foreign(f"{tmp_path}/a.pth")
    assert not marker.exists()
    torch.load(tmp_path / "a.pth", weights_only=False)
    assert marker.exists(), "the file is really malicious"


def test_malice_in_a_bare_pickle(tmp_path):
    """A pickle that torch.save did not write is never unpickled, whatever it is called."""
    marker = tmp_path / "marker"
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pth").write_bytes(pickle.dumps(Malice(marker), protocol))
        with pytest.raises(Unsupported, match="a bare pickle"):
            read_foreign(f"{tmp_path}/a.pth")
    assert not marker.exists()


def test_malice_in_distributed_metadata(tmp_path, trained, distributed):
    """The metadata of a distributed checkpoint is not unpickled unless the caller trusts it; the error says how to."""
    directory, marker = distributed({"model": trained[0].state_dict()}), tmp_path / "marker"
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(ConfigError, match="is a pickle, and reading it can run any code: pass --trust"):
        read_foreign(directory)
    with pytest.raises(ConfigError, match="--trust"):
        import_run(directory, open_store(f"{tmp_path}/run"))
    assert not marker.exists()
    with pytest.raises(Corrupt):
        read_foreign(directory, trust=True)
    assert marker.exists(), "the metadata is really malicious"


def test_names_that_leave_the_directory(tmp_path, trained, distributed, monkeypatch):
    """An object whose name climbs out of its directory, as object stores allow, is not fetched to where it points."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", f"{tmp_path}/temporary")
    memory, url = fsspec.filesystem("memory"), f"memory://{uuid.uuid4().hex}"
    memory.put(distributed({"model": trained[0].state_dict()}), url, recursive=True)
    memory.pipe_file(f"{url}/../../marker", b"hello")
    with pytest.raises(Corrupt, match="marker: not a name of a file"):
        read_foreign(url, trust=True)
    assert list(tmp_path.rglob("marker")) == []
    assert os.listdir(tmp_path / "temporary") == [], "and nothing is left over"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_pickled_model_is_refused(tmp_path, legacy):
    """A whole pickled model is refused with the sentence that says why and what to do instead."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(nn.Linear(2, 2), tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(Unsupported) as refused:
        read_foreign(f"{tmp_path}/model.pth")
    assert str(refused.value) == (
        f"{tmp_path}/model.pth: expected a state_dict, found a pickle that calls for torch.nn.modules.linear.Linear; "
        "reading it would run code of the file's choice, so it is refused; where the file was made, save tensors and plain "
        "values alone: torch.save(model.state_dict(), PATH)"
    )


def test_a_torchscript_archive_is_refused(tmp_path):
    """A TorchScript archive is refused: it is a program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in the world
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(Unsupported, match="TorchScript program, which is code"):
        read_foreign(f"{tmp_path}/model.pt")


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.ones(2), "found Tensor"),
        ([torch.ones(2)], "found list"),
        ({}, "found nothing"),
        ({"epoch": 3, "loss": 0.5}, "found epoch, loss"),
        ({1: torch.ones(2)}, "found 1"),
        ({"model": {"weight": 3.5}}, "found weight"),
        ({"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}, "found state_dict, model"),
    ],
)
def test_no_weights(tmp_path, value, found):
    """A file that is whole and holds no model that can be told is a mismatch that names what was found."""
    torch.save(value, tmp_path / "saved.pth")
    with pytest.raises(Mismatch, match=found):
        read_foreign(f"{tmp_path}/saved.pth")


def test_sparse_weights(tmp_path):
    """A tensor that is not dense is refused by name."""
    torch.save({"a": torch.ones(2), "b": torch.eye(2).to_sparse()}, tmp_path / "saved.pth")
    with pytest.raises(Unsupported, match=r"saved\.pth: b: expected a dense tensor"):
        read_foreign(f"{tmp_path}/saved.pth")


def flip(path, position, mask=0x10):
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


WRITERS = {
    "zip": torch.save,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save_file,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_was_cut_is_refused(tmp_path, writer):
    """A file that is cut anywhere is refused, and nothing of it is used."""
    WRITERS[writer]({"a": torch.randn(20), "b": torch.arange(5)}, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    lengths = {*range(70), *range(len(data) - 70, len(data)), *range(0, len(data), 23)}
    for length in sorted(lengths):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises((Corrupt, Unsupported), match="cut"):  # without its magic number it is some pickle
            read_foreign(f"{tmp_path}/cut")


def test_a_flipped_bit_is_no_weight(tmp_path):
    """Of a .pth in today's form no altered byte becomes a weight, which torch.load itself would let through."""
    state = {"a": torch.randn(50), "b": torch.arange(50)}
    torch.save(state, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    refused = 0
    for position in random.Random(1).sample(range(len(data)), 400):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (tmp_path / "flipped").write_bytes(changed)
        try:
            found = read_foreign(f"{tmp_path}/flipped").model
        except HarnessError:
            refused += 1
        else:
            assert same(found, state), position
    assert refused > 200  # the rest is padding


def test_pth_without_checksums(tmp_path):
    """torch can be told to write no checksums; such a file is read."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "saved.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(read_foreign(f"{tmp_path}/saved.pth").model, {"a": torch.ones(3)})


def test_garbage_is_refused(tmp_path):
    """Bytes of nobody's format, an archive of something else, and safetensors of an impossible header are refused."""
    generator = random.Random(2)
    for data in (
        b"",
        b"\0",
        b"weights",
        generator.randbytes(1000),
        b"\xff" * 8 + b"{}",
        b"PK\x03\x04" + generator.randbytes(99),
    ):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(Corrupt):
            read_foreign(f"{tmp_path}/a")
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(Mismatch, match="a zip archive of something else"):
        read_foreign(f"{tmp_path}/a")


def test_compressed_pth(tmp_path):
    """A .pth that was compressed afterwards is refused: mapped from the file, its weights would be compressed bytes."""
    for tensor in (torch.zeros(1 << 20), torch.randn(1 << 10)):  # one shrinks to a bomb, one does not shrink at all
        torch.save({"a": tensor}, tmp_path / "plain.pth")
        with (
            zipfile.ZipFile(tmp_path / "plain.pth") as plain,
            zipfile.ZipFile(tmp_path / "compressed.pth", "w", zipfile.ZIP_DEFLATED) as compressed,
        ):
            for name in plain.namelist():
                compressed.writestr(name, plain.read(name))
        with pytest.raises(Corrupt, match="expected an archive that is not compressed"):
            read_foreign(f"{tmp_path}/compressed.pth")


def archive(path, data_pkl, records=()):
    """A file as ``torch.save`` writes it, with any pickle in it."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data_pkl)
        file.writestr("archive/version", "3\n")
        for name, data in records:
            file.writestr(f"archive/data/{name}", data)


def laughs():
    """Ten to the power of thirteen words, in a few hundred bytes."""
    value = ["ha"] * 10
    for _ in range(12):
        value = [value] * 10
    return value


def doubled():
    value = {"a": 1}
    for _ in range(60):
        value = {"a": value, "b": value}
    return value


def endless():
    value = []
    value.extend([value, value])
    return value


def views(whole):
    return {f"view{index}": whole[index:] for index in range(100)}


def text(written):
    return b"X" + len(written).to_bytes(4, "little") + written


def claiming_storages():
    """Tensors of which each claims the bytes of all."""
    dump, count = b"\x80\x02}(", (500_000).to_bytes(4, "little")
    for index in range(400):
        storage = (
            b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"%d" % index) + text(b"cpu") + b"J" + count + b"tQ"
        )
        view = b"K\x00J" + count + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)R"
        dump += text(b"w%d" % index) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"
    return dump + b"u.", [*((str(index), bytes(64)) for index in range(400)), ("z", bytes(2_100_000))]


WEIGHT = {"w": torch.zeros(2, 2)}
COPY_AGAIN = b"h\x00h\x01\x85R"
MADE_TO_DO_HARM = {
    "expanded": lambda path: torch.save({"w": torch.zeros(1).expand(1 << 33)}, path),
    "laughs": lambda path: torch.save({**WEIGHT, "m._extra_state": laughs()}, path),
    "laughs, old form": lambda path: torch.save(
        {**WEIGHT, "m._extra_state": laughs()}, path, _use_new_zipfile_serialization=False
    ),
    "laughs in the optimizer": lambda path: torch.save(
        {"model": WEIGHT, "optimizer": {"state": {}, "param_groups": [{"params": [0], "x": laughs()}]}}, path
    ),
    "doubled": lambda path: torch.save({**WEIGHT, "m._extra_state": doubled()}, path),
    "endless": lambda path: torch.save({**WEIGHT, "m._extra_state": endless()}, path),
    "text": lambda path: torch.save({**WEIGHT, "m._extra_state": ["x" * 1_000_000] * 100_000}, path),
    "views": lambda path: torch.save(views(torch.zeros(1_000_000)), path),
    "storages": lambda path: archive(path, *claiming_storages()),
    "bytes": lambda path: archive(path, b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "bytes by another name": lambda path: archive(path, b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."),
    "copies of text": lambda path: archive(
        path, b"\x80\x02](c_codecs\nencode\nq\x00" + text(b"x" * 3_000_000) + b"q\x01" + COPY_AGAIN * 10_000 + b"e."
    ),
    "copies of copies": lambda path: archive(
        path,
        b"\x80\x02](ccollections\nOrderedDict\nq\x00)R("
        + b"".join(text(b"%06d" % index) + b"N" for index in range(50_000))
        + b"uq\x01"
        + COPY_AGAIN * 10_000
        + b"e.",
    ),
    "copies of what a tensor shows": lambda path: archive(
        path, b"\x80\x02ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n."
    ),
}


IMPORT_WITHIN_LIMITS = """
import resource, sys
from harness.storage.store import open_store
from harness.errors import Corrupt, Unsupported
from harness.interchange import import_run, read_foreign
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (1 << 30),) * 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20,) * 2)
for path in sys.argv[1:]:
    try:
        import_run(path, open_store(f"{path}-run"))
    except (Corrupt, Unsupported) as error:
        assert str(error).startswith(f"{path}: expected "), error
        assert "can hold" in str(error) or "any amount of memory" in str(error), error  # and not: there was no memory
    else:
        raise AssertionError(path)
"""


def test_what_was_made_to_do_harm(tmp_path):
    """A small file that stands for more than any machine holds is an error of one line, soon, in a gigabyte of memory."""
    paths = []
    for name, make in MADE_TO_DO_HARM.items():
        paths.append(f"{tmp_path}/{name}.pth")
        make(paths[-1])
    subprocess.run([sys.executable, "-c", IMPORT_WITHIN_LIMITS, *paths], check=True, timeout=120)
    assert not list(tmp_path.rglob("*-run/**/*.safetensors"))


def test_what_is_shared_for_good_reasons(tmp_path):
    """Views, ties, masks that were expanded, lists in two places: all come in as they are."""
    whole, betas = torch.randn(300, 300), (0.9, 0.99)
    model = {"a": whole, "b": whole[:100], "c": whole, "t": whole.t(), "mask": torch.ones(1, 1, 64).expand(8, 64, 64)}
    groups = [{"params": [0], "betas": betas}, {"params": [1], "betas": betas}]
    torch.save({"model": model, "optimizer": {"state": {}, "param_groups": groups}}, tmp_path / "saved.pth")
    found = read_foreign(str(tmp_path / "saved.pth"))
    assert all(torch.equal(found.model[name], value) for name, value in model.items())
    assert found.optimizer["param_groups"] == groups


def test_an_index_that_leads_elsewhere(sharded):
    """An index names files beside it, and nothing else."""
    place, index, _ = sharded
    content = json.loads(index.read_text())
    for name in ("../secret.safetensors", "/etc/passwd", "", ".", "a/../b", 7, None, ["x"]):
        index.write_text(json.dumps({**content, "weight_map": {"w": name}}))
        with pytest.raises(Corrupt, match=r"missing; .* names it|expected JSON with a weight_map"):
            read_foreign(str(place))


def test_a_run_on_a_server_of_files(tmp_path, trained):
    """Whoever has put a checkpoint behind plain HTTP can start from it: with a slash, its page is a directory's."""
    model, optimizer = trained
    checkpoint(f"{tmp_path}/run", model, optimizer)
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/run/"
        assert same(read_foreign(url).model, dict(model.state_dict()))
        with pytest.raises(ConfigError, match="HTTPFileSystem cannot do that"):
            import_run(f"{tmp_path}/run", open_store(url.replace("/run/", "/other")))
        server.shutdown()


def test_an_exported_directory_without_a_configuration(tmp_path, caplog):
    """Weights do not say what model they are of: transformers would build one of another size."""
    run = checkpoint(f"{tmp_path}/run", nn.Linear(2, 2))
    export_model(*run, f"{tmp_path}/out/")
    assert f"{tmp_path}/out: there are the weights, and no config.json" in caplog.text
    caplog.clear()
    (tmp_path / "out/config.json").write_text("{}")
    export_model(*run, f"file://{tmp_path}/out", overwrite=True)
    assert "config.json" not in caplog.text


def test_a_missing_import_says_what_is_missing(tmp_path):
    """No file, an empty directory, and a directory without weights are told apart."""
    for source in (f"{tmp_path}/absent.pth", str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(ConfigError, match="found nothing"):
            read_foreign(source)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/model.safetensors").write_text("hello")
    with pytest.raises(Mismatch, match=r"expected a run, .*; found notes\.txt"):
        read_foreign(str(tmp_path))


# --- into live objects -----------------------------------------------------------------------------------------------


def foreign(model, optimizer=None, **about):
    """What reading a file with these in it gives."""
    state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()}
    return Foreign("there", "a test", state, None, optimizer and copy.deepcopy(optimizer.state_dict()), **about)


def every_optimizer(model):
    parameters = [*model.parameters()]
    yield torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    yield torch.optim.AdamW(parameters, amsgrad=True)
    yield torch.optim.RMSprop(parameters, momentum=0.5, centered=True)
    yield torch.optim.Adafactor(parameters)
    yield torch.optim.LBFGS(parameters, lr=0.1, history_size=2)
    yield torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.5}])


@pytest.mark.parametrize("index", range(6))
def test_training_goes_on(tmp_path, index):
    """From a saved model and optimizer training goes on bit for bit as it would have without the break."""
    model = Net()
    optimizer = [*every_optimizer(model)][index]
    train(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pth")
    fresh = Net(1)
    fresh_optimizer = [*every_optimizer(fresh)][index]
    said = load_into(fresh, fresh_optimizer, read_foreign(f"{tmp_path}/saved.pth"))
    assert said.startswith("9 entries of the model, the optimizer's state of")
    with open(tmp_path / "saved.pth", "r+b") as file:  # nothing live lies in the file
        file.write(b"\0" * (tmp_path / "saved.pth").stat().st_size)
    train(model, optimizer)
    train(fresh, fresh_optimizer)
    assert same(fresh.state_dict(), model.state_dict())
    assert same(fresh_optimizer.state_dict(), optimizer.state_dict())


def test_options_are_the_configurations(trained):
    """Of a saved optimizer the state is taken; the learning rate and the other options stay as configured."""
    model = Net(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    load_into(model, optimizer, foreign(*trained))
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    assert same(optimizer.state_dict()["state"], trained[1].state_dict()["state"])


def test_start_with_weights_but_no_optimizer(trained):
    """Without an optimizer on either side the weights are loaded alone."""
    model = Net(1)
    optimizer = adamw(model)
    assert load_into(model, optimizer, foreign(trained[0])) == "9 entries of the model"
    assert optimizer.state_dict()["state"] == {}
    assert load_into(model, None, foreign(*trained)) == "9 entries of the model"
    assert same(model.state_dict(), trained[0].state_dict())


def test_start_reaches_the_model_within_its_wrappers(trained, group):
    """The live model may be wrapped; the weights reach the plain one within."""
    model = Net(1)
    load_into(nn.parallel.DistributedDataParallel(model), None, foreign(trained[0]))
    assert same(model.state_dict(), trained[0].state_dict())


def test_model_that_does_not_fit(trained):
    """A name, shape or dtype that differs is listed with the file, and nothing live is touched."""
    source = foreign(*trained)
    del source.model["first.bias"]
    source.model.update(
        {"more": torch.ones(1), "last.bias": torch.ones(3), "last.weight": source.model["last.weight"].half()}
    )
    model = Net(1)
    optimizer = adamw(model)
    with pytest.raises(Mismatch) as mismatch:
        load_into(model, optimizer, source)
    said = str(mismatch.value)
    assert said.startswith("there: ")
    assert "first.bias: not in the checkpoint; the model has float32[4]" in said
    assert "more: not in the model; the checkpoint has float32[1]" in said
    assert "last.bias: the checkpoint has float32[3], the model has float32[2]" in said
    assert "last.weight: the checkpoint has float16[2, 4], the model has float32[2, 4]" in said
    assert same(model.state_dict(), Net(1).state_dict())
    assert optimizer.state_dict()["state"] == {}


def test_model_that_is_not_built(trained):
    """A model with parameters that have no shape yet is told to be one."""
    with pytest.raises(Mismatch, match=r"first\.weight: .* an uninitialized parameter"):
        model = Net(1)
        model.first = nn.LazyLinear(4)
        load_into(model, None, foreign(trained[0]))


def test_lightning_prefix(tmp_path, trained):
    """A model that was saved as a child of another module is found where all names share that step."""
    saved = {"state_dict": {f"net.{name}": value for name, value in trained[0].state_dict().items()}}
    torch.save(saved, tmp_path / "saved.ckpt")
    model = Net(1)
    load_into(model, None, read_foreign(f"{tmp_path}/saved.ckpt"))
    assert same(model.state_dict(), trained[0].state_dict())


def test_tied_weights_saved_once(tmp_path):
    """safetensors' own writer keeps one name of tied weights; the model gets them under all of its names."""
    model, fresh = small_gpt(), gpt.GPT(1, 2, 8, 4, 0.0)
    safetensors.torch.save_model(model, f"{tmp_path}/model.safetensors")
    found = read_foreign(f"{tmp_path}/model.safetensors")
    assert len({"head.weight", "embed.weight"} & found.model.keys()) == 1
    load_into(fresh, None, found)
    assert same(fresh.state_dict(), model.state_dict())


def test_tied_weights_that_differ():
    """A file with two values for what is one tensor in the model does not fit: one of the two would be lost."""
    source = foreign(small_gpt())
    source.model["head.weight"] = source.model["head.weight"] + 1
    with pytest.raises(Mismatch, match=r"head\.weight: one tensor with embed\.weight"):
        load_into(small_gpt(), None, source)


def sgd(model):
    return torch.optim.SGD(model.parameters(), momentum=0.9)


def two_groups(model):
    parameters = [*model.parameters()]
    return torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])


MISFITS = {
    "another optimizer": (sgd, r"group 0: option 'amsgrad' is only in the file\n.*option 'betas' is only in the file"),
    "another option": (
        lambda model: adamw(model, amsgrad=True),
        "option 'amsgrad': the file has False, the optimizer has True",
    ),
    "more groups": (two_groups, "the file has 1, the optimizer has 2"),
    "fewer parameters": (lambda model: adamw(model.last), "group 0: the file has 6 parameters, the optimizer has 2"),
    "another order": (lambda model: torch.optim.AdamW([*model.parameters()][::-1]), r"exp_avg of 0: the file has \[4, 3\]"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_optimizer_that_does_not_fit(trained, misfit):
    """A saved optimizer of another kind, with other groups or parameters is told, and nothing live is touched."""
    make, problem = MISFITS[misfit]
    model = Net(1)
    optimizer = make(model)
    with pytest.raises(Mismatch, match=f"(?s)there: the optimizer's state does not fit.*{problem}"):
        load_into(model, optimizer, foreign(*trained))
    assert same(model.state_dict(), Net(1).state_dict())
    assert optimizer.state_dict()["state"] == {}


def test_named_optimizer_that_does_not_fit(tmp_path, trained):
    """An optimizer of a run is checked by its class and by the names of its parameters."""
    checkpoint(f"{tmp_path}/run", *trained)
    source = read_foreign(f"{tmp_path}/run")
    model = Net(1)
    with pytest.raises(Mismatch, match="class: the file has AdamW, the task has Adam"):
        load_into(model, torch.optim.Adam(model.parameters()), source)
    with pytest.raises(Mismatch, match=r"first\.bias is only in the file"):
        load_into(model, adamw(model.last), source)
    optimizer = torch.optim.AdamW([*model.parameters()][::-1])
    load_into(model, optimizer, source)  # names are found in any order
    expected = trained[1].state_dict()["state"]
    assert same(optimizer.state_dict()["state"], {5 - number: expected[number] for number in expected})


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({9: {}}, "expected entries of a parameter"),
        ({0: 3}, "expected entries of a parameter"),
        ({"x": {}}, "expected entries of a parameter"),
        ({0: {"exp_avg": torch.ones(4, 3)}}, "loading it raises KeyError: 'step'"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(trained, state, problem):
    """State for parameters that no group has, that is no state at all or lacks entries, is told, and nothing is touched."""
    source = dataclasses.replace(foreign(trained[0]), optimizer={**trained[1].state_dict(), "state": state})
    model = Net(1)
    optimizer = adamw(model)
    with pytest.raises(Mismatch, match=problem):
        load_into(model, optimizer, source)
    assert same(model.state_dict(), Net(1).state_dict())
    assert same(optimizer.state_dict(), adamw(model).state_dict())
    train(model, optimizer)  # it still works


# --- as a checkpoint -------------------------------------------------------------------------------------------------


def test_import(tmp_path, trained):
    """An import is a checkpoint of step 0 with the parts of the file, which loads as the file itself would."""
    model, optimizer = trained
    saved = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 5, "loss": 0.5}
    torch.save(saved, tmp_path / "saved.pth")
    store = open_store(f"{tmp_path}/run")
    directory, found = import_run(f"{tmp_path}/saved.pth", store)
    entry = Catalog(store).newest()
    verify(Catalog(store), entry)
    assert (entry.directory, entry.step, found.epoch) == (directory, 0, 5)
    assert entry.manifest.meta["epoch"] == 5
    assert entry.manifest.meta["metrics"] == {"last": {"loss": 0.5}}
    assert entry.manifest.meta["imported"] == {"source": f"{tmp_path}/saved.pth", "what": found.what}
    assert entry.manifest.parts["model"].digest == commit.digest_of(dict(model.state_dict()), "model")
    again = read_foreign(f"{tmp_path}/run")
    assert same(again.model, dict(model.state_dict()))
    assert same(again.optimizer, optimizer.state_dict())
    assert (again.epoch, again.loss) == (5, 0.5)


def test_import_of_weights_alone(tmp_path):
    """Weights without an optimizer make a checkpoint without one, and a loss that is no number is left out."""
    torch.save({"model": Net().state_dict(), "loss": float("nan")}, tmp_path / "saved.pth")
    store = open_store(f"memory://{uuid.uuid4().hex}")
    import_run(f"{tmp_path}/saved.pth", store)
    manifest = Catalog(store).newest().manifest
    assert manifest.parts.keys() == {"model", "training"}
    assert manifest.meta["metrics"] == {"last": {}}


def test_import_of_what_links_lead_to(tmp_path):
    """The cache of Hugging Face's hub has a directory of links for each revision; the files lie elsewhere."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    for place in (blobs, snapshot):
        place.mkdir(parents=True)
    safetensors.torch.save_file(dict(Net().state_dict()), blobs / "abcd")
    (blobs / "ef01").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcd")
    (snapshot / "config.json").symlink_to("../../blobs/ef01")
    (tmp_path / "main").symlink_to(snapshot)
    for source in (snapshot, tmp_path / "main", snapshot / "model.safetensors"):
        assert same(read_foreign(str(source)).model, dict(Net().state_dict()))
    import_run(str(snapshot), open_store(f"{tmp_path}/run"))
    assert same(read_foreign(f"{tmp_path}/run").model, dict(Net().state_dict()))


def test_import_of_a_distributed_checkpoint(tmp_path, trained, distributed):
    """A distributed checkpoint that was trusted once is a checkpoint without pickle from then on."""
    source = distributed({"model": trained[0].state_dict(), "optimizer": trained[1].state_dict()})
    import_run(source, open_store(f"{tmp_path}/run"), trust=True)
    found = read_foreign(f"{tmp_path}/run")
    assert same(found.model, dict(trained[0].state_dict()))
    assert same(found.optimizer, trained[1].state_dict())


def test_import_needs_an_unused_url(tmp_path):
    """Nothing is imported over a run."""
    store, directory, _ = checkpoint(f"{tmp_path}/run", Net())
    torch.save(Net(1).state_dict(), tmp_path / "saved.pth")
    with pytest.raises(ConfigError, match="expected an unused URL, found a run"):
        import_run(f"{tmp_path}/saved.pth", store)
    assert [entry.directory for entry in Catalog(store).entries()] == [directory]


def test_import_that_fails_leaves_no_checkpoint(tmp_path):
    """What cannot be read or written makes no checkpoint, and the URL can be used for the next try."""
    store = open_store(f"{tmp_path}/run")
    (tmp_path / "saved.pth").write_bytes(b"garbage")
    with pytest.raises(Corrupt):
        import_run(f"{tmp_path}/saved.pth", store)
    torch.save({"a": torch.ones(2), "b._extra_state": torch.Generator}, tmp_path / "saved.pth")
    with pytest.raises(Unsupported):
        import_run(f"{tmp_path}/saved.pth", store)
    torch.save({"a": torch.ones(2)}, tmp_path / "saved.pth")
    import_run(f"{tmp_path}/saved.pth", store)
    assert [entry.state for entry in Catalog(store).entries()] == ["whole"]
