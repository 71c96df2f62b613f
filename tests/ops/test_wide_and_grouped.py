"""The kernel for few columns on wide planes, and grouped convolutions group by group, against float64."""

from __future__ import annotations

import copy
import ctypes
import functools
import itertools
import math
import mmap
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from test_library import run_python
from torch import Tensor

import fxsparse
from fxsparse.ops.packing import pack
from fxsparse.ops.reference import ACTIVATIONS

compiled = pytest.mark.skipif(fxsparse.capabilities().cpu == "reference", reason="the compiled operators are not built")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDTHS = [16, 17, 31, 48, 49, 56, 57, 113]
FLAT = {"kernel": (1, 1), "padding": (0, 0, 0, 0)}


@functools.cache
def columns_kept(shape: tuple[int, ...], columns: int, scattered: float) -> tuple[Tensor, fxsparse.Regrouping]:
    gen = torch.Generator().manual_seed(columns)
    flat = torch.rand(shape[0], math.prod(shape[1:]), generator=gen) < scattered
    flat[:, torch.randperm(flat.shape[1], generator=gen)[:columns]] = True
    kept = flat.view(shape)
    return kept, fxsparse.regroup(kept, cache=False)


def few_columns(columns: int, scattered: float = 0.0, **options: Any) -> Case:
    """Return a case that keeps all rows of some columns, and a share of the other weights."""
    case = Case(mask="empty", **options)
    case.kept, case.regrouping = columns_kept(tuple(case.weight.shape), columns, scattered)
    gen = torch.Generator().manual_seed(case.seed)
    case.weight = torch.randn(case.weight.shape, generator=gen).to(case.dtype) * case.kept
    case.packed = pack(case.weight, case.regrouping)
    return case


def resized(case: Case, size: tuple[int, int], batch: int) -> Case:
    """Return a case with the same weight on other images."""
    other = copy.copy(case)
    other.size, other.batch = size, batch
    other.input = torch.randn(batch, case.in_channels, *size, dtype=torch.float64).to(case.dtype)
    if case.add:
        other.add_tensor = torch.randn(other.expected_shape(), dtype=torch.float64).to(case.dtype)
    return other


