"""The order of an epoch, computed for a position: a bijection that looks drawn by lot, at any size and at no cost."""

import itertools
import math
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from harness.data.loader import Loader
from harness.data.order import ALGORITHMS, feistel, samples_between
from harness.data.position import SkippedBatch
from harness.data.schedule import Cursor, Schedule
from harness.data.seeding import mix
from harness.errors import ConfigError, Mismatch

HUGE = 10**12
BLOCK = 1 << 14  # of the ledger
BATCH = 64
MIB = 1 << 20


def order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """A whole epoch, as numbers that can be negative."""
    return feistel(np.arange(samples, dtype=np.uint64), samples, seed, epoch).astype(np.int64)


def deviation(counts: np.ndarray, sizes: np.ndarray | float = 1.0) -> float:
    """By how many standard deviations chi-square is off what cells of some sizes give by chance."""
    expected = counts.sum() * sizes / (np.ones_like(counts) * sizes).sum()
    freedom = counts.size - 1
    return (float(((counts - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "seed", "epoch", "expected"),
    [
        (5, 1, 2, [2, 3, 4, 0, 1]),
        (10, 3, 0, [8, 5, 9, 4, 2, 6, 3, 0, 1, 7]),
        (HUGE, 7, 11, [970512185756, 236154099271, 476377362620, 828568892033, 557358706797]),
        (
            (1 << 63) - 1,
            7,
            11,
            [2468029193574213028, 226733684211110274, 6044139674953778154, 4218243584193365311, 2236622722959914420],
        ),
    ],
)
def test_it_never_changes(samples, seed, epoch, expected):
    """A run that is resumed by the next version, with another NumPy, on another machine, must find its order again."""
    places = range(samples) if samples < HUGE else (0, 1, 2, HUGE // 2, HUGE - 1)
    assert feistel(np.array(places, dtype=np.uint64), samples, seed, epoch).tolist() == expected
    assert [by_hand(place, samples, seed, epoch) for place in places] == expected


def by_hand(place: int, samples: int, seed: int, epoch: int) -> int:
    """The same with Python's integers, which never wrap around by themselves."""
    base = math.isqrt(samples - 1) + 1
    base += base % 2
    while True:
        left, right = divmod(place, base)
        for number in range(12):
            drawn = (right * 0x9E3779B97F4A7C15 + mix(seed, epoch, samples, number)) % (1 << 64)
            drawn = (drawn ^ drawn >> 32) * 0xD6E8FEB86659FD93 % (1 << 64)
            left, right = right, (left + ((drawn >> 32) * base >> 32)) % base
        if (place := left * base + right) < samples:
            return place


def test_every_sample_comes_once():
    """For all small sizes, the powers of two, and the sizes beside these."""
    near_powers = {(1 << power) + by for power in range(10, 21) for by in (-1, 0, 1)}
    for samples in itertools.chain(range(1, 1001), sorted(near_powers)):
        assert np.array_equal(np.sort(order(samples, samples, 5)), np.arange(samples)), samples


@pytest.mark.parametrize("samples", [HUGE, HUGE + 1, (1 << 40) - 1, 1 << 62, (1 << 63) - 1])
def test_no_sample_comes_twice_in_a_huge_epoch(samples):
    """Of as many positions as there is time for; all are in range."""
    positions = np.random.default_rng(1).integers(0, samples, 200_000, dtype=np.uint64)
    positions = np.unique(positions)
    found = feistel(positions, samples, 1, 0)
    assert len(np.unique(found)) == len(positions)
    assert int(found.max()) < samples


@pytest.mark.parametrize("samples", [1, 5, 4096, 4097, 10_000])
def test_a_piece_is_a_piece_of_the_whole(samples):
    """Wherever it begins and ends."""
    whole, chance = order(samples, 2, 3), np.random.default_rng(samples)
    for _ in range(50):
        start, stop = sorted(chance.integers(0, samples + 1, 2).tolist())
        assert samples_between("feistel", samples, 2, 3, start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_whole_epoch_by_batches(algorithm):
    """The batches put together are the epoch, with either algorithm; an epoch, a seed or a size more is another order."""
    schedule = Schedule(10_001, 3, 600, None, algorithm=algorithm)
    batches = [schedule.batch(Cursor(4, offset)) for offset in range(0, 10_001, 600)]
    assert np.concatenate(batches).tolist() == schedule.order(4).tolist()
    assert sorted(schedule.order(4).tolist()) == list(range(10_001))
    others = [schedule.order(5), Schedule(10_001, 4, 600, None, algorithm=algorithm).order(4)]
    assert all((schedule.order(4) == other).mean() < 0.01 for other in others)


def test_an_algorithm_that_is_unknown():
    """It is named, with those that are known."""
    with pytest.raises(ConfigError, match="algorithm: expected one of feistel, randperm, found 'sorted'"):
        Schedule(5, 0, 2, None, algorithm="sorted")


# --- what it looks like ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "seeds"), [(2, 2000), (3, 6000), (4, 12_000)])
def test_all_orders_of_a_few_samples_are_equally_frequent(samples, seeds):
    """Over the seeds: an odd permutation comes as often as an even one."""
    found = Counter(tuple(order(samples, seed, 0).tolist()) for seed in range(seeds))
    counts = np.array([found[each] for each in itertools.permutations(range(samples))])
    assert abs(deviation(counts)) < 4


SIZES = [5, 16, 17, 64, 100, 1000, 4096, 1 << 16]


@pytest.mark.parametrize("samples", SIZES)
def test_a_sample_comes_anywhere(samples):
    """Each part of an epoch has as many samples of each part of the data set, over epochs and over seeds."""
    parts, times = min(samples, 16), 6_400_000 // (samples + 6400)
    for of in (lambda number: (1, number), lambda number: (number, 1)):
        counts = np.zeros((parts, parts))
        for number in range(times):
            place = np.arange(samples) * parts // samples
            np.add.at(counts, (place, order(samples, *of(number)) * parts // samples), 1)
        # Each part of each size comes as often as it must: what differs is by chance alone.
        sizes = np.bincount(np.arange(samples) * parts // samples, minlength=parts)
        expected = np.outer(sizes, sizes) / samples * times
        # A permutation leaves (parts - 1)² cells to chance, and less of them than independent draws.
        variance = samples / (samples - 1)
        chi = float(((counts - expected) ** 2 / expected).sum()) / variance
        freedom = (parts - 1) ** 2
        assert abs(chi - freedom) / math.sqrt(2 * freedom) < 5


@pytest.mark.parametrize("samples", [5, 8, 12, 33])
def test_two_places_of_a_small_epoch_have_nothing_in_common(samples):
    """Two samples come to two places as often as any two others do."""
    orders = np.array([order(samples, 2, epoch) for epoch in range(5000)])
    apart = 1.0 - np.eye(samples).ravel()  # one sample is never in both
    for one, other in ((0, 1), (0, samples - 1), (1, samples // 2), (samples - 2, samples - 1)):
        counts = np.bincount(orders[:, one] * samples + orders[:, other], minlength=samples * samples)
        assert not counts[apart == 0].any()
        assert abs(deviation(counts[apart > 0])) < 4.5


@pytest.mark.parametrize("samples", [1000, 4096, 1 << 16, 10**6])
def test_neighbours_have_nothing_in_common(samples):
    """Neither in their distance, nor in which is larger, nor in their parity."""
    found = np.concatenate([order(samples, 5, epoch) for epoch in range(max(1, 200_000 // samples))]).reshape(-1, samples)
    for step in (1, 2, 7, 64):
        one, other = found[:, :-step].ravel(), found[:, step:].ravel()
        limit = 5 / math.sqrt(len(one))
        assert abs(np.corrcoef(one, other)[0, 1]) < limit + 2 / samples
        gaps = (other - one) % samples
        sizes = np.bincount(np.arange(1, samples) * 32 // samples)
        assert abs(deviation(np.bincount(gaps * 32 // samples, minlength=32), sizes)) < 5
        assert abs(((one ^ other) & 1).mean() - 0.5) < limit + 1 / samples


@pytest.mark.parametrize("samples", [1000, 4096, 1 << 16, 10**6])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("epochs", lambda number: (3, number)),
        ("seeds", lambda number: (number, 3)),
        ("powers", lambda number: (1 << number, 0)),
    ],
)
def test_epochs_and_seeds_have_nothing_in_common(samples, name, place):
    """Two orders have a sample in the same place as often as chance has it, and their places are not correlated."""
    del name
    count = max(3, min(40, 2_000_000 // samples))
    orders = [order(samples, *place(number)) for number in range(count)]
    same = sum(int((one == other).sum()) for one, other in itertools.pairwise(orders))
    assert abs(same - (count - 1)) < 5 * math.sqrt(count - 1) + 1
    for one, other in itertools.pairwise(orders):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(samples)


@pytest.mark.parametrize("samples", [HUGE, (1 << 63) - 1])
def test_a_huge_epoch_is_as_mixed(samples):
    """The first batches, over epochs: uniform, and neighbours apart."""
    found = np.concatenate([feistel(np.arange(1000, dtype=np.uint64), samples, 9, epoch) for epoch in range(100)])
    places = (found // np.uint64(samples // 64 + 1)).astype(np.int64)
    assert abs(deviation(np.bincount(places, minlength=64))) < 5
    pairs = places[:-1] * 64 + places[1:]
    assert abs(deviation(np.bincount(pairs, minlength=64 * 64))) < 5


def test_the_last_bits_are_mixed_too():
    """Of samples that lie side by side in a file."""
    found = feistel(np.arange(200_000, dtype=np.uint64), HUGE, 4, 0)
    for modulus in (2, 3, 64, 1000, 1024):
        assert abs(deviation(np.bincount((found % np.uint64(modulus)).astype(np.int64), minlength=modulus))) < 5


# --- a data set that is a formula ------------------------------------------------------------------------------------


class Formula(Dataset):
    """10^12 samples that nobody has stored."""

    def __len__(self) -> int:
        return HUGE

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.randint(1 << 40, ()).item()])


def loader(**options) -> Loader:
    return Loader(Formula(), BATCH, seed=3, fingerprint=False, **options)


def at(offset: int, epoch: int = 0) -> Loader:
    """A loader at a place that would take years to reach."""
    found = loader()
    found.position.begin_epoch(epoch)
    found.position.cursor = Cursor(epoch, offset)
    return found


def taken(loader: Loader, count: int) -> list[list]:
    return [loader.next_step()[0][0].tolist() for _ in range(count)]


def test_the_first_batch_costs_nothing():
    """At any position of any epoch: a few milliseconds (the limit is wide, machines are busy) and less than a megabyte."""
    for cursor in (Cursor(), Cursor(5, HUGE // 2), Cursor(10**6, HUGE - BATCH)):
        schedule = Schedule(HUGE, 3, BATCH, None)
        tracemalloc.start()
        try:
            began = time.perf_counter()
            share = next(schedule.steps(cursor, 0, 1))
            seconds = time.perf_counter() - began
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert len(share[0].indices) == BATCH
        assert peak_bytes < MIB
        assert seconds < 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_it_resumes_anywhere(workers):
    """Within blocks of the ledger and over their ends, also within a batch, and over the end of an epoch."""
    straight = loader(workers=workers)
    first = taken(straight, 2 * BLOCK // BATCH + 2)
    for done in (0, 1, BLOCK // BATCH - 1, BLOCK // BATCH, BLOCK // BATCH + 1, 2 * BLOCK // BATCH):
        killed = loader()
        taken(killed, done)
        resumed = loader()
        resumed.load_state_dict(killed.state_dict())
        assert resumed.samples() == [index for index, _ in first[done]]
        assert taken(resumed, 2) == first[done : done + 2]
    straight.close()


def test_batches_that_divide_no_block():
    """The chain has the same links whenever it was saved and resumed, with any batch size."""
    sizes = (1000, 3000, 20_000, 60_000)
    schedules = [Schedule(HUGE, 3, size, None) for size in sizes]
    found = []
    for schedule in schedules:
        whole, saved = (
            Loader(Formula(), schedule.global_batch_size, seed=3),
            Loader(Formula(), schedule.global_batch_size, seed=3),
        )
        for _ in range(60_000 // schedule.global_batch_size):
            whole.position.hand_out()
            whole.position.note()
            saved.position.hand_out()
            again = Loader(Formula(), schedule.global_batch_size, seed=3)
            again.load_state_dict(saved.state_dict())
            saved = again
        assert whole.state_dict() == saved.state_dict()
        found.append(whole.state_dict())
    assert all(each == found[0] for each in found)


def test_an_epoch_that_was_left_is_the_same_however_often_it_was_saved():
    """At the end of a block, too."""
    states = []
    for saves in (False, True):
        current = loader()
        for _ in range(BLOCK // BATCH):
            current.position.hand_out()
        current.position.note()
        if saves:
            current.state_dict()
        current.end_epoch(0)
        states.append(current.state_dict())
    assert states[0] == states[1]


def test_it_resumes_at_the_end_of_an_epoch():
    """The last samples of one and the first of the next, at 10^12."""
    killed = at(HUGE - BATCH, epoch=7)
    assert len(taken(killed, 1)[0]) == BATCH
    resumed = loader()
    resumed.load_state_dict(killed.state_dict())
    assert resumed.cursor == Cursor(8)
    assert taken(resumed, 2) == taken(killed, 2)


def test_batches_are_left_out():
    """The ledger has no sample of those, and the state has them as gaps; the next start leaves them out again."""
    killed = loader()
    for step in range(2 * BLOCK // BATCH + 3):
        killed.next_step()
        if step in (0, BLOCK // BATCH - 1, BLOCK // BATCH, 2 * BLOCK // BATCH + 1):
            killed.position.skip()
    state = killed.state_dict()
    assert SkippedBatch(*state["gaps"][1]) == SkippedBatch(0, BLOCK - BATCH, BATCH)
    resumed = loader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    with pytest.raises(Mismatch, match="data would be skipped or trained twice"):
        loader().load_state_dict({**state, "left_out": state["left_out"][:-1]})
    back = loader()
    back.position.skipped = resumed.skipped
    assert [bool(back.next_step()) for _ in range(3)] == [False, True, True]


@pytest.mark.parametrize("change", [{"offset": 3 * BATCH}, {"epoch": 1}, {"ledger_at_block": "0"}, {"order": "randperm"}])
def test_the_ledger_finds_a_difference(change):
    """In the position, in what was before, in the algorithm: nothing of the run is lost or trained twice."""
    samples = 3 * BLOCK
    current = Loader(range(samples), BATCH, seed=3)
    taken_batches = BLOCK // BATCH + 2
    for _ in range(taken_batches):
        current.position.hand_out()
        current.position.note()
    state = current.state_dict()
    if "order" in change:
        change = {**change, "ledger_at_epoch": ""}
    with pytest.raises(Mismatch, match="data would be skipped or trained twice"):
        Loader(range(samples), BATCH, seed=3).load_state_dict({**state, **change})


def test_an_order_of_a_later_version_is_refused():
    """It is named; nothing is trained in another order."""
    state = loader().state_dict()
    with pytest.raises(Mismatch, match=r"order: the checkpoint was written with 'feistel-2', this version of harness knows"):
        loader().load_state_dict({**state, "order": "feistel-2"})
