"""Read a mask, a weight or a shape in the forms that users have them, as the weight matrix [O, K]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fxsparse.errors import FxsparseError

BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def as_groups(groups: Any, rows: int, name: str = "") -> int:
    """Check a number of convolution groups against the number of rows.

    Raises:
        FxsparseError: ``groups`` is not an integer; ``groups`` is below 1 or does not divide ``rows``.
    """
    where = f" of {name!r}" if name else ""
    if isinstance(groups, bool) or not isinstance(groups, (int, np.integer)):
        raise FxsparseError(f"Groups{where} is {groups!r}. Give the convolution's groups, an integer of at least 1.")
    if groups < 1:
        raise FxsparseError(f"Groups{where} is {groups}. Give the convolution's groups, an integer of at least 1.")
    if rows % groups:
        raise FxsparseError(
            f"Groups{where} is {groups}, which does not divide the {rows} rows. Give the convolution's own groups."
        )
    return int(groups)


def as_matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return (O, K) for a weight's shape (O, C / groups, kh, kw) or for (O, K) itself.

    Raises:
        FxsparseError: the shape has not 2 or 4 dimensions, or a dimension is below 1; a dimension is not an
            integer.
    """
    sizes = tuple(shape)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)):
            raise FxsparseError(f"Shape {sizes} has the dimension {size!r}. Give integers.")
    if len(sizes) not in (2, 4):
        raise FxsparseError(
            f"Shape {sizes} has {len(sizes)} dimensions. Give a Conv2d weight's [O, C / groups, kh, kw] or [O, K]."
        )
    if min(sizes) < 1:
        raise FxsparseError(f"Shape {sizes} has a dimension below 1. Give the shape of a weight that is not empty.")
    return int(sizes[0]), math.prod(int(size) for size in sizes[1:])


def _as_array(values: Any, what: str, name: str) -> npt.NDArray[Any]:
    where = f" {name!r}" if name else ""
    if isinstance(values, torch.Tensor):
        tensor = values.detach()
        if tensor.layout != torch.strided:
            tensor = tensor.to_dense()
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor = tensor.float()
        values = tensor.cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise FxsparseError(f"{what}{where} is a {type(values).__name__}. Give a torch.Tensor or a numpy.ndarray.")
    if values.dtype.kind not in "buif":
        raise FxsparseError(f"{what}{where} has dtype {values.dtype}. Give bool, integers or real numbers.")
    if values.ndim not in (2, 4):
        raise FxsparseError(
            f"{what}{where} has shape {values.shape}. Give a Conv2d weight's [O, C / groups, kh, kw] or [O, K]."
        )
    if values.size == 0:
        raise FxsparseError(f"{what}{where} has shape {values.shape}, which holds no weight. Give one of at least 1x1.")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise FxsparseError(f"{what}{where} holds NaN. Give numbers: non-zero is kept, zero is pruned.")
    return values


def as_mask_matrix(mask: Any, name: str = "") -> BoolArray:
    """Return a mask as a contiguous bool array [O, K], True = kept.

    Args:
        mask: torch tensor (any device) or ndarray, [O, C / groups, kh, kw] or [O, K], bool or numbers;
            non-zero means kept.
        name: the layer's name, for the errors.

    Raises:
        FxsparseError: not a tensor or an array, or not of real numbers; wrong number of dimensions, no weight
            at all, or NaN.
    """
    array = _as_array(mask, "Mask", name)
    return np.ascontiguousarray((array != 0).reshape(array.shape[0], -1))


def alive_rows(matrix: BoolArray) -> BoolArray:
    """Return which rows of a bool array [O, K] hold a True, bool [O]."""
    alive: BoolArray = np.logical_or.reduce(matrix, axis=1)
    return alive


def as_energy_matrix(weight: Any, mask: BoolArray, name: str = "") -> FloatArray:
    """Return the energy |w|^2 of the kept weights, [O, K], as whole numbers in float64 of at most 2**24.

    Whole numbers make every sum exact, so that neither the number of threads nor the order of the additions
    can change a decision. Energies under 2**-25 of the largest count as zero.

    Raises:
        FxsparseError: not a tensor or an array, or not of real numbers; not the mask's shape, NaN or
            infinity.
    """
    array = _as_array(weight, "Weight", name)
    matrix = array.reshape(array.shape[0], -1).astype(np.float64)
    where = f" {name!r}" if name else ""
    if matrix.shape != mask.shape:
        raise FxsparseError(
            f"Weight{where} is [{matrix.shape[0]}, {matrix.shape[1]}] as a weight matrix; its mask is "
            f"[{mask.shape[0]}, {mask.shape[1]}]. Give the weight that the mask belongs to."
        )
    if not np.isfinite(matrix).all():
        raise FxsparseError(f"Weight{where} holds infinity. Give finite weights.")
    kept: FloatArray = np.abs(matrix) * mask
    largest = kept.max()
    if largest == 0:
        return np.zeros_like(kept)
    relative: FloatArray = kept / largest
    return np.rint(relative * relative * 2.0**24)
