"""Reading back: every byte is verified before a value is handed out; errors say where, what was expected, what was found."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint import commit, load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Attempt, FileInfo, Manifest, Slices, TensorInfo, checksum, digest, encode_header
from harness.errors import Corrupt, StoreError, UnknownFormat
from harness.storage.store import Store, open_store
from tests.support.states import bits

ATTEMPT = Attempt("000001-00000000")


def parts(step: int = 1) -> dict[str, dict]:
    weight = torch.arange(60.0).view(6, 10) + step
    optimizer = {"state": {"0": {"step": torch.tensor(7.0), "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "model": {"weight": weight, "tied": weight, "half": weight.bfloat16()},
        "optimizer": optimizer,
        "training": {"a": (1,)},
    }


@dataclasses.dataclass
class Written:
    """A checkpoint on a local disk."""

    store: Store
    directory: str
    manifest: Manifest
    path: Path

    def read(self, **options) -> dict:
        return load.read(self.store, self.directory, self.manifest, **options)


@pytest.fixture(params=["one thread", "several threads"])
def written(tmp_path, monkeypatch, request):
    if request.param == "several threads":
        monkeypatch.setattr("harness.runtime.threads.WORTH_THREADS_BYTES", 0)
    store = open_store(str(tmp_path))
    directory, manifest = commit.write(store, parts(), step=1, attempt=ATTEMPT, shard_bytes=200)
    return Written(store, directory, manifest, tmp_path / directory)


# --- what is read ----------------------------------------------------------------------------------------------------


def test_reading_gives_what_was_written(written):
    """Bit for bit, ties included, in memory that belongs to nobody else."""
    found = written.read()
    assert bits(found) == bits(parts())
    assert found["model"]["tied"] is found["model"]["weight"]
    found["model"]["half"].zero_()
    assert bits(written.read()) == bits(parts())
    assert len({tensor.untyped_storage().data_ptr() for tensor in (found["model"]["half"], found["model"]["weight"])}) == 2


def test_the_memory_of_tensors(tmp_path):
    """Large ones lie as torch's own would, whatever is around them; what becomes of one is nothing to the others."""
    sizes = {"a": 300_001, "b": 70_000, "c": 5, "d": 0, "e": 100_003, "f": 65_536}
    model = {name: torch.arange(size).to(torch.uint8) for name, size in sizes.items()}
    store = open_store(str(tmp_path))
    found = load.read(store, *commit.write(store, {"model": model}, step=1, attempt=ATTEMPT))["model"]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    assert [tensor.untyped_storage().nbytes() for tensor in found.values()] == [tensor.numel() for tensor in found.values()]
    kept = found.pop("b")
    for tensor in found.values():
        tensor.fill_(1)
    del found, tensor
    assert torch.equal(kept, model["b"])


def test_reading_some_parts_needs_no_others(written):
    """Who wants the weights alone need not have the optimizer's state, or pay for it."""
    for file in written.manifest.parts["optimizer"].files:
        os.unlink(written.path / file)
    assert bits(written.read(parts=["model", "training"])) == bits({name: parts()[name] for name in ("model", "training")})
    with pytest.raises(Corrupt, match=r"optimizer.*missing"):
        written.read()


audited: list[str] | None = None


def note(event: str, _: object) -> None:
    if audited is not None and event.startswith(("pickle", "exec")):
        audited.append(event)


sys.addaudithook(note)


def test_reading_runs_no_code(written):
    """The interpreter itself says that nothing was unpickled or executed."""
    global audited  # noqa: PLW0603  # an audit hook cannot be removed, only silenced
    written.read()  # so that everything is imported
    audited = []
    try:
        written.read()
        assert audited == []
        exec("")
        assert audited  # the hook does see things
    finally:
        audited = None


# --- damaged objects -------------------------------------------------------------------------------------------------


def files_of(manifest: Manifest) -> list[FileInfo]:
    return [file for part in manifest.parts.values() for file in manifest.files if file.name in part.files]


