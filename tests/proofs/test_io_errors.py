"""Every storage operation of every verb fails, one after the other: nothing is lost, and the error is the right one.

Operation 1 fails, then 2, then 3, until the verb is done before its turn comes. It fails once, or it and all that come
after it. On a local disk an operation is a system call, reads included, and fails with an error that may pass (EIO) or with
one that will not (ENOSPC); in a store it is a call of the store.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest

from harness.checkpoint.catalog import Catalog, verify_all
from harness.checkpoint.format import Attempt
from harness.checkpoint.retention import Pruner, Retention
from harness.checkpoint.saver import Saved
from harness.errors import HarnessError, StoreError
from harness.storage.store import Store, open_store
from tests.support.faults import Call, Life, Objects, no_waiting, resume_from, silence, system_calls_through


@pytest.fixture(autouse=True)
def quiet():
    with silence(), no_waiting(), system_calls_through(lambda call, perform: perform()):  # without fsync: the power stays on
        yield


@dataclass
class Failing:
    """Raises at the ``at``-th operation, and with ``for_good`` at all that come after it."""

    at: int
    error: Callable[[], Exception]
    for_good: bool
    done: int = 0

    def before(self, *operation: object) -> None:
        self.done += 1
        if self.done - 1 == self.at or (self.for_good and self.was_reached):
            raise self.error()

    def hook(self, call: Call, perform: Callable[[], Any]) -> Any:
        self.before()
        return perform()

    @property
    def was_reached(self) -> bool:
        return self.done > self.at


@dataclass
class Trial:
    """A run with the checkpoints 10 and 20, of which an operation is about to fail."""

    failing: Failing
    store: Store
    is_retried: bool  # whether what failed once is tried again by the store itself
    life: Life

    def outcome(self, verb: Callable[["Trial"], Any]) -> Any:
        """What a verb returns or raises; an error that is not of harness comes through."""
        try:
            return verb(self)
        except HarnessError as error:
            return error


def start(store: Store) -> Life:
    return Life(store, keep_last=2, failures_allowed=1, shard_bytes=1 << 20)


def local_trials(folder: str, code: int, for_good: bool) -> Iterator[tuple[Trial, Callable[[], Any]]]:
    """A fresh copy of a run on a disk for each system call, and the context in which that one fails."""
    life = start(open_store(f"{folder}/clean/run"))
    for step in (10, 20):
        life.save(step)
    for at in range(1 << 30):
        failing = Failing(at, lambda: OSError(code, os.strerror(code)), for_good)
        shutil.copytree(f"{folder}/clean", f"{folder}/{at}")
        store = open_store(f"{folder}/{at}/run", tries=3)
        life.catalog = life.saver.catalog = Catalog(store)
        life.saver.failures = 0
        yield Trial(failing, store, code == errno.EIO and not for_good, life), lambda f=failing: system_calls_through(f.hook)


def store_trials(transient: bool, for_good: bool) -> Iterator[tuple[Trial, Callable[[], Any]]]:
    """A fresh copy of a run in a store for each of its calls."""
    clean: dict[str, bytes] = {}
    life = start(Objects(clean))
    for step in (10, 20):
        life.save(step)
    for at in range(1 << 30):
        failing = Failing(at, lambda: StoreError("on purpose", transient=transient), for_good)
        store = Objects(dict(clean))
        life.catalog = life.saver.catalog = Catalog(store)
        life.saver.failures = 0

        def armed(store: Objects = store, failing: Failing = failing) -> Any:
            store.before = failing.before
            return nullcontext()

        yield Trial(failing, store, False, life), armed


LOCAL = ["EIO once", "EIO for good", "ENOSPC once", "ENOSPC for good"]
STORE = ["transient once", "permanent for good"]


@pytest.fixture(params=[*LOCAL, *STORE])
def trials(request, tmp_path):
    """Runs a verb with each of its operations failing, and judges each outcome; returns how many operations there are."""
    kind, _, how_long = request.param.partition(" ")
    for_good = how_long == "for good"
    if kind.startswith("E"):
        source = local_trials(str(tmp_path), getattr(errno, kind), for_good)
    else:
        source = store_trials(kind == "transient", for_good)

    def every(verb: Callable[[Trial], Any], judge: Callable[[Trial, Any], str | None]) -> int:
        wrong = []
        for trial, armed in source:
            with armed():
                outcome = trial.outcome(verb)
            trial.store.before = lambda *operation: None  # the disk is well again
            if not trial.failing.was_reached:
                break
            if problem := judge(trial, outcome) or judge_run(trial):
                wrong.append(f"operation {trial.failing.at}: {problem}; {outcome!r}")
        assert not wrong, (len(wrong), wrong[:5])
        return trial.failing.at

    return every


def judge_run(trial: Trial) -> str | None:
    """What is wrong with the run once the disk is well again; None when it is whole, can go on, and is tidy then."""
    entries = Catalog(trial.store).entries()
    if corrupt := [entry.problem for entry in entries if entry.state == "corrupt"]:
        return f"something partial was published: {corrupt}"
    if not trial.failing.for_good and (partial := [name for name in trial.store.list() if name.endswith(".partial")]):
        return f"left behind {partial}"
    _, restored = resume_from(trial.store)
    if restored.step not in (20, 29, 30) or not restored.exact:
        return f"resumed from {restored.step}"
    life = Life(trial.store)
    saved = life.save(40)
    rubbish = [name for name in trial.store.list() if not name.startswith(("attempts/", saved.directory))]
    return f"never swept up {rubbish}" if rubbish else None


def test_each_call_of_a_save_fails(trials):
    """A save that fails says so, is counted, and leaves the older checkpoints; one that says that it is saved, is."""

    def save(trial: Trial) -> Any:
        return trial.life.save(30, must_succeed=False)

    def judge(trial: Trial, outcome: Any) -> str | None:
        _, restored = resume_from(trial.store)
        if isinstance(outcome, Saved):
            return None if restored.step == 30 else f"not saved: {restored.step}"
        if trial.is_retried:
            return "it was tried again, and failed"
        return None if outcome is None and trial.life.saver.failures == 1 else f"{trial.life.saver.failures} failures"

    assert trials(save, judge) > 10


@pytest.mark.parametrize("trials", STORE, indirect=True)
def test_save_after_save(trials):
    """When the saves fail more often in a row than is allowed, or the last one of a run fails, the error is raised."""

    def save(trial: Trial) -> Any:
        first, second = (trial.life.save(step, must_succeed=False) for step in (29, 30))
        return first, second

    def judge(trial: Trial, outcome: Any) -> str | None:
        if isinstance(outcome, tuple):
            return "both saves failed" if outcome == (None, None) else None
        right = isinstance(outcome, StoreError) and trial.failing.for_good and trial.life.saver.failures == 2
        return None if right else "expected a StoreError after two failures"

    assert trials(save, judge) > 10


@pytest.mark.parametrize("trials", STORE, indirect=True)
def test_last_save(trials):
    """A save that must succeed raises the storage's error at once."""

    def save(trial: Trial) -> Any:
        return trial.life.save(30, must_succeed=True)

    def judge(trial: Trial, outcome: Any) -> str | None:
        return None if isinstance(outcome, Saved | StoreError) else "expected a StoreError"

    assert trials(save, judge) > 10


