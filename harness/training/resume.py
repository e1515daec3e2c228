"""Resuming: the newest checkpoint that every rank can read.

Rank 0 lists and chooses, once; the others follow. Every rank verifies every byte before a live tensor is touched, whether
it has read it itself or was given it by the rank whose share it was; if any rank cannot, all fall back together to the
checkpoint before, and say so. A run whose checkpoints are all corrupt stops: training from scratch over it is for its
owner to decide. Random states come last, and nothing is trained until all ranks have shown that they hold the same state.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from harness.checkpoint import load, places
from harness.checkpoint.catalog import Catalog, Entry, SaveName, further, saves_among
from harness.checkpoint.format import Ancestor
from harness.checkpoint.kept import KeptPlace, Unusable, kept_of, that_count
from harness.checkpoint.relay import Peers
from harness.data.streams import states_in
from harness.distributed.world import World
from harness.errors import (
    CheckpointError,
    ConfigError,
    HarnessError,
    Mismatch,
    NoCheckpoint,
    RankFailure,
    StoreError,
)
from harness.state.capture import State
from harness.state.modules import some
from harness.state.parts import RANDOM
from harness.storage.store import Store
from harness.telemetry import journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The position from which a run continues."""

    directory: str
    step: int
    lineage: list[Ancestor]
    save_seconds: float | None  # what a save took then, where that is known
    skipped: Mapping[str, str]  # newer checkpoints that it does not go on from, and why
    stands_on: tuple[str, int] | None = None  # attempt and step of the newest durable checkpoint, where there is one
    kept: Mapping[str, Any] = field(default_factory=dict)  # of a state that was kept: by which rank, and why
    random_keys: list[list[int]] | None = None  # by rank; None where random states were carried on
    meta: Mapping[str, Any] = field(default_factory=dict)  # of the manifest


NEW = Resumed("", 0, [], None, {})
"""There was nothing to resume from."""


def resume(
    world: World,
    catalog: Catalog,
    state: State,
    *,
    how: Literal["auto", "each", "shared"] = "each",
    skip_newest: bool = False,
    place: KeptPlace | None = None,
) -> Resumed:
    """Restores the newest checkpoint that all ranks can read; ``NEW`` when the run has none at all.

    One that does not fit the live state is a ``Mismatch``. ``how`` it is read is ``checkpoint.restore`` of the
    configuration. ``skip_newest`` takes the checkpoint before the newest whole one, if there is one. What the ranks have
    kept in ``place`` counts as checkpoints do; a machine that has kept nothing is given it by one that has. Raises
    ``NoCheckpoint`` when there are checkpoints and none is whole.
    """
    is_sharded = state.sharded.is_sharded_anywhere(world.all_gather)
    entries = _each(world, catalog, {} if place is None or is_sharded else _kept(world, catalog, place))
    skipped: dict[str, str] = {}
    if skip_newest:
        entries = _without_newest(entries, skipped)
    shared = world.size > 1 and (how == "shared" or (how == "auto" and (is_sharded or not catalog.store.is_local)))
    land = state.sharded.land() if is_sharded else places.whole
    agree = functools.partial(_refuse_together, world) if is_sharded else None
    storage_failed, lost = False, 0
    for entry in entries:
        store = catalog.store
        peers: Peers | None = world if shared else None
        if entry.holders:
            assert place is not None, "it was found there"
            store, peers = place.store, Holders.among(world, entry.holders)
        parts, problems, was_storage = _read_together(world, store, entry, peers=peers, land=land)
        if problems:
            storage_failed = storage_failed or (was_storage and not entry.holders)
            skipped[entry.directory] = why = "; ".join(problems)
            log.error("NOT resuming from %s: %s", entry.directory, why)
            lost += not entry.holders
            continue
        assert parts is not None, "no rank reported a problem"
        assert entry.manifest is not None
        _restore(world, f"{store.url}/{entry.directory}", entry, parts, state, agree)
        lineage = [*entry.manifest.lineage, Ancestor(entry.manifest.attempt, entry.step)]
        on_first(world, functools.partial(_log_other_lines, catalog, entry, skipped))
        kept = kept_of(entry) if entry.holders else {}
        stands_on = kept.get("stands_on") if kept else (entry.manifest.attempt, entry.step)
        seconds = save_seconds(entry.manifest.meta)
        stood = stands_on and (*stands_on,)
        keys, meta = _keys_in(parts[RANDOM]), entry.manifest.meta
        return Resumed(entry.directory, entry.step, lineage, seconds, skipped, stood, kept, keys, meta)
    if storage_failed:  # what cannot be read today is not corrupt
        raise StoreError(f"{catalog.store.url}: no checkpoint could be read: {'; '.join(problems)}", transient=True)
    if lost:
        raise NoCheckpoint(
            f"{catalog.store.url}: expected a whole checkpoint, found {lost} corrupt ones; "
            "restore one of them or start a run at another URL"
        )
    return NEW


