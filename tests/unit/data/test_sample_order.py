"""Which samples are trained when, by whom, and what they look like."""

import itertools
import json
import random
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, random_split

from harness.data.fetching import batches
from harness.data.fingerprint import others, sketch
from harness.data.loader import Loader
from harness.data.nested import to_device
from harness.data.order import RANDPERM
from harness.data.position import SkippedBatch
from harness.data.schedule import Cursor, MicroBatch, Schedule
from harness.data.seeding import mix, seed_everything
from harness.errors import ConfigError, Corrupt, Mismatch

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

SAMPLES, BATCH = 23, 6  # an epoch is three full batches and one of five
SIZES = [1, 2, 3, 5]


@pytest.fixture
def schedule():
    return Schedule(SAMPLES, seed=3, global_batch_size=BATCH, micro_batch_size=2)


def plans(schedule: Schedule, world_size: int, steps: int, cursor: Cursor | None = None) -> list[list[list[MicroBatch]]]:
    """For each step, the micro-batches of each rank."""
    ranks = [itertools.islice(schedule.steps(cursor or Cursor(), rank, world_size), steps) for rank in range(world_size)]
    return [list(step) for step in zip(*ranks, strict=True)]


def trained(step: list[list[MicroBatch]]) -> list[int]:
    """The samples that a step trains, in the order of the ranks; what weighs nothing is not trained."""
    return [index for rank in step for micro in rank if micro.weight > 0 for index in micro.indices]


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", SIZES)
def test_every_sample_once_an_epoch(schedule, world_size):
    """Over all ranks, at any number of them, for several epochs."""
    steps = plans(schedule, world_size, 3 * schedule.steps_per_epoch())
    for epoch in range(3):
        of_epoch = steps[epoch * 4 : epoch * 4 + 4]
        assert Counter(itertools.chain(*map(trained, of_epoch))) == Counter(range(SAMPLES))
        assert {micro.epoch for step in of_epoch for rank in step for micro in rank} == {epoch}


@pytest.mark.parametrize("world_size", SIZES[1:])
def test_the_same_global_batches_at_any_world_size(schedule, world_size):
    """Each step trains the same samples in the same order, however many share them."""
    assert [*map(trained, plans(schedule, world_size, 11))] == [*map(trained, plans(schedule, 1, 11))]


def test_epochs_and_seeds_have_orders_of_their_own(schedule):
    """No two are alike, and each is always the same."""
    orders = [tuple(Schedule(SAMPLES, seed, BATCH, None).order(epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert tuple(schedule.order(2).tolist()) == tuple(Schedule(SAMPLES, 3, 99, None).order(2).tolist())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 6, 7, 30])
def test_shares_are_fair_and_weights_sum_to_one(schedule, world_size):
    """The shares of a batch differ by one sample at most; each micro-batch weighs by its samples."""
    for step in plans(schedule, world_size, 4):
        batch = len(trained(step))
        shares = [sum(len(micro.indices) for micro in rank if micro.weight > 0) for rank in step]
        assert max(shares) - min(shares) <= 1
        weights = [(micro.weight, len(micro.indices)) for rank in step for micro in rank]
        assert all(weight in (0, pytest.approx(count / batch)) for weight, count in weights)
        assert sum(weight for weight, _ in weights) == pytest.approx(1)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, None])
def test_micro_batches_have_at_most_their_size(micro_batch_size):
    """A share is cut from the front; without a size it stays whole."""
    schedule = Schedule(SAMPLES, 3, BATCH, micro_batch_size)
    for step in plans(schedule, 2, 4):
        for rank in step:
            sizes = [len(micro.indices) for micro in rank]
            full = micro_batch_size or sum(sizes)
            assert all(size == full for size in sizes[:-1])
            assert 1 <= sizes[-1] <= full


def test_a_rank_without_a_sample_goes_along():
    """It has one micro-batch that weighs nothing, since the others wait for its backward pass."""
    step = plans(Schedule(2, 0, 4, None), 5, 1)[0]
    assert sorted(trained(step)) == [0, 1]
    assert [len(rank) for rank in step] == [1] * 5
    assert [rank[0].weight for rank in step].count(0.0) == 3
    assert all(rank[0].indices for rank in step)


