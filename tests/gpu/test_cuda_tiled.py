"""`conv2d_batch_inner` on CUDA: every kernel against float64, streams, graphs, large tensors, hostile tables."""

from __future__ import annotations

from typing import Any

import hostile_tables
import pytest
import torch
from drawn import ROUNDOFF, STEEPEST, TF32, TF32_PRODUCT, Drawn, random_case
from torch import Tensor

from fxsparse.ops import batch_inner, tiles
from fxsparse.ops.reference import ACTIVATIONS

pytestmark = pytest.mark.gpu
OP = torch.ops.fxsparse.conv2d_batch_inner
HALVES = (torch.bfloat16, torch.float16)
HOPPER = ("wgmma64", "wgmma64half", "wgmma128", "wgmma128half")


FLOATS = ("float_64", "float_128", "float_256")


def _kernels(dtype: torch.dtype | str) -> tuple[str, ...]:
    if dtype not in HALVES:
        return ("auto", *FLOATS)
    if torch.cuda.get_device_capability()[0] != 9:
        return ("auto", "portable")
    return ("auto", "portable", *HOPPER)


DTYPES = (*HALVES, torch.float32, TF32)
COMBINATIONS = [
    pytest.param(dtype, kernel, rows, id=f"{str(dtype).removeprefix('torch.')}-{kernel}-{rows}")
    for dtype in DTYPES
    for kernel in ("auto", *(("portable", *HOPPER) if dtype in HALVES else FLOATS))
    for rows in (64, 128)
    if rows == 64 or kernel in ("auto", "portable", "wgmma128", *FLOATS)
]


def _needs(kernel: str) -> None:
    if kernel in HOPPER and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("wgmma needs compute capability 9.0")


def _poisoned(tensor: Tensor) -> Tensor:
    """Return a batch_inner copy whose lanes behind the batch are NaN."""
    batch, channels, height, width = tensor.shape
    memory = tensor.new_full((height, width, channels, batch_inner.padded_batch(batch)), float("nan"))
    memory[..., :batch] = tensor.permute(2, 3, 1, 0)
    return memory[..., :batch].permute(3, 2, 0, 1)


def _arguments(case: Drawn, rows: int = 64, **changes: Any) -> dict[str, Any]:
    tiled = tiles.tile(case.packed, rows)
    arguments = {
        "input": _poisoned(case.input),
        "tile_values": tiled.values,
        "tile_columns": tiled.columns,
        "tiles": tiled.tiles,
        "tile_rows": tiled.rows,
        "bias": case.bias_values,
        "weight_shape": case.weight_shape,
        "stride": case.stride,
        "padding": case.padding,
        "dilation": case.dilation,
        "groups": case.groups,
        "activation": case.activation,
        "add": None if case.added is None else _poisoned(case.added),
        "allow_tf32": case.tf32,
    }
    return arguments | changes


def _run(case: Drawn, kernel: str = "auto", rows: int = 64, **changes: Any) -> Tensor:
    poison = torch.full((1 << 20,), float("nan"), device="cuda")
    del poison  # what the output's memory holds, if the allocator reuses it
    got: Tensor = OP(**_arguments(case, rows, kernel=kernel, **changes))
    assert batch_inner.is_batch_inner(got)
    return got


