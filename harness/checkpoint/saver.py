"""Saving: what happens around a commit, beside the training, and what a failed save means.

Each rank that writes has a ``Saver``: rank 0 alone, or several of which each writes its share (``Writers``). ``begin`` takes
a snapshot of the state (see ``harness.checkpoint.staging``) and leaves the rest to two threads, in calls that do without the
interpreter lock: one copies and hashes, the other one follows and writes. At most one save is under way. Its result is
handed out by ``poll`` or ``wait``. ``save`` does everything before it returns, without a copy of the state.

The threads have the priority of any other. With less of it, it takes as much from a training that keeps all cores busy, only
later: at a niceness of 10 a checkpoint of 0.5 GB was durable after 1.3 s instead of 0.4 s, and the steps lost no less.

A save whose state has changed while it was copied (``Torn``) is not committed. From then on all is copied at the step
boundary, and ``must_repeat`` asks for another save at the next one. The first saves of an attempt (``proofs``) are copied so
from the beginning, and show whether the others need be.

A save that fails is told of each time and counted; training goes on, because the checkpoints that exist are untouched, and
the disk may have room again at the next one. After ``failures_allowed`` in a row, or when the save was the last thing to
do, the error is raised.

Of several writers the first one commits, and judges: what fails on another it learns from that one's receipt, and the other
goes on as if nothing had happened.
"""

import concurrent.futures
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.checkpoint import commit, staging
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.commit import Torn
from harness.checkpoint.format import Ancestor, Attempt, Receipt, new_directory
from harness.checkpoint.frozen import Frozen, IsFrozen, nothing_is_frozen
from harness.checkpoint.plan import Found, IsSteady, SavePlan, Writers, nothing_is_steady, planned
from harness.checkpoint.retention import Pruner, Retention
from harness.checkpoint.sharding import Key, Sharding
from harness.checkpoint.staging import HostMemory, Snapshot
from harness.checkpoint.tree import Encoded
from harness.errors import HarnessError, StoreError
from harness.runtime.gc_pause import without_collections
from harness.runtime.threads import Background, Worker
from harness.storage.store import Store

log = logging.getLogger(__name__)

SHORTEST_PATIENCE_SECONDS = 2.0
Parts = Mapping[str, Mapping[str, Any] | Encoded]
_THREAD = "harness-saver"
_CHANGES_ELSEWHERE = (
    "%s changed outside of optimizer.step(): from now on each save copies everything at the step boundary, which takes "
    "longer. No checkpoint is wrong. Set checkpoint.overlap to false to avoid this message"
)


@dataclass(frozen=True)
class Saved:
    """A commit, and what it took."""

    step: int
    directory: str
    bytes: int  # that were written: those of earlier saves that it refers to do not count
    seconds: float  # until it was committed, and what is not to be kept was deleted
    blocked_seconds: float  # of these, how long the training waited for it
    retries: int = 0  # calls of the storage that had to be tried again, whoever made them


@dataclass(frozen=True)
class SaveRequest:
    """What is to be saved, besides the state.

    ``meta`` is JSON for the manifest; ``best_step`` is a step whose checkpoint is kept whatever its age. ``directory`` is
    where, the same for all writers; the first one chooses it where it is empty. ``is_steady`` says which tensors change in
    the optimizer's step alone, and are the same on all writers. ``sharding`` says which rank has which part of what is
    sharded; None where nothing is. ``is_frozen`` says which tensors nothing is expected to change, ``frozen`` which sharded
    ones, as all ranks have agreed; ``base`` is the checkpoint that has these, as the first writer says.
    """

    step: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    directory: str = ""
    is_steady: IsSteady = nothing_is_steady
    sharding: Sharding | None = None
    is_frozen: IsFrozen = nothing_is_frozen
    frozen: frozenset[Key] = frozenset()
    base: str = ""


