"""Which samples are trained when, and by whom: a function of the seed and of one global position.

The order of epoch *e* is a permutation that depends on ``(seed, e)`` alone. A global batch is the next
``global_batch_size`` samples of it (the last of an epoch may be shorter: every sample is trained once an epoch; with
``drop_last`` it is left out, and each epoch leaves out other samples). The position is data, not replay: ``Cursor`` says how
many samples of which epoch have been trained, at any world size.

A batch is divided among the ranks in contiguous shares whose sizes differ by at most one. Gradients are weighted by samples,
so the sum over ranks is the mean over the batch whatever the shares. A rank whose share is empty (a batch of fewer
samples than ranks) goes through the motions with a sample that weighs nothing, because DDP waits for every rank.

What a sample looks like must not depend on which process fetches it, nor when: before a sample is fetched, the generators
of Python, NumPy and torch are seeded from ``(seed, epoch, index)``, and in the training process put back afterwards.
"""

import contextlib
import functools
import gc
import inspect
import itertools
import logging
import multiprocessing
import signal
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType, GeneratorType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from harness import torch_private
from harness.data.dataset import Attributes, Sketch, others, sketch
from harness.data.seeding import generators_kept, mix, seed_process
from harness.distributed.world import rank_and_size
from harness.errors import ConfigError, Corrupt, Mismatch
from harness.runtime.signals import STOP_SIGNALS, deaf_children, die_with_parent

log = logging.getLogger(__name__)


class Cursor(NamedTuple):
    """The position of a run: ``offset`` samples of ``epoch`` have been trained."""

    epoch: int = 0
    offset: int = 0


class MicroBatch(NamedTuple):
    """Samples that a rank puts through the model at once, and their weight in the mean over the global batch."""

    epoch: int
    indices: tuple[int, ...]
    weight: float