def leave_garbage() -> None:
    """Fill memory with NaN and free it, for the next scratch memory to be."""
    filled = [torch.full((1 << bits,), torch.nan) for bits in (19, 17, *[14] * 8, *[11] * 16)]
    del filled


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """Return a copy that ends where a page begins that nobody may touch."""
    count, size = tensor.numel(), tensor.numel() * tensor.element_size()
    page = mmap.PAGESIZE
    readable = -(-size // page) * page
    memory = mmap.mmap(-1, readable + page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + readable
    failed = ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0)
    assert not failed, os.strerror(ctypes.get_errno())
    return (
        torch.frombuffer(memory, dtype=tensor.dtype, count=count, offset=readable - size).view_as(tensor).copy_(tensor)
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_columns_on_wide_planes(dtype: torch.dtype, width: int) -> None:
    for i, rows in enumerate((5, 16, 32, 40)):
        columns = (width + 3 * i) % 12 + 1
        common = {"dtype": dtype, "batch": (1, 3)[(i + width) % 2], "out_channels": rows, "seed": width}
        if (i + WIDTHS.index(width) + DTYPES.index(dtype)) % 2:
            few_columns(columns, in_channels=3, size=(5, width), **common).check()
        else:
            few_columns(columns, in_channels=12, size=(3, width), add=True, **FLAT, **common).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_epilogue_behind_few_columns(dtype: torch.dtype, activation: str) -> None:
    for add, bias, options in ((False, True, {}), (True, False, {}), (False, False, FLAT), (True, True, FLAT)):
        few_columns(
            4, size=(6, 49), out_channels=40, activation=activation, add=add, bias=bias, dtype=dtype, **options
        ).check()


@pytest.mark.parametrize("columns", range(1, 13))
def test_every_small_number_of_columns(columns: int) -> None:
    few_columns(columns, in_channels=2, out_channels=32, size=(4, 57)).check()
    few_columns(columns, in_channels=12, out_channels=32, size=(7, 8), **FLAT).check()


@pytest.mark.parametrize("size", [(1, 15), (4, 4), (1, 17), (3, 6), (1, 31), (4, 8), (3, 11), (7, 7)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_planes_that_are_read_in_place(dtype: torch.dtype, size: tuple[int, int]) -> None:
    for batch, scattered in ((1, 0.0), (3, 0.0), (3, 0.1)):
        few_columns(6, scattered, in_channels=12, size=size, batch=batch, add=True, dtype=dtype, **FLAT).check()


@pytest.mark.parametrize("width", [17, 49, 113])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_columns_beside_scattered_weights(dtype: torch.dtype, width: int) -> None:
    common = {"out_channels": 40, "dtype": dtype, "activation": "relu", "add": True}
    leave_garbage()
    few_columns(5, 0.05, size=(9, width), **common).check()
    few_columns(5, 0.05, in_channels=16, size=(9, width), **FLAT, **common).check()


@pytest.mark.parametrize("options", [{"stride": (2, 2)}, {"dilation": (2, 3)}, {"padding": (0, 2, 3, 1)}], ids=str)
def test_few_columns_with_any_geometry(options: dict) -> None:
    for mode in ("zeros", "reflect", "circular"):
        few_columns(7, in_channels=2, size=(11, 113), padding_mode=mode, **options).check()


GROUPED = {
    "depthwise, all kept": {"mask": "full"},
    "depthwise, zeros": {"mask": "mixed"},
    "depthwise, empty": {"mask": "empty"},
    "multiplier 2": {"mask": "full", "multiplier": 2},
    "stride 2": {"mask": "full", "stride": (2, 2)},
    "dilation 2": {"mask": "full", "dilation": (2, 2), "padding": (2, 2, 2, 2)},
    "stride 2, dilation 2, multiplier 2": {
        **{"mask": "mixed", "multiplier": 2, "stride": (2, 2), "dilation": (2, 2), "padding": (2, 2, 2, 2)}
    },
    "asymmetric padding": {"mask": "full", "padding": (0, 2, 3, 1)},
    "5x5": {"mask": "full", "kernel": (5, 5), "padding": (2, 2, 2, 2)},
    "epilogue": {"mask": "full", "activation": "hardswish", "add": True},
}


@pytest.mark.parametrize("channels", [3, 33, 130])
@pytest.mark.parametrize("options", GROUPED.values(), ids=GROUPED.keys())
def test_one_channel_in_a_group(options: dict, channels: int) -> None:
    options = dict(options)
    many = channels * options.pop("multiplier", 1)
    case = Case(in_channels=channels, out_channels=many, groups=channels, **options)
    least = (1, 1) if case.padding[0] else (2, 1)
    leave_garbage()
    for size, batch in ((least, 5), ((7, 7), 2), ((14, 14), 1), ((57, 31), 2 if channels == 3 else 1)):
        if size[0] * channels < 2000:
            resized(case, size, batch).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_planes_of_every_width(kernel: int, stride: int, dtype: torch.dtype) -> None:
    case = Case(
        **{"in_channels": 3, "out_channels": 6, "groups": 3, "kernel": (kernel, kernel), "stride": (stride, stride)},
        **{"mask": "mixed", "activation": "relu6", "dtype": dtype, "padding": (kernel // 2,) * 4},
    )
    for width, padding in itertools.product(range(1, 36), ((kernel // 2,) * 4, (1, 2, 0, kernel - 1), (0, 0, 4, 1))):
        case.padding, case.add = padding, width % 2 == 0
        if min(width + padding[2] + padding[3], 6) >= kernel:
            resized(case, (6, width), 2).check()


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("channels", "groups", "mask"), [(33, 33, "full"), (33, 33, "mixed"), (24, 6, "blocks")])
def test_every_padding_mode_of_groups(mode: str, channels: int, groups: int, mask: str) -> None:
    case = Case(in_channels=channels, out_channels=2 * channels, groups=groups, mask=mask, padding_mode=mode)
    for stride, padding, batch in itertools.product((1, 2), ((1, 1, 1, 1), (0, 2, 3, 1)), (1, 2, 5)):
        leave_garbage()
        case.stride, case.padding = (stride, stride), padding
        resized(case, (9, 14), batch).check()


@pytest.mark.parametrize("mask", ["blocks", "mixed", "full"])
@pytest.mark.parametrize("groups", [2, 3, 10])
def test_four_channels_in_a_group(groups: int, mask: str) -> None:
    case = Case(in_channels=4 * groups, out_channels=24 * groups, groups=groups, mask=mask, padding=(2, 1, 1, 2))
    for stride, dilation, size, batch in (
        *((1, 1, (7, 7), 5), (2, 1, (14, 14), 2), (1, 2, (57, 31), 1), (2, 2, (5, 40), 2)),
        *((1, 1, (14, 14), 1), (2, 2, (7, 7), 5)),
    ):
        leave_garbage()
        case.stride, case.dilation = (stride, stride), (dilation, dilation)
        resized(case, size, batch).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_in_every_dtype(dtype: torch.dtype) -> None:
    for channels, groups, mask in ((33, 33, "full"), (130, 130, "mixed"), (24, 6, "mixed")):
        for stride in (1, 2):
            leave_garbage()
            Case(
                **{"in_channels": channels, "out_channels": 2 * channels, "groups": groups, "mask": mask},
                **{"stride": (stride, stride), "size": (14, 15), "batch": 3, "dtype": dtype, "activation": "silu"},
            ).check()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_groups_on_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for channels, groups in ((33, 33), (24, 6), (3, 3)):
            case = Case(in_channels=channels, out_channels=2 * channels, groups=groups)
            for batch in (1, 2, 5):
                leave_garbage()
                other = resized(case, (14, 14), batch)
                other.check()
                assert torch.equal(other.run(), other.run())
    finally:
        torch.set_num_threads(before)


def check_in_guarded_memory(case: Case) -> None:
    """Check a case whose tensors end where reading further ends the process."""
    case.input = at_the_end_of_memory(case.input)
    if case.add_tensor is not None:
        case.add_tensor = at_the_end_of_memory(case.add_tensor)
    if case.bias_tensor is not None:
        case.bias_tensor = at_the_end_of_memory(case.bias_tensor)
    case.check()


def check_a_selection() -> None:
    """Check some cases of every kind, with nothing readable behind their tensors."""
    for dtype in DTYPES:
        for size, scattered in (((4, 4), 0.0), ((1, 17), 0.1), ((3, 11), 0.0), ((3, 57), 0.1)):
            common = {"in_channels": 12, "out_channels": 40, "size": size, "dtype": dtype, "add": True}
            check_in_guarded_memory(few_columns(5, scattered, **FLAT, **common))
            check_in_guarded_memory(few_columns(5, scattered, activation="silu", **common))
        for groups, mask in ((24, "full"), (6, "mixed")):
            case = Case(in_channels=24, out_channels=48, groups=groups, mask=mask, dtype=dtype)
            for stride, size, batch in ((1, (9, 14), 3), (2, (9, 31), 2), (2, (1, 1), 5)):
                leave_garbage()
                case.stride = (stride, stride)
                check_in_guarded_memory(resized(case, size, batch))


@compiled
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_agrees_and_reads_nothing_behind_its_tensors(isa: str) -> None:
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(fxsparse.capabilities().cpu):
        pytest.skip(f"this CPU has no {isa}")
    out = run_python(
        """
        import fxsparse
        from test_wide_and_grouped import check_a_selection
        check_a_selection()
        print(fxsparse.capabilities().cpu)
        """,
        FXSPARSE_CPU_ISA=isa,
        PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    )
    assert out.strip() == isa