@pytest.mark.parametrize("world_size", SIZES)
def test_the_position_is_data(schedule, world_size):
    """From any position, also one reached at another number of ranks, the plan goes on as it would have."""
    straight = plans(schedule, world_size, 9)
    cursor = Cursor()
    for step in range(9):
        assert plans(schedule, world_size, 1, cursor)[0] == straight[step]
        cursor = schedule.after(cursor)


def test_the_arithmetic_of_the_cursor(schedule):
    """The offset counts samples and starts anew with the epoch; a short last batch ends the epoch."""
    assert schedule.after(Cursor(0, 0)) == Cursor(0, 6)
    assert schedule.after(Cursor(2, 12)) == Cursor(2, 18)
    assert schedule.after(Cursor(2, 18)) == Cursor(3, 0)
    exact = Schedule(12, 0, 6, None)
    assert exact.after(Cursor(0, 6)) == Cursor(1, 0)
    assert (schedule.steps_per_epoch(), exact.steps_per_epoch()) == (4, 2)
    large = Schedule(5, 0, 100, None)
    assert large.after(Cursor(7, 0)) == Cursor(8, 0)
    assert large.steps_per_epoch() == 1


def test_an_empty_data_set_is_refused():
    """There is nothing to train, and no epoch would ever end."""
    with pytest.raises(ConfigError, match="found an empty one"):
        Schedule(0, 0, 4, None)


# --- fetching --------------------------------------------------------------------------------------------------------


class Dice(Dataset):
    """Samples that are nothing but random numbers, from all three generators."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        return index, random.random(), float(np.random.rand()), torch.rand(2)


def fetched(schedule: Schedule, steps: int, cursor: Cursor | None = None, *, rank=0, size=1, **options) -> list:
    """What a rank is given in its first steps, as plain values."""
    plan = schedule.steps(cursor or Cursor(), rank, size)
    found = itertools.islice(batches(Dice(), plan, seed=5, **{"workers": 0, **options}), steps)
    return [[([column.tolist() for column in batch], weight) for batch, weight in micro_batches] for micro_batches in found]


def by_sample(steps: list) -> dict:
    """(step, index) → the random numbers of that sample."""
    return {
        (step, index): numbers
        for step, micro_batches in enumerate(steps)
        for (columns, _) in micro_batches
        for index, *numbers in zip(*columns, strict=True)
    }


def test_a_step_gets_what_its_plan_says(schedule):
    """The batches come in the order of the plan, each with its weight."""
    found = fetched(schedule, 6)
    expected = [step[0] for step in plans(schedule, 1, 6)]
    assert [[(columns[0], weight) for columns, weight in step] for step in found] == [
        [(list(micro.indices), micro.weight) for micro in step] for step in expected
    ]


def test_samples_do_not_depend_on_who_fetches_them(schedule):
    """Random augmentation is the same with and without workers, and shared by two ranks."""
    alone = fetched(schedule, 6)
    assert fetched(schedule, 6, workers=2) == alone
    shared = [by_sample(fetched(schedule, 6, rank=rank, size=2)) for rank in range(2)]
    assert {**shared[0], **shared[1]} == by_sample(alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_when_they_are_fetched(schedule, workers):
    """A start in the middle of an epoch gives the samples that would have followed, bit for bit."""
    cursor = schedule.after(schedule.after(Cursor()))
    assert fetched(schedule, 5, cursor, workers=workers) == fetched(schedule, 7)[2:]


def test_augmentation_is_new_in_every_epoch_and_for_every_sample(schedule):
    """No sample looks like another, nor like itself an epoch later."""
    numbers = [str(value) for value in by_sample(fetched(schedule, 8)).values()]
    assert len(set(numbers)) == len(numbers) == 2 * SAMPLES


def states() -> tuple:
    return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_fetching_leaves_the_training_process_its_generators(schedule, workers):
    """Dropout draws the same numbers whether samples draw some or none."""
    seed_everything(11)
    before = states()
    fetched(schedule, 5, workers=workers)
    assert states() == before


def test_batches_are_put_together_by_the_tasks_own_function(schedule):
    """``collate`` gets the list of samples, in workers too."""
    plan = schedule.steps(Cursor(), 0, 1)
    for workers in (0, 1):
        (batch, _), *_ = next(batches(Dice(), plan, seed=0, workers=workers, collate=count_samples))
        assert batch == {"count": 2}


def count_samples(samples: list) -> dict:
    return {"count": len(samples)}


def test_a_sample_that_fails_is_not_swallowed(schedule):
    """An exception in the data set ends the run with its own type and message."""

    class Broken(Dice):
        def __getitem__(self, index: int):
            raise ZeroDivisionError(f"sample {index}")

    with pytest.raises(ZeroDivisionError, match="sample"):
        next(batches(Broken(), schedule.steps(Cursor(), 0, 1), seed=0, workers=0))


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeds_are_well_spread():
    """Neighbouring numbers give unlike seeds, in range, and order matters."""
    seeds = {mix(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_seeds_never_change():
    """A run that is resumed by the next version, on another machine, must find its order again."""
    assert mix(3, 1, 4) == 9149095712600231018
    assert Schedule(5, 1, 5, None, algorithm=RANDPERM).order(2).tolist() == [0, 2, 3, 4, 1]


def test_seeding_reaches_all_three_generators():
    """The same numbers after the same seed, others after another."""

    def drawn(*numbers: int) -> tuple:
        seed_everything(*numbers)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert drawn(4) == drawn(4)
    assert all(a != b for a, b in zip(drawn(4), drawn(5), strict=True))
    assert all(a != b for a, b in zip(drawn(4, 1), drawn(4, 2), strict=True))
    seed_everything(7)
    assert torch.initial_seed() == 7, "what a task's builder is told is the run's own seed"


# --- devices ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: torch.Tensor
    label: list


def test_a_batch_goes_to_the_device_whatever_it_is_made_of():
    """Tensors within tuples, named ones, lists and dictionaries are moved, everything else stays what it is."""
    meta = torch.device("meta")
    batch = {"pair": Pair(torch.zeros(2), [torch.ones(1), "cat"]), "rest": (torch.zeros(1), 5, None)}
    moved = to_device(batch, meta)
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].image.device == moved["pair"].label[0].device == moved["rest"][0].device == meta
    assert (moved["pair"].label[1], moved["rest"][1:]) == ("cat", (5, None))
    assert batch["pair"].image.device.type == "cpu"


def test_a_tensor_data_set_will_do(schedule):
    """torch's own data sets are map-style, and are fetched as any other."""
    dataset = TensorDataset(torch.arange(SAMPLES), torch.arange(SAMPLES) * 2)
    (x, y), _ = next(batches(dataset, schedule.steps(Cursor(), 0, 1), seed=0, workers=0))[0]
    assert torch.equal(y, 2 * x)