def _restore(
    world: World,
    where: str,
    entry: Entry,
    parts: Mapping[str, Any],
    state: State,
    agree: Callable[[Mismatch | None], None] | None,
) -> None:
    """Puts what was read of a checkpoint into the live state. Raises ``Mismatch`` where it does not fit."""
    assert entry.manifest is not None
    meta, here = entry.manifest.meta, conditions(world, state)
    if RANDOM not in parts:
        raise Mismatch(f"{entry.directory}: was not written by a run; to start from its weights, give a new run init_from")
    try:
        state.restore(parts, entry.step, world.rank, int(meta.get("epoch") or 0), before_restoring=agree)
    except Mismatch as error:
        advice = "if the change is intended, this is a new run; give it another URL"
        grown = "if the training itself has added something, add it in Run(..., adapt=...)"
        raise Mismatch(f"{where}: {error}\n{advice}; {grown}") from None
    _warn_if_inexact(meta, here)
    # With other ranks the random streams start anew, from the seed and the rank.
    is_alike = all(meta.get(key) == here.get(key) for key in ("world_size", "sharding"))
    random = parts[RANDOM].get(str(world.rank), {}) if is_alike else {}
    state.random_to_restore = states_in(random, entry.step, state.device)


def _keys_in(states: Mapping[str, Any]) -> list[list[int]] | None:
    """The keys of the ranks' random streams in a checkpoint, by rank; None where it has none."""
    found = [states[str(rank)].get("keys") for rank in range(len(states)) if str(rank) in states]
    return [list(keys) for keys in found] if found and all(found) else None


def _refuse_together(world: World, problem: Mismatch | None) -> None:
    """Raises, on every rank, the ``Mismatch`` that one of them has found."""
    found = world.all_gather(str(problem) if problem else "")
    if (what := next((f"{each} (rank {rank})" for rank, each in enumerate(found) if each), None)) is not None:
        raise problem or Mismatch(what)


def _kept(world: World, catalog: Catalog, place: KeptPlace) -> dict[SaveName, Entry]:
    """What ranks have kept on their machines and counts, on rank 0. All ranks call it."""
    own: list[Entry] = []
    try:
        own = place.entries()
    except (Unusable, CheckpointError, StoreError) as error:
        log.warning("what is kept on this machine is not used: %s", error)
    found = world.all_gather(own)
    if world.rank or not any(found):
        return {}
    counting, refused = that_count(catalog, found, functools.partial(journal.tells_of_save, catalog.store))
    newest = max((*counting, *saves_among(catalog.store.names())), default=None)
    for save, why in refused.items():
        if newest is None or save > newest:
            log.warning("NOT resuming from %s, which is kept on this machine or another one: %s", save.directory, why)
    return counting


