"""Accelerate's plain loop under ``resilient``: killed in the middle of an epoch, it ends as the run that was left alone."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import harness
from harness.errors import ConfigError, Stopped
from tests.support.cluster import newest
from tests.support.integrations import EXAMPLES, LIBRARIES, killed_thrice, require


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    require("accelerate")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)


@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Three ranks are killed, one after the other; gradients are accumulated, also over the last batches of an epoch."""
    alike = ("model", "optimizer", "scheduler")
    straight, _ = killed_thrice(tmp_path, EXAMPLES / "accelerated.py", ranks, alike=alike)
    per_epoch = -(-600 // (4 * ranks))
    assert straight["step"] == 4 * -(-per_epoch // 4)


class Points(Dataset):
    """Each point has noise of its own, drawn when it is read."""

    def __len__(self):
        return 44

    def __getitem__(self, index):
        return torch.tensor([index / 44, 1.0]) + 0.01 * torch.randn(2), torch.tensor([index / 22])


class Sum:
    """What a script adds up, registered for checkpoints."""

    value = 0.0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def trained(url, stop, *, at=None, workers=0, epochs=2):
    """A loop with two optimizers. Returns the sum of all losses, and the epochs that were trained."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from harness.integrations.accelerate import resilient

    set_seed(5)
    accelerator, total = Accelerator(gradient_accumulation_steps=2, cpu=True), Sum()
    model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
    first, second = torch.optim.Adam(model[0].parameters(), lr=1e-2), torch.optim.SGD(model[2].parameters(), lr=1e-2)
    loader = DataLoader(Points(), batch_size=4, shuffle=True, num_workers=workers)
    model, first, second, loader = accelerator.prepare(model, first, second, loader)
    accelerator.register_for_checkpointing(total)
    resilient_run, batches = resilient(accelerator, loader, url, every_steps=100, stop=stop)
    trained_epochs = []
    for epoch in resilient_run.epochs(epochs):
        for x, y in batches:
            with accelerator.accumulate(model):
                loss = (model(x) - y).square().mean()
                accelerator.backward(loss)
                for optimizer in (first, second):
                    optimizer.step()
                    optimizer.zero_grad()
            total.value += loss.item()
            if accelerator.sync_gradients and resilient_run.run.global_step + 1 == at:
                stop.ask("the test")
        trained_epochs.append(epoch)
    resilient_run.close()
    return total.value, trained_epochs


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_in_the_middle_and_at_the_end_of_an_epoch(tmp_path, monkeypatch, workers):
    """Random samples, an uneven number of batches, and what was registered: all continue. A third epoch prolongs the run."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    expected = trained("straight", harness.StopRequest(), workers=workers, epochs=3)
    for step in (3, 6):  # 6 is the last one of an epoch
        with pytest.raises(Stopped, match=f"step {step}"):
            trained("stopped", harness.StopRequest(), at=step, workers=workers)
    assert trained("stopped", harness.StopRequest(), workers=workers)[1] == [1]
    assert trained("stopped", harness.StopRequest(), workers=workers)[1] == [], "there is nothing left to train"
    found = trained("stopped", harness.StopRequest(), workers=workers, epochs=3)
    assert found == (expected[0], [2])
    for name in ("model", "optimizer_0", "optimizer_1", "object"):
        assert newest("stopped")["digests"][name] == newest("straight")["digests"][name], name


def test_what_it_refuses():
    """A loader that Accelerate has not prepared, and a call that comes too early."""
    from accelerate import Accelerator

    from harness.integrations.accelerate import resilient

    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader([1, 2, 3])
    with pytest.raises(ConfigError, match=r"pass it through accelerator.prepare"):
        resilient(accelerator, loader, None)
    with pytest.raises(ConfigError, match=r"after accelerator.prepare"):
        resilient(accelerator, accelerator.prepare(loader), None)
