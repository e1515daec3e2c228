"""What lies in a run's URL: list, open, verify. Only what is committed counts. No torch."""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal, TypeVar

from harness.checkpoint.attempts import Attempts
from harness.checkpoint.format import MANIFEST, MANIFEST_LIMIT_BYTES, Attempt, FileInfo, Manifest, hasher, parse_directory
from harness.errors import CheckpointError, Corrupt, NoCheckpoint, StoreError, UnknownFormat
from harness.runtime.threads import in_threads
from harness.storage.store import Store

T = TypeVar("T")
Item = TypeVar("Item")
Seen = dict[str, set[str]]  # the names of the objects in each directory that was looked into
Listed = dict[str, dict[str, int]]  # the objects in directories, with their sizes in bytes

_TRIES = 50  # to find a run as it is, while it goes on
_LOOKS_AT_ONCE = 8
_SAVES_IN_A_PAGE = 125  # of a listing of 1,000 objects, about


@dataclass(frozen=True)
class Entry:
    """The directory of one save.

    ``state`` is ``whole`` when the manifest is valid and all objects are there with their sizes, ``corrupt`` when it is not
    so (``problem`` says how), ``unfinished`` when there is no manifest: still being written, or abandoned. ``base`` is one
    without a manifest that has files of later checkpoints. ``old`` is what goes for its name alone, since it is older than
    what is kept.
    """

    directory: str
    step: int
    attempt: Attempt
    state: Literal["whole", "corrupt", "unfinished", "base", "old"]
    manifest: Manifest | None = None
    problem: str = ""
    holders: tuple[int, ...] = ()  # the ranks that can read it, if it is kept in the memory of their machines


@dataclass(frozen=True, order=True)
class SaveName:
    """The name of a save's directory. The greatest is the latest: of several saves of a step by one attempt, too."""

    attempt: Attempt
    step: int
    directory: str


