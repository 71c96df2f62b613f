"""Masks by magnitude, one layer at a time: to try things out on a model that nobody has pruned."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def magnitude_masks(model: nn.Module, density: float) -> dict[str, Tensor]:
    """Return by module name a mask that keeps the largest weights of each `nn.Conv2d`, at least one.

    Args:
        model: any module; not changed.
        density: share of each weight to keep, in [0, 1].

    Returns:
        bool tensors of the weights' shapes, on their devices.
    """
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            size = module.weight.detach().abs().flatten()
            mask = torch.zeros_like(size, dtype=torch.bool)
            mask[size.topk(max(1, round(density * size.numel())), sorted=False).indices] = True
            masks[name] = mask.reshape(module.weight.shape)
    return masks
