"""Saving in a training run: a failed save is told of, counted and survived; too many of them, or the last one, are not."""

import errno
import gc
import os

import pytest
import torch

from harness.checkpoint import load
from harness.checkpoint.catalog import Catalog
from harness.checkpoint.format import Ancestor, Manifest
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saver, SaveRequest
from harness.errors import StoreError, Superseded, Unsupported
from harness.storage.store import open_store
from tests.support.faults import Contents, Life, Objects, Pair
from tests.support.saving import TOO_LARGE, failed_lines, parts, saver, small_files


def save(saver: Saver, step: int, count: int = 10, *, must_succeed: bool = False, best_step: int | None = None):
    return saver.save(parts(step, count), SaveRequest(step, {"epoch": 0}, best_step), must_succeed=must_succeed)


def test_a_save_says_what_it_did(tmp_path):
    """A commit tells its directory, its bytes and its time; what it wrote is the newest checkpoint."""
    writer = saver(str(tmp_path), lineage=[Ancestor("000000-00000000", 5)])
    saved = save(writer, 10)
    newest = Catalog(open_store(str(tmp_path))).newest()
    assert (newest.directory, newest.manifest.bytes) == (saved.directory, saved.bytes)
    assert 0 < saved.seconds < 60
    assert (newest.manifest.meta, newest.manifest.lineage) == ({"epoch": 0}, [Ancestor("000000-00000000", 5)])
    assert writer.failures == 0


def test_old_checkpoints_go_after_the_commit(tmp_path):
    """The retention is applied with each save, the best one's step included."""
    writer = saver(str(tmp_path), retention=Retention(keep_last=2))
    for step in (10, 20, 30, 40):
        save(writer, step, best_step=10)
    assert [entry.step for entry in writer.catalog.entries()] == [40, 30, 10]


@pytest.mark.parametrize("keep_last", [None, 2])
def test_a_long_run_does_not_hold_what_it_knows_of_all_its_saves(tmp_path, keep_last):
    """The manifests in memory are those that the next save wants, however many saves there were."""
    writer = saver(str(tmp_path), retention=Retention(keep_last, keep_every_steps=keep_last and 30))
    for step in range(10, 310, 10):
        save(writer, step)
    gc.collect()
    assert sum(type(each) is Manifest and each.attempt == writer.attempt.id for each in gc.get_objects()) <= 4
    assert len(writer.catalog.entries()) == (30 if keep_last is None else 11)


def test_a_failed_save_is_told_of_and_training_goes_on(tmp_path, caplog):
    """Each failure is logged with its step, its number and its reason; a success begins the count anew."""
    writer = saver(str(tmp_path))
    first = save(writer, 10)
    with small_files():
        assert save(writer, 20, TOO_LARGE) is None
        assert save(writer, 30, TOO_LARGE) is None
    assert writer.failures == 2
    one, two = failed_lines(caplog)
    assert one.startswith("save of step 20 FAILED (1 in a row): put ")
    assert two.startswith("save of step 30 FAILED (2 in a row): put ")
    assert str(tmp_path) in one
    assert os.strerror(errno.EFBIG) in one
    assert writer.catalog.newest().directory == first.directory
    assert save(writer, 40, TOO_LARGE) is not None
    assert writer.failures == 0
    with small_files():
        assert save(writer, 50, TOO_LARGE) is None
    assert failed_lines(caplog)[-1].startswith("save of step 50 FAILED (1 in a row)")


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_too_many_failures_in_a_row_end_it(tmp_path, caplog, allowed):
    """So many may fail in a row as are allowed, and the next one's error is raised; it is logged all the same."""
    writer = saver(str(tmp_path), failures_allowed=allowed)
    save(writer, 10)
    with small_files():
        for step in range(allowed):
            assert save(writer, 20 + step, TOO_LARGE) is None
        with pytest.raises(StoreError, match=os.strerror(errno.EFBIG)):
            save(writer, 90, TOO_LARGE)
    assert len(failed_lines(caplog)) == allowed + 1


def test_the_last_save_must_succeed(tmp_path, caplog):
    """When there is no next one, the first failure is raised whatever is allowed."""
    writer = saver(str(tmp_path), failures_allowed=100)
    with small_files(), pytest.raises(StoreError):
        save(writer, 10, TOO_LARGE, must_succeed=True)
    assert failed_lines(caplog)[0].startswith("save of step 10 FAILED (1 in a row)")


def test_failed_saves_harm_nothing(tmp_path):
    """However often saving fails, no older checkpoint is pruned or changed, and the failed ones leave no checkpoint."""
    writer = saver(str(tmp_path), retention=Retention(keep_last=1), failures_allowed=100)
    save(writer, 10)
    before = {name: (tmp_path / name).read_bytes() for name in writer.catalog.store.list()}
    with small_files():
        for step in range(20, 25):
            assert save(writer, step, TOO_LARGE) is None
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    newest = Catalog(open_store(str(tmp_path))).newest()
    assert load.read(writer.catalog.store, newest.directory, newest.manifest)["training"] == {"step": 10}
    assert {entry.state for entry in writer.catalog.entries() if entry.step != 10} <= {"unfinished"}
    save(writer, 30)
    assert [(entry.step, entry.state) for entry in writer.catalog.entries()] == [(30, "whole")]


