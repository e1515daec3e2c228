"""Files that several ranks want whole, read once between them: each reads its share of the pieces, and hands it on to all.

Whatever goes wrong on one of them, all stop after the same round.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from harness.checkpoint.format import FileInfo
from harness.errors import CheckpointError, Corrupt, HarnessError, RankFailure, StoreError
from harness.storage.direct_io import Buffer
from harness.storage.store import RANGE_BYTES, Store

ROUND_BYTES = 16 << 20  # of all pieces that ranks hand on at once: they hold them all,
SMALLEST_PIECE_BYTES = 64 << 10  # however many they are


class Peers(Protocol):
    """The ranks that read together; ``harness.distributed.world.World`` is one."""

    rank: int
    size: int

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Fills ``found`` with every rank's bytes, by rank. All have the same size."""


def raise_for(ranks: Iterable[int]) -> None:
    """Raises ``RankFailure`` if there are ranks that have failed."""
    if failed := list(ranks):
        raise RankFailure(
            f"ranks {failed} could not read their share of the checkpoint, or found it corrupt; see their messages"
        )


@dataclass(frozen=True)
class Piece:
    """A piece of a file; the last one is read with one byte more, which must not be there."""

    file: FileInfo
    name: str
    start: int
    size_bytes: int

    @property
    def is_last(self) -> bool:
        return self.start + self.size_bytes == self.file.bytes

    def check(self, data: bytes) -> None:
        if len(data) != self.size_bytes:
            found = "more" if len(data) > self.size_bytes else self.start + len(data)
            raise Corrupt(f"{self.name}: expected {self.file.bytes} bytes, found {found}")


class Relay:
    """Files in pieces, of which each rank reads its share and hands it on; one rank alone reads them all.

    A round has a piece of each rank. What a rank sends begins with a byte that says whether anything has gone wrong there;
    after a round in which it has, nobody goes on.
    """

    def __init__(self, store: Store, directory: str, files: Iterable[FileInfo], peers: Peers | None) -> None:
        self.store = store
        self.peers = peers
        share_bytes = ROUND_BYTES // (peers.size if peers else 1)
        self.piece_bytes = max(min(share_bytes, RANGE_BYTES), SMALLEST_PIECE_BYTES)
        self.schedule = [
            Piece(file, file.path(directory), start, min(self.piece_bytes, file.bytes - start))
            for file in files
            for start in range(0, file.bytes, self.piece_bytes)
        ]
        self.problem: HarnessError | None = None

    def count(self, file: FileInfo) -> int:
        """How many pieces a file has."""
        return -(-file.bytes // self.piece_bytes)

    def pieces(self) -> Iterator[Buffer]:
        """All pieces of all files, in order. Raises what this rank has failed of, or ``RankFailure`` when another has."""
        if self.peers is None:
            yield from self._own(self.schedule)
            return
        rank, size = self.peers.rank, self.peers.size
        own = self._own(self.schedule[rank::size])
        sent = torch.zeros(1 + self.piece_bytes, dtype=torch.uint8, device="cpu")
        found = torch.empty((size, 1 + self.piece_bytes), dtype=torch.uint8, device="cpu")
        for start in range(0, len(self.schedule), size):
            pieces = self.schedule[start : start + size]
            try:
                if rank < len(pieces) and self.problem is None:
                    data = next(own)
                    sent.numpy()[1 : 1 + len(data)] = np.frombuffer(data, np.uint8)
            except (CheckpointError, StoreError) as error:
                self.problem = error
            sent[0] = self.problem is not None
            width = 1 + max(piece.size_bytes for piece in pieces)
            self.peers.exchange(sent[:width], [row[:width] for row in found])
            if self.problem is not None:
                raise self.problem
            raise_for(found[:, 0].nonzero().flatten().tolist())
            for piece, row in zip(pieces, found, strict=False):
                yield row[1 : 1 + piece.size_bytes].numpy().data

    def _own(self, share: Sequence[Piece]) -> Iterator[bytes]:
        ranges = ((piece.name, piece.start, piece.size_bytes + piece.is_last) for piece in share)
        found = self.store.pieces(ranges)
        for piece in share:
            try:
                data = next(found)
            except FileNotFoundError:
                raise Corrupt(f"{piece.name}: missing; expected {piece.file.bytes} bytes") from None
            piece.check(data)
            yield data
