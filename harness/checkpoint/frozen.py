"""Frozen parameters are written once: which tensors get shards of their own, and which earlier save has such a shard.

Of a sharded tensor each rank writes its own boxes. It is frozen where all ranks say so. The first writer tells the others
which checkpoint they may refer to, since it alone knows what is committed.

What is said to be frozen is a hint. A save hashes what it copies, as any does. It leaves a shard out where the newest
checkpoint that the run stands on names a file with the same size and checksum, which is looked for before, and once more
before the commit. What has moved between two saves gets no such shard from then on.

No reference leads to another one: it names the directory that really has the file.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from harness.checkpoint.catalog import Catalog, saves_among
from harness.checkpoint.commit import Shared
from harness.checkpoint.format import Ancestor, Blocks, FileInfo, Manifest, Receipt, is_sharable
from harness.checkpoint.plan import SavePlan
from harness.checkpoint.sharding import Key, Sharding
from harness.checkpoint.tree import Encoded
from harness.errors import HarnessError

LEAST_BYTES = 64 << 20  # for less it is not worth it that a checkpoint does not lie in one directory,
LEAST_PART = 0.25  # nor for less of the state

IsFrozen = Callable[[torch.Tensor], bool]


def nothing_is_frozen(_tensor: torch.Tensor) -> bool:
    """Everything may change from save to save."""
    return False


class Frozen:
    """The frozen parameters of one attempt, as one of its writers knows them."""

    def __init__(self, catalog: Catalog, lineage: Sequence[Ancestor]) -> None:
        self._catalog, self._lineage = catalog, lineage
        self._newest: tuple[str, Manifest] | None = None
        self._own: tuple[str, Shared] = "", {}  # where this writer has put its last share, and what later ones may use of it
        self._blocks: dict[Key, Blocks] = {}  # what the last save had of them
        self._moved: set[Key] = set()

    def among(self, parts: Mapping[str, Encoded], is_frozen: IsFrozen) -> frozenset[Key]:
        """The tensors that get shards of their own, but for sharded ones. The first writer asks."""
        if is_frozen is nothing_is_frozen:
            return frozenset()
        found = {
            (name, path): tensor.nbytes
            for name, part in parts.items()
            for path, tensor in part.tensors.items()
            if is_frozen(tensor) and path not in part.placed and (name, path) not in self._moved
        }
        return _worth_it(found, sum(tensor.nbytes for part in parts.values() for tensor in part.tensors.values()))

    def sharded_among(self, parts: Mapping[str, Encoded], is_frozen: IsFrozen) -> frozenset[Key]:
        """The sharded tensors that are frozen for all that this rank knows: of some it has nothing."""
        if is_frozen is nothing_is_frozen:
            return frozenset()
        return frozenset(
            (name, path)
            for name, part in parts.items()
            for path in part.placed
            if (not part.tensors[path].numel() or is_frozen(part.tensors[path])) and (name, path) not in self._moved
        )

    @property
    def base(self) -> str:
        """The newest checkpoint that the run stands on; empty where none is found. The first writer asks."""
        try:
            newest = self._newest or self._stands_on()
        except HarnessError:  # the other ranks wait for an answer
            return ""
        return newest[0] if newest else ""

    def at(self, base: str) -> Shared:
        """The frozen shards that the other writers may refer to when the first one says that ``base`` is committed. That one
        will look whether they are there."""
        if base in ("", self._own[0]):
            return self._own[1] if base else {}
        try:
            manifest = self._catalog.open(base)
        except HarnessError:  # then this share is written once more
            return {}
        return _shared(base, manifest, [file for file in manifest.files if is_sharable(file.name)])

    def there(self) -> Shared:
        """The frozen shards of the newest checkpoint that the run stands on, of which the files are there now."""
        if (newest := self._newest or self._stands_on()) is None:
            return {}
        directory, manifest = newest
        files = [file for file in manifest.files if is_sharable(file.name)]
        places = {file.base or directory for file in files}
        objects = {name: size for place in places for name, size in self._catalog.store.list(place).items()}
        return _shared(directory, manifest, [file for file in files if objects.get(file.path(directory)) == file.bytes])

    def _stands_on(self) -> tuple[str, Manifest] | None:
        """The newest whole checkpoint of the attempts before, up to where this one went on."""
        until = {ancestor.attempt: ancestor.until_step for ancestor in self._lineage}
        for save in saves_among(self._catalog.names() if until else ()):
            if save.step <= until.get(save.attempt.id, -1):
                entry = self._catalog.known(save)
                if entry.state == "whole" and entry.manifest is not None:
                    return save.directory, entry.manifest
        return None

    def committed(self, directory: str, manifest: Manifest) -> None:
        """A save of this attempt is committed: the next one may refer to its files."""
        self._newest = directory, manifest

    def wrote(self, directory: str, plan: SavePlan, receipt: Receipt) -> None:
        """This rank's share of a save is written."""
        own = [(shard, file) for shard, file in zip(plan.own_shards, receipt.files, strict=True) if shard.is_frozen]
        found = {(shard.part, file.bytes, file.checksum): file.seen_from_later(directory) for shard, file in own}
        self._own = directory, found
        before, shards = self._blocks, [shard for shard, _ in own]
        self._blocks = {
            (each.part, info.path): receipt.blocks[each.part][info.path] for each in shards for info in each.tensors
        }
        moved = [key for key, blocks in self._blocks.items() if before.get(key, blocks) != blocks]
        self._moved |= {(part, name.partition("~2")[0]) for part, name in moved}  # of a piece, the tensor


def sharded_worth_it(keys: Collection[Key], parts: Mapping[str, Encoded], sharding: Sharding) -> frozenset[Key]:
    """Of the sharded tensors that all ranks say to be frozen, those that get shards of their own."""
    sizes = {
        (name, path): math.prod(placed.shape) * part.tensors[path].element_size()
        for name, part in parts.items()
        for path, placed in part.placed.items()
        if not sharding.is_whole((name, path), placed.shape)
    }
    return _worth_it({key: sizes[key] for key in keys if key in sizes}, sum(sizes.values()))


def _worth_it(found: Mapping[Key, int], all_bytes: int) -> frozenset[Key]:
    frozen_bytes = sum(found.values())
    return frozenset(found if frozen_bytes >= max(LEAST_BYTES, LEAST_PART * all_bytes) else ())


def _shared(directory: str, manifest: Manifest, files: Sequence[FileInfo]) -> Shared:
    """Of the files of a checkpoint, what later ones call them."""
    parts = {file: name for name, part in manifest.parts.items() for file in part.files}
    return {(parts[file.name], file.bytes, file.checksum): file.seen_from_later(directory) for file in files}
