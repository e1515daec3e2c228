"""A loop with a state of its own: what has been seen decides what is tried next."""

import random

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import harness

STEPS, ARMS = 400, 5


class Belief:
    """How often each arm was tried, and what it gave."""

    def __init__(self) -> None:
        self.tries, self.gains = [1] * ARMS, [0.0] * ARMS

    def choose(self) -> int:
        """Mostly the best arm so far."""
        if random.random() < 0.2:
            return random.randrange(ARMS)
        return max(range(ARMS), key=lambda arm: self.gains[arm] / self.tries[arm])

    def learn(self, arm: int, gain: float) -> None:
        self.tries[arm] += 1
        self.gains[arm] += gain

    def state_dict(self) -> dict:
        return {"tries": self.tries, "gains": self.gains}

    def load_state_dict(self, state: dict) -> None:
        self.tries, self.gains = state["tries"], state["gains"]


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    random.seed(0)
    belief = Belief()
    model = DistributedDataParallel(nn.Sequential(nn.Linear(ARMS, 64), nn.ReLU(), nn.Linear(64, 1)))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2)
    run = harness.Run("runs/bandit", {"model": model, "optimizer": optimizer, "belief": belief}, every_steps=50)
    for _ in run.steps(STEPS):
        arm = belief.choose()
        gain = arm / ARMS + 0.1 * torch.randn(32, 1)
        belief.learn(arm, gain.mean().item())
        loss = nn.functional.mse_loss(model(nn.functional.one_hot(torch.full((32,), arm), ARMS).float()), gain)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(loss=loss)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
