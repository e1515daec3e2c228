"""The write protocol: a fresh directory, the shards, a look at what the store has, the manifest last.

The order is all there is to it. Until the manifest is published the save does not exist; from then on every object that it
names is durable, because ``Store.put`` returned for each of them and the store has since confirmed each size. The manifest
is read back before older checkpoints may go. The directory is fresh, so that nothing that was committed before is touched,
and a writer that was believed dead and wakes up writes into a directory that nobody else uses.

Several ranks can write (see ``harness.checkpoint.plan``). The first of them then publishes the manifest when all others
have left their *receipts* in the directory, each after its shards are durable: they meet nowhere but in the store.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from harness.checkpoint import tree
from harness.checkpoint.boxes import Box
from harness.checkpoint.format import (
    CHECKSUM,
    INDEX_SUFFIX,
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Ancestor,
    Attempt,
    BlockHasher,
    Blocks,
    FileInfo,
    Manifest,
    Part,
    Receipt,
    TensorInfo,
    check_meta,
    check_part_name,
    check_step,
    checksum,
    checksum_of_blocks,
    checksum_of_boxes,
    digest,
    hasher,
    new_directory,
    receipt_name,
    shard_name,
)
from harness.checkpoint.plan import Found, SavePlan, Shard, TensorBox
from harness.checkpoint.sharding import Sharding
from harness.distributed import device
from harness.errors import CheckpointError, Corrupt, StoreError, Unsupported
from harness.runtime.gc_pause import without_collections
from harness.runtime.threads import in_threads, threads_for
from harness.storage.direct_io import Buffer
from harness.storage.store import Store


class Torn(Exception):
    """The state has changed while it was copied; this save must not be committed. ``paths`` are those of the tensors."""

    def __init__(self, paths: Sequence[str]) -> None:
        more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
        super().__init__(", ".join(paths[:5]) + more)


@dataclass(frozen=True)
class Header:
    """What a manifest says of a checkpoint besides its content. ``meta`` is JSON, and goes into it as it is."""

    step: int
    attempt: Attempt
    lineage: Sequence[Ancestor] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


def write(
    store: Store,
    parts: Mapping[str, Mapping[str, Any]],
    *,
    step: int,
    attempt: Attempt,
    lineage: Sequence[Ancestor] = (),
    meta: Mapping[str, Any] | None = None,
    shard_bytes: int = 1 << 30,
    streams: int = 1,
    directory: str | None = None,
) -> tuple[str, Manifest]:
    """Writes a checkpoint, with so many shards on their way at once, and returns its directory and its manifest.

    ``parts`` are nested values such as state dictionaries; ``meta`` is JSON that goes into the manifest as it is. Raises
    ``Unsupported`` before anything is written, ``StoreError`` when the store fails; in both cases nothing is committed.
    """
    header = Header(check_step(step), attempt, lineage, check_meta(meta or {}))
    encoded = encode(parts)
    directory, plan = directory or new_directory(step, attempt), SavePlan(encoded, shard_bytes)
    receipt = write_share(store, directory, plan, streamed(plan, encoded), streams)
    return directory, publish(store, directory, plan, encoded, [receipt], header)


def encode(parts: Mapping[str, Mapping[str, Any] | tree.Encoded]) -> dict[str, tree.Encoded]:
    """Takes all parts apart that are not. Raises ``Unsupported`` for what cannot be written."""
    for name in parts:
        check_part_name(name)
    return {name: part if isinstance(part, tree.Encoded) else tree.encode(part, name) for name, part in parts.items()}


def checksums(encoded: Mapping[str, tree.Encoded]) -> dict[str, dict[str, Blocks]]:
    """The checksums of each tensor's blocks, by part and path."""
    return {name: _checksums(part) for name, part in encoded.items()}


def _checksums(part: tree.Encoded) -> dict[str, Blocks]:
    tensors = part.tensors.values()
    threads = threads_for(sum(tensor.nbytes for tensor in tensors))
    blocks_of = device.here(each.device for each in tensors).calling(tree.blocks_of)
    return dict(zip(part.tensors, in_threads(threads, blocks_of, tensors), strict=True))


# --- one writer, or several ------------------------------------------------------------------------------------------


