"""Reading a checkpoint back: every byte is verified before a value leaves this module.

A shard is read once, front to back: its header is parsed under bounds, each tensor's bytes go straight to their place in
memory, and the checksum of the file is computed on the way. Only when it agrees with the manifest are the tensors handed
out. Nothing is executed: there is no pickle on this path.
"""

from collections.abc import Iterable
from typing import Any, BinaryIO

import torch

from harness.checkpoint import tree
from harness.checkpoint.catalog import verify_file
from harness.checkpoint.format import (
    HEADER_LIMIT_BYTES,
    INDEX_SUFFIX,
    FileInfo,
    Hasher,
    Manifest,
    Part,
    TensorInfo,
    decode_header,
    digest,
    hasher,
)
from harness.checkpoint.store import Store
from harness.errors import Corrupt

_READ_BYTES = 1 << 20  # read, then hashed while it is still in the processor's cache


def read(store: Store, directory: str, manifest: Manifest, parts: Iterable[str] | None = None) -> dict[str, Any]:
    """The parts of a checkpoint (all of them, or those named) as they were given to ``commit.write``, on the CPU.

    Tensors are fresh and own their memory; tied ones are the same object. Raises ``Corrupt`` with the file's name, what was
    expected and what was found, or ``StoreError``.
    """
    wanted = manifest.parts if parts is None else {name: manifest.parts[name] for name in parts}
    files = {file.name: file for file in manifest.files}
    for name in wanted:
        if index := files.get(f"{name}{INDEX_SUFFIX}"):  # not needed here, but what is damaged is not called whole
            verify_file(store, f"{directory}/{index.name}", index)
    return {
        name: _read_part(store, directory, name, part, [files[file] for file in part.files]) for name, part in wanted.items()
    }


def _read_part(store: Store, directory: str, name: str, part: Part, files: list[FileInfo]) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    hashes: dict[str, str] = {}
    for file in files:
        found, found_hashes = read_shard(store, f"{directory}/{file.name}", file)
        if twice := tensors.keys() & found.keys():
            raise Corrupt(f"{directory}/{file.name}: {min(twice)} is in another shard too")
        tensors |= found
        hashes |= found_hashes
    try:
        for further, stored in part.aliases.items():
            if further in tensors:
                raise Corrupt(
                    f"{directory}: {name}: {further!r} is to be the same as {stored!r}, and is a tensor of its own"
                )
            tensors[further], hashes[further] = tensors[stored], hashes[stored]
    except (KeyError, TypeError):
        raise Corrupt(f"{directory}: {name}: {further!r} is to be the same as {stored!r}, which is not there") from None
    try:
        computed = digest({tree.info(path, tensor): hashes[path] for path, tensor in tensors.items()}, part.tree)
    except (ValueError, RecursionError) as error:  # text that is none, a number beyond all, too many levels
        raise Corrupt(f"{directory}: {name}: {type(error).__name__}: {error}") from None
    if computed != part.digest:
        raise Corrupt(f"{directory}: {name}: expected digest {part.digest}, found {computed}")
    return tree.decode(part.tree, tensors)


def read_shard(store: Store, name: str, file: FileInfo) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a shard and the checksums of their bytes, verified against the manifest's entry for the file."""
    algorithm = file.checksum.partition(":")[0]

    def consume(stream: BinaryIO) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return _Reader(stream, hasher(algorithm), file.bytes).tensors(algorithm, file.checksum)

    try:
        return store.read(name, consume, file.bytes)
    except FileNotFoundError:
        raise Corrupt(f"{name}: missing; expected {file.bytes} bytes") from None
    except Corrupt as error:
        raise Corrupt(f"{name}: {error}") from None


class _Reader:
    """A shard on its way in: counts and hashes what it reads."""

    def __init__(self, stream: BinaryIO, whole: Hasher, size_bytes: int) -> None:
        self.stream = stream
        self.whole = whole
        self.size_bytes = size_bytes
        self.done_bytes = 0

    def tensors(self, algorithm: str, expected: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        infos = self.header()
        tensors, hashes = {}, {}
        for info in infos:
            tensors[info.path], hashes[info.path] = self.tensor(info, algorithm)
        if self.stream.read(1):
            raise Corrupt(f"expected {self.size_bytes} bytes, found more")
        if (found := f"{algorithm}:{self.whole.hexdigest()}") != expected:
            raise Corrupt(f"expected {expected}, found {found}")
        return tensors, hashes

    def header(self) -> list[TensorInfo]:
        length = bytearray(8)
        self.fill(memoryview(length))
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > min(HEADER_LIMIT_BYTES, self.size_bytes - 8):
            raise Corrupt(f"a header of {header_bytes} bytes in a file of {self.size_bytes}")
        text = bytearray(header_bytes)
        self.fill(memoryview(text))
        return decode_header(bytes(text), self.size_bytes - self.done_bytes)

    def tensor(self, info: TensorInfo, algorithm: str) -> tuple[torch.Tensor, str]:
        tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
        own = hasher(algorithm)
        if tensor.numel():
            self.fill(tensor.view(-1).view(torch.uint8).numpy().data, own)
        return tensor, f"{algorithm}:{own.hexdigest()}"

    def fill(self, place: memoryview, own: Hasher | None = None) -> None:
        """Reads exactly as many bytes as there is room for."""
        while len(place):
            count = self.stream.readinto(place[:_READ_BYTES])  # type: ignore[attr-defined]
            if not count:
                raise Corrupt(f"expected {self.size_bytes} bytes, found {self.done_bytes}")
            self.whole.update(place[:count])
            if own is not None:
                own.update(place[:count])
            self.done_bytes += count
            place = place[count:]
