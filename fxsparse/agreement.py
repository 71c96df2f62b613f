"""How far the sparse and the vanilla path of a site may lie apart, and where they lie further.

Both add up the same products, in another order. For one output y = sum of n products + bias, let S be the sum of the
products' magnitudes. However a kernel orders its additions, its result is within n·u·S of the exact sum, u being half
the epsilon of the dtype that it accumulates in (Higham, Accuracy and Stability of Numerical Algorithms, 3.1). n counts
kept weights only: adding an exact zero does not round.

A bound that grows with sqrt(n), as random roundings do, would be tighter but wrong: where inputs and weights are
constant (a black border, `torch.ones`), every addition rounds the same way, and the error does grow with n. The bound
with n still finds one dropped weight of typical size, 1 / n of S, while n·n·eps is below the ratio of the largest
input to the mean one, some thousands of kept weights a row in float32. What the packed tensors hold is compared with
the weight bit by bit besides, so a weight that was lost in packing is found whatever its size and dtype.
"""

from __future__ import annotations

import dataclasses
import math
from operator import attrgetter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse import vanilla as vanilla_path

if TYPE_CHECKING:
    from fxsparse.sites import ConvSite

# Relative rounding of both factors together where a backend rounds float32 inputs: 11 and 8 significant bits, which
# may be cut off, not rounded.
_ROUNDED_PRODUCTS = {"tf32": 2.0**-9, "bf16": 2.0**-6}
# Kernels on CUDA may compute by Winograd's transforms, which mix neighbouring outputs. Their error follows the largest
# magnitudes around an output, not its own. This many epsilons of them, and this many pixels around: the widest tile
# has 8 outputs a side, and its inputs reach 2 further.
_TRANSFORM_EPSILONS = 64.0
_TRANSFORM_REACH = 10


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """Where the sparse path of a site is further from the vanilla one than rounding explains; its `str` says so.

    Attributes:
        name: of the site.
        input_shape: of the site's input.
        dtype: of the output.
        absolute: largest absolute error among the outputs beyond what is allowed.
        relative: largest error among them over the magnitude of the vanilla output.
        index: of the largest absolute error in the output: (n, c, y, x), or (c, y, x).
        vanilla, sparse: the two outputs there.
        allowed: absolute error allowed there.
        count: number of outputs beyond what is allowed.
    """

    name: str
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    absolute: float
    relative: float
    index: tuple[int, ...]
    vanilla: float
    sparse: float
    allowed: float
    count: int

    def __str__(self) -> str:
        """Return one sentence with everything."""
        axes = ", ".join("ncyx"[-len(self.index) :])
        return (
            f"The sparse path of '{self.name}' differs from the vanilla one at input {self.input_shape}, "
            f"{str(self.dtype).removeprefix('torch.')}, in {self.count} outputs: largest absolute error "
            f"{self.absolute:.3g} (allowed {self.allowed:.3g}), largest relative error {self.relative:.3g}, at "
            f"({axes}) = {self.index}, where vanilla gives {self.vanilla:.9g} and sparse {self.sparse:.9g}."
        )


def compare(gm: nn.Module, site: ConvSite, source: Tensor, vanilla: Tensor, sparse: Tensor) -> Disagreement | None:
    """Compare the outputs of a site's two paths on one input.

    Args:
        gm: holds the site's tensors.
        site: the site.
        source: its input, [N, C, H, W] or [C, H, W].
        vanilla, sparse: outputs of the two paths, of one shape and dtype.
    """
    weight = attrgetter(site.weight)(gm)
    bias = None if site.bias is None else attrgetter(site.bias)(gm)
    geometry = (site.stride, site.padding, site.dilation, site.groups, site.padding_mode)
    return compare_outputs(site.name, source, weight, bias, vanilla, sparse, *geometry)