def test_prune(trials):
    """A deletion that fails half-way leaves the newest checkpoint, and nothing that counts as one and is none."""

    def prune(trial: Trial) -> Any:
        return Pruner(trial.life.catalog).prune(Retention(1))

    def judge(trial: Trial, outcome: Any) -> str | None:
        if isinstance(outcome, StoreError):
            return "it was tried again, and failed" if trial.is_retried else None
        return None if [entry.step for entry in outcome] == [10] else "pruned something else"

    assert trials(prune, judge) > 4


def test_resume(trials):
    """Resuming takes a whole checkpoint or raises the storage's error: a disk that fails is not a corrupt checkpoint."""

    def resume(trial: Trial) -> Any:
        return resume_from(trial.store)[1]

    def judge(trial: Trial, outcome: Any) -> str | None:
        if isinstance(outcome, StoreError):
            return "it was tried again, and failed" if trial.is_retried else None
        if isinstance(outcome, HarnessError):
            return "expected a StoreError"
        expected = (20,) if trial.is_retried else (20, 10)
        return None if outcome.step in expected and outcome.exact else f"resumed from {outcome.step}"

    assert trials(resume, judge) > 4


def test_claim_attempt(trials):
    """A claim that fails can be made again, and numbers never repeat."""

    def claim(trial: Trial) -> Any:
        return trial.life.catalog.attempts.claim({})

    def judge(trial: Trial, outcome: Any) -> str | None:
        if not isinstance(outcome, Attempt if trial.is_retried else Attempt | StoreError):
            return "expected an attempt, or a StoreError"
        catalog = Catalog(trial.store)
        known = catalog.attempts.all()
        if isinstance(outcome, Attempt) and outcome not in known:
            return "the claim left no trace"
        return (
            None if catalog.attempts.claim({}).number > max(attempt.number for attempt in known) else "a number came twice"
        )

    assert trials(claim, judge) >= 2  # the list, and the put


@pytest.mark.parametrize("deep", [False, True])
def test_list_and_verify(trials, deep):
    """What cannot be read is not reported as corrupt, or as not there."""

    def verify(trial: Trial) -> Any:
        return verify_all(Catalog(trial.store), deep=deep)

    def judge(trial: Trial, outcome: Any) -> str | None:
        if isinstance(outcome, StoreError):
            return "it was tried again, and failed" if trial.is_retried else None
        return (
            None if [(entry.step, entry.state) for entry in outcome] == [(20, "whole"), (10, "whole")] else "a false report"
        )

    assert trials(verify, judge) > 2
