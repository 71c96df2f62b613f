"""The CUDA kernels against torch.nn.functional.conv2d in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from drawn import ROUNDOFF, Drawn

import fxsparse

pytestmark = pytest.mark.gpu
DTYPES = list(ROUNDOFF)
OPS = torch.ops.fxsparse


@pytest.fixture(autouse=True)
def _the_kernels_are_the_compiled_ones() -> None:
    assert fxsparse.capabilities().cuda, fxsparse.capabilities().cuda_error


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_0": {"batch": 0, "add": True},
    "batch_1": {"batch": 1},
    "batch_17": {"batch": 17},
    "unbatched": {"batch": None, "add": True},
    "no_bias": {"bias": False},
    "add": {"add": True},
    "stride_2": {"stride": (2, 2)},
    "stride_3_1": {"stride": (3, 1)},
    "no_padding": {"padding": (0, 0, 0, 0)},
    "asymmetric_padding": {"padding": (0, 3, 2, 1)},
    "padding_over_kernel": {"padding": (5, 4, 6, 7)},
    "dilation": {"dilation": (2, 3), "padding": (2, 2, 3, 3)},
    "stride_and_dilation": {"stride": (2, 3), "dilation": (3, 2)},
    "reflect": {"mode": "reflect", "padding": (2, 1, 0, 3)},
    "reflect_to_the_limit": {"mode": "reflect", "size": (3, 5), "padding": (2, 2, 4, 4)},
    "replicate": {"mode": "replicate", "padding": (2, 1, 0, 3)},
    "replicate_over_the_size": {"mode": "replicate", "size": (2, 3), "padding": (7, 3, 5, 9)},
    "circular": {"mode": "circular", "padding": (2, 1, 0, 3), "stride": (2, 1)},
    "circular_to_the_limit": {
        "mode": "circular",
        "size": (3, 4),
        "padding": (3, 3, 4, 4),
        "dilation": (2, 2),
    },
    "groups_2": {"groups": 2},
    "groups_8": {"groups": 8, "stride": (2, 2)},
    "depthwise": {"groups": 24, "out_channels": 24, "blocks": 1.0},
    "depthwise_times_2": {"groups": 24, "out_channels": 48, "blocks": 0.3, "residual": 0.5},
    "pointwise": {"kernel": (1, 1), "padding": (0, 0, 0, 0)},
    "even_kernel": {"kernel": (2, 4)},
    "kernel_of_the_input": {"kernel": (13, 17), "in_channels": 3, "padding": (0, 0, 0, 0)},
    "many_columns": {"in_channels": 70, "size": (7, 7)},
    "blocks_only": {"residual": 0.0},
    "residual_only": {"blocks": 0.0, "residual": 0.1},
    "residual_dense": {"blocks": 0.0, "residual": 1.0},
    "dense": {"blocks": 1.0},
    "nothing_kept": {"blocks": 0.0, "residual": 0.0, "add": True},
    "one_row": {"out_channels": 1},
    "many_rows": {"out_channels": 300, "size": (5, 5)},
    "one_pixel": {"size": (1, 1), "kernel": (1, 1), "padding": (0, 0, 0, 0)},
    "wide_image": {"size": (3, 700), "batch": 1},
    "relu": {"activation": "relu"},
    "relu6_add": {"activation": "relu6", "add": True},
    "silu": {"activation": "silu"},
    "hardswish_add": {"activation": "hardswish", "add": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_option_agrees_with_float64(options: dict[str, Any], dtype: torch.dtype) -> None:
    case = Drawn(dtype=dtype, **options)
    case.check(case.run())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(24))
def test_random_calls_agree_with_float64(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    groups = pick(1, 1, 2, 3)
    mode = pick("zeros", "zeros", "reflect", "replicate", "circular")
    case = Drawn(
        dtype=dtype,
        batch=pick(0, 1, 3, 17),
        in_channels=groups * pick(1, 5, 40),
        out_channels=groups * pick(1, 7, 16, 45),
        size=(pick(11, 14), pick(9, 20)),
        kernel=(pick(1, 3, 5), pick(1, 2, 3)),
        stride=(pick(1, 2, 3), pick(1, 2)),
        padding=(pick(0, 1, 4), pick(0, 2), pick(0, 3), pick(1, 5)),
        dilation=(pick(1, 2), pick(1, 3)),
        groups=groups,
        mode=mode,
        activation=pick("none", "relu", "relu6", "silu", "hardswish"),
        bias=pick(True, False),
        add=pick(True, False),
        blocks=pick(0.0, 0.2, 1.0),
        residual=pick(0.0, 0.03, 0.9),
        seed=seed,
    )
    case.check(case.run())


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "silu", "hardswish"])
def test_nan_passes_through_every_activation(activation: str) -> None:
    case = Drawn(activation=activation, add=True)
    case.added.fill_(float("nan"))
    assert torch.ops.fxsparse.conv2d(**case.arguments()).isnan().all()


def test_strided_arguments_give_the_same_result() -> None:
    case = Drawn(add=True)
    dense = case.run()
    channels_last = case.input.to(memory_format=torch.channels_last)
    assert torch.equal(case.run(input=channels_last), dense)
    assert case.run(input=channels_last).is_contiguous()
    doubled = {
        name: value.repeat_interleave(2, -1)[..., ::2]
        for name, value in case.arguments().items()
        if isinstance(value, torch.Tensor)
    }
    assert not any(value.is_contiguous() for value in doubled.values())
    assert torch.equal(case.run(**doubled), dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "groups_8", "residual_only", "nothing_kept", "many_rows"])
def test_unpack_and_repack_are_inverse(name: str, dtype: torch.dtype) -> None:
    case = Drawn(dtype=dtype, **OPTIONS[name])
    values, tables = case.packed.values, case.tables()
    poison = torch.full_like(case.weight, float("nan"))
    del poison
    assert torch.equal(OPS.unpack(values, *tables, case.weight_shape), case.weight)
    other = case.draw(*case.weight_shape, seed=9)
    repacked = OPS.repack(other, *tables, values.numel())
    assert torch.equal(OPS.unpack(repacked, *tables, case.weight_shape), other * (case.weight != 0))
    assert torch.equal(OPS.repack(case.weight, *tables, values.numel()), values)
    on_cpu = OPS.repack(other.cpu(), *(table.cpu() for table in tables), values.numel())
    assert torch.equal(repacked.cpu(), on_cpu)


@pytest.mark.parametrize("name", ["plain", "groups_2", "reflect", "circular", "silu", "hardswish_add", "unbatched"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    small = {"batch": 1, "in_channels": 4, "out_channels": 6, "size": (5, 6)}
    case = Drawn(dtype=torch.float64, **(small | OPTIONS[name]))
    leaves = [case.input, case.packed.values, case.bias_values]
    leaves += [case.added] if case.add else []

    def call(input: Any, values: Any, bias: Any, add: Any = None) -> torch.Tensor:
        return OPS.conv2d(**case.arguments(input=input, values=values, bias=bias, add=add))

    leaves = [leaf.requires_grad_() for leaf in leaves]
    # The backward of torch's own convolution and index_add sum in any order.
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, nondet_tol=1e-9)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_more_than_2_to_the_31_elements(mode: str) -> None:
    shape, rows = (3, 11, 8192, 8192), 4
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free device memory")
    small = Drawn(dtype=torch.float16, in_channels=shape[1], out_channels=12, mode=mode)
    input = torch.empty(shape, dtype=torch.float16, device="cuda").normal_()
    out = OPS.conv2d(**small.arguments(input=input))
    assert input.numel() > 2**31
    assert out.numel() > 2**31
    # The last rows of the last image, from enough input rows that the slice's own top padding does not show.
    pad_mode = "constant" if mode == "zeros" else mode
    strip = F.pad(input[-1:, :, -rows - 2 :].double(), (1, 1, 1, 1), mode=pad_mode)
    expected = F.conv2d(strip, small.weight.double(), small.bias_values.double())[:, :, -rows:]
    error = (out[-1:, :, -rows:].double() - expected).abs() / (1 + expected.abs())
    assert error.max().item() < 2e-3


def test_the_kernel_runs_on_the_device_of_its_input() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    case = Drawn(device="cuda:1", add=True)
    assert torch.cuda.current_device() == 0
    out = case.run()
    assert out.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    case.check(out)


def _on_cpu(name: str) -> Any:
    return lambda a: {name: a[name].cpu()}


REFUSALS: dict[str, tuple[Any, str]] = {
    "dtypes": (
        lambda a: {"values": a["values"].half()},
        "'values' has dtype Half, expected that of 'input', Float",
    ),
    "bias_dtype": (lambda a: {"bias": a["bias"].double()}, "'bias' has dtype Double"),
    "integers": (lambda a: {"input": a["input"].int()}, "'input' has dtype Int, expected float32"),
    "input_device": (_on_cpu("input"), "'input' is on cpu, expected the CUDA device"),
    "values_device": (_on_cpu("values"), "'values' is on cpu, expected cuda:0"),
    "columns_device": (_on_cpu("columns"), "'columns' is on cpu, expected cuda:0"),
    "panels_device": (_on_cpu("panels"), "'panels' is on cpu, expected cuda:0"),
    "rows_device": (_on_cpu("rows"), "'rows' is on cpu, expected cuda:0"),
    "columns_dtype": (lambda a: {"columns": a["columns"].long()}, "'columns' has dtype Long, expected Int"),
    "panels_shape": (lambda a: {"panels": a["panels"][:, :3]}, r"'panels' has shape \(\d+, 3\)"),
    "rows_shape": (lambda a: {"rows": a["rows"][1:]}, "'rows' has shape .* 16 for each of"),
    "channels": (
        lambda a: {"weight_shape": (40, 23, 3, 3)},
        "24 channels, expected 1 groups of 23",
    ),
    "groups": (lambda a: {"groups": 7}, "'groups' is 7, expected a divisor"),
    "dimensions": (lambda a: {"input": a["input"][0, 0]}, r"expected \(N, C, H, W\) or \(C, H, W\)"),
    "stride_length": (lambda a: {"stride": (1,)}, r"'stride' is \(1\), expected 2 integers"),
    "stride_zero": (lambda a: {"stride": (0, 1)}, "expected every entry to be at least 1"),
    "padding_length": (lambda a: {"padding": (1, 1)}, r"'padding' is \(1, 1\), expected 4 integers"),
    "padding_negative": (lambda a: {"padding": (-1, 0, 0, 0)}, "at least 0"),
    "mode": (lambda a: {"padding_mode": "wrap"}, "'padding_mode' is 'wrap', expected 'zeros'"),
    "activation": (lambda a: {"activation": "gelu"}, "'activation' is 'gelu', expected 'none'"),
    "reflect": (lambda a: {"padding_mode": "reflect", "padding": (13, 0, 0, 0)}, "expected less than .* 13"),
    "circular": (lambda a: {"padding_mode": "circular", "padding": (0, 0, 18, 0)}, "expected at most .* 17"),
    "kernel": (lambda a: {"dilation": (8, 1)}, "The height of the padded input is 15, expected at least 17"),
    "bias_shape": (lambda a: {"bias": a["bias"][1:]}, r"'bias' has shape \(39\), expected \(40\)"),
    "add_shape": (lambda a: {"add": a["input"]}, "'add' has shape .* expected that of the output"),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_wrong_arguments_are_refused_in_one_sentence(change: Any, message: str) -> None:
    arguments = Drawn().arguments()
    with pytest.raises(RuntimeError, match=message):
        OPS.conv2d(**(arguments | change(arguments)))
    torch.cuda.synchronize()
