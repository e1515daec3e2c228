"""What lies in a run's URL: list, open, verify, prune. Only what is committed counts. No torch."""

import json
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
    parse_directory,
)
from harness.checkpoint.store import Store
from harness.checkpoint.threads import in_threads
from harness.errors import CheckpointError, Corrupt, NoCheckpoint, Superseded

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """The directory of one save.

    ``state`` is ``whole`` when the manifest is valid and all objects are there with their sizes, ``damaged`` when it is not
    so (``problem`` says how), ``unfinished`` when there is no manifest: still being written, or abandoned.
    """

    directory: str
    step: int
    attempt: Attempt
    state: Literal["whole", "damaged", "unfinished"]
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


class Catalog:
    """The checkpoints of the run in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._opened: dict[str, Manifest] = {}  # committed directories are never modified: a look at their objects will do

    def entries(self) -> list[Entry]:
        """All saves, the latest attempt's first, within an attempt the latest step first."""
        return self._entries(self.store.list())

    def _entries(self, objects: Mapping[str, int]) -> list[Entry]:
        found = sorted(_directories(objects), key=lambda item: (item[2], item[1], item[0]), reverse=True)
        return [self._entry(directory, step, attempt, objects) for directory, step, attempt in found]

    def _entry(self, directory: str, step: int, attempt: Attempt, objects: Mapping[str, int]) -> Entry:
        if f"{directory}/{MANIFEST}" not in objects:
            return Entry(directory, step, attempt, "unfinished")
        manifest = self._opened.get(directory)
        try:
            manifest = manifest or self.open(directory)
            for file in manifest.files:
                _check_size(file, objects.get(f"{directory}/{file.name}"))
        except CheckpointError as error:
            return Entry(directory, step, attempt, "damaged", manifest, str(error))
        self._opened[directory] = manifest
        return Entry(directory, step, attempt, "whole", manifest)

    def open(self, directory: str) -> Manifest:
        """The manifest of a checkpoint. Raises ``Corrupt`` or ``UnknownFormat``; ``NoCheckpoint`` when there is none."""
        text = self.store.get(f"{directory}/{MANIFEST}", MANIFEST_LIMIT_BYTES)
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

    def candidates(self) -> list[Entry]:
        """What a run may resume from, best first; damaged ones are among them, so that they can be told of."""
        return list(line(self.entries()))

    def newest(self, step: int | None = None) -> Entry:
        """The newest whole checkpoint of the line the run is on, or that of a certain step. Raises ``NoCheckpoint``."""
        for entry in self.candidates():
            if entry.state == "whole" and step in (None, entry.step):
                return entry
        wanted = "whole checkpoint" if step is None else f"whole checkpoint of step {step}"
        raise NoCheckpoint(f"{self.store.url}: there is no {wanted}")

    def verify(self, entry: Entry) -> None:
        """Reads every byte of a checkpoint and compares it with the manifest. Raises ``Corrupt``."""
        for file in self.open(entry.directory).files:
            verify_file(self.store, f"{entry.directory}/{file.name}", file)

    def prune(
        self,
        retention: Retention,
        best_step: int | None = None,
        *,
        attempt: Attempt | None = None,
        dry_run: bool = False,
    ) -> list[Entry]:
        """Deletes what is not to be kept and returns it. Called after a commit, by the only writer.

        That writer tells its ``attempt``. Raises ``Superseded``, before anything is deleted, when it was believed dead: a
        successor counts on what is there. What the writer itself has committed does no harm, it is not on that one's line.

        What is kept are whole checkpoints of the line that the run is on; ``best_step`` names one more of them. Whatever is
        newer than the newest of them stays, since somebody may be writing it. Of the older, all goes that is not kept:
        checkpoints, what they left behind when a deletion was cut short, saves that were never finished, lines that were
        left. With ``keep_last=None`` only the unfinished ones go.
        """
        objects = self.store.list()
        if attempt is not None:
            self._refuse_superseded(attempt, _attempts(objects))
        entries = self._entries(objects)
        whole = [entry for entry in line(entries) if entry.state == "whole"]
        if not whole:
            return []
        kept = {entry.directory for age, entry in enumerate(whole) if retention.keeps(age, entry.step, best_step)}
        newest = (whole[0].attempt, whole[0].step)
        gone = [
            entry
            for entry in entries
            if entry.directory not in kept
            and (entry.attempt, entry.step) < newest
            and (entry.state == "unfinished" or retention.keep_last is not None)
        ]
        for entry in gone if not dry_run else ():
            self._delete(entry.directory)
        return gone

    def _delete(self, directory: str) -> None:
        """Removes a save. Its manifest goes first, so that a deletion that is cut short leaves no checkpoint."""
        objects = self.store.list(directory)
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
        objects = self.store.list()
        saved = {attempt for _, _, attempt in _directories(objects)}
        attempt = Attempt.after({*_attempts(objects), *saved})
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
        self._refuse_superseded(attempt, self.attempts())

    def _refuse_superseded(self, attempt: Attempt, attempts: Sequence[Attempt]) -> None:
        newest = max(attempts, default=attempt)
        if newest > attempt:
            about = self.about_attempt(newest)
            who = f"started {about.get('started')} on {about.get('host')}"
            raise Superseded(f"{self.store.url}: attempt {newest.number} trains this run now ({who})")


def line(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Of all saves, the latest attempt's first, those that a run may resume from.

    The newest attempt comes first, whatever steps others reached: it is the line that the run is on. From an attempt that
    a newer checkpoint stands on, only the steps up to that branch belong to the line; what it committed beyond — it was
    believed dead, and was not — was left, and is passed over.
    """
    left_after: dict[str, int] = {}
    for entry in entries:
        if entry.state == "unfinished" or entry.step > left_after.get(entry.attempt.id, entry.step):
            continue
        yield entry
        for ancestor in entry.manifest.lineage if entry.manifest else ():
            known = left_after.get(ancestor.attempt, ancestor.until_step)
            left_after[ancestor.attempt] = min(known, ancestor.until_step)


def _attempts(objects: Iterable[str]) -> list[Attempt]:
    """The attempts that have a record among the objects of a run, the first one first."""
    names = (name.removeprefix("attempts/") for name in objects if name.startswith("attempts/"))
    return sorted(attempt for name in names if (attempt := Attempt.parse(name.removesuffix(".json"))))


def _directories(objects: Iterable[str]) -> list[tuple[str, int, Attempt]]:
    """The directories of saves among the objects of a run, with the step and the attempt in their names."""
    names = {name.partition("/")[0] for name in objects}
    return [(name, *parsed) for name in names if (parsed := parse_directory(name))]


def verify_all(catalog: Catalog, *, step: int | None = None, deep: bool = False) -> list[Entry]:
    """The committed saves of a run (or those of one step), as ``Catalog.entries`` has them; with ``deep`` after every byte
    has been read."""
    entries = [entry for entry in catalog.entries() if entry.state != "unfinished" and step in (None, entry.step)]
    return [_verified(catalog, entry) for entry in entries] if deep else entries


def _verified(catalog: Catalog, entry: Entry) -> Entry:
    if entry.state != "whole":
        return entry
    try:
        catalog.verify(entry)
    except CheckpointError as error:
        return replace(entry, state="damaged", problem=str(error))
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
