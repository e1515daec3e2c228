"""Frozen parameters are written once: which tensors get shards of their own, and which earlier save has such a shard.

What is said to be frozen is a hint. A save hashes what it copies, as any does. It leaves a shard out where the newest
checkpoint that the run stands on names a file with the same size and checksum, which is looked for before, and once more
before the commit. What has moved between two saves gets no such shard from then on.

No reference leads to another one: it names the directory that really has the file.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from harness.checkpoint.catalog import Catalog, saves_among
from harness.checkpoint.commit import Shared
from harness.checkpoint.format import Ancestor, Blocks, Manifest, Receipt, is_sharable
from harness.checkpoint.plan import SavePlan
from harness.checkpoint.sharding import Key
from harness.checkpoint.tree import Encoded

LEAST_BYTES = 64 << 20  # for less it is not worth it that a checkpoint does not lie in one directory,
LEAST_PART = 0.25  # nor for less of the state

IsFrozen = Callable[[torch.Tensor], bool]


def nothing_is_frozen(_tensor: torch.Tensor) -> bool:
    """Everything may change from save to save."""
    return False


class Frozen:
    """The frozen parameters of one attempt, as its first writer knows them."""

    def __init__(self, catalog: Catalog, lineage: Sequence[Ancestor]) -> None:
        self._catalog, self._lineage = catalog, lineage
        self._newest: tuple[str, Manifest] | None = None
        self._blocks: dict[Key, Blocks] = {}  # what the last save had of them
        self._moved: set[Key] = set()

    def among(self, parts: Mapping[str, Encoded], is_frozen: IsFrozen) -> frozenset[Key]:
        """The tensors that get shards of their own. Each rank's part of a sharded one is never among them."""
        if is_frozen is nothing_is_frozen:
            return frozenset()
        sizes = {
            (name, path): tensor.nbytes
            for name, part in parts.items()
            for path, tensor in part.tensors.items()
            if is_frozen(tensor) and path not in part.placed and (name, path) not in self._moved
        }
        if (frozen_bytes := sum(sizes.values())) < LEAST_BYTES:
            return frozenset()
        all_bytes = sum(tensor.nbytes for part in parts.values() for tensor in part.tensors.values())
        return frozenset(sizes) if frozen_bytes >= LEAST_PART * all_bytes else frozenset()

    def there(self) -> Shared:
        """The frozen shards of the newest checkpoint that the run stands on, of which the files are there now."""
        if (newest := self._newest or self._stands_on()) is None:
            return {}
        directory, manifest = newest
        files = [file for file in manifest.files if is_sharable(file.name)]
        places = {file.base or directory for file in files}
        objects = {name: size for place in places for name, size in self._catalog.store.list(place).items()}
        parts = {file: name for name, part in manifest.parts.items() for file in part.files}
        return {
            (parts[file.name], file.bytes, file.checksum): file.seen_from_later(directory)
            for file in files
            if objects.get(file.path(directory)) == file.bytes
        }

    def _stands_on(self) -> tuple[str, Manifest] | None:
        """The newest whole checkpoint of the attempts before, up to where this one went on."""
        until = {ancestor.attempt: ancestor.until_step for ancestor in self._lineage}
        for save in saves_among(self._catalog.names() if until else ()):
            if save.step <= until.get(save.attempt.id, -1):
                entry = self._catalog.known(save)
                if entry.state == "whole" and entry.manifest is not None:
                    return save.directory, entry.manifest
        return None

    def committed(self, directory: str, manifest: Manifest, plan: SavePlan, receipt: Receipt) -> None:
        """A save of this attempt is committed: the next one may refer to its files."""
        self._newest = directory, manifest
        before, shards = self._blocks, [shard for shard in plan.own_shards if shard.is_frozen]
        self._blocks = {
            (each.part, info.path): receipt.blocks[each.part][info.path] for each in shards for info in each.tensors
        }
        moved = [key for key, blocks in self._blocks.items() if before.get(key, blocks) != blocks]
        self._moved |= {(part, name.partition("~2")[0]) for part, name in moved}  # of a piece, the tensor