# --- the loader ------------------------------------------------------------------------------------------------------


def loader(dataset=None, **options) -> Loader:
    return Loader(dataset or Dice(), BATCH, **{"seed": 5, **options})


def plain(batch: list[torch.Tensor]) -> list:
    return [column.tolist() for column in batch]


def epochs(loader: Loader, count: int) -> list[list]:
    """What an ordinary loop over some epochs is given."""
    return [[plain(batch) for batch in loader] for _ in range(count)]


def indices(batches: list) -> list[int]:
    return [index for batch in batches for index in batch[0]]


def test_a_loader_gives_one_epoch_at_a_time():
    """Every sample once in each, as many batches as it says."""
    found = epochs(loader(), 3)
    assert [len(epoch) for epoch in found] == [len(loader())] * 3
    assert all(sorted(indices(epoch)) == list(range(SAMPLES)) for epoch in found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [0, 1, 3, 4, 6])
def test_a_loader_goes_on_anywhere(done, workers):
    """Within an epoch and between two: what a second one is given after ``load_state_dict`` is what the first would have
    been, random numbers of the samples included, with another number of workers."""
    first, second = loader(), loader(workers=workers)
    straight = [batch for epoch in epochs(loader(), 3) for batch in epoch]
    taken = [plain(first.next_step()[0][0]) for _ in range(done)]
    second.load_state_dict(first.state_dict())
    rest = []
    while second.epoch < 3:
        rest += [plain(batch) for batch in second]
    second.close()
    assert taken + rest == straight


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_killed_stream_is_the_same_with_any_workers_and_ranks(workers, world_size):
    """Two epochs of augmented samples, with a death in the middle of each and a resume from a step before it."""
    found: dict[int, dict[int, list]] = {}
    for rank in range(world_size):
        steps = found[rank] = {}
        current = loader(rank=rank, world_size=world_size, workers=workers)
        step, saved, deaths = 0, (0, current.state_dict()), [3, 6]
        while step < 8:
            if step in deaths:
                deaths.remove(step)
                current.close()  # what was in flight is gone with it
                current = loader(rank=rank, world_size=world_size, workers=workers)
                step = saved[0]
                current.load_state_dict(saved[1])
            batch, weight = current.next_step()[0]
            steps[step] = plain(batch) if weight else []
            step += 1
            if step in (1, 5):
                saved = step, current.state_dict()
        current.close()
    whole = loader()
    for step in range(8):
        shares = [found[rank][step] for rank in range(world_size)]
        joined = [[value for share in shares if share for value in share[column]] for column in range(4)]
        assert joined == plain(whole.next_step()[0][0])


