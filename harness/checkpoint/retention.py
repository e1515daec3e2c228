"""Which checkpoints stay, and the deleting of the others. No torch."""

import contextlib
import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from harness.checkpoint.catalog import Catalog, Entry, Line, SaveName, beyond, saves_among
from harness.checkpoint.format import MANIFEST, Attempt, new_directory
from harness.errors import StoreError
from harness.runtime.threads import in_threads

_TIDYING_SECONDS = 1.0  # so long at most are old checkpoints deleted after a commit,
_TIDYING_SAVES = 16  # if they are more than so many
_DELETED_AT_ONCE = 1000  # saves of which the manifests go together


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

        Only what decides is looked into, and what goes is deleted many saves at a time, the oldest first.
        """
        catalog = self.catalog
        listed = catalog.objects() if catalog.store.has_ranges else None
        saves = saves_among(catalog.names() if listed is None else listed)
        last = max({*catalog.attempts.all(), *(save.attempt for save in saves)}, default=None)
        look = functools.cache(lambda save: catalog.look(save, objects=None if listed is None else listed[save.directory]))
        kept = self._kept(saves, retention, best_step, look)
        old = {*self._old(saves, kept, look)}

        def goes(save: SaveName) -> Entry | None:
            if save in old and retention.keep_last is not None:
                return Entry(save.directory, save.step, save.attempt, "old")
            is_abandoned = save in old or (bool(kept) and save.attempt != last)
            return entry if (unfinished or is_abandoned) and (entry := look(save)).state == "unfinished" else None

        gone = [entry for save in saves if (entry := goes(save))]
        if not dry_run:
            self._delete_all([entry.directory for entry in reversed(gone)], listed)
        return gone

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
        kept = self._kept(saves, retention, best_step, self.catalog.known, by_name=True)
        until = time.monotonic() + _TIDYING_SECONDS
        for count, save in enumerate(reversed(self._old(saves, kept, self.catalog.known)), 1):
            self.delete(save.directory)
            if count >= _TIDYING_SAVES and time.monotonic() > until:
                break

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
        rubbish = []
        for save in saves_among(self.catalog.names()):
            entry = self.catalog.known(save)
            if entry.state == "whole":
                break
            if entry.state == "unfinished" and save.attempt < attempt:
                rubbish.append(save.directory)
        else:
            return  # where nothing is whole, it may be all that its owner has left
        for directory in rubbish:
            self.delete(directory)

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

    def _delete_all(self, directories: Sequence[str], listed: Mapping[str, Collection[str]] | None) -> None:
        """Removes saves. Of those that go together, all manifests go first. ``listed`` are the objects of each, where these
        are known."""
        store = self.catalog.store
        if store.delete_directories(directories, MANIFEST):
            return
        if listed is None or not store.deletes_many:
            self.catalog.for_each(self.delete, directories)
            return
        for start in range(0, len(directories), _DELETED_AT_ONCE):
            names = [name for each in directories[start : start + _DELETED_AT_ONCE] for name in listed[each]]
            manifests = [name for name in names if name.endswith(f"/{MANIFEST}")]
            store.delete_many(manifests)
            store.delete_many(sorted({*names}.difference(manifests)))

    def delete(self, directory: str) -> None:
        """Removes a save. Its manifest goes first, so that a deletion that is cut short leaves no checkpoint. Of a link only
        the link goes."""
        store = self.catalog.store
        if store.unlink(directory):
            return
        objects = store.list(directory, follow=False)
        if (manifest := f"{directory}/{MANIFEST}") in objects:
            store.delete(manifest)
        in_threads(store.streams, store.delete, sorted(objects.keys() - {manifest}))
        store.delete_directory(directory)
