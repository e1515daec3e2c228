"""A byte-level GPT on the text of any fsspec URL; by default on English text that every CPython carries."""

import importlib
import math

import fsspec
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Subset

from harness.errors import ConfigError
from harness.task import Evaluation, Task

VOCABULARY = 256  # every byte is a token
Batch = tuple[torch.Tensor, torch.Tensor]


class Windows(Dataset[Batch]):
    """Consecutive windows of a text. A sample is the bytes of a window and, for each, the byte that follows: int64
    (context,) twice."""

    def __init__(self, text: bytes, context: int) -> None:
        self.tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.context = context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> Batch:
        start = index * self.context
        window = self.tokens[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    """Attention, then a perceptron, each on the normalized stream and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + F.dropout(self.out(attended.transpose(1, 2).reshape(batch, time, width)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class GPT(nn.Module):
    """A decoder. Input int64 (batch, time), output (batch, time, 256) logits. The embedding and the head are tied."""

    def __init__(self, layers: int, heads: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for name, parameter in self.named_parameters():  # the stream is a sum of 2 * layers terms: keep its variance
            if name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers))
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def read_text(url: str | None) -> bytes:
    """The text at a URL; without one, the language reference that every CPython carries."""
    if url is not None:
        try:
            fs, path = fsspec.core.url_to_fs(url)
            return bytes(fs.cat_file(path))
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"args.text: cannot read {url}: {getattr(error, 'strerror', None) or error}") from None
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def build(
    text: str | None = None,
    layers: int = 4,
    heads: int = 4,
    width: int = 128,
    context: int = 128,
    dropout: float = 0.1,
    lr: float = 1e-3,
    warmup_steps: int = 20,
    decay_steps: int = 1000,
    validation_share: float = 0.1,
) -> Task:
    """``text`` is any fsspec URL. The learning rate rises for ``warmup_steps`` and falls as a cosine to a tenth until
    ``decay_steps``. Which windows are for validation depends on the run's seed."""
    windows = Windows(read_text(text), context)
    if len(windows) < 2:
        raise ConfigError(f"args.text: expected at least {2 * context + 1} bytes, found {len(windows.tokens)}")
    order = torch.randperm(len(windows)).tolist()
    held_out = max(1, int(len(windows) * validation_share))
    model = GPT(layers, heads, width, context, dropout)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    def measure(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"val_loss": loss(model, batch)}

    return Task(
        model=model,
        dataset=Subset(windows, order[held_out:]),
        optimizer=optimizer,
        loss=loss,
        scheduler=lambda optimizer: LambdaLR(optimizer, factor),
        evaluation=Evaluation(Subset(windows, order[:held_out]), measure, metric="val_loss"),
    )
