"""The weights of a checkpoint, in the forms that others read.

An export is whole or not there: a file appears when it is complete, and a directory's index, without which its shards are
nothing, is written last. Tied weights are written under each of their names, so that ``load_state_dict`` with
``strict=True`` takes every form (safetensors' own ``save_model`` keeps one name, and then it does not).
"""

import contextlib
import io
import json
import logging
import os
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, BinaryIO

import torch

from harness import torch_private
from harness.checkpoint import load, tree
from harness.checkpoint.format import DTYPES, INDEX_SUFFIX, Manifest, TensorInfo, encode_header, plan_shards, shard_name
from harness.errors import ConfigError, Corrupt, Mismatch, StoreError, Unsupported
from harness.interchange.disk_memory import on_disk
from harness.interchange.files import NAMES
from harness.interchange.foreign import split
from harness.storage.direct_io import Buffer
from harness.storage.store import Store, open_store
from harness.storage.urls import shown

_INDEX = f"model{INDEX_SUFFIX}"
_MODEL_FILE = re.compile(r"(base/)?(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors|(base/)?" + re.escape(_INDEX))
_UNBOUNDED_BYTES = 1 << 62
_CONFIG = "config.json"
_NO_CONFIG = (
    "%s: there are the weights, and no config.json; without one transformers' from_pretrained builds a model of its default "
    "size (7B for Llama), or fails. Put the model's there: model.config.save_pretrained(DIRECTORY)"
)

log = logging.getLogger(__name__)


