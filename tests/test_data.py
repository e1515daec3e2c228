"""Which samples are trained when, by whom, and what they look like."""

import itertools
import random
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from harness.data import Cursor, Gap, Loader, MicroBatch, Schedule, batches, mix, seed_everything, to_device
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
    assert Schedule(5, 1, 5, None).order(2).tolist() == [0, 2, 3, 4, 1]


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
            assert gap.pass_over() == Gap(0, BATCH, BATCH)
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
    told.leave_out([Gap(0, BATCH, BATCH), Gap(1, 0, BATCH)])
    found = [told.next_step() for _ in range(6)]
    assert [[plain(batch) for batch, _ in step] for step in found] == [
        [] if step in (1, 4) else [straight[step]] for step in range(6)
    ]
    assert len(epochs(told, 1)[0]) == 2  # of the four of the second epoch, one was left out and one is trained
