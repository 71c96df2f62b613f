"""One layer without training: which columns its row groups keep, and the weights that then come nearest to the dense
layer's output.

Given the inputs' products H = E[x x'] and C = E[x y'] the best weights of a row group on columns S solve one linear
system, H[S, S] w = C[S]. How much worse the fit gets without column j is w_j^2 / (H[S, S]^-1)_jj (Hassibi & Stork
1993), summed over the group's rows: a strip's exact saliency, of which |w|^2 E[x^2] is left if inputs are uncorrelated.
Strips leave in rounds, a share of those that are left at a time, with the weights solved again in between.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

RIDGE = 1e-2
_SHRINK, _SHRINK_WIDE = 0.75, 0.5  # area after a round over the area before it; of wide layers, to save time
_WIDE = 1200


@dataclasses.dataclass
class Products:
    """Second moments of the inputs and the wanted outputs of a layer.

    Attributes:
        inputs: float64 [groups, K, K], E[x x'], centred if the layer can add a constant.
        cross: float64 [groups, K, O / groups], E[x y'].
        mean_in: float64 [groups, K].
        mean_out: float64 [groups, O / groups].
    """

    inputs: Tensor
    cross: Tensor
    mean_in: Tensor
    mean_out: Tensor

    @classmethod
    def zeros(cls, groups: int, columns: int, rows: int) -> Products:
        """Start sums."""
        shapes = ((groups, columns, columns), (groups, columns, rows), (groups, columns), (groups, rows))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add positions: x [groups, P, K], y [groups, P, O / groups]."""
        self.inputs += (x.transpose(1, 2) @ x).double().cpu()
        self.cross += (x.transpose(1, 2) @ y).double().cpu()
        self.mean_in += x.double().sum(1).cpu()
        self.mean_out += y.double().sum(1).cpu()

    def finish(self, count: int, centred: bool) -> None:
        """Turn the sums over `count` positions into means; take the means of x and y out if `centred`."""
        for tensor in (self.inputs, self.cross, self.mean_in, self.mean_out):
            tensor /= max(count, 1)
        if centred:
            self.inputs -= self.mean_in[:, :, None] * self.mean_in[:, None]
            self.cross -= self.mean_in[:, :, None] * self.mean_out[:, None]


def fit(products: Products, weight: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return weights [O, K] that fit with all columns, drawn towards `weight` where the inputs say little."""
    groups, columns, _ = products.inputs.shape
    old = weight.double().cpu().reshape(groups, -1, columns)
    system, strength = _regular(products.inputs, ridge)
    right = products.cross + strength[:, None, None] * old.transpose(1, 2)
    solution: Tensor = torch.linalg.solve(system, right)
    return solution.transpose(1, 2).reshape(-1, columns)


def eliminate(
    products: Products, weight: Tensor, labels: Tensor, area: int, ridge: float = RIDGE
) -> tuple[Tensor, Tensor]:
    """Choose strips and fit the weights on them.

    Args:
        products: of the layer.
        weight: dense, [O, K].
        labels: int64 [O], the row group of every row; row groups stay inside convolution groups.
        area: weights to keep; every row group keeps at least one column.
        ridge: share of the mean input energy that draws the weights to the dense ones.

    Returns:
        The strips, bool [G, K], and the weights, float64 [O, K], zero outside of them.
    """
    columns = weight.shape[1]
    kept = torch.ones(int(labels.max()) + 1, columns, dtype=torch.bool)
    sizes = torch.bincount(labels)
    now = columns * int(sizes.sum())
    shrink = _SHRINK_WIDE if columns > _WIDE else _SHRINK
    while now > area:
        goal = max(area, int(now * shrink))
        _, saliency = _solved(products, weight, labels, kept, ridge)
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
    return kept, _solved(products, weight, labels, kept, ridge)[0]


def fit_strips(products: Products, weight: Tensor, labels: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return weights [O, K] fitted on given strips [G, K], zero outside of them."""
    return _solved(products, weight, labels, kept, ridge)[0]


def _regular(inputs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return H + λI and λ, by convolution group."""
    strength = ridge * inputs.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return inputs + strength[:, None, None] * torch.eye(inputs.shape[1], dtype=inputs.dtype), strength


def _solved(products: Products, weight: Tensor, labels: Tensor, kept: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the fitted weights [O, K] and each strip's saliency a row [G, K], inf where it is gone."""
    systems, strength = _regular(products.inputs, ridge)
    rows_each = len(labels) // len(systems)
    fitted = torch.zeros(weight.shape, dtype=torch.float64)
    saliency = torch.full(kept.shape, torch.inf, dtype=torch.float64)
    old = weight.double().cpu()
    known: dict[tuple[int, bytes], Tensor] = {}
    for number in range(len(kept)):
        rows = torch.nonzero(labels == number).flatten()
        group = int(rows[0]) // rows_each
        columns = torch.nonzero(kept[number]).flatten()
        key = (group, kept[number].numpy().tobytes())
        if key not in known:
            known = {key: _inverse(systems[group][columns][:, columns])}
        inverse = known[key]
        right = products.cross[group][columns][:, rows - group * rows_each]
        right = right + strength[group] * old[rows][:, columns].T
        solution = inverse @ right
        fitted[rows[:, None], columns] = solution.T
        saliency[number, columns] = solution.square().sum(1) / inverse.diagonal() / len(rows)
    return fitted, saliency


def _inverse(system: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(system))