class Catalog:
    """The checkpoints of the run in a store.

    Names are listed, and directories looked into one by one, the latest first: what comes after the newest whole checkpoint
    costs a reader nothing, and what is not the run's is never looked into.

    A run continues, and deletes, while others read it. What vanishes in between is no damage. A deletion begins with the
    manifest: a reader that misses an object asks for the manifest again, and lists the names again if that is gone.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.attempts = Attempts(store)
        self.found: list[str] = []  # the names, as ``candidates`` has found them
        self._opened: dict[str, Manifest] = {}  # committed directories are never modified: a look at their objects will do

    def names(self) -> list[str]:
        """The names that begin as those of saves do."""
        return self.store.names(beginning="step-")

    def entries(self, last: int | None = None, *, without: Collection[str] = ()) -> list[Entry]:
        """All saves, the latest attempt's first, within an attempt the latest step first.

        With ``last`` at most this number of the latest: nothing else is looked into. Those of ``without`` are left out.
        """
        for count in range(_TRIES):
            there, seen = {*self.names()}, Seen()
            saves = saves_among(there.difference(without))
            found = _with_bases(self.look_at_all(saves[:last], seen, among=there))
            doubtful = {entry.directory for entry in found if entry.state == "unfinished"}
            if not doubtful:
                break
            before, there = there, {*self.names()}
            # What is being deleted looks unfinished. Then something newer was committed, and that changes what is seen.
            again = doubtful if not self.store.has_ranges else {each for each in doubtful if seen.get(each)}
            is_settled = there == before and all({*self.store.list(each)} == seen[each] for each in again)
            if is_settled or (count and any(entry.state == "whole" for entry in found)):
                break
        if self.store.has_ranges:  # a server may keep names of directories in which nothing is left
            there = {directory for directory in there if seen.get(directory)}
        return [entry for entry in found if entry.state != "unfinished" or entry.directory in there]

    def for_each(self, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """What a function makes of each of many saves, of several at a time where that is faster."""
        at_once = _LOOKS_AT_ONCE if self.store.has_ranges else 1
        return self.store.together(lambda: in_threads(at_once, function, items)).result()

    def look_at_all(
        self, saves: Sequence[SaveName], seen: Seen | None = None, *, among: Collection[str] | None = None
    ) -> list[Entry]:
        """What saves are now. An object store tells the objects of many in one request; ``among`` are all that lie there."""
        bases = Listed()
        if not self.store.has_ranges:
            return self.for_each(functools.partial(self.look, seen=seen, bases=bases), saves)
        wanted = {save.directory for save in saves}
        listed: Listed = {directory: {} for directory in wanted}
        for beginning in beginnings(sorted(wanted.union(among or ())), wanted):
            for directory, objects in self.objects(beginning).items():
                listed.get(directory, {}).update(objects)
        return self.for_each(lambda save: self.look(save, seen, listed[save.directory], bases), saves)

    def objects(self, beginning: str = "step-") -> Listed:
        """The objects, with their sizes in bytes, of each save whose name begins so. For object stores alone."""
        found = Listed()
        for name, size_bytes in self.store.list(beginning=beginning).items():
            found.setdefault(name.partition("/")[0], {})[name] = size_bytes
        return found

    def look(
        self,
        save: SaveName,
        seen: Seen | None = None,
        objects: Mapping[str, int] | None = None,
        bases: Listed | None = None,
    ) -> Entry:
        """What a save is now. Its objects are not listed if they are given; their names go to ``seen``. The objects of its
        bases go to ``bases``, where the next one may find them."""
        directory, objects = save.directory, self.store.list(save.directory) if objects is None else objects
        if seen is not None:
            seen[directory] = {*objects}
        if f"{directory}/{MANIFEST}" not in objects:
            return Entry(directory, save.step, save.attempt, "unfinished")
        manifest = self._opened.get(directory)
        try:
            manifest = manifest or self._read(directory, objects[f"{directory}/{MANIFEST}"])
            listed = {} if bases is None else bases
            for base in sorted(manifest.bases - listed.keys()):
                listed[base] = self.store.list(base)
            for file in manifest.files:
                _check_size(file, (listed[file.base] if file.base else objects).get(file.path(directory)))
        except CheckpointError as error:
            if not self.is_committed(directory):  # any longer
                return Entry(directory, save.step, save.attempt, "unfinished")
            return Entry(directory, save.step, save.attempt, "corrupt", manifest, str(error))
        self._opened[directory] = manifest
        return Entry(directory, save.step, save.attempt, "whole", manifest)

    def known(self, save: SaveName) -> Entry:
        """What a save is, without another look at one that was whole."""
        if (manifest := self._opened.get(save.directory)) is not None:
            return Entry(save.directory, save.step, save.attempt, "whole", manifest)
        return self.look(save)

    def is_committed(self, directory: str) -> bool:
        """Whether a save has a manifest now."""
        return f"{directory}/{MANIFEST}" in self.store.list(directory)

    def open(self, directory: str) -> Manifest:
        """The manifest of a checkpoint. Raises ``Corrupt`` or ``UnknownFormat``; ``NoCheckpoint`` when there is none."""
        return _decoded(self.store.url, directory, self.store.get(f"{directory}/{MANIFEST}", MANIFEST_LIMIT_BYTES))

    def _read(self, directory: str, size_bytes: int) -> Manifest:
        """As ``open``, in one request: the size is known from a listing."""
        try:
            text = self.store.read_range(f"{directory}/{MANIFEST}", 0, min(size_bytes, MANIFEST_LIMIT_BYTES))
        except FileNotFoundError:
            text = None
        return _decoded(self.store.url, directory, text)

    def add(self, directory: str, manifest: Manifest) -> None:
        """Tells of a checkpoint that was committed, and its manifest read back, just now."""
        self._opened[directory] = manifest

    def forget(self, but: Collection[str]) -> None:
        """Keeps in memory what is known of these saves alone: a long run makes many."""
        self._opened = {directory: manifest for directory, manifest in self._opened.items() if directory in but}

    # --- what to go on from ------------------------------------------------------------------------------------------

    def candidates(self, seen: Seen | None = None, kept: Mapping[SaveName, Entry] | None = None) -> Iterator[Entry]:
        """What a run may resume from, best first; corrupt ones are among them, so that they can be reported.

        Right after a claim with ``resumes``, these are the saves as they were then. What is ``kept`` elsewhere is among
        them. Each is looked at when it is asked for; the names of its objects go to ``seen``. Raises ``UnknownFormat`` when
        it has given none and there are names that begin as those of saves do: they are not taken for nothing.
        """
        names = self.attempts.saves_after_claim()
        names, way, is_empty, kept = self.names() if names is None else names, Line(), True, kept or {}
        self.found = names
        for save in saves_among([*names, *(save.directory for save in kept)]):
            if way.may_have(save.attempt, save.step) and way.take(entry := kept.get(save) or self.look(save, seen)):
                is_empty = False
                yield entry
        strange = sorted(name for name in names if name.startswith("step-") and not parse_directory(name))
        if is_empty and strange:
            raise UnknownFormat(
                f"{self.store.url}: expected checkpoints, found {strange[0]}, which is no name of this version's; "
                "rename the directory back, or choose another URL"
            )

    def newest(self, step: int | None = None) -> Entry:
        """The newest whole checkpoint of the line the run is on, or that of a certain step. Raises ``NoCheckpoint``."""
        before: Seen | None = None
        for _ in range(_TRIES):
            seen = Seen()
            wanted = (entry for entry in self.candidates(seen) if entry.state == "whole" and step in (None, entry.step))
            found = next(wanted, None)
            # What was passed over may have been deleted, since something newer was there: that changes what is seen. What
            # grows is being written.
            if seen == before or (found is not None and (len(seen) == 1 or _only_grew(before, seen, found))):
                break
            before = seen
        if found is not None:
            return found
        if seen != before:  # though it was tried often
            raise StoreError(f"list {self.store.url}: the contents changed during every try to list them", transient=True)
        words = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
        others = [save.attempt.number for save in saves_among(self.names()) if save.step == step]
        hint = f"; that of attempt {others[0]} is corrupt, unfinished, or on an abandoned line" if others else ""
        raise NoCheckpoint(f"{self.store.url}: there is no {words}{hint}")

    def reading(self, function: Callable[[Entry], T], step: int | None = None) -> T:
        """What a function makes of the newest whole checkpoint, or that of a certain step. Raises ``NoCheckpoint``.

        Where the run that goes on deletes that one meanwhile, the function is called with the one that is the newest then.
        """
        for _ in range(_TRIES):
            entry = self.newest(step)
            try:
                return function(entry)
            except CheckpointError:
                if self.is_committed(entry.directory):
                    raise
        raise StoreError(
            f"read {self.store.url}: each checkpoint was deleted while it was being read; stop whatever "
            "deletes them, and try again",
            transient=True,
        )


def _decoded(url: str, directory: str, text: bytes | None) -> Manifest:
    if text is None:
        raise NoCheckpoint(f"{url}/{directory}: there is no {MANIFEST}")
    try:
        manifest = Manifest.decode(text)
    except CheckpointError as error:
        raise type(error)(f"{directory}/{error}") from None
    if parse_directory(directory) != (manifest.step, Attempt(manifest.attempt)):
        raise Corrupt(
            f"{directory}/{MANIFEST}: expected the step and the attempt in the directory's name, found "
            f"step {manifest.step}, attempt {manifest.attempt}"
        )
    later = [save.directory for save in saves_among(manifest.bases) if save >= saves_among([directory])[0]]
    if later:  # what goes is deleted the latest first
        raise Corrupt(f"{directory}/{MANIFEST}: expected files of earlier saves, found one of {later[0]}")
    return manifest


def _only_grew(before: Seen | None, seen: Seen, found: Entry) -> bool:
    """Whether all that is later than a checkpoint, and was there at the look before, still has what it had then."""
    if before is None:
        return False
    place = SaveName(found.attempt, found.step, found.directory)
    return all(before[save.directory] <= seen.get(save.directory, set()) for save in saves_among(before) if save > place)


class Line:
    """The line that the run is on, found from its saves, the latest attempt's first.

    The newest attempt comes first, whatever steps others reached. From an attempt that a newer checkpoint stands on, only
    the steps up to that branch belong to the line; what it committed beyond — it was believed dead, and was not — is not.
    Such a line is abandoned, and so is all of an attempt that stands on one of these, and that none of the newer ones stands
    on. An attempt that has nothing to do with them, such as a call of ``harness.save``, is a line of its own, which comes
    after.
    """

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # the last step of each attempt that belongs to the line

    def knows(self, attempt: Attempt) -> bool:
        """Whether the saves so far have said what of an attempt is on the line."""
        return attempt.id in self._until

    def may_have(self, attempt: Attempt, step: int) -> bool:
        """Whether a save may be on the line, for all that its name says."""
        return step <= self._until.get(attempt.id, math.inf)

    def take(self, entry: Entry) -> bool:
        """Whether the next save is on the line, and a run may resume from it."""
        if entry.state == "unfinished" or not self.may_have(entry.attempt, entry.step):
            return False
        lineage = entry.manifest.lineage if entry.manifest else []
        if entry.attempt.id not in self._until:
            was_left = any(ancestor.attempt in self._until for ancestor in lineage)
            self._until[entry.attempt.id] = -1 if was_left else math.inf
            if was_left:
                return False
        for ancestor in lineage:
            known = self._until.get(ancestor.attempt, math.inf)
            self._until[ancestor.attempt] = min(known, ancestor.until_step)
        return True


def _with_bases(entries: Sequence[Entry]) -> list[Entry]:
    """The same; of what has no manifest, that which has files of others is a base."""
    bases = shared_files(entries)
    return [
        replace(entry, state="base") if entry.state == "unfinished" and entry.directory in bases else entry
        for entry in entries
    ]


def shared_files(entries: Iterable[Entry]) -> Listed:
    """The files that checkpoints have in the directories of earlier saves, by these, with their sizes in bytes."""
    found = Listed()
    for entry in entries:
        for file in entry.manifest.files if entry.manifest is not None else ():
            if file.base:
                found.setdefault(file.base, {})[file.path(entry.directory)] = file.bytes
    return found


def line(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Of all saves, the latest attempt's first, those that a run may resume from."""
    way = Line()
    return (entry for entry in entries if way.take(entry))