@torch.no_grad()
def compare_outputs(
    name: str,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vanilla: Tensor,
    sparse: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> Disagreement | None:
    """Compare two results of one convolution.

    Not compared are outputs where vanilla gives NaN: the sparse path skips pruned weights, and with them the products
    0 * inf. Nor are those of a weight that is not finite, whose products with padding one kernel computes and another
    skips, nor those where a partial sum may overflow, since the order of the additions decides that. An output that
    overflows only when it is rounded to its dtype counts as the largest number there is.

    Returns:
        The disagreement, or None where every output is within what rounding explains.
    """
    if vanilla.shape != sparse.shape or vanilla.dtype != sparse.dtype:
        raise ValueError(f"outputs {vanilla.shape} {vanilla.dtype} and {sparse.shape} {sparse.dtype} cannot compare")
    if not vanilla.numel():
        return None
    wide = torch.float64 if vanilla.dtype == torch.float64 else torch.float32
    geometry = (stride, padding, dilation, groups, padding_mode)
    with torch.autocast(vanilla.device.type, enabled=False):
        # As the kernels see them: autocast has rounded both.
        x = source.to(vanilla.dtype).to(wide).abs()
        w = weight.detach().to(vanilla.dtype).to(wide).abs()
        added = torch.zeros((), dtype=wide, device=x.device) if bias is None else bias.detach().to(wide)[:, None, None]
        allowed = _allowed(x, w, added.abs(), vanilla, geometry)
    v, s = vanilla.to(wide), sparse.to(wide)
    error = _finite(s, vanilla.dtype).sub(_finite(v, vanilla.dtype)).abs_()
    bad = ~(error <= allowed)  # this way round, a NaN of the sparse path is bad
    bad &= ~v.isnan() & allowed.isfinite()
    bad &= ~_overflowed_before_bias(v, s, added, torch.finfo(vanilla.dtype).max)
    if not bool(bad.any()):
        return None
    shown = torch.where(bad, error.nan_to_num(nan=math.inf), -1)
    index = tuple(int(i) for i in torch.unravel_index(shown.argmax(), shown.shape))
    relative = torch.where(bad, shown / v.abs(), -1).max()
    return Disagreement(
        name=name,
        input_shape=tuple(source.shape),
        dtype=vanilla.dtype,
        absolute=float(shown[index]),
        relative=float(relative),
        index=index,
        vanilla=float(v[index]),
        sparse=float(s[index]),
        allowed=float(allowed[index]),
        count=int(bad.sum()),
    )


def _allowed(x: Tensor, w: Tensor, added: Tensor, vanilla: Tensor, geometry: tuple[object, ...]) -> Tensor:
    """Return the error allowed at each output; `x`, `w` and `added` are magnitudes in the accumulating dtype."""
    wide = torch.finfo(x.dtype)
    out = torch.finfo(vanilla.dtype)
    broken = ~w.isfinite().flatten(1).all(1)[:, None, None]
    # An infinity would hide what is allowed where it does not reach.
    x, w = (t.nan_to_num(nan=0, posinf=0) for t in (x, w))
    terms = (w != 0).flatten(1).sum(1).to(x.dtype)[:, None, None] + 1
    terms = terms.masked_fill(broken, torch.inf)
    magnitude = vanilla_path.conv2d(x, w, None, *geometry).clamp_min_(0) + added  # type: ignore[arg-type]
    # Each kernel is off by half an epsilon a term. Tensor cores cut off where a CPU rounds: a whole one.
    rounding = terms * wide.eps * (1 if x.device.type == "cpu" else 2)
    allowed = magnitude * (rounding + _product_rounding(vanilla))
    if _may_transform(x, w, vanilla, geometry):
        spread = vanilla_path.conv2d(x, w.amax((2, 3), keepdim=True).expand_as(w), None, *geometry)  # type: ignore[arg-type]
        around = F.max_pool2d(spread, 2 * _TRANSFORM_REACH + 1, 1, _TRANSFORM_REACH)
        allowed = allowed + _TRANSFORM_EPSILONS * wide.eps * around
    # The output is rounded once by each kernel, and twice where a bias is added to a stored result.
    last = vanilla.to(x.dtype).nan_to_num(posinf=out.max, neginf=-out.max).abs().clamp_max_(out.max)
    allowed = allowed + out.eps * (1.5 * last + added)
    # Kernels may take denormal numbers for zero: inputs, weights, products.
    largest = 1 + x.amax() + (w.amax() if w.numel() else 0)
    return allowed + (terms * wide.tiny * largest + 2 * out.smallest_normal * out.eps)


def _product_rounding(vanilla: Tensor) -> float:
    """Return how far the backend's setting lets a product of two float32 numbers be from exact, relatively."""
    if vanilla.dtype != torch.float32:
        return 0.0
    backend = torch.backends.mkldnn if vanilla.device.type == "cpu" else torch.backends.cudnn
    return _ROUNDED_PRODUCTS.get(backend.conv.fp32_precision, 0.0)


def _may_transform(x: Tensor, w: Tensor, vanilla: Tensor, geometry: tuple[object, ...]) -> bool:
    stride, _, dilation, _, _ = geometry
    sizes = tuple(w.shape[2:])
    return x.device.type != "cpu" and stride == dilation == (1, 1) and sizes in ((3, 3), (5, 5))


def _finite(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Put the largest number of a dtype in the place of infinities."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest)


def _overflowed_before_bias(v: Tensor, s: Tensor, bias: Tensor, largest: float) -> Tensor:
    """Tell where vanilla is infinite because its result was stored before the bias was added to it."""
    return v.isinf() & (v.sign() * (s - bias) >= largest)
