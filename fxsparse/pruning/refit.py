"""Pruning without training: one pass over a few hundred inputs that fits every layer where it stands.

The model runs once on the inputs twice, [x; x]: the first half of every batch goes through the dense model, the second
through the pruned one. When a convolution is reached, both are there: what the pruned model gives it as input, and what
the dense one has as its output. It is fitted to come from the one near the other, takes its new weights, and the pass
goes on. So layers are fitted in order, each corrects what those before it left, and besides the fits the cost is that
of two forwards. Any model can run so that keeps the images of a batch apart, as models in evaluation mode do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxsparse.errors import FxsparseError
from fxsparse.inputs import unchanged_state
from fxsparse.pruning.columns import Call, Convolutions, chunks, padded, sample, unfolded
from fxsparse.pruning.fitting import RIDGE, Products, doubt, eliminate, fit, fit_strips, judges
from fxsparse.pruning.layers import Masks
from fxsparse.regrouping.weight_matrix import FloatArray, IntArray

Forward = Callable[[nn.Module, Any], Any]

# Output positions that a layer is fitted on: so many a column of its weight matrix, but at least and at most. Those of
# convolution groups have few columns, and there are many of them.
_PER_COLUMN, _LEAST, _LEAST_GROUPED, _MOST = 6, 8192, 2048, 32768
_FOR_STATISTICS = 2**16  # values of a channel that say what a batch norm's mean and variance become
_FOR_MOMENTS = 4096
_PIXELS_FOR_MOMENTS = 2**22  # of the inputs that these are drawn from, but at least one image
_WIDEST = 8192  # columns; the products of wider layers would take gigabytes


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is wanted of one layer.

    Attributes:
        labels: int64 [O], the row group of every row.
        area: weights to keep; the strips are chosen when the layer is reached.
        mask: or the mask to fit, bool, of the weight's shape.
    """

    labels: IntArray
    area: int | None = None
    mask: Tensor | None = None


