"""States that ranks have kept on their way out, in their machine's memory: where they lie, and which count. No torch.

A kept state is a checkpoint like any other, in a directory of the run below one of the user, ``/dev/shm/harness-UID``. Both
directories must be the user's own and closed to all others, since anybody may make names in ``/dev/shm``. The run's is named
after its first attempt and its URL: a copy of the run at another URL does not find what the original has kept.

Of the ranks of a machine one writes, the one that makes the ``claim`` of a step first. Who dies then leaves a claim, and no
manifest; the checkpoint in the run's URL counts.
"""

import contextlib
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.checkpoint.catalog import Catalog, Entry, SaveName, saves_among
from harness.checkpoint.format import Attempt
from harness.errors import ConfigError, HarnessError
from harness.storage.store import Store, open_store

MEMORY = "/dev/shm"  # noqa: S108  # what is there is looked at before it is used
RUBBISH_DAYS = 7.0
KEPT = "kept"  # what a manifest says of that, under this key of its meta
SPARE = 0.1  # of the room that there is; the ranks that start next need some, too
_SUFFIX = "00000000"  # of the names: machines that keep the same give it the same name


class Unusable(Exception):  # a reason, told in one line
    """Why nothing can be kept, or read, in a place."""


def root_in(directory: str) -> str:
    """The directory of this user."""
    return os.path.join(directory, f"harness-{os.getuid()}")


