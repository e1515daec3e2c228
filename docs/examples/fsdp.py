"""A transformer in FSDP2: each rank has a part of every weight, of its gradient and of its moments."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import TensorDataset

import harness

EPOCHS, TOKENS, LENGTH = 4, 31, 12


class Transformer(nn.Module):
    """Says of each token of a sequence which one comes next."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True) for _ in range(layers))
        self.output = nn.Linear(width, TOKENS)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(sequence) + self.places(torch.arange(sequence.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(sequence.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask)
        return self.output(hidden)


def counting(samples: int = 600) -> TensorDataset:
    """Sequences that begin anywhere, and go on by 1, 2 or 3 each time."""
    begin, by = torch.randint(TOKENS, (samples, 1)), torch.randint(1, 4, (samples, 1))
    return TensorDataset((begin + by * torch.arange(LENGTH + 1)) % TOKENS)


def main() -> None:
    dist.init_process_group()
    torch.manual_seed(0)
    dataset, model = counting(), Transformer()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = harness.Loader(dataset, global_batch_size=20)
    run = harness.Run("runs/counting", {"model": model, "optimizer": optimizer, "loader": loader}, every_steps=20)
    for epoch in run.epochs(EPOCHS):
        for (sequence,) in loader:
            logits = model(sequence[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), sequence[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.step(loss=loss)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}  loss {loss.item():.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