def test_the_weight_of_a_share():
    """The mean of the ranks' weighted mean losses is the mean over the batch."""
    ranks = [loader(TensorDataset(torch.arange(10.0)), rank=rank, world_size=4) for rank in range(4)]
    for _ in range(2):
        for shares in zip(*ranks, strict=True):
            weighted = [share.mean().item() * each.weight for (share,), each in zip(shares, ranks, strict=True)]
            samples = torch.cat([share for (share,), each in zip(shares, ranks, strict=True) if each.weight])
            assert sum(weighted) / 4 == pytest.approx(samples.mean().item())


def test_the_ledger_tells_streams_apart():
    """The same samples in the same order, the same ledger, whatever the batches and ranks; else another."""
    whole, halves, shared = loader(), Loader(Dice(), BATCH // 2, seed=5), loader(rank=1, world_size=3)
    for _ in range(3):
        whole.next_step()
        shared.next_step()
        halves.next_step()
        halves.next_step()
    assert whole.state_dict() == halves.state_dict() == shared.state_dict()
    gap = loader()
    for step in range(3):
        gap.next_step()
        if step == 1:
            assert gap.position.skip() == SkippedBatch(0, BATCH, BATCH)
    assert gap.state_dict()["ledger"] != whole.state_dict()["ledger"]
    loader().load_state_dict(gap.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"seed": 6}, Mismatch, "seed: the checkpoint was written with 6, the loader has 5"),
        ({"samples": 24}, Mismatch, "samples: the checkpoint was written with 24, the loader has 23"),
        ({"offset": 6}, Mismatch, "data would be skipped or trained twice"),
        ({"offset": 18}, Mismatch, "data would be skipped or trained twice"),
        ({"epoch": 1}, Mismatch, "data would be skipped or trained twice"),
        ({"left_out": [[0, 6]]}, Mismatch, "data would be skipped or trained twice"),
        ({"offset": 23}, Corrupt, "impossible position"),
        ({"epoch": -1}, Corrupt, "impossible position"),
        ({"offset": True}, Corrupt, "impossible position"),
    ],
)
def test_a_position_that_is_not_ours(change, error, words):
    """Samples that would be trained twice, or never, are an error at the resume; nothing is changed by it."""
    first, second = loader(), loader()
    first.next_step()
    first.next_step()
    before = second.state_dict()
    with pytest.raises(error, match=words):
        second.load_state_dict({**first.state_dict(), **change})
    assert second.state_dict() == before


def test_a_loader_that_is_told_what_to_leave_out():
    """Those batches are not fetched; the others come as ever."""
    straight = [plain(loader_step[0][0]) for loader_step in itertools.islice(iter(loader().next_step, None), 6)]
    told = loader()
    told.position.skipped = [SkippedBatch(0, BATCH, BATCH), SkippedBatch(1, 0, BATCH)]
    found = [told.next_step() for _ in range(6)]
    assert [[plain(batch) for batch, _ in step] for step in found] == [
        [] if step in (1, 4) else [straight[step]] for step in range(6)
    ]
    assert len(epochs(told, 1)[0]) == 2  # of the four of the second epoch, one was left out and one is trained


# --- a last batch that is left out -----------------------------------------------------------------------------------