class Content(Protocol):
    """The bytes of a shard, and what is known of them when they are there."""

    shard: Shard
    checksum: str
    blocks: dict[str, Blocks]

    def __call__(self) -> Iterator[Buffer]:
        """All bytes; called once for each try of the upload."""

    def hash(self) -> None:
        """Returns when the checksums are known, though nobody asks for the bytes."""


Shared = Mapping[tuple[str, int, str], FileInfo]  # frozen shards of earlier saves, by part, size in bytes and checksum


def write_share(
    store: Store, directory: str, plan: SavePlan, contents: Sequence[Content], streams: int = 1, shared: Shared | None = None
) -> Receipt:
    """Writes this rank's shards, so many at once. They are durable when it returns. A frozen one is not written where the
    same bytes are among the ``shared``."""

    def put(content: Content) -> FileInfo:
        shard = content.shard
        if shared and shard.is_frozen:
            content.hash()
            if (found := shared.get((shard.part, shard.size_bytes, content.checksum))) is not None:
                return found
        store.put(f"{directory}/{shard.name}", content, shard.size_bytes)
        return FileInfo(shard.name, shard.size_bytes, content.checksum)

    files = in_threads(streams, put, contents)  # after an error no further one is begun
    blocks: dict[str, dict[str, Blocks]] = {}
    for content in contents:
        blocks.setdefault(content.shard.part, {}).update(content.blocks)
    return Receipt(plan.writers.rank, plan.checksum, files, blocks)


def streamed(plan: SavePlan, encoded: Mapping[str, tree.Encoded]) -> list[Content]:
    """This rank's shards, straight from the tensors: nothing may change them until all is written. Whatever thread reads
    them, an accelerator copies them in the stream that is the current one here."""
    own, _ = plan.own(encoded)
    return [_Streamed(shard, own[shard.part].tensors) for shard in plan.own_shards]


def put_receipt(store: Store, directory: str, receipt: Receipt) -> None:
    """Tells the first writer what has become of a share. The last thing that a writer does for a save."""
    _put_bytes(store, f"{directory}/{receipt.name}", receipt.encode())


def collect(store: Store, directory: str, plan: SavePlan, latest: Callable[[], float]) -> list[Receipt]:
    """The receipts of the other writers, which are waited for while the (monotonic) time is not later than ``latest()``.

    Raises ``StoreError`` where one has failed or does not come, ``Torn`` where one's state has changed while it was copied,
    ``Unsupported`` where one holds something else.
    """
    found: dict[int, Receipt] = {}
    missing = {*plan.writers.ranks[1:]}
    began, pause_seconds = time.monotonic(), 0.01
    while missing:
        is_late = time.monotonic() > latest()  # looked at first: what came before still counts
        names = store.list(directory)
        there = [rank for rank in missing if f"{directory}/{receipt_name(rank)}" in names]
        found |= {rank: _receipt(store, directory, plan, rank) for rank in there}
        missing -= {*there}
        if missing and is_late:
            what = f"after {time.monotonic() - began:.0f} s ranks {sorted(missing)} have not written theirs"
            raise StoreError(f"put {store.url}/{directory}: this rank's share is written; {what}", transient=True)
        if missing:
            time.sleep(pause_seconds)
            pause_seconds = min(1.5 * pause_seconds, 0.5)
    return [found[rank] for rank in plan.writers.ranks[1:]]


def _receipt(store: Store, directory: str, plan: SavePlan, rank: int) -> Receipt:
    name = f"{directory}/{receipt_name(rank)}"
    try:
        receipt = Receipt.decode(receipt_name(rank), store.get(name, MANIFEST_LIMIT_BYTES) or b"")
    except Corrupt as error:
        raise StoreError(f"read {store.url}/{directory}/{error}", transient=True) from None
    if receipt.is_torn:
        raise Torn([f"{receipt.problem} (rank {rank})"])
    if receipt.problem:
        raise (StoreError if receipt.is_of_storage else Unsupported)(f"rank {rank}: {receipt.problem}")
    if receipt.rank != rank or not plan.fits(receipt):
        advice = "make them equal on all ranks, or set checkpoint.writers to rank0"
        raise Unsupported(
            f"the parameters, the optimizer states or the settings of rank {rank} differ from those of rank 0; {advice}"
        )
    return receipt


