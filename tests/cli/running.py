"""What the tests run: a module of model factories, and what a run of the command line gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

NETS = """
import torch
from torch import nn
from torch.nn.utils import prune


class Net(nn.Module):
    def __init__(self, classes=10, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Branches(Net):
    def forward(self, x):
        return self.head(self.body(self.stem(x if x.sum().item() < 1e9 else -x)).mean((2, 3)))


class TwoInputs(Net):
    def forward(self, x, y):
        return super().forward(x + y)


class InFloat32(Net):
    def forward(self, x):
        return super().forward(x.to(torch.float32))


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.value = value

    def forward(self, x):
        y = self.body(x)
        return y * self.value if isinstance(self.value, float) else (y > 0)


def chatty():
    print("said by the factory")
    return Net()


def pruned(amount=0.9):
    torch.manual_seed(0)
    net = Net()
    for conv in (net.stem[0], net.body):
        prune.l1_unstructured(conv, "weight", amount=amount)
    return net


def interrupts():
    raise KeyboardInterrupt


def fails(x=1):
    raise RuntimeError("no such dataset\\nsecond line")


def gives_none():
    return None


ready = Net()
number = 3
"""


class Result(NamedTuple):
    """What one run of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What stdout holds, as JSON."""
        return json.loads(self.out)


Run = Callable[..., Result]
