"""Fetches the batches of a plan, with workers or without.

What a sample looks like must not depend on which process fetches it, nor when: before a sample is fetched, the generators
of Python, NumPy and torch are seeded from ``(seed, epoch, index)``, and in the training process put back afterwards. Where
an epoch may have a sample more than once, its position counts, too.
"""

import contextlib
import functools
import logging
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from harness import torch_private
from harness.data.changes import Attributes
from harness.data.schedule import MicroBatch
from harness.data.seeding import generators_kept, mix, on_cpu, seed_process
from harness.runtime.signals import STOP_SIGNALS, deaf_children, die_with_parent

log = logging.getLogger(__name__)

Step = list[tuple[Any, float]]  # the micro-batches of a step on one rank, and the weight of each
# Of a sample: its epoch and its index; and its position, where an epoch may have a sample more than once.
Key = tuple[int, int] | tuple[int, int, int]
_MANY_CHANGES = 20


class Fetcher:
    """Fetches the batches of a loader. If there are workers, they are restarted when the data set was changed."""

    def __init__(
        self,
        *,
        seed: int,
        workers: int,
        collate: Callable[[list[Any]], Any] | None,
        pin_memory: bool,
        tells_epoch: bool,
        speaks: bool,
    ) -> None:
        self.workers = workers
        # What a plan says, apart from what is under way.
        self.batches = functools.partial(batches, seed=seed, collate=collate, tells_epoch=tells_epoch)
        self._collate = collate
        self._pin_memory = pin_memory
        self._speaks = speaks
        self._fetched: Generator[Step] | None = None
        self._dataset: Dataset[Any] | None = None  # from which they come
        self._watched: Attributes | None = None
        self.changes = 0  # of the data set, that workers had to be started anew for

    def begin(self, dataset: Dataset[Any], plan: Iterator[list[MicroBatch]]) -> None:
        """Has what comes next fetched from a data set, by a plan."""
        self._dataset = dataset
        self._watched = Attributes(SimpleNamespace(dataset=dataset, collate=self._collate)) if self.workers else None
        self._fetched = self.batches(dataset, plan, workers=self.workers, pin_memory=self._pin_memory)

    def fetch(self) -> Step:
        """The next step of the plan. After an error it must start again."""
        assert self._fetched is not None, "it has begun"
        try:
            return next(self._fetched)
        except BaseException:
            self.close()
            raise

    def follow_changes(self, dataset: Dataset[Any]) -> bool:
        """Ends what is under way where it is not from the data set as it is now. Returns whether nothing is under way, so
        that ``begin`` has to come before ``fetch``."""
        if self._fetched is not None:
            changed = "dataset" if dataset is not self._dataset else self._watched and self._watched.changed()
            if changed:
                self.close()
                self._warn_of_change(changed)
        return self._fetched is None

    def close(self) -> None:
        """Ends the workers."""
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None

    def _warn_of_change(self, changed: str) -> None:
        self.changes += 1
        if not self._speaks or not self.workers:
            return
        if self.changes == 1:
            log.info("%s has changed: the loader's workers are restarted, now and after each further change", changed)
        if self.changes == _MANY_CHANGES:
            log.warning(
                "the loader's workers were restarted %d times because %s changed, and each restart takes time; "
                "change it less often, or set workers=0 (data.workers=0)",
                self.changes,
                changed,
            )


@dataclass
class Seeded(Dataset[Any]):
    """A data set whose samples are drawn with random numbers of their own."""

    dataset: Dataset[Any]
    seed: int | None
    set_epoch: Callable[[int], Any] | None  # called before the first sample of an epoch, in the process that fetches it
    epoch: int | None = None

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key[:2]
        if self.set_epoch is not None and epoch != self.epoch:
            self.set_epoch(epoch)
            self.epoch = epoch
        if self.seed is None:
            return self.dataset[index]
        seed_process(mix(self.seed, *key))
        return self.dataset[index]

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        """Several samples, as a loader of torch's asks for them."""
        if self.seed is None and self.set_epoch is None:
            dataset = self.dataset
            return [dataset[key[1]] for key in keys]
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
) -> Generator[Step]:
    """Fetches what a plan says: for each step, the collated micro-batches and their weights.

    Loader workers, where there are any, run ahead through the plan, over the ends of epochs too, and are never started
    anew. ``close()`` ends them. What ``collate`` draws goes on from the numbers of the last sample of its micro-batch.
    Samples are made on the CPU, since a worker could not make them elsewhere.
    """
    # torch's own collate and this data set are known to draw nothing, and seeding takes longer than fetching.
    draws = type(dataset) is not TensorDataset or collate is not None
    announced: list[list[MicroBatch]] = []  # steps whose batches were asked for and have not come yet, oldest first

    def keys() -> Iterator[list[Key]]:
        for step in plan:
            announced.append(step)
            for micro in step:
                yield _keys(micro)

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
    with on_cpu(), deaf_children():
        fetched = iter(loader)
    processes = [process for process in multiprocessing.active_children() if process not in before]
    keeps, is_elsewhere = draws and not workers, torch.get_default_device().type != "cpu"  # asked once: it takes 10 µs
    try:
        while True:
            with generators_kept() if keeps else _NO_CARE, on_cpu() if is_elsewhere else _NO_CARE:
                first = next(fetched)
                step = announced.pop(0)
                micro_batches = [(first, step[0].weight)] + [(next(fetched), micro.weight) for micro in step[1:]]
            yield micro_batches
    finally:
        if processes:
            torch_private.end_workers(fetched)
        for process in processes:  # those that are still busy ignore SIGTERM, and Python would wait for them when it exits
            process.kill()


def _keys(micro: MicroBatch) -> list[Key]:
    if micro.position is None:
        return [(micro.epoch, index) for index in micro.indices]
    return [(micro.epoch, index, position) for position, index in enumerate(micro.indices, micro.position)]


def _shield_worker(_worker: int) -> None:
    """A worker outlives the signal that stops the run: torchrun signals the whole process group, and a trainer whose
    workers die cannot take its last steps. Workers end when the trainer closes them or is gone, whatever they are at."""
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


_NO_CARE = contextlib.nullcontext()


def _set_epoch(dataset: Any) -> Callable[[int], Any] | None:
    """The data set's ``set_epoch``, or that of the one within it, if there is one."""
    while dataset is not None and not callable(getattr(dataset, "set_epoch", None)):
        dataset = getattr(dataset, "dataset", None)
    return getattr(dataset, "set_epoch", None)
