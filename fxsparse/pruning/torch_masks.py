"""Masks from `torch.nn.utils.prune` and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import prune

from fxsparse.errors import FxsparseError
from fxsparse.pruning.layers import Masks, checked


def from_torch(model: nn.Module) -> Masks:
    """Return the masks that `torch.nn.utils.prune` holds on a model's weights, by module name, True = kept."""
    return {
        name: (module.get_buffer("weight_mask") != 0).clone()
        for name, module in model.named_modules()
        if "weight_mask" in module._buffers
    }


def to_torch(model: nn.Module, masks: Mapping[str, Any]) -> None:
    """Put masks on a model as `torch.nn.utils.prune` holds them, so that its functions work on them.

    Args:
        model: changed in place: `weight` becomes `weight_orig` and `weight_mask`. A mask that is there already is
            multiplied by the new one.
        masks: by module name.

    Raises:
        FxsparseError: a name is no module's, or a mask does not fit the module's weight.
    """
    modules = dict(model.named_modules())
    for name in masks:
        if name not in modules:
            raise FxsparseError(
                f"The masks name '{name}', which is no module. torch.nn.utils.prune puts masks on modules: give "
                "module names."
            )
    pruned = {name for name in masks if "weight_mask" in modules[name]._buffers}
    plain = checked(model, {name: mask for name, mask in masks.items() if name not in pruned})
    for name in masks:
        mask = plain[name] if name in plain else masks[name]
        prune.custom_from_mask(modules[name], "weight", mask)


def make_permanent(model: nn.Module) -> Masks:
    """Turn what `torch.nn.utils.prune` has pruned into plain weights with zeros; return the masks.

    Args:
        model: changed in place: `weight_orig` and `weight_mask` become `weight`.
    """
    found = from_torch(model)
    for name in found:
        module = model.get_submodule(name)
        prune.remove(module, "weight")
        # A NaN or infinity in a pruned place must not survive the product with its mask.
        module.get_parameter("weight").data.masked_fill_(~found[name], 0)
    return found
