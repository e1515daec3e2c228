"""What lies in a run's URL: list, open, verify, prune. Only what is committed counts. No torch."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal, TypeVar

from harness.checkpoint.format import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    Attempt,
    FileInfo,
    Manifest,
    hasher,
    new_directory,
    parse_directory,
)
from harness.errors import CheckpointError, Corrupt, NoCheckpoint, StoreError, Superseded, UnknownFormat
from harness.runtime.threads import in_threads
from harness.storage.store import Store

T = TypeVar("T")
Item = TypeVar("Item")
Seen = dict[str, set[str]]  # the names of the objects in each directory that was looked into

_TRIES = 50  # to find a run as it is, while it goes on
_LOOKS_AT_ONCE = 8
_TIDYING_SECONDS = 1.0  # so long at most are old checkpoints deleted after a commit,
_TIDYING_SAVES = 16  # if they are more than so many


@dataclass(frozen=True)
class Entry:
    """The directory of one save.

    ``state`` is ``whole`` when the manifest is valid and all objects are there with their sizes, ``corrupt`` when it is not
    so (``problem`` says how), ``unfinished`` when there is no manifest: still being written, or abandoned.
    """

    directory: str
    step: int
    attempt: Attempt
    state: Literal["whole", "corrupt", "unfinished"]
    manifest: Manifest | None = None
    problem: str = ""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep: the last so many (None: all), and those whose step is a multiple of another number."""

    keep_last: int | None = None
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        assert self.keep_last is None or self.keep_last >= 1, "the newest whole checkpoint is never deleted"

    def keeps(self, age: int, step: int, best_step: int | None) -> bool:
        """Whether the whole checkpoint that is the ``age``-th newest (from 0) stays."""
        if self.keep_last is None or age < self.keep_last or step == best_step:
            return True
        return self.keep_every_steps is not None and step % self.keep_every_steps == 0


@dataclass(frozen=True, order=True)
class _Save:
    """The name of a save's directory. The greatest is the latest: of several saves of a step by one attempt, too."""

    attempt: Attempt
    step: int
    directory: str


