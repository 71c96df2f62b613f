"""The tiled form: a Python emulator of the kernels' reads, and the operator's reference, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiles_emulator
import torch
import torch.nn.functional as F
from cases import Case, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.errors import FxsparseError
from fxsparse.ops import batch_inner, tile_cache, tiles
from fxsparse.ops.packing import PackedWeight, pack
from fxsparse.regrouping import Block, Regrouping

OPS = {"batch_inner": torch.ops.fxsparse.conv2d_batch_inner, "planes": torch.ops.fxsparse.conv2d_planes}
each_operator = pytest.mark.parametrize("name", list(OPS))


def _expected(case: Case) -> Tensor:
    top, bottom, left, right = case.padding
    padded = F.pad(case.input.double(), (left, right, top, bottom))
    return F.conv2d(padded, case.weight.double(), None, case.stride, 0, case.dilation, case.groups)


def _arguments(case: Case, tiled: tiles.TiledWeight) -> tuple[Any, ...]:
    options = [list(part) for part in (case.packed.weight_shape, case.stride, case.padding, case.dilation)]
    tables = (tiled.values, tiled.columns, tiled.tiles, tiled.rows)
    return (case.input, *tables, case.bias_tensor, *options, case.groups, case.activation, case.add_tensor)


def _drawn(data: st.DataObject, largest_batch: int) -> Case:
    pick = data.draw
    groups = pick(st.sampled_from([1, 1, 2, 3]))
    kernel = (pick(st.integers(1, 4)), pick(st.integers(1, 4)))
    return Case(
        batch=pick(st.integers(1, largest_batch)),
        in_channels=groups * pick(st.integers(1, 6)),
        out_channels=groups * pick(st.sampled_from([1, 7, 33, 80])),
        kernel=kernel,
        size=(pick(st.integers(kernel[0] * 2, 9)), pick(st.integers(kernel[1] * 2, 9))),
        stride=(pick(st.integers(1, 3)), pick(st.integers(1, 3))),
        padding=tuple(pick(st.integers(0, 3)) for _ in range(4)),
        dilation=(pick(st.integers(1, 2)), pick(st.integers(1, 2))),
        groups=groups,
        mask=pick(st.sampled_from(["mixed", "blocks", "unstructured", "full", "empty"])),
        dtype=pick(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=pick(st.integers(0, 99)),
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernels_reads_give_the_convolution(data: st.DataObject) -> None:
    case = _drawn(data, 18)
    tiled = tiles.tile(case.packed, data.draw(st.sampled_from([64, 128])))
    got = tiles_emulator.run(
        tiled, case.input, case.stride, case.padding, case.dilation, data.draw(st.sampled_from([64, 128, 256]))
    )
    torch.testing.assert_close(got, _expected(case), rtol=1e-12, atol=1e-12)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_the_reads_of_few_images_give_the_convolution(data: st.DataObject) -> None:
    case = _drawn(data, 2)
    tiled = tiles.tile(case.packed, data.draw(st.sampled_from([64, 128])))
    parts = (st.sampled_from([32, 64]), st.sampled_from([8, 16]), st.sampled_from([1, 2, 4, 8]))
    tile, pairs = data.draw(st.tuples(*parts)), data.draw(st.booleans())
    got = tiles_emulator.run_planes(tiled, case.input, case.stride, case.padding, case.dilation, tile, pairs)
    torch.testing.assert_close(got, _expected(case), rtol=1e-12, atol=1e-12)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16, "add": True, "activation": "hardswish"},
    "float16": {"dtype": torch.float16, "batch": 8, "activation": "silu"},
    "no_bias": {"bias": False},
    "stride_and_dilation": {"stride": (2, 3), "dilation": (2, 1), "padding": (0, 3, 2, 1)},
    "groups": {"groups": 4, "batch": 9, "activation": "relu"},
    "depthwise": {"groups": 8, "in_channels": 8, "out_channels": 16, "mask": "full"},
    "nothing_kept": {"mask": "empty", "add": True, "activation": "relu6"},
}


@each_operator
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rows", [64, 128])
def test_the_operator_agrees_with_float64(options: dict[str, Any], rows: int, name: str) -> None:
    case = Case(**options)
    got = OPS[name](*_arguments(case, tiles.tile(case.packed, rows)))
    wanted = case.expected()
    assert got.dtype == case.dtype and got.shape == wanted.shape
    assert batch_inner.is_batch_inner(got) if name == "batch_inner" else got.is_contiguous()
    error = (got.double() - wanted).abs().max() / wanted.abs().max()
    assert error < tolerance(case.dtype, case.weight[0].numel())


@each_operator
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "batch": 8, "add": True}, {"groups": 2}], ids=str)
def test_the_operator_passes_opcheck(options: dict[str, Any], name: str) -> None:
    case = Case(**options)
    torch.library.opcheck(OPS[name].default, _arguments(case, tiles.tile(case.packed)))


def test_planes_keep_channels_last() -> None:
    case = Case()
    case.input = case.input.contiguous(memory_format=torch.channels_last)
    arguments = _arguments(case, tiles.tile(case.packed))
    assert OPS["planes"](*arguments).is_contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(OPS["planes"].default, arguments)


@each_operator
def test_a_gradient_is_refused(name: str) -> None:
    case = Case()
    case.input.requires_grad_()
    out = OPS[name](*_arguments(case, tiles.tile(case.packed)))
    with pytest.raises(FxsparseError, match=f"conv2d_{name}. has no backward"):
        out.sum().backward()


@pytest.mark.parametrize("batch", [1, 5, 8, 24])
def test_batch_inner_keeps_what_a_tensor_holds(batch: int) -> None:
    x = torch.randn(batch, 3, 4, 5)
    inner = batch_inner.to_batch_inner(x)
    assert torch.equal(inner, x) and batch_inner.is_batch_inner(inner)
    assert inner.stride() == batch_inner.strides(x.shape)
    assert batch_inner.to_batch_inner(inner) is inner


def test_a_tensor_without_the_lanes_behind_its_batch_is_not_batch_inner() -> None:
    x = torch.randn(5, 3, 4, 5)
    short = x.new_empty_strided(x.shape, batch_inner.strides(x.shape)).copy_(x)
    assert not batch_inner.is_batch_inner(short)
    assert not batch_inner.is_batch_inner(x.contiguous(memory_format=torch.channels_last))


def _packed(out: int, columns: int, blocks: list[tuple[list[int], list[int]]]) -> tuple[PackedWeight, Tensor]:
    parts = tuple(Block(np.array(rows), np.array(own)) for rows, own in blocks)
    nothing = np.empty(0, np.int64)
    regrouping = Regrouping((out, columns), 1, parts, nothing, nothing)
    weight = torch.randn(out, columns, 1, 1) * regrouping.to_mask().reshape(out, columns, 1, 1)
    return pack(weight, regrouping), weight


def test_groups_of_32_rows_are_merged_with_those_that_share_the_most_columns() -> None:
    lists = [list(range(0, 40)), list(range(100, 140)), list(range(2, 42)), list(range(102, 142))]
    packed, _ = _packed(128, 200, [(list(range(32 * i, 32 * i + 32)), own) for i, own in enumerate(lists)])
    tiled = tiles.tile(packed, 64)
    assert sorted(tiled.tiles[:, 1].tolist()) == [42, 42]
    assert {frozenset((tile // 32).tolist()) for tile in tiled.rows.reshape(2, 64)} == {
        frozenset({0, 2}),
        frozenset({1, 3}),
    }


def test_a_group_of_more_rows_than_a_tile_is_split() -> None:
    packed, _ = _packed(200, 400, [(list(range(200)), list(range(100)))])
    assert tiles.tile(packed).tiles[:, 1].tolist() == [100] * 4
    assert tiles.tile(packed, 128).tiles[:, 1].tolist() == [100] * 2


def test_wide_tiles_are_half_of_the_columns_where_rows_share_them() -> None:
    packed, _ = _packed(200, 400, [(list(range(200)), list(range(100)))])
    assert tiles.wide_tiles(packed) == (2, 100, 0.5)
    apart, _ = _packed(128, 200, [(list(range(64)), list(range(7))), (list(range(64, 128)), list(range(64, 71)))])
    assert tiles.wide_tiles(apart) == (1, 14, 1.0)  # all are padded to 64 columns, which says nothing
    none, _ = _packed(64, 64, [])
    assert tiles.wide_tiles(none) == (1, 0, 0.0)


def test_both_forms_of_a_packed_weight_are_kept_and_follow_it() -> None:
    packed, _ = _packed(200, 400, [(list(range(200)), list(range(100)))])
    forms = [tile_cache.tiled(packed, rows) for rows in (tiles.ROWS, tiles.WIDE_ROWS)]
    assert [form.tile_rows for form in forms] == [64, 128] and tile_cache.wide_tiles(packed) == (2, 100, 0.5)
    packed.values.mul_(2)
    for form in forms:
        assert tile_cache.tiled(packed, form.tile_rows) is form
        assert torch.equal(form.values, tiles.tile(packed, form.tile_rows).values)
    packed.columns.copy_(packed.columns + 1)
    assert tile_cache.tiled(packed) is not forms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_refresh_the_values(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, mask="mixed", out_channels=80)
    tiled = tiles.tile(case.packed)
    fresh = torch.randn_like(case.weight) * case.kept
    tables = (case.packed.columns, case.packed.panels, case.packed.rows)
    values = torch.ops.fxsparse.repack(fresh, *tables, case.packed.values.numel())
    renewed = tiles.tiled_values(values, tiled.places)
    shape = list(case.packed.weight_shape)
    assert torch.equal(batch_inner.untile(renewed, tiled.columns, tiled.tiles, tiled.rows, shape, 1), fresh)


def test_a_large_kernel_has_no_tiled_form() -> None:
    case = Case(kernel=(16, 1), size=(20, 3), mask="full")
    with pytest.raises(FxsparseError, match="the kernel is 16x1"):
        tiles.tile(case.packed)


def test_a_tiled_weight_passes_the_check() -> None:
    for case in (Case(), Case(groups=2), Case(mask="empty"), Case(out_channels=150)):
        tiled = tiles.tile(case.packed)
        shape = case.packed.weight_shape
        tiles.check(tiled.values.numel(), tiled.columns, tiled.tiles, tiled.rows, shape, case.groups)


@pytest.mark.parametrize(
    ("name", "index", "value", "says"),
    [
        ("columns", 0, 8, "not ascending words"),
        ("columns", 0, 3 << 27, "not ascending words"),
        ("columns", 0, -1, "not ascending words"),
        ("columns", -1, 0, "not padded"),
        ("tiles", 0, 64, "expected them from 0 on"),
        ("tiles", 1, -1, "expected them from 0 on"),
        ("tiles", 1, 10**6, "expected them from 0 on"),
        ("tiles", 2, 4, "has values"),
        ("tiles", 2, 1 << 40, "has values"),
        ("tiles", 3, 640, "says that tiles have 640 columns"),
        ("rows", 0, 1, "does not have each of the 24 output channels once"),
        ("rows", 0, 24, "does not have each of the 24 output channels once"),
    ],
)
def test_damaged_tables_are_refused(name: str, index: int, value: int, says: str) -> None:
    case = Case()
    tiled = tiles.tile(case.packed)
    tables = {"columns": tiled.columns, "tiles": tiled.tiles, "rows": tiled.rows}
    tables[name].view(-1)[index] = value
    with pytest.raises(FxsparseError, match=says):
        tiles.check(tiled.values.numel(), **tables, weight_shape=case.packed.weight_shape, groups=1)


def test_tables_of_other_types_are_refused() -> None:
    case = Case()
    tiled = tiles.tile(case.packed)
    shape, values = case.packed.weight_shape, tiled.values.numel()
    with pytest.raises(FxsparseError, match="'columns' is torch.int64"):
        tiles.check(values, tiled.columns.long(), tiled.tiles, tiled.rows, shape, 1)
    with pytest.raises(FxsparseError, match="'tiles' is"):
        tiles.check(values, tiled.columns, tiled.tiles[:, :3], tiled.rows, shape, 1)
    with pytest.raises(FxsparseError, match="'rows' has 63 lanes"):
        tiles.check(values, tiled.columns, tiled.tiles, tiled.rows[:-1], shape, 1)
