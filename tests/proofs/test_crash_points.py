"""Wherever a run is cut off, it resumes from the old checkpoint or from the new one: by enumeration of every point.

**What is tried.** A run saves, is restarted, resumes and saves again; every storage operation of it is written down. Then
it is stopped before, inside (a write of which 0, 1, half or all but one byte were made) and after each of them, and

* the process alone dies: everything that it did is there;
* the machine loses its power: of the names that were not fsynced any subset is there, of the bytes that were not fsynced
  all, none, the first, the first half, all but the last, or zeros in their place, for all files alike and for each alone;
* the process dies, a new one goes on, and then the machine loses its power;
* on an object store: the request was not sent, or was served and the reply was lost.

On each disk that may be left the run is resumed as ``harness train`` does it, and goes on: it saves, prunes, and what it
finds afterwards is its own newest checkpoint, without rubbish.

**What is not tried, and not survived by any protocol:** a disk that says that it has flushed and has not, and one that loses
what was flushed (the checksums notice; see test_corruption.py, and keep more than one checkpoint); a filesystem shared
between machines that does not show one machine's files to another; an object store that does not list what it has
accepted. The model of the disk is simple: writes append, directories change name by name. test_powercut.py has a real one.
"""

import contextlib
import itertools
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import harness.checkpoint.format
import harness.checkpoint.frozen
import harness.storage.filesystem
from harness.checkpoint import commit, retention, saver
from harness.checkpoint.attempts import Attempts
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import MANIFEST
from harness.checkpoint.retention import Pruner, Retention
from harness.errors import HarnessError, StoreError, Superseded
from harness.storage import direct_io
from harness.storage.store import Store, open_store
from tests.support import faults
from tests.support.faults import (
    Call,
    Contents,
    Disk,
    Killed,
    Life,
    Mark,
    Objects,
    Pair,
    ShardedPair,
    Tree,
    Witness,
    below,
    no_waiting,
    resume_from,
    silence,
    system_calls_through,
    write_tree,
)


@pytest.fixture(autouse=True)
def quiet():
    with silence(), no_waiting():
        yield


@pytest.fixture
def tell(capsys):
    """Prints a line that is seen whether or not the test fails."""

    def tell(line: str) -> None:
        with capsys.disabled():
            print(f"\n    {line}", end="")

    return tell


# --- what was done ---------------------------------------------------------------------------------------------------


@dataclass
class Recorder(Witness):
    """Writes down what programs do to the disk below a directory; kills the program at a chosen call."""

    root: str = ""
    trace: list[Call | Mark] = field(default_factory=list)
    kill_at: int | None = None
    done: int = 0
    is_dead: bool = False

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        if self.is_dead:
            raise Killed
        if not call.changes and call.name != "open":
            return perform()
        if call.changes:
            if self.done == self.kill_at:
                self.is_dead = True
                raise Killed
            self.done += 1
        result = perform()
        if call.name == "write":
            call = replace(call, data=call.data[:result])
        self.trace.append(call)
        return result

    def restart(self) -> None:
        """A new process: it may do what it wants."""
        self.is_dead, self.kill_at = False, None

    def store(self) -> Store:
        return self.watch(open_store(f"{self.root}/run", tries=1))

    def remark(self, verb: str) -> None:
        super().remark(verb)
        self.trace.append(self.now)


def record(root: str, *lives: list[int]) -> list[Call | Mark]:
    """The whole life of a run: a first save into nothing, another one, a restart, two more; the newest one is kept. Or the
    saves of other lives."""
    recorder = Recorder(root=root)
    with system_calls_through(recorder):
        for steps in lives or ([10, 20], [30, 40]):
            life = Life(recorder.store())
            assert life.restored.step in recorder.allowed
            done = recorder.done
            resume_from(recorder.store())
            assert recorder.done == done, "resuming reads, and beside the claim of an attempt it writes nothing"
            for step in steps:
                life.save(step)
    return recorder.trace


def test_what_another_test_has_left_running_is_not_recorded(tmp_path):
    """Nor what that starts, as each call of a store does."""
    goes = threading.Event()

    def put() -> None:
        open_store(str(tmp_path / "other")).put("name", lambda: [b"data"], 4)

    def left() -> None:
        goes.wait(10)
        another = threading.Thread(target=put)
        another.start()
        another.join()

    stranger = threading.Thread(target=left)
    stranger.start()
    recorder = Recorder(root=str(tmp_path / "own"))
    with system_calls_through(recorder):
        goes.set()
        stranger.join()
    assert (tmp_path / "other" / "name").read_bytes() == b"data"
    assert recorder.trace == []


