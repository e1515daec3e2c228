"""Orders of the user's own: samples drawn by weights, and the batches of a batch sampler."""

import itertools
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, Dataset, DistributedSampler, RandomSampler, WeightedRandomSampler

from harness.data.loader import Loader
from harness.data.position import SkippedBatch
from harness.data.schedule import Cursor
from harness.data.seeding import mix, seed_everything
from harness.data.weights import Weights
from harness.errors import ConfigError, Mismatch
from tests.support.cluster import newest

# Python 3.12 warns of every fork in a process that has threads, and torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")

SAMPLES = 40
WEIGHTS = [index % 4 * 1.5 for index in range(SAMPLES)]  # every fourth is 0


class Texts(Dataset):
    """Samples of several lengths, with a random number each."""

    def __len__(self) -> int:
        return SAMPLES

    def length(self, index: int) -> int:
        return 1 + index * 7 % 10

    def __getitem__(self, index: int):
        return index, self.length(index), random.random() + float(torch.rand(()))


def by_length(epoch: int):
    """Batches of at most 24 characters, of texts that are about as long, in another order in each epoch."""
    chance = np.random.default_rng(epoch)
    found, batch = [], []
    for index in sorted(chance.permutation(SAMPLES).tolist(), key=Texts().length):
        batch.append(index)
        if sum(map(Texts().length, batch)) > 24:
            found.append(batch[:-1])
            batch = batch[-1:]
    found.append(batch)
    chance.shuffle(found)
    return found


class Staged:
    """A batch sampler with ``set_epoch``, as people write them."""

    def __init__(self):
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from by_length(self.epoch)

    def __len__(self):
        return len(by_length(self.epoch))


KINDS = {
    "weights": lambda: {"global_batch_size": 6, "weights": WEIGHTS},
    "weights-drop-last": lambda: {"global_batch_size": 6, "weights": torch.tensor(WEIGHTS), "drop_last": True},
    "function": lambda: {"batch_sampler": by_length},
    "set-epoch": lambda: {"batch_sampler": Staged()},
    "of-torch": lambda: {"batch_sampler": BatchSampler(RandomSampler(Texts()), 7, drop_last=False)},
    "of-torch-weighted": lambda: {"batch_sampler": BatchSampler(WeightedRandomSampler(WEIGHTS, 50), 7, drop_last=False)},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def loader(kind: str, **options) -> Loader:
    return Loader(Texts(), **{"seed": 5, **KINDS[kind](), **options})


def taken(current: Loader, count: int) -> list:
    """The samples of some steps, and their random numbers; nothing where a rank only goes along."""
    steps = [current.next_step() for _ in range(count)]
    return [
        [each for batch, weight in step if weight for each in zip(*(column.tolist() for column in batch), strict=True)]
        for step in steps
    ]


# --- weights ---------------------------------------------------------------------------------------------------------


def test_each_sample_comes_as_often_as_its_weight_says():
    """Within what chance allows; a sample without a weight never comes. Weights count relative to each other alone."""
    weights, draws = Weights(WEIGHTS, SAMPLES), 400_000
    counts = np.bincount(weights.between(3, 1, 0, draws), minlength=SAMPLES)
    expected = np.array(WEIGHTS) / sum(WEIGHTS) * draws
    assert not counts[expected == 0].any()
    drawn = expected > 0
    freedom = int(drawn.sum()) - 1
    deviation = (((counts - expected)[drawn] ** 2 / expected[drawn]).sum() - freedom) / (2 * freedom) ** 0.5
    assert abs(deviation) < 5
    twice = Weights(np.array(WEIGHTS) * 2, SAMPLES)
    assert (twice.between(3, 1, 0, 1000) == weights.between(3, 1, 0, 1000)).all()


def test_draws_have_nothing_in_common():
    """Neither neighbours, nor epochs, nor seeds."""
    weights, count = Weights(np.ones(1000), 1000), 200_000
    first = weights.between(0, 0, 0, count + 1)
    for one, other in (
        (first[:-1], first[1:]),
        (first[:-1], weights.between(0, 1, 0, count)),
        (first[:-1], weights.between(1, 0, 0, count)),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / count**0.5


def test_draws_never_change():
    """A run that is resumed by the next version, on another machine, must find its draws again."""
    weights = Weights([0.5, 0.0, 2.0, 1.0, 3.25], 5)
    expected = [by_hand(7, 11, position) for position in range(20)]
    assert weights.between(7, 11, 0, 20).tolist() == expected == [4, 4, 3, 3, 4, 0, 3, 2, 0, 0, 2, 0, 2, 4, 4, 4, 4, 4, 4, 4]
    assert weights.between(7, 11, 13, 17).tolist() == expected[13:17]


def by_hand(seed: int, epoch: int, position: int) -> int:
    """The same with Python's integers, which never wrap around by themselves."""
    drawn = (mix(seed, epoch, 5) + (position + 1) * 0x9E3779B97F4A7C15) % (1 << 64)
    drawn = (drawn ^ drawn >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    drawn = (drawn ^ drawn >> 27) * 0x94D049BB133111EB % (1 << 64)
    uniform = ((drawn ^ drawn >> 31) >> 11) / 2**53
    return next(index for index, total in enumerate([0.5, 0.5, 2.5, 3.5, 6.75]) if uniform < total / 6.75)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0] * 39, r"expected one for each of the 40 samples, found the shape \(39,\)"),
        ([1.0] * 39 + [-1.0], r"expected finite numbers from 0, found -1.0 for sample 39"),
        ([float("nan")] + [1.0] * 39, r"found nan for sample 0"),
        ([0.0] * 40, r"expected a finite sum above 0, found 0.0"),
        ([1e308] * 40, r"expected a finite sum above 0, found inf"),
    ],
)
def test_weights_that_cannot_be(weights, words):
    """They are named where the loader is made."""
    with pytest.raises(ConfigError, match=f"weights: .*{words}"):
        Loader(Texts(), 6, weights=weights)