@dataclass(frozen=True)
class KeptPlace:
    """Where this machine keeps states of a run."""

    root: str
    path: str
    url: str = ""  # of the run

    @classmethod
    def of(cls, directory: str, url: str, first: Attempt) -> "KeptPlace":
        """That of the run at a URL, whose ``first`` attempt is known; ``directory`` is where all runs' lie."""
        root = root_in(directory)
        return cls(root, f"{root}/{first.id}-{hashlib.sha256(url.encode()).hexdigest()[:12]}", url)

    @property
    def store(self) -> Store:
        return open_store(self.path, tries=1)

    def make(self) -> None:
        """Makes the directories. Raises ``Unusable``, also where they are somebody else's."""
        for each in (self.root, self.path):
            try:
                os.mkdir(each, 0o700)
            except FileExistsError:
                pass
            except OSError as error:
                raise Unusable(f"{each} cannot be made: {error.strerror}") from None
            if why := _distrust(each):
                raise Unusable(why)

    def claim(self, attempt: Attempt, step: int) -> bool:
        """Whether this process is the one of the machine that keeps a step."""
        try:
            os.close(os.open(f"{self.path}/claim-{attempt.id}-{step}", os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return False
        except OSError as error:
            raise Unusable(f"{self.path} takes no file: {error.strerror}") from None
        return True

    def directory(self, attempt: Attempt, step: int) -> str:
        """The name of the checkpoint of a step."""
        return f"step-{step:012}-{attempt.id}-{_SUFFIX}"

    def check_room(self, size_bytes: int) -> None:
        """Raises ``Unusable`` unless that many bytes fit, with something to spare."""
        rooms = dict(_rooms(self.path))
        where, room_bytes = min(rooms.items(), key=lambda item: item[1])
        if size_bytes > room_bytes * (1 - SPARE):
            raise Unusable(f"it has {size_bytes / 1e6:.0f} MB, and {where} has {room_bytes / 1e6:.0f} MB free")

    def entries(self) -> list[Entry]:
        """What is kept here, whole. Raises ``Unusable`` where somebody else may have written it."""
        if not os.path.lexists(self.path):
            return []
        for each in (self.root, self.path):
            if why := _distrust(each):
                raise Unusable(why)
        return [entry for entry in Catalog(self.store).entries() if entry.state == "whole" and kept_of(entry)]

    def forget(self, before: Attempt | None = None) -> None:
        """Deletes what attempts before one have kept here, or all."""
        if _distrust(self.path):
            return
        for name in _names_in(self.path):
            attempt = next(iter(saves_among([name])), None)
            owner = attempt.attempt if attempt else Attempt.parse(name.removeprefix("claim-").rpartition("-")[0])
            if before is None or owner is None or owner < before:
                _remove(f"{self.path}/{name}")
        for each in (self.path, self.root):
            with contextlib.suppress(OSError):  # something is left in it
                os.rmdir(each)


def where(store: Store) -> str:
    """Where a run is, for all who look from anywhere on this machine: a path may have been given as it is seen from here."""
    return store.root if store.is_local else store.url


def kept_of(entry: Entry) -> Mapping[str, Any]:
    """What the manifest of a kept state says of that; empty for another checkpoint."""
    found = entry.manifest.meta.get(KEPT) if entry.manifest else None
    return found if isinstance(found, dict) else {}


def _distrust(path: str) -> str:
    """Why a directory is not to be used; empty where it may be, or is not there: others may delete it at any moment."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is no directory; remove it"
    if found.st_uid != os.getuid():
        return f"{path} belongs to user {found.st_uid}; have it removed, or set checkpoint.keep to a directory of your own"
    return f"others can write to {path}, or read it; chmod 700 it" if found.st_mode & 0o077 else ""


def _names_in(path: str) -> list[str]:
    """What lies in a directory; nothing where that is not there, or no more."""
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        return []


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


# --- how much fits ---------------------------------------------------------------------------------------------------


def _rooms(path: str) -> Iterator[tuple[str, int]]:
    """How many bytes each of what limits a file in a directory leaves; for one in memory, the memory does, too."""
    about = os.statvfs(path)
    yield os.path.dirname(os.path.dirname(path)), about.f_bavail * about.f_frsize
    if path.startswith(f"{MEMORY}/"):
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/meminfo").read_text().splitlines()
            yield "the machine", 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
        for group in _groups():
            with contextlib.suppress(OSError, ValueError):  # "max": it has no limit
                limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
                yield f"the control group {group}", limit - used


def _groups() -> Iterator[Path]:
    """The control groups of this process, from its own to the outermost."""
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = root / next(line.removeprefix("0::").lstrip("/") for line in lines if line.startswith("0::"))
        yield from (each for each in (own, *own.parents) if each.is_relative_to(root))


# --- what lies where -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """The directory of a run in which states are kept."""

    path: str
    bytes: int
    age_seconds: float  # since something was written
    steps: Sequence[int]
    url: str  # of the run; empty where no manifest tells


def left_in(directory: str) -> list[Left]:
    """What this user's runs have kept on this machine. Raises ``ConfigError`` for a directory that is not the user's."""
    root = root_in(directory)
    if why := _distrust(root):
        raise ConfigError(why)
    found = []
    for name in _names_in(root):
        with contextlib.suppress(FileNotFoundError):  # its run deletes it at this moment
            found.append(_left(f"{root}/{name}"))
    return found


def _left(path: str) -> Left:
    found = _files_in(path)
    try:
        entries = KeptPlace(os.path.dirname(path), path).entries()
    except (HarnessError, Unusable):
        entries = []
    url = str(kept_of(entries[0]).get("url", "")) if entries else ""
    sizes = sum(each.st_size for each in found)
    return Left(path, sizes, _age_seconds(path, found), [entry.step for entry in entries], url)


def _files_in(path: str) -> list[os.stat_result]:
    return [os.lstat(os.path.join(folder, each)) for folder, _, files in os.walk(path) for each in files]


def _age_seconds(path: str, files: Sequence[os.stat_result]) -> float:
    return time.time() - max(each.st_mtime for each in (os.lstat(path), *files))


def remove(left: Left) -> None:
    """Deletes what a run has kept."""
    _remove(left.path)
    with contextlib.suppress(OSError):  # other runs have kept something
        os.rmdir(os.path.dirname(left.path))


def remove_rubbish(place: KeptPlace) -> None:
    """Deletes what other runs of this user have left here long ago. Raises nothing. It opens nothing: they may be many."""
    with contextlib.suppress(OSError):
        for path in [] if _distrust(place.root) else [f"{place.root}/{name}" for name in _names_in(place.root)]:
            if path != place.path and _age_seconds(path, _files_in(path)) > RUBBISH_DAYS * 86400:
                _remove(path)


# --- which of them count ---------------------------------------------------------------------------------------------


def that_count(
    catalog: Catalog, found: Sequence[Sequence[Entry]], may_have_committed: Callable[[Attempt, int], bool]
) -> tuple[dict[SaveName, Entry], dict[SaveName, str]]:
    """Of the states that each rank has ``found`` on its machine, those that a run may resume from, each with the ranks that
    can read it; and why the others do not count. ``may_have_committed`` is asked about a save of which there is no trace.

    The run's own URL has the last word. An attempt that it does not know, and a state that stands on a checkpoint which is
    not there any more, do not count: somebody has gone back, or has begun anew. Copies of two machines must be the same.
    """
    counting: dict[SaveName, Entry] = {}
    refused: dict[SaveName, str] = {}
    attempts, saves = {*catalog.attempts.all()}, saves_among(catalog.store.names())
    for directory in dict.fromkeys(entry.directory for entries in found for entry in entries):
        copies = {rank: entry for rank, entries in enumerate(found) for entry in entries if entry.directory == directory}
        first = next(iter(copies.values()))
        name = SaveName(first.attempt, first.step, directory)
        if first.attempt not in attempts or kept_of(first).get("url") != where(catalog.store):
            refused[name] = "it is another run's"
        elif len({_content(entry) for entry in copies.values()}) > 1:
            refused[name] = "the machines have kept different states of this step"
        elif (stands_on := _stands_on(catalog, saves, first, may_have_committed)) is None:
            refused[name] = "the checkpoint that it stands on is not there any more"
        else:
            assert first.manifest is not None, "it is whole"
            meta = {**first.manifest.meta, KEPT: {**kept_of(first), "stands_on": stands_on or None}}
            manifest = replace(first.manifest, meta=meta)
            counting[name] = replace(first, manifest=manifest, holders=(*copies,))
    return counting, refused


def _content(entry: Entry) -> tuple[Any, ...]:
    assert entry.manifest is not None, "it is whole"
    parts = tuple((name, part.digest) for name, part in entry.manifest.parts.items())
    return parts, tuple((file.name, file.bytes, file.checksum) for file in entry.manifest.files)


def _stands_on(
    catalog: Catalog, saves: Sequence[SaveName], entry: Entry, may_have_committed: Callable[[Attempt, int], bool]
) -> tuple[str, int] | tuple[()] | None:
    """The attempt and the step of the newest checkpoint before a kept state, of those that there were; none where there was
    none, None where it is not there any more.

    Of a save that was under way the survivor does not know whether it was committed. If it was, and there is no trace of it,
    somebody has deleted it.
    """
    about = kept_of(entry)
    there = {(save.attempt.id, save.step): catalog.is_committed(save.directory) for save in saves}
    if (saving := about.get("saving")) is not None:
        of_saving = entry.attempt.id, int(saving)
        if there.get(of_saving):
            return of_saving
        if of_saving not in there and (not about.get("tells") or may_have_committed(entry.attempt, int(saving))):
            return None
    if not (known := about.get("stands_on")):
        return ()
    last = max((step for (attempt, step), whole in there.items() if attempt == entry.attempt.id and whole), default=-1)
    if there.get(stands_on := (str(known[0]), int(known[1]))):
        return stands_on
    return (entry.attempt.id, last) if stands_on[0] == entry.attempt.id and last > stands_on[1] else None
