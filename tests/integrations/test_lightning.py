"""Lightning with ``Resilient``: killed or stopped in the middle of an epoch, it ends as the run that was left alone."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import harness
from harness.errors import ConfigError, Stopped
from tests.support.cluster import newest
from tests.support.integrations import EXAMPLES, LIBRARIES, killed_thrice, require

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _installed(monkeypatch, tmp_path):
    require("lightning")
    if LIBRARIES:
        monkeypatch.syspath_prepend(LIBRARIES)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [2, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Three ranks are killed, one after the other."""
    ends = killed_thrice(tmp_path, EXAMPLES / "lightning_rings.py", ranks, alike=("module", "optimizer", "scheduler"))
    best = [end["parts"]["loops"]["state"]["callbacks"] for end in ends]
    (scores,) = ({float(value["best_model_score"]) for each in best for value in each.values()},)
    assert len(scores) == 1


@pytest.mark.torchrun
@pytest.mark.parametrize("ranks", [2, 3])
def test_two_optimizers_killed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """Manual optimization: three ranks are killed, one after the other."""
    alike = ("module", "optimizer_0", "optimizer_1")
    straight, _ = killed_thrice(tmp_path, EXAMPLES / "lightning_gan.py", ranks, alike=alike)
    assert straight["step"] == 3 * -(-400 // (5 * ranks))


class Points(Dataset):
    """Each point has noise of its own, drawn when it is read."""

    def __len__(self):
        return 44

    def __getitem__(self, index):
        return torch.tensor([index / 44, 1.0]) + 0.01 * torch.randn(2), torch.tensor([index / 22])


def module(*, optimizers=1):
    import lightning as L

    class One(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Linear(8, 1))

        def training_step(self, batch, _index):
            loss = (self.first(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def validation_step(self, batch, _index):
            self.log("val", (self.first(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]

    class Two(One):
        def __init__(self):
            super().__init__()
            self.second = nn.Linear(1, 1)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for chosen, optimizer in enumerate(self.optimizers()):
                loss = (self.second(self.first(batch[0])) - batch[1]).square().mean() * (1 + chosen)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            self.log("loss", loss)

        def configure_optimizers(self):
            return torch.optim.Adam(self.first.parameters(), lr=1e-2), torch.optim.SGD(self.second.parameters(), lr=1e-2)

    return One() if optimizers == 1 else Two()


def fitted(url, stop, *, at=None, optimizers=1, workers=0, callbacks=list, data=None, **options):
    """Trains to the end, or to a stop after a batch. Returns the trainer and the lines of its log."""
    import lightning as L
    from lightning.pytorch.loggers.logger import DummyLogger

    from harness.integrations.lightning import Resilient

    lines = []

    class Lines(DummyLogger):
        def log_metrics(self, metrics, step=None):
            lines.append((step, dict(metrics)))

    class Asks(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == at:
                stop.ask("the test")

    L.seed_everything(7, verbose=False)
    made = module(optimizers=optimizers)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    trainer = L.Trainer(
        **{**quiet, "max_epochs": 2, "log_every_n_steps": 3, **options},
        logger=Lines(),
        callbacks=[*callbacks(), Asks(), Resilient(url, every_steps=100, stop=stop)],
    )
    training = DataLoader(Points(), batch_size=4, shuffle=True, num_workers=workers)
    validation = DataLoader([(torch.tensor([0.5, 1.0]), torch.tensor([1.0]))] * 4, batch_size=2)
    trainer.fit(made, data() if data else training, *([] if data else [validation]))
    return trainer, lines


def averaging():
    from lightning.pytorch.callbacks import WeightAveraging
    from torch.optim.swa_utils import get_ema_avg_fn

    return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))]


def accumulating():
    from lightning.pytorch.callbacks import GradientAccumulationScheduler

    return [GradientAccumulationScheduler({0: 1, 1: 3})]


def patience():
    from lightning.pytorch.callbacks import EarlyStopping

    return [EarlyStopping("val", patience=1, min_delta=10.0)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"workers": 2}, id="workers"),
        pytest.param({"accumulate_grad_batches": 2, "max_epochs": 4}, id="accumulation"),
        pytest.param({"val_check_interval": 2}, id="validation-within-an-epoch"),
        pytest.param({"optimizers": 2}, id="two-optimizers"),
        pytest.param({"max_steps": 17, "max_epochs": -1}, id="max-steps"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16"),
        pytest.param({"callbacks": averaging}, id="weight-averaging"),
        pytest.param({"callbacks": accumulating}, id="accumulation-that-changes"),
        pytest.param({"callbacks": patience, "max_epochs": 9}, id="early-stopping"),
    ],
)
def test_stopped_twice_in_the_middle_of_an_epoch(options):
    """The same weights, moments and schedule, and each line of the log once."""
    scale = options.get("optimizers", 1)
    alone, expected = fitted("straight", harness.StopRequest(), **options)
    found = []
    for step in (4, 9, None):
        stop = harness.StopRequest()
        lines = []
        if step is None:
            last, lines = fitted("stopped", stop, **options)
        else:
            with pytest.raises(Stopped, match="asked to stop"):
                fitted("stopped", stop, at=step * scale + step * scale % scale, **options)
        found += lines
    straight, stopped = newest("straight"), newest("stopped")
    assert stopped["step"] == straight["step"]
    for name, digest in straight["digests"].items():
        if name.startswith(("module", "optimizer", "scheduler", "WeightAveraging")):
            assert stopped["digests"][name] == digest, name
    assert last.global_step == alone.global_step
    assert found == [line for line in expected if line in found], "the rest of the log is the same"
    assert found, "the last attempt has logged"


def test_a_hook_that_is_not_called(caplog):
    """State that only ``on_save_checkpoint`` would keep is named."""
    import lightning as L

    class Keeps(L.Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["mine"] = 1

    fitted("hook", harness.StopRequest(), callbacks=lambda: [Keeps()], max_epochs=1)
    assert "Keeps.on_save_checkpoint is not called" in caplog.text


def test_what_it_refuses():
    """What would not be exact."""

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Points())

    with pytest.raises(ConfigError, match="with a length"):
        fitted(
            "refused",
            harness.StopRequest(),
            data=lambda: DataLoader(Stream(), batch_size=2),
            limit_val_batches=0,
            max_steps=3,
        )