def test_a_sample_that_comes_twice_looks_different():
    """Its random numbers follow from its position, too."""
    steps = taken(Loader(Texts(), 6, seed=5, weights=WEIGHTS), 7)
    found = list(itertools.chain(*steps))
    assert max(Counter(index for index, *_ in found).values()) > 1
    assert len({number for *_, number in found}) == len(found)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["function", "set-epoch"])
def test_the_batches_are_those_of_the_sampler(kind):
    """Epoch by epoch, with their own sizes; ``len`` and ``batch`` go by them."""
    current = loader(kind)
    for epoch in range(3):
        assert len(current) == len(by_length(epoch))
        found = [(current.batch, columns[0].tolist()) for columns in current]
        assert found == list(enumerate(by_length(epoch)))
    sizes = [len(batch) for batch in by_length(0)]
    assert len({*sizes}) > 1
    assert current.schedule.fewest_at_once(1) == min(sizes)
    assert current.schedule.fewest_at_once(SAMPLES) == 1


def test_samplers_of_torch_have_another_order_each_epoch():
    """They draw from torch's generator, which is seeded for the epoch, and is as before afterwards."""
    seed_everything(11)
    before = torch.get_rng_state()
    current = loader("of-torch")
    epochs = [[index for columns in current for index in columns[0].tolist()] for _ in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert torch.equal(torch.get_rng_state(), before)


def stateful():
    """A function that says something else each time."""
    chance = np.random.default_rng(1)
    return lambda epoch: np.split(chance.permutation(SAMPLES), 8)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (iter([[0, 1]]), "found an iterator, which is empty after the first"),
        (stateful(), "expected the same batches each time for the same epoch"),
        (BatchSampler(RandomSampler(Texts(), generator=torch.Generator()), 7, drop_last=False), "expected the same batches"),
        (BatchSampler(DistributedSampler(Texts(), 2, 0), 7, drop_last=False), "found a DistributedSampler"),
        (RandomSampler(Texts()), "batch 0: expected a list of indices, found [0-9]+; for single indices put a BatchSampler"),
        (lambda epoch: [[0], []], "epoch 0, batch 1: expected a list of indices, found an empty one"),
        (lambda epoch: [], "expected at least one batch an epoch, found none in epoch 0"),
        (lambda epoch: [[0, 40]], "expected indices from 0 to 39, found 40 in a batch of epoch 0"),
        (lambda epoch: [[0, -1]], "expected indices from 0 to 39, found -1"),
        (lambda epoch: [[0.5]], r"expected a list of indices, found \[0.5\]"),
        (lambda epoch: itertools.repeat(range(40)), "expected an epoch that ends, found over 10000000 samples"),
    ],
)
def test_batches_that_cannot_be(sampler, words):
    """They are refused where the loader is made."""
    with pytest.raises(ConfigError, match=f"batch_sampler: .*{words}"):
        Loader(Texts(), batch_sampler=sampler)


