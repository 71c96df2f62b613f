"""The tiled form: a Python emulator of the kernels' reads, and the operator's reference, against float64."""

from __future__ import annotations

import tiles_emulator
import torch
import torch.nn.functional as F
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxsparse.ops import tiles

OP = torch.ops.fxsparse.conv2d_batch_inner


def _expected(case: Case) -> Tensor:
    top, bottom, left, right = case.padding
    padded = F.pad(case.input.double(), (left, right, top, bottom))
    return F.conv2d(padded, case.weight.double(), None, case.stride, 0, case.dilation, case.groups)


def _geometry(case: Case) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
    return case.stride, case.padding, case.dilation


def _arguments(case: Case, tiled: tiles.TiledWeight) -> tuple[object, ...]:
    shape, options = list(case.packed.weight_shape), [list(part) for part in _geometry(case)]
    tables = (tiled.values, tiled.columns, tiled.tiles, tiled.rows)
    return (case.input, *tables, case.bias_tensor, shape, *options, case.groups, case.activation, case.add_tensor)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_kernels_reads_give_the_convolution(data: st.DataObject) -> None:
    pick = data.draw
    groups = pick(st.sampled_from([1, 1, 2, 3]))
    kernel = (pick(st.integers(1, 4)), pick(st.integers(1, 4)))
    case = Case(
        batch=pick(st.integers(1, 18)),
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
    tiled = tiles.tile(case.packed, pick(st.sampled_from([None, 64, 128])))
    got = tiles_emulator.run(tiled, case.input, *_geometry(case), positions=pick(st.sampled_from([64, 128, 256])))
    torch.testing.assert_close(got, _expected(case), rtol=1e-12, atol=1e-12)