def _check(case: Drawn, got: Tensor, input: Tensor | None = None) -> None:
    """Assert that every output is within what float sums and one rounding explain."""
    tensors = [case.input if input is None else input, case.weight, case.bias_values, case.added]
    wide = [None if t is None else t.double() for t in tensors]
    assert got.shape == case.output_shape() and got.dtype == case.dtype
    expected = ACTIVATIONS[case.activation](case._convolve(*wide).cpu()).to(got.device)
    magnitude = case._convolve(*(None if t is None else t.abs() for t in wide))
    result, sums = ROUNDOFF[case.dtype]
    terms = case.weight[0].numel() + 8
    products = terms * sums + (TF32_PRODUCT if case.tf32 else 0)
    bound = STEEPEST * products * magnitude + 1.01 * result * expected.abs() + 2.0**-24
    assert not got.isnan().any(), "an output was not written"
    assert ((got.double() - expected).abs() / bound).max().item() <= 1


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"batch": 16},
    "batch_1": {"batch": 1, "add": True},
    "batch_7": {"batch": 7, "activation": "silu"},
    "batch_100": {"batch": 100, "size": (20, 20), "activation": "hardswish", "add": True},
    "batch_256": {"batch": 256, "size": (7, 7), "in_channels": 128, "out_channels": 128, "blocks": 0.1},
    "no_bias": {"batch": 8, "bias": False},
    "add_relu": {"batch": 64, "add": True, "activation": "relu"},
    "relu6": {"batch": 24, "activation": "relu6"},
    "stride_2": {"batch": 32, "stride": (2, 2)},
    "stride_3_1": {"batch": 9, "stride": (3, 1)},
    "no_padding": {"batch": 8, "padding": (0, 0, 0, 0)},
    "asymmetric_padding": {"batch": 24, "padding": (0, 3, 2, 1)},
    "padding_over_kernel": {"batch": 9, "padding": (5, 4, 6, 7)},
    "dilation": {"batch": 8, "dilation": (2, 3), "padding": (2, 2, 3, 3)},
    "stride_and_dilation": {"batch": 8, "stride": (2, 3), "dilation": (3, 2)},
    "groups_4": {"batch": 16, "groups": 4},
    "depthwise": {"batch": 16, "groups": 24, "out_channels": 24, "blocks": 1.0},
    "pointwise": {"batch": 64, "kernel": (1, 1), "padding": (0, 0, 0, 0), "in_channels": 256, "out_channels": 200},
    "even_kernel": {"batch": 8, "kernel": (2, 4)},
    "largest_kernel": {"batch": 8, "kernel": (15, 15), "size": (17, 16), "in_channels": 3},
    "columns_that_stay": {"batch": 64, "in_channels": 128, "out_channels": 96, "size": (7, 7), "blocks": 0.5},
    "columns_that_stream": {"batch": 64, "in_channels": 512, "out_channels": 96, "size": (7, 7), "blocks": 1.0},
    "streamed_with_add": {"batch": 32, "in_channels": 512, "size": (5, 5), "blocks": 1.0, "add": True},
    "many_rows": {"batch": 64, "in_channels": 64, "out_channels": 300},
    "more_than_32_tiles": {"batch": 8, "in_channels": 16, "out_channels": 2500, "size": (5, 5), "blocks": 0.2},
    "nothing_kept": {"batch": 16, "blocks": 0.0, "residual": 0.0, "add": True},
    "residual_only": {"batch": 16, "blocks": 0.0, "residual": 0.1},
    "one_row": {"batch": 8, "out_channels": 1},
    "one_pixel": {"batch": 8, "size": (1, 1), "kernel": (1, 1), "padding": (0, 0, 0, 0)},
    "wide_image": {"batch": 8, "size": (3, 700)},
}


