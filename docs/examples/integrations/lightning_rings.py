"""Lightning: a classifier with a schedule, gradients accumulated over two batches, and ``ModelCheckpoint``."""

import os

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.integrations.lightning import Resilient


class Rings(L.LightningModule):
    """Says in which of four rings a point of the plane lies."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 4))

    def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def rings(samples: int) -> TensorDataset:
    x = torch.randn(samples, 2)
    return TensorDataset(x, (x.norm(dim=1) * 2).long().clamp(max=3))


def main() -> None:
    L.seed_everything(0)
    loaders = DataLoader(rings(800), batch_size=5, shuffle=True), DataLoader(rings(80), batch_size=20)
    trainer = L.Trainer(
        max_epochs=3,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        accumulate_grad_batches=2,
        val_check_interval=0.5,
        logger=False,
        enable_progress_bar=False,
        callbacks=[ModelCheckpoint("runs/best", monitor="val_loss"), Resilient("runs/rings", every_steps=9)],
    )
    trainer.fit(Rings(), *loaders)


if __name__ == "__main__":
    main()
