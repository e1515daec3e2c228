"""A run does not die of the same thing for ever."""

import pytest

from harness.checkpoint.catalog import Catalog
from harness.errors import CrashLoop
from harness.storage.store import open_store
from harness.telemetry import crashes
from harness.telemetry.crashes import Crash


@pytest.fixture
def catalog(tmp_path) -> Catalog:
    return Catalog(open_store(str(tmp_path / "run")))


def die(catalog: Catalog, *deaths: Crash | None) -> None:
    """One attempt after the other; None is one that left no record: preempted, killed, or done."""
    for death in deaths:
        attempt = catalog.attempts.claim({})
        if death is not None:
            crashes.record_crash(catalog, attempt, death)


BAD = Crash(step=7, error="ValueError: bad sample", rank=1, samples=[3, 1, 4])


def test_the_first_deaths_are_no_loop(catalog):
    """Fewer deaths than the limit, or none at all, start the run again as it was."""
    assert not crashes.is_looping(catalog, 3)
    die(catalog, BAD, BAD)
    assert not crashes.is_looping(catalog, 3)


def test_the_same_death_again_is_a_loop_and_once_more_is_the_end(catalog):
    """At the limit the run takes an older checkpoint; beyond it, it stops and names the step and the samples."""
    die(catalog, BAD, BAD, BAD)
    assert crashes.is_looping(catalog, 3)
    die(catalog, BAD)
    with pytest.raises(CrashLoop, match=r"step 7 failed 4 times in a row .* rank 1, .* \[3, 1, 4\].*same_failures=5"):
        crashes.is_looping(catalog, 3)
    assert not crashes.is_looping(catalog, 5)


def test_numbers_do_not_make_another_death(catalog):
    """The process id of a worker, an address: the same sample kills another process each time."""
    for pid, address in ((24846, "0x7f3a"), (24911, "0x55ff"), (9, "0x10")):
        die(
            catalog,
            Crash(7, f"RuntimeError: DataLoader worker (pid {pid}) is killed by signal: Killed. <at {address}>", 0, []),
        )
    assert crashes.is_looping(catalog, 3)


@pytest.mark.parametrize(
    "other", [None, Crash(8, BAD.error, 1, []), Crash(7, "ValueError: another", 1, [])], ids=["no record", "step", "error"]
)
def test_another_end_breaks_the_row(catalog, other):
    """Only the same error at the same step in attempts that follow each other counts."""
    die(catalog, BAD, BAD, other, BAD)
    assert not crashes.is_looping(catalog, 3)


def test_ranks_that_die_differently(catalog):
    """The same error on one of several ranks that left records is the same death."""
    for _ in range(3):
        attempt = catalog.attempts.claim({})
        crashes.record_crash(catalog, attempt, BAD)
        crashes.record_crash(catalog, attempt, Crash(7, "OSError: whatever", 0, []))
    died = crashes.is_looping(catalog, 3)
    assert died


def test_a_record_that_was_cut_says_nothing(catalog):
    """Half a record, as a dying process may leave it on a store that is not atomic, is passed over."""
    die(catalog, BAD, BAD, None)
    attempt = catalog.attempts.all()[-1]
    catalog.store.put(f"attempts/{attempt.id}.crash-0.json", lambda: [b'{"step": 7, "err'], 16)
    assert not crashes.is_looping(catalog, 3)
    assert len(catalog.attempts.all()) == 3