def swapped(data: bytes) -> bytes:
    return data[:-8] + data[-4:] + data[-8:-4]


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (None, "missing; expected {bytes} bytes"),
        (lambda data: b"", "expected {bytes} bytes, found 0"),
        (lambda data: data[:7], "expected {bytes} bytes, found 7"),
        (lambda data: data[:20], "expected {bytes} bytes, found 20"),
        (lambda data: data[:-1], "expected {bytes} bytes, found {one_less}"),
        (lambda data: data + b"\0", "expected {bytes} bytes, found more"),
        (lambda data: data + data, "expected {bytes} bytes, found more"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "expected {checksum}, found xxh3_128:"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 128]), "expected {checksum}, found xxh3_128:"),
        (lambda data: b"\xff" * 8 + data[8:], "a header of 18446744073709551615 bytes in a file of {bytes}"),
        (lambda data: bytes(8) + data[8:], "not JSON"),
        (lambda data: data[:8] + b"[" + data[9:], "not JSON"),
        (lambda data: bytes(len(data)), "not JSON"),
        (lambda data: data.replace(b'"pt"', b'"pT"'), "expected {checksum}, found xxh3_128:"),
    ],
    ids=[
        "missing", "empty", "cut in the length", "cut in the header", "cut by one", "longer by one", "doubled", "low bit",
        "high bit", "endless header", "no header", "bad header", "zeros", "other metadata",
    ],
)  # fmt: skip
def test_corrupt_shards(written, damage: Callable[[bytes], bytes] | None, found):
    """Each kind of damage to each shard is Corrupt and names the shard, what was expected and what was found."""
    for file in files_of(written.manifest):
        path = written.path / file.name
        data = path.read_bytes()
        path.unlink() if damage is None else path.write_bytes(damage(data))
        with pytest.raises(Corrupt) as caught:
            written.read()
        expected = found.format(bytes=file.bytes, one_less=file.bytes - 1, checksum=file.checksum)
        assert str(caught.value).startswith(f"{written.directory}/{file.name}: {expected}")
        path.write_bytes(data)
    assert bits(written.read()) == bits(parts())


def test_shards_of_other_checkpoints(written):
    """A shard that is whole, and another checkpoint's or another place's, is not this one's."""
    other, _ = commit.write(written.store, parts(step=2), step=2, attempt=ATTEMPT, shard_bytes=200)
    model = written.manifest.parts["model"].files
    for target, source in ((model[0], f"../{other}/{model[0]}"), (model[0], model[1])):
        path = written.path / target
        data = path.read_bytes()
        path.write_bytes((written.path / source).read_bytes())
        with pytest.raises(Corrupt, match=rf"{written.directory}/{target}: "):
            written.read()
        path.write_bytes(data)


def test_corrupt_index(written):
    """The index is not needed for reading; a checkpoint with a wrong one is not whole all the same."""
    index = written.path / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes().replace(b"weight", b"height", 1))
    with pytest.raises(Corrupt, match=r"model\.safetensors\.index\.json: expected \d+ bytes with xxh3.*, found"):
        written.read()
    assert written.read(parts=["training"]) == {"training": {"a": (1,)}}


def test_a_store_that_fails_is_no_damage(written):
    """What cannot be read just now is an error of storage: the checkpoint may be whole."""
    path = written.path / written.manifest.files[0].name
    path.unlink()
    path.symlink_to(path)  # a loop: reading it fails, and not for want of a file
    with pytest.raises(StoreError):
        written.read()


# --- another format --------------------------------------------------------------------------------------------------


def test_another_version_of_the_format(written):
    """A checkpoint of a version that this program does not know is told apart from a corrupt one."""
    manifest = written.path / "manifest.json"
    text = manifest.read_bytes().replace(b'"version": 1', b'"version": 3').rpartition(b' "checksum"')[0]
    manifest.write_bytes(text + f' "checksum": "{checksum(text)}"\n}}'.encode())
    with pytest.raises(UnknownFormat, match=rf"{written.directory}/manifest\.json: expected harness-checkpoint version 1"):
        Catalog(written.store).open(written.directory)


def test_another_checksum_algorithm(written):
    """A checksum that this program cannot compute is no reason to go without one."""
    for unknown in ("sha3:00", "", "xxh3_128"):
        file = dataclasses.replace(written.manifest.files[0], checksum=unknown)
        changed = dataclasses.replace(written.manifest, files=[file, *written.manifest.files[1:]])
        with pytest.raises((UnknownFormat, Corrupt)):
            load.read(written.store, written.directory, changed)


# --- a closed world --------------------------------------------------------------------------------------------------


