"""A small convolutional image classifier, on generated images whose classes can be learnt."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from harness.task import Evaluation, Task

CLASSES = 10
Batch = tuple[torch.Tensor, torch.Tensor]


class ConvNet(nn.Module):
    """Two convolutions with pooling, three linear layers. Input (batch, 3, 32, 32), output (batch, 10) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))  # type: ignore[no-any-return]


def generate(samples: int, patterns: torch.Tensor) -> TensorDataset:
    """Images of random classes: the pattern of the class, shifted at random, under noise of three times its strength."""
    labels = torch.randint(CLASSES, (samples,))
    shifts = torch.randint(32, (samples, 2)).tolist()
    images = torch.stack([patterns[label].roll(tuple(shift), (1, 2)) for label, shift in zip(labels, shifts, strict=True)])
    return TensorDataset(images + 3 * torch.randn_like(images) * patterns.std(), labels)


def build(train_samples: int = 4000, test_samples: int = 1000, lr: float = 0.01, momentum: float = 0.9) -> Task:
    """Batch: images, float32 (batch, 3, 32, 32), and labels, int64 (batch,)."""
    # A pattern is a wave of its own direction and colour: shifting changes its phase and not what it is.
    frequencies = torch.randint(1, 5, (CLASSES, 2)) * torch.tensor([1, -1])[torch.randint(2, (CLASSES, 2))]
    grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")) / 32
    waves = torch.cos(2 * torch.pi * torch.einsum("cf,fhw->chw", frequencies.float(), grid))
    patterns = torch.randn(CLASSES, 3, 1, 1) * waves.unsqueeze(1)
    dataset, test = generate(train_samples, patterns), generate(test_samples, patterns)
    model = ConvNet()

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def measure(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"accuracy": accuracy, "test_loss": F.cross_entropy(logits, labels)}

    return Task(
        model=model,
        dataset=dataset,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        loss=loss,
        evaluation=Evaluation(test, measure, metric="accuracy", higher_is_better=True, batch_size=200),
    )
