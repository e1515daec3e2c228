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
from harness.checkpoint.threads import in_threads, threads_for
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
    return {name: _checksums(part) for name, part in encoded.items()}


def _checksums(part: tree.Encoded) -> dict[str, str]:
    tensors = part.tensors.values()
    threads = threads_for(sum(tensor.nbytes for tensor in tensors))
    return dict(zip(part.tensors, in_threads(threads, lambda tensor: _hash(tree.raw_bytes(tensor)), tensors), strict=True))


def write_encoded(
    store: Store,
    encoded: Mapping[str, tree.Encoded],
    *,
    step: int,
    attempt: Attempt,
    lineage: Sequence[Ancestor],
    meta: Mapping[str, Any] | None,
    shard_bytes: int,
    streams: int = 1,
    expected: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[str, Manifest]:
    """As ``write``, for parts that were taken apart, with so many shards on their way at once.

    ``expected`` are checksums that the tensors must have, as by ``checksums``: raises ``Unsupported`` before the commit when
    they were changed since.
    """
    directory = new_directory(step, attempt)
    plans = {name: _PartPlan(name, part, shard_bytes) for name, part in encoded.items()}
    _put_shards(store, directory, [shard for plan in plans.values() for shard in plan.shards], streams)
    files: list[FileInfo] = []
    written = {}
    for name, plan in plans.items():
        hashes = plan.checksums()
        if expected is not None and hashes != expected[name]:
            torn = sorted(path for path in hashes if hashes[path] != expected[name][path])
            raise Unsupported(f"{name}: {', '.join(torn[:10])} changed between the step boundary and the optimizer's step")
        files += [FileInfo(shard.name, shard.size_bytes, shard.checksum) for shard in plan.shards]
        if index := plan.index():
            files.append(FileInfo(f"{name}{INDEX_SUFFIX}", len(index), checksum(index)))
            _put_bytes(store, f"{directory}/{name}{INDEX_SUFFIX}", index)
        written[name] = plan.written(hashes)
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
    tensors = [tree.info(path, tensor) for path, tensor in encoded.tensors.items()]
    return _digest(encoded, tensors, _checksums(encoded))


class _PartPlan:
    """The shards that a part is divided into."""

    def __init__(self, name: str, part: tree.Encoded, shard_bytes: int) -> None:
        self.part = part
        self.tensors = [tree.info(path, tensor) for path, tensor in part.tensors.items()]
        shards = plan_shards(self.tensors, shard_bytes)
        self.shards = [
            _Shard(shard_name(name, index, len(shards)), part.tensors, shard) for index, shard in enumerate(shards)
        ]

    def checksums(self) -> dict[str, str]:
        """Those of the tensors, by path, once the shards are written."""
        return {path: found for shard in self.shards for path, found in shard.tensor_checksums.items()}

    def index(self) -> bytes:
        """What Hugging Face's loaders expect beside several shards; nothing beside one."""
        if len(self.shards) < 2:
            return b""
        total_bytes = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        places = {tensor.path: shard.name for shard in self.shards for tensor in shard.tensors}
        return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": places}, indent=1).encode()

    def written(self, hashes: Mapping[str, str]) -> Part:
        """The manifest's entry."""
        names = [shard.name for shard in self.shards]
        digest = _digest(self.part, self.tensors, hashes)
        return Part(files=names, tree=self.part.tree, aliases=self.part.aliases, digest=digest)


class _Shard:
    """A shard's bytes, hashed while they stream out: called once for each try of the upload."""

    def __init__(self, name: str, values: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
        self.name = name
        self.values = values
        self.tensors = tensors
        self.header = encode_header(tensors)
        self.size_bytes = len(self.header) + sum(tensor.nbytes for tensor in tensors)
        self.checksum = ""
        self.tensor_checksums: dict[str, str] = {}

    def __call__(self) -> Iterator[Buffer]:
        whole = hasher()
        whole.update(self.header)
        yield self.header
        for tensor in self.tensors:
            own = hasher()
            for chunk in tree.raw_bytes(self.values[tensor.path]):
                whole.update(chunk)
                own.update(chunk)
                yield chunk
            self.tensor_checksums[tensor.path] = f"{CHECKSUM}:{own.hexdigest()}"
        self.checksum = f"{CHECKSUM}:{whole.hexdigest()}"


def _put_shards(store: Store, directory: str, shards: Sequence[_Shard], streams: int) -> None:
    """Writes all shards, so many at once. After an error no further one is begun."""

    def put(shard: _Shard) -> None:
        store.put(f"{directory}/{shard.name}", shard, shard.size_bytes)

    in_threads(streams, put, shards)


def _digest(part: tree.Encoded, tensors: Sequence[TensorInfo], hashes: Mapping[str, str]) -> str:
    aliases = [tree.info(path, part.tensors[stored]) for path, stored in part.aliases.items()]
    stored = {tensor: hashes[part.aliases.get(tensor.path, tensor.path)] for tensor in [*tensors, *aliases]}
    return digest(stored, part.tree)


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
