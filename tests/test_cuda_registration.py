"""The CUDA library on a machine without a GPU: it loads, and it registers its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxsparse

PACKAGE = Path(fxsparse.__file__).parent
MISSING = [name for name in ("_C.abi3.so", "_C_cuda.abi3.so") if not (PACKAGE / name).exists()]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not built here: {', '.join(MISSING)}")


def test_the_cuda_library_loads_whatever_the_torch() -> None:
    capabilities = fxsparse.capabilities()
    assert capabilities.cuda_error is None
    assert capabilities.cuda


@pytest.mark.parametrize("name", ["conv2d", "conv2d_batch_inner", "region_batch_inner", "unpack", "repack"])
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fxsparse::{name}", "CUDA")


def test_loading_does_not_start_cuda() -> None:
    assert torch.cuda.is_available() or not torch.cuda.is_initialized()