def test_a_short_last_batch_is_left_out():
    """Each epoch leaves out other samples, ends a batch earlier, and is divided at any world size as ever."""
    schedule = Schedule(SAMPLES, 3, BATCH, 2, drop_last=True)
    assert schedule.steps_per_epoch() == 3
    whole = [trained(step) for step in plans(schedule, 1, 9)]
    assert [len(batch) for batch in whole] == [BATCH] * 9
    assert [trained(step) for step in plans(schedule, 5, 9)] == whole
    assert [trained(step) for step in plans(schedule, 1, 8, schedule.after(Cursor()))] == whole[1:]
    left_out = [set(range(SAMPLES)) - {*itertools.chain(*whole[3 * epoch : 3 * epoch + 3])} for epoch in range(3)]
    assert len(set(map(frozenset, left_out))) == 3
    assert schedule.after(Cursor(0, 12)) == Cursor(1, 0)
    even = Schedule(12, 0, 6, None, drop_last=True)
    assert (even.after(Cursor(0, 6)), even.steps_per_epoch()) == (Cursor(1, 0), 2)
    with pytest.raises(ConfigError, match="drop_last: expected at least one whole batch; the data set has 5 samples"):
        Schedule(5, 0, 6, None, drop_last=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_drops_the_last_batch_goes_on(workers):
    """From each position, the ledger with it; ``len`` is what an epoch gives."""
    straight = [batch for epoch in epochs(loader(drop_last=True), 3) for batch in epoch]
    assert len(straight) == 3 * len(loader(drop_last=True)) == 9
    for done in (1, 3, 5):
        first, second = loader(drop_last=True), loader(drop_last=True, workers=workers)
        taken = [plain(first.next_step()[0][0]) for _ in range(done)]
        second.load_state_dict(first.state_dict())
        assert taken + [plain(second.next_step()[0][0]) for _ in range(9 - done)] == straight
        second.close()


@pytest.mark.parametrize(
    ("walk", "is_told"),
    [
        (lambda loader: loader, False),
        (lambda loader: list(loader), False),  # noqa: PLW0108  # what holds the batches holds no iterator
        (enumerate, True),
        (lambda loader: enumerate(each for each in loader), True),
        (lambda loader: zip(itertools.count(), loader, strict=False), True),
        (lambda loader: zip(loader, "abcdefgh", strict=False), False),
    ],
)
def test_a_count_that_begins_anew_is_told_of(caplog, walk, is_told):
    """Where a loop goes on within an epoch, and there only."""
    first = Loader(TensorDataset(torch.arange(12.0)), 2)
    for _ in range(2):
        next(iter(first))
    for offset in (0, 2):
        loader = Loader(TensorDataset(torch.arange(12.0)), 2)
        if offset:
            loader.load_state_dict(first.state_dict())
        for _ in walk(loader):
            pass
        assert ("resumes after 2 batches" in caplog.text) == (is_told and bool(offset))


def test_a_resume_that_begins_to_drop_the_last_batch(caplog):
    """Where the rest of the epoch is less than a batch, the epoch is over, and that is told; elsewhere it goes on."""
    first = loader()
    for batches_done, place in ((2, Cursor(0, 12)), (3, Cursor(1, 0))):
        while first.cursor.offset < batches_done * BATCH:
            first.next_step()
        second = loader(drop_last=True)
        second.load_state_dict(first.state_dict())
        assert second.cursor == place
    assert caplog.text.count("epoch 0 ends at sample 18") == 1
    back = loader()
    back.load_state_dict(second.state_dict())
    assert [len(epoch) for epoch in epochs(back, 1)] == [4]


# --- data sets that change -------------------------------------------------------------------------------------------


class Staged(Dice):
    """Samples that depend on what the loop has made of the data set."""

    def __init__(self) -> None:
        self.epoch, self.scale, self.extra, self.options = 0, np.ones(1), torch.zeros(1), {"crop": [1, 2]}
        self.told = TensorDataset(torch.zeros(1))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        state = [self.epoch, float(self.scale[0]), float(self.extra), self.options["crop"][0], float(self.told.tensors[0])]
        return index, torch.tensor([*state, random.random()])


CHANGES = {
    "an attribute": lambda dataset, number: dataset.set_epoch(number),
    "an array": lambda dataset, number: dataset.scale.fill(number),
    "a tensor": lambda dataset, number: dataset.extra.fill_(number),
    "an item": lambda dataset, number: dataset.options["crop"].__setitem__(0, number),
    "within another": lambda dataset, number: dataset.told.tensors[0].add_(number),
    "nothing": lambda dataset, number: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_workers_see_what_the_loop_changes(change, caplog):
    """Between epochs and within one: the next batch is a changed one, as it is without workers, and after a resume."""

    def walk(workers: int, done: int = 0) -> list:
        current, found = loader(Staged(), workers=workers), []
        for number in range(7):
            if number in (2, 4, 5):
                CHANGES[change](current.dataset, number)
            if number < done:  # by another process, which has died
                current.position.cursor = current.schedule.after(current.cursor)
            else:
                found.append(plain(current.next_step()[0][0]))
        current.close()
        return found

    caplog.set_level("INFO")
    whole = walk(0)
    assert "workers are restarted" not in caplog.text
    assert walk(1) == whole
    assert ("the loader's workers are restarted" in caplog.text) == (change != "nothing")
    assert walk(2, done=3) == whole[3:]


def test_another_data_set_in_its_place():
    """A batch comes from the one that is there now."""
    current = loader(TensorDataset(torch.zeros(SAMPLES)))
    current.next_step()
    current.dataset = TensorDataset(torch.ones(SAMPLES))
    assert current.next_step()[0][0][0].tolist() == [1.0] * BATCH


def test_workers_that_are_started_anew_all_the_time(caplog):
    """It is exact, and slow: that is told, with what it comes from."""
    current = loader(Staged(), workers=1)
    for number in range(21):
        current.dataset.set_epoch(number)
        current.next_step()
    current.close()
    assert caplog.text.count("restarted 20 times because dataset.epoch changed") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_is_told_where_a_sample_is_fetched(workers):
    """``tells_epoch``: also to workers that are an epoch ahead of the loop, and to a data set within another."""
    current = loader(Subset(Staged(), range(SAMPLES)), tells_epoch=True, workers=workers)
    for epoch in (0, 1, 2):
        for _, values in current:
            assert set(values[:, 0].tolist()) == {epoch}
    current.close()
    assert current.fetcher.changes == 0


def test_a_length_that_changes_is_refused():
    """Samples beyond the old one would never be trained, and nobody would know."""
    values = [1.0] * SAMPLES
    current = loader(values)
    epochs(loader(values), 1)
    for _ in current:
        pass
    values.append(2.0)
    with pytest.raises(ConfigError, match="epoch 1: the data set has 24 samples, but had 23 when its Loader was made"):
        next(iter(current))


# --- random numbers of a collate -------------------------------------------------------------------------------------


def mixed(samples: list) -> tuple[torch.Tensor, list[float]]:
    """Mixes the samples of a batch with each other, as mixup does."""
    values = torch.stack([torch.as_tensor(sample[0], dtype=torch.float64) for sample in samples])
    share = torch.rand(()) + random.random() + np.random.rand()
    return share * values + (1 - share) * values[torch.randperm(len(values))], [float(share)]


class Named(TensorDataset):
    """A data set of torch's with another name."""


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(SAMPLES)),
        Named(torch.arange(SAMPLES)),
        Subset(TensorDataset(torch.arange(SAMPLES)), range(SAMPLES)),
        Dice(),
    ],
    ids=["tensors", "subclass", "subset", "random"],
)
def test_a_collate_that_draws(dataset, micro_batch_size):
    """Its numbers are those of the batch: with any number of workers, after a resume, with no trace in the training."""

    def walk(workers: int, done: int = 0) -> list:
        current = loader(dataset, workers=workers, collate=mixed, micro_batch_size=micro_batch_size)
        current.position.cursor = Cursor(0, done * BATCH)
        found = [[(values.tolist(), share) for (values, share), _ in current.next_step()] for _ in range(6 - done)]
        current.close()
        return found

    seed_everything(3)
    before = states()
    whole = walk(0)
    assert states() == before
    shares = [share[0] for step in whole for _, share in step]
    assert len(set(shares)) == len(shares)
    assert walk(2) == whole
    assert walk(1, done=3) == whole[3:]


