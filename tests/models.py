"""Small models and masks for the tests, and the oracle: the masked dense model in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Convolution, batch norm, residual add, strided and grouped convolutions, and a classifier."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=bias),
                "bn1": nn.BatchNorm2d(32),
                "conv2": nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=bias),
                "bn2": nn.BatchNorm2d(32),
                "short": nn.Conv2d(16, 32, 1, stride=2),
            }
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = torch.relu(self.block["bn1"](self.block["conv1"](x)))
        y = self.block["bn2"](self.block["conv2"](y)) + self.block["short"](x)
        return self.head(torch.relu(y).mean((2, 3)))


def small_net(**kwargs: bool) -> SmallNet:
    """Return an eval-mode SmallNet with batch-norm statistics that are not the identity."""
    model = SmallNet(**kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def random_masks(model: nn.Module, density: float = 0.1) -> dict[str, Tensor]:
    """Draw an unstructured mask for every convolution, by module name."""
    return {
        name: torch.rand_like(module.weight) < density
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def masked_dense(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return the oracle: a copy of the model with the masks written into its weights."""
    dense = copy.deepcopy(model)
    for name, mask in masks.items():
        dense.get_submodule(name).weight.data.masked_fill_(~mask, 0)
    return dense


def error_in_float64(converted: Tensor, dense: nn.Module, *inputs: Tensor) -> float:
    """Return the largest error against the dense model run in float64, relative to the largest output."""
    with torch.no_grad():
        expected = copy.deepcopy(dense).double()(*(x.double() for x in inputs))
    return ((converted.double() - expected).abs().max() / expected.abs().max()).item()
