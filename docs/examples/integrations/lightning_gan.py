"""Lightning: two optimizers with manual optimization, in a small GAN that learns a ring of points."""

import os

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.integrations.lightning import Resilient


class Gan(L.LightningModule):
    """A generator and a discriminator, each with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], _index: int) -> None:
        generating, judging = self.optimizers()
        judge = nn.functional.binary_cross_entropy_with_logits
        (real,) = batch
        made = self.generator(torch.randn(len(real), 4))
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)

        self.toggle_optimizer(judging)
        loss = judge(self.discriminator(real), ones) + judge(self.discriminator(made.detach()), zeros)
        judging.zero_grad()
        self.manual_backward(loss)
        judging.step()
        self.untoggle_optimizer(judging)

        self.toggle_optimizer(generating)
        loss = judge(self.discriminator(made), ones)
        generating.zero_grad()
        self.manual_backward(loss)
        generating.step()
        self.untoggle_optimizer(generating)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
            torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        ]


def main() -> None:
    L.seed_everything(0)
    angles = torch.rand(400) * 6.3
    ring = TensorDataset(torch.stack([angles.cos(), angles.sin()], dim=1))
    trainer = L.Trainer(
        max_epochs=3,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        strategy="ddp_find_unused_parameters_true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[Resilient("runs/gan", every_steps=9)],
    )
    trainer.fit(Gan(), DataLoader(ring, batch_size=5, shuffle=True))


if __name__ == "__main__":
    main()
