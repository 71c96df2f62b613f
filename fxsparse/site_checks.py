"""What a conv site calls in the modes TEST and BENCHMARK: both of its paths, compared or timed.

They take tensors and constants alone, so that the code of a graph that calls them stands for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxsparse import timing, vanilla
from fxsparse.agreement import compare_outputs
from fxsparse.errors import FxsparseError

Packed = tuple[Tensor, Tensor, Tensor, Tensor]

_BUDGET_S = 0.05
_HEADER = f"{'convolution':<40} {'input':>18} {'vanilla ms':>11} {'sparse ms':>10} {'gain':>7}  path"
_printed: set[str] = set()  # the nodes with a row under the last header


def checked_conv2d(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Packed,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
    path: str,
    name: str,
) -> Tensor:
    """Run a site on both paths and return what `path` gives.

    Raises:
        FxsparseError: the packed weight is not the dense one, or the outputs differ by more than rounding explains.
    """
    geometry = (stride, padding, dilation, groups, padding_mode)
    dense = vanilla.conv2d(source, weight, bias, *geometry)
    sparse = sparse_conv2d(source, weight, bias, packed, *geometry)
    lost = _packed_disagreement(name, weight, packed)
    difference = compare_outputs(name, source, weight, bias, dense.detach(), sparse.detach(), *geometry)
    if lost or difference:
        raise FxsparseError(
            " ".join(str(found) for found in (lost, difference) if found)
            + f" If the weight was written to since it was packed, fxsparse.set_mode(model, 'training') and back packs "
            f"it again. If not, this is a bug of fxsparse: please report it, and leave the convolution out with "
            f"Settings(exclude=('{name}',))."
        )
    return sparse if path == "sparse" else dense


def timed_conv2d(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Packed | None,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
    path: str,
    name: str,
    node: str,
) -> Tensor:
    """Time a site's paths against each other, print a row, and return what `path` gives."""
    geometry = (stride, padding, dilation, groups, padding_mode)
    arms = {"vanilla": lambda: vanilla.conv2d(source, weight, bias, *geometry)}
    if packed is not None:
        arms["sparse"] = lambda: sparse_conv2d(source, weight, bias, packed, *geometry)
    ms = {arm: t.median_ms for arm, t in timing.interleaved(arms, source.device, budget_s=_BUDGET_S).items()}
    key = f"{name} {node}"
    if not _printed or key in _printed:  # a node that comes again begins another forward
        _printed.clear()
        print(_HEADER)
    _printed.add(key)
    shape = "x".join(map(str, source.shape))
    sparse_ms, gain = (f"{ms['sparse']:.4f}", f"{ms['vanilla'] / ms['sparse']:.2f}x") if packed else ("-", "-")
    print(f"{name:<40} {shape:>18} {ms['vanilla']:>11.4f} {sparse_ms:>10} {gain:>7}  {path}")
    return arms[path]()


def begin_table() -> None:
    """Let the next row of a benchmark come with a header."""
    _printed.clear()


def sparse_conv2d(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    packed: Packed,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> Tensor:
    """Convolve on packed tensors; of `weight` only the shape counts."""
    shape = list(weight.shape)
    result: Tensor = torch.ops.fxsparse.conv2d.default(
        source, *packed, bias, shape, stride, padding, dilation, groups, padding_mode
    )
    return result


def _packed_disagreement(name: str, weight: Tensor, packed: Packed) -> str:
    """Say where the packed weight is not the dense one; "" if it is, bit by bit (NaN equals NaN)."""
    unpacked = torch.ops.fxsparse.unpack(*packed, list(weight.shape))
    differs = (unpacked != weight) & ~(unpacked.isnan() & weight.isnan())
    count = int(differs.sum())
    if not count:
        return ""
    index = tuple(int(i) for i in differs.nonzero()[0])
    return (
        f"The packed weight of '{name}' differs from the dense one in {count} places, first at (o, c, r, s) = {index}: "
        f"{float(unpacked[index]):.9g}, not {float(weight[index]):.9g}."
    )