# --- what a loop may do ----------------------------------------------------------------------------------------------


def test_batches_are_counted_within_their_epoch():
    """From 0, also after a restart in the middle, where ``enumerate`` would begin anew; saving does not move it."""
    first = loader()
    assert first.batch == -1
    for _ in first:
        first.state_dict()
    assert (first.batch, first.cursor) == (3, Cursor(1, 0))
    first.next_step()
    first.next_step()
    assert first.batch == 1
    second = loader()
    second.load_state_dict(first.state_dict())
    assert second.batch == 1
    assert [second.batch for _ in second] == [2, 3]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_once(workers):
    """The batch comes with the next try, and nothing is left out: neither by the loader nor by the end of an epoch."""

    class Once(Dice):
        """It fails in the third batch, until it is mended."""

        bad = frozenset(loader().schedule.order(0)[2 * BATCH : 3 * BATCH].tolist())

        def __getitem__(self, index: int):
            if index in self.bad:
                raise OSError(f"sample {index}")
            return super().__getitem__(index)

    current, straight = loader(Once(), workers=workers), epochs(loader(), 1)[0]
    seed_everything(11)
    before = states()
    found = [plain(batch) for batch in itertools.islice(current, 2)]
    with pytest.raises(OSError, match="sample"):
        current.next_step()
    assert states() == before
    with pytest.raises(ConfigError, match="epoch 0: a batch could not be fetched, and the loop continued without the rest"):
        current.end_epoch(0)
    current.dataset.bad = frozenset()
    found += [plain(batch) for batch in current]
    current.end_epoch(0)
    current.close()
    assert found == straight