class Holders:
    """The ranks as ``load.read`` knows them, where some of them alone can read: what those are given goes to all."""

    def __init__(self, world: World, holders: Sequence[int]) -> None:
        self._world, self._holders = world, holders
        self.size = len(holders)
        self.rank = holders.index(world.rank) if world.rank in holders else self.size

    @classmethod
    def among(cls, world: World, holders: Sequence[int]) -> "Holders | None":
        """None where each rank can read for itself."""
        return None if len(holders) == world.size else cls(world, holders)

    def exchange(self, own: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
        """Gathers from all ranks, since each says in its first byte whether it has failed."""
        rows = torch.empty((self._world.size, len(own)), dtype=torch.uint8, device="cpu")
        self._world.exchange(own, [*rows])
        for place, holder in zip(found, self._holders, strict=True):
            place.copy_(rows[holder])
        found[0][0] = rows[:, 0].max()


def _each(world: World, catalog: Catalog, kept: Mapping[SaveName, Entry]) -> Iterator[Entry]:
    """What the run may resume from, best first, on every rank. Rank 0 looks at each when it is asked for: the others wait no
    longer than that takes, however many there are."""
    candidates = catalog.candidates(kept=kept) if world.rank == 0 else iter(())
    while (entry := on_first(world, lambda: next(candidates, None))) is not None:
        yield entry


def _without_newest(entries: Iterator[Entry], skipped: dict[str, str]) -> Iterator[Entry]:
    """Leaves the newest whole checkpoint out, unless there is no other."""
    first: Entry | None = None
    for entry in entries:
        if first is None and entry.state == "whole":
            first = entry
            continue
        if first is not None and first.directory not in skipped and entry.state == "whole":
            skipped[first.directory] = why = "the attempts before this one all failed in the same way"
            log.error("NOT resuming from %s: %s", first.directory, why)
        yield entry
    if first is not None and first.directory not in skipped:
        yield first


def _log_other_lines(catalog: Catalog, newest: Entry, skipped: Mapping[str, str]) -> None:
    for entry in further(catalog, newest):
        if entry.directory in skipped:
            continue
        log.warning(
            "a newer checkpoint exists that this run does not continue: step %s of attempt %s, %s. It is kept "
            "until this run has passed its step. To continue from it instead, stop, and move the checkpoints of "
            "later attempts out of the URL",
            entry.step,
            entry.attempt.number,
            entry.directory,
        )


def check_lockstep(world: World, state: State, about: Mapping[str, Any], *, resumed: bool) -> None:
    """Raises unless all ranks hold the same step and the same state, bit for bit: ``RankFailure`` where they have resumed,
    ``ConfigError`` where they have just been built, and would be built like that again.

    ``about`` are further values that must be the same: what is trained.
    """
    state.agree(world.all_gather)
    found = world.all_gather({**about, **state.digests(), "is_sharded": state.sharded.is_sharded})
    different = [rank for rank in range(world.size) if found[rank] != found[0]]
    if different:
        first = found[different[0]]
        keys = [key for key in found[0] if found[0][key] != first[key]]
        values = "; ".join(f"{key}: {found[0][key]} on rank 0, {first[key]} on rank {different[0]}" for key in keys)
        what = f"the ranks are not in lockstep: ranks {different} differ from rank 0 ({values})"
        if resumed:
            raise RankFailure(what)
        hint = (
            "; wrap the models in DistributedDataParallel, which makes them equal, before Run is made"
            if state.modules.keys() & keys
            else ""
        )
        raise ConfigError(f"{what}{hint}")
    if found[0]["is_sharded"] and (names := state.sharded.check_replicas(state.capture, world)):
        what = f"the ranks are not in lockstep: of {some(names)}, ranks that hold the same part hold other values"
        raise RankFailure(what) if resumed else ConfigError(f"{what}; build every rank's model from the same seed")


def check_alike(world: World, state: State) -> None:
    """Raises ``ConfigError`` unless all ranks hold the same parameters and optimizer states, bit for bit. Called before an
    attempt saves for the first time: a checkpoint has rank 0's, or pieces of each, and gives them to all. For parameters
    that no optimizer updates, such as those of ``Embedding(max_norm=…)``, it logs a difference."""
    if world.size == 1:
        return
    gathered = world.all_gather(state.steady_digests())
    found, apart = ([each[index] for each in gathered] for index in (0, 1))
    if different := [rank for rank in range(world.size) if found[rank] != found[0]]:
        names = [name for name in found[0] if found[0][name] != found[different[0]].get(name)]
        raise ConfigError(
            f"step {state.progress.step}: {', '.join(names)} differs between rank 0 and ranks {different}, nothing is "
            "saved. harness saves what is the same on all ranks: wrap each trained module in DistributedDataParallel, or "
            "average what the ranks hold before run.step()"
        )
    different = [rank for rank in range(world.size) if apart[rank] != apart[0]]
    if different and world.rank == 0:
        log.warning(
            "parameters that no optimizer updates (frozen ones, or those of an Embedding with max_norm) differ "
            "between rank 0 and ranks %s: the checkpoint holds rank 0's, which all ranks get after a restart",
            different,
        )


def on_first(world: World, function: Any) -> Any:
    """What rank 0 gets from a call, on every rank; its error is raised on every rank, too."""
    result: Any = None
    if world.rank == 0:
        try:
            result = function()
        except HarnessError as error:
            result = error
    result = world.broadcast(result)
    if isinstance(result, HarnessError):
        raise result
    return result


def _read_together(
    world: World, store: Store, entry: Entry, *, peers: Peers | None, land: places.Land
) -> tuple[dict[str, Any] | None, Sequence[str], bool]:
    """What this rank read, the problems of all ranks, and whether one is the storage's: where there are any, nobody uses
    anything."""
    parts, problem, is_storage = None, entry.problem, False
    if entry.manifest is not None and not problem:
        try:
            parts = load.read(store, entry.directory, entry.manifest, peers=peers, land=land)
        except (CheckpointError, StoreError) as error:
            problem, is_storage = f"{error} (rank {world.rank})", isinstance(error, StoreError)
        except RankFailure:  # the rank that has failed says why
            pass
    found = world.all_gather((problem, is_storage))
    return parts, sorted({problem for problem, _ in found if problem}), any(is_storage for _, is_storage in found)


def save_seconds(meta: Mapping[str, Any]) -> float | None:
    """What the save before this checkpoint took; None where that is not known."""
    seconds = meta.get("save_seconds")
    return seconds if isinstance(seconds, float) else None


def conditions(world: World, state: State) -> dict[str, Any]:
    """What the bits of a result depend on besides the run itself. It is in every manifest; how a model is sharded, where it
    is."""
    return {
        "world_size": world.size,
        "device": world.device.type,
        "threads": torch.get_num_threads(),  # torchrun sets one for each of several local ranks
        "torch": torch.__version__,
        **({"sharding": state.sharded.in_words} if state.sharded.in_words else {}),
    }


def _warn_if_inexact(meta: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    keys = dict.fromkeys([*here, *(["sharding"] if "sharding" in meta else [])])
    differences = [f"{key} {meta.get(key)} → {here.get(key)}" for key in keys if meta.get(key) != here.get(key)]
    if differences:
        log.warning(
            "resuming under different conditions (%s): every global batch has the same samples, but the results "
            "will differ in their last bits",
            ", ".join(differences),
        )


def refuse_to_reuse(catalog: Catalog, launch: str | None) -> None:
    """For ``--fresh``: raises ``ConfigError`` when the URL already holds a run that this very launch did not begin."""
    attempts = catalog.attempts.all()
    if next(catalog.candidates(), None) is not None:
        began = catalog.attempts.about(attempts[0]).get("launch") if attempts else None
        if launch is None or began != launch:
            raise ConfigError(f"checkpoint.url: --fresh expects an unused URL, found a run in {catalog.store.url}")


def refuse_to_begin(catalog: Catalog) -> None:
    """For ``must_exist``: raises ``NoCheckpoint`` where there is nothing to resume from."""
    if next(catalog.candidates(), None) is None:
        raise NoCheckpoint(
            f"{catalog.store.url}: expected a run to continue (checkpoint.must_exist), found no checkpoint; check "
            "the URL, and that the disk is mounted"
        )
