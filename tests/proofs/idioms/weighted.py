"""torchdata's loader with workers and a weighted sampler; a schedule after the boundary, in bfloat16."""

import torch
from torch import nn
from torch.utils.data import TensorDataset, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import harness

torch.manual_seed(8)
x = torch.randn(64, 6)
data = TensorDataset(x, (x.sum(1) > 1).long())
sampler = WeightedRandomSampler(torch.where(data.tensors[1] == 1, 3.0, 1.0), 64)
loader = StatefulDataLoader(data, 8, sampler=sampler, num_workers=2)
model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=64)
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=5)
state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "loader": loader}
run = harness.Run("run", state, every_steps=5)
for _ in run.epochs(8):
    total = 0.0
    for x, y in loader:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        run.step(loss=loss)
        scheduler.step()