@dataclass
class _Order:
    """A request that is carried out."""

    request: SaveRequest
    latest: float  # until when the other writers are waited for
    store: Store
    expected: Found | None = None  # checksums, where they are to be compared
    retries_before: int = field(init=False)  # of the store

    def __post_init__(self) -> None:
        self.retries_before = self.store.retries

    def saved(self, committed: tuple[str, int] | None, seconds: float, blocked_seconds: float) -> Saved | None:
        """What it took, where something was committed: a directory, and its bytes."""
        if committed is None:
            return None
        retries = self.store.retries - self.retries_before
        return Saved(self.request.step, *committed, seconds, blocked_seconds, retries)


class _Housekeeper:
    """Deletes, around a commit, what is not to be kept and what is no checkpoint. Where that fails, the commit stands."""

    def __init__(self) -> None:
        self._failed: list[str] = []  # directories of saves that failed, and that are to be deleted
        self._has_swept = False  # what earlier attempts have left unfinished

    def clean_up(self, pruner: Pruner, owner: Attempt | None) -> None:
        """Deletes what attempts before the run's owner have left unfinished, once, and what failed saves have."""
        try:
            if owner is not None and not self._has_swept:
                pruner.sweep(owner)
                self._has_swept = True
            while self._failed:
                pruner.discard(self._failed[-1])
                self._failed.pop()
        except StoreError as error:
            log.warning("could not delete the files of unfinished saves: %s", error)

    @contextlib.contextmanager
    def discarding(self, directory: str, pruner: Pruner, owner: Attempt | None, *, at_once: bool) -> Iterator[None]:
        """After an error, deletes what was put into a directory: it takes the room that the next save needs.

        That waits for the next save where the storage fails for the moment, and would hold the bad news up, and without
        ``at_once``, where other writers may still be at their shares.
        """
        try:
            yield
        except Exception as error:
            self._failed.append(directory)
            if at_once and not (isinstance(error, StoreError) and error.transient):
                self.clean_up(pruner, owner)
            raise

    def tidy(self, pruner: Pruner, owner: Attempt, retention: Retention, best_step: int | None) -> None:
        """Deletes the checkpoints that are not to be kept. Raises ``Superseded``."""
        try:
            pruner.tidy(retention, best_step, owner)
        except StoreError as error:  # the commit stands; what is left over goes after the next one
            log.warning("could not delete old checkpoints; training continues, and the next save tries again: %s", error)


