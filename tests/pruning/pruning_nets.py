"""What the pruning tests share: a small net, images with a rule behind their labels, and a training step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Three convolutions, the last of two groups, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, 32, 1, groups=2)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.body(F.relu(self.stem(x)))))
        logits: Tensor = self.head(F.relu(self.last(x)).mean((2, 3)))
        return logits


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images [count, 3, 8, 8] and which of four corners is brightest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = torch.randint(0, 4, (count,), generator=generator)
    for i in range(count):
        top, left = 4 * (int(y[i]) // 2), 4 * (int(y[i]) % 2)
        x[i, :, top : top + 4, left : left + 4] += 1.0
    return x, y


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    x, y = images(16 * count, seed)
    model.train()
    for part, labels in zip(x.split(16), y.split(16), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(part), labels).backward()
        optimizer.step()
