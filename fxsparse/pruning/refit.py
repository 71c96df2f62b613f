"""Pruning without training: one pass over a few hundred inputs that fits every layer where it stands.

The model runs once on the inputs twice, [x; x]: the first half of every batch goes through the dense model, the second
through the pruned one. When a convolution is reached, both are there: what the pruned model gives it as input, and what
the dense one has as its output. It is fitted to come from the one near the other, takes its new weights, and the pass
goes on. So layers are fitted in order, each corrects what those before it left, and besides the fits the cost is that
of two forwards. Any model can run so that keeps the images of a batch apart, as models in evaluation mode do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
from fxsparse.pruning.columns import chunks, padded, sample, unfolded
from fxsparse.pruning.fitting import RIDGE, Products, eliminate, fit, fit_strips
from fxsparse.pruning.layers import Masks
from fxsparse.regrouping.weight_matrix import FloatArray, IntArray
from fxsparse.sites import is_plain_conv

Forward = Callable[[nn.Module, Any], Any]

# Output positions that a layer is fitted on: so many a column of its weight matrix, but at least and at most.
_PER_COLUMN, _LEAST, _MOST = 6, 8192, 32768
_FOR_MOMENTS = 4096
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
        names: of plain `nn.Conv2d`s.
        batch: the inputs.
        forward: calls the model.
        seed: of the positions that are looked at.
    """
    found: dict[str, FloatArray] = {}
    generator = torch.Generator().manual_seed(seed)

    def look(name: str) -> Any:
        def hook(conv: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in found:
                return
            x, y = (value if value.dim() == 4 else value[None] for value in (args[0], output))
            positions = sample(conv, len(x), y.shape[2], y.shape[3], _FOR_MOMENTS, generator)
            sums = torch.zeros(conv.groups, conv.weight[0].numel(), dtype=torch.float64)
            widened = padded(conv, x)
            for part in chunks(positions, conv.groups * sums.shape[1]):
                sums += unfolded(conv, widened, part).double().square().sum(1).cpu()
            each = (sums / len(positions)).repeat_interleave(conv.out_channels // conv.groups, 0)
            found[name] = each.numpy()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(look(name)) for name in names]
    try:
        with unchanged_state(model), torch.no_grad():
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
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
        run.patch(lambda: bar.update())
        try:
            with torch.no_grad():
                forward(model, doubled)
        finally:
            run.restore()
    _refuse_unused(list(wanted), run.masks)
    run.write()
    return run.masks


def _refuse_unused(names: Sequence[str], found: Mapping[str, Any]) -> None:
    for name in names:
        if name not in found:
            raise FxsparseError(f"'{name}' is not called on the data. Exclude it, or give data that use it.")


class _Pass:
    """One run of a model on [x; x], each module's forward replaced by one that treats the halves apart."""

    def __init__(self, model: nn.Module, wanted: Mapping[str, Wanted], ridge: float, seed: int) -> None:
        self.wanted, self.ridge = wanted, ridge
        self.generator = torch.Generator().manual_seed(seed)
        self.masks: Masks = {}
        self.new: list[tuple[Tensor, Tensor]] = []  # a parameter or buffer, and what it becomes
        self.fitted: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.convs = {n: m for n, m in model.named_modules() if is_plain_conv(m)}
        self.norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        self.linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is not None}
        self.count = len(self.convs)
        # Outputs of convolutions by identity: a batch norm that gets one takes any constant out of it.
        self.normed = _followed_by_norm(model, self.convs, self.norms)

    def patch(self, tick: Callable[[], Any]) -> None:
        for name, conv in self.convs.items():
            vars(conv)["forward"] = self._convolution(name, conv, tick)
        for norm in self.norms.values():
            if norm.track_running_stats and norm.running_mean is not None:
                vars(norm)["forward"] = self._norm(norm)
        for linear in self.linears.values():
            vars(linear)["forward"] = self._linear(linear)

    def restore(self) -> None:
        for module in (*self.convs.values(), *self.norms.values(), *self.linears.values()):
            vars(module).pop("forward", None)

    def write(self) -> None:
        with torch.no_grad():
            for tensor, value in self.new:
                tensor.data.copy_(value.reshape(tensor.shape))

    def _convolution(self, name: str, conv: nn.Conv2d, tick: Callable[[], Any]) -> Any:
        def forward(x: Tensor) -> Tensor:
            if x.dim() != 4 or len(x) % 2:
                raise FxsparseError(
                    f"'{name}' gets an input of shape {tuple(x.shape)}, which is not twice a batch of images: without "
                    "training, the model must take a batch in the first dimension of every input and keep it there."
                )
            dense, pruned = x.chunk(2)
            out = conv._conv_forward(dense, conv.weight, conv.bias)
            if name not in self.fitted:
                self.fitted[name] = self._fit(name, conv, pruned, out)
                tick()
            weight, bias = self.fitted[name]
            return torch.cat([out, conv._conv_forward(pruned, weight, bias)])

        return forward

    def _fit(self, name: str, conv: nn.Conv2d, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return a layer's new weight and bias."""
        matrix = conv.weight.detach().flatten(1)
        wanted = self.wanted.get(name)
        columns = matrix.shape[1]
        can_shift = conv.bias is not None
        if wanted is not None and columns > _WIDEST:
            raise FxsparseError(f"'{name}' has {columns} columns; up to {_WIDEST} can be fitted. Exclude it.")
        if wanted is None and columns > _WIDEST:
            return conv.weight, conv.bias
        products = self._products(conv, x, out, centred=can_shift or name in self.normed)
        if wanted is None:
            fitted = fit(products, matrix, self.ridge)
        else:
            labels = torch.from_numpy(wanted.labels)
            if wanted.mask is not None:
                kept = _strips_of(wanted.mask, labels)
                fitted = fit_strips(products, matrix, labels, kept, self.ridge)
            else:
                assert wanted.area is not None
                kept, fitted = eliminate(products, matrix, labels, wanted.area, self.ridge)
            self.masks[name] = kept[labels].reshape(conv.weight.shape).to(conv.weight.device)
        weight = fitted.to(conv.weight).reshape(conv.weight.shape)
        self.new.append((conv.weight, weight))
        if not can_shift:
            return weight, None
        assert conv.bias is not None
        each = fitted.reshape(conv.groups, -1, columns)
        bias = (products.mean_out - (each @ products.mean_in[:, :, None])[:, :, 0]).flatten().to(conv.bias)
        self.new.append((conv.bias, bias))
        return weight, bias

    def _products(self, conv: nn.Conv2d, x: Tensor, out: Tensor, *, centred: bool) -> Products:
        columns, rows = conv.weight[0].numel(), conv.out_channels // conv.groups
        count = min(max(_PER_COLUMN * columns, _LEAST), _MOST)
        positions = sample(conv, len(x), out.shape[2], out.shape[3], count, self.generator)
        products = Products.zeros(conv.groups, columns, rows)
        widened = padded(conv, x)
        for part in chunks(positions, conv.groups * columns):
            image, row, column = part.to(out.device).unbind(1)
            y = out[image, :, row, column]
            products.add(unfolded(conv, widened, part), y.reshape(len(part), conv.groups, rows).transpose(0, 1))
        products.finish(len(positions), centred)
        return products

    def _norm(self, norm: _BatchNorm) -> Any:
        def forward(x: Tensor) -> Tensor:
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None
            dense, pruned = x.chunk(2)
            dims = [d for d in range(x.dim()) if d != 1]
            # The statistics of the training data moved by what changed on these: their own differ for other reasons.
            new_mean = mean + pruned.mean(dims) - dense.mean(dims)
            new_var = var * (pruned.var(dims) + norm.eps) / (dense.var(dims) + norm.eps)
            self.new += [(mean, new_mean), (var, new_var)]
            normed = [
                F.batch_norm(part, m, v, norm.weight, norm.bias, False, 0.0, norm.eps)
                for part, m, v in ((dense, mean, var), (pruned, new_mean, new_var))
            ]
            return torch.cat(normed)

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