def further(catalog: Catalog, newest: Entry) -> list[Entry]:
    """What goes further than the newest checkpoint of the line, and is not on it: the last whole one of each other line. Of
    the saves that were there when the newest was found among the ``candidates``."""
    return beyond(saves_among(catalog.found), newest.step, catalog.look)


def beyond(saves: Iterable[SaveName], step: int, look: Callable[[SaveName], Entry]) -> list[Entry]:
    """Of saves, the latest first, the last whole one of each line that goes further than a step."""
    found, told = list[Entry](), set[str]()
    for save in saves:
        if save.step > step and save.attempt.id not in told and (entry := look(save)).state == "whole":
            found.append(entry)
            stands_on = entry.manifest.lineage if entry.manifest else ()
            told |= {save.attempt.id, *(ancestor.attempt for ancestor in stands_on)}
    return found


def saves_among(names: Iterable[str]) -> list[SaveName]:
    """The saves among the names in a run's URL, the latest first."""
    found = [SaveName(parsed[1], parsed[0], name) for name in names if (parsed := parse_directory(name))]
    return sorted(found, key=lambda save: (save.attempt.id, save.step, save.directory), reverse=True)  # they may be many


def beginnings(names: Sequence[str], wanted: Collection[str]) -> list[str]:
    """Beginnings of names that all the wanted ones have, and few others, so that few pages are listed. ``names`` are all
    that there are, sorted."""
    return _beginnings(names, wanted)[1]