@pytest.mark.parametrize(("dtype", "kernel", "rows"), COMBINATIONS)
def test_every_option_agrees_with_float64(dtype: torch.dtype | str, kernel: str, rows: int) -> None:
    _needs(kernel)
    for options in OPTIONS.values():
        case = Drawn(dtype=dtype, **options)
        _check(case, _run(case, kernel, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_calls_agree_with_float64(seed: int, dtype: torch.dtype | str) -> None:
    case, _ = random_case(seed, dtype, (1, 3, 8, 17, 64, 130))
    for kernel in _kernels(dtype):
        _check(case, _run(case, kernel))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_in_other_layouts_are_moved(dtype: torch.dtype | str) -> None:
    case = Drawn(dtype=dtype, batch=12, add=True)
    wanted = _run(case)
    for layout in (torch.contiguous_format, torch.channels_last):
        input, add = (t.contiguous(memory_format=layout) for t in (case.input, case.added))
        assert torch.equal(_run(case, input=input, add=add), wanted)


def test_lanes_behind_the_batch_that_are_not_in_the_storage_are_not_read() -> None:
    case = Drawn(dtype=torch.bfloat16, batch=12)
    short = case.input.new_empty_strided(case.input.shape, batch_inner.strides(case.input.shape)).copy_(case.input)
    assert not batch_inner.is_batch_inner(short)
    assert torch.equal(_run(case, input=short), _run(case))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_nan_passes_through_every_activation(activation: str, dtype: torch.dtype) -> None:
    case = Drawn(dtype=dtype, batch=8, activation=activation, add=True)
    case.added.fill_(float("nan"))
    for kernel in _kernels(dtype):
        assert _run(case, kernel).isnan().all()


def test_the_kernel_waits_for_the_stream_it_is_called_on() -> None:
    case = Drawn(dtype=torch.bfloat16, batch=16)
    arguments = _arguments(case)
    fresh = case.draw(*case.input.shape, seed=7)
    side, done = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        OP(**arguments)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        arguments["input"].copy_(fresh)
        out = OP(**arguments)
        done.record()
    assert not done.query(), "the call waited for the device"
    done.synchronize()
    _check(case, out, fresh)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_streams_at_once_do_not_disturb_each_other(dtype: torch.dtype | str) -> None:
    cases = [Drawn(dtype=dtype, batch=64, seed=seed, size=(30, 30), activation="relu", add=True) for seed in (0, 1)]
    arguments = [_arguments(case) for case in cases]
    expected = [OP(**own) for own in arguments]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for stream, own, out in zip(streams, arguments, outs, strict=True):
            with torch.cuda.stream(stream):
                out.append(OP(**own))
    torch.cuda.synchronize()
    for out, want in zip(outs, expected, strict=True):
        assert all(torch.equal(got, want) for got in out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chain_in_a_graph_replays_a_thousand_times_bit_equal(dtype: torch.dtype | str) -> None:
    """A chain whose launches overlap: each reads what the one before wrote, in memory that is used again."""
    options = {"in_channels": 96, "out_channels": 96, "size": (7, 7), "blocks": 0.2, "activation": "relu"}
    case = Drawn(dtype=dtype, batch=64, bias=True, **options)
    for kernel in _kernels(dtype):
        arguments = _arguments(case, kernel=kernel)
        arguments["tile_values"] = arguments["tile_values"] * 0.05  # so that nothing overflows

        def chain(arguments: dict[str, Any] = arguments) -> Tensor:
            value = arguments["input"]
            for _ in range(4):
                value = OP(**arguments | {"input": value, "add": value})
                value = OP(**arguments | {"input": value, "add": None})
            return value

        wanted = chain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain()
        for _ in range(1000):
            graph.replay()
        assert torch.equal(out, wanted) and out.isfinite().all() and out.any()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [(torch.bfloat16, "auto"), (torch.bfloat16, "portable"), (torch.float32, "auto"), (TF32, "auto")],
)
def test_a_tensor_of_more_than_two_to_the_31_elements(dtype: torch.dtype | str, kernel: str) -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of memory")
    case = Drawn(dtype=dtype, batch=8, in_channels=64, out_channels=64, size=(4, 4), blocks=0.05)
    memory = torch.randn(2056, 2056, 64, 8, device="cuda", dtype=case.dtype)
    input = memory.permute(3, 2, 0, 1)
    assert input.numel() > 2**31 and batch_inner.is_batch_inner(input)
    got = _run(case, kernel, input=input)
    weight, bias = case.weight.double(), case.bias_values.double()
    for part, inner in ((slice(0, 40), slice(0, 38)), (slice(-40, None), slice(-38, None))):
        corner = input[:, :, part, part].double()
        wanted = torch.nn.functional.conv2d(corner, weight, bias, padding=1)[..., inner, inner]
        error = (got[:, :, part, part][..., inner, inner].double() - wanted).norm() / wanted.norm()
        assert error < {torch.bfloat16: 5e-3, torch.float32: 1e-6, TF32: 1e-3}[dtype]


def test_tables_that_point_outside_stop_the_kernel() -> None:
    calls = [
        ("bfloat16", {"kernel": "auto"}, True),
        ("bfloat16", {"kernel": "portable"}, False),
        ("float32", {"kernel": "auto"}, False),
        ("float32", {"kernel": "auto", "allow_tf32": True}, False),
    ]
    for damage, text in hostile_tables.outputs("test_cuda_tiled", 16, calls).items():
        assert "REFUSED" in text and "illegal memory access" not in text, f"{damage}: {text}"
