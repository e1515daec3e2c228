"""Which checkpoints stay, and the deleting of the others. No torch.

A checkpoint may name files of earlier saves (see ``harness.checkpoint.frozen``). What a checkpoint that stays names is not
deleted with the save that has it. The later saves go first, so that none that is still there has lost a file.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.checkpoint.catalog import Catalog, Entry, Line, SaveName, beyond, saves_among
from harness.checkpoint.format import MANIFEST, Attempt, is_sharable, new_directory
from harness.errors import StoreError
from harness.runtime.threads import in_threads

_TIDYING_SECONDS = 1.0  # so long at most are old checkpoints deleted after a commit,
_TIDYING_SAVES = 16  # if they are more than so many
_DELETED_AT_ONCE = 1000  # saves of which the manifests go together

InUse = Callable[[Iterable[str]], set[str]]  # of files that later checkpoints may name, those that must stay


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep: the last ``keep_last`` (None: all), and those whose step is a multiple of another
    number."""

    keep_last: int | None = None
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        assert self.keep_last is None or self.keep_last >= 1, "the newest whole checkpoint is never deleted"

    def keeps(self, age: int, step: int, best_step: int | None) -> bool:
        """Whether the whole checkpoint that is the ``age``-th newest (from 0) stays."""
        if self.keep_last is None or age < self.keep_last or step == best_step:
            return True
        return self.keep_every_steps is not None and step % self.keep_every_steps == 0


def _nothing_is_in_use(_names: Iterable[str]) -> set[str]:
    """For a save that was not committed: no other one names its files."""
    return set()


def _bases_of(saves: Iterable[SaveName], look: Callable[[SaveName], Entry], all_of_them: set[str]) -> set[str]:
    """The directories that have files of these saves; where a manifest cannot be read, it may be any."""
    found = set[str]()
    for entry in map(look, saves):
        if entry.manifest is not None:
            found |= entry.manifest.bases
        elif entry.state == "corrupt":
            return all_of_them
    return found


def _named_by(saves: Iterable[SaveName], look: Callable[[SaveName], Entry]) -> InUse:
    """Of files, those that these saves name, which are the latest first. All that may be, where a manifest cannot be read.
    No more saves are looked at than it takes."""

    def in_use(names: Iterable[str]) -> set[str]:
        names = {*names}
        free, owners = {*names}, saves_among({name.partition("/")[0] for name in names})
        for save in saves:
            if not free or save <= owners[-1]:  # which names at most files of earlier saves still
                break
            entry = look(save)
            if entry.manifest is not None:
                free -= {file.path(save.directory) for file in entry.manifest.files}
            elif entry.state == "corrupt":
                return names
        return names - free

    return in_use