def test_what_a_batch_sampler_decides():
    """Nobody says it a second time; without it, the size of a batch is needed."""
    with pytest.raises(
        ConfigError, match="batch_sampler decides what a batch has; leave global_batch_size and drop_last out"
    ):
        Loader(Texts(), 6, batch_sampler=by_length, drop_last=True)
    with pytest.raises(ConfigError, match="batch_sampler decides what a batch has; leave weights out"):
        Loader(Texts(), batch_sampler=by_length, weights=WEIGHTS)
    with pytest.raises(ConfigError, match="expected global_batch_size"):
        Loader(Texts())


# --- both ------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_the_same_global_batches_at_any_world_size(kind, world_size):
    """The ranks' shares put together, random numbers of the samples included."""
    whole = taken(loader(kind), 20)
    ranks = [taken(loader(kind, rank=rank, world_size=world_size), 20) for rank in range(world_size)]
    assert [list(itertools.chain(*shares)) for shares in zip(*ranks, strict=True)] == whole
    pieces = taken(loader(kind, micro_batch_size=2), 20)
    assert pieces == whole


@every_kind
@pytest.mark.parametrize("workers", [0, 2])
def test_it_continues_anywhere(kind, workers):
    """Within an epoch and between two, at another world size, with workers that are an epoch ahead."""
    whole = taken(loader(kind), 16)
    for done in (0, 1, 4, len(loader(kind)), 11):
        first = loader(kind, rank=0, world_size=2)
        taken(first, done)
        seed_everything(done)  # whatever the process has drawn
        second = loader(kind, workers=workers)
        second.load_state_dict(first.state_dict())
        assert second.samples() == [index for index, *_ in whole[done]]
        assert taken(second, 16 - done) == whole[done:]
        assert second.state_dict()["ledger"] == advanced(kind, 16)["ledger"]
        second.close()


def advanced(kind: str, steps: int) -> dict:
    current = loader(kind)
    for _ in range(steps):
        current.position.hand_out()
        current.position.note()
    return current.state_dict()


@every_kind
def test_batches_are_left_out(kind):
    """The ledger has none of their samples; the next start leaves them out again."""
    killed, whole = loader(kind), taken(loader(kind), 5)
    for step in range(4):
        killed.next_step()
        if step == 2:
            skipped = killed.position.skip()
    assert skipped == SkippedBatch(0, sum(map(len, whole[:2])), len(whole[2]))
    assert killed.state_dict()["ledger"] != advanced(kind, 4)["ledger"]
    resumed, back = loader(kind), loader(kind)
    resumed.load_state_dict(killed.state_dict())
    assert taken(resumed, 1) == [whole[4]]
    back.position.skipped = resumed.skipped
    assert [bool(back.next_step()) for _ in range(4)] == [True, True, False, True]