def publish(
    store: Store,
    directory: str,
    plan: SavePlan,
    encoded: Mapping[str, tree.Encoded],
    receipts: Sequence[Receipt],
    header: Header,
    expected: Mapping[str, Mapping[str, Blocks]] | None = None,
) -> Manifest:
    """Makes a checkpoint of what all writers have written. The first of them does it.

    ``expected`` are checksums that the tensors must have, as by ``checksums``: raises ``Unsupported`` before the commit when
    they have others.
    """
    with without_collections():
        found: dict[str, dict[str, Blocks]] = {name: {} for name in encoded}
        for receipt in receipts:
            for name, blocks in receipt.blocks.items():
                found[name].update(blocks)
        whole = plan.blocks(found)
        if expected is not None:
            _compare(plan, whole, expected)
        written = ((plan.shards[receipt.rank], receipt.files) for receipt in receipts)
        placed = itertools.chain.from_iterable(zip(*each, strict=True) for each in written)
        elsewhere = {shard.name: file.name for shard, file in placed if file.base}
        parts = {name: _part(plan, name, part, whole[name], elsewhere) for name, part in encoded.items()}
        indexes = _indexes(plan, parts, elsewhere)
        manifest = Manifest(
            step=header.step,
            attempt=header.attempt.id,
            files=[*(file for receipt in receipts for file in receipt.files), *_files(indexes)],
            parts=parts,
            lineage=list(header.lineage),
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            meta=dict(header.meta),
        )
        text = manifest.encode()  # before the last look at the store: nothing but the put may fail after it
        try:
            Manifest.decode(text)
        except CheckpointError as error:  # what no reader would take is not committed
            raise Unsupported(f"{directory}: its manifest could not be read again: {error}") from None
    for name, index in indexes.items():
        _put_bytes(store, f"{directory}/{name}", index)
    _confirm(store, directory, manifest.files)
    _put_bytes(store, f"{directory}/{MANIFEST}", text)
    _read_back(store, f"{directory}/{MANIFEST}", text)
    for receipt in receipts[1:]:
        with contextlib.suppress(StoreError):  # rubbish that is in nobody's way
            store.delete(f"{directory}/{receipt.name}")
    return manifest


def _part(plan: SavePlan, name: str, part: tree.Encoded, blocks: Mapping[str, Blocks], elsewhere: Mapping[str, str]) -> Part:
    digest = _digest(part.tree, part.aliases, plan.tensors[name], blocks)
    files = [elsewhere.get(shard.name, shard.name) for shard in _shards(plan, name)]
    return Part(files, part.tree, part.aliases, digest, plan.slices(name), plan.boxes(name))


def _shards(plan: SavePlan, name: str) -> list[Shard]:
    """All writers' shards of a part."""
    return [shard for shards in plan.shards.values() for shard in shards if shard.part == name]


def _compare(plan: SavePlan, found: Found, expected: Found) -> None:
    for name, blocks in found.items():
        boxes = plan.boxes(name)
        torn = sorted(path for path in blocks if path not in boxes and blocks[path] != expected[name][path])
        if torn:
            what = _CHANGED + (", or are not the same on all ranks" if len(plan.writers.ranks) > 1 else "")
            raise Unsupported(f"{name}: {', '.join(torn[:10])} {what}")


_CHANGED = "changed between the step boundary and the optimizer's step"


def refuse_changed_boxes(plan: SavePlan, receipt: Receipt, expected: Found) -> None:
    """Raises ``Unsupported`` where a box that this rank has written has another checksum than is ``expected`` of the part
    of the tensor that it has."""
    boxes = (piece for piece in plan.pieces[receipt.rank] if isinstance(piece, TensorBox))
    torn = [
        f"{each.part}/{each.tensor.path}"
        for each in boxes
        if receipt.blocks[each.part][each.stored.path] != expected[each.part][each.tensor.path]
    ]
    if torn:
        raise Unsupported(f"{', '.join(sorted(torn)[:10])} {_CHANGED}")


def digest_of(part: Mapping[str, Any], name: str) -> str:
    """The digest that a checkpoint of this part would have. Sharded tensors are left out."""
    encoded = tree.encode(part, name)
    plain = replace(encoded, tensors={key: each for key, each in encoded.tensors.items() if key not in encoded.placed})
    aliases = {further: path for further, path in encoded.aliases.items() if path in plain.tensors}
    return _digest(encoded.tree, aliases, [plain.info(path) for path in plain.tensors], _checksums(plain))