def moments(model: nn.Module, names: Sequence[str], batch: Any, forward: Forward, seed: int) -> dict[str, FloatArray]:
    """Return E[x^2] of every column of the layers in the dense model, float64 [O, K], each row that of its conv group.

    Args:
        model: in evaluation mode; not changed.
        names: of the layers.
        batch: the inputs.
        forward: calls the model.
        seed: of the positions that are looked at.
    """
    found: dict[str, FloatArray] = {}
    generator = torch.Generator().manual_seed(seed)

    def look(name: str, call: Call) -> Tensor:
        out = call.on(call.input, call.weight, call.bias)
        if name not in found:
            x, y = (value if value.dim() == 4 else value[None] for value in (call.input, out))
            positions = sample(len(x), y.shape[2], y.shape[3], _FOR_MOMENTS, generator)
            sums = torch.zeros(call.groups, call.weight[0].numel(), dtype=torch.float64)
            widened = padded(call, x)
            for part in chunks(positions, call.groups * sums.shape[1]):
                sums += unfolded(call, widened, part).double().square().sum(1).cpu()
            found[name] = (sums / len(positions)).repeat_interleave(y.shape[1] // call.groups, 0).numpy()
        return out

    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    planes = [
        leaf.shape[2:].numel() for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() == 4
    ]
    batch = first(batch, max(_PIXELS_FOR_MOMENTS // max([1, *planes]), 1))
    with unchanged_state(model), torch.no_grad(), Convolutions(weights, look):
        forward(model, batch)
    _refuse_unused(names, found)
    return found


def refit(
    model: nn.Module,
    wanted: Mapping[str, Wanted],
    batch: Any,
    forward: Forward,
    *,
    ridge: float = RIDGE,
    seed: int = 0,
    progress: bool = False,
) -> Masks:
    """Prune and fit the layers of a model, and re-estimate its batch norms; in place.

    Convolutions that are not in `wanted` are fitted with all their weights, since their inputs change; biases of linear
    layers are shifted by what the mean of their outputs lost.

    Args:
        model: in evaluation mode; weights, biases and running statistics are changed.
        wanted: by module name.
        batch: the inputs, some hundred; nested in any way, images along the first dimension of every tensor.
        forward: calls the model.
        ridge: share of the mean input energy by which weights are drawn to their old values.
        seed: of the positions that are looked at.
        progress: show a bar over the layers.

    Returns:
        The masks of the layers in `wanted`.

    Raises:
        FxsparseError: a layer is not reached, or does not see twice as many images as the batch has.
    """
    run = _Pass(model, wanted, ridge, seed)
    doubled = pytree.tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), batch)
    with tqdm(total=run.count, desc="Fitting", unit="layer", disable=not progress, leave=False) as bar:
        run.tick = bar.update
        with run.patched(), torch.no_grad(), Convolutions(run.weights, run.convolve):
            forward(model, doubled)
    _refuse_unused(list(wanted), run.masks)
    run.write()
    return run.masks


def _refuse_unused(names: Sequence[str], found: Mapping[str, Any]) -> None:
    for name in names:
        if name not in found:
            raise FxsparseError(f"'{name}' is not called on the data. Exclude it, or give data that use it.")


class _Pass:
    """One run of a model on [x; x], in which convolutions, batch norms and linear layers treat the halves apart."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, Wanted], ridge: float, seed: int) -> None:
        self.wanted, self.ridge = wanted, ridge
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: Masks = {}
        self.new: list[tuple[Tensor, Tensor]] = []  # a parameter or buffer, and what it becomes
        self.fitted: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "weight" in m._parameters}
        self.weights = {name: conv.weight for name, conv in self.convs.items()}
        self.norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self.linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
        self.count = len(self.convs)
        self.normed = _followed_by_norm(model, self.convs, self.norms)
        self.tick: Callable[[], Any] = bool

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let batch norms and linear layers treat the halves apart meanwhile."""
        try:
            for norm in self.norms.values():
                if norm.track_running_stats and norm.running_mean is not None:
                    vars(norm)["forward"] = self._norm(norm)
            for linear in self.linears.values():
                vars(linear)["forward"] = self._linear(linear)
            yield
        finally:
            for module in (*self.norms.values(), *self.linears.values()):
                vars(module).pop("forward", None)

    def write(self) -> None:
        with torch.no_grad():
            for tensor, value in self.new:
                tensor.data.copy_(value.reshape(tensor.shape))

    def convolve(self, name: str, call: Call) -> Tensor:
        """Run a convolution on both halves; when it is met first, fit it."""
        x = call.input
        if x.dim() != 4 or len(x) % 2:
            raise FxsparseError(
                f"'{name}' gets an input of shape {tuple(x.shape)}, which is not twice a batch of images: without "
                "training, the model must take a batch in the first dimension of every input and keep it there."
            )
        dense, pruned = x.chunk(2)
        out = call.room(x)
        call.into(out[: len(dense)], dense, call.weight, call.bias)
        if name not in self.fitted:
            self.fitted[name] = self._fit(name, call, pruned, out[: len(dense)])
            self.tick()
        call.into(out[len(dense) :], pruned, *self.fitted[name])
        return out

    def _fit(self, name: str, call: Call, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a layer's new weight and bias."""
        matrix = call.weight.detach().flatten(1)
        wanted = self.wanted.get(name)
        columns = matrix.shape[1]
        if columns > _WIDEST:
            if wanted is None:
                return call.weight, call.bias
            raise FxsparseError(f"'{name}' has {columns} columns; up to {_WIDEST} can be fitted. Exclude it.")
        own_bias = self.convs[name].bias
        can_shift = own_bias is not None and call.bias is own_bias
        first, second = self._products(call, x, out)
        products = first.with_(second)
        for part in (first, second, products):
            part.finish(centred=can_shift or name in self.normed)
        if wanted is None:
            products.doubt = doubt(first, second, lambda part: fit(part, matrix, self.ridge))
            fitted = fit(products, matrix, self.ridge)
        else:
            labels, area = torch.from_numpy(wanted.labels), wanted.area
            if wanted.mask is not None:
                kept = _strips_of(wanted.mask, labels)
                products.doubt = doubt(first, second, lambda part: fit_strips(part, matrix, labels, kept, self.ridge))
                fitted = fit_strips(products, matrix, labels, kept, self.ridge)
            else:
                assert area is not None
                rows = judges(labels, call.groups, columns)
                if len(rows) < len(labels):
                    first, second = first.of_rows(rows), second.of_rows(rows)
                theirs, share = labels[rows].unique(return_inverse=True)[1], area * len(rows) // len(labels)
                products.doubt = doubt(
                    first,
                    second,
                    lambda part: eliminate(part, matrix[rows], theirs, share, self.ridge, at_once=True)[1],
                )
                kept, fitted = eliminate(products, matrix, labels, area, self.ridge)
            self.masks[name] = kept[labels].reshape(call.weight.shape).to(call.weight.device)
        weight = fitted.to(call.weight).reshape(call.weight.shape)
        self.new.append((call.weight, weight))
        if not can_shift:
            return weight, call.bias
        assert own_bias is not None
        each = fitted.reshape(call.groups, -1, columns)
        bias = (products.mean_out - (each @ products.mean_in[:, :, None])[:, :, 0]).flatten().to(own_bias)
        self.new.append((own_bias, bias))
        return weight, bias

    def _products(self, call: Call, x: Tensor, out: Tensor) -> tuple[Products, Products]:
        """Return the sums over positions of the first and of the second half of the images."""
        columns, rows = call.weight[0].numel(), len(call.weight) // call.groups
        least = _LEAST if call.groups == 1 else _LEAST_GROUPED
        count = min(max(_PER_COLUMN * columns, least), _MOST)
        positions = sample(len(x), out.shape[2], out.shape[3], count, self.generator)
        widened = padded(call, x)
        early = positions[:, 0] < len(x) / 2
        halves = []
        for half in (positions[early], positions[~early]):
            products = Products.zeros(call.groups, columns, rows)
            for part in chunks(half, call.groups * columns):
                image, row, column = part.to(out.device).unbind(1)
                y = out[image, :, row, column]
                products.add(unfolded(call, widened, part), y.reshape(len(part), call.groups, rows).transpose(0, 1))
            halves.append(products)
        return halves[0], halves[1]

    def _norm(self, norm: _BatchNorm) -> Any:
        def forward(x: Tensor) -> Tensor:
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None
            dense, pruned = x.chunk(2)
            # Moved so that the norm gives what it gave, in mean and variance, on these inputs. The inputs' own
            # statistics would not do: they differ from those of the training data for other reasons.
            (dense_var, dense_mean), (pruned_var, pruned_mean) = _statistics(dense), _statistics(pruned)
            scale = (pruned_var + norm.eps) / (dense_var + norm.eps)
            new_var = (var + norm.eps) * scale - norm.eps
            new_mean = pruned_mean - (dense_mean - mean) * scale.sqrt()
            self.new += [(mean, new_mean), (var, new_var)]
            out = torch.empty_like(x)  # of large images new memory costs more than the arithmetic
            halves = zip((dense, pruned), (mean, new_mean), (var, new_var), out.chunk(2), strict=True)
            for part, part_mean, part_var, into in halves:
                scale = (part_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
                shift = (0 if norm.bias is None else norm.bias) - part_mean * scale
                ends = (1,) * (x.dim() - 2)
                torch.addcmul(shift.view(-1, *ends), part, scale.view(-1, *ends), out=into)
            return out

        return forward

    def _linear(self, linear: nn.Linear) -> Any:
        def forward(x: Tensor) -> Tensor:
            out = F.linear(x, linear.weight, linear.bias)
            dense, pruned = out.chunk(2)
            shift = (dense - pruned).flatten(0, -2).mean(0)
            self.new.append((linear.bias, linear.bias + shift))
            return torch.cat([dense, pruned + shift])

        return forward


def _followed_by_norm(
    model: nn.Module, convs: Mapping[str, nn.Module], norms: Mapping[str, nn.Module]
) -> frozenset[str]:
    """Tell which convolutions a batch norm follows, by the order in which modules are registered.

    It decides only whether the mean is left out of a fit, so a wrong answer costs accuracy, not correctness.
    """
    order = [name for name, module in model.named_modules() if name in convs or name in norms]
    channels = {name: getattr(norms[name], "num_features", None) for name in norms}
    return frozenset(
        first
        for first, second in zip(order, order[1:], strict=False)
        if first in convs and second in norms and channels[second] == getattr(convs[first], "out_channels", None)
    )


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean of every channel; of large images, at positions of a grid."""
    if x.dim() == 4:
        step = max(1, min(math.isqrt(x.numel() // x.shape[1] // _FOR_STATISTICS), *x.shape[2:]))
        x = x[:, :, step // 2 :: step, step // 2 :: step]
    var, mean = torch.var_mean(x, [d for d in range(x.dim()) if d != 1])
    return var, mean


def _strips_of(mask: Tensor, labels: Tensor) -> Tensor:
    """Return the strips of a mask of whole strips, bool [G, K]."""
    matrix = mask.flatten(1).cpu()
    kept = torch.zeros(int(labels.max()) + 1, matrix.shape[1], dtype=torch.bool)
    kept[labels] = matrix
    return kept


def concatenated(batches: Sequence[Any]) -> Any:
    """Return batches, nested alike, as one."""
    leaves, spec = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    joined = [torch.cat(values) if isinstance(values[0], Tensor) else values[0] for values in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(joined, spec[0])


def first(batch: Any, count: int) -> Any:
    """Return the first images of a batch."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[:count], batch)


def images(batch: Any) -> int:
    """Return the number of images of a batch.

    Raises:
        FxsparseError: it holds no tensor with a first dimension, or tensors whose first dimensions differ.
    """
    sizes = {len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        raise FxsparseError(
            f"A batch of data has tensors of {sorted(sizes) or 'no'} images. Give batches whose tensors all have the "
            "images along their first dimension."
        )
    return sizes.pop()


def as_numpy(tensor: Tensor) -> FloatArray:
    """Return a tensor as float64 in numpy."""
    return np.asarray(tensor.detach().double().cpu().numpy())
