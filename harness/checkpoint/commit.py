"""The write protocol: a fresh directory, the shards, a look at what the store has, the manifest last.

The order is all there is to it. Until the manifest is published the save does not exist; from then on every object that it
names is durable, because ``Store.put`` returned for each of them and the store has since confirmed each size. The directory
is fresh, so that nothing that was committed before is touched, and a writer that was believed dead and wakes up writes
into a directory that nobody else uses.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from harness.checkpoint import tree
from harness.checkpoint.format import (
    CHECKSUM,
    INDEX_SUFFIX,
    MANIFEST,
    Ancestor,
    Attempt,
    FileInfo,
    Manifest,
    Part,
    TensorInfo,
    check_part_name,
    checksum,
    digest,
    encode_header,
    hasher,
    new_directory,
    plan_shards,
    shard_name,
)
from harness.checkpoint.store import Store
from harness.checkpoint.unbuffered import Buffer
from harness.errors import StoreError, Unsupported


def write(
    store: Store,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    step: int,
    attempt: Attempt,
    lineage: Sequence[Ancestor] = (),
    meta: Mapping[str, Any] | None = None,
    shard_bytes: int = 1 << 30,
) -> tuple[str, Manifest]:
    """Writes a checkpoint and returns its directory and its manifest.

    ``parts`` are nested values such as state dictionaries; ``meta`` is JSON that goes into the manifest as it is. Raises
    ``Unsupported`` before anything is written, ``StoreError`` when the store fails; in both cases nothing is committed.
    """
    return write_encoded(
        store, encode(parts), step=step, attempt=attempt, lineage=lineage, meta=meta, shard_bytes=shard_bytes
    )


def encode(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, tree.Encoded]:
    """Takes all parts apart. Raises ``Unsupported`` for what cannot be written."""
    for name in parts:
        check_part_name(name)
    return {name: tree.encode(part, name) for name, part in parts.items()}


def checksums(encoded: Mapping[str, tree.Encoded]) -> dict[str, dict[str, str]]:
    """The checksum of each tensor's bytes, by part and path."""
    return {
        name: {path: _hash(tree.raw_bytes(tensor)) for path, tensor in part.tensors.items()}
        for name, part in encoded.items()
    }


def write_encoded(
    store: Store,
    encoded: Mapping[str, tree.Encoded],
    *,
    step: int,
    attempt: Attempt,
    lineage: Sequence[Ancestor],
    meta: Mapping[str, Any] | None,
    shard_bytes: int,
    expected: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[str, Manifest]:
    """As ``write``, for parts that were taken apart. ``expected`` are checksums that the tensors must have, as by
    ``checksums``: raises ``Unsupported`` before the commit when they were changed since."""
    directory = new_directory(step, attempt)
    files: list[FileInfo] = []
    written = {}
    for name, part in encoded.items():
        written[name], hashes = _write_part(store, directory, name, part, shard_bytes, files)
        if expected is not None and hashes != expected[name]:
            torn = sorted(path for path in hashes if hashes[path] != expected[name][path])
            raise Unsupported(f"{name}: {', '.join(torn[:10])} changed between the step boundary and the optimizer's step")
    manifest = Manifest(
        step=step,
        attempt=attempt.id,
        files=files,
        parts=written,
        lineage=list(lineage),
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        meta=dict(meta or {}),
    )
    text = manifest.encode()  # before the last look at the store: nothing but the put may fail after it
    for file in files:
        _confirm(store, f"{directory}/{file.name}", file.bytes)
    _put_bytes(store, f"{directory}/{MANIFEST}", text)
    _confirm(store, f"{directory}/{MANIFEST}", len(text))
    return directory, manifest


def digest_of(part: Mapping[str, Any], name: str) -> str:
    """The digest that a checkpoint of this part would have."""
    encoded = tree.encode(part, name)
    return _digest(encoded, checksums({name: encoded})[name])


def _write_part(
    store: Store, directory: str, name: str, part: tree.Encoded, shard_bytes: int, files: list[FileInfo]
) -> tuple[Part, dict[str, str]]:
    """Writes the shards of a part, and an index where there are several; adds them to ``files``. Besides the part, the
    checksums of its tensors."""
    shards = plan_shards((tree.info(path, tensor) for path, tensor in part.tensors.items()), shard_bytes)
    hashes: dict[str, str] = {}
    names = [shard_name(name, index, len(shards)) for index in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        stream = _ShardStream(part.tensors, shard)
        store.put(f"{directory}/{file_name}", stream, stream.size_bytes)
        files.append(FileInfo(file_name, stream.size_bytes, stream.checksum))
        hashes |= stream.tensor_checksums
    if len(shards) > 1:
        index = _index(names, shards)
        files.append(FileInfo(f"{name}{INDEX_SUFFIX}", len(index), checksum(index)))
        _put_bytes(store, f"{directory}/{name}{INDEX_SUFFIX}", index)
    return Part(files=names, tree=part.tree, aliases=part.aliases, digest=_digest(part, hashes)), hashes


class _ShardStream:
    """A shard's bytes, hashed while they stream out: called once for each try of the upload."""

    def __init__(self, tensors: Mapping[str, Any], shard: Sequence[TensorInfo]) -> None:
        self.tensors = tensors
        self.shard = shard
        self.header = encode_header(shard)
        self.size_bytes = len(self.header) + sum(tensor.nbytes for tensor in shard)
        self.checksum = ""
        self.tensor_checksums: dict[str, str] = {}

    def __call__(self) -> Iterator[Buffer]:
        whole = hasher()
        whole.update(self.header)
        yield self.header
        for tensor in self.shard:
            own = hasher()
            for chunk in tree.raw_bytes(self.tensors[tensor.path]):
                whole.update(chunk)
                own.update(chunk)
                yield chunk
            self.tensor_checksums[tensor.path] = f"{CHECKSUM}:{own.hexdigest()}"
        self.checksum = f"{CHECKSUM}:{whole.hexdigest()}"


def _index(names: Sequence[str], shards: Sequence[Sequence[TensorInfo]]) -> bytes:
    """The index that Hugging Face's loaders expect beside several shards."""
    total_bytes = sum(tensor.nbytes for shard in shards for tensor in shard)
    places = {tensor.path: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": places}, indent=1).encode()


def _digest(part: tree.Encoded, hashes: Mapping[str, str]) -> str:
    names = {path: path for path in part.tensors} | part.aliases
    return digest({tree.info(path, part.tensors[stored]): hashes[stored] for path, stored in names.items()}, part.tree)


def _hash(chunks: Iterator[memoryview]) -> str:
    own = hasher()
    for chunk in chunks:
        own.update(chunk)
    return f"{CHECKSUM}:{own.hexdigest()}"


def _put_bytes(store: Store, name: str, data: bytes) -> None:
    store.put(name, lambda: [data], len(data))


def _confirm(store: Store, name: str, expected_bytes: int) -> None:
    found = store.stat(name)
    if found != expected_bytes:
        has = "no such object" if found is None else f"{found} bytes"
        raise StoreError(f"put {store.url}/{name}: sent {expected_bytes} bytes, the store has {has}")
