"""Files that others wrote, to values: what ``torch.save`` writes, safetensors, torch's distributed checkpoints.

What a file is, its first bytes say, not its name. No code in a file is run: pickles go through ``torch.load`` with
``weights_only=True``, which builds tensors and plain values and refuses the rest. The exception is the metadata of a
distributed checkpoint, which torch unpickles without restraint; it is read only for a caller who says that it is trusted.

Tensors are mapped from the file where that is possible: a caller who keeps one, copies it.
"""

import functools
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO, Self

import torch
from fsspec.implementations.local import LocalFileSystem

from harness.checkpoint.format import HEADER_LIMIT_BYTES, MANIFEST, MANIFEST_LIMIT_BYTES, decode_header
from harness.checkpoint.store import open_store
from harness.errors import ConfigError, Corrupt, HarnessError, Mismatch, StoreError, Unsupported

DCP_METADATA = ".metadata"
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what torch.save wrote first until it wrote zip archives
_REFUSED = re.compile(r"GLOBAL (\S+)")  # in torch's message: the class or function that the pickle names
_SAFE_FORM = "save tensors and plain values alone: torch.save(model.state_dict(), PATH)"


class Place:
    """The files at a URL, as paths on this machine: local ones where they lie, others fetched when they are asked for."""

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        self.store = open_store(url, storage_options)
        self.url = self.store.url
        self._size_bytes = self.store.stat("")
        self.is_file = self._size_bytes is not None
        self._fetched: tempfile.TemporaryDirectory[str] | None = None

    @functools.cached_property
    def files(self) -> Mapping[str, int]:
        """The files with their sizes. Listed when they are first asked for: a run's are of no interest."""
        found = {"": self._size_bytes} if self._size_bytes is not None else self.store.list()
        if not found:
            raise ConfigError(f"{self.url}: expected a file or a directory with files, found nothing")
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fetched is not None:
            self._fetched.cleanup()  # what is mapped stays until the last tensor of it is gone

    def shown(self, name: str) -> str:
        """How messages call a file."""
        return f"{self.url}/{name}".rstrip("/")

    def path(self, name: str = "") -> str:
        """Where a file is on this machine."""
        if isinstance(self.store.fs, LocalFileSystem):
            return os.path.join(self.store.root, name) if name else self.store.root
        return self._fetch(name)

    def directory(self) -> str:
        """Where the directory with all its files is on this machine."""
        if isinstance(self.store.fs, LocalFileSystem):
            return self.store.root
        for name in self.files:
            self._fetch(name)
        assert self._fetched is not None, "there are files"
        return self._fetched.name

    def _fetch(self, name: str) -> str:
        if self._fetched is None:
            self._fetched = tempfile.TemporaryDirectory(prefix="harness-")
        steps = name.split("/") if name else ["file"]
        if {"", ".", ".."} & {*steps}:  # object stores allow such keys; they must not lead out of the directory
            raise Corrupt(f"{self.shown(name)}: not a name of a file")
        path = os.path.join(self._fetched.name, *steps)
        if os.path.exists(path):
            return path
        os.makedirs(os.path.dirname(path), exist_ok=True)

        def copy(stream: BinaryIO) -> None:
            with open(path, "wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)

        try:
            self.store.read(name, copy, self.files[name])
        except FileNotFoundError:
            raise StoreError(f"read {self.shown(name)}: it was there and is gone") from None
        if (found_bytes := os.path.getsize(path)) != self.files[name]:
            raise StoreError(f"read {self.shown(name)}: expected {self.files[name]} bytes, found {found_bytes}")
        return path


def read_file(path: str, shown: str) -> tuple[Any, str]:
    """The value in a file, and what the file is. ``shown`` is its name in messages."""
    try:
        size_bytes = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(64)
        if head[8:9] == b"{":
            return _read_safetensors(path, shown, size_bytes), "safetensors"
        if head.startswith(b"PK\x03\x04"):
            _check_archive(path, shown)
            return _unpickle(path, shown, mmap=True), "torch.save"
        if _LEGACY_MAGIC in head:
            return _unpickle(path, shown, mmap=False), "torch.save, old form"
    except OSError as error:
        raise StoreError(f"read {shown}: {error.strerror or error}") from None
    if head.startswith(b"\x80"):
        raise Unsupported(
            f"{shown}: expected a file of torch.save, found a bare pickle, which runs code when read; {_SAFE_FORM}"
        )
    raise Corrupt(f"{shown}: expected a file of torch.save or safetensors, found {size_bytes} bytes that are neither")


# --- torch.save ------------------------------------------------------------------------------------------------------


def _check_archive(path: str, shown: str) -> None:
    """torch never compares the checksums that it writes into its archives: a flipped bit would become a weight."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {member.filename.rpartition("/")[2] for member in members}
            if "constants.pkl" in names:
                raise Unsupported(
                    f"{shown}: expected a state_dict, found a TorchScript program, which is code; {_SAFE_FORM}"
                )
            if "data.pkl" not in names:
                raise Mismatch(f"{shown}: expected a file of torch.save, found a zip archive of something else")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise Corrupt(f"{shown}: expected an archive that is not compressed, found a compressed one")
            has_checksums = any(member.CRC for member in members)  # torch can be told to leave them out
            if has_checksums and (name := archive.testzip()) is not None:
                raise Corrupt(f"{shown}: {name}: expected the checksum in the archive, found another")
    except HarnessError:
        raise
    except Exception as error:  # zipfile has no bound on what it raises for broken archives
        raise Corrupt(f"{shown}: expected a whole file of torch.save, found a broken zip archive ({error})") from None


def _unpickle(path: str, shown: str, *, mmap: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old forms that it reads all the same
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if (refused := _REFUSED.search(str(error))) is None:
            raise Corrupt(f"{shown}: expected a whole file of torch.save, found a broken pickle") from None
        raise Unsupported(
            f"{shown}: expected a state_dict, found a pickle that calls for {refused[1]}; reading it would run code of "
            f"the file's choice, so it is refused; where the file was made, {_SAFE_FORM}"
        ) from None
    except Exception as error:  # torch has no bound on what it raises for broken files
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise Corrupt(f"{shown}: expected a whole file of torch.save: {reason}") from None


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(path: str, shown: str, size_bytes: int) -> dict[str, torch.Tensor]:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > min(HEADER_LIMIT_BYTES, size_bytes - 8):
            raise Corrupt(f"{shown}: a header of {header_bytes} bytes in a file of {size_bytes}")
        header = file.read(header_bytes)
    end = 8 + header_bytes
    try:
        infos = decode_header(header, size_bytes - end)
    except Corrupt as error:
        raise Corrupt(f"{shown}: {error}") from None
    everything = torch.from_file(path, shared=False, size=size_bytes, dtype=torch.uint8)
    tensors = {}
    for info in infos:
        raw = everything[end : end + info.nbytes]
        if end % info.itemsize:  # other writers need not align
            raw = raw.clone()
        end += info.nbytes
        dtype = getattr(torch, info.dtype)
        tensors[info.path] = (
            raw.view(dtype).reshape(info.shape) if info.nbytes else torch.empty(info.shape, dtype=dtype, device="cpu")
        )
    return tensors


# --- directories -----------------------------------------------------------------------------------------------------

_MODEL_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_directory(place: Place) -> tuple[Any, str]:
    """The value in a directory of Hugging Face's layout: one file, or several with an index."""
    names = sorted(name for name in place.files if "/" not in name)
    known = [name for name in _MODEL_FILES if name in names]
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    single = [name for name in names if name.endswith(".safetensors")]
    name = next((found[0] for found in (known[:1], indexes, single) if len(found) == 1), None)
    if not known and MANIFEST in names:  # another part's index may be there
        raise Mismatch(f"{place.url}: a checkpoint whose model other programs cannot read as it lies; name the run's URL")
    if name is None:
        found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "no files, only directories"
        raise Mismatch(
            f"{place.url}: expected a run, a distributed checkpoint or one of {', '.join(_MODEL_FILES)}; found {found}"
        )
    if name.endswith(".index.json"):
        return _read_indexed(place, name), name
    return read_file(place.path(name), place.shown(name))[0], name


def _read_indexed(place: Place, index: str) -> dict[str, Any]:
    try:
        places = json.loads(place.store.get(index, MANIFEST_LIMIT_BYTES) or b"")["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, shard in places.items():
            shards.setdefault(shard, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"{place.shown(index)}: expected JSON with a weight_map: {error}") from None
    values: dict[str, Any] = {}
    for shard, expected in shards.items():
        if shard not in place.files:  # nor can an index name a file elsewhere
            raise Corrupt(f"{place.shown(shard)}: missing; {index} names it")
        found, _ = read_file(place.path(shard), place.shown(shard))
        if not isinstance(found, Mapping):
            raise Mismatch(f"{place.shown(shard)}: expected a state_dict, found {type(found).__name__}")
        if missing := expected - found.keys():
            raise Corrupt(f"{place.shown(shard)}: expected {min(missing)} in it, as {index} says, found it is not there")
        if twice := values.keys() & found.keys():
            raise Corrupt(f"{place.shown(shard)}: {min(twice)} is in another file, too")
        values |= found
    return values


def read_distributed(place: Place, *, trust: bool) -> Any:
    """The value in a directory of torch.distributed.checkpoint, put together from the parts of all ranks."""
    if not trust:
        raise ConfigError(
            f"{place.url}: a directory of torch.distributed.checkpoint; its {DCP_METADATA} is a pickle, and reading it runs "
            "whatever code it names: pass --trust if you trust whoever wrote it"
        )
    from torch.distributed.checkpoint.api import CheckpointException  # noqa: PLC0415  # takes a second
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: PLC0415

    directory = place.directory()
    with tempfile.TemporaryDirectory(prefix="harness-") as temporary:
        path = os.path.join(temporary, "whole.pth")
        try:
            dcp_to_torch_save(directory, path)
        except (Exception, CheckpointException) as error:  # a BaseException, and no bound on the others
            reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
            raise Corrupt(f"{place.url}: expected a whole distributed checkpoint: {reason}") from None
        return _unpickle(path, place.url, mmap=True)
