"""Loaders beside ours: torch's own, and those of its kind that have a state, as torchdata's ``StatefulDataLoader``.

Such a loader saves how many batches of an epoch it has given. Which ones, its samplers draw when the epoch begins, from
generators that most of them do not save. ``Epochs`` remembers these as they were then, and has the same order drawn again
after a resume.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from harness import torch_private
from harness.data.counting import warn_of_counts
from harness.data.loader import Loader, nothing
from harness.data.seeding import GENERATORS, PROCESS, set_state, state_of
from harness.errors import Mismatch

log = logging.getLogger(__name__)

_KNOWN = ("torch.utils.data", "torchdata.")  # samplers from there draw from their generators only


class _Generators:
    """The generators that a loader and its samplers draw from, by name.

    A sampler of torch's that has none is given the loader's: it would draw from the training's. One that somebody else has
    written, and that has no state, may draw from those of the process; these are noted with the others then.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.generator is None:
            default = torch.get_default_device().type  # where a loader draws
            device = "cpu" if default == "meta" else default
            loader.generator = torch.Generator(device).manual_seed(torch.initial_seed())
        self._own: dict[str, Any] = {"generator": loader.generator}
        self._process: Mapping[str, Any] = {}
        self.samplers = dict(_samplers(loader))
        for name, sampler in self.samplers.items():
            if getattr(sampler, "generator", loader.generator) is None:
                sampler.generator = loader.generator
            for key, value in vars(sampler).items():
                if isinstance(value, GENERATORS) and not any(value is each for each in self._own.values()):
                    self._own[f"{name}.{key}"] = value
            if not type(sampler).__module__.startswith(_KNOWN) and not hasattr(sampler, "state_dict"):
                self._process = PROCESS

    def states(self) -> dict[str, Any]:
        """As plain values and tensors."""
        return {name: state_of(each) for name, each in {**self._own, **self._process}.items()}

    def set_own(self, states: Mapping[str, Any]) -> None:
        for name, generator in self._own.items():
            set_state(generator, states[name])

    def set_process(self, states: Mapping[str, Any]) -> None:
        for name, generator in self._process.items():
            set_state(generator, states[name])

    def check(self, states: Mapping[str, Any], name: str) -> None:
        """Raises ``Mismatch`` where these are not the generators of this loader."""
        here = self._own.keys() | self._process.keys()
        if different := sorted(here ^ states.keys()):
            where = "the run" if different[0] in here else "the checkpoint"
            raise Mismatch(f"{name}: only {where} draws from {different[0]}; use the samplers that the run began with")


def _samplers(loader: DataLoader[Any]) -> Iterator[tuple[str, Any]]:
    """The samplers of a loader, and those within them, by the way to them."""
    waiting: list[tuple[str, Any]] = [("sampler", loader.sampler), ("batch_sampler", loader.batch_sampler)]
    met: list[Any] = []
    while waiting:
        name, sampler = waiting.pop(0)
        if not hasattr(sampler, "__dict__") or any(sampler is each for each in met):
            continue
        met.append(sampler)
        yield name, sampler
        for key, value in vars(sampler).items():
            held = value if isinstance(value, list | tuple) else [value]
            waiting += [(f"{name}.{key}", each) for each in held if isinstance(each, Sampler)]


