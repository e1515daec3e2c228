"""What lies in a run's URL: only what is committed counts, the newest line is followed, and deleting never goes too far."""

import contextlib
import os
import re
from collections.abc import Iterable

import pytest
import torch

import harness
from harness.checkpoint import commit
from harness.checkpoint.catalog import Catalog, Entry, further, verify, verify_all
from harness.checkpoint.format import Ancestor, Attempt, checksum, parse_directory
from harness.checkpoint.retention import Pruner, Retention
from harness.errors import Corrupt, NoCheckpoint, StoreError, UnknownFormat
from harness.storage.store import Store, open_store

FIRST, SECOND, THIRD = (Attempt(f"00000{number}-0000000{number}") for number in (1, 2, 3))
EVERYTHING = Retention()


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(str(tmp_path))


def save(store: Store, step: int, attempt: Attempt = FIRST, stands_on: Iterable[tuple[Attempt, int]] = ()) -> str:
    lineage = [Ancestor(ancestor.id, until) for ancestor, until in stands_on]
    parts = {"model": {"weight": torch.full((10,), float(step))}, "optimizer": {"lr": 0.1, "moment": torch.zeros(3)}}
    return commit.write(store, parts, step=step, attempt=attempt, lineage=lineage)[0]


def steps(entries: Iterable[Entry]) -> list[tuple[int, int]]:
    return [(entry.attempt.number, entry.step) for entry in entries]


def damage(store: Store, directory: str, file: str = "model.safetensors") -> None:
    """Leaves the size as it is."""
    path = f"{store.root}/{directory}/{file}"
    with open(path, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))


def remove(store: Store, directory: str, file: str) -> None:
    os.unlink(f"{store.root}/{directory}/{file}")


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_run_that_has_not_begun(store):
    """Where nothing was ever written there is nothing, and that is said."""
    catalog = Catalog(store)
    assert (catalog.entries(), [*catalog.candidates()], catalog.attempts.all()) == ([], [], [])
    with pytest.raises(NoCheckpoint, match=rf"{store.url}: there is no whole checkpoint$"):
        catalog.newest()
    assert Pruner(catalog).prune(Retention(keep_last=1)) == []


def test_a_whole_checkpoint(store):
    """A valid manifest and all its objects with their sizes: whole."""
    directory = save(store, 10)
    (entry,) = Catalog(store).entries()
    assert (entry.directory, entry.step, entry.attempt, entry.state, entry.problem) == (directory, 10, FIRST, "whole", "")
    assert entry.manifest == Catalog(store).open(directory)


@pytest.mark.parametrize(
    ("file", "size_bytes", "problem"),
    [
        ("optimizer.safetensors", None, r"optimizer\.safetensors: expected \d+ bytes, it is missing"),
        ("optimizer.safetensors", 5, r"optimizer\.safetensors: expected \d+ bytes, found 5"),
        ("model.safetensors", 9999, r"model\.safetensors: expected \d+ bytes, found 9999"),
        ("manifest.json", 100, r"manifest\.json: the checksum in its last line does not fit the 100 bytes"),
        ("manifest.json", 0, r"manifest\.json: the checksum in its last line does not fit the 0 bytes"),
    ],
    ids=["missing", "short", "long", "half a manifest", "empty manifest"],
)
def test_a_corrupt_checkpoint(store, tmp_path, file, size_bytes, problem):
    """Where the listing contradicts the manifest, or the manifest itself, the checkpoint is corrupt and it is said how."""
    path = tmp_path / save(store, 10) / file
    path.unlink() if size_bytes is None else os.truncate(path, size_bytes)
    (entry,) = Catalog(store).entries()
    assert entry.state == "corrupt"
    assert re.search(problem, entry.problem)
    with pytest.raises(NoCheckpoint):
        Catalog(store).newest()


def test_an_unfinished_save(store):
    """Without a manifest there is no checkpoint, whatever else there is."""
    directory = save(store, 10)
    remove(store, directory, "manifest.json")
    assert [entry.state for entry in Catalog(store).entries()] == ["unfinished"]
    assert [*Catalog(store).candidates()] == []
    with pytest.raises(NoCheckpoint):
        Catalog(store).open(directory)


