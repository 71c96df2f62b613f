"""Fits without training, against dense linear algebra and against brute force."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.pruning import columns as columns_module
from fxsparse.pruning.columns import Call, Convolutions, padded, sample, unfolded
from fxsparse.pruning.fitting import Products, doubt, eliminate, fit, fit_strips, judges


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


def wide(columns: int, rows: int) -> tuple[Products, Tensor, Tensor]:
    """Return products of correlated inputs of a layer of many columns, their second moments, and its weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, columns, generator=generator)
    x = (x + x.roll(1, 1) * torch.rand(columns, generator=generator)).relu()
    weight = torch.randn(rows, columns, generator=generator)
    products = Products.zeros(1, columns, rows)
    for part in x.split(1000):
        products.add(part[None], (part @ weight.T)[None])
    products.finish(centred=False)
    return products, x.double().T @ x.double() / 3000, weight


def test_products_of_a_wide_layer_are_whole_and_symmetric() -> None:
    products, moments, _ = wide(1300, 8)  # two stripes of columns
    torch.testing.assert_close(products.inputs[0], moments, rtol=1e-5, atol=1e-5)
    assert torch.equal(products.inputs, products.inputs.transpose(1, 2))


@pytest.mark.parametrize("columns", [300, 1300])  # in float64; wide, so in float32
def test_a_strip_leaves_by_the_loss_that_the_inverse_tells(columns: int) -> None:
    products, _, weight = wide(columns, 8)
    labels = torch.arange(8) // 4
    area = int(0.3 * weight.numel())
    kept, _ = eliminate(products, weight, labels, area, at_once=True)
    system = products.inputs[0] + 1e-2 * products.inputs[0].diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(system)
    solution = inverse @ (products.cross[0] + (system - products.inputs[0]) @ weight.double().T)
    loss = (solution.square() / inverse.diagonal()[:, None]).T.reshape(2, 4, columns).sum(1)
    best = loss.flatten().topk(int(kept.sum())).indices
    wanted = torch.zeros(2 * columns, dtype=torch.bool).index_fill(0, best, True).reshape(2, columns)
    assert int(kept.sum()) * 4 == area // 4 * 4
    assert float((kept == wanted).float().mean()) == 1.0


def test_a_few_row_groups_of_a_wide_layer_tell_its_doubt() -> None:
    labels = torch.arange(96).remainder(12)  # not consecutive
    assert torch.equal(judges(labels, 1, 1000), torch.arange(96))
    assert torch.equal(judges(labels, 2, 2000), torch.arange(96))
    assert torch.equal(judges(labels[:32].remainder(4), 1, 2000), torch.arange(32))
    rows = judges(labels, 1, 2000)
    assert labels[rows].unique().tolist() == [0, 3, 7, 11] and len(rows) == 32
    products, _, weight = wide(1300, 16)
    some = torch.tensor([1, 4, 5])
    found = fit(products.of_rows(some), weight[some])
    torch.testing.assert_close(found, fit(products, weight)[some])


@pytest.mark.parametrize("images", [1, 7])
def test_images_a_few_at_a_time_give_the_convolution(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "_RESULTS", 3 * 12 * 5 * 9)  # three images of the output
    x, weight, bias = torch.randn(images, 8, 9, 10), torch.randn(12, 4, 3, 3), torch.randn(12)
    call = Call(x, weight, None, stride=(2, 1), padding=(1, 0), dilation=(1, 1), groups=2)
    out = call.room(x).fill_(torch.nan)
    call.into(out, x, weight, bias)
    wanted = F.conv2d(x.double(), weight.double(), bias.double(), (2, 1), (1, 0), 1, 2)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
