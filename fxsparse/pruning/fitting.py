"""One layer without training: which columns its row groups keep, and the weights that then come nearest to the dense
layer's output.

Given the inputs' products H = E[x x'] and C = E[x y'] the best weights of a row group on columns S solve one linear
system, H[S, S] w = C[S]. How much worse the fit gets without column j is w_j^2 / (H[S, S]^-1)_jj (Hassibi & Stork
1993), summed over the group's rows: a strip's exact saliency, of which |w|^2 E[x^2] is left if inputs are uncorrelated.
Strips leave in rounds, a share of those that are left at a time, with the weights solved again in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

RIDGE = 1e-2
_DOUBTS, _DOUBTS_WIDE = (0.0, 0.05, 0.2, 0.8, 3.2), (0.0, 0.2, 0.8)  # those that are tried
_SHRINK, _SHRINK_WIDE = 0.75, 0.5  # area after a round over the area before it; of wide layers, to save time
_WIDE = 1200
_JUDGES = 4  # row groups of a wide layer that tell its doubt
_TRIANGLE = 128  # columns of a triangle that LAPACK inverts


@dataclasses.dataclass
class Products:
    """Second moments of the inputs and the wanted outputs of a layer.

    Attributes:
        inputs: float64 [groups, K, K], E[x x'], centred if the layer can add a constant; sums until `finish`.
        cross: float64 [groups, K, O / groups], E[x y'].
        mean_in: float64 [groups, K].
        mean_out: float64 [groups, O / groups].
        count: positions that were added.
        doubt: share of each input's own energy by which its weights are drawn to the dense ones, besides the ridge.
    """

    inputs: Tensor
    cross: Tensor
    mean_in: Tensor
    mean_out: Tensor
    count: int = 0
    doubt: float = 0.0

    @classmethod
    def zeros(cls, groups: int, columns: int, rows: int) -> Products:
        """Start sums."""
        shapes = ((groups, columns, columns), (groups, columns, rows), (groups, columns), (groups, rows))
        inputs, cross, mean_in, mean_out = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        return cls(inputs, cross, mean_in, mean_out)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add positions: x [groups, P, K], y [groups, P, O / groups]."""
        x, y = x.contiguous(), y.contiguous()
        for start in range(0, x.shape[2], _WIDE):  # the upper triangle: `finish` mirrors it
            part = x[:, :, start : start + _WIDE]
            self.inputs[:, start : start + _WIDE, start:] += (part.transpose(1, 2) @ x[:, :, start:]).double().cpu()
        self.cross += (x.transpose(1, 2) @ y).double().cpu()
        self.mean_in += x.sum(1).double().cpu()
        self.mean_out += y.sum(1).double().cpu()
        self.count += x.shape[1]

    def with_(self, other: Products) -> Products:
        """Return the sums over the positions of both."""
        sums = [mine + yours for mine, yours in zip(self._tensors(), other._tensors(), strict=True)]
        return Products(sums[0], sums[1], sums[2], sums[3], self.count + other.count)

    def finish(self, centred: bool) -> None:
        """Turn the sums into means; take the means of x and y out if `centred`."""
        for tensor in self._tensors():
            tensor /= max(self.count, 1)
        for start in range(_WIDE, self.inputs.shape[1], _WIDE):
            end = start + _WIDE
            self.inputs[:, start:end, :start] = self.inputs[:, :start, start:end].transpose(1, 2)
        if centred:
            self.inputs -= self.mean_in[:, :, None] * self.mean_in[:, None]
            self.cross -= self.mean_in[:, :, None] * self.mean_out[:, None]

    def of_rows(self, rows: Tensor) -> Products:
        """Return those of some rows of a layer with one group."""
        return dataclasses.replace(self, cross=self.cross[:, :, rows], mean_out=self.mean_out[:, rows])

    def error(self, weight: Tensor) -> float:
        """Return how far weights [O, K] are from the wanted outputs on these inputs: a square, but for a constant."""
        groups, columns, _ = self.inputs.shape
        each = weight.reshape(groups, -1, columns)
        return float((each @ self.inputs * each).sum() - 2 * (each * self.cross.transpose(1, 2)).sum())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.inputs, self.cross, self.mean_in, self.mean_out


def fit(products: Products, weight: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return weights [O, K] that fit with all columns, drawn towards `weight` where the inputs say little."""
    groups, columns, _ = products.inputs.shape
    labels = torch.arange(groups).repeat_interleave(len(weight) // groups)
    return fit_strips(products, weight, labels, torch.ones(groups, columns, dtype=torch.bool), ridge)


def eliminate(
    products: Products, weight: Tensor, labels: Tensor, area: int, ridge: float = RIDGE, *, at_once: bool = False
) -> tuple[Tensor, Tensor]:
    """Choose strips and fit the weights on them.

    Args:
        products: of the layer.
        weight: dense, [O, K].
        labels: int64 [O], the row group of every row; row groups stay inside convolution groups.
        area: weights to keep; every row group keeps at least one column.
        ridge: share of the mean input energy that draws the weights to the dense ones.
        at_once: choose by the saliencies with all columns: cheaper by far, and worse.

    Returns:
        The strips, bool [G, K], and the weights, float64 [O, K], zero outside of them.
    """
    columns = weight.shape[1]
    kept = torch.ones(int(labels.max()) + 1, columns, dtype=torch.bool)
    sizes = torch.bincount(labels)
    now = columns * int(sizes.sum())
    shrink, dtype = (_SHRINK_WIDE, torch.float32) if columns > _WIDE else (_SHRINK, torch.float64)
    systems = _Systems(products, weight, labels, ridge, dtype)
    while now > area:
        goal = area if at_once else max(area, int(now * shrink))
        saliency = systems.saliency(kept)
        best = torch.where(kept, saliency, -torch.inf).argmax(1)
        saliency[torch.arange(len(kept)), best] = torch.inf
        order = saliency.flatten().argsort(stable=True)
        order = order[torch.isfinite(saliency.flatten()[order])]  # those that are gone come as inf, too
        freed = sizes[order // columns].cumsum(0)
        count = int(torch.searchsorted(freed, now - goal)) + 1
        if not len(order):
            break
        kept.view(-1)[order[:count]] = False
        now = int((kept.sum(1) * sizes).sum())
    return kept, fit_strips(products, weight, labels, kept, ridge)


def judges(labels: Tensor, groups: int, columns: int) -> Tensor:
    """Return the rows that `doubt` may be asked for: of a wide layer's row groups a few, since it is one of inputs."""
    count = int(labels.max()) + 1
    if groups > 1 or columns <= _WIDE or count <= _JUDGES:
        return torch.arange(len(labels))
    chosen = torch.linspace(0, count - 1, _JUDGES).long()
    return torch.nonzero(torch.isin(labels, chosen)).flatten()


def doubt(first: Products, second: Products, fitted: Callable[[Products], Tensor]) -> float:
    """Return how little the correlations of the inputs can be trusted: the `Products.doubt` that holds on other images.

    Positions of one image, and images of one kind, resemble each other, so what a layer is fitted on says less than its
    number of positions promises: with few images a fit to all of them can be perfect there and wrong everywhere else.
    With much doubt the inputs count as uncorrelated: strips are ranked by |w|^2 E[x^2], the kept ones stay as they are.

    Args:
        first: of the images to fit to.
        second: of other images.
        fitted: returns weights [O, K] for products with some doubt.
    """
    best, least = 0.0, torch.inf
    for tried in _DOUBTS_WIDE if first.inputs.shape[1] > _WIDE else _DOUBTS:
        error = second.error(fitted(dataclasses.replace(first, doubt=tried)))
        if error < least:
            best, least = tried, error
    return best


def fit_strips(products: Products, weight: Tensor, labels: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return weights [O, K] fitted on given strips [G, K], float64, zero outside of them."""
    return _Systems(products, weight, labels, ridge, torch.float64).fitted(kept)


class _Systems:
    """The linear systems of a layer's row groups: H with its diagonal raised, and C drawn towards the old weights."""

    def __init__(self, products: Products, weight: Tensor, labels: Tensor, ridge: float, dtype: torch.dtype) -> None:
        energy = products.inputs.diagonal(dim1=1, dim2=2)
        strength = ridge * energy.mean(1, keepdim=True).clamp_min(1e-12) + products.doubt * energy
        groups, columns, _ = products.inputs.shape
        old = weight.double().cpu().reshape(groups, -1, columns).transpose(1, 2)
        self._right = (products.cross + strength[:, :, None] * old).to(dtype)
        self._inputs, self._strength = products.inputs.to(dtype), strength.to(dtype)
        self._labels, self._shape = labels, weight.shape
        self._rows_each = len(labels) // groups

    def fitted(self, kept: Tensor) -> Tensor:
        """Return the solution on the strips that are kept, [O, K]."""
        fitted = torch.zeros(self._shape, dtype=self._right.dtype)
        for _, rows, columns, factor, right in self._each(kept):
            fitted[rows[:, None], columns] = torch.cholesky_solve(right, factor).T
        return fitted

    def saliency(self, kept: Tensor) -> Tensor:
        """Return each strip's saliency a row, float64 [G, K], inf where it is gone."""
        saliency = torch.full(kept.shape, torch.inf, dtype=torch.float64)
        known: tuple[Tensor | None, Tensor] = (None, torch.empty(0))
        for number, rows, columns, factor, right in self._each(kept):
            if known[0] is not factor:
                known = (factor, _inverse_triangle(factor))
            inverse = known[1]  # of the factor: that of the system is its transpose times itself
            squares = (inverse.T @ (inverse @ right)).square().sum(1)
            saliency[number, columns] = (squares / inverse.square().sum(0) / len(rows)).double()
        return saliency

    def _each(self, kept: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Yield (row group, rows, columns, Cholesky factor, right-hand sides); equal neighbours share a factor."""
        last, factor = (-1, b""), torch.empty(0)
        for number in range(len(kept)):
            rows = torch.nonzero(self._labels == number).flatten()
            group = int(rows[0]) // self._rows_each
            columns = torch.nonzero(kept[number]).flatten()
            key = (group, kept[number].numpy().tobytes())
            if key != last:
                system = self._inputs[group].index_select(0, columns).index_select(1, columns)
                system.diagonal().add_(self._strength[group, columns])
                last, factor = key, torch.linalg.cholesky(system)
            right = self._right[group].index_select(0, columns).index_select(1, rows - group * self._rows_each)
            yield number, rows, columns, factor, right


def _inverse_triangle(factor: Tensor) -> Tensor:
    """Return the inverse of a lower triangle, in halves: products of matrices run several times as fast as LAPACK's."""
    size = len(factor)
    if size <= _TRIANGLE:
        small: Tensor = torch.linalg.solve_triangular(factor, torch.eye(size, dtype=factor.dtype), upper=False)
        return small
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = _inverse_triangle(factor[:half, :half])
    inverse[half:, half:] = _inverse_triangle(factor[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half])
    return inverse