@pytest.mark.parametrize("retention", [Retention(), Retention(keep_last=1)], ids=["all", "one"])
def test_a_failed_save_takes_no_room(tmp_path, retention):
    """What it has written is deleted before the next one begins, with its directory; the one that died before this start has
    left something, and that goes with the first save."""
    catalog = Catalog(open_store(str(tmp_path)))
    dead = saver(str(tmp_path), attempt=catalog.attempts.claim({}))
    first = save(dead, 10)
    killed = tmp_path / dead.new_directory(20)
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(bytes(1000))
    writer = saver(str(tmp_path), attempt=catalog.attempts.claim({}), retention=retention)
    small = {"a": {"weight": torch.zeros(10)}}  # a part that is written before the one that fails
    with small_files():
        for step in (20, 30):
            assert writer.save(small | parts(step, TOO_LARGE), SaveRequest(step)) is None
            assert sorted(os.listdir(tmp_path)) == ["attempts", first.directory]
    saved = save(writer, 40)
    kept = {saved.directory} if retention.keep_last else {saved.directory, first.directory}
    assert {*os.listdir(tmp_path)} == {"attempts", *kept}


def test_a_save_that_failed_for_the_moment_takes_no_room_of_the_next():
    """Where the storage has to come back first, and where other writers may still write, what was written goes when the next
    save begins, before it writes anything."""
    for writers, transient in ((1, True), (2, False), (2, True)):
        objects: dict[str, bytes] = {}
        done: list[tuple[str, str]] = []
        troubles = [StoreError("on purpose", transient=transient)]

        def fail(operation: str, name: str, troubles=troubles, done=done) -> None:
            if troubles and operation == "put" and "optimizer" in name:
                raise troubles.pop()
            done.append((operation, name))

        store = Objects(objects, fail)
        life = Life(store, failures_allowed=9) if writers == 1 else Pair(Objects(objects), store, failures_allowed=9)
        life.saver.retention = Retention()
        life.saver.catalog.store.before = fail
        assert life.save(10, must_succeed=False) is None
        left = {name.partition("/")[0] for name in objects if name.startswith("step-")}
        assert len(left) == 1, "for now"
        done.clear()
        saved = life.save(20)
        changes = [(operation, name.partition("/")[0]) for operation, name in done if operation in ("put", "delete")]
        assert changes[0] == ("delete", *left)
        assert {name.partition("/")[0] for name in objects} == {"attempts", saved.directory}


def test_a_commit_whose_reply_was_lost_stays(tmp_path):
    """A save that is told of as failed, and whose manifest is there after all, is a checkpoint, and nobody deletes it."""
    contents = Contents()
    life = Life(open_store("bucket://run", {"contents": contents}, tries=1), keep_last=None, failures_allowed=9)
    lost = []

    def request(what, perform):
        perform()
        if "manifest" in what and not lost:
            lost.append(what)
            raise ConnectionResetError("on purpose")

    contents.request = request
    assert life.save(10, must_succeed=False) is None
    life.save(20)
    assert [(entry.step, entry.state) for entry in life.catalog.entries()] == [(20, "whole"), (10, "whole")]


def test_a_state_that_cannot_be_saved_is_no_failure_of_storage(tmp_path, caplog):
    """What no next save can cure is raised at once and not counted."""
    writer = saver(str(tmp_path))
    with pytest.raises(Unsupported, match=r"^training/handle: "):
        writer.save({"training": {"handle": object()}}, SaveRequest(10))
    assert (writer.failures, failed_lines(caplog)) == (0, [])


def test_a_failed_deletion_is_told_of_and_made_up_for(public_path, ordinary_user, caplog):
    """When old checkpoints cannot be deleted the save stands; they go after a later one."""
    writer = saver(f"{public_path}/run", retention=Retention(keep_last=1))
    old = save(writer, 10)
    os.chmod(f"{public_path}/run", 0o777)
    os.chmod(f"{public_path}/run/{old.directory}", 0o555)
    with ordinary_user():
        saved = save(writer, 20)
    assert writer.catalog.newest().directory == saved.directory
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "harness.checkpoint.saver"]
    assert warning.startswith("could not delete old checkpoints; training continues, and the next save tries again: delete ")
    assert writer.failures == 0
    assert [(entry.step, entry.state) for entry in writer.catalog.entries()] == [(20, "whole"), (10, "whole")]
    os.chmod(f"{public_path}/run/{old.directory}", 0o755)
    save(writer, 30)
    assert [entry.step for entry in writer.catalog.entries()] == [30]


def test_a_writer_that_was_believed_dead_steps_aside(tmp_path):
    """Once a newer attempt has begun, an older one deletes nothing more, ends, and what it committed is nobody's."""
    catalog = Catalog(open_store(str(tmp_path)))
    first = saver(str(tmp_path), attempt=catalog.attempts.claim({"host": "old"}), retention=Retention(keep_last=1))
    save(first, 10)
    second_attempt = catalog.attempts.claim({"host": "new"})
    with pytest.raises(Superseded, match=r"attempt 2 \(started 20.* on new\) has taken over this run"):
        save(first, 20)
    assert [entry.step for entry in catalog.entries()] == [20, 10]
    second = saver(str(tmp_path), attempt=second_attempt, lineage=[Ancestor(first.attempt.id, 10)])
    save(second, 15)
    assert [(entry.attempt.number, entry.step) for entry in catalog.candidates()] == [(2, 15), (1, 10)]