class Pruner:
    """Deletes saves of the run in a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def prune(
        self, retention: Retention, best_step: int | None = None, *, dry_run: bool = False, unfinished: bool = False
    ) -> list[Entry]:
        """Deletes what is not to be kept and returns it. For a run that is not training.

        What is kept are whole checkpoints of the line that the run is on; ``best_step`` names one more of them. Of each
        abandoned line that went further, the last one stays until the line has passed it. All else goes that is older
        than the newest one kept: checkpoints, what they left behind when a deletion was cut short, saves that were never
        finished, abandoned lines. With ``keep_last=None`` only the unfinished ones go.

        Of what is newer, the unfinished saves of attempts before the last one go, and with ``unfinished`` those of the last
        one: somebody may be writing them. Where nothing is whole, nothing else goes.

        Only what decides is looked into, and what goes is deleted many saves at a time, the latest first. Files stay that a
        checkpoint names which stays. A save of which nothing else is left is not among what goes.
        """
        catalog = self.catalog
        listed = catalog.objects() if catalog.store.has_ranges else None
        saves = saves_among(catalog.names() if listed is None else listed)
        last = max({*catalog.attempts.all(), *(save.attempt for save in saves)}, default=None)
        there = {} if listed is None else {**listed}
        look = functools.cache(lambda save: catalog.look(save, objects=there.get(save.directory), bases=there))
        kept = self._kept(saves, retention, best_step, look)
        old = {*self._old(saves, kept, look)}

        def goes(save: SaveName) -> Entry | None:
            if save in old and retention.keep_last is not None:
                return Entry(save.directory, save.step, save.attempt, "old")
            is_abandoned = save in old or (bool(kept) and save.attempt != last)
            return entry if (unfinished or is_abandoned) and (entry := look(save)).state == "unfinished" else None

        gone = [entry for save in saves if (entry := goes(save))]
        going = {entry.directory for entry in gone}
        stays = [save for save in saves if save.directory not in going]
        bases = going & _bases_of(stays, look, going)
        in_use = _named_by(stays, look)
        done = {each for each in bases if self._is_done(each, in_use)}
        if not dry_run:
            self._delete_all([each.directory for each in gone if each.directory not in done], bases, listed, in_use)
        return [entry for entry in gone if entry.directory not in done]

    def _is_done(self, directory: str, in_use: InUse) -> bool:
        """Whether nothing of a save can be deleted, because checkpoints that stay name what is left of it."""
        store = self.catalog.store
        names = {*store.list(directory)}
        used = in_use(filter(is_sharable, names))
        return names == used or (bool(used) and store.is_link(directory))

    def tidy(self, retention: Retention, best_step: int | None, attempt: Attempt) -> None:
        """Deletes what is not to be kept, as ``prune`` does, after a commit and by the only writer, that of an attempt.

        Raises ``Superseded``, before anything is deleted, when it was believed dead: a successor counts on what is there.
        What the writer itself has committed does no harm, it is not on that one's line.

        The training may wait for this. So only what decides is looked at, checkpoints between the last ones and older ones
        stay or go by their names, and of many that are to go, some are left to the next call.
        """
        saves = [] if retention.keep_last is None else saves_among(self.catalog.names())
        # Looked at after the names: who begins later than this finds what stays.
        self.catalog.attempts.refuse_superseded(attempt)
        wanted = set[str]()  # which the next call wants again

        def look(save: SaveName) -> Entry:
            wanted.add(save.directory)
            return self.catalog.known(save)

        kept = self._kept(saves, retention, best_step, look, by_name=True)
        until = time.monotonic() + _TIDYING_SECONDS
        old = self._old(saves, kept, look)

        def in_use(names: Iterable[str]) -> set[str]:
            going = {*old}
            return _named_by((save for save in saves if save not in going), look)(names)

        for count, save in enumerate(old, 1):
            self.delete(save.directory, in_use)
            if count >= _TIDYING_SAVES and time.monotonic() > until:
                break
        self.catalog.forget(but=wanted)

    def _kept(
        self,
        saves: Iterable[SaveName],
        retention: Retention,
        best_step: int | None,
        look: Callable[[SaveName], Entry],
        *,
        by_name: bool = False,
    ) -> list[SaveName]:
        """The whole checkpoints that are to be kept, the newest first; of several of one step and attempt the newest.

        With ``by_name`` those besides the last ones are not looked at, one of an attempt that nothing is known of excepted.
        """
        way, kept, counted = Line(), list[SaveName](), set[tuple[Attempt, int]]()
        for save in saves:
            age = len(counted)
            if not (way.may_have(save.attempt, save.step) and retention.keeps(age, save.step, best_step)):
                continue
            if by_name and retention.keep_last is not None and age >= retention.keep_last and way.knows(save.attempt):
                kept.append(save)
            elif way.take(entry := look(save)) and entry.state == "whole" and (save.attempt, save.step) not in counted:
                kept.append(save)
                counted.add((save.attempt, save.step))
        return kept

    def _old(self, saves: Sequence[SaveName], kept: Sequence[SaveName], look: Callable[[SaveName], Entry]) -> list[SaveName]:
        """What is older than the newest that is kept, and is neither kept nor further than it."""
        if not kept:
            return []
        stays = {*kept}
        old = [save for save in saves if save not in stays and save < kept[0]]
        further = {entry.directory for entry in beyond(old, kept[0].step, look)}
        return [save for save in old if save.directory not in further]

    def sweep(self, attempt: Attempt) -> None:
        """Deletes what attempts before this one have begun to save after the newest whole checkpoint, and not finished.

        Who wakes up and finishes one of those will have committed what is corrupt, and is on nobody's line.
        """
        rubbish, others = list[str](), list[SaveName]()
        for save in saves_among(self.catalog.names()):
            entry = self.catalog.known(save)
            if entry.state == "whole":
                break
            if entry.state == "unfinished" and save.attempt < attempt:
                rubbish.append(save.directory)
            else:
                others.append(save)
        else:
            return  # where nothing is whole, it may be all that its owner has left
        for directory in rubbish:
            self.delete(directory, _named_by(others, self.catalog.known))

    @contextlib.contextmanager
    def new_directory(self, step: int, attempt: Attempt) -> Iterator[str]:
        """A directory for a save. After an error, what was put there is deleted, unless the storage fails for the moment."""
        directory = new_directory(step, attempt)
        try:
            yield directory
        except Exception as error:
            if not (isinstance(error, StoreError) and error.transient):
                with contextlib.suppress(StoreError):  # the error that is under way matters more
                    self.discard(directory)
            raise

    def discard(self, directory: str) -> None:
        """Deletes what its only writer has put into a save that has failed. One with a manifest was committed, and stays."""
        if not self.catalog.is_committed(directory):
            self.delete(directory)

    def _delete_all(
        self, directories: Sequence[str], bases: Collection[str], listed: Mapping[str, Collection[str]] | None, in_use: InUse
    ) -> None:
        """Removes saves. Of those that go together, all manifests go first, and so do those of ``bases``, which have files
        in use. ``listed`` are the objects of each, where these are known."""
        store = self.catalog.store
        kept = [each for each in directories if each in bases]
        directories = [each for each in directories if each not in bases]
        self.catalog.for_each(store.delete, [f"{each}/{MANIFEST}" for each in kept])
        if not store.delete_directories(directories, MANIFEST):
            for start in range(0, len(directories), _DELETED_AT_ONCE):
                self._delete_together(directories[start : start + _DELETED_AT_ONCE], listed)
        for directory in kept:
            self.delete(directory, in_use)

    def _delete_together(self, directories: Sequence[str], listed: Mapping[str, Collection[str]] | None) -> None:
        store = self.catalog.store
        if listed is None:
            self.catalog.for_each(self.delete, directories)  # one after the other
            return
        names = [name for each in directories for name in listed[each]]
        manifests = [name for name in names if name.endswith(f"/{MANIFEST}")]
        if store.deletes_many:
            store.delete_many(manifests)
            store.delete_many(sorted({*names}.difference(manifests)))
        else:
            self.catalog.for_each(store.delete, manifests)
            self.catalog.for_each(self.delete, directories)

    def delete(self, directory: str, in_use: InUse = _nothing_is_in_use) -> None:
        """Removes a save, but for files that are ``in_use``. Its manifest goes first, so that a deletion that is cut short
        leaves no checkpoint. Of a link only the link goes, and not if it leads to files in use."""
        store = self.catalog.store
        if store.is_link(directory):
            if in_use is _nothing_is_in_use or not in_use(filter(is_sharable, store.list(directory))):
                store.delete(directory)
            return
        objects = store.list(directory, follow=False)
        if (manifest := f"{directory}/{MANIFEST}") in objects:
            store.delete(manifest)
        stays = in_use(sharable) if (sharable := [*filter(is_sharable, objects)]) else set()
        in_threads(store.streams, store.delete, sorted(objects.keys() - stays - {manifest}))
        if not stays:
            store.delete_directory(directory)
