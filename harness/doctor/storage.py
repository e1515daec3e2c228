"""The storage of the checkpoints: whether it works, for whom, for how long, and how much fits."""

import contextlib
import getpass
import itertools
import os
import random
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.memory import MemoryFileSystem

from harness.checkpoint.catalog import Catalog, Entry
from harness.checkpoint.format import checksum
from harness.config import CheckpointConfig, Config
from harness.doctor.case import Case
from harness.doctor.findings import Finding, error, ok, places, warn
from harness.errors import ConfigError, CrashLoop, HarnessError, NoCheckpoint, StoreError
from harness.runtime.environment import launch_id, nodes
from harness.storage.store import Store, open_store, without_traces
from harness.storage.urls import shown
from harness.telemetry import crashes, journal
from harness.training.resume import on_first, refuse_to_reuse, save_seconds

_PROBE_BYTES = 8 << 20  # large enough to be streamed as the shards are
_ALIVE_SECONDS = 60.0  # an attempt that has told something since may still train
_APPEARS_WITHIN_SECONDS = 5.0  # NFS may take a moment to show what another machine wrote
_FILES_OF_A_CHECKPOINT = 10  # its directory, the manifest, some parts, what the attempt tells meanwhile; a shard a GiB more
_EPHEMERAL = {
    "tmpfs": "it is memory, and gone after a reboot",
    "ramfs": "it is memory, and gone after a reboot",
    "overlay": "it is a container's own layer, and gone with the container",
}
_OF_ONE_MACHINE = {*_EPHEMERAL, "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "vfat", "exfat", "ntfs3"}

# --- does it work ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """An object of the doctor's own below the run's URL, in a directory that nobody else has."""

    name: str
    checksum: str


class _Answer(NamedTuple):
    """What a rank says that has read the probe: how long it took, what is wrong, and what that would end a run with."""

    seconds: float
    problem: str
    like: type[HarnessError]


def storage(case: Case) -> list[Finding]:
    """Rank 0 writes an object of some megabytes, every rank reads it, rank 0 lists and deletes it: all through the store
    that the run will use, under its deadlines. Nothing is left, and nothing that was there is touched."""
    checkpoint, world = case.config.checkpoint, case.world
    if checkpoint.url is None:
        return []
    tried = f"wrote {_PROBE_BYTES >> 20} MiB to {shown(checkpoint.url)}, read them on every rank, listed and deleted them"
    with contextlib.ExitStack() as cleanup:
        try:
            probe, put_seconds = on_first(world, lambda: _write(case, cleanup))
            answers = world.all_gather(_read(checkpoint, probe))
            left = on_first(world, lambda: _list_and_delete(case.store, probe))
        except HarnessError as problem:  # rank 0's, on every rank
            case.store = None
            found: list[Finding] = world.broadcast([_refused(tried, problem, f"rank 0 on {case.hosts[0]}")])
            return found
    if any(answer.problem for answer in answers):
        case.store = None
        return _unread(tried, answers, case.hosts)
    if world.rank == 0:
        case.put_bytes_per_second = _PROBE_BYTES / put_seconds
    get_seconds = max(answer.seconds for answer in answers)
    out, back = _PROBE_BYTES / 1e6 / put_seconds, _PROBE_BYTES / 1e6 / get_seconds
    if left:
        return [warn(tried, left, "allow deletes, or old checkpoints pile up (the probe was not deleted either)")]
    times = f"written in {put_seconds:.2f} s ({out:.0f} MB/s), read in {get_seconds:.2f} s ({back:.0f} MB/s)"
    return [ok(tried, times)]


def open_quickly(checkpoint: CheckpointConfig) -> Store:
    """The store that the run will use, which gives up sooner."""
    assert checkpoint.url is not None
    return open_store(checkpoint.url, checkpoint.storage_options, tries=2, deadline_seconds=20)


def _write(case: Case, cleanup: contextlib.ExitStack) -> tuple[_Probe, float]:
    """The probe and the seconds that it took; ``cleanup`` takes it away, whatever happens."""
    store = case.store = open_quickly(case.config.checkpoint)
    data = random.randbytes(_PROBE_BYTES)  # which no file system can compress
    probe = _Probe(f"doctor-{secrets.token_hex(4)}/probe", checksum(data))
    cleanup.enter_context(without_traces(store))
    cleanup.callback(_remove, store, probe)
    began = time.monotonic()
    store.put(probe.name, lambda: [data], len(data))
    return probe, time.monotonic() - began


def _remove(store: Store, probe: _Probe) -> None:
    with contextlib.suppress(HarnessError):  # where it matters, it has been told
        store.delete(probe.name)
    store.delete_directory(os.path.dirname(probe.name))


def _read(checkpoint: CheckpointConfig, probe: _Probe) -> _Answer:
    try:
        store = open_quickly(checkpoint)
        until = time.monotonic() + _APPEARS_WITHIN_SECONDS
        while True:
            began = time.monotonic()
            data = store.get(probe.name, 2 * _PROBE_BYTES)
            seconds = time.monotonic() - began
            if data is None and time.monotonic() < until:
                time.sleep(0.2)
                continue
            if data is None:
                return _Answer(seconds, "it is not there", ConfigError)
            return _Answer(seconds, "" if checksum(data) == probe.checksum else "other bytes came back", StoreError)
    except HarnessError as problem:
        return _Answer(0.0, str(problem), type(problem))


def _list_and_delete(store: Store | None, probe: _Probe) -> str:
    """Why the probe cannot be deleted; empty when it has been. Raises ``StoreError`` where it cannot be listed."""
    assert store is not None, "rank 0 has written"
    directory = os.path.dirname(probe.name)
    if store.list(directory) != {probe.name: _PROBE_BYTES}:
        raise StoreError(f"list {store.url}/{directory}: the object that was just written is not in the listing")
    try:
        store.delete(probe.name)
    except StoreError as problem:
        return str(problem)
    return "" if store.stat(probe.name) is None else f"delete {store.url}/{probe.name}: it is still there"


def _refused(tried: str, problem: HarnessError, who: str) -> Finding:
    if not isinstance(problem, StoreError):
        return error(tried, str(problem), "", type(problem))
    advice = f"see that it can be reached from {who}: its server, the network, checkpoint.storage_options"
    if not problem.transient:
        user = f"user {_user()}"
        advice = f"its owner has to let {user} ({who}) write, list and delete there, or choose another checkpoint.url"
    return error(tried, str(problem), advice, StoreError)


def _user() -> str:
    try:
        return getpass.getuser() if os.geteuid() == os.getuid() else str(os.geteuid())
    except (KeyError, OSError):  # a container's user may have no name
        return str(os.geteuid())


def _unread(tried: str, answers: Sequence[_Answer], hosts: Sequence[str]) -> list[Finding]:
    """What those ranks say that could not read what rank 0 wrote, each thing once."""
    holders: dict[tuple[str, type[HarnessError]], list[int]] = {}
    for number, answer in enumerate(answers):
        if answer.problem:
            holders.setdefault((answer.problem, answer.like), []).append(number)
    elsewhere = "choose a checkpoint.url that every machine reaches by the same name: a shared file system, an object store"
    there = "see that it can be reached and read from there as well: permissions, network, checkpoint.storage_options"
    return [
        error(
            tried,
            f"what rank 0 on {hosts[0]} wrote: {problem} ({places(ranks, hosts)})",
            elsewhere if like is ConfigError else there,
            like,
        )
        for (problem, like), ranks in holders.items()
    ]


# --- what is there ---------------------------------------------------------------------------------------------------


def run(case: Case) -> list[Finding]:
    """What the next start would go on from, and whether it may."""
    if case.store is None:
        return []
    tried = f"looked for checkpoints in {case.store.url}"
    catalog = Catalog(case.store)
    try:
        if case.fresh:
            refuse_to_reuse(catalog, launch_id())
        case.skips_newest = crashes.is_looping(catalog, case.config.crash_loop.same_failures)
        entries = _looked_at(case)
        trains = _trains_now(catalog)
    except (ConfigError, CrashLoop) as problem:
        return [error(tried, str(problem), "", type(problem))]
    except HarnessError as problem:
        return [error(tried, str(problem), "see that it can be listed and read", type(problem))]
    whole = [entry for entry in entries if entry.state == "whole"]
    if not entries and case.config.checkpoint.must_exist:
        advice = "see that it is the right place, and that it is mounted, or start without checkpoint.must_exist"
        return [error(tried, "there is none, but checkpoint.must_exist requires one", advice, NoCheckpoint)]
    if not entries:
        return trains or [ok(tried, "there is none: a run would start from nothing; harness drill tries its deaths")]
    if not whole:
        advice = "restore one of them, or choose another checkpoint.url"
        return [error(tried, f"none of {len(entries)} is whole: {entries[0].problem}", advice, NoCheckpoint)]
    case.saves = len(whole)
    assert whole[0].manifest is not None
    case.last_save_seconds = save_seconds(whole[0].manifest.meta)
    case.last_save_bytes = whole[0].manifest.bytes
    newest = f"the newest whole one is of step {whole[0].step}"
    found = trains
    if entries[0] is not whole[0]:
        what = f"{newest}; a newer one is not: {entries[0].problem}"
        found = [*found, warn(tried, what, "expect the run to resume from that step")]
    if case.skips_newest and len(whole) > 1:
        what = (
            "the last attempts all failed in the same way; the next start resumes from the checkpoint before, "
            f"of step {whole[1].step}"
        )
        found = [*found, warn(tried, what, "fix the cause of these failures first; harness report names it")]
    return found or [ok(tried, newest)]


def _trains_now(catalog: Catalog) -> list[Finding]:
    """Whether somebody seems to train this run at this moment."""
    if (newest := max(catalog.attempts.all(), default=None)) is None:
        return []
    told = journal.Told(catalog.store).backwards(newest)
    if (last := next(told, None)) is None or journal.last_word(itertools.chain([last], told)):
        return []
    silent_seconds = time.time() - last["time"]
    if not -_ALIVE_SECONDS < silent_seconds < _ALIVE_SECONDS:
        return []
    what = f"attempt {newest.number} was active {max(silent_seconds, 0):.0f} s ago, and has not reported its end"
    advice = (
        "make sure that it is dead; a new start takes the run over, and an attempt that is still training "
        "ends with exit code 77"
    )
    return [warn("looked for a training that is still running", what, advice)]


def _looked_at(case: Case) -> list[Entry]:
    """What a run may resume from, as far as the checkpoints that are to be kept."""
    assert case.store is not None
    found, count = list[Entry](), 0
    for entry in Catalog(case.store).candidates():
        found.append(entry)
        count += entry.state == "whole"
        if count >= max(case.config.checkpoint.keep_last or 1, 1 + case.skips_newest):
            break
    return found


# --- for how long, and how much --------------------------------------------------------------------------------------


def place(case: Case) -> list[Finding]:
    """The kind of file system, which says who else sees it and what a reboot leaves of it."""
    if case.store is None:
        return []
    if isinstance(case.store.filesystem.fs, MemoryFileSystem):
        return [
            warn(
                "looked at checkpoint.url",
                "it is this process's memory, which is lost when the process ends",
                "choose another one",
            )
        ]
    if not case.store.is_local:
        return []
    kind = _kind_of_filesystem(case.store.root)
    tried = f"looked at the file system of {case.store.root}"
    found = []
    if kind in _EPHEMERAL:
        found.append(warn(tried, f"{kind}: {_EPHEMERAL[kind]}", "choose a checkpoint.url that is still there then"))
    elif f"{case.store.root}/".startswith("/tmp/"):  # noqa: S108  # where it lies is the question
        found.append(warn(tried, "it is below /tmp, which a reboot empties", "choose a checkpoint.url that is kept"))
    if nodes() > 1 and len(set(case.hosts)) == 1 and kind in _OF_ONE_MACHINE:
        what = f"{kind}, which is local to each machine, but the launcher starts {nodes()} machines"
        advice = "choose one that all machines share; to test it, start the doctor on all of them as you start the training"
        found.append(warn(tried, what, advice))
    if not case.store.filesystem.keeps_names:
        what = f"{kind or 'it'} cannot flush a directory (fsync): a power cut may lose the newest checkpoints"
        found.append(
            warn(
                tried,
                what,
                "choose another file system, or save so often that the loss of a checkpoint or two is acceptable",
            )
        )
    return found or [ok(tried, kind)]


def _kind_of_filesystem(path: str) -> str:
    """``ext4``, ``nfs4``, ``tmpfs``, … as Linux calls it; empty elsewhere."""
    path = os.path.realpath(path)
    kinds: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, described = line.partition(" - ")
            where = mount.split(" ")[4].encode().decode("unicode_escape")  # a space is \040
            if path == where or path.startswith(f"{where.rstrip('/')}/"):
                kinds[where] = described.split(" ")[0]  # a later mount lies over an earlier one
    return kinds[max(kinds, key=len)] if kinds else ""


def space(case: Case) -> list[Finding]:
    """The free space of a local disk, and what the checkpoints will take."""
    if case.store is None or case.state_bytes is None or not case.store.is_local:
        return []
    disk = next(above for above in _upwards(case.store.root) if os.path.isdir(above))
    free_bytes = shutil.disk_usage(disk).free
    count = _count(case)
    if few := _few_inodes(disk, count or 2, case.state_bytes):
        return [few]
    tried = f"compared the free space of {disk} with {count or 'two'} checkpoints of {case.state_bytes / 1e6:.1f} MB"
    what = f"{free_bytes / 1e6:.0f} MB are free"
    if free_bytes < case.state_bytes:
        return [error(tried, f"{what}: not one fits", "make room, or choose another checkpoint.url", StoreError)]
    if free_bytes < (count or 2) * case.state_bytes:
        return [warn(tried, what, "make room, or set checkpoint.keep_last lower: saves will fail when the disk is full")]
    return [ok(tried, what)]


def _few_inodes(disk: str, count: int, state_bytes: int) -> Finding | None:
    """Whether a file system has too few names left for the files of the checkpoints, however much room there is."""
    about = os.statvfs(disk)
    if not about.f_files:  # it makes them as they are needed
        return None
    each = _FILES_OF_A_CHECKPOINT + (state_bytes >> 30)
    tried = f"compared the free inodes of {disk} with {count} checkpoints of about {each} files"
    what = f"{about.f_favail} are free"
    if about.f_favail < each:
        return error(tried, f"{what}: not one fits", "delete files there, or choose another checkpoint.url", StoreError)
    if about.f_favail < count * each:
        advice = "delete files there, or set checkpoint.keep_last lower: saves will fail when there are none left"
        return warn(tried, what, advice)
    return None


def _upwards(path: str) -> Iterator[str]:
    while True:
        yield path
        if path == (above := os.path.dirname(path)):
            return
        path = above


def _count(case: Case) -> int | None:
    """How many more checkpoints will be there at once; None where only the run will tell."""
    config = case.config
    if config.checkpoint.keep_last is not None:  # the next one is written before the oldest is deleted
        return max(config.checkpoint.keep_last + 1 - case.saves, 1)
    if case.loader is None or not isinstance(config, Config) or config.checkpoint.every_seconds is not None:
        return None
    steps_per_epoch = len(case.loader)
    steps = config.train.steps or (config.train.epochs or 0) * steps_per_epoch
    every = [config.checkpoint.every_steps, (config.checkpoint.every_epochs or 0) * steps_per_epoch or None]
    return 1 + sum(steps // interval for interval in every if interval)
