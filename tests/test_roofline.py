"""The roofline: its arithmetic exactly, its measurement only for sense."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxsparse import roofline
from fxsparse.errors import FxsparseError
from fxsparse.roofline import Roofline

CPU = torch.device("cpu")
FALLING = Roofline(1e12, ((1000, 8e9), (10_000, 4e9), (100_000, 1e9)))


def test_the_larger_of_arithmetic_and_traffic_is_the_bound() -> None:
    assert FALLING.bound_ms(10**9, 0) == pytest.approx(2.0)
    assert FALLING.bound_ms(0, 100_000) == pytest.approx(0.1)
    assert FALLING.bound_ms(10**9, 100_000) == pytest.approx(2.0)
    assert FALLING.bound_ms(0, 0) == 0


@pytest.mark.parametrize(("nbytes", "rate"), [(10, 8e9), (1000, 8e9), (9999, 8e9), (10_000, 4e9), (10**6, 1e9)])
def test_a_working_set_between_two_sizes_may_be_as_fast_as_the_smaller(nbytes: int, rate: float) -> None:
    assert FALLING.bound_ms(0, nbytes) == pytest.approx(nbytes / rate * 1e3)


def test_a_small_size_measured_slow_does_not_raise_the_bound() -> None:
    assert Roofline(1e12, ((1000, 1e9), (10_000, 4e9))).bound_ms(0, 1000) == pytest.approx(1000 / 4e9 * 1e3)


RATES = st.floats(1e6, 1e15)


@given(
    RATES,
    st.dictionaries(st.integers(1, 1 << 30), RATES, min_size=1, max_size=6),
    st.integers(0, 1 << 40),
    st.integers(0, 1 << 40),
)
def test_the_bound_never_exceeds_any_measured_size_it_covers(
    flops: float, rates: dict[int, float], macs: int, nbytes: int
) -> None:
    line = Roofline(flops, tuple(sorted(rates.items())))
    bound = line.bound_ms(macs, nbytes)
    arithmetic = 2 * macs / flops * 1e3
    larger = [rate for size, rate in rates.items() if size >= nbytes]
    assert bound >= arithmetic
    assert all(bound <= max(arithmetic, nbytes / rate * 1e3) * (1 + 1e-9) for rate in larger)
    assert line.bound_ms(macs + 1, nbytes) >= bound


def test_a_roofline_is_plain_json() -> None:
    assert json.loads(json.dumps(FALLING.to_dict())) == {
        "flops_per_s": 1e12,
        "bandwidth": [[1000, 8e9], [10_000, 4e9], [100_000, 1e9]],
    }


@pytest.mark.parametrize(
    ("flops", "bandwidth"),
    [(0.0, ((1, 1.0),)), (math.nan, ((1, 1.0),)), (1.0, ()), (1.0, ((2, 1.0), (1, 1.0))), (1.0, ((1, math.inf),))],
)
def test_a_roofline_that_cannot_be_is_refused(flops: float, bandwidth: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(FxsparseError, match="not a roofline"):
        Roofline(flops, bandwidth)


def test_measuring_is_done_once_and_leaves_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_CPU_PRODUCTS", (64, 128))
    monkeypatch.setattr(roofline, "_CPU_WORKING_SETS", (1 << 16, 1 << 18))
    roofline._measure.cache_clear()
    before, python_before = torch.get_rng_state(), random.getstate()
    line = roofline.measure(CPU, torch.float32)
    assert roofline.measure(CPU, torch.float32) is line
    assert [size for size, _ in line.bandwidth] == [1 << 16, 1 << 18]
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    roofline._measure.cache_clear()  # what was measured here is too small for others


def test_a_dtype_with_a_slow_product_stops_at_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []

    def slow(arms: object, device: torch.device, *, budget_s: float) -> float:
        return 1000.0

    monkeypatch.setattr(roofline, "_best_ms", slow)
    monkeypatch.setattr(roofline, "_products", lambda matrix: sides.append(len(matrix)))
    assert roofline._flops_per_s(CPU, torch.float64) == pytest.approx(2 * sides[0] ** 3)
    assert len(sides) == 1


def test_a_dtype_without_operators_is_refused() -> None:
    with pytest.raises(FxsparseError, match="no roofline for torch.int8"):
        roofline.measure(CPU, torch.int8)