def forged(written: Written, infos: list[TensorInfo], data: bytes, **part) -> Manifest:
    """A manifest whose model is one shard with this content; all checksums fit, but for what ``part`` says."""
    shard = encode_header(infos) + data
    (written.path / "model.safetensors").write_bytes(shard)
    files = [FileInfo("model.safetensors", len(shard), checksum(shard))]
    hashes, start = {}, 0
    for info in infos:
        hashes[info] = checksum(data[start : start + info.nbytes])
        start += info.nbytes
    tree, aliases = part.get("tree", {}), part.get("aliases", {})
    by_path = {info.path: info for info in infos}
    for further, stored in aliases.items():
        with contextlib.suppress(KeyError):
            hashes[dataclasses.replace(by_path[stored], path=further)] = hashes[by_path[stored]]
    body = {"files": ["model.safetensors"], "tree": tree, "aliases": aliases, "digest": digest(hashes, tree)} | part
    text = dataclasses.replace(written.manifest, files=files, parts={}).encode()
    value = json.loads(text) | {"parts": {"model": body}}
    del value["checksum"]
    text = json.dumps(value, indent=1).removesuffix("\n}").encode() + b",\n"
    return Manifest.decode(text + f' "checksum": "{checksum(text)}"\n}}'.encode())


ONE = [TensorInfo("a", "float32", (2,))]


def test_what_was_forged_is_right_but_for_the_forgery(written):
    """The checks below fail for the reasons that they name."""
    manifest = forged(written, ONE, bytes(8), tree={"b": {"$tuple": [1]}}, aliases={"c": "a"})
    found = load.read(written.store, written.directory, manifest)["model"]
    assert bits(found) == bits({"a": torch.zeros(2), "b": (1,), "c": torch.zeros(2)})


@pytest.mark.parametrize(
    ("forgery", "problem"),
    [
        ({"digest": checksum(b"other")}, "model: expected digest xxh3_128:.*, found xxh3_128:"),
        ({"tree": {"b": {"$tensor": True}}}, "does not fit the tensors"),
        ({"tree": {"a": {"x": 1}, "b": {"$nonsense": 1}}}, "does not fit the tensors"),
        ({"tree": {"a": 1}}, "tensors without a place in the tree: a"),
        ({"aliases": {"c": "nothing"}}, "'c' is an alias of 'nothing', which is missing"),
        ({"aliases": {"a": "a"}}, "'a' is an alias of 'a', but is stored as a tensor of its own"),
        ({"aliases": {"c": "d", "d": "a"}}, "'c' is an alias of 'd', which is missing"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_parts_that_do_not_fit_together(written, forgery, problem):
    """A tensor without a place, a place without a tensor, a tie to nothing: nothing is left over or made up."""
    with pytest.raises(Corrupt, match=problem):
        load.read(written.store, written.directory, forged(written, ONE, bytes(8), **forgery))


def test_a_tensor_in_two_shards(written):
    """Two shards that both have a tensor of one name contradict each other."""
    manifest = forged(written, ONE, bytes(8))
    (written.path / "twin.safetensors").write_bytes((written.path / "model.safetensors").read_bytes())
    files = [manifest.files[0], dataclasses.replace(manifest.files[0], name="twin.safetensors")]
    part = dataclasses.replace(manifest.parts["model"], files=["model.safetensors", "twin.safetensors"])
    with pytest.raises(Corrupt, match=r"twin\.safetensors: a is in another shard too"):
        load.read(written.store, written.directory, dataclasses.replace(manifest, files=files, parts={"model": part}))


@pytest.mark.parametrize("lies_in_pieces", [False, True])
def test_a_hole_larger_than_the_memory(tmp_path, lies_in_pieces):
    """A file of 14 TB that takes no room on the disk, in a manifest that fits it: damage, told with the size."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this machine promises any memory, and kills who uses it")
    store, size_bytes = open_store(str(tmp_path)), 14 << 40
    directory, manifest = commit.write(store, {"model": {"weight": torch.ones(3)}}, step=1, attempt=ATTEMPT)
    header = encode_header([TensorInfo("weight~20" if lies_in_pieces else "weight", "uint8", (size_bytes,))])
    with (tmp_path / directory / "model.safetensors").open("wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + size_bytes)
        except OSError:
            pytest.skip("this file system has no files of 14 TB")
    (shard,) = manifest.files
    part = manifest.parts["model"]
    if lies_in_pieces:
        part = dataclasses.replace(part, slices={"weight": Slices("uint8", [size_bytes], [0])})
    hostile = dataclasses.replace(
        manifest, files=[dataclasses.replace(shard, bytes=len(header) + size_bytes)], parts={"model": part}
    )
    (tmp_path / directory / "manifest.json").write_bytes(hostile.encode())
    (entry,) = Catalog(store).entries()
    assert entry.state == "whole", "for all that its sizes say"
    with pytest.raises(
        Corrupt, match=f"weight: expected a tensor that fits into this machine's memory, found {size_bytes} b"
    ):
        load.read(store, directory, entry.manifest)