def digests(all_gather: Callable[[Any], list[Any]], parts: Mapping[str, tree.Encoded], sharding: Sharding) -> dict[str, str]:
    """The digests that a checkpoint of these parts would have, the boxes of all ranks included. All ranks call it."""
    own = {
        (name, path): checksum_of_blocks(blocks) for name, each in checksums(parts).items() for path, blocks in each.items()
    }
    found = all_gather({key: each for key, each in own.items() if key in sharding.boxes})
    for key, boxes in sharding.boxes.items():
        each = {box: found[ranks[0]][key] for box, ranks in boxes.items()}
        shape = parts[key[0]].placed[key[1]].shape
        own[key] = each[Box.whole(shape)] if sharding.is_whole(key, shape) else checksum_of_boxes(each)
    return {
        name: _digest(
            part.tree,
            part.aliases,
            [part.info(path) for path in part.tensors],
            {path: (own[name, path],) for path in part.tensors},
        )
        for name, part in parts.items()
    }


def _digest(rest: Any, aliases: Mapping[str, str], tensors: Sequence[TensorInfo], blocks: Mapping[str, Blocks]) -> str:
    hashes = {tensor: checksum_of_blocks(blocks[tensor.path]) for tensor in tensors}
    stored = {tensor.path: tensor for tensor in tensors}
    same = {replace(stored[path], path=further): hashes[stored[path]] for further, path in aliases.items()}
    return digest({**hashes, **same}, rest)


def _indexes(plan: SavePlan, parts: Mapping[str, Part], elsewhere: Mapping[str, str]) -> dict[str, bytes]:
    """What Hugging Face's loaders expect of a part, unless all of it is in one file of its name, or some is cut."""
    found = {}
    for name, part in parts.items():
        if part.files not in ([], [shard_name(name, 0, 1)]) and not (part.slices or part.boxes):
            shards = _shards(plan, name)
            total_bytes = sum(shard.data_bytes for shard in shards)
            names = {shard.name: elsewhere.get(shard.name, shard.name) for shard in shards}
            places = {tensor.path: names[shard.name] for shard in shards for tensor in shard.tensors}
            index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
            found[f"{name}{INDEX_SUFFIX}"] = json.dumps(index, indent=1).encode()
    return found


def _files(objects: Mapping[str, bytes]) -> list[FileInfo]:
    return [FileInfo(name, len(data), checksum(data)) for name, data in objects.items()]


class _Streamed:
    """A shard's bytes, hashed while they stream out."""

    def __init__(self, shard: Shard, values: Mapping[str, torch.Tensor]) -> None:
        self.shard = shard
        self.checksum = ""
        self.blocks: dict[str, Blocks] = {}
        self._values = values
        self._here = device.here(each.device for each in values.values())

    def __call__(self) -> Iterator[Buffer]:
        whole = hasher()
        whole.update(self.shard.header)
        yield self.shard.header
        for tensor in self.shard.tensors:
            own = BlockHasher()
            for chunk in self._here.each(tree.raw_bytes(self._values[tensor.path])):
                whole.update(chunk)
                own.update(chunk)
                yield chunk
            self.blocks[tensor.path] = own.blocks()
        self.checksum = f"{CHECKSUM}:{whole.hexdigest()}"

    def hash(self) -> None:
        for _ in self():
            pass


def _put_bytes(store: Store, name: str, data: bytes) -> None:
    store.put(name, lambda: [data], len(data))


def _confirm(store: Store, directory: str, files: Sequence[FileInfo]) -> None:
    places = sorted({file.base or directory for file in files} | {directory})
    objects = {name: size for place in places for name, size in store.list(place).items()}  # where a reader will look, too
    for file in files:
        found = objects.get(name := file.path(directory))
        if found != file.bytes:
            raise _differs(store, name, file.bytes, "no such object" if found is None else f"{found} bytes")


def _read_back(store: Store, name: str, data: bytes) -> None:
    try:
        if store.read_range(name, 0, len(data) + 1) != data:
            raise _differs(store, name, len(data), "others")
    except FileNotFoundError:
        raise _differs(store, name, len(data), "no such object") from None


def _differs(store: Store, name: str, sent_bytes: int, has: str) -> StoreError:
    return StoreError(f"put {store.url}/{name}: sent {sent_bytes} bytes, the store has {has}")
