"""A generator, a discriminator, an optimizer for each, and a moving average of the generator."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

EPOCHS = 6


def circle(samples: int = 1600) -> TensorDataset:
    """Points near a circle."""
    angle = torch.rand(samples) * 6.2832
    return TensorDataset(torch.stack([angle.cos(), angle.sin()], dim=1) + 0.05 * torch.randn(samples, 2))


def net(inputs: int, outputs: int) -> DistributedDataParallel:
    return DistributedDataParallel(nn.Sequential(nn.Linear(inputs, 64), nn.LeakyReLU(), nn.Linear(64, outputs)))


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    dataset = circle()
    generator, discriminator = net(8, 2), net(2, 1)
    average = AveragedModel(generator.module, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    of_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=8, sampler=sampler)
    judge = nn.functional.softplus
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for (real,) in loader:
            fake = generator(torch.randn(len(real), 8))
            of_fake, of_real = discriminator(torch.cat([fake.detach(), real])).split(len(real))
            loss = (judge(of_fake) + judge(-of_real)).mean()
            of_discriminator.zero_grad()
            loss.backward()
            of_discriminator.step()
            loss = judge(-discriminator(fake)).mean()
            of_generator.zero_grad()
            loss.backward()
            of_generator.step()
            average.update_parameters(generator.module)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
