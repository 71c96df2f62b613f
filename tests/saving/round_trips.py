"""Round trips through a file for the tests: how to make them, what must be equal, and a graph with all that is hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import random_masks
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxsparse


def converted(model: nn.Module, inputs: Any, density: float = 0.1, **changes: Any) -> nn.Module:
    settings = fxsparse.Settings(calibrate=False, **changes)
    return fxsparse.convert(model.eval(), random_masks(model, density), example_inputs=inputs, settings=settings)


def round_trip(model: nn.Module, folder: Path, **how: Any) -> nn.Module:
    fxsparse.save(model, folder / "model.pt2")
    return fxsparse.load(folder / "model.pt2", **how)


def assert_same(expected: Any, got: Any) -> None:
    """Assert equal structure, and equal bits, dtypes and strides of every tensor."""
    ours, theirs = pytree.tree_flatten(expected), pytree.tree_flatten(got)
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        if isinstance(a, Tensor):
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            assert torch.equal(a, b)
        else:
            assert a == b


def assert_runs_as(model: nn.Module, loaded: nn.Module, *inputs: Any, **named: Any) -> None:
    with torch.no_grad():
        assert_same(model(*inputs, **named), loaded(*inputs, **named))


class Branches(nn.Module):
    """Keyword inputs, a dict of nested outputs, reflect padding, depthwise + 1x1, "same", chunk, concat, one weight
    at two sites, a batch norm that cannot be folded, and modules that do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.reflect = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.twice = nn.Conv2d(16, 16, (3, 2), padding="same")
        self.nothing = nn.Identity()
        self.norm = nn.BatchNorm2d(64)
        self.dropout = nn.Dropout()
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        x = self.nothing(self.reflect(x))
        y = F.relu_(self.pointwise(self.depthwise(x)))
        z = self.twice(self.twice(x))
        left, right = z.chunk(2, 1)
        out = self.dropout(self.norm(torch.cat([y, z, left, right], 1)))
        return {"out": out, "pooled": (out.mean((2, 3)) * scale, [out.size(0)])}