class _Once:
    """A sampler for the time in which an iterator is restored. It draws as often as for an iterator that is not; the last
    order counts, and is given whenever it is asked again."""

    def __init__(self, sampler: Any, times: int) -> None:
        self._sampler = sampler
        self._times = times
        self.order: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        if self._times > 0:
            self._times -= 1
            self.order = iter(self._sampler)
        return self.order

    def __len__(self) -> int:
        return len(self._sampler)


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A call of a method that does not keep its object alive."""
    weak = weakref.WeakMethod(method)

    def call(*args: Any, **options: Any) -> Any:
        found = weak()
        assert found is not None, "the caller has the object"
        return found(*args, **options)

    return call


class Epochs:
    """What a loader of torch's kind draws the order of an epoch from, as of the epoch's beginning and as of now.

    A resume sets the generators to the beginning, and has the samplers draw once more and go on to where they were. Samplers
    with a state of their own draw as they like; after them the generators are set to what they were at the save.

    Where the data set has a length, ``on_return`` is called when the loop asks for another batch of an epoch that has one,
    before anything else, and ``on_give`` when it is given one. Raises ``ConfigError`` where this torch's loaders are made
    otherwise.
    """

    def __init__(self, name: str, loader: Any) -> None:
        torch_private.require(torch_private.LOADER)
        self._name = name
        self._weak = weakref.ref(loader)  # the loader has this; its workers are to end with it
        self._generators = _Generators(loader)
        self._began: Mapping[str, Any] | None = None
        self._is_reused = False
        self._restored: Mapping[str, Any] | None = None  # until the next iterator is made
        self._number: int | None = None  # of the epoch, as a DistributedSampler has it
        self.on_return: Callable[[], None] = nothing
        self.on_give: Callable[[], None] = nothing
        self.epoch = 0  # of the run, where it says so
        torch_private.set_maker(loader, self._begin_epoch)

    @property
    def _loader(self) -> Any:
        return self._weak()

    def _make(self) -> Any:
        return torch_private.make_iterator(self._loader)

    def state_dict(self) -> dict[str, Any]:
        """The states of the generators."""
        now = self._generators.states()
        return {"began": self._began or now, "now": now, "is_reused": self._is_reused}

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ``Mismatch`` where the samplers draw from other generators."""
        self._generators.check(state["began"], self._name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the loader's own."""
        self._restored = state

    def _begin_epoch(self) -> Any:
        iterator = self._new_iterator()
        if (batches := _length(self._loader)) is not None:
            weak = weakref.ref(iterator)
            torch_private.wrap_next(iterator, lambda fetch: self._followed(weak, _weakly(fetch), batches))
        return iterator

    def _followed(self, iterator: Callable[[], Any], fetch: Callable[[], Any], batches: int) -> Callable[[], Any]:
        goes_on = torch_private.given_by(iterator()) > 0  # within an epoch, after a restart

        def next_data() -> Any:
            nonlocal goes_on
            if goes_on:
                goes_on = False
                warn_of_counts(iterator(), self.epoch, torch_private.given_by(iterator()))
            if torch_private.given_by(iterator()) < batches:  # else it has none, and the epoch goes on without
                self.on_return()
            data = fetch()
            self.on_give()
            return data

        return next_data

    def _new_iterator(self) -> Any:
        restored, self._restored = self._restored, None
        if restored is None:
            self._note(is_reused=False)
            iterator = self._make()
        else:
            self._began, self._is_reused = restored["began"], restored["is_reused"]
            kept = self._generators.states()
            iterator, has_drawn_once = self._redrawn()
            if not has_drawn_once or torch_private.is_finished(iterator):  # then it will not come to the end once more
                self._generators.set_own(restored["now"])
            self._generators.set_process(kept)
        if self._loader.persistent_workers:  # it is used again for the next epoch
            torch_private.wrap_reset(iterator, lambda reset: self._noting(_weakly(reset)))
        return iterator

    def _noting(self, reset: Callable[..., Any]) -> Callable[..., None]:
        def note_and_reset(*args: Any, **options: Any) -> None:
            self._note(is_reused=True)
            reset(*args, **options)

        return note_and_reset

    def _note(self, *, is_reused: bool) -> None:
        """An epoch begins, with a new iterator or with the one of the epoch before."""
        self._began, self._is_reused = self._generators.states(), is_reused
        for name, sampler in self._generators.samplers.items():
            if isinstance(sampler, DistributedSampler) and sampler.shuffle:
                if sampler.epoch == self._number:
                    log.warning(
                        "%s: %s repeats the order of the epoch before; call its set_epoch(epoch) in each epoch",
                        self._name,
                        name,
                    )
                self._number = sampler.epoch

    def _redrawn(self) -> tuple[Any, bool]:
        """An iterator that goes on where the saved one was, and whether its samplers draw the order from nothing but the
        generators."""
        loader = self._loader
        index_sampler = torch_private.index_sampler_of(loader)
        wraps = type(index_sampler).__module__.startswith("torchdata.") and hasattr(index_sampler, "sampler")
        holder, key = (
            (index_sampler, "sampler") if wraps else (loader, "sampler" if loader.batch_sampler is None else "batch_sampler")
        )
        sampler = vars(holder)[key]
        has_state = hasattr(sampler, "state_dict") or hasattr(iter(sampler), "state_dict")
        self._generators.set_own(self._began or {})
        self._generators.set_process(self._began or {})
        if has_state:
            return self._make(), False
        generator = loader.generator
        vars(holder)[key] = once = _Once(sampler, 2 if loader.num_workers and not self._is_reused else 1)
        if self._is_reused:  # then the epoch began without a seed for the workers, which is drawn here
            loader.generator = torch.Generator(generator.device)
        try:
            iterator = self._make()
        finally:
            vars(holder)[key] = sampler
            loader.generator = generator
        torch_private.set_index_sampler(iterator, index_sampler)
        if not loader.num_workers:
            torch_private.draw_now(iterator, once.order)
        return iterator, True


def _length(loader: Any) -> int | None:
    """The batches in an epoch; None where nobody knows for sure."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # a sampler without a length
        return None


# --- what a run is warned of -----------------------------------------------------------------------------------------

INTO_THE_STATE = "put the loader into the state (harness.Loader, or torchdata's StatefulDataLoader)"


def warn_of_single_samples(loader: Loader, modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Says so where a module with a batch norm may be given a single sample at once."""
    if (name := with_single_samples(loader, modules)) is not None:
        what = "in some batch of an epoch a rank gets a single sample, on which a batch norm cannot train"
        log.warning("%s (%s): set drop_last (train.drop_last)", what, name)


def with_single_samples(loader: Loader, modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The name of a module with a batch norm that may be given a single sample at once; None where none is."""
    if loader.schedule.fewest_at_once(loader.world_size) > 1:
        return None
    for name, module in modules:
        if any(each.training for each in module.modules() if torch_private.is_batch_norm(each)):
            return name
    return None
