"""Whether two whole models agree, and how far they may differ: the yardstick is the dense model's own rounding.

A deep network multiplies rounding errors, by how much depends on its weights, so no fixed tolerance is
honest. The masked dense model in the dtype at hand and the same in the next wider computation (float64 for
float32) differ by that rounding alone; call it r. The converted model sums in another order, so it is off
by another r, and the two differ by up to 2 r; over the 130 models of the zoos the worst was 2.1 r. `FACTOR` r is
allowed, because the largest of a thousand outputs varies from draw to draw, and `FLOOR` eps for models too shallow
to show a stable r.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FACTOR = 4
FLOOR = 8


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far one output is from another.

    Attributes:
        error: largest difference, as a share of the largest value wanted.
        allowed: largest error that rounding explains.
    """

    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """True if the error is within what is allowed (NaN is not)."""
        return self.error <= self.allowed


def largest_error(got: Any, wanted: Any) -> float:
    """Return max |got - wanted| / max |wanted|, the worst of all tensors in two outputs of one structure; NaN stays.

    Raises:
        ValueError: the outputs differ in their number of tensors, in a shape, or `wanted` is not finite.
    """
    gots, wanteds = tensors(got), tensors(wanted)
    if len(gots) != len(wanteds):
        raise ValueError(f"The output has {len(gots)} tensors; {len(wanteds)} are wanted.")
    errors = [0.0]
    for a, b in zip(gots, wanteds, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"The output has shape {tuple(a.shape)}; {tuple(b.shape)} is wanted.")
        if not bool(b.isfinite().all()):
            raise ValueError("The output to compare with is not finite.")
        scale = max(float(b.abs().max()), torch.finfo(torch.float32).tiny)
        errors.append(float((a.double() - b.double()).abs().max()) / scale)
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def tensors(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of an output, in order."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def allowed_error(own_error: float, dtype: torch.dtype, measured_in: torch.dtype = torch.float32) -> float:
    """Return what a different order of summation explains in `dtype`.

    Args:
        own_error: the dense model's error against float64. Rounding grows through the layers by the same factor in
            every dtype, so it is scaled by the dtypes' eps.
        dtype: of the models compared.
        measured_in: dtype in which the dense model ran for `own_error`.
    """
    return torch.finfo(dtype).eps * (FACTOR * own_error / torch.finfo(measured_in).eps + FLOOR)


def own_error(model: nn.Module, *args: Any) -> tuple[Any, float]:
    """Run a model as it is and in float64; return the first output and its error."""
    with torch.no_grad():
        output = model(*args)
        exact = forget_caches(copy.deepcopy(model).double())(*pytree.tree_map(_double, args))
    return output, largest_error(output, exact)


def forget_caches(model: nn.Module) -> nn.Module:
    """Make an eval-mode model compute anew what it keeps from earlier runs; return it.

    Some attention layers cache a bias computed from parameters until the mode changes.
    """
    return model.train().eval()


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
