"""Fits without training, against dense linear algebra and against brute force."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.pruning.columns import Call, Convolutions, padded, sample, unfolded
from fxsparse.pruning.fitting import Products, doubt, eliminate, fit, fit_strips


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1), "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 4, "padding": 2, "padding_mode": "circular"},
    ],
)
def test_columns_times_the_weight_matrix_are_the_convolution(options: dict[str, object]) -> None:
    conv = nn.Conv2d(8, 12, bias=False, **options).double()  # type: ignore[arg-type]
    x = torch.randn(3, 8, 9, 10, dtype=torch.float64)
    calls: list[Call] = []

    def handle(name: str, call: Call) -> Tensor:
        calls.append(call)
        return call.on(call.input, call.weight, call.bias)

    with Convolutions({"conv": conv.weight}, handle):
        y = conv(x)
    (call,) = calls
    positions = sample(3, y.shape[2], y.shape[3], 40, torch.Generator().manual_seed(0))
    columns = unfolded(call, padded(call, call.input), positions)
    found = columns @ conv.weight.flatten(1).reshape(conv.groups, 12 // conv.groups, -1).transpose(1, 2)
    image, row, column = positions.unbind(1)
    torch.testing.assert_close(found.transpose(0, 1).reshape(len(positions), 12), y[image, :, row, column])
    assert len({tuple(p) for p in positions.tolist()}) == len(positions) == 40


def data(rows: int = 8, columns: int = 10, count: int = 400) -> tuple[Tensor, Tensor, Tensor, Products]:
    """Return correlated inputs, a weight, its outputs and their products."""
    torch.manual_seed(0)
    x = torch.randn(count, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64) + 0.5
    weight = torch.randn(rows, columns, dtype=torch.float64)
    y = x @ weight.T
    products = Products.zeros(1, columns, rows)
    products.add(x[None], y[None])
    products.finish(centred=False)
    return x, weight, y, products


def test_a_fit_with_all_columns_gives_the_weight_back() -> None:
    _, weight, _, products = data()
    torch.testing.assert_close(fit(products, weight), weight)


def test_a_fit_on_strips_is_least_squares() -> None:
    x, weight, y, products = data()
    labels = torch.arange(8) // 4
    kept = torch.rand(2, 10) < 0.5
    kept[:, 0] = True
    found = fit_strips(products, weight, labels, kept, ridge=1e-12)
    for row in range(8):
        columns = kept[labels[row]]
        wanted = torch.linalg.lstsq(x[:, columns], y[:, row, None]).solution[:, 0]
        torch.testing.assert_close(found[row, columns], wanted, rtol=1e-5, atol=1e-7)
        assert not bool(found[row, ~columns].any())


def test_centred_products_leave_the_mean_to_the_bias() -> None:
    x, weight, y, _ = data()
    products = Products.zeros(1, 10, 8)
    products.add(x[None, :200], y[None, :200] + 3)
    products.add(x[None, 200:], y[None, 200:] + 3)
    products.finish(centred=True)
    found = fit(products, weight)
    torch.testing.assert_close(found, weight)
    bias = products.mean_out[0] - found @ products.mean_in[0]
    torch.testing.assert_close(bias, torch.full((8,), 3.0, dtype=torch.float64))


def test_elimination_is_near_the_best_choice_and_beats_the_diagonal() -> None:
    x, weight, y, products = data(rows=4)
    labels = torch.zeros(4, dtype=torch.int64)

    def error(columns: Tensor) -> float:
        w = fit_strips(products, weight, labels, columns[None], ridge=1e-12)
        return float((x @ w.T - y).square().sum())

    kept, fitted = eliminate(products, weight, labels, 4 * 4, ridge=1e-12)
    assert int(kept.sum()) == 4
    torch.testing.assert_close(float((x @ fitted.T - y).square().sum()), error(kept[0]))
    choices = [
        torch.zeros(10, dtype=torch.bool).index_fill(0, torch.tensor(c), True)
        for c in itertools.combinations(range(10), 4)
    ]
    errors = sorted(error(columns) for columns in choices)
    diagonal = (weight.square() * x.square().mean(0)).sum(0).topk(4).indices
    plain = error(torch.zeros(10, dtype=torch.bool).index_fill(0, diagonal, True))
    assert error(kept[0]) <= plain and error(kept[0]) <= 1.5 * errors[0] + 1e-9


def test_elimination_keeps_the_area_and_a_column_of_every_group() -> None:
    _, weight, _, products = data(rows=8)
    weight[:4] *= 1e-4
    products.cross[:, :, :4] *= 1e-4
    labels = torch.arange(8) // 4
    kept, fitted = eliminate(products, weight, labels, 24)
    assert int((kept.sum(1) * 4).sum()) == 24 and bool(kept.any(1).all())
    assert int(kept[0].sum()) < int(kept[1].sum())
    assert torch.equal(fitted != 0, kept[labels])


def test_inputs_that_say_nothing_leave_the_weights_alone() -> None:
    products = Products.zeros(1, 5, 3)
    products.finish(centred=True)
    weight = torch.randn(3, 5)
    torch.testing.assert_close(fit(products, weight).float(), weight)
    assert bool(torch.isfinite(F.relu(fit(products, weight))).all())


def halves(kinds: int) -> tuple[Products, Products, Tensor]:
    """Return products of two halves of 2,000 distorted inputs, of `kinds` kinds each, and the weight before."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 40, generator=generator)
    distortion = torch.eye(40) + 0.1 * torch.randn(40, 40, generator=generator)
    found = []
    for _ in range(2):
        x = torch.randn(kinds, 40, generator=generator)
        seen = x @ distortion + 0.6 * torch.randn(kinds, 40, generator=generator)
        products = Products.zeros(1, 40, 8)
        products.add(*(values[torch.arange(2000) % kinds][None] for values in (seen, x @ weight.T)))
        products.finish(centred=True)
        found.append(products)
    return found[0], found[1], weight


def test_correlations_of_many_inputs_of_few_kinds_are_doubted() -> None:
    labels = torch.arange(8) // 4
    first, second, weight = halves(12)

    def whole(products: Products) -> Tensor:
        return fit(products, weight)

    def pruned(products: Products) -> Tensor:
        return eliminate(products, weight, labels, 8 * 20, at_once=True)[1]

    for fitted in (whole, pruned):
        many, others, _ = halves(2000)
        assert doubt(many, others, fitted) == 0
        found = doubt(first, second, fitted)
        assert found > 0.2
        assert second.error(fitted(dataclasses.replace(first, doubt=found))) < second.error(fitted(first))


def test_with_endless_doubt_the_kept_weights_stay_as_they_are() -> None:
    products, _, weight = halves(12)
    labels = torch.arange(8) // 4
    kept, fitted = eliminate(dataclasses.replace(products, doubt=1e6), weight, labels, 8 * 20)
    torch.testing.assert_close(fitted, torch.where(kept[labels], weight.double(), 0.0), rtol=1e-3, atol=1e-4)
    energy = (weight.double().square() * products.inputs[0].diagonal()).reshape(2, 4, 40).sum(1)
    assert energy[kept].min() > energy[~kept].max() * 0.99
