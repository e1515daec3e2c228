"""The examples learn what they are there to learn."""

import time
from pathlib import Path

import fsspec
import pytest
import torch

from harness.data.seeding import seed_everything
from harness.errors import ConfigError
from harness.tasks import convnet, gpt, linear
from tests.support.cluster import harness, read_json, train_here

CONFIGS = Path(__file__).parents[3] / "configs"


def test_linear_recovers_the_line(tmp_path):
    """One plain process, 1000 epochs, seconds, progress every 100 epochs, slope and intercept as they were."""
    began = time.monotonic()
    done = harness("train", str(CONFIGS / "linear.yaml"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 45
    progress = [line for line in done.stderr.splitlines() if "  loss " in line and "step" in line and "samples/s" in line]
    assert [line.split("epoch ")[1].split()[0] for line in progress] == [str(epoch) for epoch in range(100, 1001, 100)]
    last = read_json("inspect", str(tmp_path / "runs" / "linear"))["metrics"]["last"]
    assert last["slope"] == pytest.approx(2, abs=0.05)
    assert last["intercept"] == pytest.approx(1, abs=0.05)


def test_linear_recovers_another_line():
    """It is the data that it learns."""
    task = lambda: linear.build(slope=-3.0, intercept=0.5, noise=0.01)
    last = train_here(task, train={"epochs": 200, "global_batch_size": 100}).last
    assert (last["slope"], last["intercept"]) == (pytest.approx(-3, abs=0.05), pytest.approx(0.5, abs=0.05))


def test_convnet_has_the_shape_it_is_known_for():
    """conv 6@5x5, pool, conv 16@5x5, pool, 120, 84, 10, on 3x32x32."""
    model = convnet.ConvNet()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters() if name.endswith("weight")}
    assert list(shapes.values()) == [(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_convnet_learns_its_classes():
    """From one in ten right to most, on images that it has not seen."""
    task = lambda: convnet.build(train_samples=1200, test_samples=300, lr=0.02)
    progress = train_here(task, train={"epochs": 4, "global_batch_size": 16}, evaluation={"every_epochs": 1})
    assert progress.best["accuracy"] > 0.5


def small(**options):
    """A GPT that a test has time for."""
    return gpt.build(**{"layers": 2, "heads": 2, "width": 32, "context": 32, "warmup_steps": 5, "lr": 3e-3, **options})


def test_gpt_learns():
    """From no idea (8 bits a byte, 5.5 nats) to some in a few dozen steps; the validation loss falls with it."""
    progress = train_here(small, train={"steps": 40, "global_batch_size": 16}, seed=1)
    assert progress.last["loss"] < 3.5
    assert progress.last["val_loss"] < 3.5


def test_gpt_cannot_see_what_comes():
    """The logits of a position do not depend on later bytes."""
    model = gpt.GPT(layers=2, heads=2, width=16, context=16, dropout=0.0).eval()
    tokens = torch.randint(256, (1, 16))
    other = tokens.clone()
    other[0, 9:] = (other[0, 9:] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :9], model(other)[:, :9])
    assert not torch.allclose(model(tokens)[:, 9:], model(other)[:, 9:])


def split(seed: int, **options) -> tuple[list[int], list[int]]:
    """The windows for training and for validation under a seed."""
    seed_everything(seed)
    task = small(**options)
    return list(task.dataset.indices), list(task.evaluation.dataset.indices)


def test_gpt_splits_by_the_seed_alone():
    """The same on every rank and after every restart, whatever the model is like; no window is in both."""
    train, validation = split(3)
    assert split(3) == split(3, layers=3, width=16, dropout=0.5) == (train, validation)
    assert split(4)[1] != validation
    assert set(train).isdisjoint(validation)
    assert len(validation) == (len(train) + len(validation)) // 10


@pytest.mark.parametrize("place", ["memory://texts/alphabet.txt", "file"])
def test_gpt_reads_any_url(tmp_path, place):
    """The windows follow each other through the text; targets are the bytes that follow."""
    url = str(tmp_path / "alphabet.txt") if place == "file" else place
    with fsspec.open(url, "wb") as file:
        file.write(bytes(range(65, 91)) * 10)
    task = small(text=url, context=8, validation_share=0.25)
    assert len(task.dataset) + len(task.evaluation.dataset) == 259 // 8
    tokens, targets = task.dataset.dataset[1]
    assert bytes(tokens.tolist()) == b"IJKLMNOP"
    assert bytes(targets.tolist()) == b"JKLMNOPQ"


def test_gpt_needs_some_text(tmp_path):
    """Two windows at least: what was expected and what was found."""
    (tmp_path / "short.txt").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"args\.text: expected at least 65 bytes, found 5"):
        small(text=str(tmp_path / "short.txt"))


def test_gpt_text_that_is_not_there(tmp_path):
    """One line that says where it was looked for."""
    with pytest.raises(ConfigError, match=r"args\.text: .*missing\.txt"):
        small(text=str(tmp_path / "missing.txt"))


def test_gpt_has_english_text_without_a_download():
    """The language reference that every CPython carries."""
    text = gpt.read_text(None)
    assert len(text) > 100_000
    assert b"The Python" in text or b"expression" in text