@every_kind
@pytest.mark.parametrize("done", [0, 3])
def test_another_order_is_refused(kind, done):
    """At the beginning of an epoch, too, where nothing of it was trained; a plain loader is told apart from both."""
    current, plain = loader(kind), Loader(Texts(), 6, seed=5)
    taken(current, done)
    own = "weights" if kind.startswith("weights") else "batch_sampler"
    others = {
        "weights": Loader(Texts(), 6, seed=5, weights=[1.0] * SAMPLES),
        "batch_sampler": Loader(Texts(), seed=5, batch_sampler=lambda epoch: by_length(epoch + 1)),
    }
    with pytest.raises(Mismatch, match=f"{own}: the checkpoint was written with other {own}; give the Loader what the run"):
        others.pop(own).load_state_dict(current.state_dict())
    for other in others.values():
        with pytest.raises(Mismatch, match="weights: the checkpoint was written with"):
            other.load_state_dict(current.state_dict())
    with pytest.raises(Mismatch, match=f"{own}: the checkpoint was written with {own}, the loader has none"):
        plain.load_state_dict(current.state_dict())
    with pytest.raises(Mismatch, match=f"{own}: the checkpoint was written without {own}, the loader has {own}"):
        loader(kind).load_state_dict(plain.state_dict())


def test_batches_that_change_in_a_later_epoch():
    """Where the first epoch is the same, the ledger and the ends of the batches tell."""
    current = loader("function")
    taken(current, len(current) + 3)
    changed = lambda change: lambda epoch: change(by_length(epoch)) if epoch else by_length(epoch)
    state = current.state_dict()
    for change, words in (
        (lambda batches: batches[1:] + batches[:1], "where no batch begins|trained twice"),
        (
            lambda batches: [[*batches[1], *batches[0][: len(batches[0]) - len(batches[1])]], *batches[1:]],
            "trained twice|no batch",
        ),
        (lambda batches: [[*itertools.chain(*batches)]], "continues at sample [0-9]+ of epoch 1, where no batch begins"),
    ):
        with pytest.raises(Mismatch, match=words):
            Loader(Texts(), seed=5, batch_sampler=changed(change)).load_state_dict(state)
    same = Loader(Texts(), seed=5, batch_sampler=changed(lambda batches: batches))
    same.load_state_dict(state)
    assert same.cursor == current.cursor > Cursor(1)


# --- killed ----------------------------------------------------------------------------------------------------------

# A loop in forks of one process: left alone, and killed after the first save of each attempt.
DRIVER = """
import os, signal, sys, time
from pathlib import Path
import torch, harness
import torch._dynamo  # once, and not in each fork
from tests.unit.data.test_own_order import KINDS, Texts

def train(kind, dies):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    loader = harness.Loader(Texts(), seed=5, collate=lambda samples: torch.tensor(samples), **KINDS[kind]())
    run = harness.Run("run", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=4)
    began = run.global_step
    for _ in run.epochs(3):
        for batch in loader:
            if dies and run.global_step == began + 7:
                while not any(Path("run").glob(f"step-{began + 4:012}-*/manifest.json")):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            loss = ((model(batch[:, 1:]) - batch[:, :1] / 40) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()

for kind in sys.argv[1:]:
    for name, deaths in (("straight", 0), ("killed", 3)):
        os.makedirs(f"{kind}/{name}")
        os.chdir(f"{kind}/{name}")
        for number in range(deaths + 1):
            pid = os.fork()
            if not pid:
                train(kind, number < deaths)
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            assert status == (signal.SIGKILL if number < deaths else 0), status
        os.chdir("../..")
"""


def test_killed_in_the_middle_of_an_epoch(tmp_path):
    """SIGKILL, three times: the weights, the moments and the ledger of the run that was left alone."""
    kinds = ["weights", "function"]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *kinds], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr.count("resuming from step-") == 3 * len(kinds)
    for kind in kinds:
        straight, killed = (newest(tmp_path / kind / name / "run") for name in ("straight", "killed"))
        for part in ("model", "optimizer", "loader"):
            assert killed["digests"][part] == straight["digests"][part], (kind, part)