def test_a_second_walk_within_an_epoch_is_refused():
    """It is the next epoch already, which the loop over the epochs would then leave out."""
    current = loader()
    epochs(current, 2)
    with pytest.raises(ConfigError, match="epoch 0: the loop iterated over the loader 2 times"):
        current.end_epoch(0)


def test_iterators_share_one_position():
    """Two of them, and one that is never finished, give each batch once, in order."""
    current, straight = loader(), epochs(loader(), 1)[0]
    one, other = iter(current), iter(current)
    found = [plain(next(one)), plain(next(other)), plain(next(one))]
    del one
    assert [*found, *map(plain, other)] == straight


# --- what the samples look like --------------------------------------------------------------------------------------


def split(seed: int, kind: type = TensorDataset) -> Subset:
    """A training set, cut from another by chance."""
    whole = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    return random_split(kind(whole), [150, 50], torch.Generator().manual_seed(seed))[0]


def test_another_split_is_refused():
    """A resume that would train samples that it was to be judged by says so, and changes nothing."""
    first = Loader(split(0), BATCH)
    saved = first.state_dict()
    assert len(saved["fingerprint"]) == 3
    Loader(split(0), BATCH, workers=1).load_state_dict(saved)
    second = Loader(split(1), BATCH)
    before = second.state_dict()
    with pytest.raises(Mismatch, match=r"the data set has changed .*give random_split a seeded generator"):
        second.load_state_dict(saved)
    assert second.state_dict() == before
    free = Loader(split(1), BATCH, fingerprint=False)
    free.load_state_dict(saved)
    Loader(split(1), BATCH).load_state_dict(free.state_dict())


def test_an_older_position_has_no_fingerprint():
    """It is taken over as ever, and has one from then on."""
    saved = loader().state_dict()
    fingerprint = saved.pop("fingerprint", None)
    current = loader()
    current.load_state_dict(saved)
    assert current.state_dict()["fingerprint"] == fingerprint is not None


def test_a_fingerprint_costs_three_samples_once(monkeypatch):
    """Each is fetched twice; the generators, and the batches, are as without."""
    fetches = []

    class Counted(Dice):
        def __getitem__(self, index: int):
            fetches.append(index)
            return super().__getitem__(index)

    seed_everything(11)
    before = states()
    current = loader(Counted())
    current.state_dict()
    current.state_dict()
    assert len(fetches) == 2 * len(set(fetches)) == 6
    assert states() == before
    assert epochs(current, 1) == epochs(loader(fingerprint=False), 1)
    late = loader(Counted())
    late.next_step()
    assert "fingerprint" not in late.state_dict()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "fingerprint" not in loader(rank=0, world_size=1).state_dict(), "each rank may have data of its own"