# --- what may be left of it ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Left:
    """A disk after a crash: where the program was stopped, whether the power went with it, what must be found."""

    tree: Tree
    verb: str
    place: str
    power_cut: bool
    allowed: tuple[int | None, ...]


def crashes(
    trace: list[Call | Mark], root: str, points: Counter[str], start: int = 0, *, power_cuts: bool = True
) -> Iterator[Left]:
    """Every disk that a crash may leave, at each point of a trace from ``start`` on; counts the points of each verb."""
    disk, mark = Disk(root), Mark((None,), "claim")

    def crash(place: str, torn: Call | None = None, length: int = 0) -> Iterator[Left]:
        yield Left(below(disk.now(torn, length), "run"), mark.verb, place, False, mark.allowed)
        for tree in disk.after_power_cut(torn, length) if power_cuts else ():
            yield Left(below(tree, "run"), mark.verb, place, True, mark.allowed)

    for number, call in enumerate(trace):
        if isinstance(call, Mark):
            mark = call
            if number >= start:  # what is promised changes here: the disks of the last point are judged anew
                yield from crash(f"at {number}, {call}")
            continue
        if call.changes and number >= start:
            points[mark.verb] += 1
            yield from crash(f"before {number}, {_in_words(call)}")
            if call.name == "write":
                size = len(call.data)
                for length in sorted({1, size // 2, size - 1} - {0, size}):
                    points[mark.verb] += 1
                    yield from crash(f"after {length} of {size} bytes of {number}", call, length)
        disk.apply(call)
    yield from crash("at the end")


def _in_words(call: Call) -> str:
    return f"{call.name} {call.path} {call.target} {len(call.data) or ''}".strip()


@dataclass
class Judge:
    """Resumes from what is left, and goes on. Disks that are alike are tried once, and judged each time."""

    goes_on: bool = True
    points: Counter[str] = field(default_factory=Counter)
    states: int = 0
    seen: dict[frozenset[tuple[str, bytes]], str | int | None] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def judge(self, left: Left) -> None:
        self.states += 1
        key = frozenset(left.tree.items())
        if key not in self.seen:
            self.seen[key] = self.outcome(left.tree)
        found = self.seen[key]
        if found not in left.allowed:
            self.complain(left, f"resumed from {found}, expected one of {left.allowed}")
        if not left.power_cut:
            corrupt = [entry for entry in Catalog(Objects(left.tree)).entries() if entry.state == "corrupt"]
            if corrupt:
                self.complain(left, f"the process alone was killed, and {corrupt[0].problem}")

    def complain(self, left: Left, what: str) -> None:
        self.wrong.append(f"{left.verb}, {left.place}{', power cut' * left.power_cut}: {what}")

    def outcome(self, tree: Tree) -> str | int | None:
        """The step that a run resumes from (None: it starts anew), or what is wrong with that."""
        objects = Objects(tree)
        try:
            _, restored = resume_from(objects)
        except HarnessError as error:
            return f"{type(error).__name__}: {error}"
        if restored.step is not None and not restored.exact:
            return f"{restored.step}, which is not what was saved"
        return self.after_going_on(objects, restored.step)

    def after_going_on(self, objects: Objects, step: int | None) -> str | int | None:
        if not self.goes_on:
            return step
        objects, later = Objects(dict(objects.objects)), (step or 0) + 5
        saved = Life(objects).save(later)
        _, restored = resume_from(objects)
        if restored.step != later or not restored.exact:
            return f"{step}, and from {restored.step} after it had saved {later}"
        rubbish = left_but(objects, saved.directory)
        return f"{step}, and never swept up {rubbish}" if rubbish else step

    def summary(self) -> str:
        verbs = ", ".join(f"{verb} {count}" for verb, count in self.points.items())
        return f"{self.points.total()} crash points ({verbs}), {self.states} disks, {len(self.seen)} of them different"


def left_but(store: Store, directory: str) -> list[str]:
    """What lies there and belongs to no start of the run and not to a checkpoint, wherever that has its files."""
    manifest = Catalog(store).open(directory)
    own = {f"{directory}/{MANIFEST}", *(file.path(directory) for file in manifest.files)}
    return [name for name in store.list() if not name.startswith("attempts/") and name not in own]


def explore(
    trace: list[Call | Mark],
    root: Path,
    tell: Callable[[str], None],
    *,
    start: int = 0,
    goes_on: bool = True,
    power_cuts: bool = True,
) -> Judge:
    """Whatever a crash may leave at any point of a trace, the old or the new checkpoint is found on it."""
    judge = Judge(goes_on=goes_on)
    for left in crashes(trace, str(root), judge.points, start, power_cuts=power_cuts):
        judge.judge(left)
    tell(judge.summary())
    assert not judge.wrong, judge.wrong[:5]
    return judge


def assert_found(trace: list[Call | Mark], root: Path, start: int = 0, *, power_cuts: bool = True) -> None:
    """The explorer finds a crash point of a trace with a bug at which neither the old nor the new checkpoint is left."""
    judge = Judge(goes_on=False)
    disks = crashes(trace, str(root), judge.points, start, power_cuts=power_cuts)
    assert any(judge.judge(left) or judge.wrong for left in disks), "not found"


# --- local disks -----------------------------------------------------------------------------------------------------


def test_every_crash_leaves_the_old_or_the_new_checkpoint(tmp_path, tell):
    """At every point of claim, save, commit and prune, whatever of the unsynced data survives, a run resumes and goes on."""
    judge = explore(record(str(tmp_path)), tmp_path, tell)
    assert judge.points.total() > 270 and len(judge.seen) > 700, "a save makes fewer calls than it did: is one not seen?"


def test_a_real_disk_is_read_as_the_model_is(tmp_path, tell):
    """What a killed process leaves in a real directory gives the outcome that the model gives, at every point."""
    judge, root = Judge(goes_on=False), tmp_path / "recorded"
    root.mkdir()
    count = 0
    for left in crashes(record(str(root)), str(root), judge.points):
        if left.power_cut or (key := frozenset(left.tree.items())) in judge.seen:
            continue
        judge.judge(left)
        count += 1
        write_tree(left.tree, f"{tmp_path}/{count}")
        _, restored = resume_from(open_store(f"{tmp_path}/{count}", tries=1))
        assert restored.step == judge.seen[key] and (restored.step is None or restored.exact), left.place
    tell(f"{count} different disks, written and read back")
    assert count > 200


def test_a_crash_and_then_another(tmp_path, tell):
    """A process dies at any point, its successor saves, the power fails at any point: what was committed is there.

    The successor may find files and directories whose names its predecessor had no time to fsync.
    """
    judge = Judge(goes_on=False)
    for kill_at in range(1 << 30):
        root = tmp_path / str(kill_at)
        root.mkdir()
        recorder = Recorder(root=str(root), kill_at=kill_at)
        with system_calls_through(recorder):
            try:
                Life(recorder.store()).save(10)
                break  # the program made fewer calls
            except Killed:
                start = len(recorder.trace)
            recorder.restart()
            Life(recorder.store()).save(20)
        for left in crashes(recorder.trace, str(root), judge.points, start):
            judge.judge(left)
    tell(f"killed at {kill_at} points, then {judge.summary()}")
    assert not judge.wrong, judge.wrong[:5]
    assert kill_at > 40 and judge.points.total() > 3500


# --- shards that are written past the page cache ----------------------------------------------------------------------


@pytest.fixture
def direct(tmp_path, monkeypatch):
    """Shards, of one to three pages and a bit, go the way of shards of gigabytes."""
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the filesystem of {tmp_path} has no O_DIRECT: {error.strerror}")
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(faults, "SIDE", 48)


def direct_files(trace: list[Call | Mark]) -> set[int]:
    """The handles of the files that were written past the page cache."""
    return {call.handle for call in trace if isinstance(call, Call) and call.target == "O_DIRECT"}


def test_a_crash_of_direct_writes(direct, tmp_path, tell):
    """At every point of two saves by O_DIRECT, its being switched on and off among them: the old or the new checkpoint."""
    trace = record(str(tmp_path), [10, 20])
    judge = explore(trace, tmp_path, tell, goes_on=False)
    for handle in direct_files(trace):
        calls = [call.target or call.name for call in trace if isinstance(call, Call) and call.handle == handle]
        assert re.fullmatch("open O_DIRECT( write)+ fcntl( write)? fsync", " ".join(calls))
    assert len(direct_files(trace)) == 10 and judge.points.total() > 220


def without_direct_fsync(trace):
    files = direct_files(trace)
    return [call for call in trace if not (isinstance(call, Call) and call.name == "fsync" and call.handle in files)]


def without_the_end(trace):
    files = direct_files(trace)
    return [call for call in trace if not (isinstance(call, Call) and call.handle in files and len(call.data) % 4096)]


@pytest.mark.parametrize("planted", [without_direct_fsync, without_the_end])
def test_a_call_left_out_of_direct_writes_is_found(direct, tmp_path, planted):
    """The fsync, which they need as well, or the end of a file, which is not a whole page."""
    assert_found(planted(record(str(tmp_path), [10, 20])), tmp_path)


def test_a_manifest_before_direct_writes_is_found(direct, tmp_path, monkeypatch):
    """The order matters for them, too."""
    manifest_first(monkeypatch)
    trace = record(str(tmp_path), [10, 20])
    assert direct_files(trace)
    assert_found(trace, tmp_path)


# --- files of earlier saves ------------------------------------------------------------------------------------------


@pytest.fixture
def frozen(monkeypatch):
    """A run with two frozen parameters, of which one changes between step 20 and step 30 all the same."""
    monkeypatch.setattr(faults, "FROZEN_STEPS", 25)
    monkeypatch.setattr(harness.checkpoint.frozen, "LEAST_BYTES", 1)
    monkeypatch.setattr(harness.checkpoint.frozen, "LEAST_PART", 0.0)


def bases_at_the_end(trace: list[Call | Mark], root: Path) -> set[str]:
    """The directories that have files of the last checkpoint."""
    disk = Disk(str(root))
    for call in trace:
        if isinstance(call, Call):
            disk.apply(call)
    manifest = Catalog(Objects(below(disk.now(), "run"))).newest().manifest
    return {base.split("-")[1].lstrip("0") for base in manifest.bases}


power_cuts = pytest.mark.parametrize(  # of which there are many: no name that goes is flushed at once
    "power_cuts", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["killed", "power cut"]
)


@power_cuts
def test_every_crash_of_a_run_that_refers_to_files_of_earlier_saves(frozen, monkeypatch, tmp_path, tell, power_cuts):
    """At every point of a save and a prune that leave the files of later checkpoints where they are: the old or the new
    checkpoint, each with all that it refers to; and what nobody refers to any longer goes."""
    trace = record(str(tmp_path))
    assert bases_at_the_end(trace, tmp_path) == {"10", "30"}, "one parameter has moved, in another start of the run"
    monkeypatch.setattr(Disk, "ALL_SUBSETS", 6)
    judge = explore(trace, tmp_path, tell, power_cuts=power_cuts)
    assert judge.points.total() > 270


@pytest.mark.soak
def test_a_crash_and_then_another_of_such_a_run(frozen, monkeypatch, tmp_path, tell):
    """A process dies at any point, its successor refers to what it finds, the power fails at any point: what was committed
    is there, and what it refers to."""
    monkeypatch.setattr(Disk, "ALL_SUBSETS", 4)
    judge = Judge(goes_on=False)
    for kill_at in itertools.count():
        root = tmp_path / str(kill_at)
        root.mkdir()
        recorder = Recorder(root=str(root), kill_at=kill_at)
        with system_calls_through(recorder):
            try:
                Life(recorder.store(), shard_bytes=1 << 20).save(10)
                break  # the program made fewer calls
            except Killed:
                start = len(recorder.trace)
            recorder.restart()
            Life(recorder.store(), shard_bytes=1 << 20).save(20)
        for left in crashes(recorder.trace, str(root), judge.points, start):
            judge.judge(left)
    tell(f"killed at {kill_at} points, then {judge.summary()}")
    assert not judge.wrong, judge.wrong[:5]


def record_prune(root: str) -> tuple[list[Call | Mark], int]:
    """A run that keeps everything, whose checkpoints are then pruned from outside; and where that begins."""
    recorder = Recorder(root=root)
    with system_calls_through(recorder):
        for steps in [10, 15, 20], [30, 40, 45]:
            life = Life(recorder.store(), keep_last=None)
            for step in steps:
                life.save(step)
        start = len(recorder.trace)
        recorder.remark("prune")
        Pruner(Catalog(recorder.store())).prune(Retention(1))
    return recorder.trace, start


@power_cuts
def test_every_crash_of_a_prune_of_such_a_run(frozen, monkeypatch, tmp_path, tell, power_cuts):
    """At every point of ``harness prune``: the newest checkpoint is there, and none has lost a file."""
    monkeypatch.setattr(Disk, "ALL_SUBSETS", 3)
    trace, start = record_prune(str(tmp_path))
    judge = explore(trace, tmp_path, tell, start=start, power_cuts=power_cuts)
    assert judge.points["prune"] > 30


def without_references(monkeypatch):
    monkeypatch.setattr(retention, "_named_by", lambda saves, look: lambda names: set())


def the_earliest_first(monkeypatch):
    def delete_all(pruner, directories, bases, listed, in_use):
        for directory in reversed(directories):
            pruner.delete(directory, in_use)

    monkeypatch.setattr(Pruner, "_delete_all", delete_all)


@pytest.mark.parametrize("plant", [without_references, the_earliest_first])
def test_a_prune_that_takes_files_away_is_found(frozen, monkeypatch, tmp_path, plant):
    """Files that the newest checkpoint names, or those of a checkpoint that is still there: both are found."""
    plant(monkeypatch)
    trace, start = record_prune(str(tmp_path))
    assert_found(trace, tmp_path, start, power_cuts=False)


# --- several writers -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(harness.checkpoint.format, "BLOCK_BYTES", Pair.SMALL_BLOCK_BYTES)


def record_two(root: str, kind: type[Pair] = Pair) -> list[Call | Mark]:
    """A run that two ranks write, of which the first one waits for the second."""
    recorder = Recorder(root=root)
    with system_calls_through(recorder):
        pair = kind(recorder.store(), open_store(f"{root}/run", tries=1))
        for step in (10, 20):
            pair.save(step)
    return recorder.trace


# Of the same tensors each writes pieces; of sharded ones its own boxes.
WRITERS = pytest.mark.parametrize("kind", [Pair, ShardedPair], ids=["pieces", "boxes"])


@WRITERS
def test_a_crash_of_two_writers(small_blocks, tmp_path, tell, kind):
    """At every point of two shares, a receipt and a commit: the old or the new checkpoint; a receipt is none."""
    trace = record_two(str(tmp_path), kind)
    manifest = Catalog(open_store(f"{tmp_path}/run")).newest().manifest
    assert any(part.boxes for part in manifest.parts.values()) == (kind is ShardedPair)
    judge = explore(trace, tmp_path, tell)
    assert sum("receipt" in call.target for call in trace if isinstance(call, Call)) == 2
    assert judge.points.total() > 150


@WRITERS
def test_a_crash_of_two_writers_that_refer_to_files_of_earlier_saves(frozen, small_blocks, tmp_path, tell, kind):
    """Of whole tensors the first writer leaves frozen ones out, which only it would write; of boxes each its own."""
    trace = record_two(str(tmp_path), kind)
    assert bases_at_the_end(trace, tmp_path) == {"10"}
    ranks = {call.path[-40:] for call in trace if isinstance(call, Call) and call.creates and "frozen-rank1" in call.path}
    assert len(ranks) == (kind is ShardedPair), "it has written its frozen boxes once"
    explore(trace, tmp_path, tell, power_cuts=False)


def without_the_seconds_fsync(trace):
    theirs = {call.handle for call in trace if isinstance(call, Call) and call.creates and "-rank1-" in call.path}
    return [call for call in trace if not (isinstance(call, Call) and call.name == "fsync" and call.handle in theirs)]


@WRITERS
def test_shares_that_are_not_durable_are_found(small_blocks, tmp_path, kind):
    """Were another writer's files not on the disk before its receipt is, the explorer would find it."""
    assert_found(without_the_seconds_fsync(record_two(str(tmp_path), kind)), tmp_path)


@WRITERS
@pytest.mark.parametrize("is_deadly", [True, False], ids=["killed", "a failed try"])
def test_every_request_of_two_writers_can_fail(small_blocks, tell, is_deadly, kind):
    """In a bucket, the requests of both: a save that fails on one of them fails, and the next one succeeds."""
    judge = Judge()
    for at in range(1 << 30):
        contents, witness, trouble = Contents(), Witness(), Trouble(at, False, is_deadly)
        contents.request = trouble
        stores = [open_store("bucket://run", {"contents": contents}, tries=1) for _ in range(2)]
        with contextlib.suppress(Killed, StoreError):
            pair = kind(witness.watch(stores[0]), stores[1], failures_allowed=9)
            for step in (10, 20, 30):
                pair.save(step, must_succeed=False)
        if not trouble.what:
            break
        judge.points[trouble.what.partition(" ")[0]] += 1
        judge.judge(Left(below(contents.objects, "run"), witness.now.verb, trouble.what, False, witness.now.allowed))
        if not is_deadly and not trouble.what.startswith("PUT run/attempts"):
            assert witness.allowed[0] >= 20, trouble.what
    tell(judge.summary())
    assert not judge.wrong, judge.wrong[:5]
    assert judge.points.total() > 30


# --- object stores ---------------------------------------------------------------------------------------------------


@dataclass
class Trouble:
    """What happens to the ``at``-th request that changes something: it is not served, or the reply is lost.

    The program dies of it, or sees a connection that broke.
    """

    at: int
    is_served: bool
    is_deadly: bool
    done: int = 0
    what: str = ""

    def __call__(self, what: str, perform: Callable[[], Any]) -> None:
        if self.what and self.is_deadly:
            return  # the dead clean nothing up
        self.done += 1
        if self.done - 1 != self.at:
            perform()
            return
        self.what = what
        if self.is_served:
            perform()
        raise Killed if self.is_deadly else ConnectionResetError("on purpose")


def live_in(contents: Contents, witness: Witness, tries: int) -> None:
    """Two starts of a run in a bucket, with four saves; a save that fails is not the end."""
    for steps in ([10, 20], [30, 40]):
        with contextlib.suppress(StoreError):  # the second start goes on with whatever the first one has left
            life = Life(witness.watch(open_store("bucket://run", {"contents": contents}, tries=tries)), failures_allowed=9)
            for step in steps:
                life.save(step, must_succeed=False)


@pytest.mark.parametrize(
    ("is_served", "is_deadly", "tries"),
    [
        pytest.param(False, True, 1, id="not sent-killed"),
        pytest.param(True, True, 1, id="reply lost-killed"),
        pytest.param(False, False, 1, id="not sent-a failed try"),
        pytest.param(True, False, 1, id="reply lost-a failed try", marks=pytest.mark.soak),
        pytest.param(False, False, 3, id="not sent-tried again", marks=pytest.mark.soak),
        pytest.param(True, False, 3, id="reply lost-tried again"),
    ],
)
def test_every_request_to_an_object_store_can_fail(monkeypatch, tell, is_served, is_deadly, tries):
    """A kill, a failed request or a lost reply, at each request of a run in a bucket: the old or the new checkpoint."""
    judge = judge_requests(monkeypatch, tell, is_served=is_served, is_deadly=is_deadly, tries=tries)
    assert judge.points["COMPLETE"] and judge.points["DELETE"] and judge.points.total() > 50


@pytest.mark.soak
@pytest.mark.parametrize("is_deadly", [True, False], ids=["killed", "a failed try"])
def test_every_request_of_a_run_that_refers_to_objects_of_earlier_saves_can_fail(frozen, monkeypatch, tell, is_deadly):
    """In a bucket, too."""
    judge_requests(monkeypatch, tell, is_served=True, is_deadly=is_deadly, tries=1)


def judge_requests(monkeypatch, tell, *, is_served, is_deadly, tries):
    monkeypatch.setattr(harness.storage.filesystem, "SMALL_BYTES", 150)  # so that there are uploads in parts
    monkeypatch.setattr(harness.storage.filesystem, "BLOCK_BYTES", 64)
    judge = Judge()
    for at in range(1 << 30):
        contents, witness, trouble = Contents(), Witness(), Trouble(at, is_served, is_deadly)
        contents.request = trouble
        with contextlib.suppress(Killed):
            live_in(contents, witness, tries)
        if not trouble.what:
            break
        judge.points[trouble.what.partition(" ")[0]] += 1
        judge.judge(Left(below(contents.objects, "run"), witness.now.verb, trouble.what, False, witness.now.allowed))
        if not is_deadly and not trouble.what.startswith("PUT run/attempts"):  # without a claim nothing is trained
            assert witness.allowed == (40,) or (tries == 1 and witness.allowed[0] == 30), trouble.what
            # An upload of which the client does not know cannot be aborted; stores have rules that expire such ones.
            assert not contents.uploads or trouble.what.startswith(("BEGIN", "ABORT")), trouble.what
    tell(judge.summary())
    assert not judge.wrong, judge.wrong[:5]
    return judge


# --- writers that were believed dead ---------------------------------------------------------------------------------


class Zombie:
    """A writer that falls asleep before its ``at``-th operation, and goes on with its save, and another, when woken."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.done = 0
        self.life: Life | None = None
        self.error: Exception | None = None
        self.asleep, self.woken = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._walk, daemon=True)

    def fall_asleep(self, life: Life) -> bool:
        """Starts to save; false when it has done all that it had to do before it could fall asleep."""
        self.life = life
        self.thread.start()
        assert self.asleep.wait(60)
        return not self.woken.is_set()

    def before(self, *call: object) -> None:
        if self.life is not None and self.done == self.at:
            self.asleep.set()
            assert self.woken.wait(60)
        self.done += self.life is not None

    def wake(self) -> None:
        self.woken.set()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def _walk(self) -> None:
        try:
            for step in (20, 30):
                self.life.save(step)
        except Exception as error:  # judged by the test
            self.error = error
        finally:
            self.woken.set()
            self.asleep.set()


def start(store: Store) -> Life:
    """Few operations, so that all pairs of them can be tried."""
    return Life(store, shard_bytes=1 << 20)


def judge_line(store: Store, zombie: Zombie, successor: Life) -> str | None:
    """What is wrong after a successor has saved the steps 11 and 12 while a zombie was about; None when all is well."""
    if zombie.error is not None and not isinstance(zombie.error, Superseded | StoreError):
        return f"the zombie died of {zombie.error!r}"
    if successor.restored.step not in (10, 20, 30) or not successor.restored.exact:
        return f"the successor resumed from {successor.restored.step}"
    _, restored = resume_from(store)
    if restored.step != 12 or not restored.exact:
        return f"then resumed from {restored.step}"
    own = successor.save(13).directory
    others = [entry for entry in Catalog(store).entries() if entry.directory != own]
    others = [entry for entry in others if entry.state != "base"]
    if [entry.state for entry in others] not in ([], ["whole"]) or any(entry.step <= 13 for entry in others):
        return f"left more than what the zombie has last committed: {others}"
    saved = successor.save(31)  # further than that
    left = left_but(store, saved.directory)
    return f"never swept up {left}" if left else None


def zombies(one_in: int = 1) -> Iterator[tuple[str, str | None]]:
    """A zombie stops before each of its operations, and goes on before each of its successor's: all pairs, or one in so
    many, each with what is wrong with it."""
    for asleep_at, woken_at in all_pairs(one_in):
        objects: dict[str, bytes] = {}
        zombie = Zombie(asleep_at.now)
        life = start(Objects(objects, zombie.before))
        life.save(10)
        if not zombie.fall_asleep(life):
            asleep_at.end()
            continue
        countdown = iter(range(woken_at.now, -1, -1))

        def before(*call: object, countdown=countdown, zombie=zombie) -> None:
            if next(countdown, None) == 0:
                zombie.wake()

        where = f"asleep at {asleep_at.now}, woken at {woken_at.now}"
        try:
            successor = start(Objects(objects, before))
            for step in (11, 12):
                successor.save(step)
            problem = None
        except HarnessError as error:
            problem = f"the successor died of {error!r}"
        if next(countdown, None) is not None:  # the successor was done before
            zombie.wake()
            woken_at.end()
        yield where, problem or judge_line(Objects(objects), zombie, successor)


@dataclass
class Counting:
    """A number that is counted up until somebody says that it was the last."""

    now: int = 0
    is_over: bool = False

    def end(self) -> None:
        self.is_over = True


def all_pairs(one_in: int) -> Iterator[tuple[Counting, Counting]]:
    first = Counting()
    while not first.is_over:
        second = Counting(first.now % one_in)
        while not (second.is_over or first.is_over):
            yield first, second
            second.now += one_in
        first.now += 1


@pytest.mark.parametrize("one_in", [pytest.param(4, id="some"), pytest.param(1, id="all", marks=pytest.mark.soak)])
def test_a_zombie_in_between(tell, one_in):
    """A writer that wakes up at any point of its successor's life neither replaces what it commits nor keeps it from it."""
    found = list(zombies(one_in))
    wrong = [(where, problem) for where, problem in found if problem]
    tell(f"{len(found)} pairs of points")
    assert not wrong, (len(wrong), wrong[:5])
    assert len(found) > 600 / one_in


@pytest.mark.soak
def test_a_zombie_of_a_run_that_refers_to_files_of_earlier_saves(frozen, tell):
    """The same where both leave out what the checkpoint has that they stand on."""
    found = list(zombies())
    wrong = [(where, problem) for where, problem in found if problem]
    tell(f"{len(found)} pairs of points")
    assert not wrong, (len(wrong), wrong[:5])


def test_a_zombie_on_a_real_disk(tmp_path, tell):
    """The same in a real directory: a zombie that stops at each of its system calls, until its successor has saved twice."""
    wrong: list[str] = []
    for asleep_at in range(1 << 30):
        zombie = Zombie(asleep_at)
        walks = [True]  # whether it is the zombie's turn

        def hook(call: Call, perform: Callable[[], Any], zombie=zombie, walks=walks) -> Any:
            if walks[0]:
                zombie.before()
            return perform()

        url = f"{tmp_path}/{asleep_at}"
        with system_calls_through(hook):
            life = start(open_store(url, tries=1))
            life.save(10)
            if not zombie.fall_asleep(life):
                break
            walks[0] = False
            successor = start(open_store(url, tries=1))
            for step in (11, 12):
                successor.save(step)
            zombie.wake()
            if problem := judge_line(open_store(url), zombie, successor):
                wrong.append(f"asleep at {asleep_at}: {problem}")
    tell(f"{asleep_at} points")
    assert not wrong, (len(wrong), wrong[:5])
    assert asleep_at > 60


# --- the explorer can fail -------------------------------------------------------------------------------------------


def without_file_fsync(trace):
    files = {call.handle for call in trace if isinstance(call, Call) and call.creates}
    return [call for call in trace if not (isinstance(call, Call) and call.name == "fsync" and call.handle in files)]


def without_directory_fsync(trace):
    files = {call.handle for call in trace if isinstance(call, Call) and call.creates}
    return [call for call in trace if not (isinstance(call, Call) and call.name == "fsync" and call.handle not in files)]


def without_rename(trace):
    final = {call.path: call.target for call in trace if isinstance(call, Call) and call.name == "rename"}
    return [
        replace(call, path=final.get(call.path, call.path)) if isinstance(call, Call) else call
        for call in trace
        if not (isinstance(call, Call) and call.name == "rename")
    ]


@pytest.mark.parametrize("planted", [without_file_fsync, without_directory_fsync, without_rename])
def test_a_call_left_out_is_found(tmp_path, planted):
    """Without the fsync of files, without that of directories, or written in place: the explorer finds a third outcome."""
    assert_found(planted(record(str(tmp_path))), tmp_path)


def manifest_first(monkeypatch):
    scratch = Objects({})

    def publish(store, *arguments, **options):
        manifest = commit.publish(scratch, *arguments, **options)
        for name, data in reversed(scratch.objects.items()):
            store.put(name, lambda data=data: [data], len(data))
        scratch.objects.clear()
        return manifest

    def write_share(_store, *arguments):
        return commit.write_share(scratch, *arguments)

    changed = {"write_share": write_share, "publish": publish}
    monkeypatch.setattr(saver, "commit", SimpleNamespace(**{**vars(commit), **changed}))


def prune_first(monkeypatch):
    def write_share(store, *arguments):
        for name in store.list():
            store.delete(name)
        return commit.write_share(store, *arguments)

    monkeypatch.setattr(saver, "commit", SimpleNamespace(**{**vars(commit), "write_share": write_share}))


def newest_goes_first(monkeypatch):
    def tidy(pruner, retention, best_step, attempt):
        for entry in pruner.catalog.entries()[:-1]:
            pruner.delete(entry.directory)

    monkeypatch.setattr(Pruner, "tidy", tidy)


def manifest_goes_last(monkeypatch):
    def delete(pruner, directory, _in_use=None):
        store = pruner.catalog.store
        for name in sorted(store.list(directory), key=lambda name: name.endswith(MANIFEST)):
            store.delete(name)

    monkeypatch.setattr(Pruner, "delete", delete)


@pytest.mark.parametrize("plant", [manifest_first, prune_first, newest_goes_first, manifest_goes_last])
def test_a_wrong_order_is_found(tmp_path, monkeypatch, plant):
    """The manifest first, deleting before the commit, deleting the newest, shards before the manifest: all are found."""
    plant(monkeypatch)
    assert_found(record(str(tmp_path), [10, 20]), tmp_path)


def by_step_alone(monkeypatch):
    def candidates(catalog, kept=None):  # nothing is kept here
        return (entry for entry in sorted(catalog.entries(), key=lambda entry: -entry.step) if entry.state != "unfinished")

    monkeypatch.setattr(Catalog, "candidates", candidates)


def never_steps_aside(monkeypatch):
    monkeypatch.setattr(Attempts, "refuse_superseded", lambda attempts, attempt: None)


@pytest.mark.parametrize("plant", [by_step_alone, never_steps_aside])
def test_a_missing_fence_is_found(monkeypatch, plant):
    """Resuming from the highest step whoever wrote it, or deleting though a successor has started: both are found."""
    plant(monkeypatch)
    assert any(problem for _, problem in zombies())