def test_a_manifest_in_a_strange_place(store, tmp_path):
    """A copy of a checkpoint under the name of another step or attempt is not taken for that."""
    directory = save(store, 10)
    step, attempt = parse_directory(directory)
    for name in (directory.replace(f"{step:012}", f"{99:012}"), directory.replace(attempt.id, SECOND.id)):
        os.rename(tmp_path / directory, tmp_path / name)
        (entry,) = Catalog(store).entries()
        assert entry.state == "corrupt"
        assert "found step 10, attempt 000001-00000001" in entry.problem
        os.rename(tmp_path / name, tmp_path / directory)


def test_a_manifest_of_another_version(store, tmp_path):
    """What a newer harness wrote is not called corrupt, and not resumed from."""
    directory = save(store, 10)
    path = tmp_path / directory / "manifest.json"
    text = path.read_bytes().replace(b'"version": 1', b'"version": 3').rpartition(b' "checksum"')[0]
    path.write_bytes(text + f' "checksum": "{checksum(text)}"\n}}'.encode())
    (entry,) = Catalog(store).entries()
    assert (entry.state, "expected harness-checkpoint version 1" in entry.problem) == ("corrupt", True)
    with pytest.raises(UnknownFormat):
        Catalog(store).open(directory)


def test_what_is_not_ours_is_left_alone(store, tmp_path):
    """Other files and directories in the URL are neither checkpoints nor rubbish."""
    save(store, 10)
    for name in ("notes.txt", "step-12/manifest.json", "logs/events", "step-latest/model.bin", ".hidden/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    catalog = Catalog(store)
    before = store.list()
    assert steps(catalog.entries()) == steps(catalog.candidates()) == [(1, 10)]
    assert Pruner(catalog).prune(Retention(keep_last=1)) == []
    assert store.list() == before


def test_objects_that_vanish_are_noticed_by_a_catalog_that_knew_them(store):
    """A catalog that has read a manifest before still looks at the objects each time."""
    catalog, directory = Catalog(store), save(store, 10)
    assert catalog.newest().directory == directory
    remove(store, directory, "model.safetensors")
    assert [entry.state for entry in catalog.entries()] == ["corrupt"]


def test_verifying_reads_every_byte(store):
    """A flipped bit that no size betrays is found by ``verify``, with the name of the file; ``verify_all`` says where."""
    whole, flipped = save(store, 10), save(store, 20)
    damage(store, flipped)
    catalog = Catalog(store)
    for entry in catalog.entries():
        if entry.directory == whole:
            verify(catalog, entry)
        else:
            with pytest.raises(Corrupt, match=rf"{flipped}/model\.safetensors: expected \d+ bytes with xxh3_128:.*, found"):
                verify(catalog, entry)
    assert [entry.state for entry in verify_all(catalog)] == ["whole", "whole"]
    found = verify_all(catalog, deep=True)
    assert [(entry.step, entry.state) for entry in found] == [(20, "corrupt"), (10, "whole")]
    assert "model.safetensors" in found[0].problem
    assert [entry.step for entry in verify_all(catalog, step=10, deep=True)] == [10]


# --- what is not there, or not ours ----------------------------------------------------------------------------------


def test_checkpoints_behind_links(store, tmp_path):
    """A checkpoint that was moved to another disk, and a file of one, count where a link leads to them. Whoever deletes
    takes the link away, and nothing of what it leads to."""
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    for step in (10, 20):
        directory = save(store, step)
        os.rename(tmp_path / directory, elsewhere / directory)
        os.symlink(elsewhere / directory, tmp_path / directory)
    behind = save(store, 30)
    os.rename(tmp_path / behind / "model.safetensors", elsewhere / "weights")
    os.symlink(elsewhere / "weights", tmp_path / behind / "model.safetensors")
    os.symlink(elsewhere, tmp_path / behind / "more")
    catalog = Catalog(store)
    assert [(entry.step, entry.state) for entry in catalog.entries()] == [(30, "whole"), (20, "whole"), (10, "whole")]
    for entry in catalog.entries():
        verify(catalog, entry)
    lay = sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*"))
    last = save(store, 40)
    assert steps(Pruner(catalog).prune(Retention(keep_last=1))) == [(1, 30), (1, 20), (1, 10)]
    assert os.listdir(tmp_path) == [last]
    assert sorted(path.relative_to(elsewhere) for path in elsewhere.rglob("*")) == lay


def test_links_in_a_circle(store, tmp_path):
    """A listing comes to its end."""
    first, second = save(store, 10), save(store, 20)
    for directory in (first, second):
        os.symlink(tmp_path, tmp_path / directory / "run")
        os.symlink(tmp_path / first, tmp_path / directory / "first")
    assert [entry.state for entry in Catalog(store).entries()] == ["whole", "whole"]
    assert steps(Pruner(Catalog(store)).prune(Retention(keep_last=1))) == [(1, 10)]
    assert os.listdir(tmp_path) == [second]


def test_a_link_that_leads_nowhere(store, tmp_path):
    """A disk that is not mounted is not a run that has not begun, nor one that goes on from an older checkpoint."""
    save(store, 10)
    directory = save(store, 20)
    os.rename(tmp_path / directory, tmp_path / "moved")
    os.symlink(tmp_path / "nowhere", tmp_path / directory)
    for look in (Catalog(store).newest, Catalog(store).entries, lambda: harness.latest(store.root)):
        with pytest.raises(StoreError, match=f"list .*{directory}: it is a link whose target is missing"):
            look()


def test_names_that_begin_like_those_of_saves(store, tmp_path):
    """A run does not start anew beside what may be its checkpoints; beside such as are understood, others do not matter."""
    (tmp_path / "step-1200").mkdir()
    (tmp_path / "step-000000001300-000002-00000000-00000000.bak").mkdir()
    for look in (lambda: [*Catalog(store).candidates()], Catalog(store).newest, lambda: harness.latest(store.root)):
        with pytest.raises(UnknownFormat, match=r"expected checkpoints, found step-000000001300-.*\.bak, which is no name"):
            look()
    directory = save(store, 10)
    assert harness.latest(store.root) == 10
    remove(store, directory, "manifest.json")
    with pytest.raises(UnknownFormat):
        harness.latest(store.root)


def test_directories_of_other_programs(public_path, ordinary_user):
    """What is not the run's may be unreadable: nobody looks. What is the run's may not, and is named."""
    os.makedirs(f"{public_path}/run/lost+found")
    os.chmod(f"{public_path}/run", 0o777)
    os.chmod(f"{public_path}/run/lost+found", 0)
    with ordinary_user():
        store = open_store(f"{public_path}/run")
        catalog = Catalog(store)
        attempt = catalog.attempts.claim({})
        for step in (10, 20):
            directory = save(store, step, attempt)
        Pruner(catalog).tidy(Retention(keep_last=1), None, attempt)
        assert steps(catalog.entries()) == [(1, 20)]
        os.chmod(f"{public_path}/run/{directory}", 0)
        with pytest.raises(StoreError, match=f"list .*{directory}: Permission denied"):
            Catalog(store).newest()
        os.chmod(f"{public_path}/run/{directory}", 0o700)


# --- order and lineage -----------------------------------------------------------------------------------------------


def test_the_newest_comes_first(store):
    """Within an attempt the latest step, of several attempts the latest, in whatever order they were written."""
    for step, attempt, stands_on in ((30, FIRST, ()), (10, FIRST, ()), (25, SECOND, [(FIRST, 20)]), (20, FIRST, ())):
        save(store, step, attempt, stands_on)
    catalog = Catalog(store)
    assert steps(catalog.entries()) == [(2, 25), (1, 30), (1, 20), (1, 10)]
    assert steps(catalog.candidates()) == [(2, 25), (1, 20), (1, 10)]
    assert steps([catalog.newest(), catalog.newest(step=10)]) == [(2, 25), (1, 10)]
    for left in (30, 15):
        with pytest.raises(NoCheckpoint, match=f"there is no whole checkpoint of step {left}"):
            catalog.newest(step=left)


def test_the_same_step_twice(store):
    """Of two saves of one step the later attempt's counts; of one attempt's two, both are whole."""
    first, second = save(store, 10, FIRST), save(store, 10, SECOND)
    assert [entry.directory for entry in Catalog(store).candidates()] == [second, first]
    third = save(store, 10, SECOND)
    assert {entry.directory for entry in [*Catalog(store).candidates()][:2]} == {second, third}


def test_a_writer_that_was_believed_dead(store):
    """What an attempt commits beyond the branch that a newer one took is on nobody's line, however late its step."""
    save(store, 10, FIRST)
    save(store, 20, FIRST)
    catalog = Catalog(store)
    assert catalog.newest().step == 20
    branch = [(FIRST, 20)]
    newer = save(store, 25, SECOND, branch)  # resumed from 20
    for step in (30, 40, 1000):  # and yet the first one lives
        save(store, step, FIRST)
        assert catalog.newest().directory == newer
        assert steps(catalog.candidates()) == [(2, 25), (1, 20), (1, 10)]
    save(store, 35, SECOND, branch)
    assert steps(catalog.candidates()) == [(2, 35), (2, 25), (1, 20), (1, 10)]


def test_a_branch_from_a_branch(store):
    """A third attempt that fell back behind the second one's start leaves the second one's line, and keeps its own."""
    save(store, 10, FIRST)
    save(store, 20, FIRST)
    save(store, 30, SECOND, [(FIRST, 20)])
    save(store, 40, SECOND, [(FIRST, 20)])
    save(store, 31, THIRD, [(FIRST, 20), (SECOND, 30)])
    assert steps(Catalog(store).candidates()) == [(3, 31), (2, 30), (1, 20), (1, 10)]
    fourth = Attempt("000004-00000004")
    save(store, 15, fourth, [(FIRST, 10)])
    assert steps(Catalog(store).candidates())[0] == (4, 15)
    assert (1, 20) not in steps(Catalog(store).candidates())


def test_candidates_to_fall_back_to(store):
    """The corrupt ones are among the candidates, to be told of; the newest whole one is the first that is not."""
    save(store, 10)
    middle, last = save(store, 20), save(store, 30)
    remove(store, last, "model.safetensors")
    os.truncate(f"{store.root}/{middle}/manifest.json", 10)
    entries = [*Catalog(store).candidates()]
    assert [(entry.step, entry.state) for entry in entries] == [(30, "corrupt"), (20, "corrupt"), (10, "whole")]
    assert Catalog(store).newest().step == 10


# --- retention -------------------------------------------------------------------------------------------------------


def kept(store: Store) -> list[int]:
    return sorted(entry.step for entry in Catalog(store).entries() if entry.state == "whole")


@pytest.mark.parametrize(
    ("retention", "best_step", "left"),
    [
        (Retention(), None, [10, 20, 30, 40, 50, 60]),
        (Retention(keep_last=1), None, [60]),
        (Retention(keep_last=2), None, [50, 60]),
        (Retention(keep_last=100), None, [10, 20, 30, 40, 50, 60]),
        (Retention(keep_last=1, keep_every_steps=20), None, [20, 40, 60]),
        (Retention(keep_last=2, keep_every_steps=30), None, [30, 50, 60]),
        (Retention(keep_last=1, keep_every_steps=7), None, [60]),
        (Retention(keep_last=1), 30, [30, 60]),
        (Retention(keep_last=2, keep_every_steps=40), 10, [10, 40, 50, 60]),
        (Retention(keep_last=1), 35, [60]),
        (Retention(keep_every_steps=20), 10, [10, 20, 30, 40, 50, 60]),
    ],
    ids=str,
)
def test_retention(store, retention, best_step, left):
    """The last, those of certain steps, the best: they stay, the others go entirely, and are named."""
    for step in range(10, 70, 10):
        save(store, step)
    announced = Pruner(Catalog(store)).prune(retention, best_step, dry_run=True)
    assert kept(store) == list(range(10, 70, 10))
    gone = Pruner(Catalog(store)).prune(retention, best_step)
    assert gone == announced
    assert kept(store) == left
    assert sorted(entry.step for entry in gone) == [step for step in range(10, 70, 10) if step not in left]
    assert {name.partition("/")[0] for name in store.list()} == {entry.directory for entry in Catalog(store).entries()}
    assert sorted(os.listdir(store.root)) == sorted(entry.directory for entry in Catalog(store).entries())
    assert Pruner(Catalog(store)).prune(retention, best_step) == []


def test_the_newest_whole_checkpoint_never_goes(store):
    """However corrupt the newer ones are, the newest that is whole is kept, and counts as the first."""
    for step in (10, 20, 30):
        last = save(store, step)
    remove(store, last, "model.safetensors")
    Pruner(Catalog(store)).prune(Retention(keep_last=1))
    assert kept(store) == [20]
    with pytest.raises(AssertionError, match="never deleted"):
        Retention(keep_last=0)


def test_nothing_is_deleted_where_nothing_is_whole(store):
    """What is corrupt may be all that its owner has left."""
    for step in (10, 20):
        remove(store, save(store, step), "model.safetensors")
    before = store.list()
    assert Pruner(Catalog(store)).prune(Retention(keep_last=1)) == []
    assert store.list() == before


def test_rubbish_goes_when_a_newer_checkpoint_is_whole(store):
    """Unfinished and corrupt saves older than the newest whole one go; a newer one of the last attempt may be somebody's who
    still writes, and goes when its owner says that nobody does."""
    unfinished, corrupt = save(store, 10), save(store, 20)
    remove(store, unfinished, "manifest.json")
    remove(store, corrupt, "model.safetensors")
    save(store, 30, SECOND, [(FIRST, 5)])
    superseded = save(store, 40, SECOND)
    remove(store, superseded, "manifest.json")
    writing = save(store, 5, THIRD)
    remove(store, writing, "manifest.json")
    gone = Pruner(Catalog(store)).prune(EVERYTHING)
    assert [entry.directory for entry in gone] == [superseded, unfinished]
    gone = Pruner(Catalog(store)).prune(Retention(keep_last=1))
    assert [entry.directory for entry in gone] == [corrupt]
    assert {name.partition("/")[0] for name in store.list()} >= {writing}
    gone = Pruner(Catalog(store)).prune(Retention(keep_last=1), unfinished=True)
    assert [entry.directory for entry in gone] == [writing]
    assert kept(store) == [30]


def test_unfinished_saves_where_nothing_is_whole(store):
    """They may be all that their owner has left, who has to say so."""
    directories = [save(store, 10), save(store, 20, SECOND)]
    for directory in directories:
        remove(store, directory, "manifest.json")
    assert Pruner(Catalog(store)).prune(Retention(keep_last=1)) == []
    Pruner(Catalog(store)).sweep(THIRD)
    assert {name.partition("/")[0] for name in store.list()} == {*directories}
    assert len(Pruner(Catalog(store)).prune(Retention(keep_last=1), unfinished=True)) == 2
    assert os.listdir(store.root) == []


def test_directories_that_hold_nothing(store, tmp_path):
    """A save that failed at its first file, and the empty directories that other programs make within one, go as well."""
    save(store, 20)
    empty = "step-000000000010-000001-00000001-00000000"
    (tmp_path / empty / ".ipynb_checkpoints/deeper").mkdir(parents=True)
    old = save(store, 15)
    (tmp_path / old / "@eaDir").mkdir()
    assert [(entry.directory, entry.state) for entry in Catalog(store).entries()[1:]] == [
        (old, "whole"),
        (empty, "unfinished"),
    ]
    Pruner(Catalog(store)).tidy(Retention(keep_last=1), None, FIRST)
    assert len(os.listdir(store.root)) == 1
    assert kept(store) == [20]


def test_what_an_attempt_before_has_left_unfinished(store):
    """A start deletes what lies after the newest whole checkpoint, and nothing of its own attempt, and nothing corrupt."""
    save(store, 10)
    dead, corrupt, own = save(store, 20), save(store, 30), save(store, 11, SECOND)
    for directory in (dead, own):
        remove(store, directory, "manifest.json")
    remove(store, corrupt, "model.safetensors")
    Pruner(Catalog(store)).sweep(SECOND)
    assert steps(Catalog(store).entries()) == [(2, 11), (1, 30), (1, 10)]


def test_a_line_that_was_left_goes(store):
    """What a writer that was believed dead committed stays as long as it goes further than the line, its last one alone."""
    save(store, 10, FIRST)
    newest = save(store, 20, SECOND, [(FIRST, 10)])
    for step in (15, 25, 30):
        save(store, step, FIRST)
    corrupt = save(store, 40, FIRST)
    remove(store, corrupt, "model.safetensors")
    catalog = Catalog(store)
    assert steps(further(catalog, catalog.newest())) == [(1, 30)]
    gone = Pruner(catalog).prune(Retention(keep_last=2))
    assert steps(gone) == [(1, 40), (1, 25), (1, 15)]
    assert (kept(store), catalog.newest().directory) == ([10, 20, 30], newest)
    save(store, 29, SECOND, [(FIRST, 10)])
    assert steps(Pruner(catalog).prune(Retention(keep_last=1))) == [(2, 20), (1, 10)]
    save(store, 30, SECOND, [(FIRST, 10)])
    assert steps(Pruner(catalog).prune(Retention(keep_last=1))) == [(2, 29), (1, 30)]


def test_two_lines_that_have_one_past(store):
    """Of two copies of a run that went on apart and were put together, the later attempt's is the line. The other one is
    abandoned, is told of as what goes further, and stays, whoever deletes, until the line has passed it."""
    save(store, 200, FIRST)
    for step in (300, 400):
        save(store, step, SECOND, [(FIRST, 200)])
    other, fourth = Attempt("000002-0000000f"), Attempt("000004-00000004")
    save(store, 210, other, [(FIRST, 200)])
    save(store, 220, THIRD, [(FIRST, 200), (other, 210)])
    stands_on = [(FIRST, 200), (other, 210), (THIRD, 220)]
    save(store, 230, fourth, stands_on)
    catalog = Catalog(store)
    assert steps(catalog.candidates()) == [(4, 230), (3, 220), (2, 210), (1, 200)]
    assert steps(further(catalog, catalog.newest())) == [(2, 400)]
    claimed = catalog.attempts.claim({})
    save(store, 240, claimed, [*stands_on, (fourth, 230)])
    Pruner(catalog).tidy(Retention(keep_last=1), None, claimed)
    assert kept(store) == [240, 400]
    save(store, 400, claimed, [*stands_on, (fourth, 230)])
    Pruner(catalog).tidy(Retention(keep_last=1), None, claimed)
    assert steps(catalog.entries()) == [(5, 400)]


@pytest.mark.parametrize("is_writer", [True, False])
def test_milestones_of_a_line_that_was_left(store, is_writer):
    """They go with the rest of it; those of the line stay, and so do those of attempts that have nothing to do with it."""
    fourth = Attempt("000004-00000004")
    for step in (10, 20, 30):
        save(store, step, FIRST)
        save(store, step, SECOND)
    for step in (25, 30, 40):
        save(store, step, THIRD, [(SECOND, 20)])
    for step in (30, 45, 50):
        save(store, step, fourth, [(SECOND, 20)])
    retention = Retention(keep_last=1, keep_every_steps=10)
    if is_writer:
        Pruner(Catalog(store)).tidy(retention, None, fourth)
    else:
        Pruner(Catalog(store)).prune(retention)
    assert steps(Catalog(store).entries()) == [(4, 50), (4, 30), (2, 20), (2, 10), (1, 30), (1, 20), (1, 10)]


def test_several_saves_of_a_step(store):
    """Those of one attempt are one checkpoint, of which the newest counts: of the others none takes a place among the last.
    Where it is corrupt, the one before is there."""
    for step in (10, 20, 20, 20):
        save(store, step)
    twice = sorted(entry.directory for entry in Catalog(store).entries() if entry.step == 20)
    assert Catalog(store).newest().directory == twice[-1]
    remove(store, twice[-1], "model.safetensors")
    assert Catalog(store).newest().directory == twice[-2]
    Pruner(Catalog(store)).prune(Retention(keep_last=2))
    assert {entry.directory for entry in Catalog(store).entries() if entry.step == 20} == {*twice[-2:]}
    assert kept(store) == [10, 20]


class Dying(Exception):
    pass


@pytest.mark.parametrize("cut", range(8))
def test_deleting_that_is_cut_short(store, monkeypatch, cut):
    """After each single deletion: no checkpoint is corrupt, the kept are whole, and the next pruning finishes the work."""
    for step in (10, 20, 30):
        newest = save(store, step)
    deleted: list[str] = []
    unlink = os.unlink

    def delete(path):
        if len(deleted) == cut:
            raise Dying
        deleted.append(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", delete)
    with pytest.raises(StoreError, match="Dying") if cut < 6 else contextlib.nullcontext():
        Pruner(Catalog(store)).prune(Retention(keep_last=1))
    monkeypatch.undo()
    assert {entry.state for entry in Catalog(store).entries()} <= {"whole", "unfinished"}
    assert Catalog(store).newest().directory == newest
    Pruner(Catalog(store)).prune(Retention(keep_last=1))
    assert kept(store) == [30]
    assert [name.partition("/")[0] for name in store.list()] == [newest] * 3


def test_the_manifest_goes_first(store, monkeypatch):
    """From the first deletion on a checkpoint that is to go is none any more."""
    save(store, 10)
    save(store, 20)
    deleted, unlink = [], os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: (deleted.append(path), unlink(path)))
    (gone,) = Pruner(Catalog(store)).prune(Retention(keep_last=1))
    assert deleted[0] == f"{store.root}/{gone.directory}/manifest.json"
    assert len(deleted) == 3
    assert not os.path.exists(f"{store.root}/{gone.directory}")


# --- attempts --------------------------------------------------------------------------------------------------------


def test_attempts_are_numbered_after_all_others(store):
    """Records and directories count alike; what was claimed is listed, first the first."""
    catalog = Catalog(store)
    first = catalog.attempts.claim({"host": "a"})
    second = catalog.attempts.claim({"host": "b"})
    assert [first.number, second.number] == [1, 2]
    save(store, 10, Attempt("000007-00000000"))
    third = catalog.attempts.claim({})
    assert third.number == 8
    assert catalog.attempts.all() == [first, second, third]
    assert catalog.entries()[0].attempt < third


def test_attempts_tell_who_they_are(store):
    """The record of a start has what it was given, and when it was."""
    catalog = Catalog(store)
    attempt = catalog.attempts.claim({"host": "a", "world_size": 3})
    about = catalog.attempts.about(attempt)
    assert about | {"started": ""} == {"attempt": attempt.id, "started": "", "host": "a", "world_size": 3}
    assert about["started"].endswith("+00:00")


def test_two_claims_at_once(store):
    """Two starts that saw the same records share a number and are still two."""
    one, other = Attempt.after(Catalog(store).attempts.all()), Catalog(store).attempts.claim({})
    assert one.number == other.number
    assert one != other


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff"], ids=repr)
def test_records_that_cannot_be_read(store, text):
    """A record that was damaged still holds its number; what it said is lost."""
    catalog = Catalog(store)
    attempt = catalog.attempts.claim({"host": "a"})
    store.put(f"attempts/{attempt.id}.json", lambda: [text], len(text))
    assert catalog.attempts.about(attempt) == {}
    assert catalog.attempts.claim({}).number == 2


def test_names_that_are_no_attempts(store):
    """Other objects among the records are passed over, and what is called like one but lies elsewhere."""
    for name in ("readme.txt", "9-x.json", "000009-00000000.json/deeper", ".000009-00000000.json.partial"):
        store.put(f"attempts/{name}", lambda: [b"{}"], 2)
    store.put("000009-00000000.json", lambda: [b"{}"], 2)
    assert Catalog(store).attempts.all() == []
    assert Catalog(store).attempts.claim({}).number == 1


def test_a_catalog_of_a_store_that_cannot_be_listed(tmp_path):
    """A run whose past cannot be seen is not taken for one that has none."""
    (tmp_path / "run").symlink_to(tmp_path / "run")  # a loop
    catalog = Catalog(open_store(str(tmp_path / "run")))
    for look in (catalog.entries, catalog.newest, catalog.attempts.all, lambda: catalog.attempts.claim({})):
        with pytest.raises(StoreError):
            look()