class Own(Dice):
    """Augmentation from a generator that nobody seeds; half of the time it changes nothing."""

    def __init__(self, share: float) -> None:
        self.generator, self.share = np.random.default_rng(), share

    def __getitem__(self, index: int):
        return torch.full((3,), float(index) + (self.generator.random() < self.share))


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_samples_that_are_others_each_time_are_not_refused(share, caplog):
    """Nor at a resume that has caught them alike; that the run is not exact is told."""
    for _ in range(100):
        first, second = loader(Own(share)), loader(Own(share))
        second.load_state_dict(first.state_dict())
    assert "of the data set differs each time it is fetched, so a resumed run trains on other" in caplog.text


def test_samples_that_cannot_be_fetched_have_no_fingerprint():
    """The training meets the error, and tells of it."""

    class Broken(Dice):
        def __getitem__(self, index: int):
            raise ZeroDivisionError

    current = loader(Broken())
    assert "fingerprint" not in current.state_dict()
    with pytest.raises(ZeroDivisionError):
        current.next_step()


class Picture:
    """What PIL's images offer."""

    def __init__(self, values: np.ndarray) -> None:
        self.__array_interface__ = values.__array_interface__
        self.values = values


VALUES = np.random.default_rng(1).random((8, 8, 3))
SAMPLES_OF_ALL_KINDS = [
    ("text", "texts"),
    (b"bytes", b"others"),
    (3, 4),
    (True, False),
    (np.int64(100_000), np.int64(100_001)),
    (1.5, 1.51),
    (torch.tensor(100_000), torch.tensor(100_001)),
    (VALUES, VALUES[::-1]),
    (torch.tensor(VALUES).bfloat16(), torch.tensor(VALUES).flip(0).bfloat16()),
    (torch.tensor(VALUES[0]).to(torch.complex64), torch.tensor(VALUES[1]).to(torch.complex64)),
    (np.array([1.0, np.nan, np.inf]), np.array([1.0, np.inf, np.nan])),
    (Picture((VALUES * 255).astype(np.uint8)), Picture((VALUES[::-1] * 255).astype(np.uint8))),
    ({"image": VALUES, "label": 1}, {"image": VALUES, "label": 2}),
    (Pair(torch.zeros(2), [1, "cat"]), Pair(torch.zeros(2), [1, "dog"])),
    (torch.arange(50_000) % 997, torch.arange(50_000) % 991),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
    ([], [0]),
]


@pytest.mark.parametrize(("one", "other"), SAMPLES_OF_ALL_KINDS, ids=[str(n) for n in range(len(SAMPLES_OF_ALL_KINDS))])
def test_a_sketch_knows_a_sample(one, other):
    """It is the same for the same sample, another one for another, and goes through a manifest."""
    drawn = json.loads(json.dumps(sketch(one), allow_nan=False))
    assert others([[0, drawn]], [(0, sketch(one))]) == []
    assert others([[0, drawn]], [(0, sketch(other))]) == [0]
    assert others([[0, drawn]], [(1, sketch(other))]) == []


def test_a_sketch_passes_over_rounding():
    """Another processor's exponential, another library's decoder: no reason to refuse a resume."""
    image = torch.tensor(VALUES)
    noise = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - 0.5
    assert others([(0, sketch(image))], [(0, sketch(image + 0.004 * noise))]) == []
    assert others([(0, sketch(image))], [(0, sketch(image.exp().log().float()))]) == []


def test_what_a_sketch_cannot_read_it_passes_over():
    """An object of the data set's own says nothing."""
    assert sketch([object(), None, torch.ones(1)]) == sketch([None, torch.ones(1)])


# --- the default device ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_default_device_that_is_another(workers):
    """Order and samples are made on the CPU, with the numbers of the CPU."""
    straight = epochs(loader(), 1)
    drawn = torch.randperm(99, generator=torch.Generator().manual_seed(mix(SAMPLES, workers)))
    torch.set_default_device("meta")
    try:
        assert Schedule(99, SAMPLES, BATCH, None, algorithm=RANDPERM).order(workers).tolist() == drawn.tolist()
        current = loader(workers=workers)
        second = loader()
        second.load_state_dict(current.state_dict())
        assert epochs(current, 1) == straight
        current.close()
    finally:
        torch.set_default_device(None)
