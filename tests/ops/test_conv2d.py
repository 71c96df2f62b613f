"""fxsparse::conv2d against torch.nn.functional.conv2d in float64, and its fake, autograd and autocast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASKS = ["empty", "full", "unstructured", "blocks", "mixed"]
OPTIONS = {
    "plain": {},
    "no padding": {"padding": (0, 0, 0, 0)},
    "stride 2": {"stride": (2, 2)},
    "stride 3, 2": {"stride": (3, 2), "size": (17, 20)},
    "stride over kernel": {"kernel": (1, 1), "stride": (3, 4), "padding": (0, 0, 0, 0)},
    "dilation": {"dilation": (2, 3), "padding": (2, 2, 3, 3)},
    "1x1": {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
    "even kernel, one-sided padding": {"kernel": (2, 4), "padding": (0, 1, 1, 2)},
    "1x7": {"kernel": (1, 7), "padding": (0, 0, 3, 3)},
    "5x5 over a 3x3 image": {"kernel": (5, 5), "size": (3, 3), "padding": (2, 2, 2, 2)},
    "groups": {"groups": 4},
    "depthwise": {"groups": 8, "out_channels": 8},
    "depthwise with a multiplier": {"groups": 8, "out_channels": 16},
    "one channel out": {"out_channels": 1},
    "100 channels out": {"out_channels": 100},
    "unbatched": {"batch": None},
    "batch 0": {"batch": 0},
    "batch 17": {"batch": 17, "size": (4, 4)},
    "wide": {"size": (3, 300), "batch": 1},
    "one pixel": {"size": (1, 1), "batch": 5},
    "output of one pixel": {"size": (3, 3), "padding": (0, 0, 0, 0)},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(dtype: torch.dtype, options: dict, mask: str) -> None:
    Case(dtype=dtype, mask=mask, **options).check()


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (2, 0, 1, 3), (0, 0, 4, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_every_padding_mode_agrees(mode: str, padding: tuple, stride: tuple) -> None:
    Case(padding_mode=mode, padding=padding, stride=stride).check()


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["mixed", "empty"])
def test_the_fused_epilogue_agrees(activation: str, add: bool, dtype: torch.dtype, mask: str) -> None:
    Case(activation=activation, add=add, dtype=dtype, mask=mask).check()


@pytest.mark.parametrize("width", range(1, 34))
def test_every_width_agrees(width: int) -> None:
    for batch in (1, 9):
        Case(size=(5, width), batch=batch, seed=width).check()


@given(
    batch=st.integers(1, 9),
    channels=st.sampled_from([(1, 4, 6), (1, 3, 40), (2, 6, 34), (4, 8, 8), (1, 17, 33)]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    size=st.tuples(st.integers(4, 18), st.integers(4, 18)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    mask=st.sampled_from(MASKS),
    activation=st.sampled_from(["none", "relu", "silu"]),
    add=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_any_convolution_agrees(channels, mode, **options) -> None:
    groups, in_channels, out_channels = channels
    kernel, size = options["kernel"], options["size"]
    padding, dilation = options["padding"], options["dilation"]
    for axis in (0, 1):
        if size[axis] + padding[2 * axis] + padding[2 * axis + 1] < dilation[axis] * (kernel[axis] - 1) + 1:
            return
    Case(groups=groups, in_channels=in_channels, out_channels=out_channels, padding_mode=mode, **options).check()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
        lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
        lambda x: x.flip(0).as_strided(x.shape, x.stride()),
    ],
    ids=["channels_last", "transposed", "sliced", "expanded", "as_strided"],
)
def test_any_strides_of_the_input_agree(view) -> None:
    case = Case(add=True)
    case.input, case.add_tensor = view(case.input), view(case.add_tensor)
    case.check()


def test_the_input_is_not_written_to() -> None:
    case = Case(kernel=(1, 1), padding=(0, 0, 0, 0), activation="relu", add=True)
    before = [case.input.clone(), case.add_tensor.clone(), case.packed.values.clone()]
    case.run()
    assert all(
        torch.equal(a, b) for a, b in zip(before, (case.input, case.add_tensor, case.packed.values), strict=True)
    )


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_any_number_of_threads_agrees_and_repeats_bit_for_bit(threads: int, batch: int) -> None:
    case, before = Case(batch=batch, out_channels=70, size=(13, 13)), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        case.check()
        assert torch.equal(case.run(), case.run())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch": None, "stride": (2, 1)},
        {"activation": "silu", "add": True},
        {"padding_mode": "reflect", "padding": (1, 0, 2, 1)},
        {"groups": 2, "mask": "unstructured", "bias": False},
    ],
    ids=["plain", "unbatched", "epilogue", "reflect", "groups"],
)
def test_opcheck(dtype: torch.dtype, options: dict) -> None:
    for grad in (False, True):
        case = Case(dtype=dtype, **options)
        if grad:
            case.input.requires_grad_()
            case.packed.values.requires_grad_()
        torch.library.opcheck(torch.ops.fxsparse.conv2d.default, case.arguments())
    p = case.packed
    tables = (p.columns, p.panels, p.rows)
    torch.library.opcheck(torch.ops.fxsparse.unpack.default, (p.values, *tables, list(p.weight_shape)))
    torch.library.opcheck(torch.ops.fxsparse.repack.default, (case.weight, *tables, p.values.numel()))


def test_opcheck_channels_last() -> None:
    case = Case()
    case.input = case.input.to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fxsparse.conv2d.default, case.arguments())


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_mode": "reflect", "padding": (1, 2, 0, 1)},
        {"padding_mode": "circular", "stride": (2, 1)},
        {"padding_mode": "replicate", "groups": 2},
        {"padding": (0, 1, 2, 0), "batch": None},
    ],
    ids=["plain", "reflect", "circular", "replicate", "one-sided"],
)
def test_gradients_of_input_values_bias_and_add(activation: str, options: dict) -> None:
    case = Case(
        dtype=torch.float64,
        size=(5, 6),
        in_channels=4,
        out_channels=6,
        activation=activation,
        add=True,
        **options,
    )
    arguments = list(case.arguments())
    wanted = [0, 1, 5, 13]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        for i, tensor in zip(wanted, tensors, strict=True):
            arguments[i] = tensor
        return torch.ops.fxsparse.conv2d(*arguments)

    leaves = [arguments[i].clone().requires_grad_() for i in wanted]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_the_gradient_of_padding_values_is_zero() -> None:
    case = Case(out_channels=5, mask="full")
    values = case.packed.values.requires_grad_()
    case.run().sum().backward()
    p = case.packed
    everything = torch.ones(p.weight_shape)
    real = torch.ops.fxsparse.repack(everything, p.columns, p.panels, p.rows, values.numel()).bool()
    assert not real.all()
    assert values.grad is not None
    assert values.grad[~real].abs().max() == 0
    assert values.grad[real].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_dtype_of_the_region(dtype: torch.dtype) -> None:
    case = Case(add=True)
    with torch.autocast("cpu", dtype=dtype):
        got = case.run()
        dense = F.conv2d(case.input, case.weight, case.bias_tensor, padding=1) + case.add_tensor
    assert got.dtype == dtype
    scale = case.expected().abs().max()
    assert (got.double() - case.expected()).abs().max() / scale < 4 * torch.finfo(dtype).eps
    assert (dense.double() - case.expected()).abs().max() / scale < 8 * torch.finfo(dtype).eps


def test_autocast_leaves_float64_alone() -> None:
    case = Case(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.run().dtype == torch.float64


def test_torch_compile_takes_it_whole_with_dynamic_shapes() -> None:
    case = Case()
    arguments = case.arguments()
    compiled = torch.compile(
        lambda x: torch.ops.fxsparse.conv2d(x, *arguments[1:]) * 2,
        fullgraph=True,
        dynamic=True,
        backend="eager",
    )
    for shape in [(2, 8, 9, 11), (5, 8, 7, 30)]:
        x = torch.randn(shape)
        assert torch.equal(compiled(x), torch.ops.fxsparse.conv2d(x, *arguments[1:]) * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: lambda c: c.input.double()}, "Double|float64|dtype"),
        ({0: lambda c: c.input[:, :5]}, "channels"),
        ({0: lambda c: c.input[0, 0]}, "expected .N, C, H, W. or .C, H, W."),
        ({5: lambda c: torch.zeros(3)}, "bias"),
        ({7: lambda c: [1]}, "stride"),
        ({7: lambda c: [0, 1]}, "stride"),
        ({8: lambda c: [-1, 0, 0, 0]}, "padding"),
        ({11: lambda c: "wrap"}, "padding_mode"),
        ({12: lambda c: "gelu"}, "activation"),
        ({13: lambda c: torch.zeros(1)}, "add"),
        ({2: lambda c: c.packed.columns.long()}, "columns"),
        ({3: lambda c: c.packed.panels[:, :3]}, "panels"),
        ({11: lambda c: "reflect", 8: lambda c: [9, 0, 0, 0]}, "reflect"),
        ({8: lambda c: [0, 0, 0, 0], 0: lambda c: c.input[..., :2]}, "output|kernel"),
    ],
)
def test_bad_arguments_get_one_clear_error(change: dict, message: str) -> None:
    case = Case()
    arguments = list(case.arguments())
    for i, value in change.items():
        arguments[i] = value(case)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fxsparse.conv2d(*arguments)
