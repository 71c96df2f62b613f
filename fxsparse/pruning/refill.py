"""Refill and refill+ (Chen et al. 2022, arXiv 2202.04736): whole channels in place of scattered weights.

A layer that keeps the weights of k channels gets k channels back whole, the best by a criterion; refill+ takes some
more. The published code measures the feature maps of its first layer for every layer, and views their batch as the
channels; here each layer is scored by its own maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import FxsparseError
from fxsparse.inputs import unchanged_state
from fxsparse.pruning import ranks
from fxsparse.pruning.layers import Masks, checked, weight_of

CRITERIA = ("weight_l1", "remaining", "feature_l1", "feature_l2", "saliency")


def refill(
    model: nn.Module,
    masks: Mapping[str, Any],
    *,
    criterion: str = "weight_l1",
    extra: float = 0.0,
    data: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Masks:
    """Replace each mask by whole output channels of about the same number of weights.

    Args:
        model: with the trained weights; not changed.
        masks: unstructured ones, by module name; not changed.
        criterion: what ranks the channels: "weight_l1" (sum of |w| of the trained weights), "remaining" (weights that
            the mask keeps), "feature_l1", "feature_l2" (sums of |y| or y^2 of the channel's feature map) or "saliency"
            (sum of |y · dL/dy|). Equal channels: the first.
        extra: refill+: this share of the other channels is kept too, in [0, 1).
        data: for the last three: batches, each a tensor, a tuple of arguments or a dict of keyword arguments, or
            whatever `loss` takes.
        loss: for "saliency": `loss(model, batch)` returns the loss, a scalar.

    Returns:
        The new masks.

    Raises:
        FxsparseError: the criterion is unknown or lacks its data, or a mask does not fit.
    """
    if criterion not in CRITERIA:
        raise FxsparseError(f"criterion='{criterion}' is not known. Choose one of {', '.join(CRITERIA)}.")
    if isinstance(extra, bool) or not 0 <= extra < 1:
        raise FxsparseError(f"extra={extra!r} is no share. Give the share of the other channels to keep, in [0, 1).")
    read = checked(model, masks)
    if criterion == "weight_l1":
        scores = {name: weight_of(model, name).detach().abs().flatten(1).sum(1).double() for name in read}
    elif criterion == "remaining":
        scores = {name: mask.flatten(1).sum(1).double() for name, mask in read.items()}
    else:
        scores = _of_features(model, read, criterion, data, loss)
    result = {}
    for name, mask in read.items():
        channels = mask.shape[0]
        whole = float(mask.sum()) / mask[0].numel()
        count = max(1, int(whole + (channels - whole) * extra))
        best = scores[name].argsort(descending=True, stable=True)[:count]
        result[name] = torch.zeros_like(mask)
        result[name][best] = True
    return result


def _of_features(
    model: nn.Module,
    masks: Masks,
    criterion: str,
    data: Iterable[Any] | None,
    loss: Callable[[nn.Module, Any], Tensor] | None,
) -> dict[str, Tensor]:
    """Score every channel of the masked layers by its feature map, summed over the batches, and over the ranks."""
    if data is None:
        raise FxsparseError(f"criterion='{criterion}' looks at feature maps. Give data: some batches of inputs.")
    if criterion == "saliency" and loss is None:
        raise FxsparseError("criterion='saliency' needs the gradient of a loss. Give loss: loss(model, batch).")
    maps: dict[str, list[Tensor]] = {name: [] for name in masks}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if criterion == "saliency":
                output.retain_grad()
            maps[name].append(output)

        return hook

    modules = dict(model.named_modules())
    scores = {name: torch.zeros(mask.shape[0], dtype=torch.float64) for name, mask in masks.items()}
    batches = 0
    before = {name: parameter.grad for name, parameter in model.named_parameters()}
    handles = [modules[name].register_forward_hook(keep(name)) for name in masks]
    for parameter in model.parameters():
        parameter.grad = None  # the user's own must not be added to
    try:
        with unchanged_state(model), torch.set_grad_enabled(criterion == "saliency"):
            for batch in data:
                batches += 1
                if criterion == "saliency":
                    assert loss is not None
                    loss(model, batch).backward()
                else:
                    run(model, batch)
                for name, outputs in maps.items():
                    for output in outputs:
                        scores[name] += _per_channel(output, criterion).cpu()
                    outputs.clear()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            parameter.grad = before[name]
    if not batches:
        raise FxsparseError("data holds no batch. Give at least one.")
    ranks.add_up(scores)
    return scores


def run(model: nn.Module, batch: Any) -> Any:
    """Call a model on a batch: a tensor, a tuple or list of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def _per_channel(output: Tensor, criterion: str) -> Tensor:
    values = output.detach().double()
    if criterion == "feature_l2":
        values = values.square()
    elif criterion == "saliency":
        assert output.grad is not None
        values = (values * output.grad.double()).abs()
    else:
        values = values.abs()
    return values.transpose(0, -3).flatten(1).sum(1)
