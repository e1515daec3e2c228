"""Several steps of two optimizers for one batch, from a memory of what was seen, which is an object of the program's."""

import random
from collections import deque

import torch
from torch import nn
from torch.utils.data import TensorDataset

import harness


class Memory:
    def __init__(self):
        self.seen = deque(maxlen=12)

    def state_dict(self):
        return {"seen": list(self.seen)}

    def load_state_dict(self, state):
        self.seen = deque(state["seen"], maxlen=12)


torch.manual_seed(7)
random.seed(7)
data = TensorDataset(torch.randn(80, 4))
actor, critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
of_actor = torch.optim.ASGD(actor.parameters(), lr=0.01)
of_critic = torch.optim.Adam(critic.parameters(), lr=0.01, amsgrad=True)
memory = Memory()
loader = harness.Loader(data, 4)
state = {"actor": actor, "critic": critic, "of_actor": of_actor, "of_critic": of_critic, "memory": memory, "loader": loader}
run = harness.Run("run", state, every_steps=6)
batches = iter(loader)
for _ in run.steps(70):
    batch = next(batches, None)
    if batch is None:
        batches = iter(loader)
        batch = next(batches)
    memory.seen.append(batch[0] + 0.1 * torch.randn(4, 4))
    for _ in range(3):
        x = random.choice(memory.seen)
        of_critic.zero_grad()
        (critic(actor(x).detach()) - x.sum(1, keepdim=True)).square().mean().backward()
        of_critic.step()
    of_actor.zero_grad()
    loss = -critic(actor(x)).mean() + actor.weight.square().sum()
    loss.backward()
    of_actor.step()
    run.step(loss=loss)