def _beginnings(names: Sequence[str], wanted: Collection[str]) -> tuple[int, list[str]]:
    """The pages of a listing that they cost, and the beginnings."""
    if not any(name in wanted for name in names):
        return 0, []
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(names[0], names[-1], strict=False))
    beginning = "".join(one for one, _ in alike)
    pages = -(-len(names) // _SAVES_IN_A_PAGE)
    if pages == 1:
        return 1, [beginning]
    groups = itertools.groupby(names, key=lambda name: name[: len(beginning) + 1])
    parts = [_beginnings(list(group), wanted) for _, group in groups]
    fewer = sum(each for each, _ in parts)
    return (fewer, [each for _, found in parts for each in found]) if fewer < pages else (pages, [beginning])


def verify_all(catalog: Catalog, *, step: int | None = None, deep: bool = False) -> list[Entry]:
    """The committed saves of a run (or those of one step), as ``Catalog.entries`` has them; with ``deep`` after every byte
    has been read. What the run has deleted meanwhile is not among them."""
    for _ in range(_TRIES):
        there = (entry for entry in catalog.entries() if entry.state in ("whole", "corrupt"))
        entries = [entry for entry in there if step in (None, entry.step)]
        verified = set[str]()
        found = [entry for each in entries if (entry := _verified(catalog, each, verified))] if deep else entries
        if found or not entries:
            break
    return found


def verify(catalog: Catalog, entry: Entry, verified: set[str] | None = None) -> None:
    """Reads every byte of a checkpoint and compares it with the manifest. Raises ``Corrupt``. What others have as well is
    not read again if it is among what was ``verified``."""
    verified = set() if verified is None else verified
    for file in catalog.open(entry.directory).files:
        path = file.path(entry.directory)
        if f"{path} {file.checksum}" not in verified:
            verify_file(catalog.store, path, file)
            verified.add(f"{path} {file.checksum}")


def _verified(catalog: Catalog, entry: Entry, verified: set[str]) -> Entry | None:
    """A save after every byte has been read; None where it was deleted meanwhile."""
    if entry.state != "whole":
        return entry
    try:
        verify(catalog, entry, verified)
    except CheckpointError as error:
        return replace(entry, state="corrupt", problem=str(error)) if catalog.is_committed(entry.directory) else None
    return entry


def _check_size(file: FileInfo, found_bytes: int | None) -> None:
    if found_bytes != file.bytes:
        found = "it is missing" if found_bytes is None else f"found {found_bytes}"
        where = f" in the directory of an earlier save, {file.base}" if file.base else ""
        raise Corrupt(f"{file.name}: expected {file.bytes} bytes{where}, {found}")


def verify_file(store: Store, name: str, file: FileInfo) -> None:
    """Reads every byte of an object and compares it with the manifest's entry. Raises ``Corrupt``."""
    read_file(store, name, file, lambda stream: check_bytes(stream, file))


def read_file(store: Store, name: str, file: FileInfo, consume: Callable[[BinaryIO], T]) -> T:
    """What ``consume`` makes of an object of a checkpoint. Its ``Corrupt`` gets the object's name."""
    try:
        return store.read(name, consume, file.bytes)
    except FileNotFoundError:
        raise Corrupt(f"{name}: missing; expected {file.bytes} bytes") from None
    except Corrupt as error:
        raise Corrupt(f"{name}: {error}") from None


def check_bytes(stream: BinaryIO, file: FileInfo) -> None:
    """Reads a stream to its end. Raises ``Corrupt`` unless it has the bytes of the manifest's entry."""
    whole, count, buffer = hasher(file.algorithm), 0, memoryview(bytearray(1 << 20))
    while found_bytes := stream.readinto(buffer):  # type: ignore[attr-defined]
        whole.update(buffer[:found_bytes])
        count += found_bytes
    found = file.checksum_of(whole)
    if (count, found) != (file.bytes, file.checksum):
        expected = f"{file.bytes} bytes with {file.checksum}"
        raise Corrupt(f"expected {expected}, found {count} bytes with {found}")
