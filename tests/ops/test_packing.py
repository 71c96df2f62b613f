"""Packing: every kept weight has exactly one place, and the tables hold their promises."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_mask
from hypothesis import given, settings
from hypothesis import strategies as st

import fxsparse
from fxsparse.ops import reference
from fxsparse.ops.packing import pack


@given(
    groups=st.sampled_from([1, 2, 3]),
    rows=st.integers(1, 40),
    channels=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kind=st.sampled_from(["empty", "full", "unstructured", "blocks", "mixed"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=100, deadline=None)
def test_unpack_gives_back_exactly_the_kept_weights(groups, rows, channels, kernel, kind, seed) -> None:
    gen = torch.Generator().manual_seed(seed)
    shape = (rows * groups, channels, *kernel)
    kept = make_mask(kind, shape, gen)
    weight = torch.randn(shape, generator=gen)
    packed = pack(weight, fxsparse.regroup(kept, groups=groups, cache=False))
    tables = (packed.columns, packed.panels, packed.rows)
    got = torch.ops.fxsparse.unpack(packed.values, *tables, list(shape))
    stored = torch.ops.fxsparse.unpack(torch.ones_like(packed.values), *tables, list(shape)).bool()
    assert torch.equal(got, weight * stored)
    assert (stored | ~kept).all()
    assert torch.equal(reference.unpack(packed.values, *tables, list(shape)), got)
    assert torch.equal(reference.repack(weight, *tables, packed.values.numel()), packed.values)
    channel = packed.rows[:, 0]
    assert sorted(channel[channel >= 0].tolist()) == list(range(shape[0]))
    torch.ops.fxsparse.validate(*tables, packed.values.numel(), list(shape), groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_compiled_unpack_and_repack_equal_the_reference(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, groups=2, out_channels=50)
    p = case.packed
    tables = (p.columns, p.panels, p.rows)
    shape = list(p.weight_shape)
    assert torch.equal(torch.ops.fxsparse.unpack(p.values, *tables, shape), reference.unpack(p.values, *tables, shape))
    weight = torch.randn(shape).to(dtype)
    count = p.values.numel()
    assert torch.equal(torch.ops.fxsparse.repack(weight, *tables, count), reference.repack(weight, *tables, count))


def test_repack_follows_a_changed_weight() -> None:
    case = Case()
    p = case.packed
    changed = torch.randn_like(case.weight) * case.kept
    values = torch.ops.fxsparse.repack(changed, p.columns, p.panels, p.rows, p.values.numel())
    case.weight = changed
    case.packed = type(p)(values, p.columns, p.panels, p.rows, p.weight_shape)
    case.check()


def test_packed_weights_are_smaller_than_dense_ones_at_90_percent() -> None:
    kept = torch.zeros(256, 128 * 9, dtype=torch.bool)
    for start in range(0, 256, 32):
        kept[start : start + 32, torch.randperm(128 * 9)[:115]] = True
    weight = torch.randn(256, 128, 3, 3)
    packed = pack(weight, fxsparse.regroup(kept.view_as(weight), cache=False))
    assert packed.nbytes < 0.2 * weight.numel() * 4


@pytest.mark.parametrize(
    ("table", "index", "value"),
    [
        ("columns", (0,), 10**6),
        ("columns", (0,), -1),
        ("panels", (0, 0), 10**9),
        ("panels", (0, 1), 10**9),
        ("panels", (0, 2), -1),
        ("panels", (0, 3), 10**6),
        ("rows", (0, 0), 10**6),
        ("rows", (0, 1), 10**9),
        ("rows", (0, 2), 10**9),
        ("rows", (0, 3), 10**9),
    ],
)
def test_validate_refuses_tables_that_would_read_out_of_bounds(table: str, index: tuple, value: int) -> None:
    p = Case().packed
    tables = {name: getattr(p, name).clone() for name in ("columns", "panels", "rows")}
    if table == "rows" and index[1] in (1, 3):
        tables["rows"][0, 2] = max(int(tables["rows"][0, 2]), 1)
    tables[table][index] = value
    word = {"columns": "column", "panels": "Panel 0", "rows": "Lane 0"}[table]
    with pytest.raises(RuntimeError, match=word):
        torch.ops.fxsparse.validate(*tables.values(), p.values.numel(), list(p.weight_shape), 1)
