"""The layers that pruning works on: plain `nn.Conv2d`s, chosen by name, and their masks, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse import masks as reading
from fxsparse import names
from fxsparse.errors import FxsparseError

Masks = dict[str, Tensor]
"""By module name: bool, of the weight's shape; True = kept."""


def conv_layers(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> dict[str, nn.Conv2d]:
    """Return the convolutions of a model by name, in its order; one of several names for a shared module.

    Args:
        model: any module.
        include, exclude: exact names, globs or `re:` patterns; `exclude` wins.

    Raises:
        FxsparseError: a rule matches no convolution, or there is none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    chosen = names.matching(include, found, "include") - names.matching(exclude, found, "exclude")
    for name in chosen:
        if "weight" not in found[name]._parameters:
            raise FxsparseError(
                f"'{name}' computes its weight from others. Make that permanent (torch.nn.utils.prune.remove, "
                "parametrize.remove_parametrizations), or exclude the layer."
            )
    if not chosen:
        raise FxsparseError("There is no convolution to prune: the model has no nn.Conv2d that the rules leave.")
    return {name: found[name] for name in found if name in chosen}


def weight_of(model: nn.Module, name: str) -> nn.Parameter:
    """Return the weight that a mask's name means: of the module, or the parameter itself.

    Raises:
        FxsparseError: the model has neither.
    """
    modules = dict(model.named_modules())
    weight = getattr(modules.get(name), "weight", None)
    if weight is None:
        weight = dict(model.named_parameters()).get(name)
    if not isinstance(weight, nn.Parameter):
        known = [known for known, module in modules.items() if isinstance(module, nn.Conv2d)]
        raise FxsparseError(f"The masks name '{name}', which has no weight of its own. {names.near(name, known)}")
    return weight


def checked(model: nn.Module, masks: Mapping[str, Any]) -> Masks:
    """Read masks for a model: bool tensors on the weights' devices.

    Args:
        model: any module.
        masks: by module or parameter name, in the forms of `fxsparse.convert`.

    Raises:
        FxsparseError: a mask does not fit its weight, or names none, or keeps no weight at all.
    """
    if not isinstance(masks, Mapping):
        raise FxsparseError(f"masks is a {type(masks).__name__}. Give a mapping from module names to masks.")
    read: Masks = {}
    for name, given in masks.items():
        weight = weight_of(model, name)
        owner = dict(model.named_modules()).get(name)
        groups = owner.groups if isinstance(owner, nn.Conv2d) else 1
        read[name] = reading.read(name, given, weight, groups).kept
        if not bool(read[name].any()):
            raise FxsparseError(
                f"Mask '{name}' keeps no weight: the layer would compute nothing. Keep at least one, or remove the "
                "layer from the model."
            )
    return read


def dense_masks(layers: Mapping[str, nn.Conv2d]) -> Masks:
    """Return masks that keep everything."""
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}


def kept_share(masks: Mapping[str, Tensor]) -> float:
    """Return the share of the weights that masks keep, of all layers together."""
    total = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / max(total, 1)


def sparsity(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> dict[str, float]:
    """Return the share of zeros in the weight of each convolution, by name, and of all together under ""."""
    zeros = {name: layer.weight.detach() == 0 for name, layer in conv_layers(model, include, exclude).items()}
    return {"": kept_share(zeros), **{name: float(zero.float().mean()) for name, zero in zeros.items()}}
