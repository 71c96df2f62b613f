"""Iterative magnitude pruning with rewinding (Frankle et al. 2020), on `torch.nn.utils.prune` alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fxsparse.demo.model import prunable

State = dict[str, Tensor]


def snapshot(model: nn.Module) -> State:
    """Return a copy of a model's weights and statistics, to rewind to."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rewind(model: nn.Module, early: Mapping[str, Tensor]) -> None:
    """Put an early snapshot of the unpruned model back; the masks stay."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.endswith("_mask"):
                value.copy_(early[name.removesuffix("_orig")])


def prune_to(model: nn.Module, share: float) -> None:
    """Prune the smallest weights of all prunable convolutions together until this share is kept."""
    convs = prunable(model).values()
    total = sum(conv.weight.numel() for conv in convs)
    alive = sum(int((conv.weight != 0).sum()) for conv in convs)
    prune.global_unstructured(
        [(conv, "weight") for conv in convs],
        pruning_method=prune.L1Unstructured,
        amount=alive - round(share * total),
    )


def prune_by(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Prune what the masks say."""
    for name, conv in prunable(model).items():
        prune.custom_from_mask(conv, "weight", masks[name])


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of a pruned model by the convolution's name, True = kept."""
    return {name: conv.get_buffer("weight_mask") != 0 for name, conv in prunable(model).items()}


def finish(model: nn.Module) -> None:
    """Turn the pruned weights into plain ones with zeros; the model can no longer be rewound."""
    for conv in prunable(model).values():
        prune.remove(conv, "weight")


def kept_share(masks: Mapping[str, Tensor]) -> float:
    """Return the share of the weights that the masks keep together."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