def export_model(
    store: Store,
    directory: str,
    manifest: Manifest,
    out: str,
    *,
    part: str = "model",
    shard_bytes: int = 5 << 30,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Writes the model of a checkpoint, every byte verified, to ``out``; returns the sizes of the files by their names.

    ``part`` is the model's name in the state: a module, or in a checkpoint without a run any flat dictionary of tensors.
    ``out`` is a path or URL: ``NAME.safetensors``; ``NAME.pth`` (or ``.pt``, ``.bin``), for
    ``model.load_state_dict(torch.load(out, weights_only=True))``; or a directory (``NAME/``, or a local one that exists),
    which gets Hugging Face's layout with shards of at most ``shard_bytes``, and what ``from_pretrained`` needs beside the
    weights, where the run knows it (``harness.integrations.pretrained``). ``overwrite`` replaces a file in one step; in a
    directory, the model that is there goes first, and a missing ``config.json`` is reported: weights do not say what
    model they belong to. ``storage_options`` are those of ``out``.
    """
    if part not in manifest.parts:
        found = ", ".join(manifest.parts) or "none"
        raise Mismatch(f"{store.url}/{directory}: expected a part called {part}, found {found} (--part says which)")
    target = open_store(out, storage_options)
    if is_directory := out.endswith("/") or (target.is_local and os.path.isdir(target.root)):
        name, old = "", [name for name in target.list() if _MODEL_FILE.fullmatch(name)]
    elif out.endswith((".safetensors", ".pth", ".pt", ".bin")):
        target, name = split(target)
        old = [] if target.stat(name) is None else [name]
    else:
        raise ConfigError(f"{shown(out)}: expected NAME.safetensors, NAME.pth or a directory (NAME/)")
    if old and not overwrite:
        raise ConfigError(f"{target.url}/{old[0]}: is there already; expected a name that is not used, or --overwrite")
    known = next((name for name, each in manifest.parts.items() if is_directory and _folders(each.tree)), part)
    parts = load.read(store, directory, manifest, manifest.parts.keys() & {part, known, "training"}, memory=on_disk)
    versions = parts.get("training", {}).get("module_versions")
    if versions is not None and part not in versions:
        raise Mismatch(f"{store.url}/{directory}: expected a module, one of {', '.join(versions)}; found {part}")
    model, out = parts[part], shown(out)
    if is_directory:
        folders = _folders(parts[known]) or {"": {"weights": "model"}}
        written = _put_folders(target, _tensors(model, out), folders, shard_bytes, old)
        if not any(name.endswith("config.json") for name in written) and target.stat(_CONFIG) is None:
            log.warning(_NO_CONFIG, target.url)
        return written
    if name.endswith(".safetensors"):
        tensors = _tensors(model, out)
        return {name: _put_shard(target, name, tensors, _shards(tensors, _UNBOUNDED_BYTES)[0])}
    return {name: _put_torch_file(target, name, _state_dict(model, (versions or {}).get(part)))}


# --- safetensors -----------------------------------------------------------------------------------------------------


def _tensors(model: Mapping[str, Any], out: str) -> dict[str, torch.Tensor]:
    """The model's entries, all of which safetensors can hold. Raises ``Unsupported``."""
    for name, value in model.items():
        what = None
        if not isinstance(value, torch.Tensor):
            what = f"extra state of type {type(value).__name__}"
        elif DTYPES[str(value.dtype).removeprefix("torch.")][0] is None:
            what = f"a tensor of dtype {value.dtype}"
        if what is not None:
            raise Unsupported(f"{out}: {name} is {what}, for which safetensors has no form; export to a .pth instead")
    return dict(model)


def _shards(tensors: Mapping[str, torch.Tensor], limit_bytes: int) -> list[list[TensorInfo]]:
    # How a tensor lay in memory is nothing that other programs would look for.
    infos = (replace(tree.info(name, tensor), strides=None) for name, tensor in tensors.items())
    return plan_shards(infos, limit_bytes) or [[]]


def _put_folders(
    store: Store, tensors: dict[str, torch.Tensor], folders: Mapping[str, Any], shard_bytes: int, old: Iterable[str]
) -> dict[str, int]:
    """Writes the model as what ``folders`` say, by their names: one folder, or those of adapters and of their base."""
    for folder, each in folders.items():
        for name in (each["weights"], *each.get("files", {})):
            if {"", ".", ".."} & {*f"{folder}{name}".split("/")}:  # a checkpoint must not lead out of the directory
                raise Corrupt(f"{store.url}/{folder}{name}: not a name of a file")
    for name in sorted(old, key=lambda name: not name.endswith(_INDEX)):  # what leads to the shards goes before they do
        store.delete(name)
    written: dict[str, int] = {}
    names = {name: None if each.get("names") is None else json.loads(_text(each["names"])) for name, each in folders.items()}
    try:
        for folder, each in folders.items():
            for name, data in each.get("files", {}).items():
                written[f"{folder}{name}"] = _put(store, f"{folder}{name}", lambda data=data: [_text(data)], data.numel())
            called = names[folder]
            own = tensors if called is None else {key: tensors[name] for key, name in called.items()}
            limit_bytes = shard_bytes if each["weights"] == "model" else _UNBOUNDED_BYTES
            _put_shards(store, folder, each["weights"], own, limit_bytes, written)
        if any(called is not None for called in names.values()):
            text = json.dumps({f"{folder}{folders[folder]['weights']}": called for folder, called in names.items()}).encode()
            written[NAMES] = _put(store, NAMES, lambda: [text], len(text))
    except BaseException:
        for name in written:
            with contextlib.suppress(StoreError):  # what matters is the exception that is under way
                store.delete(name)
        raise
    return written


def _put_shards(
    store: Store, folder: str, word: str, tensors: Mapping[str, torch.Tensor], limit_bytes: int, written: dict[str, int]
) -> None:
    shards = _shards(tensors, limit_bytes)
    names = [shard_name(word, index, len(shards)) for index in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        written[f"{folder}{name}"] = _put_shard(store, f"{folder}{name}", tensors, shard)
    if len(shards) > 1:
        places = {info.path: name for name, shard in zip(names, shards, strict=True) for info in shard}
        total_bytes = sum(tensor.nbytes for tensor in tensors.values())
        index = json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": places}, indent=1).encode()
        written[f"{folder}{_INDEX}"] = _put(store, f"{folder}{_INDEX}", lambda: [index], len(index))


def _folders(part: Any) -> Mapping[str, Any]:
    """What a part of a checkpoint says of the folders that ``from_pretrained`` reads; empty where it is no such part."""
    state = part.get("state") if isinstance(part, Mapping) else None
    folders = state.get("pretrained") if isinstance(state, Mapping) else None
    is_one = isinstance(folders, Mapping) and all(
        isinstance(each, Mapping) and "weights" in each for each in folders.values()
    )
    return folders if is_one and folders is not None else {}


def _text(data: torch.Tensor) -> bytes:
    return data.numpy().tobytes()


def _put_shard(store: Store, name: str, tensors: Mapping[str, torch.Tensor], shard: list[TensorInfo]) -> int:
    header = encode_header(shard)

    def chunks() -> Iterator[Buffer]:
        yield header
        for info in shard:
            yield from tree.raw_bytes(tensors[info.path])

    return _put(store, name, chunks, len(header) + sum(info.nbytes for info in shard))


# --- torch.save ------------------------------------------------------------------------------------------------------


def _state_dict(model: Mapping[str, Any], versions: Mapping[str, int | None] | None) -> OrderedDict[str, Any]:
    """As ``model.state_dict()`` gives it, with the versions of the modules, by which they load older states."""
    state = OrderedDict(model)
    if versions is not None:
        dots = [(name, index) for name in model for index, letter in enumerate(name) if letter == "."]
        prefixes = {"", *(name[: index + 1] for name, index in dots), *versions}
        torch_private.set_versions(state, {prefix.removesuffix("."): versions.get(prefix, 1) for prefix in sorted(prefixes)})
    return state


def _put_torch_file(store: Store, name: str, model: Mapping[str, Any]) -> int:
    for key, value in model.items():
        if not isinstance(value, torch.Tensor):
            _check_plain(f"{store.url}/{name}: {key}", value)
    with tempfile.TemporaryFile() as file:  # the size is known only afterwards
        try:
            torch.save(model, file)
            file.flush()
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as either
            cause: BaseException = error
            while cause.__context__ is not None:  # the first one; torch's writer complains again when it is closed
                cause = cause.__context__
            reason = str(cause).partition("\n")[0]
            raise StoreError(f"put {store.url}/{name}: writing it to {tempfile.gettempdir()} first: {reason}") from None
        return _put(store, name, lambda: _pieces(file), file.seek(0, os.SEEK_END))


def _pieces(file: BinaryIO) -> Iterator[Buffer]:
    file.seek(0)
    while piece := file.read(1 << 20):
        yield piece


def _check_plain(where: str, value: Any) -> None:
    """Raises ``Unsupported`` for extra state that ``torch.load`` with ``weights_only=True`` would refuse."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError:
        what = f"{type(value).__module__}.{type(value).__qualname__}"
        raise Unsupported(f"{where}: expected tensors and plain values, found {what}, which weights_only refuses") from None


def _put(store: Store, name: str, chunks: Any, size_bytes: int) -> int:
    store.put(name, chunks, size_bytes)
    if (found := store.stat(name)) != size_bytes:
        raise StoreError(f"put {store.url}/{name}: sent {size_bytes} bytes, the store has {found}")
    return size_bytes