class Catalog:
    """The checkpoints of the run in a store.

    Names are listed, and directories looked into one by one, the latest first: what comes after the newest whole checkpoint
    costs a reader nothing, and what is not the run's is never looked into.

    A run goes on, and deletes, while others read it. What vanishes in between is no damage. A deletion begins with the
    manifest: whoever misses an object asks for that again, and lists the names anew where it is gone.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._opened: dict[str, Manifest] = {}  # committed directories are never modified: a look at their objects will do

    def entries(self) -> list[Entry]:
        """All saves, the latest attempt's first, within an attempt the latest step first."""
        for count in range(_TRIES):
            there, seen = {*self.store.names()}, Seen()
            found = self._look_at_all(_saves(there), seen)
            doubtful = {entry.directory for entry in found if entry.state == "unfinished"}
            if not doubtful:
                break
            before, there = there, {*self.store.names()}
            # What is being deleted looks unfinished. Then something newer was committed, and that changes what is seen.
            is_settled = there == before and all({*self.store.list(each)} == seen[each] for each in doubtful)
            if is_settled or (count and any(entry.state == "whole" for entry in found)):
                break
        return [entry for entry in found if entry.state != "unfinished" or entry.directory in there]

    def _for_each(self, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """What a function makes of each of many saves, of several at a time where that is faster."""
        at_once = _LOOKS_AT_ONCE if self.store.has_ranges else 1
        return self.store.together(lambda: in_threads(at_once, function, items)).result()

    def _look_at_all(self, saves: Sequence[_Save], seen: Seen | None = None) -> list[Entry]:
        """What saves are now. An object store tells all their objects at once."""
        if not self.store.has_ranges:
            return self._for_each(functools.partial(self._look, seen=seen), saves)
        listed: dict[str, dict[str, int]] = {save.directory: {} for save in saves}
        for name, size_bytes in self.store.list(beginning="step-").items():
            listed.get(name.partition("/")[0], {})[name] = size_bytes
        return self._for_each(lambda save: self._look(save, seen, listed[save.directory]), saves)

    def _look(self, save: _Save, seen: Seen | None = None, objects: Mapping[str, int] | None = None) -> Entry:
        """What a save is now. The names of its objects go to ``seen``."""
        directory, objects = save.directory, self.store.list(save.directory) if objects is None else objects
        if seen is not None:
            seen[directory] = {*objects}
        if f"{directory}/{MANIFEST}" not in objects:
            return Entry(directory, save.step, save.attempt, "unfinished")
        manifest = self._opened.get(directory)
        try:
            manifest = manifest or self._read(directory, objects[f"{directory}/{MANIFEST}"])
            for file in manifest.files:
                _check_size(file, objects.get(f"{directory}/{file.name}"))
        except CheckpointError as error:
            if not self.is_committed(directory):  # any longer
                return Entry(directory, save.step, save.attempt, "unfinished")
            return Entry(directory, save.step, save.attempt, "corrupt", manifest, str(error))
        self._opened[directory] = manifest
        return Entry(directory, save.step, save.attempt, "whole", manifest)

    def _known(self, save: _Save) -> Entry:
        """What a save is, without another look at one that was whole."""
        if (manifest := self._opened.get(save.directory)) is not None:
            return Entry(save.directory, save.step, save.attempt, "whole", manifest)
        return self._look(save)

    def is_committed(self, directory: str) -> bool:
        """Whether a save has a manifest now."""
        return f"{directory}/{MANIFEST}" in self.store.list(directory)

    def open(self, directory: str) -> Manifest:
        """The manifest of a checkpoint. Raises ``Corrupt`` or ``UnknownFormat``; ``NoCheckpoint`` when there is none."""
        return self._decode(directory, self.store.get(f"{directory}/{MANIFEST}", MANIFEST_LIMIT_BYTES))

    def _read(self, directory: str, size_bytes: int) -> Manifest:
        """As ``open``, in one request: the size is known from a listing."""
        try:
            text = self.store.read_range(f"{directory}/{MANIFEST}", 0, min(size_bytes, MANIFEST_LIMIT_BYTES))
        except FileNotFoundError:
            text = None
        return self._decode(directory, text)

    def _decode(self, directory: str, text: bytes | None) -> Manifest:
        if text is None:
            raise NoCheckpoint(f"{self.store.url}/{directory}: there is no {MANIFEST}")
        try:
            manifest = Manifest.decode(text)
        except CheckpointError as error:
            raise type(error)(f"{directory}/{error}") from None
        if parse_directory(directory) != (manifest.step, Attempt(manifest.attempt)):
            raise Corrupt(f"{directory}/{MANIFEST}: is that of step {manifest.step}, attempt {manifest.attempt}")
        return manifest

    def add(self, directory: str, manifest: Manifest) -> None:
        """Tells of a checkpoint that was committed, and its manifest read back, just now."""
        self._opened[directory] = manifest

    # --- what to go on from ------------------------------------------------------------------------------------------

    def candidates(self, seen: Seen | None = None) -> Iterator[Entry]:
        """What a run may resume from, best first; corrupt ones are among them, so that they can be told of.

        Each is looked at when it is asked for; the names of its objects go to ``seen``. Raises ``UnknownFormat``
        when it has given none and there are names that begin as those of saves do: they are not taken for nothing.
        """
        names, way, is_empty = self.store.names(), _Line(), True
        for save in _saves(names):
            if way.may_have(save.attempt, save.step) and way.take(entry := self._look(save, seen)):
                is_empty = False
                yield entry
        strange = sorted(name for name in names if name.startswith("step-") and not parse_directory(name))
        if is_empty and strange:
            raise UnknownFormat(
                f"{self.store.url}: expected checkpoints, found {strange[0]}, a name that this version gives to none; "
                "give the directory its own name back, or choose another URL"
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
            raise StoreError(f"list {self.store.url}: it changes faster than it can be looked at", transient=True)
        words = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
        others = [save.attempt.number for save in _saves(self.store.names()) if save.step == step]
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
        raise StoreError(f"read {self.store.url}: checkpoints are deleted faster than they can be read", transient=True)

    def further(self, newest: Entry) -> list[Entry]:
        """What goes further than the newest checkpoint of the line, and is not on it: the last whole one of each other
        line."""
        return self._further(_saves(self.store.names()), newest.step, self._look)

    def _further(self, saves: Iterable[_Save], step: int, look: Callable[[_Save], Entry]) -> list[Entry]:
        found, told = list[Entry](), set[str]()
        for save in saves:
            if save.step > step and save.attempt.id not in told and (entry := look(save)).state == "whole":
                found.append(entry)
                stands_on = entry.manifest.lineage if entry.manifest else ()
                told |= {save.attempt.id, *(ancestor.attempt for ancestor in stands_on)}
        return found

    def verify(self, entry: Entry) -> None:
        """Reads every byte of a checkpoint and compares it with the manifest. Raises ``Corrupt``."""
        for file in self.open(entry.directory).files:
            verify_file(self.store, f"{entry.directory}/{file.name}", file)

    # --- deleting ----------------------------------------------------------------------------------------------------

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
        """
        saves = _saves(self.store.names())
        last = max({*self.attempts(), *(save.attempt for save in saves)}, default=None)
        found = dict(zip(saves, self._look_at_all(saves), strict=True))
        kept = self._kept(saves, retention, best_step, found.__getitem__)
        old = {*self._old(saves, kept, found.__getitem__)}

        def goes(save: _Save, entry: Entry) -> bool:
            if save in old and retention.keep_last is not None:
                return True
            return entry.state == "unfinished" and (unfinished or save in old or (bool(kept) and save.attempt != last))

        gone = [entry for save, entry in found.items() if goes(save, entry)]
        if not dry_run:
            self._for_each(self._delete, [entry.directory for entry in reversed(gone)])
        return gone

    def tidy(self, retention: Retention, best_step: int | None, attempt: Attempt) -> None:
        """Deletes what is not to be kept, as ``prune`` does, after a commit and by the only writer, that of an attempt.

        Raises ``Superseded``, before anything is deleted, when it was believed dead: a successor counts on what is there.
        What the writer itself has committed does no harm, it is not on that one's line.

        The training may wait for this. So only what decides is looked at, checkpoints between the last ones and older ones
        stay or go by their names, and of many that are to go, some are left to the next call.
        """
        saves = [] if retention.keep_last is None else _saves(self.store.names())
        self.refuse_superseded(attempt)  # looked at after the names: who begins later than this finds what stays
        kept = self._kept(saves, retention, best_step, self._known, by_name=True)
        until = time.monotonic() + _TIDYING_SECONDS
        for count, save in enumerate(reversed(self._old(saves, kept, self._known)), 1):
            self._delete(save.directory)
            if count >= _TIDYING_SAVES and time.monotonic() > until:
                break

    def _kept(
        self,
        saves: Iterable[_Save],
        retention: Retention,
        best_step: int | None,
        look: Callable[[_Save], Entry],
        *,
        by_name: bool = False,
    ) -> list[_Save]:
        """The whole checkpoints that are to be kept, the newest first; of several of one step and attempt the newest.

        With ``by_name`` those besides the last ones are not looked at, one of an attempt that nothing is known of excepted.
        """
        way, kept, counted = _Line(), list[_Save](), set[tuple[Attempt, int]]()
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

    def _old(self, saves: Sequence[_Save], kept: Sequence[_Save], look: Callable[[_Save], Entry]) -> list[_Save]:
        """What is older than the newest that is kept, and is neither kept nor further than it."""
        if not kept:
            return []
        stays = {*kept}
        old = [save for save in saves if save not in stays and save < kept[0]]
        further = {entry.directory for entry in self._further(old, kept[0].step, look)}
        return [save for save in old if save.directory not in further]

    def sweep(self, attempt: Attempt) -> None:
        """Deletes what attempts before this one have begun to save after the newest whole checkpoint, and not finished.

        Who wakes up and finishes one of those will have committed what is corrupt, and is on nobody's line.
        """
        rubbish = []
        for save in _saves(self.store.names()):
            entry = self._known(save)
            if entry.state == "whole":
                break
            if entry.state == "unfinished" and save.attempt < attempt:
                rubbish.append(save.directory)
        else:
            return  # where nothing is whole, it may be all that its owner has left
        for directory in rubbish:
            self._delete(directory)

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
        if not self.is_committed(directory):
            self._delete(directory)

    def _delete(self, directory: str) -> None:
        """Removes a save. Its manifest goes first, so that a deletion that is cut short leaves no checkpoint. Of a link only
        the link goes."""
        if self.store.unlink(directory):
            return
        objects = self.store.list(directory, follow=False)
        if (manifest := f"{directory}/{MANIFEST}") in objects:
            self.store.delete(manifest)
        in_threads(self.store.streams, self.store.delete, sorted(objects.keys() - {manifest}))
        self.store.delete_directory(directory)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def attempts(self) -> list[Attempt]:
        """Every start of the run that left a trace, the first one first."""
        return _attempts(self.store.list("attempts"))

    def claim_attempt(self, about: Mapping[str, Any]) -> Attempt:
        """Numbers this start of the run after all others and leaves a record of it (``about`` is JSON).

        The claim is made before anything is trained: a writer of an earlier attempt has a lower number from then on, even
        if it has yet to write its first checkpoint.
        """
        saved = {save.attempt for save in _saves(self.store.names())}
        attempt = Attempt.after({*self.attempts(), *saved})
        record = {"attempt": attempt.id, "started": datetime.now(UTC).isoformat(timespec="milliseconds"), **about}
        text = json.dumps(record, indent=1).encode()
        self.store.put(f"attempts/{attempt.id}.json", lambda: [text], len(text))
        return attempt

    def about_attempt(self, attempt: Attempt) -> dict[str, Any]:
        """The record of an attempt; empty where it cannot be read."""
        text = self.store.get(f"attempts/{attempt.id}.json", MANIFEST_LIMIT_BYTES)
        try:
            record = json.loads(text or b"{}")
        except ValueError:
            return {}
        return record if isinstance(record, dict) else {}

    def refuse_superseded(self, attempt: Attempt) -> None:
        """Stops who was believed dead, and is not. Raises ``Superseded`` when an attempt after this one trains the run."""
        newest = max(self.attempts(), default=attempt)
        if newest > attempt:
            about = self.about_attempt(newest)
            who = f"started {about.get('started')} on {about.get('host')}"
            raise Superseded(f"{self.store.url}: attempt {newest.number} trains this run now ({who})")


def _only_grew(before: Seen | None, seen: Seen, found: Entry) -> bool:
    """Whether all that is later than a checkpoint, and was there at the look before, still has what it had then."""
    if before is None:
        return False
    place = _Save(found.attempt, found.step, found.directory)
    return all(before[save.directory] <= seen.get(save.directory, set()) for save in _saves(before) if save > place)


class _Line:
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


def line(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Of all saves, the latest attempt's first, those that a run may resume from."""
    way = _Line()
    return (entry for entry in entries if way.take(entry))


def _attempts(objects: Iterable[str]) -> list[Attempt]:
    """The attempts that have a record among the objects of a run, the first one first."""
    names = (name.removeprefix("attempts/") for name in objects if name.startswith("attempts/"))
    return sorted(attempt for name in names if (attempt := Attempt.parse(name.removesuffix(".json"))))


def _saves(names: Iterable[str]) -> list[_Save]:
    """The saves among the names in a run's URL, the latest first."""
    found = [_Save(parsed[1], parsed[0], name) for name in names if (parsed := parse_directory(name))]
    return sorted(found, key=lambda save: (save.attempt.id, save.step, save.directory), reverse=True)  # they may be many


def verify_all(catalog: Catalog, *, step: int | None = None, deep: bool = False) -> list[Entry]:
    """The committed saves of a run (or those of one step), as ``Catalog.entries`` has them; with ``deep`` after every byte
    has been read. What the run has deleted meanwhile is not among them."""
    for _ in range(_TRIES):
        entries = [entry for entry in catalog.entries() if entry.state != "unfinished" and step in (None, entry.step)]
        found = [entry for each in entries if (entry := _verified(catalog, each))] if deep else entries
        if found or not entries:
            break
    return found


def _verified(catalog: Catalog, entry: Entry) -> Entry | None:
    """A save after every byte has been read; None where it was deleted meanwhile."""
    if entry.state != "whole":
        return entry
    try:
        catalog.verify(entry)
    except CheckpointError as error:
        return replace(entry, state="corrupt", problem=str(error)) if catalog.is_committed(entry.directory) else None
    return entry


def _check_size(file: FileInfo, found_bytes: int | None) -> None:
    if found_bytes != file.bytes:
        found = "it is missing" if found_bytes is None else f"found {found_bytes}"
        raise Corrupt(f"{file.name}: expected {file.bytes} bytes, {found}")


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
    algorithm = file.checksum.partition(":")[0]
    whole, count, buffer = hasher(algorithm), 0, memoryview(bytearray(1 << 20))
    while found_bytes := stream.readinto(buffer):  # type: ignore[attr-defined]
        whole.update(buffer[:found_bytes])
        count += found_bytes
    found = f"{algorithm}:{whole.hexdigest()}"
    if (count, found) != (file.bytes, file.checksum):
        expected = f"{file.bytes} bytes with {file.checksum}"
        raise Corrupt(f"expected {expected}, found {count} bytes with {found}")
