"""What rounding explains between the two paths of a site, and what it does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse import sites
from fxsparse.agreement import Disagreement, compare
from fxsparse.passes import PASSES
from fxsparse.passes.base import PassContext
from fxsparse.settings import Settings
from fxsparse.sites import ConvSite

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def site_with(conv: nn.Conv2d) -> tuple[nn.Module, ConvSite]:
    """Lower one convolution; return the module that holds its tensors, and its site."""
    gm = torch.fx.symbolic_trace(nn.Sequential(conv).eval())
    ctx = PassContext(Settings(cache=False))
    for run in PASSES:
        run(gm, ctx)
    ((_, site),) = sites.conv_sites(gm)
    assert site.packed
    return gm, site


def pruned(channels: int, out: int = 16, density: float = 0.1, dtype: torch.dtype = torch.float32, **options: object):
    conv = nn.Conv2d(channels, out, 3, **{"padding": 1, **options}).to(dtype)
    conv.weight.data.masked_fill_(torch.rand(conv.weight.shape) >= density, 0)
    return conv


def difference(gm: nn.Module, site: ConvSite, x: Tensor) -> Disagreement | None:
    with torch.no_grad():
        return compare(gm, site, x, sites.run_vanilla(gm, site, x), sites.run_sparse(gm, site, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 256, 2048])
@pytest.mark.parametrize("values", [torch.randn, torch.rand, torch.ones], ids=["normal", "positive", "constant"])
def test_honest_kernels_agree(dtype: torch.dtype, channels: int, values) -> None:
    gm, site = site_with(pruned(channels, dtype=dtype))
    assert difference(gm, site, values(1, channels, 7, 7, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_weights_whose_roundings_all_go_one_way_agree(dtype: torch.dtype) -> None:
    conv = nn.Conv2d(2048, 16, 3, padding=1).to(dtype)
    conv.weight.data.fill_(0.1)
    conv.weight.data[:, 256:] = 0
    gm, site = site_with(conv)
    assert difference(gm, site, torch.full((1, 2048, 5, 5), 0.1, dtype=dtype)) is None


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    exponents=st.tuples(st.integers(-45, 38), st.integers(-45, 38)),
    spread=st.integers(0, 12),
    bias=st.sampled_from([0.0, 1.0, -1e4, 1e30]),
    seed=st.integers(0, 2**16),
)
def test_wide_ranges_cancellation_and_denormals_agree(dtype, exponents, spread, bias, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    conv = pruned(32, density=0.2, dtype=torch.float64)
    scale = 10.0 ** torch.randint(-spread, spread + 1, conv.weight.shape, generator=generator).double()
    conv.weight.data *= scale * 10.0 ** exponents[0]
    conv.bias.data.fill_(bias)
    conv = conv.to(dtype)
    x = torch.randn(2, 32, 6, 6, dtype=torch.float64, generator=generator)
    x[:, 1::2] = -x[:, ::2]  # sums of what nearly cancels
    x *= 10.0 ** torch.randint(-spread, spread + 1, x.shape, generator=generator).double() * 10.0 ** exponents[1]
    gm, site = site_with(conv)
    assert difference(gm, site, x.to(dtype)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [32, 256, 2048])
def test_one_lost_weight_of_typical_size_is_found(dtype: torch.dtype, channels: int) -> None:
    gm, site = site_with(pruned(channels, dtype=dtype))
    values = sites.attribute(gm, site.packed_names[0])
    lost = int((values.abs() - values[values != 0].abs().median()).abs().argmin())
    values[lost] = 0
    found = difference(gm, site, torch.randn(2, channels, 8, 8, dtype=dtype))
    assert found is not None
    assert found.absolute > found.allowed


def test_infinite_inputs_are_compared_where_no_pruned_weight_meets_them() -> None:
    gm, site = site_with(pruned(16))
    x = torch.randn(1, 16, 8, 8)
    x[0, 3, 4, 4], x[0, 5, 1, 1] = torch.inf, torch.nan
    assert difference(gm, site, x) is None


def test_a_sum_that_is_too_large_for_half_precision_agrees() -> None:
    conv = pruned(64, dtype=torch.float16)
    conv.weight.data *= 30
    gm, site = site_with(conv)
    x = torch.randn(1, 64, 8, 8).mul(20000).clamp(-65000, 65000).half()
    assert bool(sites.run_sparse(gm, site, x).isinf().any())
    assert difference(gm, site, x) is None


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_sparse_output_that_is_not_finite_where_vanilla_is_disagrees(wrong: float) -> None:
    gm, site = site_with(pruned(16))
    x = torch.randn(1, 16, 8, 8)
    vanilla = sites.run_vanilla(gm, site, x).detach()
    sparse = vanilla.clone()
    sparse[0, 7, 2, 3] = wrong
    found = compare(gm, site, x, vanilla, sparse)
    assert found is not None
    assert (found.index, found.count) == ((0, 7, 2, 3), 1)
    assert found.absolute > 1e38


def test_the_sentence_says_which_where_and_how_much() -> None:
    gm, site = site_with(pruned(16))
    x = torch.randn(2, 16, 8, 8)
    vanilla = sites.run_vanilla(gm, site, x).detach()
    sparse = vanilla.clone()
    sparse[1, 7, 2, 3] += 0.5
    text = str(compare(gm, site, x, vanilla, sparse))
    for part in ("'0'", "(2, 16, 8, 8)", "float32", "in 1 outputs", "error 0.5", "(n, c, y, x) = (1, 7, 2, 3)"):
        assert part in text
    assert f"{float(vanilla[1, 7, 2, 3]):.9g}" in text


def test_inputs_without_a_batch_axis_have_three_indices() -> None:
    gm, site = site_with(pruned(16))
    x = torch.randn(16, 8, 8)
    vanilla = sites.run_vanilla(gm, site, x).detach()
    assert "(c, y, x) = " in str(compare(gm, site, x, vanilla, vanilla + 1))


def test_empty_outputs_agree() -> None:
    gm, site = site_with(pruned(16))
    assert difference(gm, site, torch.randn(0, 16, 8, 8)) is None


def test_outputs_of_other_shapes_do_not_compare() -> None:
    gm, site = site_with(pruned(16))
    x = torch.randn(1, 16, 8, 8)
    vanilla = sites.run_vanilla(gm, site, x).detach()
    with pytest.raises(ValueError, match="cannot compare"):
        compare(gm, site, x, vanilla, vanilla.double())


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_what_the_backend_may_round_is_allowed(precision: str) -> None:
    gm, site = site_with(pruned(32))
    x = torch.randn(1, 32, 8, 8)
    vanilla = sites.run_vanilla(gm, site, x).detach()
    weight, bias = (gm.get_parameter(name) for name in ("0.weight", "0.bias"))
    rounded = sites.vanilla_conv2d(site, x.bfloat16().float(), weight.bfloat16().float(), bias)
    assert compare(gm, site, x, vanilla, rounded) is not None
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = precision
        assert (compare(gm, site, x, vanilla, rounded.detach()) is None) == (precision == "bf16")
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