@dataclass(frozen=True)
class Schedule:
    """Divides a data set of ``samples`` into global batches, those into ranks' shares, those into micro-batches."""

    samples: int
    seed: int
    global_batch_size: int
    micro_batch_size: int | None
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("task: expected a data set with samples, found an empty one")
        if self.drop_last and self.samples < self.global_batch_size:
            sizes = f"{self.samples} samples, and a global batch {self.global_batch_size}"
            raise ConfigError(f"drop_last: expected at least one whole batch; the data set has {sizes}")

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of an epoch. Shape (samples,), int64. NumPy's, which cuts a batch out of it ten times as fast."""
        return _order(self.samples, self.seed, epoch)

    def size(self, cursor: Cursor) -> int:
        """How many samples the batch that begins at ``cursor`` has."""
        return min(self.global_batch_size, self.samples - cursor.offset)

    def after(self, cursor: Cursor) -> Cursor:
        """The position after the batch that begins at ``cursor``."""
        return self.settled(Cursor(cursor.epoch, min(cursor.offset + self.global_batch_size, self.samples)))

    def settled(self, cursor: Cursor) -> Cursor:
        """The position itself, or the next epoch's beginning where no batch of this one is left."""
        left = self.samples - cursor.offset
        is_over = left < self.global_batch_size if self.drop_last else left == 0
        return Cursor(cursor.epoch + 1) if is_over else cursor

    def steps_per_epoch(self) -> int:
        """How many global batches an epoch has."""
        return self.samples // self.global_batch_size + (not self.drop_last and self.samples % self.global_batch_size > 0)

    def fewest_at_once(self, world_size: int) -> int:
        """How many samples the smallest micro-batch of an epoch has, over all ranks; a rank without a share has one to go
        along with."""
        sizes = {min(self.global_batch_size, self.samples)}
        if not self.drop_last:
            sizes.add(self.samples % self.global_batch_size or self.global_batch_size)
        shares = {max(1, (size + extra) // world_size) for size in sizes for extra in (0, world_size - 1)}
        micro_batches = {(share, self.micro_batch_size or share) for share in shares}
        return min(share % at_once or at_once for share, at_once in micro_batches)

    def steps(self, cursor: Cursor, rank: int, world_size: int) -> Iterator[list[MicroBatch]]:
        """The rank's micro-batches of every step from a position on, without end."""
        cursor = self.settled(cursor)
        while True:
            order = self.order(cursor.epoch)
            while True:
                batch = order[cursor.offset : cursor.offset + self.global_batch_size]
                yield self._share(cursor.epoch, batch.tolist(), rank, world_size)
                epoch, cursor = cursor.epoch, self.after(cursor)
                if cursor.epoch != epoch:
                    break

    def _share(self, epoch: int, batch: Sequence[int], rank: int, world_size: int) -> list[MicroBatch]:
        share = batch[rank * len(batch) // world_size : (rank + 1) * len(batch) // world_size]
        if not share:
            return [MicroBatch(epoch, (batch[0],), 0.0)]
        size = self.micro_batch_size or len(share)
        pieces = (tuple(share[start : start + size]) for start in range(0, len(share), size))
        return [MicroBatch(epoch, piece, len(piece) / len(batch)) for piece in pieces]


@functools.lru_cache(maxsize=2)  # the loader's workers may be an epoch ahead
def _order(samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    generator = torch.Generator("cpu").manual_seed(mix(seed, epoch))  # whatever torch.set_default_device says
    return torch.randperm(samples, generator=generator, device="cpu").numpy()


def is_due(step: int, epochs: tuple[int, int], every_steps: int | None, every_epochs: int | None) -> bool:
    """Whether an interval ends with a step of this number. ``epochs`` are those of the next batch, at the boundary before
    and at this one: an interval of epochs ends where the number passes a multiple, whatever the steps do."""
    if every_steps is not None and step % every_steps == 0:
        return True
    before, now = epochs
    return every_epochs is not None and now // every_epochs > before // every_epochs


@dataclass
class Seeded(Dataset[Any]):
    """A data set whose samples are drawn with random numbers of their own."""

    dataset: Dataset[Any]
    seed: int | None
    set_epoch: Callable[[int], Any] | None  # called before the first sample of an epoch, in the process that fetches it
    epoch: int | None = None

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if self.set_epoch is not None and epoch != self.epoch:
            self.set_epoch(epoch)
            self.epoch = epoch
        if self.seed is None:
            return self.dataset[index]
        seed_process(mix(self.seed, epoch, index))
        return self.dataset[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        """Several samples, as a loader of torch's asks for them."""
        if self.seed is None and self.set_epoch is None:
            return [self.dataset[index] for _epoch, index in keys]
        return [self[key] for key in keys]


def batches(
    dataset: Dataset[Any],
    plan: Iterator[list[MicroBatch]],
    *,
    seed: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
    pin_memory: bool = False,
    tells_epoch: bool = False,
) -> Generator[list[tuple[Any, float]]]:
    """Fetches what a plan says: for each step, the collated micro-batches and their weights.

    Loader workers, where there are any, run ahead through the plan, over the ends of epochs too, and are never started
    anew. ``close()`` ends them. What ``collate`` draws goes on from the numbers of the last sample of its micro-batch.
    Samples are made on the CPU, since a worker could not make them elsewhere.
    """
    # torch's own collate and this data set are known to draw nothing, and seeding takes longer than fetching.
    draws = type(dataset) is not TensorDataset or collate is not None
    announced: list[list[MicroBatch]] = []  # steps whose batches were asked for and have not come yet, oldest first

    def keys() -> Iterator[list[tuple[int, int]]]:
        for step in plan:
            announced.append(step)
            for micro in step:
                yield [(micro.epoch, index) for index in micro.indices]

    loader = DataLoader(
        Seeded(dataset, seed if draws else None, _set_epoch(dataset) if tells_epoch else None),
        batch_sampler=keys(),
        num_workers=workers,
        collate_fn=collate or default_collate,
        pin_memory=pin_memory,
        worker_init_fn=_shield_worker if workers else None,
        generator=torch.Generator("cpu").manual_seed(seed),  # else every iterator takes a number from the training's
    )
    before = multiprocessing.active_children()
    with _on_cpu(), deaf_children():
        fetched = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    keeps, is_elsewhere = draws and not workers, torch.get_default_device().type != "cpu"  # asked once: it takes 10 µs
    try:
        while True:
            with generators_kept() if keeps else _NO_CARE, _on_cpu() if is_elsewhere else _NO_CARE:
                first = next(fetched)
                step = announced.pop(0)
                micro_batches = [(first, step[0].weight)] + [(next(fetched), micro.weight) for micro in step[1:]]
            yield micro_batches
    finally:
        if processes:
            torch_private.end_workers(fetched)
        for process in processes:  # those that are still busy ignore SIGTERM, and Python would wait for them when it exits
            process.kill()


def _shield_worker(_worker: int) -> None:
    """A worker outlives the signal that stops the run: torchrun signals the whole process group, and a trainer whose
    workers die cannot take its last steps. Workers end when the trainer closes them or is gone, whatever they are at."""
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


_NO_CARE = contextlib.nullcontext()


def _on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Has tensors made on the CPU where ``torch.set_default_device`` says otherwise."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _set_epoch(dataset: Any) -> Callable[[int], Any] | None:
    """The data set's ``set_epoch``, or that of the one within it, if there is one."""
    while dataset is not None and not callable(getattr(dataset, "set_epoch", None)):
        dataset = getattr(dataset, "dataset", None)
    return getattr(dataset, "set_epoch", None)


# --- the loader ------------------------------------------------------------------------------------------------------

Step = list[tuple[Any, float]]  # the micro-batches of a step on one rank, and the weight of each


@dataclass(frozen=True)
class SkippedBatch:
    """A batch that is not trained: where it begins, and how many samples it has."""

    epoch: int
    offset: int
    samples: int


class Loader:
    """Batches of a map-style data set: of every global batch, this rank's share, from a position that can be saved.

    ``for batch in loader`` gives the rest of the current epoch, collated; afterwards the loader is at the beginning of the
    next one. The order of an epoch depends on ``seed`` and its number alone, and the random numbers that a sample draws
    (Python's, NumPy's, torch's) on ``seed``, the epoch and the sample: the batches are the same with any number of
    ``workers``, and the global batches at any world size. The last batch of an epoch may be shorter, or is left out with
    ``drop_last``; ``weight`` is what this rank's mean loss counts in the mean over all ranks, and 1 where the shares are
    equal.

    Workers have a copy of the data set. They are started anew when an attribute of it was changed between two batches, so
    that they see the change as the process of the training does. With ``tells_epoch`` its ``set_epoch(epoch)`` is called in
    the process that fetches, before the first sample of each epoch.

    ``state_dict()`` is the position after the batch that was handed out last, the same on every rank, with a ledger: a
    running hash of the samples that were trained; and, where it is asked for before the first batch, with a ``fingerprint``:
    what three samples look like. Raises ``ConfigError`` for an empty data set or one whose length has changed, and
    ``Mismatch`` from ``load_state_dict`` where seed, size, order or samples are not those of the saved position.

    ``rank`` and ``world_size`` are by default those of ``init_process_group``, or that torchrun has given this process.

    A loop that asks for a batch has done with the one before. ``on_return`` is called then, before anything else; and
    ``on_exit`` when the loop over an epoch's batches has ended, however it did.
    """

    in_use: ClassVar[weakref.WeakSet["Loader"]] = weakref.WeakSet()  # those of this process that have handed out a batch

    def __init__(
        self,
        dataset: Dataset[Any],
        global_batch_size: int,
        *,
        seed: int = 0,
        micro_batch_size: int | None = None,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        tells_epoch: bool = False,
        fingerprint: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.dataset = dataset
        samples: int = len(dataset)  # type: ignore[arg-type]
        self.schedule = Schedule(samples, seed, global_batch_size, micro_batch_size, drop_last)
        own_rank, size = rank_and_size()
        self.is_placed = rank is not None or world_size is not None  # by the program, which may have its own reasons
        self.rank = own_rank if rank is None else rank
        self.world_size = size if world_size is None else world_size
        self.cursor = Cursor()  # after the batch that was handed out last
        self.weight = 1.0
        self.waited_seconds = 0.0  # for batches, in all
        self.used_at = 0.0  # when the last batch was asked for, by the performance counter
        self.skipped: list[SkippedBatch] = []
        self.on_return: Callable[[], None] = nothing
        self.on_exit: Callable[[], None] = nothing
        self._workers = workers
        self._collate = collate
        self._pin_memory = pin_memory
        self._tells_epoch = tells_epoch
        self.taken = 0  # batches, since the position was set
        self._latest: Cursor | None = None  # the batch that was handed out last
        # A loader that shares nothing may have data of the rank's own.
        self._compares = self._is_unknown = fingerprint and self.world_size >= size
        self._fingerprint: list[tuple[int, Sketch]] | None = None
        self._fetched: Generator[Step] | None = None
        self._fetched_from: tuple[Dataset[Any], Attributes | None] = dataset, None
        self._has_failed = self._has_warned = False
        self._changes = 0  # of the data set, that workers had to be started anew for
        self._walking: Callable[[], Any] = lambda: None  # the newest loop over an epoch
        self._goes_on = False  # the first one begins within an epoch, after a restart
        self._handed_out: Cursor | None = None  # the batch that is being trained, and is not in the ledger yet
        self._ledger = _Ledger(self.schedule)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.cursor.epoch

    @property
    def batch(self) -> int:
        """The number of the batch that was handed out last, within its epoch and from 0; -1 before the first one. It goes on
        after a restart, where ``enumerate`` would begin anew."""
        if self._latest is not None:
            return self._latest.offset // self.schedule.global_batch_size
        return self.cursor.offset // self.schedule.global_batch_size - 1

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return self.schedule.steps_per_epoch()

    def __iter__(self) -> Iterator[Any]:
        batches = self._walk()
        self._walking = weakref.ref(batches)
        return batches

    def _walk(self) -> Generator[Any]:
        epoch = self.cursor.epoch
        if self._goes_on and self.rank == 0:
            warn_of_counts(self._walking(), epoch, self.batch + 1)
        self._goes_on = False
        try:
            while self.cursor.epoch == epoch:
                step = self.next_step(whole=True)
                if step:
                    (batch, share), *_ = step
                    self.weight = share * self.world_size
                    yield batch
        finally:
            self.on_exit()

    def next_step(self, *, whole: bool = False) -> Step:
        """The micro-batches of the next global batch, of this epoch or the one after it, and what the mean loss of each
        counts in that of the global batch; nothing for a batch that is not to be trained. After an error the next call tries
        to fetch the same batch."""
        self.on_return()
        began = time.perf_counter()
        self._note()
        here = self.cursor
        self._has_failed = True  # until it has come
        self.used_at = began
        self._follow_changes()
        step = [] if self.is_skipped(here) else self._fetch(whole=whole)
        self._has_failed = False
        self._handed_out = self._latest = here
        self.taken += 1
        self.cursor = self.schedule.after(here)
        self.waited_seconds += time.perf_counter() - began
        return step

    @property
    def trained_epoch(self) -> int:
        """The epoch of the batch that was handed out last."""
        return (self._handed_out or self.cursor).epoch

    def samples(self, rank: int | None = None) -> list[int]:
        """The samples in a rank's share (by default this one's) of the batch that was handed out last, or is to be next."""
        here = self._handed_out or self.cursor
        share = next(self.schedule.steps(here, self.rank if rank is None else rank, self.world_size))
        return [index for micro_batch in share for index in micro_batch.indices]

    def is_skipped(self, cursor: Cursor) -> bool:
        """Whether the batch that begins here is not to be trained."""
        return bool(self.skipped) and any((each.epoch, each.offset) == cursor for each in self.skipped)

    def skip(self) -> SkippedBatch:
        """Notes that the batch that was handed out last is not trained."""
        assert self._handed_out is not None, "there is a batch to skip"
        here, self._handed_out = self._handed_out, None
        skipped = SkippedBatch(here.epoch, here.offset, self.schedule.size(here))
        self.skipped = [*self.skipped, skipped]
        self._ledger.skip(here)
        return skipped

    def leave_out(self, skipped: Sequence[SkippedBatch]) -> None:
        """Sets which batches are not to be trained, here and later on."""
        self.close()
        self.skipped = list(skipped)

    def end_epoch(self, epoch: int) -> None:
        """Goes to the beginning of the next epoch, if the loader is still within this one.

        Raises ``ConfigError`` where the loop went on without a batch that could not be fetched, or has gone through more
        epochs than this one.
        """
        if self._has_failed:
            raise ConfigError(
                f"epoch {epoch}: a batch could not be fetched, and the loop went on without the rest of the epoch; let the "
                "error end the program, or have the data set give another sample in place of a bad one"
            )
        if self.cursor.epoch > epoch + 1:
            times = self.cursor.epoch - epoch
            raise ConfigError(
                f"epoch {epoch}: the loop went through the loader {times} times, and each time is an epoch; go through it "
                "once, or make a second Loader"
            )
        if self.cursor.epoch == epoch:
            self._note()
            self.close()
            self._ledger.go_to(epoch + 1)
            self.cursor = Cursor(epoch + 1)

    def close(self) -> None:
        """Ends the workers; they are started again for the next batch."""
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None

    # --- its state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was handed out last, as plain numbers and words."""
        self._note()
        fingerprint = self.fingerprint()
        return {
            "seed": self.schedule.seed,
            "samples": self.schedule.samples,
            "epoch": self.cursor.epoch,
            "offset": self.cursor.offset,
            "gaps": [[each.epoch, each.offset, each.samples] for each in self.skipped],
            **self._ledger.state_dict(self.cursor),
            **({} if fingerprint is None else {"fingerprint": [list(each) for each in fingerprint]}),
        }

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``Mismatch`` where a saved position is not one in this data, ``Corrupt`` where it is none at all."""
        self._checked(state)

    def _checked(self, state: Mapping[str, Any]) -> "_Ledger":
        for key, live in (("seed", self.schedule.seed), ("samples", self.schedule.samples)):
            if (saved := state.get(key)) != live:
                raise Mismatch(f"{key}: the checkpoint was written with {saved!r}, the loader has {live!r}")
        numbers = [state.get("epoch"), state.get("offset")]
        if not all(type(number) is int and number >= 0 for number in numbers) or state["offset"] >= self.schedule.samples:
            raise Corrupt(f"impossible position in the data: epoch {numbers[0]!r}, offset {numbers[1]!r}")
        self._refuse_others(state.get("fingerprint"))
        return _Ledger.restored(self.schedule, Cursor(state["epoch"], state["offset"]), state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position. Raises as ``check_state_dict`` does."""
        ledger = self._checked(state)
        self.close()
        self._ledger = ledger
        self._handed_out = self._latest = None
        self.taken, self._has_failed = 0, False
        saved = Cursor(state["epoch"], state["offset"])
        self.cursor = self.schedule.settled(saved)
        self._goes_on = self.cursor.offset > 0
        self.skipped = [SkippedBatch(*each) for each in state["gaps"]]
        if self._compares:
            self._fingerprint = state.get("fingerprint") or self._fingerprint
        if self.cursor != saved and self.rank == 0:
            log.warning("epoch %d ends at sample %d: what is left of it is less than a batch, and drop_last is new", *saved)

    def _note(self) -> None:
        """Puts the batch that was handed out last into the ledger: it has been trained."""
        if self._handed_out is not None:
            here, self._handed_out = self._handed_out, None
            self._ledger.add(here, self.is_skipped(here))

    # --- fetching ----------------------------------------------------------------------------------------------------

    def _plan(self, schedule: Schedule) -> Iterator[list[MicroBatch]]:
        """What this rank trains, from here on and without end; batches that are not to be trained are not even fetched."""
        cursor = self.cursor
        for share in schedule.steps(cursor, self.rank, self.world_size):
            if not self.is_skipped(cursor):
                yield share
            cursor = schedule.after(cursor)

    def _fetch(self, *, whole: bool) -> Step:
        try:
            if self._fetched is None:
                Loader.in_use.add(self)
                self._fetched = self._fetching(replace(self.schedule, micro_batch_size=None) if whole else self.schedule)
                watched = Attributes(SimpleNamespace(dataset=self.dataset, collate=self._collate)) if self._workers else None
                self._fetched_from = self.dataset, watched
            return next(self._fetched)
        except BaseException:
            self.close()
            raise

    def _fetching(self, schedule: Schedule) -> Generator[Step]:
        return batches(
            self.dataset,
            self._plan(schedule),
            seed=self.schedule.seed,
            workers=self._workers,
            collate=self._collate,
            pin_memory=self._pin_memory,
            tells_epoch=self._tells_epoch,
        )

    def _follow_changes(self) -> None:
        """Has the next batch fetched from the data set as it is now. Raises ``ConfigError`` where its length has changed."""
        dataset, watched = self._fetched_from
        if self._fetched is not None:
            changed = "dataset" if dataset is not self.dataset else watched and watched.changed()
            if changed:
                self.close()
                self._warn_of_change(changed)
        if self._fetched is None or self.cursor.offset == 0:
            samples: int = len(self.dataset)  # type: ignore[arg-type]
            if samples != self.schedule.samples:
                raise ConfigError(
                    f"epoch {self.cursor.epoch}: the data set has {samples} samples, and had {self.schedule.samples} when "
                    "its Loader was made; keep its length, and let indices stand for other samples where it should change"
                )

    def _warn_of_change(self, changed: str) -> None:
        self._changes += 1
        if self.rank != 0 or not self._workers:
            return
        if self._changes == 1:
            log.info("%s was changed: the loader's workers are started anew, now and whenever it is", changed)
        if self._changes == _MANY_CHANGES:
            log.warning(
                "the loader's workers were started anew %d times because %s was changed, which takes time; change it less "
                "often, or use workers=0 (data.workers=0)",
                self._changes,
                changed,
            )

    # --- what the samples look like ----------------------------------------------------------------------------------

    def fingerprint(self) -> list[tuple[int, Sketch]] | None:
        """What three samples look like, as pairs of an index and a sketch: as the checkpoint has it that was loaded, or as
        they were before the first batch. None where nobody has asked then, where they cannot be fetched, or where they are
        others each time."""
        if self._is_unknown:
            self._is_unknown = False
            if not self.taken:
                self._fingerprint = self._draw_fingerprint()
        return self._fingerprint

    def agree(self, all_gather: Callable[[Any], list[Any]]) -> None:
        """Gives all ranks rank 0's fingerprint. All ranks call it. Raises ``ConfigError`` where they have other samples."""
        found = all_gather(self.fingerprint())
        differ = [rank for rank, each in enumerate(found) if found[0] and each and _are_others(found[0], each)]
        if differ and all(all_gather(self._is_repeatable())):
            raise ConfigError(f"the samples are not the same on ranks 0 and {differ[0]}: {_ADVICE}")
        self._fingerprint = found[0]

    def _refuse_others(self, saved: Any) -> None:
        """Raises ``Mismatch`` where a fingerprint that was saved is not that of this data set."""
        own = self.fingerprint()
        if saved and own and _are_others(saved, own) and self._is_repeatable():
            which = f"(sample {', '.join(map(str, others(saved, own)))} of the data set)"
            raise Mismatch(f"the samples are not those that were trained {which}: {_ADVICE}")

    def _is_repeatable(self) -> bool:
        """Whether the fingerprint is the same whenever it is taken; one that chance seldom changes may just look so."""
        return all(self._draw_fingerprint() == self._fingerprint for _ in range(_MANY_TIMES))

    def _draw_fingerprint(self) -> list[tuple[int, Sketch]] | None:
        """Fetches the samples twice, as for a batch of epoch 0."""
        size, begin = self.schedule.samples, mix(self.schedule.seed, 0)
        indices = sorted({(begin + number * size // _FINGERS) % size for number in range(_FINGERS)})
        plan = [[MicroBatch(0, (index,), 1.0)] * 2 for index in indices]
        fetching = batches(
            self.dataset,
            iter(plan),
            seed=self.schedule.seed,
            workers=min(1, self._workers),
            collate=_sketch_first,
            tells_epoch=self._tells_epoch,
        )
        try:
            with contextlib.closing(fetching):
                drawn = [[batch for batch, _ in step] for step in itertools.islice(fetching, len(plan))]
        except Exception as error:  # whatever it is, the training will meet it, too
            log.debug("no fingerprint of the data set: %s", error)
            return None
        for index, (first, second) in zip(indices, drawn, strict=True):
            if _are_others([(index, first)], [(index, second)]):
                if self.rank == 0 and not self._has_warned:
                    self._has_warned = True
                    log.warning(
                        "sample %d of the data set is another one each time: a resume trains on others than the run that "
                        "never stopped; draw its random numbers from Python's, NumPy's or torch's own generators",
                        index,
                    )
                return None
        return [(index, first) for index, (first, _) in zip(indices, drawn, strict=True)]


_MANY_CHANGES = _MANY_TIMES = 20
_FINGERS = 3  # samples that are looked at; more than half of them must be others before anything is refused
_ADVICE = (
    "give random_split a generator with a seed, and sort what a directory listing gives; if other data is meant, start with "
    "Loader(fingerprint=False) (data.fingerprint=false)"
)


def _sketch_first(samples: list[Any]) -> Sketch:
    return sketch(samples[0])


def _are_others(saved: Sequence[Any], live: Sequence[Any]) -> bool:
    """Whether most of the samples that both fingerprints have are not alike."""
    both = len({index for index, _ in saved} & {index for index, _ in live})
    return 2 * len(others(saved, live)) > both


def nothing() -> None:
    """Nobody wants to know."""


_AROUND = (tuple, zip, map, filter, enumerate, itertools.islice, itertools.chain)
_COUNTS = (itertools.count, type(iter(range(0))))


def warn_of_counts(iterator: Any, epoch: int, batches: int) -> None:
    """Says so where ``enumerate``, or a ``zip`` with numbers, counts what an iterator gives, which goes on within an epoch
    after so many ``batches``. Called by the iterator itself. Nobody but Python's garbage collector knows who holds it."""
    held = [iterator, *_generators_around(sys._getframe(1))]
    for _ in range(3):
        holders = [each for each in gc.get_referrers(*held) if type(each) in _AROUND]
        if any(type(each) is enumerate or any(type(one) in _COUNTS for one in gc.get_referents(each)) for each in holders):
            log.warning(
                "enumerate(loader) begins at 0, and epoch %d goes on after %d batches: what depends on that number is not "
                "as without the restart. Use loader.batch, which goes on, or a number that is in the state",
                epoch,
                batches,
            )
            return
        held = holders


def _generators_around(frame: FrameType | None) -> list[Any]:
    """The generators that ask for a batch and pass it on, as tqdm's does. While they run, nobody sees what they hold."""
    frames = []
    while frame is not None and (frame.f_code.co_flags & inspect.CO_GENERATOR or "torch" in frame.f_globals["__name__"]):
        frames.append(frame)
        frame = frame.f_back
    return [each for each in gc.get_objects() if type(each) is GeneratorType and each.gi_frame in frames]


class _Ledger:
    """A running hash of the samples that were trained, in order: over the epochs before this one, and its samples so far. It
    can be checked at the cost of one permutation, because it is known as of the beginning of the epoch, too."""

    def __init__(self, schedule: Schedule, epoch: int = 0, before: str = "", left_out: Sequence[Sequence[int]] = ()) -> None:
        self._schedule = schedule
        self._epoch = epoch
        self._before = before  # the ledger at the beginning of the epoch
        self._left_out = [list(interval) for interval in left_out]  # of the epoch, offsets from and to
        self._hasher = xxhash.xxh3_128(before.encode())

    @classmethod
    def restored(cls, schedule: Schedule, cursor: Cursor, state: Mapping[str, Any]) -> "_Ledger":
        """The ledger at a position. Raises ``Mismatch`` where the samples before it are not those that were trained."""
        ledger = cls(schedule, cursor.epoch, state["ledger_at_epoch"], state["left_out"])
        done = np.ones(cursor.offset, dtype=bool)
        for start, stop in ledger._left_out:
            done[start:stop] = False
        ledger._hash(schedule.order(cursor.epoch)[: cursor.offset][done])
        if ledger._hasher.hexdigest() != state["ledger"]:
            raise Mismatch(
                f"the samples that were trained in epoch {cursor.epoch} before offset {cursor.offset} are not those that "
                "this loader would have given: data would be skipped or trained twice"
            )
        return ledger

    def state_dict(self, cursor: Cursor) -> dict[str, Any]:
        self.go_to(cursor.epoch)
        return {"ledger": self._hasher.hexdigest(), "ledger_at_epoch": self._before, "left_out": self._left_out}

    def add(self, here: Cursor, is_skipped: bool) -> None:
        """A batch has been trained, or left out."""
        if is_skipped:
            self.skip(here)
            return
        self.go_to(here.epoch)
        self._hash(self._schedule.order(here.epoch)[here.offset : here.offset + self._schedule.size(here)])

    def skip(self, here: Cursor) -> None:
        self.go_to(here.epoch)
        self._left_out.append([here.offset, here.offset + self._schedule.size(here)])

    def go_to(self, epoch: int) -> None:
        """What comes next is in this epoch; what is left of the one before is not trained."""
        if epoch != self._epoch:
            self._epoch, self._before, self._left_out = epoch, self._hasher.hexdigest(), []
            self._hasher = xxhash.xxh3_128(self._before.encode())

    def _hash(self, samples: NDArray[np.int64]) -> None:
        self._hasher.update(samples.data)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch on a device: tensors within tuples, lists and dictionaries are moved, everything else stays."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return type(value)({key: to_device(item, device) for key, item in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(to_device(item, device) for item in value)
    return value
