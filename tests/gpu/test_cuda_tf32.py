"""TF32 on CUDA: torch's setting decides, factors are rounded to nearest, sums stay float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_cuda_planes
import test_cuda_tiled
import torch
from drawn import TF32, Drawn
from models import masked_dense, random_masks
from test_cuda_planes import TILES
from test_cuda_tiled import FLOATS
from torch import Tensor, nn

import fxsparse
from fxsparse.graph_module import ConvertedModule

pytestmark = pytest.mark.gpu
FOLDED = 13  # bits of float32 that TF32 has not

Way = Callable[..., Tensor]
WAYS: dict[str, Way] = {
    **{
        kernel: lambda case, kernel=kernel, **changes: test_cuda_tiled._run(case, kernel, **changes)
        for kernel in FLOATS
    },
    **{
        f"planes {tile}": lambda case, tile=tile, **changes: test_cuda_planes._run(
            test_cuda_planes._arguments(case, tile=tile, **changes)
        )
        for tile in TILES[1:]
    },
}


def _cut(tensor: Tensor) -> Tensor:
    """Return what TF32 can represent."""
    return (tensor.view(torch.int32) >> FOLDED << FOLDED).view(torch.float32)


@pytest.fixture
def setting() -> Iterator[Any]:
    """Give what sets whether convolutions may use TF32."""
    before = torch.backends.cudnn.allow_tf32
    yield lambda allowed: setattr(torch.backends.cudnn, "allow_tf32", allowed)
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("way", WAYS)
def test_factors_that_tf32_can_represent_lose_nothing(way: str) -> None:
    case = Drawn(dtype=TF32, batch=5, add=True, activation="relu", in_channels=70, out_channels=100)
    case.weight = _cut(case.weight)
    case.packed.values.copy_(_cut(case.packed.values))
    case.input = _cut(case.input)
    got = WAYS[way](case)
    case.tf32 = False  # the bound of exact products
    test_cuda_tiled._check(case, got)


@pytest.mark.parametrize("way", WAYS)
def test_factors_are_rounded_to_nearest(way: str) -> None:
    # Where all products are positive, cutting off would make every output smaller by 2**-10 of itself, on the average.
    case = Drawn(dtype=TF32, batch=4, bias=False, in_channels=128, out_channels=64, blocks=1.0)
    case.weight = case.weight.abs()
    case.packed.values.abs_()
    case.input = case.input.abs()
    wanted = case._convolve(case.input.double(), case.weight.double(), None, None)
    error = (WAYS[way](case).double() - wanted) / wanted
    assert 0 < error.abs().max() < 2.0**-12
    assert error.mean().abs() < 2.0**-16


@pytest.mark.parametrize("way", WAYS)
def test_infinities_and_nan_stay(way: str) -> None:
    case = Drawn(dtype=TF32, batch=2, bias=False, in_channels=8, kernel=(1, 1), padding=(0, 0, 0, 0), blocks=1.0)
    # The NaN that arithmetic on a GPU gives, torch's, and negative ones. (One of whose low bits TF32 has none, which
    # nothing computes, is an infinity to the tensor cores.)
    bits = (0x7FFFFFFF, 0x7FC00000, -1, -0x400000, 0x7F800000, -0x800000)
    for index, pattern in enumerate(bits):
        case.input.view(torch.int32)[0, 0, 0, index] = pattern
    reads = case.weight[:, 0, 0, 0] != 0
    assert reads.any()
    got = WAYS[way](case)[0, :, 0][reads]
    assert got[:, :4].isnan().all() and got[:, 4:6].isinf().all() and got[:, 6:].isfinite().all()


@pytest.mark.parametrize("batch", [2, 16])
def test_a_converted_model_follows_torch_at_every_call(batch: int, setting: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 64, 3)).cuda().eval()
    masks = random_masks(model, 0.2)
    x = torch.randn(batch, 64, 14, 14, device="cuda")
    settings = fxsparse.Settings(calibrate=False)
    setting(False)
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=settings)
    assert isinstance(fast, ConvertedModule)
    fxsparse.set_mode(fast, "sparse")
    assert "region_batch_inner" in fast.code
    wanted = masked_dense(model, masks).double()(x.double())

    def error() -> float:
        return float((fast(x).double() - wanted).norm() / wanted.norm())

    for allowed in (False, True, False):
        setting(allowed)
        assert (5e-5 < error() < 2e-3) if allowed else error() < 1e-6


def test_traced_calls_keep_what_was_set(setting: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3)).cuda().eval()
    masks = random_masks(model, 0.2)
    x = torch.randn(16, 64, 14, 14, device="cuda")
    fast = fxsparse.convert(model, masks, example_inputs=(x,), settings=fxsparse.Settings(calibrate=False))
    assert isinstance(fast, ConvertedModule)
    fxsparse.set_mode(fast, "sparse")
    found = {}
    for allowed in (False, True):
        setting(allowed)
        torch._dynamo.reset()
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        exported = torch.export.export(fast, (x,)).module()
        found[allowed] = fast(x)
        assert torch.equal(compiled(x), found[allowed]) and torch.equal(exported(x), found[allowed])
    assert not torch.equal(found[False], found[True])


def test_bfloat16_does_not_ask() -> None:
    case = Drawn(dtype=torch.bfloat16, batch=8)
    outs = [test_cuda_tiled._run(case, allow_tf32=allowed) for allowed in (False, True)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_of_the_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    for kernel in ("float_64", "float_256") if dtype == torch.bfloat16 else ("wgmma64", "wgmma128half"):
        with pytest.raises(RuntimeError, match="does not do this convolution: the kernel is for"):
            test_cuda_tiled._run(Drawn(dtype=dtype, batch=8), kernel)