@dataclass
class Saver:
    """Writes the checkpoints of one attempt."""

    catalog: Catalog
    attempt: Attempt
    lineage: Sequence[Ancestor]
    retention: Retention
    shard_bytes: int
    failures_allowed: int
    streams: int = 1
    owns_run: bool = True  # nobody else writes there: what others have left goes, and a newer attempt ends this one
    writers: Writers = field(default_factory=Writers)
    memory: HostMemory = field(default_factory=lambda: HostMemory(pinned=False))
    memory_limit_bytes: int | None = None
    before_commit: Callable[[], None] = lambda: None  # called before a commit, in the thread that writes
    on_failure: Callable[[int, str], None] = lambda _step, _error: None  # called with a save that failed
    proofs: int = 0  # so many more saves show that only the optimizer changes what is copied beside the training
    failures: int = 0
    must_repeat: bool = False  # the save before was torn
    _directories: int = 0  # that were named
    _changes_elsewhere: bool = False  # what is copied beside the training
    _plan: SavePlan | None = None  # of the save before
    _under_way: "_Writing | None" = None
    _worker: Worker = field(default_factory=lambda: Worker(_THREAD))
    _housekeeper: _Housekeeper = field(default_factory=_Housekeeper)

    def __post_init__(self) -> None:
        self.frozen = Frozen(self.catalog, self.lineage)

    def new_directory(self, step: int) -> str:
        """A name for the directory of a save: the first writer chooses it, and all write there."""
        self._directories += 1
        return new_directory(step, self.attempt, self._directories)

    def save(self, parts: Parts, request: SaveRequest, *, must_succeed: bool = False) -> Saved | None:
        """Commits a checkpoint, then deletes what is not to be kept.

        None when it failed and training may go on, and on other writers than the first. Raises ``Superseded`` when a newer
        attempt has taken the run over, ``Unsupported`` for a state that cannot be written.
        """
        assert self._under_way is None, "the result of the save before this one comes first"
        began = time.monotonic()
        order = self._order(request)

        def write() -> tuple[str, int] | None:
            with self._telling(order):
                encoded = commit.encode(parts)
                self._plan = plan = self._planned(encoded, request)
                contents = commit.streamed(plan, encoded)
                return self.catalog.store.together(lambda: self._write(plan, encoded, contents, order)).result()

        committed = self._committed(request.step, write, must_succeed=must_succeed)
        seconds = time.monotonic() - began
        self.must_repeat = False
        return order.saved(committed, seconds, seconds)

    def begin(self, parts: Parts, request: SaveRequest, *, overlap: bool = True, check: bool = False) -> None:
        """Begins to save what ``parts`` are now.

        Whoever changes a tensor that the request calls steady calls ``fence`` first; without ``overlap`` all is copied
        before ``begin`` returns. ``check`` compares what is written with the state as it is now, and raises ``Unsupported``
        from ``poll`` or ``wait`` when something has changed it in between. It costs a pass over the state. Without it such a
        save is dropped (see ``must_repeat``). A state that does not fit into ``memory_limit_bytes`` is written before
        ``begin`` returns.
        """
        assert self._under_way is None, "the result of the save before this one comes first"
        began = time.monotonic()
        self.must_repeat = False
        order, is_steady = self._order(request), request.is_steady
        with self._telling(order), without_collections():
            encoded = commit.encode(parts)
            if check and (self.writers.is_first or request.sharding):
                order.expected = commit.checksums(encoded)
            self._plan = plan = self._planned(encoded, request)
            shards = plan.own_shards
            snapshot = None
            if self.memory_limit_bytes is None or staging.size_bytes(shards) <= self.memory_limit_bytes:
                own, steady = plan.own(encoded, is_steady)
                overlap = overlap and not self._changes_elsewhere
                is_proof = overlap and not check and self.proofs > 0
                self.proofs -= is_proof
                snapshot = Snapshot(shards, own, self.memory, steady, overlap=overlap, is_proof=is_proof)
            contents = commit.streamed(plan, encoded) if snapshot is None else snapshot.images
            rest = {name: replace(part, tensors={}) for name, part in encoded.items()}  # which are not held any longer
            write = functools.partial(self._write, plan, rest, contents, order)
            if snapshot is not None and not check:
                write = functools.partial(write, confirm=snapshot.refuse_torn)
            self._under_way = _Writing(snapshot, lambda: self.catalog.store.together(write), order, began, self._worker)
        if snapshot is None:
            self._under_way.join()
        self._under_way.blocked_seconds = time.monotonic() - began

    def _planned(self, encoded: Mapping[str, Encoded], request: SaveRequest) -> SavePlan:
        whole = self.frozen.among(encoded, request.is_frozen) if self.writers.is_first else frozenset[Key]()
        given = self.writers, request.is_steady, request.sharding, whole | request.frozen
        return planned(self._plan, encoded, self.shard_bytes, *given)

    def base(self) -> str:
        """The checkpoint whose frozen shards the next save may refer to. The first writer knows it once the save that is
        under way has ended; another begins no sooner."""
        if self._under_way is not None:
            self._under_way.block()
        return self.frozen.base

    def fence(self) -> None:
        """To be called before anything steady is changed: waits until the snapshot does not need it any more."""
        writing = self._under_way  # another thread may wait for it, and take it away
        if writing is not None and (strayed := writing.fence()):
            self._copy_at_once(Torn(strayed))

    def _copy_at_once(self, torn: Torn) -> None:
        """From here on all is copied at the step boundary. Says so, once."""
        if not self._changes_elsewhere:
            log.warning(_CHANGES_ELSEWHERE, torn)
        self._changes_elsewhere = True

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, or its result has not been asked for."""
        return self._under_way is not None

    def poll(self) -> Saved | None:
        """What has become of the save that is under way, once, when it is over; raises what ``save`` raises."""
        return self.wait() if self._under_way is not None and self._under_way.is_over else None

    def wait(self) -> Saved | None:
        """Waits for the save that is under way, and says what ``save`` says."""
        if self._under_way is None:
            return None
        writing = self._under_way
        writing.block()
        self._under_way = None
        committed = self._committed(writing.order.request.step, writing.result)
        seconds = max(writing.seconds, writing.blocked_seconds)  # who waits hears of the end a little later
        return writing.order.saved(committed, seconds, writing.blocked_seconds)

    def let_end(self, seconds: float) -> None:
        """Leaves a save that is under way some time to end, as ``give_up_after`` does. Any thread may call it."""
        if (writing := self._under_way) is not None:
            now = time.monotonic()
            writing.order.latest = min(writing.order.latest, now + max(now - writing.began, SHORTEST_PATIENCE_SECONDS))
            writing.join(seconds)

    def give_up_after(self, seconds: float) -> Saved | None:
        """Leaves a save that is under way some time to end, whatever comes of it: the training is over. Raises nothing.

        Another writer may be what has ended it. One that is alive is done when it has had as long again.
        """
        if (writing := self._under_way) is None:
            return None
        self.let_end(seconds)
        if not writing.is_over:
            what = f"gave up the save of step {writing.order.request.step}, which was not done after another {seconds:.0f} s"
            log.warning("%s; the last committed checkpoint is kept", what)
            self._under_way, self._worker = None, Worker(_THREAD)
            return None
        with contextlib.suppress(HarnessError):  # what ends the training matters more
            return self.wait()
        return None

    def _order(self, request: SaveRequest) -> _Order:
        assert request.directory or self.writers.is_first, "the first writer says where"
        request = replace(request, directory=request.directory or self.new_directory(request.step))
        return _Order(request, time.monotonic() + self.writers.patience_seconds, self.catalog.store)

    def _write(
        self,
        plan: SavePlan,
        parts: Mapping[str, Encoded],
        contents: Sequence[commit.Content],
        order: _Order,
        confirm: Callable[[], None] = lambda: None,
    ) -> tuple[str, int] | None:
        """Writes this rank's share. The first writer commits, and tidies up before and after it: the directory and its
        bytes. ``confirm`` raises ``Torn`` where what was written is not the state of the step boundary."""
        store, request, directory = self.catalog.store, order.request, order.request.directory

        def write_share() -> Receipt:
            shared = None
            if any(content.shard.is_frozen for content in contents):
                shared = self.frozen.there() if self.writers.is_first else self.frozen.at(request.base)
            receipt = commit.write_share(store, directory, plan, contents, self.streams, shared)
            self.frozen.wrote(directory, plan, receipt)
            confirm()
            if order.expected is not None:
                commit.refuse_changed_boxes(plan, receipt, order.expected)
            return receipt

        with self._telling(order):
            if not self.writers.is_first:
                receipt = write_share()
                commit.put_receipt(store, directory, receipt)
                return None
            pruner, owner = Pruner(self.catalog), self.attempt if self.owns_run else None
            self._housekeeper.clean_up(pruner, owner)
            with self._housekeeper.discarding(directory, pruner, owner, at_once=len(self.writers.ranks) == 1):
                receipt = write_share()
                self.before_commit()
                receipts = [receipt, *commit.collect(store, directory, plan, lambda: order.latest)]
                header = commit.Header(request.step, self.attempt, self.lineage, request.meta)
                manifest = commit.publish(store, directory, plan, parts, receipts, header, order.expected)
            self.catalog.add(directory, manifest)
            self.frozen.committed(directory, manifest)
            if owner is not None:
                self._housekeeper.tidy(pruner, owner, self.retention, request.best_step)
            return directory, manifest.bytes - manifest.shared_bytes

    @contextlib.contextmanager
    def _telling(self, order: _Order) -> Iterator[None]:
        """On another writer than the first, tells that one of an error: what follows from it is not decided here."""
        try:
            yield
        except Exception as error:
            if self.writers.is_first:
                raise
            receipt = _receipt_of(error, self.writers.rank)
            if isinstance(error, Torn):
                self._copy_at_once(error)
            else:
                what = f"save of step {order.request.step}: the share of rank {receipt.rank} FAILED"
                log.error("%s: %s", what, receipt.problem)  # noqa: TRY400
            with contextlib.suppress(StoreError):  # then it is the silence that tells
                commit.put_receipt(self.catalog.store, order.request.directory, receipt)
            if not isinstance(error, Torn | HarnessError):
                raise

    def _committed(
        self, step: int, write: Callable[[], tuple[str, int] | None], *, must_succeed: bool = False
    ) -> tuple[str, int] | None:
        """What ``_write`` says; None when it failed, which is told of and counted, and training may go on."""
        try:
            committed = write()
        except Torn as torn:
            self._copy_at_once(torn)
            self.must_repeat = True
            return None
        except StoreError as error:
            self.failures += 1
            what = f"save of step {step} FAILED ({self.failures} in a row)"
            log.error("%s: %s", what, error)  # noqa: TRY400  # a full disk needs no traceback
            self.on_failure(step, str(error))
            if must_succeed or self.failures > self.failures_allowed:
                raise
            return None
        self.failures = 0
        return committed


def _receipt_of(error: Exception, rank: int) -> Receipt:
    """What tells the first writer of an error on another one."""
    is_ours = isinstance(error, Torn | HarnessError)
    problem = str(error) if is_ours else f"{type(error).__name__}: {error}"
    return Receipt(rank, problem=problem, is_of_storage=isinstance(error, StoreError), is_torn=isinstance(error, Torn))


class _Writing:
    """A save that is under way: it makes the rest of the copy, while ``write`` begins to write it in another thread."""

    def __init__(
        self,
        snapshot: Snapshot | None,
        write: Callable[[], Background[tuple[str, int] | None]],
        order: _Order,
        began: float,
        worker: Worker,
    ) -> None:
        self.order = order
        self.began = began
        self.blocked_seconds = 0.0
        self.seconds = 0.0
        self._snapshot = snapshot
        self._write = write
        self._future = worker.begin(self._work)

    def _work(self) -> tuple[str, int] | None:
        try:
            try:
                writing = self._write()
            finally:  # whatever happens: the optimizer may wait for it
                if self._snapshot is not None:
                    self._snapshot.drain()
            return writing.result()
        finally:
            self.seconds = time.monotonic() - self.began

    def fence(self) -> list[str]:
        """Waits until the snapshot does not need the state any more; what it has proved to change elsewhere."""
        if self._snapshot is None:
            return []
        began = time.monotonic()
        self._snapshot.fence()
        self.blocked_seconds += time.monotonic() - began
        return self._snapshot.strayed

    @property
    def is_over(self) -> bool:
        """Whether there is a result."""
        return self._future.done()

    def block(self) -> None:
        """Waits for the result, and has the training wait."""
        began = time.monotonic()
        self.join()
        self.blocked_seconds += time.monotonic() - began

    def join(self, seconds: float | None = None) -> None:
        """Waits for the result, so long at most."""
        concurrent.futures.wait([self._future], seconds)

    def result(self) -> tuple[str, int] | None:
        """What ``write`` has said."""
        return self._future.result()
