"""Group-column pruning as a rule for `Rounds`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.pruning import refit
from fxsparse.pruning.layers import Masks
from fxsparse.pruning.strips import LayerCost, Strips, choose, mask_of
from fxsparse.regrouping.weight_matrix import BoolArray, IntArray


@dataclasses.dataclass(frozen=True, eq=False)
class GroupColumns:
    """The rule of `fxsparse.prune` with training: strips of |w|^2 up to a budget that shrinks from round to round.

    Attributes:
        labels: by layer, the row group of every row.
        costs: by layer.
        budgets: of each round.
    """

    labels: Mapping[str, IntArray]
    costs: Mapping[str, LayerCost]
    budgets: tuple[float, ...]

    def __repr__(self) -> str:
        """Show what a checkpoint must agree on: measured prices differ from run to run, and come from the masks."""
        return f"GroupColumns({len(self.labels)} layers, {len(self.budgets)} rounds)"

    def masks(self, model: nn.Module, masks: Masks, number: int) -> Masks:
        """Return the masks of a round."""
        strips = {}
        for name, labels in self.labels.items():
            weight = model.get_submodule(name).get_parameter("weight")
            energy = refit.as_numpy((weight * masks[name]).flatten(1)) ** 2
            strips[name] = Strips.of(energy, labels, self.costs[name])
        chosen = choose(strips, self.budgets[number - 1])
        modules = dict(model.named_modules())
        found = {n: mask_tensor(mask_of(strips[n], chosen[n], masks[n].shape), modules[n]) & masks[n] for n in strips}
        return dict(masks) | found


def mask_tensor(mask: BoolArray, module: nn.Module) -> Tensor:
    """Return a mask as a tensor on the device of a module's weight."""
    return torch.from_numpy(np.ascontiguousarray(mask)).to(module.get_parameter("weight").device)
