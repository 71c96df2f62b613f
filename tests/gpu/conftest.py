"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def exact_float32() -> Iterator[None]:
    """Keep TF32 away. Not by monkeypatch, which takes the settings for attributes and deletes them in the end."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(params=["batch_inner", "planes"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Store the values of a region in one way, whatever would be faster."""
    monkeypatch.setenv("FXSPARSE_CUDA_STORAGE", request.param)
    return str(request.param)


@pytest.fixture
def poisoned_memory() -> None:
    """Fill what torch's allocator will hand out with NaN: what nobody wrote must not be read."""
    for size in (2**12, 2**16, 2**20, 2**24):
        blocks = [torch.full((size,), float("nan"), device="cuda") for _ in range(4)]
        del blocks
